"""The analytic model behind the GEMM's blocking, beside the measured times.

    python benchmarks/gemm_model.py [--shapes 4096x4096] [--m 1,4,...] [--threads 1,2] [--group 32,128] [-o table|md|csv|json]

Two terms and nothing fitted: the bytes of the packed weights at the DRAM bandwidth, and the products at the int8 peak, slowed
by what shares their ports. A row block of `rows` x 32 columns issues, for a group of G, rows x G/2 dot products and, on the
same two ports, 4 rows multiplications and FMAs (and 2 rows more for zero points): that share is the most of the peak that
is left. The time is the larger term. Both roofs are measured in the same run, between the calls.
"""

import argparse
import statistics
from typing import Any

from assay import machine
from assay.measure.points import packed_bytes
from assay.ops import probe
from assay.report.progress import Progress
from assay.report.table import Column, number, percent, render, seconds, yes_no
from bounds import DramProbes, c_timers

COLUMNS = [
    Column("shape", "N x K"),
    Column("threads", "threads", align="right"),
    Column("group_size", "group", align="right"),
    Column("symmetric", "symmetric", yes_no),
    Column("m", "M", align="right"),
    Column("bytes_s", "bytes", seconds, "right"),
    Column("ops_s", "operations", seconds, "right"),
    Column("bound", "bound by"),
    Column("took_s", "measured", seconds, "right"),
    Column("ratio", "measured / model", number, "right"),
    Column("of_roof", "of its roof", percent, "right"),
]


def left_of_peak(group_size: int, symmetric: bool) -> float:
    """The share of the int8 peak that scaling and zero points leave to the products."""
    products, scaling = group_size / 2, 4 + (0 if symmetric else 2)
    return products / (products + scaling)


def rows_of(config: dict[str, Any], rows: list[int], passes: int, probes: DramProbes) -> list[dict[str, Any]]:
    """One row for each M: what the model says and what the clock says."""
    here = machine.describe()
    threads, n, k = config["threads"], config["n"], config["k"]
    shape = {key: config[key] for key in ("n", "k", "group_size", "symmetric")}
    timers = c_timers(here, threads, shape, rows, 0)
    packed = int(packed_bytes(*shape.values()))
    dram: dict[str, list[float]] = {}
    peaks: list[float] = []
    times: dict[int, list[float]] = {m: [] for m in rows}
    for _ in range(passes):
        for name, value in probes.read(packed, threads).items():
            dram.setdefault(name, []).append(value)
        for m, timer in timers.items():
            peaks.append(probe.int8_peak(threads, seconds=0.004))
            del timer.samples[:]
            timer.visit(0.03, max_samples=9)
            times[m].append(statistics.median(timer.samples))
    bandwidth, peak = max(statistics.median(v) for v in dram.values()), statistics.median(peaks)
    share = left_of_peak(config["group_size"], config["symmetric"])
    found = []
    for m in rows:
        took, bytes_s, ops = statistics.median(times[m]), packed / bandwidth, 2.0 * m * n * k
        ops_s = ops / (peak * share)
        by_bytes = bytes_s >= ops_s
        found.append(
            {"shape": f"{n} x {k}", **config, "m": m, "bytes_s": bytes_s, "ops_s": ops_s, "took_s": took,
             "bound": "bytes" if by_bytes else "operations", "ratio": took / max(bytes_s, ops_s),
             "of_roof": (bytes_s if by_bytes else ops / peak) / took}
        )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096")
    parser.add_argument("--m", default="1,2,4,6,8,12,16,32,64,128,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--group", default="32,128")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("-o", "--output", choices=["table", "md", "csv", "json"], default="table")
    args = parser.parse_args()
    configs = [
        {"n": int(n), "k": int(k), "threads": int(threads), "group_size": int(group), "symmetric": symmetric}
        for n, k in (shape.split("x") for shape in args.shapes.split(","))
        for threads in args.threads.split(",")
        for group in args.group.split(",")
        for symmetric in (True, False)
    ]
    probes, rows = DramProbes(machine.describe()), [int(m) for m in args.m.split(",")]
    found: list[dict[str, Any]] = []
    with Progress(len(configs), "model", show=True) as bar:
        for config in configs:
            try:
                found += rows_of(config, rows, args.passes, probes)
            except KeyboardInterrupt:
                break
            bar.advance(1, f"{config['n']}x{config['k']}")
    if args.output in ("table", "md") and found:
        ratios = sorted(row["ratio"] for row in found)
        print(f"measured over model: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}\n")
    print(render(found, COLUMNS, args.output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The bounds that the w4a8 kernel is held to, each the median of several processes.

Every process measures its own roofs between the visits to the kernel: DRAM with each variant of the read probe, over a
large buffer and over as many bytes as the weights have, and the int8 peak. A probe's bandwidth is its median; the best
probe's counts. Weights rotate through eight last-level caches and more.

A step t(M+1)/t(M) is the median of the ratios of neighbouring visits. Bytes are those of the format (codes, scales, zero
points), not of the padded layout, and neither activations nor outputs. The C function is timed, not what Python adds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from assay import machine
from assay.measure.arena import Arena
from assay.measure.clock import Timer
from assay.measure.points import Point, packed_bytes
from assay.measure.workloads import Workloads
from assay.ops import info, probe
from assay.report.progress import Progress
from assay.report.table import Column, number, render, seconds, yes_no
from peers.ours import c_call

STEP_ROWS = range(1, 18)
PEAK_ROWS = (64, 128, 512)
FIRST_STEP = 1.4
STEP = {1: 1.25, 2: 1.18}
DRAM = {True: 0.95, False: 0.90}
PEAK = {(128, True): 0.85, (128, False): 0.80, (32, True): 0.72, (32, False): 0.66}

COLUMNS = [
    Column("bound", "bound"),
    Column("shape", "N x K"),
    Column("threads", "threads", align="right"),
    Column("group_size", "group", align="right"),
    Column("symmetric", "symmetric", yes_no),
    Column("m", "M", align="right"),
    Column(("value", "low", "high"), "median [processes]", number, "right"),
    Column("target", "bound", number, "right"),
    Column("met", "met", yes_no),
    Column("took_s", "time", seconds, "right"),
    Column("detail", "detail"),
]


def weight_bytes(n: int, k: int, group_size: int, symmetric: bool) -> float:
    """Bytes of a matrix as a file holds it: 4 bits a weight, 2 bytes a scale, half a byte a zero point."""
    return n * k / 2 + n * (k // group_size) * (2.0 if symmetric else 2.5)


class DramProbes:
    """Every way of reading memory that there is here; the best median is the roof."""

    def __init__(self, here: machine.Machine) -> None:
        self._buffer = Arena(here, nbytes=4 * here.last_level_cache_bytes).data
        isas = [v["isa"] for v in info.variants() if v["op"] == "probe" and v["supported"] and v["compiled"]]
        self._isas = [isa for isa in isas if isa != "scalar"] or isas
        self._at = 0

    def read(self, nbytes: int, threads: int) -> dict[str, float]:
        """One reading of each probe, in bytes per second: the whole buffer, and the next `nbytes` of it."""
        size = max(1 << 20, min(nbytes, self._buffer.nbytes // 4)) // 4096 * 4096
        found = {}
        for isa in self._isas:
            if self._at + size > self._buffer.nbytes:
                self._at = 0
            part = self._buffer[self._at : self._at + size]
            self._at += size
            found[f"{isa} part"] = probe.read_bandwidth(part, threads, isa=isa)
            found[f"{isa} all"] = probe.read_bandwidth(self._buffer, threads, isa=isa)
        return found


def c_timers(
    here: machine.Machine, threads: int, shape: dict[str, Any], rows: list[int], seed: int
) -> dict[int, Timer]:
    """By M: the C function on a matrix of which there are more copies than eight last-level caches hold."""
    arena = Arena(here, seed, max(8.25 * here.last_level_cache_bytes, 264e6))
    workloads = Workloads(arena, seed)
    points = [Point("w4a8_gemm", threads, {"m": m, **shape}) for m in rows]
    copies = max(1, int(arena.data.nbytes // packed_bytes(*shape.values())))
    made = {p.params["m"]: islice(workloads.make(p).rotation, copies) for p in points}
    return {m: Timer([c_call("w4a8", call) for call in calls]) for m, calls in made.items()}


def measure(config: dict[str, Any], rows: list[int], passes: int, probes: DramProbes, seed: int) -> dict[str, Any]:
    """Seconds a call by M, one entry a pass; and the roofs, one entry a pass."""
    here = machine.describe()
    threads = config["threads"]
    shape = {key: config[key] for key in ("n", "k", "group_size", "symmetric")}
    timers = c_timers(here, threads, shape, rows, seed)
    size = int(weight_bytes(**shape))
    times: dict[int, list[float]] = {m: [] for m in rows}
    dram: dict[str, list[float]] = {}
    peak: dict[int, list[float]] = {m: [] for m in rows if m >= PEAK_ROWS[0]}
    for _ in range(passes):
        for name, value in probes.read(size, threads).items() if 1 in rows else ():
            dram.setdefault(name, []).append(value)
        for m, timer in timers.items():
            del timer.samples[:]
            before = probe.int8_peak(threads, seconds=0.004) if m in peak else 0.0
            timer.visit(0.03, max_samples=9)
            times[m].append(statistics.median(timer.samples))
            if m in peak:
                peak[m].append((before + probe.int8_peak(threads, seconds=0.004)) / 2)
    return {"times": times, "dram": dram, "peak": peak}


def values_of(config: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, int, float, str]]:
    """(bound, M, value, detail) of one process's measurement of one configuration."""
    shape = {key: config[key] for key in ("n", "k", "group_size", "symmetric")}
    times = {int(m): values for m, values in found["times"].items()}
    if found["dram"]:
        name, best = max(((n, statistics.median(v)) for n, v in found["dram"].items()), key=lambda item: item[1])
        took = statistics.median(times[1])
        yield "dram", 1, weight_bytes(**shape) / took / best, f"of {best / 1e9:.1f} GB/s ({name})"
    for m in sorted(times):
        if m + 1 in times and m in STEP_ROWS:
            ratio = statistics.median(b / a for a, b in zip(times[m], times[m + 1], strict=True))
            yield "step", m, ratio, ""
    for m, peaks in found["peak"].items():
        ops = 2.0 * int(m) * shape["n"] * shape["k"]
        share = statistics.median(ops / t / p for t, p in zip(times[int(m)], peaks, strict=True))
        yield "int8 peak", int(m), share, f"of {statistics.median(peaks) / 1e9:.0f} Gop/s"


def target_of(bound: str, m: int, config: dict[str, Any]) -> float:
    """The bound itself."""
    if bound == "dram":
        return DRAM[config["symmetric"]]
    if bound == "step":
        return FIRST_STEP if m == 1 else STEP[min(config["threads"], 2)]
    return PEAK[config["group_size"], config["symmetric"]]


def rows_of(config: dict[str, Any], processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one configuration: every bound with the median, the least and the most of its processes."""
    values: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for found in processes:
        for bound, m, value, detail in values_of(config, found):
            values.setdefault((bound, m), []).append((value, detail))
    rows = []
    for (bound, m), given in values.items():
        took = statistics.median(statistics.median(found["times"][str(m)]) for found in processes)
        numbers = [value for value, _ in given]
        value, target = statistics.median(numbers), target_of(bound, m, config)
        nearest = min(given, key=lambda pair: abs(pair[0] - value))[1]
        rows.append(
            {"bound": bound, "shape": f"{config['n']} x {config['k']}", **config, "m": m, "value": value,
             "low": min(numbers), "high": max(numbers), "processes": len(numbers), "target": target,
             "met": value <= target if bound == "step" else value >= target, "took_s": took, "detail": nearest}
        )  # fmt: skip
    return rows


def brief(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `rows`, of the steps only the missed ones and the worst; the times at every M go into one line."""
    steps = [r for r in rows if r["bound"] == "step"]
    kept = {r["m"] for r in steps if not r["met"]} | {r["m"] for r in sorted(steps[1:], key=lambda r: -r["value"])[:1]}
    shown = []
    for row in rows:
        if row["bound"] != "step":
            shown.append(row)
        elif row["m"] in kept:
            shown.append({**row, "bound": f"step {row['m']} to {row['m'] + 1}"})
    times = {row["m"]: f"{row['m']}: {1e6 * row['took_s']:.0f}" for row in rows}
    same = {key: rows[0][key] for key in ("shape", "threads", "group_size", "symmetric")}
    return [*shown, {"bound": "us by M", **same, "detail": ", ".join(times.values())}]


def child(configs: list[dict[str, Any]], rows: list[int], passes: int, seed: int) -> None:
    """One process: a line of JSON for each configuration, in a seeded order."""
    probes = DramProbes(machine.describe())
    for index in np.random.default_rng(seed).permutation(len(configs)):
        found = measure(configs[index], rows, passes, probes, seed)
        print(json.dumps({"index": int(index), **found}), flush=True)


def run(args: argparse.Namespace, configs: list[dict[str, Any]]) -> int:
    """Starts the processes one after another and shows what they found; after Ctrl-C, what there is."""
    rows = sorted({*(args.m or [*STEP_ROWS, *PEAK_ROWS])})
    found: list[list[dict[str, Any]]] = [[] for _ in configs]
    weight = [sum(0.05 + 2e-12 * m * c["n"] * c["k"] * 10 for m in rows) * args.passes for c in configs]
    stopped = False
    with Progress(args.processes * sum(weight), "bounds", show=True) as bar:
        for seed in range(args.processes):
            job = json.dumps({"configs": configs, "rows": rows, "passes": args.passes, "seed": seed})
            command = [sys.executable, str(Path(__file__).resolve()), job]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                try:
                    for line in process.stdout or ():
                        got = json.loads(line)
                        index = got.pop("index")
                        found[index].append(got)
                        bar.advance(weight[index], f"process {seed + 1} of {args.processes}")
                except KeyboardInterrupt:
                    stopped = True
                    process.terminate()
            if stopped or process.returncode:
                break
    results = [rows_of(config, got) for config, got in zip(configs, found, strict=True) if got]
    every = [row for group in results for row in group]
    shown = every if args.output in ("csv", "json") else [row for group in results for row in brief(group)]
    if args.output in ("table", "md"):
        met = sum(row["met"] for row in every)
        print(f"w4a8 ({info.kernel_versions()['int4_gemm']}): {met} of {len(every)} bounds met\n")
    print(render(shown, COLUMNS, args.output))
    if stopped:
        return 130
    return 1 if process.returncode else 0


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    child(given["configs"], given["rows"], given["passes"], given["seed"])

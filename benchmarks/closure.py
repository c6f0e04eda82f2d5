"""A whole decode step, measured against the sum of its parts that `assay predict` makes, and where the two part.

    python benchmarks/closure.py [MODEL...] [--precision int4,int8] [--batch 1,4,8,16] [--pages small]
        [--profile FILE] [-o table|md|csv|json]

Runs every matrix product of a dense model's decode step in order, on random weights of its shapes (each layer its own, so
that they come from DRAM as in a model), then picks the tokens; in turns with the same calls alone, one shape after another.
What the profile's fit says of just these calls stands beside it, with its interval. The error has two parts: that of the
kernels' laws (their sum against the calls alone), and what calls cost each other (step less calls alone, by call), measured and predicted.
The last column is the share of the processors that other programs and other guests of the host took meanwhile. Attention and norms are in neither: no kernel of theirs is calibrated. No layer of these models is among those that the profile's
stacks are made of.
"""

import argparse
import mmap
import statistics
import sys
from functools import partial
from itertools import cycle

import numpy as np

import assay
from assay import profile
from assay.catalog import resolve_model
from assay.cost.stored import load_model
from assay.cost.transformer import step_cost
from assay.machine import memory_bytes
from assay.measure.contention import Contention
from assay.measure.sequence import SequenceTimer
from assay.ops.int4 import aligned_empty
from assay.ops.int8 import PackedInt8
from assay.report.progress import Progress
from assay.report.table import Column, percent, render, seconds, signed_percent, yes_no

GROUP = 32
COLUMNS = [
    Column("model", "model"),
    Column("precision", "precision"),
    Column("threads", "threads"),
    Column("batch", "batch"),
    Column("measured_s", "measured", seconds),
    Column(("predicted_s", "low_s", "high_s"), "predicted", seconds),
    Column("error", "error", signed_percent),
    Column("inside", "in interval", yes_no),
    Column("kernels_error", "kernels alone", signed_percent),
    Column("between_s", "between calls", seconds),
    Column("predicted_between_s", "predicted", seconds),
    Column("others", "others' CPU", percent),
]


def random_weights(n: int, k: int, precision: str, rng: np.random.Generator):
    """A packed matrix of random codes."""
    scales = rng.uniform(0.001, 0.002, (n, k // GROUP)).astype(np.float16)
    if precision == "int4":
        return assay.pack(rng.integers(0, 256, (n, k // 2), dtype=np.uint8), scales)
    return assay.pack_int8(rng.integers(-127, 128, (n, k), dtype=np.int8), scales)


def small_pages(nbytes: int) -> np.ndarray:
    """uint8 [nbytes] on the small pages that a plain allocation or a mapped file has."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def copy_of(w, empty):
    """The same matrix in other memory."""
    data = empty(w.nbytes)
    data[:] = w.data
    if isinstance(w, PackedInt8):
        return PackedInt8(w.n, w.k, w.group_size, data)
    return type(w)(w.n, w.k, w.group_size, w.symmetric, data)


def step_of(spec, precision: str, pages: str):
    """The packed matrices of a decode step, layer by layer, the head last."""
    empty = small_pages if pages == "small" else aligned_empty
    rng = np.random.default_rng(0)
    inner = [m for m in spec.matrices if m.role not in ("embedding", "lm_head")]
    first = [random_weights(m.n, m.k, precision, rng) for m in inner]
    step = [copy_of(w, empty) for _ in range(spec.num_layers) for w in first]
    heads = [m for m in spec.matrices if m.role == "lm_head"]
    return step + [copy_of(random_weights(m.n, m.k, precision, rng), empty) for m in heads]


def measure(weights, precision: str, batch: int, threads: int, repeats: int):
    """Median seconds of a step, and of its calls alone; the share of the processors that others took meanwhile."""
    gemm = assay.w4a8_gemm if precision == "int4" else assay.w8a8_gemm
    rng = np.random.default_rng(1)
    a = {k: rng.standard_normal((batch, k), dtype=np.float32) for k in {w.k for w in weights}}
    out = {n: np.zeros((batch, n), np.float32) for n in {w.n for w in weights}}
    no_draft, ends = np.zeros(0, np.int32), np.zeros(batch + 1, np.int32)
    shapes = {(w.n, w.k): [] for w in weights}
    for w in weights:
        shapes[w.n, w.k].append(partial(gemm, a[w.k], w, out[w.n], num_threads=threads))
    rotations = {shape: cycle(calls) for shape, calls in shapes.items()}
    choice = partial(assay.verify_chain, out[weights[-1].n], no_draft, ends, rule="greedy", num_threads=threads)
    timer = SequenceTimer([*(rotations[w.n, w.k] for w in weights), cycle([choice])])
    timer.visit(0.0, 1, 1)
    timer.samples.clear()
    others = Contention()
    timer.visit(0.0, repeats, repeats)
    return statistics.median(timer.samples), timer.conditions["alone_s"], others.share()


def cells(spec, precision: str, batches, cost, args, bar):
    """A row for every number of threads and batch."""
    weights = step_of(spec, precision, args.pages)
    for threads in cost.threads():
        for batch in batches:
            took, alone, others = measure(weights, precision, batch, threads, args.repeats)
            step = step_cost(spec, precision, batch, 0, cost, threads)
            parts = [c for c in step.calls if c.basis == "measured"]
            between = next((c for c in parts if c.op == "sequence"), None)
            said = sum(c.time_s for c in parts)
            laws = said - (between.time_s if between else 0.0)
            # As the step's own interval: errors of one op together, of several ops independent.
            low, high = said - (step.time_s - step.low_s), said + (step.high_s - step.time_s)
            bar.advance(1, f"{spec.name} {precision}, {threads} threads, batch {batch}")
            yield {
                "model": spec.name, "precision": precision, "threads": threads, "batch": batch,
                "measured_s": took, "predicted_s": said, "low_s": low, "high_s": high,
                "error": said / took - 1, "inside": low <= took <= high,
                "alone_s": alone, "kernels_error": laws / alone - 1,
                "between_s": (took - alone) / (len(weights) + 1),
                "others": others,
                "predicted_between_s": between.time_s / between.count if between else None,
            }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", default=["gemma-3-270m"])
    parser.add_argument("--precision", default="int4,int8")
    parser.add_argument("--batch", default="1,4,8,16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--pages", choices=("huge", "small"), default="huge", help="that weights lie on (default: huge)"
    )
    parser.add_argument("--profile", default=profile.default_profile_path())
    parser.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table")
    args = parser.parse_args()
    specs = [resolve_model(name) for name in args.model]
    most = memory_bytes("MemAvailable")
    for spec in specs:
        if spec.experts:
            parser.error(f"expected a dense model, got {spec.name} with {spec.experts.num_experts} experts")
        if most and spec.num_params > most / 2:
            parser.error(
                f"{spec.name} has {spec.num_params:.3g} parameters, more than half of the free memory can hold"
            )
    cost = load_model(profile.load(args.profile))
    precisions = args.precision.split(",")
    batches = [int(b) for b in args.batch.split(",")]
    rows = []
    with Progress(len(specs) * len(precisions) * len(cost.threads()) * len(batches), "closure", show=True) as bar:
        for spec in specs:
            for precision in precisions:
                rows += cells(spec, precision, batches, cost, args, bar)
    if args.output == "table":
        errors = [r["error"] for r in rows]
        sizes = [abs(e) for e in errors]
        inside = sum(r["inside"] for r in rows)
        print(
            f"{', '.join(args.model)}: a decode step without attention, {len(rows)} cells: median error"
            f" {100 * statistics.median(errors):+.1f}% (of sizes {100 * statistics.median(sizes):.1f}%), worst"
            f" {100 * max(sizes):.1f}%, {inside} of {len(rows)} inside the 90% interval\n"
        )
    print(render(rows, COLUMNS, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())

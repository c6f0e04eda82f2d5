"""Our kernels against other people's, in one run, in turns; and against their own bounds.

    python benchmarks/compare.py gemm [--op w4a8,w4a16,w8a8] [--shapes 4096x4096] [--m 1,4] [--threads 1,2] [--group 32,128]
    python benchmarks/compare.py moe [--layers mixtral] [--tokens 1,16] [--routing uniform,power,correlated]
    python benchmarks/compare.py verify [--vocab 32000] [--batch 1,8] [--drafts 4] [--rule greedy,rejection] [--logits cache]
    python benchmarks/compare.py route [--tokens 1,64]
    python benchmarks/compare.py bounds [--processes 5] [--shapes ...]

Each contender runs in a process of its own that is stopped while it is not its turn, its threads pinned; every answer is
checked against float64 before it is timed. Peers are in the dependency group `peers`; ik_llama.cpp is built by you:
ASSAY_PEER_IK_LLAMA=/path/to/libggml.so (and ASSAY_PEER_IK_LLAMA_VERSION, its commit, for the header). vLLM's sampler is
compiled from its source: ASSAY_PEER_VLLM=/path/to/vllm. A peer that cannot be loaded is listed with the reason. --resume FILE
keeps rows as they come and goes on from them; Ctrl-C shows what was measured. ASSAY_PEER_TRACE=1 shows what the libraries print.
All of `moe` takes 50 minutes and 20 GB on two cores.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import bounds
from assay import machine
from assay.report.progress import Progress
from assay.report.table import Column, digits, number, percent, render, to_json, yes_no
from comparison import OURS, Classes, Results, Target, losses_first, measure, row_of, summary
from moe_cases import LAYERS
from moe_comparison import MOE, MOE_CLASSES, MOE_COLUMNS, MOE_OURS, moe_cells, moe_work
from peers import sampling
from peers.contender import Cell
from peers.experts import TRAFFIC
from peers.worker import Failed, Worker

#: N x K of Llama-3-8B and Mixtral, Gemma-3-270M, Qwen3-30B-A3B's experts.
SHAPES = "4096x4096,14336x4096,4096x14336,1024x4096,2048x640,262144x640,768x2048,2048x768"
KINDS = {"sym": True, "asym": False}
RULES = (
    "greedy",
    "rejection",
    "tree",
    "build",
    "sampled",
    "block",
    "kseq",
    *(r for r in sampling.TREES if r not in ("tree", "build")),
)
#: Where verification finds the logits: as a matrix product of many rows leaves them, or of a few.
PLACES = ("memory", "cache")
ROWS = [1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 128, 512]

GEMM: dict[str, dict[str, Target]] = {
    "w4a8": {
        "openvino": ("peers.openvino:OpenVino", ("int8",)),
        "onnxruntime": ("peers.onnx:OnnxRuntime", ()),
        **{
            f"{'ik_llama' if form == 'ik' else 'ggml'} {kind} {form}": ("peers.ggml:Ggml", (kind, form))
            for kind, form in product(("Q4_0", "Q4_K"), ("repack", "plain", "ik"))
        },
    },
    "w4a16": {
        "openvino bf16": ("peers.openvino:OpenVino", ("bf16",)),
        "torch int4pack": ("peers.torch:Int4Pack", ()),
        "bitsandbytes NF4": ("peers.torch:Nf4", ()),
    },
    "w8a8": {
        "openvino": ("peers.openvino:OpenVino", ("int8",)),
        "onnxruntime": ("peers.onnx:OnnxRuntime", ()),
        **{
            f"{'ik_llama' if form == 'ik' else 'ggml'} Q8_0 {form}": ("peers.ggml:Ggml", ("Q8_0", form))
            for form in ("repack", "plain", "ik")
        },
    },
}


# ---- command line -----------------------------------------------------------------------------------------


def integers(text: str) -> list[int]:
    """ "1,2" as [1, 2]."""
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    """ "4096x4096,768x2048" as [(4096, 4096), (768, 2048)]."""
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(n), int(k)) for n, k in pairs]


def among(allowed: Mapping[str, Any] | Sequence[str]) -> Callable[[str], list[str]]:
    """Reads "a,b" as ["a", "b"], each one of `allowed`."""

    def some(text: str) -> list[str]:
        for word in text.split(","):
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(allowed)}, got {word!r}")
        return text.split(",")

    return some


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=integers, default=[1, 2])
    common.add_argument("--passes", type=int, default=5)
    common.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table")
    versus = argparse.ArgumentParser(add_help=False)
    versus.add_argument(
        "--peers", type=lambda text: text.split(","), help="only contenders whose name contains one of these"
    )
    versus.add_argument("--quick", action="store_true", help="a subset that takes under three minutes")
    versus.add_argument("--resume", type=Path, metavar="FILE", help="keep rows in FILE, and go on from those in it")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument("--shapes", type=shapes, help="N x K, as 4096x4096,1024x4096")
    weights.add_argument("--m", type=integers, help="rows of activations, as 1,2,4")
    weights.add_argument("--group", type=integers, default=[32, 128])
    weights.add_argument("--kind", type=among(KINDS), help="sym,asym")
    gemm = commands.add_parser("gemm", parents=[common, versus, weights], help="INT4 and int8 GEMM")
    gemm.add_argument("--op", type=among(GEMM), default=["w4a8"], help="w4a8 (default), w4a16, w8a8")
    moe = commands.add_parser("moe", parents=[common, versus], help="a layer of experts")
    moe.add_argument("--layers", type=among(LAYERS), help=", ".join(LAYERS))
    moe.add_argument("--tokens", type=integers)
    moe.add_argument("--routing", type=among(TRAFFIC), help=", ".join(TRAFFIC))
    verify = commands.add_parser("verify", parents=[common, versus], help="verification of drafts")
    verify.add_argument("--vocab", type=integers)
    verify.add_argument("--batch", type=integers)
    verify.add_argument("--drafts", type=integers)
    verify.add_argument("--rule", type=among(RULES), default=list(RULES))
    verify.add_argument("--logits", type=among(PLACES), default=list(PLACES), help="where they lie: memory,cache")
    route = commands.add_parser("route", parents=[common, versus], help="routing of tokens to experts")
    route.add_argument("--tokens", type=integers)
    one = commands.add_parser("bounds", parents=[common, weights], help="our w4a8 kernel against its bounds")
    one.add_argument("--processes", type=int, default=5)
    args = parser.parse_args()
    if args.passes < 1:
        parser.error(f"--passes: expected 1 or more, got {args.passes}")
    return args


# ---- GEMM -------------------------------------------------------------------------------------------------


def gemm_cells(args: argparse.Namespace) -> list[Cell]:
    """Cells in an order in which weights are made once."""
    quick = args.quick
    wanted = args.shapes or shapes("4096x4096,2048x640" if quick else SHAPES)
    kind = [KINDS[name] for name in args.kind or (["sym"] if quick else KINDS)]
    rows = args.m or ([1, 4, 16, 128] if quick else ROWS)
    return [
        Cell.of(op, threads, n=n, k=k, group_size=group, symmetric=symmetric, m=m)
        for op, (n, k), group, symmetric, threads, m in product(
            args.op, wanted, args.group, kind, args.threads, rows
        )
        if symmetric or op != "w8a8"
    ]  # fmt: skip


def gemm_work(cell: Cell) -> dict[str, float]:
    """Weights, activations and outputs moved once; a 16-bit product has half the rate of an int8 one."""
    ops = 2.0 * cell.m * cell.n * cell.k * (2 if cell.op == "w4a16" else 1)
    return {"dram_read": cell.weight_bytes + 4.0 * cell.m * (cell.k + cell.n), "int8_peak": ops}


GEMM_COLUMNS = [
    Column("op", "op"),
    Column(("n", "k"), "N x K", lambda n, k: f"{n} x {k}"),
    Column("group_size", "group", align="right"),
    Column("symmetric", "symmetric", yes_no),
    Column("threads", "threads", align="right"),
    Column("m", "M", align="right"),
]
GEMM_CLASSES: Classes = {
    f"group {g}{title}": (lambda r, g=g, low=low, high=high: r["group_size"] == g and low <= r["m"] <= high)
    for g in (32, 128)
    for title, low, high in (
        ("", 1, math.inf),
        (", M = 1", 1, 1),
        (", M = 2, 3", 2, 3),
        (", M = 4..8", 4, 8),
        (", M = 12", 12, 12),
        (", M >= 16", 16, math.inf),
    )
}


# ---- verification and routing -----------------------------------------------------------------------------

VERIFY: dict[str, Target] = {
    "numpy": ("peers.sampling:Numpy", ()),
    "torch multinomial": ("peers.sampling:Torch", ("multinomial",)),
    "torch exponential": ("peers.sampling:Torch", ("exponential",)),
    "vllm": ("peers.sampling:Vllm", ()),
}
#: Rules measured at every batch and number of drafts; the others at some. The vocabulary of "build", whose work is left out: the
#: least in which a second child differs from the first.
WHOLE_GRID = ("greedy", "rejection", "tree")
SMALL = 2
#: Cells that are not measured because their logits, or with them the drafts' laws, are more than they may be.
LEFT_OUT: list[str] = []
ROUTE: dict[str, Target] = {"numpy": ("peers.routing:Numpy", ()), "torch": ("peers.routing:Torch", ())}


def verify_cells(args: argparse.Namespace) -> list[Cell]:
    """Vocabulary, batch, drafts and rule."""
    quick = args.quick
    vocabularies = args.vocab or ([32000, 128256] if quick else [32000, 128256, 262144])
    found = []
    for rule in args.rule:
        batches = args.batch or ([1, 8, 64] if rule in WHOLE_GRID and not quick else [1, 8])
        counts = args.drafts or (
            [16, 64] if rule in sampling.TREES else [1, 4, 8, 16] if rule in WHOLE_GRID and not quick else [4]
        )
        if rule == "build":
            found += [Cell.of("verify", 1, vocab=SMALL, batch=1, k=64, rule=rule, logits="cache")]
            continue
        for vocab, batch, k, where in product(vocabularies, batches, counts, args.logits):
            if not sampling.fits(rule, batch, k, vocab, where):
                LEFT_OUT.append(f"{rule}, vocabulary {vocab}, batch {batch}, {k} drafts, {where}")
                continue
            found += [
                Cell.of("verify", t, vocab=vocab, batch=batch, k=k, rule=rule, logits=where) for t in args.threads
            ]
    return found


def verify_work(cell: Cell) -> dict[str, float]:
    """Every row of logits that the walk reaches read once (K-SEQ's draft law too), and for a normaliser exponentiated."""
    rows = cell.batch * (len(sampling.path_of(cell.rule, cell.k)) + 1)
    read = 4.0 * cell.vocab * (rows + cell.batch * (cell.rule == "kseq"))
    work = {"llc_read" if cell.logits == "cache" else "dram_read": read}
    return work | ({} if cell.rule in sampling.GREEDY else {"exp_rate": float(rows * cell.vocab)})


VERIFY_COLUMNS = [
    Column("rule", "rule"),
    Column("logits", "logits in"),
    Column("vocab", "vocabulary", align="right"),
    Column("batch", "batch", align="right"),
    Column("k", "drafts", align="right"),
    Column("threads", "threads", align="right"),
]
VERIFY_CLASSES: Classes = {
    f"{rule}, {where}": (lambda r, rule=rule, where=where: (r["rule"], r["logits"]) == (rule, where))
    for rule in RULES
    for where in PLACES
}  # fmt: skip


def route_cells(args: argparse.Namespace) -> list[Cell]:
    """Tokens, experts, top-k."""
    tokens = args.tokens or ([1, 64] if args.quick else [1, 4, 16, 64, 256, 1024, 4096])
    pairs = [(8, 2), (64, 8), (128, 8), (256, 8)]
    return [
        Cell.of("route", threads, tokens=count, num_experts=e, top_k=k)
        for (e, k), threads, count in product(pairs, args.threads, tokens)
    ]


def route_work(cell: Cell) -> dict[str, float]:
    """The logits read from cache."""
    return {"llc_read": 4.0 * cell.tokens * cell.num_experts}


ROUTE_COLUMNS = [
    Column("num_experts", "experts", align="right"),
    Column("top_k", "top-k", align="right"),
    Column("tokens", "tokens", align="right"),
    Column("threads", "threads", align="right"),
]
ROUTE_CLASSES: Classes = {
    f"{e} experts": (lambda r, e=e: r["num_experts"] == e) for e in (8, 64, 128, 256)
}  # fmt: skip


# ---- the run ----------------------------------------------------------------------------------------------


def start(targets: Mapping[str, Target], cores: int) -> tuple[dict[str, Worker], dict[str, str], dict[str, str]]:
    """Workers by name, versions of what they loaded, and why the others are not there."""
    workers: dict[str, Worker] = {}
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    made = {name: Worker(target, arguments, cores) for name, (target, arguments) in targets.items()}
    for name, worker in made.items():
        try:
            versions.update(worker.finish())
            workers[name] = worker
        except Failed as exc:
            missing[name] = str(exc)
            worker.close()
    return workers, versions, missing


def compare(args: argparse.Namespace, cells: list[Cell], targets: Mapping[str, Target], ours: str,
            work: Callable[[Cell], dict[str, float]], columns: list[Column],
            classes: Classes) -> int:  # fmt: skip
    """Measures the cells and shows them."""
    chosen = {n: t for n, t in targets.items() if not args.peers or any(p in n for p in args.peers)}
    workers, versions, missing = start({OURS: (ours, ()), **chosen}, max(args.threads))
    reader = Worker("peers.roofs:Reader", (), max(args.threads))
    reader.finish()
    here = machine.describe()
    header = {"command": args.command, "machine": f"{here.cpu}, {here.usable_cores} cores, {here.os}",
              "versions": versions, "passes": args.passes, "not_available": missing}  # fmt: skip
    stopped = False
    try:
        results = Results(args.resume, header)
        left = [cell for cell in cells if not results.has(cell)]
        with Progress(float(len(left)), args.command, show=True) as bar:
            for cell in left:
                bar.advance(0.0, cell.label)
                results.add(row_of(cell, measure(workers, reader, cell, args.passes), work))
                bar.advance(1.0, cell.label)
    except KeyboardInterrupt:
        stopped = True
    finally:
        for worker in (*workers.values(), reader):
            worker.close()
    show(args.output, results, columns, classes)
    return 130 if stopped else 0


EXP_COLUMN = Column("exp_pct", "of exp rate", lambda v: percent(v / 100), "right")
RESULT_COLUMNS = [
    Column("ours_us", "ours, us", digits, "right"),
    Column("best_us", "best peer, us", digits, "right"),
    Column("best_peer", "which"),
    Column(("ratio", "ratio_low", "ratio_high"), "ratio [passes]", number, "right"),
    Column("verdict", ""),
    Column("roof_pct", "of roof", lambda v: percent(v / 100), "right"),
    Column("bound", "bound"),
]
SUMMARY_COLUMNS = [
    Column("class", "class"),
    Column("cells", "cells", align="right"),
    Column("win", "wins", align="right"),
    Column("tie", "ties", align="right"),
    Column("loss", "losses", align="right"),
    Column("geometric_mean", "geometric mean", digits, "right"),
    Column("median", "median", digits, "right"),
    Column("least", "least", digits, "right"),
    Column("roof_pct", "median of roof", lambda v: percent(v / 100), "right"),
]


def show(fmt: str, results: Results, columns: list[Column], classes: Mapping[str, Any]) -> None:
    """Prints the results: JSON and CSV hold every peer's time, tables the best one's."""
    lines = summary(results.rows, {"all": lambda r: True, **classes})
    if any("exp_pct" in row for row in results.rows):
        columns = [*columns, EXP_COLUMN]
    rows = list(losses_first(results.rows))
    if fmt == "json":
        print(to_json({"header": results.header, "rows": rows, "summary": lines}))
        return
    if fmt == "csv":
        names = sorted({name for row in rows for name in row["peers"]})
        flat = [{**row, **{f"{name}_us": us for name, us in row["peers"].items()}} for row in rows]
        print(render(flat, [*columns, *RESULT_COLUMNS, *(Column(f"{n}_us", n) for n in names)], "csv"), end="")
        return
    print("Machine: " + results.header["machine"] + ". Versions: "
          + ", ".join(f"{k} {v}" for k, v in results.header["versions"].items()) + f". {results.header['passes']} passes.")  # fmt: skip
    for name, reason in results.header["not_available"].items():
        print(f"\nNot available: {name}: {reason}.")
    if LEFT_OUT:
        print(f"\nLeft out, of more memory than is taken: {'; '.join(LEFT_OUT)}.")
    for text in dict.fromkeys(notes(results.rows)):
        print(f"\n{text}")
    print("\n" + render(lines, SUMMARY_COLUMNS, fmt) + "\n\n" + render(rows, [*columns, *RESULT_COLUMNS], fmt))


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What was not timed in some cells, and why: a line a contender."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, why in row["absent"].items():
            reasons.setdefault(name, {})[why] = None
    said = [f"Not in every cell: {name}: {'; '.join(why)}." for name, why in reasons.items()]
    for row in rows:
        for name, (error, allowed) in row["wrong"].items():
            said.append(f"Wrong answer: {name}: relative error {error:.3g}, at most {allowed:.3g} is its rounding.")
    return said


def main() -> int:
    """Runs the command."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    args = parse()
    if args.command == "bounds":
        configs = [
            {"n": n, "k": k, "threads": threads, "group_size": group, "symmetric": symmetric}
            for (n, k), group, symmetric, threads in product(
                args.shapes or shapes(SHAPES), args.group, [KINDS[name] for name in args.kind or KINDS], args.threads
            )
        ]
        return bounds.run(args, configs)
    if args.command == "gemm":
        targets = {name: target for op in args.op for name, target in GEMM[op].items()}
        return compare(args, gemm_cells(args), targets, "peers.ours:Assay", gemm_work, GEMM_COLUMNS, GEMM_CLASSES)
    if args.command == "moe":
        return compare(args, moe_cells(args), MOE, MOE_OURS, moe_work, MOE_COLUMNS, MOE_CLASSES)
    if args.command == "verify":
        cells = verify_cells(args)
        return compare(args, cells, VERIFY, "peers.sampling:Assay", verify_work, VERIFY_COLUMNS, VERIFY_CLASSES)
    return compare(args, route_cells(args), ROUTE, "peers.routing:Assay", route_work, ROUTE_COLUMNS, ROUTE_CLASSES)


if __name__ == "__main__":
    sys.exit(main())

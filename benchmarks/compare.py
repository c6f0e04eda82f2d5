"""Our kernels against other people's, in one run, in turns; and against their own bounds.

    python benchmarks/compare.py gemm [--op w4a8,w4a16,w8a8] [--shapes 4096x4096] [--m 1,4] [--threads 1,2] [--group 32,128]
    python benchmarks/compare.py bounds [--processes 5] [--shapes ...]

Each contender runs in a process of its own that is stopped while it is not its turn, its threads pinned; every answer is
checked against float64 before it is timed. Peers are in the dependency group `peers`; ik_llama.cpp is built by you:
ASSAY_PEER_IK_LLAMA=/path/to/libggml.so (and ASSAY_PEER_IK_LLAMA_VERSION, its commit, for the header). A peer that
cannot be loaded is listed with the reason. --resume FILE keeps rows as they come and goes on from them; Ctrl-C shows what
was measured. ASSAY_PEER_TRACE=1 shows what the libraries print.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import bounds
from assay import machine
from assay.report.progress import Progress
from assay.report.table import Column, digits, number, percent, render, to_json, yes_no
from comparison import OURS, Results, losses_first, measure, row_of, summary
from peers.contender import Cell
from peers.worker import Failed, Worker

#: N x K of Llama-3-8B and Mixtral, Gemma-3-270M, Qwen3-30B-A3B's experts.
SHAPES = "4096x4096,14336x4096,4096x14336,1024x4096,2048x640,262144x640,768x2048,2048x768"
ROWS = [1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 128, 512]

Target = tuple[str, tuple[Any, ...]]
GEMM: dict[str, dict[str, Target]] = {
    "w4a8": {
        "openvino": ("peers.openvino:OpenVino", ()),
        "onnxruntime": ("peers.onnx:OnnxRuntime", ()),
        **{
            f"{'ik_llama' if form == 'ik' else 'ggml'} {kind} {form}": ("peers.ggml:Ggml", (kind, form))
            for kind, form in product(("Q4_0", "Q4_K"), ("repack", "plain", "ik"))
        },
    },
    "w4a16": {
        "openvino bf16": ("peers.openvino:OpenVino", ()),
        "torch int4pack": ("peers.torch:Int4Pack", ()),
        "bitsandbytes NF4": ("peers.torch:Nf4", ()),
    },
    "w8a8": {
        "openvino": ("peers.openvino:OpenVino", ()),
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


def kinds(text: str) -> list[bool]:
    """ "sym,asym" as [True, False]."""
    return [{"sym": True, "asym": False}[part] for part in text.split(",")]


def words(text: str) -> list[str]:
    """ "a,b" as ["a", "b"]."""
    return text.split(",")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=integers, default=[1, 2])
    common.add_argument("--passes", type=int, default=5)
    common.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table")
    versus = argparse.ArgumentParser(add_help=False)
    versus.add_argument("--peers", type=words, help="only contenders whose name contains one of these")
    versus.add_argument("--quick", action="store_true", help="a subset that takes under three minutes")
    versus.add_argument("--resume", type=Path, metavar="FILE", help="keep rows in FILE, and go on from those in it")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument("--shapes", type=shapes, help="N x K, as 4096x4096,1024x4096")
    weights.add_argument("--m", type=integers, help="rows of activations, as 1,2,4")
    weights.add_argument("--group", type=integers, default=[32, 128])
    weights.add_argument("--kind", type=kinds, help="sym,asym")
    gemm = commands.add_parser("gemm", parents=[common, versus, weights], help="INT4 and int8 GEMM")
    gemm.add_argument("--op", type=words, default=["w4a8"], help="w4a8 (default), w4a16, w8a8")
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
    kind = args.kind or ([True] if quick else [True, False])
    rows = args.m or ([1, 4, 16, 128] if quick else ROWS)
    return [
        Cell.of(op, threads, n=n, k=k, group_size=group, symmetric=symmetric, m=m)
        for op, (n, k), group, symmetric, threads, m in product(
            args.op, wanted, args.group, kind, args.threads, rows
        )
        if symmetric or op != "w8a8"
    ]  # fmt: skip


def gemm_work(cell: Cell) -> tuple[float, float]:
    """Bytes and operations; a 16-bit product has half the rate of an int8 one."""
    ops = 2.0 * cell.m * cell.n * cell.k * (2 if cell.op == "w4a16" else 1)
    return cell.weight_bytes + 4.0 * cell.m * (cell.k + cell.n), ops


GEMM_COLUMNS = [
    Column("op", "op"),
    Column(("n", "k"), "N x K", lambda n, k: f"{n} x {k}"),
    Column("group_size", "group", align="right"),
    Column("symmetric", "symmetric", yes_no),
    Column("threads", "threads", align="right"),
    Column("m", "M", align="right"),
]
GEMM_CLASSES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
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


def compare(args: argparse.Namespace, cells: list[Cell], targets: Mapping[str, Target], ours: Target,
            work: Callable[[Cell], tuple[float, float]], columns: list[Column],
            classes: Mapping[str, Callable[[Mapping[str, Any]], bool]]) -> int:  # fmt: skip
    """Measures the cells and shows them."""
    chosen = {n: t for n, t in targets.items() if not args.peers or any(p in n for p in args.peers)}
    workers, versions, missing = start({OURS: ours, **chosen}, max(args.threads))
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
]


def show(fmt: str, results: Results, columns: list[Column], classes: Mapping[str, Any]) -> None:
    """Prints the results: JSON and CSV hold every peer's time, tables the best one's."""
    lines = summary(results.rows, {"all": lambda r: True, **classes})
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
    for text in dict.fromkeys(notes(results.rows)):
        print(f"\n{text}")
    print("\n" + render(lines, SUMMARY_COLUMNS, fmt) + "\n\n" + render(rows, [*columns, *RESULT_COLUMNS], fmt))


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What was not timed, and why: a line each."""
    said = [f"Takes no part in some cells: {name}: {why}." for row in rows for name, why in row["absent"].items()]
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
                args.shapes or shapes(SHAPES), args.group, args.kind or [True, False], args.threads
            )
        ]
        return bounds.run(args, configs)
    targets = {name: target for op in args.op for name, target in GEMM[op].items()}
    ours = ("peers.ours:Assay", ())
    return compare(args, gemm_cells(args), targets, ours, gemm_work, GEMM_COLUMNS, GEMM_CLASSES)


if __name__ == "__main__":
    sys.exit(main())

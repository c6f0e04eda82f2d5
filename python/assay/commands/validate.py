"""``assay validate``: how far predictions are off on measured tables, on points that the fit never saw."""

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.tables import KernelTable

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "tables", metavar="TABLE", nargs="+", help="measured kernels: AIConfigurator parquet, profile, ..."
    )
    parser.add_argument(
        "--hold-out",
        choices=("shapes", "models", "systems", "points", "all"),
        default="shapes",
        help="what the fit never sees: whole weight shapes or head and expert configurations (default), whole models, "
        "whole systems, single points, or all: what each op is judged by (docs/accuracy.md)",
    )
    parser.add_argument(
        "-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)"
    )
    parser.add_argument("--no-regressor", action="store_true", help="leave out the gradient-boosted yardstick: faster")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of what is held out (0)")


def run(args: argparse.Namespace) -> int:
    """Scores the tables; exit status 0."""
    from assay import machine
    from assay.cost.validation import kernel_classes, plans, score, summary
    from assay.imported import datasheet_of
    from assay.importers import read_tables
    from assay.report.progress import Progress
    from assay.report.table import Column, render, to_json

    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    tables = [table for path in args.tables for table in read_tables(path)]
    classes = kernel_classes(tables)
    work = plans(classes, args.hold_out)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    total = float(sum(len(t) for _, some in work for t in some))
    with Progress(total, "validating", None) as progress, _one_thread_each():
        for hold_out, some in work:
            scored = []
            for table, parts, why in score(
                some,
                datasheet_of,
                hold_out=hold_out,
                yardstick=not args.no_regressor,
                seed=args.seed,
                workers=machine.affinity_count() or 1,
            ):
                scored += parts
                if not parts:
                    skipped.append({"hold_out": hold_out, "reason": why} | _names(table))
                progress.advance(float(len(table)), f"{table.op} {table.dtype}")
            rows += [{"hold_out": hold_out} | row for row in summary(scored)]
    notes = _notes(classes)
    if args.output == "json":
        head = {
            "schema": "assay-validation",
            "schema_version": SCHEMA_VERSION,
            "hold_out": args.hold_out,
            "seed": args.seed,
        }
        print(to_json(head | {"tables": args.tables, "rows": rows, "skipped": skipped, "notes": notes}))
    elif args.output == "csv":
        sys.stdout.write(render(rows, [Column("hold_out", "held out"), *_columns()], "csv"))
    else:
        _print_text(rows, skipped, notes, args)
    return 0


def _print_text(
    rows: list[dict[str, Any]], skipped: list[dict[str, str]], notes: list[str], args: argparse.Namespace
) -> None:
    from assay.report.table import render

    for hold_out in dict.fromkeys(row["hold_out"] for row in rows):
        if args.hold_out == "all":
            print(f"Held out: {hold_out}", end="\n\n")
        print(render([r for r in rows if r["hold_out"] == hold_out], _columns(), args.output), end="\n\n")
    for s in skipped:
        print(f"not scored: {s['op']} {s['dtype']} of {s['system']} ({s['variant']}), {s['hold_out']}: {s['reason']}")
    for note in notes:
        print(note)
    print(_verdict(rows, args.hold_out))


def _names(table: "KernelTable") -> dict[str, str]:
    return {"op": table.op, "dtype": table.dtype, "system": table.system, "variant": table.variant}


def _one_thread_each() -> AbstractContextManager[Any]:
    """Holds numpy's own threads back where that can be done: the classes already run beside each other."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[Any] = threadpool_limits(1)
    return limits


def _notes(classes: "list[KernelTable]") -> list[str]:
    from assay.imported import datasheet_of

    notes = [f"no datasheet of {s}: roofs from its points, {datasheet_of(s).multiprocessors} multiprocessors assumed"
             for s in sorted({t.system for t in classes}) if not datasheet_of(s).known]  # fmt: skip
    return notes + sorted({note for t in classes for note in t.notes})


def _verdict(rows: list[dict[str, Any]], hold_out: str) -> str:
    """One sentence, and the next command."""
    whole = [r for r in rows if r["regime"] == "all" and r["quantity"] == "time"]
    if not whole:
        return "Nothing could be scored. Next: `assay validate` with more tables, or another --hold-out."
    beaten = [r for r in whole if r["regressor_median_ape"] is not None and r["median_ape"] < r["regressor_median_ape"]]
    compared = [r for r in whole if r["regressor_median_ape"] is not None]
    worst = max(whole, key=lambda r: r["median_ape"])
    text = f"On held-out {hold_out}: worst median error {worst['median_ape']:.1%} ({worst['op']} {worst['dtype']}, {worst['system']})"
    if compared:
        text += f"; ahead of the boosted regressor in {len(beaten)} of {len(compared)}"
    other = "models" if hold_out == "shapes" else "shapes"
    return f"{text}.\nNext: assay validate TABLE... --hold-out {other}"


def _columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    return [
        Column("system", "system"),
        Column("source", "software"),
        Column("op", "op"),
        Column("dtype", "dtype"),
        Column("quantity", "of"),
        Column("regime", "regime"),
        Column("n", "n", align="right"),
        *table.error_columns(),
        Column("baseline_median_ape", "roofline", table.percent),
        Column("regressor_median_ape", "regressor", table.percent),
    ]

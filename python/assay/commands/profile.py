"""``assay profile``: make a profile of benchmark results, and show what one holds."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.profile import Profile

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    importer = actions.add_parser(
        "import", help="make one profile of what was measured on a device, by whatever program"
    )
    importer.add_argument(
        "files", metavar="FILE", nargs="+", help="profile, pytest-benchmark JSON, AIConfigurator Parquet, llama-bench output "
        "(json, jsonl, csv, md, sql), or output of `test-backend-ops perf`; told apart by content",
    )  # fmt: skip
    importer.add_argument(
        "--device", metavar="NAME", help="device of the catalog, where files do not name it: h200-sxm, rtx-4090"
    )
    importer.add_argument("-o", "--output", metavar="OUT", required=True, help="profile to write")
    show = actions.add_parser("show", help="roofs, samples and accuracy of a profile")
    show.add_argument("file", metavar="FILE", nargs="?", help="profile (default: the one that predict reads)")
    show.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)")


def run(args: argparse.Namespace) -> int:
    """Does the action; exit status 0."""
    return _import(args) if args.action == "import" else _show(args)


def _import(args: argparse.Namespace) -> int:
    from pathlib import Path

    from assay.imported import profile_of
    from assay.profile import save

    profile = profile_of([Path(f) for f in args.files], args.device)
    profile.command = ["assay", "profile", "import", *(Path(f).name for f in args.files)]
    save(profile, args.output)
    counts = [(len(profile.samples), "samples"), (len(profile.roofs), "roofs"), (len(profile.tables), "tables"),
              (sum(t.points for t in profile.tables), "points in them"), (len(profile.runs), "whole runs")]  # fmt: skip
    print(f"{args.output}: {', '.join(f'{n} {what}' for n, what in counts if n)} of {profile.machine.cpu}")
    print(f"\nNext: {shlex.join(['assay', 'profile', 'show', args.output])}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from assay.profile import default_profile_path, load
    from assay.report.table import render, to_json

    path = args.file or str(default_profile_path())
    profile = load(path)
    ops, tables = _op_rows(profile), _table_rows(profile)
    runs = [run.to_json() for run in profile.runs]
    roofs = [
        {"name": r.name, "threads": r.threads, "unit": r.unit, "median": r.median, "spread": r.spread}
        for r in profile.roofs
    ]
    if args.output == "json":
        summary = {"schema": "assay-profile-summary", "schema_version": SCHEMA_VERSION, "path": path}
        summary |= {"created_utc": profile.created_utc, "complete": profile.complete, "package": profile.package}
        summary |= {"settings": profile.settings, "machine": profile.to_json()["machine"], "roofs": roofs, "ops": ops}
        summary |= {"tables": tables, "runs": runs}
        print(to_json(summary))
    elif args.output == "csv":
        sys.stdout.write(render(ops, _op_columns(), "csv"))
    else:
        machine = profile.machine
        state = "complete" if profile.complete else "interrupted"
        what = "measurements" if profile.settings["mode"] == "imported" else "calibration"
        print(f"{path}: {profile.settings['mode']} {what} of {profile.created_utc}, {state}")
        print(f"{machine.cpu}, {machine.cores} cores, fingerprint {machine.fingerprint}\n")
        print(render(roofs, _roof_columns(), args.output), end="\n\n")
        parts = ((ops, _op_columns()), (tables, _table_columns()), (runs, _run_columns()))
        print("\n\n".join(render(rows, columns, args.output) for rows, columns in parts if rows))
        print(f"\nNext: {shlex.join(['assay', 'predict', 'mixtral-8x7b', '--profile', path])}")
    return 0


def _op_rows(profile: "Profile") -> list[dict[str, Any]]:
    """One row an op and variant: how much was measured, and the accuracy that the file states."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for s in profile.samples:
        row = rows.setdefault(
            (s.op, s.variant),
            {"op": s.op, "variant": s.variant, "threads": set(), "samples": 0, "held_out": 0}
            | {key: profile.accuracy.get(s.op, {}).get(key) for key in ("median_ape", "p90_ape", "bias", "coverage")},
        )
        row["threads"].add(s.threads)
        row["samples"] += 1
        row["held_out"] += s.held_out
    return [row | {"threads": sorted(row["threads"])} for row in rows.values()]


def _table_rows(profile: "Profile") -> list[dict[str, Any]]:
    """One row an imported kernel class, with the error of its fit on held-out groups; none where too few were there."""
    errors = ("median_ape", "p90_ape", "bias", "coverage")
    return [
        {"op": t.op, "dtype": t.dtype, "system": t.system, "source": t.source, "variant": t.variant, "points": t.points,
         "fitted": t.fit is not None, "held_out": (t.accuracy or {}).get("n", 0)}
        | {key: (t.accuracy or {}).get(key) for key in errors}
        for t in profile.tables
    ]  # fmt: skip


def _table_columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    return [
        Column("op", "op"),
        Column("dtype", "dtype"),
        Column("source", "software"),
        Column("variant", "kernel"),
        Column("points", "points", align="right"),
        Column("fitted", "fitted", table.yes_no),
        Column("held_out", "held out", align="right"),
        *table.error_columns(),
    ]


def _run_columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    return [
        Column("model", "whole run of"),
        Column("backend", "backend"),
        Column("threads", "threads", align="right"),
        Column("prompt", "prompt", align="right"),
        Column("generated", "generated", align="right"),
        Column("depth", "in the cache", align="right"),
        Column("seconds", "time", table.seconds),
        Column("tokens_per_s", "tokens/s", table.number, align="right"),
    ]


def _roof_columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    return [
        Column("name", "roof"),
        Column("threads", "threads", align="right"),
        Column(("median", "unit"), "median", table.roof_value),
        Column("spread", "spread", table.percent),
    ]


def _op_columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    return [
        Column("op", "op"),
        Column("variant", "variant"),
        Column("threads", "threads", lambda counts: ", ".join(map(str, counts))),
        Column("samples", "samples", align="right"),
        Column("held_out", "held out", align="right"),
        *table.error_columns(),
    ]

"""``assay profile``: make a profile of benchmark results, and show what one holds."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.profile import Profile

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    importer = actions.add_parser("import", help="make a profile of `pytest benchmarks/ --benchmark-json FILE`")
    importer.add_argument("file", metavar="FILE", help="JSON written by pytest-benchmark")
    importer.add_argument("-o", "--output", metavar="OUT", required=True, help="profile to write")
    show = actions.add_parser("show", help="roofs, samples and accuracy of a profile")
    show.add_argument("file", metavar="FILE", nargs="?", help="profile (default: the one that predict reads)")
    show.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)")


def run(args: argparse.Namespace) -> int:
    """Does the action; exit status 0."""
    return _import(args) if args.action == "import" else _show(args)


def _import(args: argparse.Namespace) -> int:
    from assay.cost.stored import summarise
    from assay.profile import from_pytest_benchmark, save

    profile = from_pytest_benchmark(args.file)
    profile.fits, profile.accuracy = summarise(profile)
    save(profile, args.output)
    print(f"{args.output}: {len(profile.samples)} samples, {len(profile.roofs)} roofs of {profile.machine.cpu}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from assay.profile import default_profile_path, load
    from assay.report.table import render, to_json

    path = args.file or str(default_profile_path())
    profile = load(path)
    ops = _op_rows(profile)
    roofs = [
        {"name": r.name, "threads": r.threads, "unit": r.unit, "median": r.median, "spread": r.spread}
        for r in profile.roofs
    ]
    if args.output == "json":
        summary = {"schema": "assay-profile-summary", "schema_version": SCHEMA_VERSION, "path": path}
        summary |= {"created_utc": profile.created_utc, "complete": profile.complete, "package": profile.package}
        summary |= {"settings": profile.settings, "machine": profile.to_json()["machine"], "roofs": roofs, "ops": ops}
        print(to_json(summary))
    elif args.output == "csv":
        sys.stdout.write(render(ops, _op_columns(), "csv"))
    else:
        machine = profile.machine
        state = "complete" if profile.complete else "interrupted"
        print(f"{path}: {profile.settings['mode']} calibration of {profile.created_utc}, {state}")
        print(f"{machine.cpu}, {machine.cores} cores, fingerprint {machine.fingerprint}\n")
        print(render(roofs, _roof_columns(), args.output), end="\n\n")
        print(render(ops, _op_columns(), args.output))
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
        Column("median_ape", "median error", table.percent),
        Column("p90_ape", "90th pct.", table.percent),
        Column("bias", "bias", table.signed_percent),
        Column("coverage", "coverage", table.percent),
    ]

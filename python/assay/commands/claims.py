"""``assay claims``: quantitative claims about inference cost, recomputed, each with a verdict. See docs/claims.md."""

import argparse
import sys
from typing import Any

SCHEMA_VERSION = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("ids", metavar="ID", nargs="*", help="claims to recompute, as C10 (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws behind the intervals (0)")
    parser.add_argument(
        "-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)"
    )


def run(args: argparse.Namespace) -> int:
    """Recomputes the claims; exit status 0."""
    from assay.catalog import find_device, list_claims, list_videos, load_model, token_price
    from assay.cost.claims import VERDICTS, World, recompute
    from assay.cost.draws import Draws
    from assay.report.table import render, to_json

    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    claims = list_claims()
    wanted = [text.upper() for text in args.ids] or [claim["id"] for claim in claims]
    unknown = [text for text in wanted if text not in {claim["id"] for claim in claims}]
    if unknown:
        raise ValueError(f"ID: expected {claims[0]['id']} to {claims[-1]['id']}, got {', '.join(unknown)}")

    def device(name: str) -> dict[str, Any]:
        row = find_device(name)
        if row is None:
            raise ValueError(f"device: expected one of the catalog, got {name!r}")
        return row

    numbers = {claim["id"]: claim["numbers"] for claim in claims}
    world = World(load_model, device, Draws(seed=args.seed), token_price, tuple(list_videos()), numbers)
    rows = [recompute(claim, world) for claim in claims if claim["id"] in wanted]
    for row in rows:
        row["recomputed"] = _recomputed(row)
    counts = [(kind, sum(row["verdict"] == kind for row in rows)) for kind in VERDICTS]
    line = f"{len(rows)} claims: {', '.join(f'{count} {kind}' for kind, count in counts if count)}."
    if args.output == "json":
        print(to_json({"schema": "assay-claims", "schema_version": SCHEMA_VERSION, "verdict": line, "rows": rows}))
    elif args.output == "csv":
        sys.stdout.write(render(rows, _columns(), "csv"))
    else:
        print(line, render(rows, _columns(), args.output), sep="\n\n", end="\n\n")
        print("- [low, high] are 90% intervals. A value is consistent within 5% of what is claimed.")
        print("- Speeds are of data sheets' devices at judged utilisations: not measured here.")
        print("\nNext: assay techniques mixtral-8x7b --batch 64")
    return 0


def _recomputed(row: dict[str, Any]) -> str:
    """The values as people read them."""
    from assay.report import table

    said = []
    for value in row["values"]:
        interval = (None, None) if value["low"] == value["high"] else (value["low"], value["high"])
        text = table.quantity(value["value"], ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, "")), *interval)
        said.append(text + (f" ({value['setting']})" if value["setting"] else ""))
    return f"{', '.join(said)} {row['unit']}".strip() if said else "-"


def _columns() -> list[Any]:
    from assay.report.table import Column

    return [
        Column("id", "id"),
        Column("claim", "claim"),
        Column("recomputed", "recomputed"),
        Column("arithmetic", "arithmetic"),
        Column("verdict", "verdict"),
        Column("depends_on", "depends on"),
    ]

"""``assay convert``: a checkpoint written again, ready to be packed or in another project's format."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.formats.convert import Row

SCHEMA_VERSION = 1
TARGETS = (
    "assay", "gptq", "gptq_v2", "awq", "compressed-tensors", "mxfp4", "nvfp4", "nf4", "hqq", "q4_0", "q4_1", "q5_0",
    "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("file", metavar="FILE", help="a GGUF or .safetensors file, an index of shards, or a folder")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="a name in .safetensors or .gguf, or a folder for shards (which goes on where it was interrupted)",
    )
    parser.add_argument(
        "--to",
        choices=TARGETS,
        default="assay",
        metavar="FORMAT",
        help=f"one of {', '.join(TARGETS)}; q... are GGUF to GGUF (default assay: codes ready to be packed)",
    )
    parser.add_argument(
        "--lossy", action="store_true", help="round weights that FORMAT cannot hold exactly, and report the error"
    )
    parser.add_argument(
        "--quantize",
        action="append",
        default=[],
        metavar="GLOB",
        help="round float matrices whose names match too (may be repeated)",
    )
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="G", help="of what is rounded, where FORMAT leaves it open (128)"
    )
    parser.add_argument(
        "--shard-gib", type=float, default=4.0, metavar="GIB", help="size of the shards of a folder (default 4)"
    )
    parser.add_argument("--format", choices=("table", "md", "csv", "json"), default="table", help="of the report")


def run(args: argparse.Namespace) -> int:
    """Converts and reports."""
    from assay.formats.checkpoint import open_checkpoint
    from assay.formats.convert import Options, convert
    from assay.report.progress import Progress
    from assay.report.table import printable

    if not 0 < args.shard_gib < 1 << 30:
        raise ValueError(f"--shard-gib: expected a positive number, got {args.shard_gib}")
    if args.group_size < 1:
        raise ValueError(f"--group-size: expected 1 or more, got {args.group_size}")
    options = Options(args.to, args.lossy, tuple(args.quantize), args.group_size, int(args.shard_gib * 2**30) or 1)
    with open_checkpoint(args.file) as checkpoint:
        total = sum(t.nbytes for t in checkpoint.tensors.values())
    try:
        with Progress(float(total), f"convert to {args.to}") as bar:
            rows = convert(args.file, args.output, options, lambda nbytes, name: bar.advance(nbytes, printable(name)))
    except KeyboardInterrupt:
        if not args.output.endswith((".safetensors", ".gguf")):
            print("assay convert: finished shards are kept; the same command goes on with the rest", file=sys.stderr)
        raise
    _print(args, rows)
    return 0


def _print(args: argparse.Namespace, rows: "list[Row]") -> None:
    from dataclasses import asdict

    from assay.report import table

    records = [asdict(row) for row in rows]
    totals = {key: sum(record[key] for record in records) for key in ("count", "params", "bytes_before", "bytes_after")}
    worst = max((record["rms_error"] for record in records), default=0.0)
    if args.format == "json":
        print(
            table.to_json(
                {
                    "schema": "assay-convert",
                    "schema_version": SCHEMA_VERSION,
                    "file": args.file,
                    "output": args.output,
                    "to": args.to,
                    "exact": worst == 0,
                    "tensors": totals["count"],
                    "bytes_before": totals["bytes_before"],
                    "bytes_after": totals["bytes_after"],
                    "rows": records,
                }
            )
        )
        return
    text = table.render(records, _columns(table), args.format)
    if args.format == "csv":
        sys.stdout.write(text)
        return
    kept = "every weight kept" if worst == 0 else f"rounded: RMS error up to {table.percent(worst)} of a matrix's RMS"
    before, after = table.size(totals["bytes_before"]), table.size(totals["bytes_after"])
    print(f"{table.printable(args.output)}: {totals['count']} tensors, {before} -> {after}, {kept}\n")
    print(text)
    print(f"\nNext: assay inspect {table.printable(shlex.quote(args.output))}")


def _columns(table: Any) -> list[Any]:
    column = table.Column

    def count(value: int) -> str:
        return f"{value:,}"

    def error(value: float) -> str:
        return "exact" if value == 0 else f"{100 * value:.2g}%"

    return [
        column("stored", "stored"),
        column("runs_as", "written as"),
        column("count", "tensors", count, "right"),
        column("params", "parameters", count, "right"),
        column("bytes_before", "bytes before", count, "right"),
        column("bytes_after", "bytes after", count, "right"),
        column("max_error", "largest error", error, "right"),
        column("rms_error", "RMS error", error, "right"),
        column("resumed", "from before", count, "right"),
    ]

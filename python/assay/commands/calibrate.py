"""``assay calibrate``: measure this machine or one of its GPUs with the real kernels, fit, and write a profile."""

import argparse
import json
import shlex
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="about half a minute of measuring (default)")
    mode.add_argument("--full", action="store_true", help="about five minutes: more shapes, group sizes and passes")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (default), or a GPU: cuda:0")
    parser.add_argument("--threads", type=int, metavar="N", help="measure at 1 and N threads (default: all usable)")
    parser.add_argument("-o", "--output", metavar="FILE", help="the profile to write (default: where predict looks)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the order of the points (default 0)")
    parser.add_argument("--fresh", action="store_true", help="do not go on from an interrupted run")
    parser.add_argument("--format", choices=("table", "md", "csv", "json"), default="table", help="of what is printed")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 130 when interrupted, with everything measured kept."""
    from assay import profile
    from assay.measure import run as calibration
    from assay.measure.gpu import Gpu, parse_device
    from assay.ops import info
    from assay.report.progress import Progress

    most = info.num_threads()
    ordinal = parse_device(args.device)
    if ordinal is not None and args.threads is not None:
        raise ValueError("--threads: expected none with a GPU, which is measured by one thread")
    if args.threads is not None and not 1 <= args.threads <= 256:
        raise ValueError(f"--threads: expected 1..256, got {args.threads}")
    if args.seed < 0:
        raise ValueError(f"--seed: expected 0 or more, got {args.seed}")
    top = args.threads or most
    path = args.output or profile.default_profile_path(ordinal=ordinal)
    mode = "full" if args.full else "quick"
    job = calibration.Run(
        mode,
        sorted({1, top}),
        args.seed,
        path,
        command=["assay", *sys.argv[1:]] if sys.argv[1:] else None,
        device=None if ordinal is None else Gpu(ordinal, args.seed),
    )
    if args.fresh:
        calibration.partial_path(path).unlink(missing_ok=True)
    elif note := job.resume():
        print(note, file=sys.stderr)
    try:
        with Progress(job.expected_s, f"calibrate --{mode}", show=True) as bar:
            made = job.measure(bar.advance)
    except calibration.InterruptedRunError as stop:
        print(f"assay calibrate: {stop}", file=sys.stderr)
        return 130
    _print(made, str(path), args.format)
    return 0


def _verdict(made: Any) -> str:
    """How far the profile's predictions are to be trusted, in a line or two."""
    from assay.measure import summary
    from assay.report.table import percent, seconds, signed_percent

    met, missed = summary.verdict(made)
    lines = []
    if met or missed:
        line = (
            f"points outside the fit: {len(met)} of {len(met) + len(missed)} ops within {percent(summary.MEDIAN_ERROR)} in the"
            f" median and {percent(summary.P90_ERROR)} at the 90th percentile, or within what repeats differ by"
        )
        rows = {op: made.accuracy[op] for op in missed}
        tail = ", ".join(
            f"{op} (median error {percent(r['median_ape'])}, 90th pct. {percent(r['p90_ape'])})"
            for op, r in rows.items()
        )
        lines.append(f"{line}; not {tail}" if missed else line)
    stacks = made.accuracy.get("sequence", {})
    if stacks.get("n"):
        between = ", ".join(
            f"{seconds(c['seconds'])} at {c['threads']} thread{'s' if c['threads'] > 1 else ''}"
            for c in made.fits["sequence"]["classes"]
        )
        lines.append(
            f"{stacks['n']} stacks of layers predicted whole: median error {percent(stacks['median_ape'])}, bias"
            f" {signed_percent(stacks['bias'])}, {percent(stacks['coverage'])} in their 90% intervals; a call costs the next"
            f" {between}"
        )
    if (moved := summary.moved_between_runs(made)) is not None:
        runs = len(made.settings["earlier"])
        lines.append(
            f"against {runs} earlier calibration{'s' if runs > 1 else ''} the machine's roofs moved by up to {percent(moved)};"
            " intervals of predictions contain that"
        )
    return "\n".join(lines)


def _print(made: Any, path: str, fmt: str) -> None:
    from assay.measure import summary
    from assay.report.table import Column, percent, render, roof_value, seconds, signed_percent

    roofs, ops = summary.roof_rows(made), summary.op_rows(made)
    if fmt == "json":
        json.dump(
            {
                "schema": "assay-calibration", "schema_version": 1, "profile": path, "machine": made.machine.cpu,
                "fingerprint": made.machine.fingerprint, "measured_s": made.settings["measured_s"],
                "notes": made.settings["notes"], "roofs": roofs, "ops": ops,
            },
            sys.stdout, indent=2,
        )  # fmt: skip
        print()
        return
    roof_columns = [
        Column("roof", "roof"),
        Column("threads", "threads"),
        Column(("median", "unit"), "median", roof_value),
        Column("spread", "spread", percent),
    ]
    speed_columns = [
        Column("op", "op"),
        Column("threads", "threads"),
        Column("points", "points"),
        Column("fastest_s", "fastest", seconds),
        Column("slowest_s", "slowest", seconds),
        Column("spread", "spread", percent),
        Column("roof", "against"),
        Column("best_of_roof", "best", percent),
        Column("median_of_roof", "median", percent),
    ]
    error_columns = [
        Column("held_out_points", "held out"),
        Column("held_out_median_ape", "median error", percent),
        Column("held_out_p90_ape", "p90", percent),
        Column("held_out_bias", "bias", signed_percent),
        Column("coverage", "in 90% interval", percent),
    ]
    if fmt == "csv":
        print(render(ops, [*speed_columns, *error_columns], fmt), end="")
        return
    gpu = made.machine.extra.get("kind") == "gpu"
    print(
        f"{made.machine.cpu}, {made.machine.cores} {'multiprocessors' if gpu else 'cores'}: {len(made.samples)} points in"
        f" {made.settings['measured_s']:.0f} s\nprofile: {path}"
    )
    print(_verdict(made), end="\n\n")
    print(render(roofs, roof_columns, fmt), end="\n\n")
    print(render(ops, speed_columns, fmt), end="\n\n")
    judged = list({row["op"]: row for row in ops if row["held_out_points"]}.values())
    if judged:
        print("Points that the fit never saw:\n")
        print(render(judged, [speed_columns[0], *error_columns], fmt))
    for note in made.settings["notes"]:
        print(f"warning: {note}")
    if refined := made.settings.get("refinement"):
        print(
            f"{refined['points']} points were added where the model was least sure: at most"
            f" {percent(refined['largest_deviation'])} (one standard deviation of time) before the last of them, wanted"
            f" {percent(refined['target_deviation'])}"
        )
    if "power" in made.machine.extra:
        from assay.measure.power import describe

        print(describe(made.machine.extra["power"]))
    print(f"\nNext: assay predict mixtral-8x7b{f' --profile {shlex.quote(path)}' if gpu else ''}")

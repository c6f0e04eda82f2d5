"""``assay video``: what a second of generated video costs, by steps, frames and size. See docs/serving.md."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from . import _case

if TYPE_CHECKING:
    from collections.abc import Callable

    from assay.cost.diffusion import Clip
    from assay.cost.draws import Draws

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="video model of the catalog (default: all)")
    parser.add_argument(
        "--hardware", default="h100-sxm,b200", metavar="NAME,...", help="devices of the catalog (h100-sxm,b200)"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (the model's)")
    parser.add_argument("--frames", type=int, help="frames of a clip (the model's)")
    parser.add_argument("--size", metavar="WxH", help="pixels (the model's)")
    parser.add_argument("--weights", choices=_case.WEIGHTS, default="bf16", help="format of weights (bf16)")
    parser.add_argument("--usd-per-hour", metavar="LOW..HIGH", help="rent of a device (default: the catalog's range)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws behind the intervals (0)")
    parser.add_argument("--explain", action="store_true", help="show the terms, and what moves the answer most")
    parser.add_argument(
        "-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)"
    )


def run(args: argparse.Namespace) -> int:
    """Prices clips; exit status 0."""
    from assay.catalog import device_price, list_videos
    from assay.cost.diffusion import Clip, clip, usd_per_second, video_model
    from assay.cost.draws import Draws, interval
    from assay.cost.economics import rent
    from assay.cost.machines import Datasheet
    from assay.report.table import render, to_json

    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    known = {row["name"]: row for row in list_videos()}
    if args.model is not None and args.model not in known:
        raise ValueError(f"model: expected one of {', '.join(known)}, got {args.model!r}")
    width, height = (None, None) if args.size is None else _size(args.size)
    rows: list[dict[str, Any]] = []
    for name in [args.model] if args.model else known:
        for hardware in args.hardware.split(","):
            device, draws = _case.device_row(hardware), Draws(seed=args.seed)
            machine = _case.device(hardware)
            assert isinstance(machine, Datasheet)

            def price_clip(draws: Draws, name: str = name, machine: Datasheet = machine) -> Clip:
                return clip(
                    video_model(known[name]), machine, draws,
                    steps=args.steps, frames=args.frames, width=width, height=height, weights=args.weights,
                )  # fmt: skip

            made = price_clip(draws)
            row: dict[str, Any] = {
                "model": known[name]["title"], "device": device["title"], "frames": made.frames, "tokens": made.tokens,
                "seconds_of_video": made.seconds_of_video, "flops": made.flops,
            }  # fmt: skip
            price = device_price(str(device["name"]))
            span = _case.span(args.usd_per_hour, "--usd-per-hour") if args.usd_per_hour else (
                None if price is None else (price["low"], price["high"]))  # fmt: skip
            usd = None if span is None else usd_per_second(made, rent(span[0], span[1], draws))
            if args.explain:
                row["terms"] = {"memory_s": float(made.memory_s[0]), "compute_s": float(made.compute_s[0])}
                row["inputs"] = _inputs(price_clip, span)
            joules = None if made.watts is None else made.watts * made.work_per_second
            for key, values in (("time_s", made.time_s), ("work_per_second", made.work_per_second),
                                ("usd_per_second", usd), ("joules_per_second", joules)):  # fmt: skip
                ends = (None, None, None) if values is None else interval(values)
                row.update({key: ends[0], f"{key}_low": ends[1], f"{key}_high": ends[2]})
            default = args.steps is None and args.frames is None and args.size is None and args.weights == "bf16"
            row["measured_s"] = next(
                (m["seconds"] for m in known[name]["measured"] if default and m["device"] == device["name"]), None
            )
            rows.append(row)
    if args.output == "json":
        print(to_json({"schema": "assay-video", "schema_version": SCHEMA_VERSION, "rows": rows}))
    elif args.output == "csv":
        sys.stdout.write(render(rows, _columns(), "csv"))
    else:
        print(_verdict(rows), end="\n\n")
        print(render(rows, _columns(), args.output), end="\n\n")
        for row in rows if args.explain else []:
            print(_explained(row), end="\n\n")
        print(
            "- [low, high] are 90% intervals, at a judged share of the dense peak; the prompt's encoder and the VAE are in it."
        )
        print("- measured: as the model's makers publish it.")
        print(f"\nNext: {_next(args)}")
    return 0


def _inputs(price_clip: "Callable[[Draws], Clip]", span: tuple[float, float] | None) -> list[dict[str, Any]]:
    """The three uncertain inputs that move a clip's dollars most; its seconds where it has no price."""
    from assay.cost.diffusion import usd_per_second
    from assay.cost.draws import influences
    from assay.cost.economics import rent

    if span is None or span[1] == 0:
        found, of = influences(lambda draws: price_clip(draws).time_s), "time_s"
    else:
        found = influences(lambda draws: usd_per_second(price_clip(draws), rent(span[0], span[1], draws)))
        of = "usd_per_second"
    return [{"input": i.cause, "of": of, "at_low": i.at_low, "at_high": i.at_high} for i in found[:3]]


def _explained(row: dict[str, Any]) -> str:
    from assay.report import table

    terms = ", ".join(f"{name.removesuffix('_s')} {table.seconds(value)}" for name, value in row["terms"].items())
    write = {"time_s": table.seconds, "usd_per_second": table.usd}
    moved = "; ".join(
        f"{i['input']} ({write[i['of']](i['at_low'])} to {write[i['of']](i['at_high'])})" for i in row["inputs"]
    )
    of = {"time_s": "the time", "usd_per_second": "dollars a second"}[row["inputs"][0]["of"]]
    return f"{row['model']} on {row['device']}: {terms}. What moves {of} most: {moved}."


def _verdict(rows: list[dict[str, Any]]) -> str:
    from assay.report import table

    priced = [row for row in rows if row["usd_per_second"] is not None]
    what, key, write = (
        ("Cheapest", "usd_per_second", table.usd) if priced else ("Fastest", "work_per_second", table.seconds)
    )
    best = min(priced or rows, key=lambda row: row[key])
    spent = write(best[key], best[f"{key}_low"], best[f"{key}_high"])
    return f"{what} second of video: {spent}, by {best['model']} on {best['device']}."


def _next(args: argparse.Namespace) -> str:
    """What moves the clips just priced; for one model's, fewer steps."""
    if not args.explain:
        asked = (("--hardware", args.hardware, "h100-sxm,b200"), ("--steps", args.steps, None), ("--frames", args.frames, None),
                 ("--size", args.size, None), ("--weights", args.weights, "bf16"), ("--usd-per-hour", args.usd_per_hour, None))  # fmt: skip
        same = [word for name, value, default in asked if value != default for word in (name, str(value))]
        return shlex.join(["assay", "video", *([args.model] if args.model else []), *same, "--explain"])
    return shlex.join(["assay", "video", args.model or "cogvideox-5b", "--hardware", args.hardware, "--steps", "25"])


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return _case.whole(width, "--size"), _case.whole(height, "--size")


def _columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    def three(stem: str) -> tuple[str, str, str]:
        return stem, f"{stem}_low", f"{stem}_high"

    return [
        Column("model", "model"),
        Column("device", "device"),
        Column("tokens", "tokens", align="right"),
        Column("seconds_of_video", "video", table.seconds),
        Column(three("time_s"), "work", table.seconds),
        Column("measured_s", "measured", table.seconds),
        Column(three("work_per_second"), "work per second of video", table.seconds),
        Column(three("usd_per_second"), "$/second", table.usd),
        Column(three("joules_per_second"), "J/second", table.number),
    ]

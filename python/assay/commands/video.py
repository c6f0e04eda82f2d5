"""``assay video``: what a second of generated video costs, by steps, frames and size. See docs/serving.md."""

import argparse
import sys
from typing import Any

from . import _case

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
    parser.add_argument(
        "-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)"
    )


def run(args: argparse.Namespace) -> int:
    """Prices clips; exit status 0."""
    from assay.catalog import device_price, list_videos
    from assay.cost.diffusion import clip, usd_per_second, video_model
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
            made = clip(
                video_model(known[name]), machine, draws,
                steps=args.steps, frames=args.frames, width=width, height=height, weights=args.weights,
            )  # fmt: skip
            row: dict[str, Any] = {
                "model": known[name]["title"], "device": device["title"], "frames": made.frames, "tokens": made.tokens,
                "seconds_of_video": made.seconds_of_video, "flops": made.flops,
            }  # fmt: skip
            price = device_price(str(device["name"]))
            span = _case.span(args.usd_per_hour, "--usd-per-hour") if args.usd_per_hour else (
                None if price is None else (price["low"], price["high"]))  # fmt: skip
            usd = None if span is None else usd_per_second(made, rent(span[0], span[1], draws))
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
        print(render(rows, _columns(), args.output), end="\n\n")
        print(
            "- [low, high] are 90% intervals, at a judged share of the dense peak; the prompt's encoder and the VAE are in it."
        )
        print("- measured: as the model's makers publish it.")
        print("\nNext: assay video cogvideox-5b --hardware h100-sxm --steps 25")
    return 0


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

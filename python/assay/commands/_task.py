"""A task of ``assay plan``: its tokens from the options, images and video in, and what it costs."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _case

if TYPE_CHECKING:
    from assay.cost.demand import Task
    from assay.cost.draws import Draws
    from assay.cost.roofline import FloatArray
    from assay.cost.serving import Steady
    from assay.model import ModelSpec


@dataclass(frozen=True)
class Seen:
    """What a prompt shows: tokens, operations and weights of the tower that makes them, and sentences about it."""

    tokens: int
    flops: float
    params: int
    said: tuple[str, ...]


def add_task(parser: argparse.ArgumentParser) -> None:
    """Options of a task."""
    group = parser.add_argument_group("a task, in tokens; LOW..HIGH are the 5th and 95th percentile over tasks")
    group.add_argument("--prompt", metavar="LOW..HIGH", help="first prompt (default: --isl)")
    group.add_argument("--answer", metavar="LOW..HIGH", help="visible tokens a call (default: --osl)")
    group.add_argument("--hidden", default="0", metavar="LOW..HIGH", help="reasoning tokens a call (0)")
    group.add_argument("--calls", default="1", metavar="LOW..HIGH", help="calls of the model (1)")
    group.add_argument(
        "--returned", default="0", metavar="LOW..HIGH", help="tokens that a tool adds after each call (0)"
    )
    group.add_argument("--images", type=int, default=0, metavar="N", help="images in the prompt (0)")
    group.add_argument("--image-size", default="1024x1024", metavar="WxH", help="their pixels (1024x1024)")
    group.add_argument("--video", type=float, default=0.0, metavar="SECONDS", help="of video in the prompt (0)")
    group.add_argument("--fps", type=float, default=2.0, help="frames a second that are looked at (2)")


def task(args: argparse.Namespace, model: "ModelSpec") -> "tuple[Task, Seen]":
    """The task of the options, and what its prompt shows."""
    from assay.cost.demand import Spread, Task, encoder_flops, image_tokens, video_tokens

    seen, said = 0, []
    if args.images or args.video:
        if model.vision is None:
            raise ValueError(f"--images, --video: expected a model that sees, got {model.name}")
        width, _, height = args.image_size.partition("x")
        size = _case.whole(width, "--image-size"), _case.whole(height, "--image-size")
        if args.images < 0 or args.video < 0:
            raise ValueError("--images, --video: expected at least 0")
        if args.images:
            one = image_tokens(model.vision, *size)
            seen += args.images * one
            said.append(f"{args.images} images of {args.image_size} are {args.images * one} tokens")
        if args.video:
            clip = video_tokens(model.vision, args.video, args.fps, *size)
            seen += clip
            said.append(f"{args.video:g} s of video at {args.fps:g} frames a second are {clip} tokens")

    def spread(text: str | None, default: int, name: str, more: int = 0) -> Spread:
        low, high = (float(default),) * 2 if text is None else _case.span(text, name)
        if low < 0:
            raise ValueError(f"{name}: expected at least 0, got {text!r}")
        return Spread(low + more, high + more)

    asked = Task(
        spread(args.prompt, args.isl, "--prompt", seen),
        spread(args.answer, args.osl, "--answer"),
        spread(args.hidden, 0, "--hidden"),
        spread(args.calls, 1, "--calls"),
        spread(args.returned, 0, "--returned"),
        args.prefix_hit,
    )
    flops, params = (encoder_flops(model.vision, seen), model.vision.params) if model.vision and seen else (0.0, 0)
    return asked, Seen(seen, flops, params, tuple(said))


def cost(
    args: argparse.Namespace, plan: "Steady", per_hour: "FloatArray", asked: "Task", seen: Seen, draws: "Draws"
) -> dict[str, Any]:
    """Dollars of a task on a full server: the mean with its interval, and what tasks range over."""
    from assay.cost.demand import demand, task_cost
    from assay.cost.draws import interval
    from assay.cost.economics import break_even_queries

    paid = use(plan, per_hour, draws)
    spent = task_cost(demand(asked, seed=args.seed), paid.usd_per_million_in, paid.usd_per_million_out)
    tower = 0.0 * per_hour
    if seen.flops:
        # One pass of the tower over all patches: its weights once, its operations at the rate of attention.
        tower = plan.case.machine.attention(2.0 * seen.params, seen.flops, 1, draws).time_s * per_hour / 3600.0
    middle, low, high = interval(spent.mean_usd + tower)
    found = {
        "usd_per_task": middle, "usd_per_task_low": low, "usd_per_task_high": high,
        "tasks_usd_p5": spent.tasks_usd[0], "tasks_usd_p50": spent.tasks_usd[1], "tasks_usd_p95": spent.tasks_usd[2],
        "mean_tokens_in": spent.mean_in, "mean_tokens_out": spent.mean_out, "usd_of_vision": float(tower[0]),
        "tasks_a_month": None,
    }  # fmt: skip
    if args.subscription is not None:
        found["tasks_a_month"] = break_even_queries(args.subscription, middle)
    return found


def about(args: argparse.Namespace, spent: dict[str, Any] | None, seen: Seen) -> list[str]:
    """A task in sentences."""
    from assay.report import table

    lines = ["; ".join(seen.said) + "."] if seen.said else []
    if spent is not None:
        mean = table.usd(spent["usd_per_task"], spent["usd_per_task_low"], spent["usd_per_task_high"])
        ends = [table.usd(spent[f"tasks_usd_p{p}"]) for p in (5, 50, 95)]
        line = (
            f"A task ({table.number(spent['mean_tokens_in'])} tokens in, {table.number(spent['mean_tokens_out'])} out, means): "
            f"{mean} on a full server; tasks range from {ends[0]} over {ends[1]} to {ends[2]} (5th, 50th, 95th percentile)."
        )
        if spent["tasks_a_month"] is not None:
            line += f" ${args.subscription:g} a month pay for {table.number(spent['tasks_a_month'])} tasks."
        lines.append(line)
    return lines


def use(plan: "Steady", per_hour: "FloatArray", draws: "Draws") -> Any:
    """Cost of use: of a full server, busy all the time."""
    from assay.cost.economics import token_cost
    from assay.cost.serving import mixed_step

    both, alone, _ = mixed_step(plan.case, float(plan.most), draws)
    new = max(1.0, plan.case.isl * (1.0 - plan.case.prefix_hit))
    return token_cost(per_hour, plan.capacity_per_s, 1.0 - alone.time_s / both.time_s, new, plan.case.mean_osl)

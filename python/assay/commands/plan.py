"""``assay plan``: what a server of a model holds, how fast it answers, and what tokens and tasks cost. See docs/serving.md."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from . import _case, _task

if TYPE_CHECKING:
    from assay.cost.cases import Case
    from assay.cost.choose import Choice
    from assay.cost.draws import Draws
    from assay.cost.roofline import FloatArray
    from assay.cost.serving import Steady

SCHEMA_VERSION = 1
DEFAULT_RATES = "0.1,1,4,16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="catalog name, Hugging Face config.json, or GGUF file")
    _case.add_machine(parser)
    parser.add_argument("--rate", default=DEFAULT_RATES, metavar="R,...", help=f"requests a second ({DEFAULT_RATES})")
    parser.add_argument(
        "--batch", type=int, default=256, metavar="B", help="most requests at once; memory may allow fewer (256)"
    )
    parser.add_argument("--isl", type=int, default=1000, help="input tokens a request, images and video in (1000)")
    parser.add_argument("--osl", type=int, default=300, help="output tokens a request, hidden ones in (300)")
    parser.add_argument(
        "--weights", default="bf16", metavar="F[,ROLE=F...]", help="weight formats, as w4a16,lm_head=bf16 (bf16)"
    )
    parser.add_argument("--kv", choices=_case.KV, default="bf16", help="format of the cache (bf16)")
    parser.add_argument(
        "--prefix-hit", type=float, default=0.0, metavar="H", help="share of prompts found in a cache (0)"
    )
    parser.add_argument("--skew", type=float, default=0.0, metavar="A", help="popularity of experts as rank^-A (0)")
    parser.add_argument(
        "--spec",
        metavar="OPTIONS",
        help="speculation, as k=4:accept=0.8/0.7/0.6:draft=0.05, or best:accept=... for the best tree at each batch",
    )
    parser.add_argument(
        "--usd-per-hour", metavar="LOW..HIGH", help="rent of all devices (default: the catalog's range)"
    )
    parser.add_argument("--buy", metavar="LOW..HIGH", help="price of all devices instead: written off over --years")
    parser.add_argument("--years", type=float, default=4.0, help="of a machine that is bought (4)")
    parser.add_argument("--kwh", default="0.06..0.20", metavar="LOW..HIGH", help="dollars a kWh (0.06..0.20)")
    parser.add_argument(
        "--pue", default="1.1..1.5", metavar="LOW..HIGH", help="power of the data centre over its machines (1.1..1.5)"
    )
    parser.add_argument("--watts", type=float, help="of a calibrated machine at work")
    _task.add_task(parser)
    parser.add_argument("--subscription", type=float, metavar="USD", help="dollars a month: how many tasks it pays for")
    parser.add_argument("--explain", action="store_true", help="show the terms, and what moves the answer most")
    parser.add_argument(
        "-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)"
    )


def run(args: argparse.Namespace) -> int:
    """Prices the server at every rate, and the task; exit status 0."""
    from assay.catalog import resolve_model
    from assay.cost.cases import Case
    from assay.cost.draws import Draws
    from assay.cost.formats import parse
    from assay.cost.serving import steady
    from assay.report.table import render, to_json

    if args.watts is not None and (args.profile is None or not 0 < args.watts <= 1e6):
        raise ValueError(f"--watts: expected 0 to 1000000 of a calibrated machine (--profile), got {args.watts:g}")
    model = resolve_model(args.model)
    formats = parse(args.weights)
    case = Case(
        model, _case.machine(args, args.watts), formats.weights, args.kv, args.batch, args.isl, args.osl,
        prefix_hit=args.prefix_hit, by_role=formats.by_role, skew=args.skew,
    )  # fmt: skip
    draws = Draws(seed=args.seed)
    case, chosen = _speculation(args, case, draws)
    rates = [_case.number(text, "--rate") for text in args.rate.split(",")]
    plans = [steady(case, rate, draws) for rate in rates]
    price = _price(args, case)
    rows = [_row(plan, price, draws) for plan in plans]
    task, seen = _task.task(args, model)
    spent = None if price is None else _task.cost(args, plans[0], price(plans[0], draws), task, seen, draws)
    lines = _task.about(args, spent, seen) + _best(case, chosen)
    notes = _notes(args, case, plans, draws, price is not None)
    explained = _explain(case, plans[0], args) if args.explain else None
    verdict = _verdict(plans, rows)
    if args.output == "json":
        answer = {
            "schema": "assay-plan", "schema_version": SCHEMA_VERSION,
            "model": {"name": model.name, "source": model.source}, "machine": case.machine.name,
            "isl": args.isl, "osl": args.osl, "weights": args.weights, "kv": args.kv, "verdict": verdict,
            "rows": rows, "task": spent,
            "best_speculation": [
                {"batch": c.batch, "speculation": None if c.speculation is None else c.speculation.name,
                 "parents": [] if c.speculation is None else list(c.speculation.parents), "tokens_per_step": c.tokens_per_step,
                 "speedup": c.speedup[0], "speedup_low": c.speedup[1], "speedup_high": c.speedup[2]} for c in chosen
            ], "notes": notes, "explain": explained,
        }  # fmt: skip
        print(to_json(answer))
    elif args.output == "csv":
        sys.stdout.write(render(rows, _columns(), "csv"))
    else:
        print(f"{model.name} on {case.machine.name}, {args.isl} tokens in, {args.osl} out", verdict, "", sep="\n")
        print(render(rows, _columns(price is not None), args.output), end="\n\n")
        for line in lines:
            print(line, end="\n\n")
        if explained is not None:
            print(_explained(explained, args.output), end="\n\n")
        for note in notes:
            print(f"- {note}")
        print(f"\nNext: {_next(args)}")
    return 0


def _speculation(args: argparse.Namespace, case: "Case", draws: "Draws") -> "tuple[Case, list[Choice]]":
    """The case with the speculation asked for, or the best one at its batch; and the best at smaller ones, where asked."""
    from dataclasses import replace

    from assay.cost.choose import best_speculation

    if args.spec is None:
        return case, []
    text = "spec:" + args.spec
    best = args.spec.partition(":")[0] == "best"
    options = _case.split(text.replace("spec:best", "spec", 1) if best else text)[1]
    if best and {"k", "tree", "length"} & set(options):
        raise ValueError("--spec: expected best without k, tree and length")
    spec = _case.speculation(options)
    if options:
        raise ValueError(f"--spec: expected none of {', '.join(options)}")
    if not best:
        return replace(case, speculation=spec), []
    batches = sorted({b for b in (1, 4, 16, 64, 256) if b < case.running} | {case.running})
    chosen = [best_speculation(replace(case, batch=batch), spec, draws) for batch in batches]
    return replace(case, speculation=chosen[-1].speculation), chosen


def _best(case: "Case", chosen: "list[Choice]") -> list[str]:
    """The best drafts by batch, in a sentence."""
    from assay.report import table

    if not chosen:
        return []
    said = [
        f"{c.batch} at once: "
        + ("none pays" if c.speculation is None else f"{c.speculation.name}, {table.number(*c.speedup)} times")
        for c in chosen
    ]
    return [f"Best drafts by batch: {'; '.join(said)}."]


# ---- money and tasks ----------------------------------------------------------------------------------------


def _price(args: argparse.Namespace, case: "Case") -> Any:
    """A function of a plan that gives dollars an hour by draw; None where no price is known."""
    from assay.catalog import device_price
    from assay.cost.economics import Owned, rent

    if args.buy is not None and args.usd_per_hour is not None:
        raise ValueError("--buy: expected no --usd-per-hour beside it, got both")
    if args.buy is not None:
        owned = Owned(
            _geometric(args.buy, "--buy"), args.years, _geometric(args.kwh, "--kwh"), _geometric(args.pue, "--pue")
        )

        def bought(plan: "Steady", draws: "Draws") -> "FloatArray":
            if plan.watts is None:
                raise ValueError(f"--buy: expected a machine of known watts (--watts), got {case.machine.name}")
            return owned.usd_per_hour(plan.watts, draws)

        return bought
    if args.usd_per_hour is not None:
        low, high = _case.span(args.usd_per_hour, "--usd-per-hour")
        if not 0 <= low <= high <= 1e6:
            raise ValueError(f"--usd-per-hour: expected 0 to 1000000, got {args.usd_per_hour}")
        return lambda plan, draws: rent(low, high, draws)
    if args.profile is not None:
        return None
    row = device_price(str(_case.device_row(args.hardware or _case.DEFAULT_HARDWARE)["name"]))
    if row is None:
        return None
    return lambda plan, draws: args.devices * rent(row["low"], row["high"], draws)


def _geometric(text: str, name: str) -> tuple[float, float, float]:
    low, high = _case.span(text, name)
    if low <= 0:
        raise ValueError(f"{name}: expected above 0, got {text}")
    return low, (low * high) ** 0.5, high


# ---- output ------------------------------------------------------------------------------------------------


def _row(plan: "Steady", price: Any, draws: "Draws") -> dict[str, Any]:
    import math

    from assay.cost.draws import interval
    from assay.cost.economics import token_cost

    row: dict[str, Any] = {"rate_per_s": plan.rate_per_s, "most": plan.most, "saturated": plan.saturated}

    def put(name: str, values: Any) -> None:
        ends = (None, None, None) if values is None else interval(values)
        row.update({name: ends[0], f"{name}_low": ends[1], f"{name}_high": ends[2]})

    put("utilisation", plan.utilisation)
    put("running", plan.running)
    put("tpot_s", plan.tpot_s)
    put("ttft_s", plan.ttft_s)
    put("wait_s", plan.wait_s)
    row["why_no_wait"] = plan.why_no_wait
    put("tokens_per_s", plan.tokens_per_s)
    put("capacity_per_s", plan.capacity_per_s)
    row["machines"] = max(1, math.ceil(float(plan.utilisation[0]) / 0.7))
    put("watts", plan.watts)
    put("joules_per_token", None if plan.watts is None else plan.watts / plan.tokens_per_s)
    use = paid = None
    if price is not None:
        per_hour = price(plan, draws)
        use = _task.use(plan, per_hour, draws)
        paid = token_cost(per_hour, plan.requests_per_s, plan.prompt_share, 1.0, 1.0).usd_per_request
    put("usd_per_million_in", None if use is None else use.usd_per_million_in)
    put("usd_per_million_out", None if use is None else use.usd_per_million_out)
    put("usd_per_request", None if use is None else use.usd_per_request)
    put("usd_per_request_paid", paid)
    return row


def _columns(priced: bool = True) -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    def three(stem: str) -> tuple[str, str, str]:
        return stem, f"{stem}_low", f"{stem}_high"

    def share(value: float, low: float, high: float) -> str:
        return f"{value:.0%} [{low:.0%}, {high:.0%}]"

    money = (
        Column(three("usd_per_million_in"), "$/M in", table.usd),
        Column(three("usd_per_million_out"), "$/M out", table.usd),
        Column(three("usd_per_request_paid"), "$/request paid", table.usd),
    )
    return [
        Column("rate_per_s", "requests/s", table.number, align="right"),
        Column(three("utilisation"), "utilisation", share),
        Column(three("running"), "running", table.number),
        Column(three("tpot_s"), "time per token", table.seconds),
        Column(three("ttft_s"), "first token", table.seconds),
        Column(three("wait_s"), "wait", table.seconds),
        Column(three("tokens_per_s"), "tokens/s", table.number),
        *(money if priced else ()),
        Column(three("joules_per_token"), "J/token", table.number),
        Column("machines", "machines", align="right"),
    ]


def _verdict(plans: "list[Steady]", rows: list[dict[str, Any]]) -> str:
    from assay.report import table

    first = rows[0]
    capacity = table.number(first["capacity_per_s"], first["capacity_per_s_low"], first["capacity_per_s_high"])
    text = f"Holds {plans[0].most} requests at once and finishes {capacity} a second at most"
    full = [p for p in plans if p.why_no_wait]
    return f"{text}; {full[0].rate_per_s:g} a second: {full[0].why_no_wait}." if full else f"{text}."


def _notes(args: argparse.Namespace, case: "Case", plans: "list[Steady]", draws: "Draws", priced: bool) -> list[str]:
    notes = [
        "[low, high] are 90% intervals.",
        *dict.fromkeys(p.why_no_wait for p in plans if p.why_no_wait),
        *draws.notes,
    ]
    if priced:
        notes.append("$/M in and out: a full server, the cost of use. $/request paid: at this rate, idle time in.")
        if args.usd_per_hour is None and args.buy is None:
            from assay.catalog import device_price

            row = device_price(str(_case.device_row(args.hardware or _case.DEFAULT_HARDWARE)["name"]))
            assert row is not None
            notes.append(
                f"Rent of a device: ${row['low']:g} to ${row['high']:g} an hour, {row['date']} ({row['source']})."
            )
    else:
        notes.append("No price of this machine is known: give --usd-per-hour or --buy.")
    if case.model.max_context is not None and case.isl + case.osl > case.model.max_context:
        notes.append(
            f"{case.isl + case.osl} tokens in and out are more than the model's context of {case.model.max_context}."
        )
    notes.append(
        "machines: so many at 70% of their capacity. Waits: Poisson arrivals; none is given at 90% of capacity and above."
    )
    return notes


def _explain(case: "Case", plan: "Steady", args: argparse.Namespace) -> dict[str, Any]:
    """Terms of a full step, and the inputs that move its time per token most."""
    from assay.cost.draws import Draws, influences
    from assay.cost.serving import mixed_step, steady

    both, alone, tokens = mixed_step(case, float(plan.most), Draws(0))
    moved = influences(lambda draws: steady(case, plan.rate_per_s, draws).capacity_per_s)[:3]
    return {
        "step_s": float(both.time_s[0]),
        "terms": {
            "memory_s": float(both.memory_s[0]), "compute_s": float(both.compute_s[0]),
            "overhead_s": float(both.overhead_s[0]), "of_which_prompts_s": float((both.time_s - alone.time_s)[0]),
        },
        "tokens_per_step": float(tokens[0]),
        "inputs": [{"input": i.cause, "capacity_at_low": i.at_low, "capacity_at_high": i.at_high} for i in moved],
    }  # fmt: skip


def _explained(explained: dict[str, Any], fmt: str) -> str:
    from assay.report import table

    terms = explained["terms"]
    said = ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {table.seconds(value)}" for name, value in terms.items()
    )
    lines = [f"A step of the full server takes {table.seconds(explained['step_s'])}: {said}; "
             f"{table.number(explained['tokens_per_step'])} tokens of a request a step."]  # fmt: skip
    lines += [
        f"{'* ' if fmt == 'md' else ''}{i['input']}: capacity {table.number(i['capacity_at_low'])} to "
        f"{table.number(i['capacity_at_high'])} requests/s over its 90% interval"
        for i in explained["inputs"]
    ]
    return "\n".join(lines)


def _next(args: argparse.Namespace) -> str:
    command = ["assay", "plan", args.model]
    for option in ("hardware", "profile"):
        if getattr(args, option):
            command += [f"--{option}", getattr(args, option)]
    if args.devices != 1:
        command += ["--devices", str(args.devices)]
    return shlex.join([*command, *(["--weights", "w4a16"] if args.explain else ["--explain"])])

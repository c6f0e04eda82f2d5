"""Claims as arithmetic: ratios, sums, growth, tokens, FLOP, watts, list prices."""

import math
from collections.abc import Mapping
from typing import Any

from assay.cost.demand import image_tokens as tokens_of_image
from assay.cost.demand import video_tokens as tokens_of_video
from assay.cost.verdicts import Recomputed, Value, World, ends, exact, met
from assay.model import ModelSpec, Vision


def none(n: Mapping[str, Any], world: World) -> Recomputed:
    """Nothing follows."""
    return Recomputed((), "", n["reason"])


def ratio(n: Mapping[str, Any], world: World) -> Recomputed:
    """One range over another."""
    (a, b), (c, d) = n["over"], n["under"]
    text = f"{n['what']}: {a:g} / {d:g}" + ("" if (a, d) == (b, c) else f" to {b:g} / {c:g}")
    if "tokens" in n:
        million = [1e6 * usd / n["tokens"] for usd in (a, b)]
        text += f"; {n['tokens']} tokens at that price are ${million[0]:g} to ${million[1]:g} a million"
    if "used" in n:
        text += f"; {n['used']} at {d:g} are {n['used'] * d:g}, {n['used'] * d / a:.3g} times {a:g}"
    return Recomputed(ends(a / d, b / c), "x", text, "which ends of the ranges are compared", span=True)


def product_range(n: Mapping[str, Any], world: World) -> Recomputed:
    """Ranges multiplied."""
    low, high = (math.prod(f[i] for f in n["factors"]) for i in (0, 1))
    return Recomputed(ends(low, high), n["unit"], " x ".join(f"[{a:g}, {b:g}]" for a, b in n["factors"]))


def agent_month(n: Mapping[str, Any], world: World) -> Recomputed:
    """Tasks a day, calls, price of a call, days."""
    low, high = (n["tasks_per_day"] * n["calls"][i] * n["usd_per_call"][i] * n["days"] for i in (0, 1))
    even = n["claimed"][0] / (n["tasks_per_day"] * n["days"])
    text = f"{n['tasks_per_day']:g} tasks x {n['calls']} calls x ${n['usd_per_call']} x {n['days']} days"
    return Recomputed(
        ends(low, high), "$ a month", text, f"the price of a task: it breaks even at ${even:.3g}", span=True
    )


def total(n: Mapping[str, Any], world: World) -> Recomputed:
    """Parts against a stated total."""
    start, end = sum(n["start"]), sum(n["end"])
    text = f"{n['start']} adds up to {start:g}, {n['end']} to {end:g}"
    values = (exact(start / n["stated"][0], "2024"), exact(end / n["stated"][1], "2028"))
    return Recomputed(values, "of the stated total", text)


def growth(n: Mapping[str, Any], world: World) -> Recomputed:
    """Compound growth."""
    rate = (n["end"] / n["start"]) ** (1.0 / n["years"]) - 1.0
    years = math.log(n["end"] / n["start"]) / math.log1p(n["claimed"][0])
    text = f"({n['end']:g} / {n['start']:g})^(1/{n['years']}) - 1; the claimed rate takes {years:.1f} years"
    return Recomputed((exact(rate),), "a year", text)


def _visions(n: Mapping[str, Any]) -> list[tuple[str, Vision]]:
    return [(v["name"], Vision(v["patch"], v["merge"], v.get("tokens"), v["temporal"], 0)) for v in n["visions"]]


def image_tokens(n: Mapping[str, Any], world: World) -> Recomputed:
    """Tokens of square images by models' own laws."""
    values = []
    for name, vision in _visions(n):
        sizes = [tokens_of_image(vision, side, side) for side in n["pixels"]]
        values += [Value(t, t, t, f"{name}, {side} px") for t, side in zip(sizes, n["pixels"], strict=True)
                   if vision.tokens is None or side == n["pixels"][0]]  # fmt: skip
    text = "a fixed number, or (pixels / (patch x merge))^2, by each model's published configuration"
    return Recomputed(tuple(values), "tokens", text, "model and resolution: " + met(values, n["claimed"]))


def video_tokens(n: Mapping[str, Any], world: World) -> Recomputed:
    """Tokens of a clip over those of a text query, sampled sparsely and whole."""
    values = []
    for name, vision in _visions(n):
        for fps in n["sampled"]:
            tokens = tokens_of_video(vision, n["seconds"], fps, n["pixels"], n["pixels"])
            values.append(exact(tokens / n["text_tokens"], f"{name}, {fps} a second"))
    frames = n["seconds"] * n["fps"]
    per = [n["text_tokens"] * c / frames for c in n["claimed"]]
    text = (
        f"{n['seconds']} s are {frames} frames; tokens of those that are looked at, at {n['pixels']} px, over a query of "
        f"{n['text_tokens']}; {per[0]:.3g} to {per[1]:.3g} tokens a frame give the claim"
    )
    return Recomputed(tuple(values), "x prompt tokens", text, "frames that are looked at: " + met(values, n["claimed"]))


def agent_calls(n: Mapping[str, Any], world: World) -> Recomputed:
    """Dollars a task by the number of calls."""
    values = [exact(calls * n["usd_per_call"], f"{calls} calls") for calls in n["calls"]]
    text = f"calls x ${n['usd_per_call']:g}"
    return Recomputed(tuple(values), "$ a task", text, "the number of calls: " + met(values, n["claimed"]))


def list_price(n: Mapping[str, Any], world: World) -> Recomputed:
    """A query of so many tokens at a published list price, and the tokens that the claim needs."""
    row = world.tokens(n["price"])
    values = [exact((i * row["usd_in"] + o * row["usd_out"]) / 1e6, f"{i} in, {o} out") for i, o in n["queries"]]
    low, high = n["claimed"]
    kind, usd = ("in", row["usd_in"]) if n["grows"] == "in" else ("out", row["usd_out"])
    text = (
        f"${row['usd_in']:g} in and ${row['usd_out']:g} out a million ({row['date']}); the claim is "
        f"{1e6 * low / usd:,.0f} to {1e6 * high / usd:,.0f} tokens {kind}"
    )
    return Recomputed(tuple(values), "$ a query", text, f"tokens {kind}: " + met(values, n["claimed"]), span=n["span"])


def list_ratio(n: Mapping[str, Any], world: World) -> Recomputed:
    """One list price over another for the same query."""
    i, o = n["query"]
    a, b = (world.tokens(name) for name in (n["over"], n["under"]))
    usd = [(i * row["usd_in"] + o * row["usd_out"]) / 1e6 for row in (a, b)]
    text = (
        f"${usd[0]:.3g} over ${usd[1]:.3g} for {i} tokens in and {o} out at list prices of {a['date']} and {b['date']}"
    )
    return Recomputed((exact(usd[0] / usd[1]),), "x", text)


def own_table(n: Mapping[str, Any], world: World) -> Recomputed:
    """What the claims' own figures of other techniques give: their largest, or their product."""
    rows = [world.numbers[name] for name in n["of"]]
    if n["take"] == "largest":
        values = [exact(row["theoretical"][1], name) for name, row in zip(n["of"], rows, strict=True)]
        return Recomputed(tuple(values), "x", "theoretical figures of the same table")
    low, high = (math.prod(row["practical"][k] for row in rows) for k in (0, 1))
    index = n["claimed"][0] / low, n["claimed"][1] / high
    text = (
        f"practical figures of {', '.join(n['of'])} multiplied; the claim needs an interaction index of "
        f"{min(index):.2g} to {max(index):.2g}, so that they do not multiply"
    )
    return Recomputed((Value(math.sqrt(low * high), low, high),), "x", text, "how far gains multiply")


# ---- models and devices ------------------------------------------------------------------------------------------


def flops_per_token(model: ModelSpec) -> float:
    """Two a weight that a token passes."""
    return 2.0 * sum(m.num_params for m in model.matrices if m.role not in ("embedding", "expert")) + 2.0 * (
        0
        if model.experts is None
        else model.experts.experts_per_token * sum(m.num_params for m in model.matrices if m.role == "expert")
    )


def flops(n: Mapping[str, Any], world: World) -> Recomputed:
    """Two operations a weight."""
    model = world.model(n["model"])
    text = f"2 x every weight of {model.name} but the embedding, attention over the context left out"
    return Recomputed((exact(flops_per_token(model)),), "FLOP a token", text)


def sustained(n: Mapping[str, Any], world: World) -> Recomputed:
    """Operations at a speed, and what bounds it."""
    model, device = world.model(n["model"]), world.device(n["device"])
    rate = n["tokens_per_s"] * flops_per_token(model)
    read = n["tokens_per_s"] * 2.0 * model.num_params
    text = (
        f"{n['tokens_per_s']} x {flops_per_token(model):.4g}: {rate / device['ops_per_s']:.1%} of one {device['title']}; "
        f"reading the weights for each token in 16 bits takes {read / device['memory_bytes_per_s']:.2g} times its "
        f"bandwidth, so bytes set the watts ({device['tdp_w']} W at most), not FLOP"
    )
    return Recomputed((exact(rate),), "FLOP/s", text)


def active(n: Mapping[str, Any], world: World) -> Recomputed:
    """Parameters by the published configuration."""
    model = world.model(n["model"])
    kind = "dense" if model.experts is None else f"{model.experts.num_experts} experts"
    text = f"{model.num_params:.4g} parameters, {kind} by its published configuration: all are active"
    return Recomputed((exact(float(model.active_params_per_token)),), "active parameters", text)


def power(n: Mapping[str, Any], world: World) -> Recomputed:
    """Watts of many devices."""
    device = world.device(n["device"])
    chip, whole = (n["count"] * w for w in (device["tdp_w"], n["all_in_w"]))
    need = n["claimed"][0] / n["count"]
    text = f"{n['count']} x {device['tdp_w']} W for the chips, x {n['all_in_w']} W all in"
    why = f"what is counted: the claim is {need:g} W for each GPU, host and cooling in"
    return Recomputed((exact(chip, "chips"), exact(whole, "all in")), "W", text, why, span=True)


def attention_growth(n: Mapping[str, Any], world: World) -> Recomputed:
    """Positions seen over a context."""
    model, (short, long) = world.model(n["model"]), n["contexts"]
    ratio = (long * (long + 1)) / (short * (short + 1))
    cache = 2.0 * model.kv_elements(long)
    text = (
        f"sum over tokens of positions seen, s (s + 1) / 2, {short} -> {long}: quadratic for the whole text; "
        f"one more token is linear and reads a cache of {cache / 1e9:.3g} GB ({model.name}, bf16)"
    )
    return Recomputed((exact(ratio),), "x", text)


def attention_io(n: Mapping[str, Any], world: World) -> Recomputed:
    """Bytes of scores against tiles."""
    layer, s = world.model(n["model"]).attention[0], n["context"]
    heads = layer.num_heads * s * (layer.head_dim + layer.v_head_dim)
    plain = 2.0 * (4.0 * layer.num_heads * s * s + 2.0 * heads)
    tiled = 2.0 * (heads + s / n["kv_tile"] * layer.kv_elements_per_token * s)
    text = (
        f"scores written and read twice (4 H s^2) against keys and values read once a {n['kv_tile']}-row tile, s = {s}"
    )
    return Recomputed((exact(plain / tiled),), "x fewer bytes in a prompt", text)

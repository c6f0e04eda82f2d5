"""Claims about the cost of inference, recomputed: a case of arithmetic or of the cost model for each, then a verdict.

Verdicts follow from numbers: "consistent" when every value recomputed lies in the claimed range (5% either way),
"inconsistent" when none does, "depends" when some do and ``depends_on`` says on what; "not testable" with the reason
where no value follows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.cost.cases import Case, price
from assay.cost.drafting import Speculation
from assay.cost.draws import Draws, interval
from assay.cost.machines import datasheet
from assay.cost.economics import usd_per_million_tokens
from assay.cost.techniques import Technique, dense_twin, quantised_weights, speculative, speedups
from assay.model import ModelSpec

VERDICTS = ("consistent", "inconsistent", "depends", "not testable")
TOLERANCE = 0.05
#: Where techniques are priced: the largest mixture the claims name, a device that holds its dense twin, and batches.
TECHNIQUE_MODEL, TECHNIQUE_DEVICE, TECHNIQUE_BATCHES = "mixtral-8x7b", "h200-sxm", (1, 8, 64)
ACCEPTANCE = (0.6, 0.7, 0.8)


@dataclass(frozen=True)
class World:
    """What cases look up by name: models and rows of the hardware catalog."""

    model: Callable[[str], ModelSpec]
    device: Callable[[str], Mapping[str, Any]]
    draws: Draws


@dataclass(frozen=True)
class Value:
    """One value recomputed, with its 90% interval and the setting that it holds in ("" where there is but one)."""

    middle: float
    low: float
    high: float
    setting: str = ""


@dataclass(frozen=True)
class Recomputed:
    """Values, their unit, the arithmetic in words, and what they depend on; no values where none follow.

    ``span``: the values are ends of something continuous, so that everything between them is possible too.
    """

    values: tuple[Value, ...]
    unit: str
    arithmetic: str
    depends_on: str = ""
    span: bool = False


def exact(value: float, setting: str = "") -> Value:
    """A value without an error of its own."""
    return Value(value, value, value, setting)


def verdict(values: Sequence[Value], claimed: Sequence[float | None], *, span: bool = False) -> str:
    """One of `VERDICTS`. An end of the claimed range that is None is open and is not met by its other end's value."""
    if not values:
        return "not testable"
    low, high = claimed
    bottom = -math.inf if low is None else low * (1.0 - TOLERANCE) if high is not None else low * (1.0 + TOLERANCE)
    top = math.inf if high is None else high * (1.0 + TOLERANCE) if low is not None else high * (1.0 - TOLERANCE)
    inside = [bottom <= v.low and v.high <= top for v in values]
    if span:
        values = (Value(values[0].middle, min(v.low for v in values), max(v.high for v in values)),)
    touching = [v.low <= top and bottom <= v.high for v in values]
    return "consistent" if all(inside) else "depends" if any(touching) else "inconsistent"


def recompute(claim: Mapping[str, Any], world: World) -> dict[str, Any]:
    """The ledger's row of one claim: id, claim, recomputed, arithmetic, verdict, depends_on, and the values.

    Raises
    ------
    ValueError
        A case that does not exist.
    """
    case = CASES.get(claim["case"])
    if case is None:
        raise ValueError(f"{claim['id']}: case: expected one of {', '.join(CASES)}, got {claim['case']!r}")
    numbers = claim["numbers"]
    found = case(numbers, world)
    claimed = numbers.get("claimed", (None, None))
    said = verdict(found.values, claimed, span=found.span)
    return {
        "id": claim["id"],
        "claim": claim["claim"],
        "values": [{"value": v.middle, "low": v.low, "high": v.high, "setting": v.setting} for v in found.values],
        "unit": found.unit,
        "claimed": list(claimed),
        "arithmetic": found.arithmetic + (f" ({numbers['source']})" if "source" in numbers else ""),
        "verdict": said,
        "depends_on": (found.depends_on or "the interval of the estimate") if said == "depends" else "",
    }


# ---- arithmetic ---------------------------------------------------------------------------------------------


def _none(n: Mapping[str, Any], world: World) -> Recomputed:
    return Recomputed((), "", n["reason"])


def _ends(low: float, high: float, name: str = "") -> tuple[Value, ...]:
    return (exact(low),) if low == high else (exact(low, f"{name}lowest"), exact(high, f"{name}highest"))


def _ratio(n: Mapping[str, Any], world: World) -> Recomputed:
    (a, b), (c, d) = n["over"], n["under"]
    text = f"{n['what']}: {a:g} / {d:g}" + ("" if (a, d) == (b, c) else f" to {b:g} / {c:g}")
    if "tokens" in n:
        million = [1e6 * usd / n["tokens"] for usd in (a, b)]
        text += f"; {n['tokens']} tokens at that price are ${million[0]:g} to ${million[1]:g} a million"
    if "used" in n:
        text += f"; {n['used']} at {d:g} are {n['used'] * d:g}, {n['used'] * d / a:.3g} times {a:g}"
    return Recomputed(_ends(a / d, b / c), "x", text, "which ends of the ranges are compared", span=True)


def _product(n: Mapping[str, Any], world: World) -> Recomputed:
    return Recomputed((exact(math.prod(n["factors"])),), n["unit"], " x ".join(f"{f:g}" for f in n["factors"]))


def _product_range(n: Mapping[str, Any], world: World) -> Recomputed:
    low, high = (math.prod(f[i] for f in n["factors"]) for i in (0, 1))
    return Recomputed(_ends(low, high), n["unit"], " x ".join(f"[{a:g}, {b:g}]" for a, b in n["factors"]))


def _agent_month(n: Mapping[str, Any], world: World) -> Recomputed:
    low, high = (n["tasks_per_day"] * n["calls"][i] * n["usd_per_call"][i] * n["days"] for i in (0, 1))
    even = n["claimed"][0] / (n["tasks_per_day"] * n["days"])
    text = f"{n['tasks_per_day']:g} tasks x {n['calls']} calls x ${n['usd_per_call']} x {n['days']} days"
    return Recomputed(
        _ends(low, high), "$ a month", text, f"the price of a task: it breaks even at ${even:.3g}", span=True
    )


def _sum(n: Mapping[str, Any], world: World) -> Recomputed:
    start, end = sum(n["start"]), sum(n["end"])
    text = f"{n['start']} adds up to {start:g}, {n['end']} to {end:g}"
    values = (exact(start / n["stated"][0], "2024"), exact(end / n["stated"][1], "2028"))
    return Recomputed(values, "of the stated total", text)


def _growth(n: Mapping[str, Any], world: World) -> Recomputed:
    rate = (n["end"] / n["start"]) ** (1.0 / n["years"]) - 1.0
    years = math.log(n["end"] / n["start"]) / math.log1p(n["claimed"][0])
    text = f"({n['end']:g} / {n['start']:g})^(1/{n['years']}) - 1; the claimed rate takes {years:.1f} years"
    return Recomputed((exact(rate),), "a year", text)


def _image_tokens(n: Mapping[str, Any], world: World) -> Recomputed:
    side = n["patch"] * n["merge"]
    low, high = ((p // side) ** 2 for p in n["pixels"])
    text = f"(pixels / ({n['patch']} x {n['merge']}))^2 for squares of {n['pixels'][0]} and {n['pixels'][1]} pixels"
    return Recomputed(_ends(low, high), "tokens", text, "resolution and patch size")


def _video_tokens(n: Mapping[str, Any], world: World) -> Recomputed:
    frames = n["seconds"] * n["fps"]
    low, high = (frames * t / n["text_tokens"] for t in n["tokens_per_frame"])
    per = [n["text_tokens"] * c / frames for c in n["claimed"]]
    text = f"{frames} frames x {n['tokens_per_frame']} tokens over a query of {n['text_tokens']}"
    why = f"tokens a frame: {per[0]:.3g} to {per[1]:.3g} give the claim"
    return Recomputed(_ends(low, high), "x prompt tokens", text, why, span=True)


# ---- models and devices --------------------------------------------------------------------------------------


def _flops_per_token(model: ModelSpec) -> float:
    return 2.0 * sum(m.num_params for m in model.matrices if m.role not in ("embedding", "expert")) + 2.0 * (
        0
        if model.experts is None
        else model.experts.experts_per_token * sum(m.num_params for m in model.matrices if m.role == "expert")
    )


def _flops(n: Mapping[str, Any], world: World) -> Recomputed:
    model = world.model(n["model"])
    text = f"2 x every weight of {model.name} but the embedding, attention over the context left out"
    return Recomputed((exact(_flops_per_token(model)),), "FLOP a token", text)


def _sustained(n: Mapping[str, Any], world: World) -> Recomputed:
    model, device = world.model(n["model"]), world.device(n["device"])
    rate = n["tokens_per_s"] * _flops_per_token(model)
    read = n["tokens_per_s"] * 2.0 * model.num_params
    text = (
        f"{n['tokens_per_s']} x {_flops_per_token(model):.4g}: {rate / device['ops_per_s']:.1%} of one {device['title']}; "
        f"reading the weights for each token in 16 bits takes {read / device['memory_bytes_per_s']:.2g} times its "
        f"bandwidth, so bytes set the watts ({device['tdp_w']} W at most), not FLOP"
    )
    return Recomputed((exact(rate),), "FLOP/s", text)


def _active(n: Mapping[str, Any], world: World) -> Recomputed:
    model = world.model(n["model"])
    kind = "dense" if model.experts is None else f"{model.experts.num_experts} experts"
    text = f"{model.num_params:.4g} parameters, {kind} by its published configuration: all are active"
    return Recomputed((exact(float(model.active_params_per_token)),), "active parameters", text)


def _device_ratio(n: Mapping[str, Any], world: World) -> Recomputed:
    a, b = world.device(n["over"]), world.device(n["under"])
    compute, memory = (a[key] / b[key] for key in ("ops_per_s", "memory_bytes_per_s"))
    text = f"dense 16-bit peaks, and bandwidths, of {a['title']} over {b['title']}"
    return Recomputed((exact(compute, "compute-bound"), exact(memory, "memory-bound")), "x", text, "a lower precision")


def _power(n: Mapping[str, Any], world: World) -> Recomputed:
    device = world.device(n["device"])
    chip, whole = (n["count"] * w for w in (device["tdp_w"], n["all_in_w"]))
    need = n["claimed"][0] / n["count"]
    text = f"{n['count']} x {device['tdp_w']} W for the chips, x {n['all_in_w']} W all in"
    why = f"what is counted: the claim is {need:g} W for each GPU, host and cooling in"
    return Recomputed((exact(chip, "chips"), exact(whole, "all in")), "W", text, why, span=True)


def _attention_growth(n: Mapping[str, Any], world: World) -> Recomputed:
    model, (short, long) = world.model(n["model"]), n["contexts"]
    ratio = (long * (long + 1)) / (short * (short + 1))
    cache = 2.0 * model.kv_elements(long)
    text = (
        f"sum over tokens of positions seen, s (s + 1) / 2, {short} -> {long}: quadratic for the whole text; "
        f"one more token is linear and reads a cache of {cache / 1e9:.3g} GB ({model.name}, bf16)"
    )
    return Recomputed((exact(ratio),), "x", text)


def _attention_io(n: Mapping[str, Any], world: World) -> Recomputed:
    layer, s = world.model(n["model"]).attention[0], n["context"]
    heads = layer.num_heads * s * (layer.head_dim + layer.v_head_dim)
    plain = 2.0 * (4.0 * layer.num_heads * s * s + 2.0 * heads)
    tiled = 2.0 * (heads + s / n["kv_tile"] * layer.kv_elements_per_token * s)
    text = (
        f"scores written and read twice (4 H s^2) against keys and values read once a {n['kv_tile']}-row tile, s = {s}"
    )
    return Recomputed((exact(plain / tiled),), "x fewer bytes in a prompt", text)


# ---- priced by the cost model -----------------------------------------------------------------------------------


def _technique(n: Mapping[str, Any], world: World) -> Recomputed:
    model = world.model(TECHNIQUE_MODEL)
    known = {
        "moe": Technique("moe", "model", model=model),
        "int4": quantised_weights("w4a16"),
        "spec": speculative(Speculation((1, 1, 1, 1), ACCEPTANCE)),
        "batching": Technique("batching", "continuous", continuous=True),
    }
    machine = datasheet(world.device(TECHNIQUE_DEVICE))
    values, index = [], []
    for chosen in n["sets"]:
        static = "batching" in chosen
        for batch in TECHNIQUE_BATCHES:
            base = Case(dense_twin(model), machine, batch=batch, continuous=not static)
            _, found = speedups(base, [known[name] for name in chosen], draws=world.draws)
            values.append(Value(*found[-1].speedup, f"batch {batch}"))
            if found[-1].interaction is not None:
                index.append(f"{found[-1].interaction[0]:.2g} at batch {batch}")
    text = f"{' + '.join(chosen)} on {model.name}'s dense twin, {machine.name}, 512 tokens in, 128 out"
    return Recomputed(
        tuple(values),
        "x",
        text + (f"; interaction index {', '.join(index)}" if index else ""),
        _met(values, n["claimed"]),
    )


def _met(values: Sequence[Value], claimed: Sequence[float | None]) -> str:
    """Which settings meet a claim, wholly or in part of their interval."""
    groups = {"met at": "consistent", "within the interval at": "depends", "not at": "inconsistent"}
    said = []
    for words, kind in groups.items():
        of = [v.setting for v in values if _single(v, claimed) == kind]
        if of:
            said.append(f"{words} {', '.join(of)}")
    return "; ".join(said)


def _single(value: Value, claimed: Sequence[float | None]) -> str:
    return verdict([value], claimed)


def _mixture_limit(n: Mapping[str, Any], world: World) -> Recomputed:
    model = world.model(n["model"])
    twin, machine = dense_twin(model), datasheet(world.device(TECHNIQUE_DEVICE))
    cut = _flops_per_token(twin) / _flops_per_token(model)
    values = []
    for batch in n["batches"]:
        gain = price(Case(model, machine, batch=batch), world.draws).tokens_per_s
        gain = gain / price(Case(twin, machine, batch=batch), world.draws).tokens_per_s
        values.append(Value(*interval(gain / cut), f"batch {batch}"))
    return Recomputed(
        tuple(values), "of its cut in operations", f"speed-up over the cut of {cut:.3g} in operations", _met(values, n["claimed"])
    )  # fmt: skip


def _silicon(n: Mapping[str, Any], world: World) -> Recomputed:
    model, device = world.model(n["model"]), world.device(n["device"])
    weights = model.num_params * n["bytes_per_weight"]
    chips = math.ceil(weights / n["sram_bytes"])
    gpus = math.ceil(weights / device["memory_bytes"])
    memory = n["sram_bytes_per_s"] / device["memory_bytes_per_s"]
    compute = n["int8_ops_per_s"] / device["int8_ops_per_s"]
    text = (
        f"int8 peak and memory bandwidth of a chip over {device['title']}; {model.name} at {n['bytes_per_weight']} byte a "
        f"weight needs {chips} chips or {gpus} GPU; communication, and the price of the chips, not in it"
    )
    values = (exact(compute, "compute-bound"), exact(memory, "memory-bound"))
    why = "batch: small ones are bound by memory, large ones by compute"
    return Recomputed(values, "x a chip", text, why, span=True)


def _distillation(n: Mapping[str, Any], world: World) -> Recomputed:
    machine, student = datasheet(world.device(n["device"]), n["devices"]), world.model(n["student"])
    fast = price(Case(student, machine, batch=8), world.draws).tokens_per_s
    values = []
    for name in n["teachers"]:
        teacher = world.model(name)
        slow = price(Case(teacher, machine, batch=8), world.draws).tokens_per_s
        values.append(Value(*interval(fast / slow), f"from {teacher.name}"))
    text = f"tokens/s of {student.name} over the teacher's on {machine.name} at batch 8; its quality is taken as stated"
    return Recomputed(tuple(values), "x cheaper", text, "the teacher's size", span=True)


def _query(n: Mapping[str, Any], world: World) -> Recomputed:
    model, machine = world.model(n["model"]), datasheet(world.device(n["device"]))
    values = []
    for batch in n["batches"]:
        case = Case(model, machine, batch=batch, isl=n["isl"], osl=n["osl"])
        middle, slow, fast = interval(price(case, world.draws).tokens_per_s)
        low, high = n["usd_per_hour"]
        usd, least, most = (
            usd_per_million_tokens(p, x) * n["osl"] / 1e6
            for p, x in ((math.sqrt(low * high), middle), (low, fast), (high, slow))
        )
        values.append(Value(usd, least, most, f"batch {batch}"))
    busy = values[0].middle / n["claimed"][0]
    text = (
        f"{n['isl']} tokens in, {n['osl']} out on {machine.name} at ${n['usd_per_hour'][0]:g} to "
        f"${n['usd_per_hour'][1]:g} an hour, always busy, without margin: the claim's low end is "
        f"what it costs at {values[0].setting} when busy {busy:.1%} of the time"
    )
    return Recomputed(tuple(values), "$ a query", text, "batch and utilisation", span=True)


def _sharing(n: Mapping[str, Any], world: World) -> Recomputed:
    model, machine = world.model(n["model"]), datasheet(world.device(n["device"]))
    alone = price(Case(model, machine), world.draws).tokens_per_s
    values = [
        Value(*interval(price(Case(model, machine, batch=b), world.draws).tokens_per_s / alone), f"batch {b}")
        for b in n["batches"]
    ]
    text = f"tokens/s of a shared {machine.name} running {model.name} over those of one user alone on it"
    return Recomputed(tuple(values), "x cheaper", text, "how many share it: " + _met(values, n["claimed"]))


CASES: Mapping[str, Callable[[Mapping[str, Any], World], Recomputed]] = {
    "none": _none,
    "ratio": _ratio,
    "product": _product,
    "product_range": _product_range,
    "agent_month": _agent_month,
    "sum": _sum,
    "growth": _growth,
    "image_tokens": _image_tokens,
    "video_tokens": _video_tokens,
    "flops": _flops,
    "sustained": _sustained,
    "active": _active,
    "device_ratio": _device_ratio,
    "power": _power,
    "attention_growth": _attention_growth,
    "attention_io": _attention_io,
    "technique": _technique,
    "mixture_limit": _mixture_limit,
    "silicon": _silicon,
    "distillation": _distillation,
    "query": _query,
    "sharing": _sharing,
}

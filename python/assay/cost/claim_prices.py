"""Claims priced by the cost model: techniques, silicon, distillation, queries, video."""

import math
from collections.abc import Mapping
from typing import Any

from assay.cost.cases import Case, price
from assay.cost.claim_cases import flops_per_token
from assay.cost.diffusion import clip, usd_per_second, video_model
from assay.cost.drafting import Speculation
from assay.cost.draws import interval
from assay.cost.economics import rent, usd_per_million_tokens
from assay.cost.machines import datasheet
from assay.cost.techniques import Technique, adaptive, dense_twin, enough, quantised_weights, speculative, speedups
from assay.cost.verdicts import Recomputed, Value, World, exact, met

#: Where techniques are priced: the largest mixture the claims name, a device that holds its dense twin, and batches.
TECHNIQUE_MODEL, TECHNIQUE_DEVICE, TECHNIQUE_BATCHES = "mixtral-8x7b", "h200-sxm", (1, 8, 64)
ACCEPTANCE = (0.6, 0.7, 0.8)


def technique(n: Mapping[str, Any], world: World) -> Recomputed:
    """What a set of techniques gains on the largest mixture's dense twin, at small, middling and large batches."""
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
        met(values, n["claimed"]),
    )


def flops_cut(n: Mapping[str, Any], world: World) -> Recomputed:
    """Operations a token of the dense twin over those of the mixture."""
    model = world.model(n["model"])
    cut = flops_per_token(dense_twin(model)) / flops_per_token(model)
    return Recomputed((exact(cut),), "x", f"two a weight that a token passes, {model.name}")


def mixture_limit(n: Mapping[str, Any], world: World) -> Recomputed:
    """How much of a mixture's cut of operations a batch leaves as speed."""
    model = world.model(n["model"])
    twin, machine = dense_twin(model), datasheet(world.device(TECHNIQUE_DEVICE))
    cut = flops_per_token(twin) / flops_per_token(model)
    values = []
    for batch in n["batches"]:
        gain = price(Case(model, machine, batch=batch), world.draws).tokens_per_s
        gain = gain / price(Case(twin, machine, batch=batch), world.draws).tokens_per_s
        values.append(Value(*interval(gain / cut), f"batch {batch}"))
    return Recomputed(
        tuple(values), "of its cut in operations", f"speed-up over the cut of {cut:.3g} in operations", met(values, n["claimed"])
    )  # fmt: skip


def silicon(n: Mapping[str, Any], world: World) -> Recomputed:
    """Chips that keep a model in SRAM against one device with memory: speed of one user, and answers a watt."""
    model, chip = world.model(n["model"]), datasheet(world.device(n["chip"]))
    values, chips, alone = [], 0, 0.0
    for batch in n["batches"]:
        case = Case(model, datasheet(world.device(n["device"]), n["devices"]), batch=batch)
        fleet = enough(chip, case)
        other, chips = Case(model, fleet, batch=batch), fleet.num_devices
        a, b = price(case, world.draws), price(other, world.draws)
        watts = (case.machine.watts or 1.0) / (other.machine.watts or 1.0)
        if batch == 1:
            alone = float(1.0 / b.step_s[0])
            values.append(Value(*interval(b.tokens_per_s / a.tokens_per_s), "speed of one user"))
        values.append(Value(*interval(b.answers_per_s / a.answers_per_s * watts), f"a watt, batch {batch}"))
    row = world.device(n["chip"])
    text = (
        f"{model.name} in 16 bits takes {chips} x {row['title']} ({row['memory_bytes'] / 1e6:.4g} MB, "
        f"{row['memory_bytes_per_s'] / 1e12:.4g} TB/s each, {alone:.3g} tokens/s for one user) or {n['devices']} x {world.device(n['device'])['title']}; all-reduces "
        "of each layer in; watts of nameplates; what chips cost is not published"
    )
    return Recomputed(tuple(values), "x", text, "what is counted: " + met(values, n["claimed"]))


def distillation(n: Mapping[str, Any], world: World) -> Recomputed:
    """A student's speed over its teachers' on one machine."""
    machine, student = datasheet(world.device(n["device"]), n["devices"]), world.model(n["student"])
    fast = price(Case(student, machine, batch=8), world.draws).tokens_per_s
    values = []
    for name in n["teachers"]:
        teacher = world.model(name)
        slow = price(Case(teacher, machine, batch=8), world.draws).tokens_per_s
        values.append(Value(*interval(fast / slow), f"from {teacher.name}"))
    text = f"tokens/s of {student.name} over the teacher's on {machine.name} at batch 8; its quality is taken as stated"
    return Recomputed(tuple(values), "x cheaper", text, "the teacher's size", span=True)


def query(n: Mapping[str, Any], world: World) -> Recomputed:
    """Dollars of one query on a rented machine that is always busy, by batch."""
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


def sharing(n: Mapping[str, Any], world: World) -> Recomputed:
    """How much cheaper a token is on a machine that is shared than on one that a user has alone."""
    model, machine = world.model(n["model"]), datasheet(world.device(n["device"]))
    alone = price(Case(model, machine), world.draws).tokens_per_s
    values = [
        Value(*interval(price(Case(model, machine, batch=b), world.draws).tokens_per_s / alone), f"batch {b}")
        for b in n["batches"]
    ]
    text = f"tokens/s of a shared {machine.name} running {model.name} over those of one user alone on it"
    return Recomputed(tuple(values), "x cheaper", text, "how many share it: " + met(values, n["claimed"]))


def adaptive_tokens(n: Mapping[str, Any], world: World) -> Recomputed:
    """A fixed budget that covers most questions over what questions need on average."""
    low, middle, high = adaptive(tuple(n["spread"]), n["covered"]).spent
    text = (
        f"needs log-normal, spread {n['spread'][0]:g} to {n['spread'][2]:g} (of the log): the budget that covers "
        f"{n['covered']:.0%} of the questions over the mean, exp(z s - s^2 / 2)"
    )
    return Recomputed(
        (Value(1.0 / middle, 1.0 / high, 1.0 / low),), "x fewer tokens", text, "how much questions differ"
    )


def video_work(n: Mapping[str, Any], world: World) -> Recomputed:
    """Seconds of work for a second of video on a device, by model."""
    machine = datasheet(world.device(n["device"]))
    values = [
        Value(*interval(clip(video_model(row), machine, world.draws).work_per_second), row["title"])
        for row in world.videos
    ]
    text = f"steps x operations of all latent tokens at a judged share of the dense peak of {machine.name}"
    return Recomputed(
        tuple(values), "s of work a second of video", text, "model and resolution: " + met(values, n["claimed"])
    )


def video_ratio(n: Mapping[str, Any], world: World) -> Recomputed:
    """The same clip on two devices, at 16 bits and at the lowest precision of each."""
    values = []
    for a, b, setting in (
        ("bf16", "bf16", "16 bits"),
        (n["lowest"][0], n["lowest"][1], f"{n['lowest'][0]} over {n['lowest'][1]}"),
    ):
        new, old = (
            clip(
                video_model(world.videos[0]), datasheet(world.device(n[key])), world.draws, weights=fmt
            ).work_per_second
            for key, fmt in (("over", a), ("under", b))
        )
        values.append(Value(*interval(old / new), setting))
    text = f"{world.device(n['over'])['title']} over {world.device(n['under'])['title']}, dense peaks, the utilisation alike"
    return Recomputed(tuple(values), "x", text, "a lower precision: " + met(values, n["claimed"]), span=True)


def video_cut(n: Mapping[str, Any], world: World) -> Recomputed:
    """What is asked for a second of video over what its machine costs, by open model."""
    machine, (low, high) = datasheet(world.device(n["device"])), n["usd_per_hour"]
    asked = math.sqrt(n["usd_per_second"][0] * n["usd_per_second"][1])
    span = math.sqrt(n["usd_per_second"][1] / n["usd_per_second"][0])
    values = []
    for row in world.videos:
        usd = usd_per_second(clip(video_model(row), machine, world.draws), rent(low, high, world.draws))
        middle, least, most = interval(asked / usd)
        values.append(Value(middle, least / span, most * span, row["title"]))
    text = (
        f"${n['usd_per_second'][0]:g} to ${n['usd_per_second'][1]:g} a second of video over the rent of {machine.name} "
        f"(${low:g} to ${high:g} an hour) that open models of 2024 take: a cut of that size is there without better machines"
    )
    return Recomputed(tuple(values), "x", text, "model and resolution: " + met(values, n["claimed"]))

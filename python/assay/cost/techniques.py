"""Techniques as pure transformations of a case, and what they do together.

``S_A`` is the speed-up of a case with technique A over the case without, in answers a second (a watt, where a technique
brings another machine); the interaction index of a set is the speed-up of the set over the product of its members' own,
``I = S_AB / (S_A S_B)``: below 1 they get in each other's way, above 1 they help each other, and 1 exactly where nothing
interacts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist

import numpy as np

from assay.cost.cases import Case, Priced, longest_over_mean, price
from assay.cost.drafting import Speculation, Triple
from assay.cost.draws import Draws, Influence, influences, interval
from assay.cost.formats import KV_BYTES, WEIGHTS
from assay.cost.machines import Datasheet, Machine
from assay.cost.roofline import FloatArray
from assay.model import Experts, Matrix, ModelSpec

FIELDS = ("weights", "kv", "model", "machine", "chip", "speculation", "continuous", "prefix_hit", "io_aware", "spent")


@dataclass(frozen=True)
class Technique:
    """A named change of a case. ``changes`` names the field it sets: two techniques that set one field exclude each other.

    Exactly one of the values is used: that of the field. ``chip`` is one device of another kind, of which a case takes
    as many as its weights and batch need. ``loss`` is what the technique costs in quality, as a share of the score.
    """

    name: str
    changes: str
    weights: str = "bf16"
    kv: str = "bf16"
    model: ModelSpec | None = None
    machine: Machine | None = None
    chip: Datasheet | None = None
    speculation: Speculation | None = None
    continuous: bool = True
    prefix_hit: float = 0.0
    io_aware: bool = True
    spent: Triple = (1.0, 1.0, 1.0)
    loss: Triple = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        """The field must be one that a technique can set, and its value there."""
        if self.changes not in FIELDS:
            raise ValueError(f"changes: expected a field of a case, got {self.changes!r}")
        if getattr(self, self.changes) is None:
            raise ValueError(f"{self.changes}: expected a value for {self.name}, got None")
        if not 0 <= self.loss[0] <= self.loss[1] <= self.loss[2] < 1:
            raise ValueError(f"loss: expected shares 0 <= low <= middle <= high < 1, got {self.loss}")

    @property
    def field(self) -> str:
        """What must not be set twice."""
        return "machine" if self.changes == "chip" else self.changes

    def apply(self, case: Case) -> Case:
        """The case with the technique; the case given is unchanged."""
        if self.changes == "chip":
            assert self.chip is not None
            return replace(case, machine=enough(self.chip, case))
        return replace(case, **{self.changes: getattr(self, self.changes)})


def applied(case: Case, techniques: Sequence[Technique]) -> Case:
    """All of them; chips are counted last, when it is known what they have to hold."""
    for technique in sorted(techniques, key=lambda t: t.changes == "chip"):
        case = technique.apply(case)
    return case


def enough(chip: Datasheet, case: Case) -> Datasheet:
    """So many chips that weights and the caches of the whole batch fit.

    Raises
    ------
    ValueError
        A chip of unknown memory.
    """
    if chip.memory_bytes is None:
        raise ValueError(f"{chip.name}: expected a known memory, got none")
    return chip.of(max(1, math.ceil(case.memory_needed / chip.memory_bytes)))


def adaptive(spread: Triple = (0.6, 1.0, 1.4), covered: float = 0.95) -> Technique:
    """The model decides how many tokens a question gets, against a fixed budget that covers most questions.

    What questions need is taken as log-normal with this spread (of the log): a budget for the share ``covered`` of them is
    the quantile ``exp(z s)`` times the median, deciding spends the mean ``exp(s^2 / 2)`` of what is needed.
    """
    low, middle, high = spread
    if not 0 < low <= middle <= high <= 3:
        raise ValueError(f"spread: expected 0 < low <= middle <= high <= 3, got {spread}")
    if not 0.5 < covered < 1:
        raise ValueError(f"covered: expected a share above 0.5 and below 1, got {covered}")
    z = NormalDist().inv_cdf(covered)
    shares = [min(1.0, math.exp(s * s / 2.0 - z * s)) for s in spread]
    return Technique("adaptive", "spent", spent=(min(shares), shares[1], max(shares)))


def quantised_weights(fmt: str) -> Technique:
    """Weights in one of `formats.WEIGHTS`."""
    if fmt not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {fmt!r}")
    return Technique(fmt, "weights", weights=fmt)


def quantised_kv(fmt: str) -> Technique:
    """KV cache in one of `formats.KV_BYTES`."""
    if fmt not in KV_BYTES:
        raise ValueError(f"kv: expected one of {', '.join(KV_BYTES)}, got {fmt!r}")
    return Technique(f"kv={fmt}", "kv", kv=fmt)


def speculative(speculation: Speculation) -> Technique:
    """Speculative decoding."""
    return Technique(f"spec:{speculation.name}", "speculation", speculation=speculation)


def sparse(dense: ModelSpec, num_experts: int, experts_per_token: int, equal: str = "total") -> ModelSpec:
    """A dense model with its FFN cut into experts, by equal "total" or equal "active" parameters.

    Each of E experts is 1/E (total) or 1/k (active) as wide as the dense FFN; a router is added.

    Raises
    ------
    ValueError
        A model that has experts already, k outside 1..E, a width that does not divide.
    """
    if dense.experts is not None:
        raise ValueError(f"model: expected a dense one, got {dense.name}, which has experts")
    if equal not in ("total", "active"):
        raise ValueError(f"equal: expected total or active, got {equal!r}")
    if num_experts < 1 or not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token: expected 1..num_experts = {num_experts}, got {experts_per_token}")
    parts = num_experts if equal == "total" else experts_per_token
    ffn = [m for m in dense.matrices if m.role == "ffn"]
    if not ffn:
        raise ValueError(f"model: expected FFN matrices in {dense.name}, got none")
    layers = max(m.count for m in ffn)
    width = min(m.k if m.n == dense.hidden_size else m.n for m in ffn)
    if width % parts:
        raise ValueError(f"num_experts: expected a divisor of the FFN width {width}, got {parts}")
    matrices = [m for m in dense.matrices if m.role != "ffn"]
    for m in ffn:
        n, k = (m.n, m.k // parts) if m.n == dense.hidden_size else (m.n // parts, m.k)
        matrices.append(Matrix(m.name.replace("ffn", "expert"), n, k, m.count, "expert"))
    matrices.append(Matrix("router", num_experts, dense.hidden_size, layers, "router"))
    return replace(
        dense,
        name=f"{dense.name} as {num_experts} experts, {experts_per_token} active",
        matrices=tuple(matrices),
        experts=Experts(num_experts, experts_per_token, layers, 0, dense.hidden_size, width // parts),
        vector_bytes=None,
    ).validate()


def dense_twin(model: ModelSpec, equal: str = "total") -> ModelSpec:
    """The dense model that a mixture is held against: one FFN as wide as all experts ("total") or k of them ("active")."""
    if model.experts is None:
        raise ValueError(f"model: expected a mixture of experts, got {model.name}, which is dense")
    if equal not in ("total", "active"):
        raise ValueError(f"equal: expected total or active, got {equal!r}")
    times = model.experts.num_experts if equal == "total" else model.experts.experts_per_token
    matrices = []
    for m in model.matrices:
        if m.role == "router":
            continue
        if m.role == "expert":
            n, k = (m.n, m.k * times) if m.n == model.hidden_size else (m.n * times, m.k)
            matrices.append(Matrix(m.name.replace("expert", "ffn"), n, k, m.count, "ffn"))
        else:
            matrices.append(m)
    return replace(
        model,
        name=f"{model.name}'s dense twin of equal {equal} parameters",
        matrices=tuple(matrices),
        experts=None,
        expert_vector_params=0,
        vector_bytes=None,
    ).validate()


# ---- combinations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """A set of techniques applied to the base. Triples are the estimate and its 90% interval.

    ``product`` is that of the members' own speed-ups, ``interaction`` None for a single technique. ``loss`` is what the
    set costs in quality, the members' added up. ``parts_s``: seconds of memory, compute and overhead that an answer takes of
    the whole machine.
    """

    names: tuple[str, ...]
    answers_per_s: Triple
    tokens_per_s: Triple
    speedup: Triple
    product: float
    interaction: Triple | None
    bound_before: str
    bound_after: str
    fits: bool | None
    batch: int
    loss: Triple
    parts_s: Triple
    why: str


def exclusive(techniques: Sequence[Technique]) -> list[tuple[str, str]]:
    """Pairs that set the same field, so that no set holds both."""
    return [(a.name, b.name) for a, b in combinations(techniques, 2) if a.field == b.field]


def speedups(
    base: Case,
    techniques: Sequence[Technique],
    *,
    largest_set: int = 3,
    draws: Draws | None = None,
    most_loss: float = 1.0,
) -> tuple[Combination, list[Combination]]:
    """The base, and every set of at most ``largest_set`` techniques: singles first.

    Sets in which two techniques change the same field do not exist and are left out, and so are sets that may lose more
    quality than ``most_loss`` (the high end of their losses, added up).

    Raises
    ------
    ValueError
        Two techniques of one name, a case that is impossible, or another machine where watts are not known.
    """
    names = [t.name for t in techniques]
    if len(set(names)) != len(names):
        raise ValueError(f"techniques: expected different ones, got {', '.join(names)}")
    draws = draws or Draws()
    before = price(base, draws)
    a_watt = any(t.changes == "chip" for t in techniques)
    one = (1.0, 1.0, 1.0)
    start = Combination(
        (), interval(before.answers_per_s), interval(before.tokens_per_s), one, 1.0, None, before.bound, before.bound,
        before.fits, base.running, (0.0, 0.0, 0.0), _parts(before),
        f"weights {base.weights_bytes / 1e9:.3g} GB, {base.running} requests at once",
    )  # fmt: skip
    found: list[Combination] = []
    gains: dict[frozenset[str], FloatArray] = {}
    for size in range(1, min(largest_set, len(techniques)) + 1):
        for chosen in combinations(techniques, size):
            if len({t.field for t in chosen}) != size:
                continue
            loss = tuple(min(1.0, sum(t.loss[i] for t in chosen)) for i in range(3))
            if loss[2] > most_loss:
                continue
            case = applied(base, chosen)
            after = price(case, draws)
            gain = after.answers_per_s / before.answers_per_s * (_watts(base) / _watts(case) if a_watt else 1.0)
            gains[frozenset(t.name for t in chosen)] = gain
            product = np.prod([gains[frozenset([t.name])] for t in chosen], axis=0)
            found.append(
                Combination(
                    tuple(t.name for t in chosen),
                    interval(after.answers_per_s),
                    interval(after.tokens_per_s),
                    interval(gain),
                    float(product[0]),
                    interval(gain / product) if size > 1 else None,
                    before.bound,
                    after.bound,
                    after.fits,
                    case.running,
                    (loss[0], loss[1], loss[2]),
                    _parts(after),
                    _why(before, after) + _beside(chosen, gains),
                )
            )
    return start, found


def moved(base: Case, techniques: Sequence[Technique], names: Sequence[str], what: str) -> list[Influence]:
    """What each uncertain input alone does to the "speedup" or the "interaction" of a set, the most first."""
    chosen = [t for t in techniques if t.name in names]

    def answer(draws: Draws) -> FloatArray:
        before = price(base, draws).answers_per_s
        gain = price(applied(base, chosen), draws).answers_per_s / before
        if what == "interaction":
            for technique in chosen:
                gain = gain / (price(applied(base, [technique]), draws).answers_per_s / before)
        return np.asarray(gain)

    return influences(answer)


def _parts(priced: Priced) -> Triple:
    parts = priced.parts
    memory, compute, overhead = (
        float(p[0]) / priced.case.running for p in (parts.memory_s, parts.compute_s, parts.overhead_s)
    )
    return memory, compute, overhead


def _watts(case: Case) -> float:
    if case.machine.watts is None:
        raise ValueError(f"{case.machine.name}: expected known watts, to compare machines by, got none")
    return case.machine.watts


def _beside(chosen: Sequence[Technique], gains: dict[frozenset[str], FloatArray]) -> str:
    """What the last member gains beside the others, where that is not what it gains alone."""
    last, rest = chosen[-1], frozenset(t.name for t in chosen[:-1])
    if not rest or rest not in gains:
        return ""
    alone = float(gains[frozenset([last.name])][0])
    beside = float(gains[rest | {last.name}][0] / gains[rest][0])
    if math.isclose(alone, beside, rel_tol=0.02):
        return ""
    return f"; {last.name} gains {alone:.3g} alone, {beside:.3g} beside {' + '.join(t.name for t in chosen[:-1])}"


def _score_bytes(case: Case) -> float:
    """Bytes of bf16 scores and weights that attention without IO-awareness moves in a prompt."""
    return sum(
        8.0 * kind.num_layers * kind.num_heads * case.isl * (case.isl + 1) / 2.0 for kind in case.model.attention
    )


def _why(before: Priced, after: Priced) -> str:
    """The terms that changed, in words."""
    a, b = before.case, after.case
    said = []
    if a.machine is not b.machine:
        said.append(f"{a.machine.name} -> {b.machine.name}")
        if a.machine.watts and b.machine.watts:
            said.append(f"{a.machine.watts:.4g} -> {b.machine.watts:.4g} W")
    if a.weights_bytes != b.weights_bytes:
        said.append(f"weights {a.weights_bytes / 1e9:.3g} -> {b.weights_bytes / 1e9:.3g} GB")
    if a.running != b.running:
        said.append(f"{a.running} -> {b.running} requests at once")
    knee = [c.machine.critical_batch(c.weights) for c in (a, b)]
    if not math.isclose(*knee):
        said.append(f"products turn compute-bound at {knee[0]:.3g} -> {knee[1]:.3g} rows")
    if b.speculation is not None:
        gain = f"{float(after.tokens_per_step[0]):.3g} tokens a step"
        said.append(f"verifies {b.speculation.width} tokens for {gain}")
    e = b.model.experts
    if e is not None and after.touched_experts is not None:
        said.append(f"a step touches {after.touched_experts:.3g} of {e.num_experts} experts")
    if a.continuous != b.continuous:
        waste = longest_over_mean(a.running)
        said.append(f"no slot waits for the longest answer, {waste:.3g} times the mean; memory is paged")
    if a.prefix_hit != b.prefix_hit:
        said.append(f"{b.prefix_hit:.0%} of the prompt is cached")
    if a.kv != b.kv:
        said.append(f"cache {a.kv} -> {b.kv}")
    if a.io_aware != b.io_aware:
        said.append(f"a prompt moves {_score_bytes(b) / 1e9:.3g} GB less: its attention scores stay on the chip")
    if a.spent != b.spent:
        said.append(f"{a.mean_osl:.4g} -> {b.mean_osl:.4g} tokens an answer")
    if before.bound != after.bound:
        said.append(f"bound by {before.bound} -> {after.bound}")
    if b.room == 0:
        said.append("does not fit: priced as if it did, at one request")
    return "; ".join(said) or "nothing that is priced changed"

"""Techniques as pure transformations of a case, and what they do together.

``S_A`` is the speed-up of a case with technique A over the case without; the interaction index of a set is the speed-up of
the set over the product of its members' own, ``I = S_AB / (S_A S_B)``: below 1 they get in each other's way, above 1
they help each other, and 1 exactly where nothing interacts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from assay.cost.cases import KV_BYTES, WEIGHTS, Case, Draws, Machine, Priced, Speculation, longest_over_mean, price
from assay.cost.roofline import FloatArray
from assay.model import Experts, Matrix, ModelSpec


@dataclass(frozen=True)
class Technique:
    """A named change of a case. ``changes`` names the field it sets: two techniques that set one field exclude each other.

    Exactly one of the values is used: that of the field.
    """

    name: str
    changes: str
    weights: str = "bf16"
    kv: str = "bf16"
    model: ModelSpec | None = None
    machine: Machine | None = None
    speculation: Speculation | None = None
    continuous: bool = True
    prefix_hit: float = 0.0

    def __post_init__(self) -> None:
        """The field must be one that a technique can set, and its value there."""
        if self.changes not in ("weights", "kv", "model", "machine", "speculation", "continuous", "prefix_hit"):
            raise ValueError(f"changes: expected a field of a case, got {self.changes!r}")
        if getattr(self, self.changes) is None:
            raise ValueError(f"{self.changes}: expected a value for {self.name}, got None")

    def apply(self, case: Case) -> Case:
        """The case with the technique; the case given is unchanged."""
        return replace(case, **{self.changes: getattr(self, self.changes)})


def quantised_weights(fmt: str) -> Technique:
    """Weights in one of `cases.WEIGHTS`."""
    if fmt not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {fmt!r}")
    return Technique(fmt, "weights", weights=fmt)


def quantised_kv(fmt: str) -> Technique:
    """KV cache in one of `cases.KV_BYTES`."""
    if fmt not in KV_BYTES:
        raise ValueError(f"kv: expected one of {', '.join(KV_BYTES)}, got {fmt!r}")
    return Technique(f"kv={fmt}", "kv", kv=fmt)


def speculative(speculation: Speculation) -> Technique:
    """Speculative decoding."""
    chain = set(speculation.branches) == {1}
    shape = f"k={len(speculation.branches)}" if chain else "tree=" + "-".join(map(str, speculation.branches))
    return Technique(f"spec:{shape}", "speculation", speculation=speculation)


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

    ``product`` is that of the members' own speed-ups, ``interaction`` None for a single technique.
    """

    names: tuple[str, ...]
    tokens_per_s: tuple[float, float, float]
    speedup: tuple[float, float, float]
    product: float
    interaction: tuple[float, float, float] | None
    bound_before: str
    bound_after: str
    fits: bool | None
    batch: int
    why: str


def interval(values: FloatArray) -> tuple[float, float, float]:
    """Element 0, and the 5th and 95th percentiles of the rest."""
    middle = float(values[0])
    if values.size < 2:
        return middle, middle, middle
    low, high = (float(v) for v in np.percentile(values[1:], [5.0, 95.0]))
    return middle, min(low, middle), max(high, middle)


def speedups(
    base: Case, techniques: Sequence[Technique], *, largest_set: int = 3, draws: Draws | None = None
) -> tuple[Combination, list[Combination]]:
    """The base, and every set of at most ``largest_set`` techniques: singles first.

    Sets in which two techniques change the same field do not exist and are left out.

    Raises
    ------
    ValueError
        Two techniques of one name, or a case that is impossible.
    """
    names = [t.name for t in techniques]
    if len(set(names)) != len(names):
        raise ValueError(f"techniques: expected different ones, got {', '.join(names)}")
    draws = draws or Draws()
    before = price(base, draws)
    one = (1.0, 1.0, 1.0)
    start = Combination(
        (), interval(before.tokens_per_s), one, 1.0, None, before.bound, before.bound, before.fits, base.running,
        f"weights {base.weights_bytes / 1e9:.3g} GB, {base.running} requests at once",
    )  # fmt: skip
    found: list[Combination] = []
    own: dict[str, FloatArray] = {}
    for size in range(1, min(largest_set, len(techniques)) + 1):
        for chosen in combinations(techniques, size):
            if len({t.changes for t in chosen}) != size:
                continue
            case = base
            for technique in chosen:
                case = technique.apply(case)
            after = price(case, draws)
            gain = after.tokens_per_s / before.tokens_per_s
            if size == 1:
                own[chosen[0].name] = gain
            product = np.prod([own[t.name] for t in chosen], axis=0)
            found.append(
                Combination(
                    tuple(t.name for t in chosen),
                    interval(after.tokens_per_s),
                    interval(gain),
                    float(product[0]),
                    interval(gain / product) if size > 1 else None,
                    before.bound,
                    after.bound,
                    after.fits,
                    case.running,
                    _why(before, after),
                )
            )
    return start, found


def _why(before: Priced, after: Priced) -> str:
    """The terms that changed, in words."""
    a, b = before.case, after.case
    said = []
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
    if a.machine is not b.machine:
        said.append(f"{a.machine.name} -> {b.machine.name}")
    if b.room == 0:
        said.append("does not fit: priced as if it did, at one request")
    return "; ".join(said) or "nothing that is priced changed"

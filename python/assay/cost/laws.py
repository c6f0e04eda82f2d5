"""The laws of the kernels, as fitted values: what their parameters are and what they multiply.

Two laws, both in docs/cost-model.md:

- matrix products, of which the expert layer is one: overhead plus the smooth maximum of a memory and a compute term (`assay.cost.roofline`), both as
  utilisations of measured roofs; the compute utilisation is a table over the calibrated widths M;
- routing and verification: non-negative sums of their counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.cost.roofline import FloatArray
from assay.profile import GEMM_OPS

LINEAR_TERMS = {
    "moe_route": ("call", "token", "token_expert", "token_choice"),
    "chain_verify": ("call", "logit", "sampled_logit"),
}

Params = Mapping[str, Any]


@dataclass(frozen=True)
class GemmClass:
    """Fitted law of one (variant, threads, group size, symmetric, where the weights lie): see the module's head for the equation.

    ``log_rows`` is ``ln(M / compute_utilisation)`` at the widths ``m``: it never falls, and it is what is interpolated.
    """

    variant: str
    threads: int
    group_size: int
    symmetric: bool
    overhead_s: float
    memory_utilisation: float
    p: float
    m: FloatArray
    log_rows: FloatArray
    weight_bytes: float  # bytes a weight takes packed, scales and zeros included
    nk_low: float
    nk_high: float
    num_samples: int
    resident: str = "dram"

    def rows(self, m: npt.ArrayLike) -> FloatArray:
        """Rows at full utilisation that M rows cost, ``M / compute_utilisation(M)``."""
        return np.exp(_interpolate(np.log(np.asarray(m, dtype=np.float64)), np.log(self.m), self.log_rows))

    def compute_utilisation(self, m: npt.ArrayLike) -> FloatArray:
        """Share of the compute roof that the kernel reaches at width M where nothing else limits it."""
        return np.asarray(m, dtype=np.float64) / self.rows(m)


@dataclass(frozen=True)
class LinearClass:
    """Fitted law of one (variant, threads, rule): seconds per call, per token and so on, by `LINEAR_TERMS`.

    ``alone``: those of one thread. A kernel gives small calls to one thread whatever it is allowed, so a call on several costs
    the less of the two; where that changes is not stored, it follows.
    """

    variant: str
    threads: int
    rule: str
    seconds: tuple[float, ...]
    alone: tuple[float, ...] | None
    ranges: Mapping[str, tuple[float, float]]
    num_samples: int

    def times(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Seconds of calls with these counts, and the part of them that every call costs; features [n, terms]."""
        time = features @ np.asarray(self.seconds)
        if self.alone is None:
            return time, np.full(time.shape, self.seconds[0])
        by_one = features @ np.asarray(self.alone)
        return np.minimum(time, by_one), np.where(by_one < time, self.alone[0], self.seconds[0])


@dataclass(frozen=True)
class OpFit:
    """All classes of one op, and the half width in log time of its 90% interval."""

    op: str
    classes: tuple[GemmClass, ...] | tuple[LinearClass, ...]
    half_width_log: float
    interval_from: str
    num_samples: int


@dataclass(frozen=True)
class SequenceClass:
    """What a call costs between others of a step, at a number of threads: seconds, and half the width of their 90% interval."""

    threads: int
    seconds: float
    half_s: float
    num_samples: int


def _interpolate(x: FloatArray, knots: FloatArray, values: FloatArray) -> FloatArray:
    """Piecewise linear; beyond the knots the slope is 1 (a constant utilisation)."""
    inside = np.interp(x, knots, values)
    return inside + np.maximum(x - knots[-1], 0.0) - np.maximum(knots[0] - x, 0.0)


@dataclass(frozen=True)
class Product:
    """What a call multiplies: `rows` activations with each of `weights` weights, `reduced` of them to a sum.

    ``activation_bytes`` are float32 activations in and results out.
    """

    rows: FloatArray
    weights: FloatArray
    reduced: FloatArray
    activation_bytes: FloatArray


#: Names of the sizes that a call of a matrix op must give.
MATRIX_SIZES = {
    "moe_experts": ("tokens", "top_k", "distinct_experts", "hidden_size", "intermediate_size"),
    **dict.fromkeys(GEMM_OPS, ("m", "n", "k")),
}


def product_of(op: str, params: Params) -> Product:
    """The product that a call of a matrix op is.

    The expert layer is one of the experts that it touches (three matrices each: gate, up, down) with the tokens that one of
    them gets on average.
    """
    sizes = (np.asarray(params[name], dtype=np.float64) for name in MATRIX_SIZES[op])
    if op != "moe_experts":
        m, n, k = np.broadcast_arrays(*(np.atleast_1d(v) for v in sizes))
        return Product(m, n * k, k, 4.0 * m * (n + k))
    tokens, top_k, distinct, hidden, width = np.broadcast_arrays(*(np.atleast_1d(v) for v in sizes))
    return Product(tokens * top_k / distinct, 3.0 * distinct * hidden * width, hidden, 8.0 * tokens * hidden)


def packed_bytes(chosen: GemmClass, group: int, symmetric: bool, k: FloatArray) -> Any:
    """Bytes a weight of the asked class takes, from the fitted class: scales are float16, zeros half a byte a group."""

    def per_group(g: int, sym: bool) -> FloatArray:
        return (2.0 if sym else 2.5) / (k if g < 0 else np.full(k.shape, float(g)))

    if group == chosen.group_size and symmetric == chosen.symmetric:
        return chosen.weight_bytes
    return chosen.weight_bytes + per_group(group, symmetric) - per_group(chosen.group_size, chosen.symmetric)


def sequence_products(params: Params) -> tuple[tuple[int, int, float], ...]:
    """(N, K, how often) of the products of a stack of dense layers: query, key, value, output, gate, up, down."""
    hidden, kv, width = (int(params[name]) for name in ("hidden_size", "kv_size", "intermediate_size"))
    layers = float(params["layers"])
    return (hidden, hidden, 2 * layers), (kv, hidden, 2 * layers), (width, hidden, 2 * layers), (hidden, width, layers)


def linear_sizes(op: str) -> tuple[str, ...]:
    """Names of the sizes that a call of a linear op must give."""
    return ("tokens", "num_experts", "top_k") if op == "moe_route" else ("batch", "num_draft", "vocab")


def linear_features(op: str, params: Params) -> FloatArray:
    """Counts that the seconds of a `LinearClass` multiply, [n, terms]."""
    if op == "moe_route":
        tokens, experts, top_k = (np.asarray(params[k], dtype=np.float64) for k in ("tokens", "num_experts", "top_k"))
        columns: list[FloatArray] = [np.ones(()), tokens, tokens * experts, tokens * top_k]
    else:
        batch, drafts, vocab = (np.asarray(params[k], dtype=np.float64) for k in ("batch", "num_draft", "vocab"))
        rows = np.asarray(params.get("rows_read", batch * (drafts + 1.0)), dtype=np.float64)
        columns = [np.ones(()), rows * vocab]
        if params["rule"] == "rejection":
            columns.append(np.asarray(params.get("rows_sampled", batch), dtype=np.float64) * vocab)
    return np.stack([np.atleast_1d(c) for c in np.broadcast_arrays(*columns)], axis=-1)


def linear_bytes(op: str, params: Params) -> FloatArray:
    """Bytes of float32 logits that a call reads: only to tell memory from compute."""
    features = linear_features(op, params)
    return 4.0 * features[..., 2 if op == "moe_route" else 1]


def group_class(params: Params) -> int:
    """Group size as a class: -1 for the whole row, whatever K is."""
    group = int(params["group_size"])
    return -1 if group <= 0 or (group > 256 and group == int(np.asarray(params.get("k", 0)).flat[0])) else group

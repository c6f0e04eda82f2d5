"""Numba twin of the expert layer, on the same packed experts and with the same bits as the C kernels."""

from typing import Any

import numpy as np
from numba import njit

from . import int4
from ._intrinsics import fma32
from ._scores import sigmoid
from ._vexp import vexp

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "swiglu_oai": 5}
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_SQRT_HALF = np.float32(float.fromhex("0x1.6a09e6p-1"))
_TANH_SCALE = np.float32(float.fromhex("0x1.988454p+0"))
_CUBIC = np.float32(0.044715)
_ERFC = tuple(np.float32(c) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))
_ERFC_P = np.float32(0.3275911)


def experts(
    x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray, packed: Any, a16: bool, weights_on_input: bool
) -> np.ndarray:
    """float32 [T, H]; the arguments are checked by :mod:`assay.ops.moe_experts`."""
    s = packed.shape
    y = np.zeros((*topk_ids.shape, s.hidden), np.float32)
    used = np.zeros(topk_ids.shape, np.bool_)
    columns = -(-s.intermediate // 16) * 32 if s.gated else s.intermediate
    (up_group, up_symmetric), (down_group, down_symmetric) = packed.gate_up_format, packed.down_format
    limit = np.float32(s.limit if s.limit > 0 else np.inf)
    for e in np.unique(topk_ids[(topk_ids >= 0) & (topk_ids < s.num_experts)]):
        tokens, slots = np.nonzero(topk_ids == e)
        used[tokens, slots] = True
        rows = x[tokens] * topk_weights[tokens, slots, None] if weights_on_input else x[tokens]
        c = int4.gemm(rows, packed.gate_up[e], columns, s.hidden, up_group, up_symmetric, a16)
        if packed.gate_up_bias is not None:
            c += packed.gate_up_bias[e]
        h = np.empty((len(rows), s.intermediate), np.float32)
        _activate(c, _KINDS[s.activation], s.gated, np.float32(s.alpha), limit, h)
        out = int4.gemm(h, packed.down[e], s.hidden, s.intermediate, down_group, down_symmetric, a16)
        y[tokens, slots] = out if packed.down_bias is None else out + packed.down_bias[e]
    weights = np.ones_like(topk_weights) if weights_on_input else topk_weights
    return _combine(y, used, weights)


@njit(cache=True)
def _act(kind, alpha, x):  # type: ignore[no-untyped-def]
    if kind == 0:
        return x * sigmoid(x)
    if kind == 5:
        return x * sigmoid(alpha * x)
    if kind == 1:
        z = abs(x) * _SQRT_HALF
        t = _ONE / fma32(_ERFC_P, z, _ONE)
        p = _ERFC[0]
        for term in _ERFC[1:]:
            p = fma32(p, t, term)
        q = _HALF * (p * t * vexp(-(z * z)))
        return x * (_ONE - q if x >= 0 else q)
    if kind == 2:
        return x * sigmoid(_TANH_SCALE * fma32(_CUBIC * x, x * x, x))
    r = _ZERO if x < 0 else x
    return r * r if kind == 4 else r


@njit(cache=True)
def _activate(c, kind, gated, alpha, limit, h):  # type: ignore[no-untyped-def]
    for r in range(h.shape[0]):
        for i in range(h.shape[1]):
            at = i // 16 * 32 + i % 16 if gated else i
            g = c[r, at]
            f = _act(kind, alpha, limit if g > limit else g)
            if gated:
                u = c[r, at + 16]
                u = -limit if u < -limit else (limit if u > limit else u)
                f *= u + _ONE if kind == 5 else u
            h[r, i] = f


@njit(cache=True)
def _combine(y, used, weights):  # type: ignore[no-untyped-def]
    tokens, slots, n = y.shape
    out = np.zeros((tokens, n), np.float32)
    for t in range(tokens):
        more = False
        for j in range(slots):
            if not used[t, j]:
                continue
            w = weights[t, j]
            for i in range(n):
                out[t, i] = fma32(w, y[t, j, i], out[t, i]) if more else w * y[t, j, i]
            more = True
    return out

"""The expert layer."""

from math import erf
from typing import Any

import numpy as np

from .gemm import w4a8_gemm, w4a16_gemm


def activate(gate: np.ndarray, up: np.ndarray | None, activation: str, limit: float, alpha: float) -> np.ndarray:
    """Hidden units of gates and ups, in float64; `up` None where the layer is not gated."""
    g = gate.astype(np.float64)
    u = np.ones_like(g) if up is None else up.astype(np.float64)
    if limit > 0:
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    with np.errstate(over="ignore"):
        if activation == "silu":
            h = g / (1 + np.exp(-g))
        elif activation == "gelu":
            h = g * 0.5 * (1 + np.vectorize(erf, otypes=[float])(g / np.sqrt(2)))
        elif activation == "gelu_tanh":
            h = g * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        elif activation == "swiglu_oai":
            h, u = g / (1 + np.exp(-alpha * g)), u + 1
        else:
            h = np.maximum(g, 0) ** (2 if activation == "relu2" else 1)
    return h if up is None else h * u


def moe_experts(
    x: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray, experts: Any, a16: bool, weights_on_input: bool
) -> np.ndarray:
    """float32 [T, H] of x [T, H]: expert by expert, then each token's slots in order."""
    shape = experts.shape
    gemm = w4a16_gemm if a16 else w4a8_gemm
    y = np.zeros((*topk_ids.shape, shape.hidden), np.float32)
    used = np.zeros(topk_ids.shape, bool)
    for e in range(shape.num_experts):
        tokens, slots = np.nonzero(topk_ids == e)
        if not len(tokens):
            continue
        used[tokens, slots] = True
        rows = x[tokens] * topk_weights[tokens, slots, None] if weights_on_input else x[tokens]
        up, down = experts.expert(e)
        qweight, scales, zeros = up.unpack()
        c = gemm(rows, qweight, scales, zeros, up.group_size)
        if experts.gate_up_bias is not None:
            c = c + experts.gate_up_bias[e]
        if shape.gated:
            tiles = c.reshape(len(c), -1, 2, 16)
            gate, ups = (tiles[:, :, i].reshape(len(c), -1)[:, : shape.intermediate] for i in (0, 1))
        else:
            gate, ups = c, None
        h = activate(gate, ups, shape.activation, shape.limit, shape.alpha).astype(np.float32)
        qweight, scales, zeros = down.unpack()
        y[tokens, slots] = gemm(h, qweight, scales, zeros, down.group_size)
        if experts.down_bias is not None:
            y[tokens, slots] += experts.down_bias[e]
    out = np.zeros((len(x), shape.hidden), np.float32)
    for j in range(topk_ids.shape[1]):
        w = np.ones(len(x), np.float32) if weights_on_input else topk_weights[:, j]
        out = np.where(used[:, j, None], (w[:, None].astype(np.float64) * y[:, j] + out).astype(np.float32), out)
    return out

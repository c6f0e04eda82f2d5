"""The wide GEMM: float32 scales and minimums, codebooks."""

import numpy as np

from .gemm import fma, lane_sum, quantize_activations, unpack_nibbles


def wide_values(qweight: np.ndarray, codebook: np.ndarray | None, k: int) -> np.ndarray:
    """v float32 [N, K]: int8 codes as they are, 4-bit codes (uint8 [N, ceil(K/2)]) through the codebook."""
    if codebook is None:
        return qweight.astype(np.float32)
    return codebook.astype(np.float32)[unpack_nibbles(qweight, k)]


def dequantize_wide(v: np.ndarray, scales: np.ndarray, minimum: np.ndarray | None, group_size: int) -> np.ndarray:
    """w = scale v + minimum, float32 [N, K], rounded once: w is what a format's own float32 arithmetic calls it."""
    scale = np.repeat(scales, group_size, axis=1)
    if minimum is None:
        return scale * v
    return fma(scale, v, np.repeat(minimum, group_size, axis=1))


def wide_a8_gemm(
    a: np.ndarray, v: np.ndarray, scales: np.ndarray, minimum: np.ndarray | None, group_size: int
) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T with int8 activations: assay.h's equation, group by group."""
    codes, a_scale = quantize_activations(a, group_size)
    c = np.zeros((len(a), len(v)), np.float32)
    for g in range(a.shape[1] // group_size):
        at = slice(g * group_size, (g + 1) * group_size)
        q = codes[:, at].astype(np.int64)
        dot = q @ v[:, at].astype(np.int64).T
        c = fma(dot.astype(np.float32), scales[None, :, g] * a_scale[:, g, None], c)
        if minimum is not None:
            total = q.sum(1).astype(np.float32) * a_scale[:, g]
            c = fma(minimum[None, :, g], total[:, None], c)
    return c


def wide_a16_gemm(
    a: np.ndarray, v: np.ndarray, scales: np.ndarray, minimum: np.ndarray | None, group_size: int
) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T with activations as they are: assay.h's chain, k by k."""
    x = a.astype(np.float32)
    c = np.zeros((len(a), len(v)), np.float32)
    for g in range(a.shape[1] // group_size):
        part = np.zeros_like(c)
        for i in range(g * group_size, (g + 1) * group_size):
            part = fma(x[:, i, None], v[None, :, i], part)
        c = fma(part, scales[None, :, g], c)
        if minimum is not None:
            c = fma(minimum[None, :, g], lane_sum(x[:, g * group_size : (g + 1) * group_size])[:, None], c)
    return c

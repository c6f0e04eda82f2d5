"""Numba twin of the int8 GEMM, on the same packed stream and with the same bits as the C kernels."""

import numpy as np
from numba import njit

from ._intrinsics import fma32, half_to_float
from .int4 import grouped, quantize

_TILE = 32


def gemm(a: np.ndarray, packed: np.ndarray, n: int, k: int, group_size: int) -> np.ndarray:
    """C[M, N] float32 of float32 activations A[M, K]; the arguments are checked by :mod:`assay.ops.int8`."""
    codes, scale = quantize(grouped(a, k, group_size))
    c = np.empty((len(a), n), np.float32)
    _w8a8(codes, scale, packed, c)
    return c


@njit(cache=True)
def _w8a8(codes, a_scale, packed, c):  # type: ignore[no-untyped-def]
    m, groups, padded = codes.shape
    n = c.shape[1]
    block = 64 + padded // 32 * 1024
    dot = np.empty(16, np.int32)
    f = np.empty((m, _TILE), np.float32)
    for t in range((n + _TILE - 1) // _TILE):
        f[:] = 0
        for g in range(groups):
            at = (t * groups + g) * block
            for r in range(m):
                for h in range(2):
                    dot[:] = 0
                    for step in range(padded // 4):
                        line = at + 64 + step * 128 + h * 64
                        for j in range(16):
                            for b in range(4):
                                q = np.int32(packed[line + 4 * j + b]) - np.int32(128)
                                dot[j] += q * np.int32(codes[r, g, step * 4 + b])
                    for j in range(16):
                        col = 16 * h + j
                        scale = half_to_float(packed[at + 2 * col] | packed[at + 2 * col + 1] << 8)
                        f[r, col] = fma32(np.float32(dot[j]), scale * a_scale[r, g], f[r, col])
        for r in range(m):
            for j in range(min(_TILE, n - t * _TILE)):
                c[r, t * _TILE + j] = f[r, j]

"""Numba twin of the wide GEMM, on the same packed stream and with the same bits as the C kernels."""

import numpy as np
from numba import njit

from ._intrinsics import fma32, load_float, load_lane
from .int4 import grouped, lane_sums, quantize

_TILE = 32


def gemm(a: np.ndarray, packed: np.ndarray, n: int, k: int, group_size: int, bits: int, codebook: np.ndarray | None,
         minimum: bool, a16: bool) -> np.ndarray:  # fmt: skip
    """C[M, N] float32 of float32 activations A[M, K]; the arguments are checked by :mod:`assay.ops.wide`."""
    x = grouped(a, k, group_size, 16)
    c = np.empty((len(a), n), np.float32)
    if a16:
        values = np.arange(-128, 128, dtype=np.float32) if codebook is None else codebook
        _a16(x, lane_sums(x), packed, bits, values, minimum, c)
    else:
        whole = np.arange(-128, 128, dtype=np.int32) if codebook is None else codebook.astype(np.int32)
        codes, scale = quantize(x)
        _a8(codes, scale, packed, bits, whole, minimum, c)
    return c


@njit(cache=True)
def _value(packed, line, i, bits, values):  # type: ignore[no-untyped-def]
    """The value of weight i of a group, from its column's lane of the group's first line."""
    if bits == 8:
        return values[load_lane(packed, line + i // 4 * 128) >> i % 4 * 8 & 255]
    return values[load_lane(packed, line + i // 8 * 128) >> (i % 4 * 8 + i % 8 // 4 * 4) & 15]


@njit(cache=True)
def _a8(codes, a_scale, packed, bits, whole, minimum, c):  # type: ignore[no-untyped-def]
    m, groups, padded = codes.shape
    n = c.shape[1]
    header = 256 if minimum else 128
    block = header + padded * 4 * bits
    dot = np.empty(_TILE, np.int32)
    f = np.empty((m, _TILE), np.float32)
    for t in range((n + _TILE - 1) // _TILE):
        f[:] = 0
        for g in range(groups):
            at = (t * groups + g) * block
            for r in range(m):
                total = np.int32(0)
                dot[:] = 0
                for i in range(padded):
                    q = np.int32(codes[r, g, i])
                    total += q
                    for j in range(_TILE):
                        dot[j] += _value(packed, at + header + j // 16 * 64 + j % 16 * 4, i, bits, whole) * q
                for j in range(_TILE):
                    f[r, j] = fma32(np.float32(dot[j]), load_float(packed, at + 4 * j) * a_scale[r, g], f[r, j])
                    if minimum:
                        term = np.float32(total) * a_scale[r, g]
                        f[r, j] = fma32(load_float(packed, at + 128 + 4 * j), term, f[r, j])
        for r in range(m):
            for j in range(min(_TILE, n - t * _TILE)):
                c[r, t * _TILE + j] = f[r, j]


@njit(cache=True)
def _a16(x, x_sum, packed, bits, values, minimum, c):  # type: ignore[no-untyped-def]
    m, groups, padded = x.shape
    n = c.shape[1]
    header = 256 if minimum else 128
    block = header + padded * 4 * bits
    part = np.empty(_TILE, np.float32)
    f = np.empty((m, _TILE), np.float32)
    for t in range((n + _TILE - 1) // _TILE):
        f[:] = 0
        for g in range(groups):
            at = (t * groups + g) * block
            for r in range(m):
                part[:] = 0
                for i in range(padded):
                    for j in range(_TILE):
                        v = _value(packed, at + header + j // 16 * 64 + j % 16 * 4, i, bits, values)
                        part[j] = fma32(x[r, g, i], v, part[j])
                for j in range(_TILE):
                    f[r, j] = fma32(part[j], load_float(packed, at + 4 * j), f[r, j])
                    if minimum:
                        f[r, j] = fma32(load_float(packed, at + 128 + 4 * j), x_sum[r, g], f[r, j])
        for r in range(m):
            for j in range(min(_TILE, n - t * _TILE)):
                c[r, t * _TILE + j] = f[r, j]

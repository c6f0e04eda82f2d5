"""Numba twin of the INT4 GEMM, on the same packed stream and with the same bits as the C kernels."""

import numpy as np
from numba import njit

from ._intrinsics import fma32, half_to_float, load_lane
from ._lines import add_group, dot_nibbles, load_scales, load_zeros

_TILE = 32


def gemm(a: np.ndarray, packed: np.ndarray, n: int, k: int, group_size: int, symmetric: bool, a16: bool) -> np.ndarray:
    """C[M, N] float32 of float32 activations A[M, K]; the arguments are checked by :mod:`assay.ops.int4`."""
    x = grouped(a, k, group_size)
    c = np.empty((len(a), n), np.float32)
    if a16:
        _w4a16(x, lane_sums(x), packed, symmetric, c)
    else:
        codes, scale = quantize(x)
        _w4a8(codes, scale, packed, symmetric, c)
    return c


def grouped(a: np.ndarray, k: int, group_size: int, multiple: int = 32) -> np.ndarray:
    """Activations [M, K] as [M, G, group], each group padded with zeros to a multiple of 32, or of another number."""
    groups = k // group_size
    x = np.zeros((len(a), groups, -(-group_size // multiple) * multiple), np.float32)
    x[:, :, :group_size] = a.reshape(len(a), groups, group_size)
    return x


@njit(cache=True)
def quantize(x):  # type: ignore[no-untyped-def]
    """Codes int8 [M, G, group] and scales float32 [M, G] of grouped activations, as assay.h says."""
    m, groups, padded = x.shape
    codes = np.zeros((m, groups, padded), np.int8)
    scale = np.zeros((m, groups), np.float32)
    for r in range(m):
        for g in range(groups):
            amax = np.float32(0)
            finite = True
            for i in range(padded):
                v = abs(x[r, g, i])
                if not v < np.inf:
                    finite = False
                amax = max(amax, v)
            if not finite:
                scale[r, g] = np.nan
            elif amax >= np.float32(1e-30):
                to_code = np.float32(127) / amax
                scale[r, g] = amax / np.float32(127)
                for i in range(padded):
                    codes[r, g, i] = np.int8(np.rint(x[r, g, i] * to_code))
    return codes, scale


@njit(cache=True)
def lane_sums(x):  # type: ignore[no-untyped-def]
    """float32 [M, G] sums of grouped activations, in assay.h's order."""
    m, groups, padded = x.shape
    sums = np.empty((m, groups), np.float32)
    lane = np.empty(8, np.float32)
    for r in range(m):
        for g in range(groups):
            lane[:] = 0
            for i in range(padded):
                lane[i % 8] += x[r, g, i]
            even = (lane[0] + lane[4]) + (lane[2] + lane[6])
            sums[r, g] = even + ((lane[1] + lane[5]) + (lane[3] + lane[7]))
    return sums


@njit(cache=True)
def _offsets(groups, padded, symmetric):  # type: ignore[no-untyped-def]
    """Bytes of a group's block and of a tile: csrc/kernels.h draws the stream."""
    block = 64 + padded // 32 * 512
    tile = groups * block
    if not symmetric:
        tile += (groups + 3) // 4 * 64
    return block, tile


@njit(cache=True)
def _zero_points(packed, tile, g, block, symmetric, zero):  # type: ignore[no-untyped-def]
    if symmetric:
        zero[:] = 8
    else:
        load_zeros(packed, tile + g // 4 * (4 * block + 64) + g % 4 * 16, zero)


@njit(cache=True, parallel=False)
def _w4a8(codes, a_scale, packed, symmetric, c):  # type: ignore[no-untyped-def]
    m, groups, padded = codes.shape
    n = c.shape[1]
    block, tile_bytes = _offsets(groups, padded, symmetric)
    zero = np.full(_TILE, 8, np.int32)
    w_scale = np.empty(_TILE, np.float32)
    dot = np.empty(_TILE, np.int32)
    f = np.empty((m, _TILE), np.float32)
    flat, sums = codes.reshape(-1), f.reshape(-1)
    totals = np.empty((m, groups), np.int32)
    for r in range(m):
        for g in range(groups):
            total = np.int32(0)
            for i in range(padded):
                total += np.int32(codes[r, g, i])
            totals[r, g] = total
    for t in range((n + _TILE - 1) // _TILE):
        tile = t * tile_bytes
        f[:] = 0
        for g in range(groups):
            at = tile + g * block + (0 if symmetric else (g // 4 + 1) * 64)
            load_scales(packed, at, w_scale)
            if not symmetric:
                _zero_points(packed, tile, g, block, symmetric, zero)
            for r in range(m):
                dot_nibbles(packed, at + 64, flat, (r * groups + g) * padded, padded // 8, dot)
                add_group(sums, r * _TILE, dot, zero, totals[r, g], w_scale, a_scale[r, g])
        for r in range(m):
            for j in range(min(_TILE, n - t * _TILE)):
                c[r, t * _TILE + j] = f[r, j]


@njit(cache=True, parallel=False)
def _w4a16(x, x_sum, packed, symmetric, c):  # type: ignore[no-untyped-def]
    m, groups, padded = x.shape
    n = c.shape[1]
    block, tile_bytes = _offsets(groups, padded, symmetric)
    zero = np.empty(_TILE, np.int32)
    part = np.empty(16, np.float32)
    f = np.empty((m, _TILE), np.float32)
    for t in range((n + _TILE - 1) // _TILE):
        tile = t * tile_bytes
        f[:] = 0
        for g in range(groups):
            at = tile + g * block + (0 if symmetric else (g // 4 + 1) * 64)
            _zero_points(packed, tile, g, block, symmetric, zero)
            for r in range(m):
                for h in range(2):
                    for j in range(16):
                        part[j] = np.float32(-zero[16 * h + j]) * x_sum[r, g]
                    for i in range(padded):
                        line = at + 64 + i // 8 * 128 + h * 64
                        shift = i % 4 * 8 + i % 8 // 4 * 4
                        xi = x[r, g, i]
                        for j in range(16):
                            q = np.float32(load_lane(packed, line + 4 * j) >> shift & 15)
                            part[j] = fma32(xi, q, part[j])
                    for j in range(16):
                        col = 16 * h + j
                        scale = half_to_float(packed[at + 2 * col] | packed[at + 2 * col + 1] << 8)
                        f[r, col] = fma32(part[j], scale, f[r, col])
        for r in range(m):
            for j in range(min(_TILE, n - t * _TILE)):
                c[r, t * _TILE + j] = f[r, j]

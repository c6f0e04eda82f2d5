"""The INT4 GEMM for Numba's CUDA target, on the GPU's packed weights (csrc/cuda/w4_layout.h): to be read, and to run where no
kernels are compiled for a GPU. No tensor cores: a tile of 8 rows by 32 columns a block, a thread an output, K in steps of 32
through shared memory.

Activations at their own precision. Sums are float32 in the order of K, a group at a time: f = f + p s_w with p = sum (q - zero) x.
"""

from typing import Any

import numpy as np
from numba import cuda, float32

from .cuda_verify import logit_at

_ROWS, _TILE, _STEP, _PAD = 8, 32, 32, 128
_STEP_BYTES, _SCALES_BYTES, _ZEROS_BYTES = 512, 64, 32
_F16 = 1


@cuda.jit(device=True)
def nibble(weights, tile_bytes, tile, column, k):  # type: ignore[no-untyped-def]
    """Weight k of a tile's column: lane 4 n + t's word j of k's step has it at bit 4 i + 16 e (w4_layout.h)."""
    j, n, within = column // 8, column % 8, k % _STEP
    half, rest = within // 16, within % 16
    i, t, e = 2 * half + rest // 8, rest % 8 // 2, rest % 2
    bit = 4 * i + 16 * e
    byte = tile * tile_bytes + k // _STEP * _STEP_BYTES + (4 * n + t) * 16 + j * 4 + bit // 8
    return weights[byte] >> (bit % 8) & 15


@cuda.jit
def multiply(data, scales, symmetric, n, k, group_size, a, dtype, c):  # type: ignore[no-untyped-def]
    """Grid (column tiles, row tiles), threads (32, 8). data: the packed bytes, scales: the same bytes as uint16."""
    column, row = cuda.threadIdx.x, cuda.blockIdx.y * _ROWS + cuda.threadIdx.y
    tile, tiles = cuda.blockIdx.x, cuda.gridDim.x
    x = cuda.shared.array((_ROWS, _STEP), float32)
    groups = k // group_size
    tile_bytes = (k + _PAD - 1) // _PAD * (_PAD // _STEP) * _STEP_BYTES
    scale_at = (
        (tiles * tile_bytes + tile * groups * _SCALES_BYTES) // 2 + column % 8 // 2 * 8 + column // 8 * 2 + column % 2
    )
    zero_at = (
        tiles * (tile_bytes + groups * _SCALES_BYTES) + tile * groups * _ZEROS_BYTES + column % 8 * 4 + column // 8
    )
    f = p = np.float32(0)
    for first in range(0, k, _STEP):
        at = first + column
        x[cuda.threadIdx.y, column] = logit_at(a, dtype, row, at) if row < a.shape[0] and at < k else np.float32(0)
        cuda.syncthreads()
        for i in range(min(_STEP, k - first)):
            group = (first + i) // group_size
            zero = 8 if symmetric else data[zero_at + group * _ZEROS_BYTES]
            q = np.int32(nibble(data, tile_bytes, tile, column, first + i)) - np.int32(zero)
            p += np.float32(q) * x[cuda.threadIdx.y, i]
            if (first + i + 1) % group_size == 0:
                f += p * logit_at(scales, _F16, 0, scale_at + group * (_SCALES_BYTES // 2))
                p = np.float32(0)
        cuda.syncthreads()
    if row < a.shape[0] and tile * _TILE + column < n:
        c[row, tile * _TILE + column] = f


def w4a16_gemm(
    data: Any, n: int, k: int, group_size: int, symmetric: bool, a: Any, dtype: int, c: Any, stream: Any = 0
) -> None:
    """C[M, N] = A[M, K] @ W[N, K].T; arrays are Numba's device arrays, or in the simulator numpy's.

    Parameters
    ----------
    data : uint8 [bytes]
        W, packed by assay_cuda_w4_pack.
    a : [M, K]
        float32 (dtype 0), or the bits of float16 (1) or bfloat16 (2) as uint16.
    c : float32 [M, N]
        Written.
    """
    if not len(a):
        return
    scales = data.view(np.uint16).reshape(1, -1)
    multiply[(-(-n // _TILE), -(-len(a) // _ROWS)), (_TILE, _ROWS), stream](
        data, scales, symmetric, n, k, group_size, a, dtype, c
    )

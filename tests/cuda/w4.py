"""INT4 weights in the GPU's order (csrc/cuda/w4_layout.h) by numpy, and the plan of csrc/cuda/w4_gemm.c."""

import numpy as np

from assay.reference.gemm import dequantize_int4, quantize_int4, unpack_nibbles

TILE, STEP, PAD, BLOCK_N = 32, 32, 128, 256


def pack(qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, k: int) -> np.ndarray:
    """The canonical arrays to the packed bytes of assay_cuda_w4_pack."""
    n, groups = scales.shape
    tiles, steps = -(-n // TILE), -(-k // PAD) * (PAD // STEP)
    q = np.zeros((tiles * TILE, steps * STEP), np.uint8)
    q[:n, :k] = unpack_nibbles(qweight, k)
    # [tile, j, n, step, i // 2, i % 2, t, e] -> [tile, step, n, t, j, e, i]
    fields = (
        q.reshape(tiles, 4, 8, steps, 2, 2, 4, 2).transpose(0, 3, 2, 6, 1, 7, 4, 5).reshape(tiles, steps, 8, 4, 4, 2, 4)
    )
    shifts = 16 * np.arange(2)[:, None] + 4 * np.arange(4)
    words = (fields.astype(np.uint32) << shifts.astype(np.uint32)).sum((-2, -1), dtype=np.uint32)
    all_scales = np.zeros((tiles * TILE, groups), np.float16)
    all_scales[:n] = scales
    # column 8 j + 2 t + e of a tile -> 8 t + 2 j + e
    scale_part = all_scales.reshape(tiles, 4, 4, 2, groups).transpose(0, 4, 2, 1, 3)
    parts = [
        np.ascontiguousarray(words).view(np.uint8).reshape(-1),
        np.ascontiguousarray(scale_part).view(np.uint8).reshape(-1),
    ]
    if zeros is not None:
        all_zeros = np.zeros((tiles * TILE, groups), np.uint8)
        all_zeros[:n] = zeros
        # column 8 j + n -> 4 n + j
        parts.append(all_zeros.reshape(tiles, 4, 8, groups).transpose(0, 3, 2, 1).reshape(-1))
    return np.concatenate(parts)


class Weights:
    """Random INT4 weights of a shape: canonical, packed, and their values."""

    def __init__(self, n: int, k: int, group_size: int, symmetric: bool, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.n, self.k, self.group_size, self.symmetric = n, k, group_size, symmetric
        w = rng.standard_normal((n, k)).astype(np.float32)
        self.qweight, self.scales, self.zeros = quantize_int4(w + (0 if symmetric else 0.3), group_size, symmetric)
        self.values = dequantize_int4(self.qweight, self.scales, self.zeros, k, group_size)
        self.packed = pack(self.qweight, self.scales, self.zeros, k)

    def fields(self) -> dict:
        """The device's view, for the emulator."""
        return {
            "data": self.packed,
            "n": self.n,
            "k": self.k,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }


def bf16(a: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even."""
    u = a.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << 16).view(np.float32)

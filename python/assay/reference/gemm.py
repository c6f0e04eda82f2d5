"""The GEMMs of INT4 and int8 weights."""

import numpy as np


def unpack_nibbles(qweight: np.ndarray, k: int) -> np.ndarray:
    """uint8 [N, ceil(K/2)], low nibble = even k, to uint8 [N, K]."""
    both = np.stack([qweight & 15, qweight >> 4], axis=-1)
    return both.reshape(qweight.shape[0], -1)[:, :k]


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 [N, K] in 0..15 to uint8 [N, ceil(K/2)], low nibble = even k."""
    q = np.pad(q, ((0, 0), (0, q.shape[1] % 2)))
    return q[:, 0::2] | q[:, 1::2] << 4


def quantize_int4(w: np.ndarray, group_size: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Round-to-nearest INT4 with float16 scales.

    Symmetric (as GGUF's Q4_0): scale = m / -8 for the value m of largest size, w = scale (q - 8). Asymmetric: the
    group's range, widened to hold zero, over 15 steps, w = scale (q - zero). Codes are chosen for the scale as float16
    holds it.
    """
    n, k = w.shape
    groups = w.astype(np.float32).reshape(n, k // group_size, group_size)
    if symmetric:
        widest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
        scales = (widest / np.float32(-8)).astype(np.float16)
        zeros = None
        offset = np.float32(8)
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scales = ((high - low) / np.float32(15)).astype(np.float16)
        step = scales.astype(np.float32)
        zeros = np.clip(np.rint(-low / np.where(step == 0, np.float32(1), step)), 0, 15).astype(np.uint8)
        offset = zeros[..., None].astype(np.float32)
    step = scales.astype(np.float32)[..., None]
    codes = np.rint(groups / np.where(step == 0, np.float32(1), step)) + offset
    q = np.clip(codes, 0, 15).astype(np.uint8).reshape(n, k)
    return pack_nibbles(q), scales, zeros


def dequantize_int4(
    qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, k: int, group_size: int
) -> np.ndarray:
    """w[n, k] = scale (q - zero), float32."""
    q = unpack_nibbles(qweight, k).reshape(len(qweight), -1, group_size).astype(np.float32)
    zero = np.float32(8) if zeros is None else zeros[..., None].astype(np.float32)
    return ((q - zero) * scales[..., None].astype(np.float32)).reshape(len(qweight), k)


def quantize_activations(a: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [M, K] and scales float32 [M, K / group_size] of w4a8's activations (assay.h)."""
    groups = a.astype(np.float32).reshape(len(a), a.shape[1] // group_size, group_size)
    amax = np.abs(groups).max(-1)
    finite = np.isfinite(groups).all(-1)
    live = finite & (amax >= np.float32(1e-30))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        to_code = np.where(live, np.float32(127) / amax, np.float32(0))
        codes = np.where(live[..., None], np.rint(groups * to_code[..., None]), 0)
    scale = np.where(live, amax / np.float32(127), np.where(finite, np.float32(0), np.float32(np.nan)))
    return codes.astype(np.int8).reshape(a.shape), scale.astype(np.float32)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """float32 x y + z, rounded once but for the rare sum that float64 rounds onto a float32 tie."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def w4a8_gemm(
    a: np.ndarray, qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group_size: int
) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T with int8 activations: assay.h's equation, group by group."""
    n, k = len(qweight), a.shape[1]
    codes, a_scale = quantize_activations(a, group_size)
    q = unpack_nibbles(qweight, k).astype(np.int64)
    c = np.zeros((len(a), n), np.float32)
    for g in range(k // group_size):
        at = slice(g * group_size, (g + 1) * group_size)
        zero = 8 if zeros is None else zeros[:, g, None].astype(np.int64)
        dot = codes[:, at].astype(np.int64) @ (q[:, at] - zero).T
        c = fma(dot.astype(np.float32), scales[None, :, g].astype(np.float32) * a_scale[:, g, None], c)
    return c


def quantize_int8(w: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round-to-nearest int8, w = scale q: scale = amax / 127 in float16, codes chosen for it, in -127..127."""
    groups = w.astype(np.float32).reshape(len(w), w.shape[1] // group_size, group_size)
    scales = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16)
    step = scales.astype(np.float32)[..., None]
    codes = np.clip(np.rint(groups / np.where(step == 0, np.float32(1), step)), -127, 127)
    return codes.astype(np.int8).reshape(w.shape), scales


def w8a8_gemm(a: np.ndarray, qweight: np.ndarray, scales: np.ndarray, group_size: int) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T, int8 weights q and int8 activations: w4a8's chain without a zero point."""
    codes, a_scale = quantize_activations(a, group_size)
    c = np.zeros((len(a), len(qweight)), np.float32)
    for g in range(a.shape[1] // group_size):
        at = slice(g * group_size, (g + 1) * group_size)
        dot = codes[:, at].astype(np.int64) @ qweight[:, at].astype(np.int64).T
        c = fma(dot.astype(np.float32), scales[None, :, g].astype(np.float32) * a_scale[:, g, None], c)
    return c


def lane_sum(x: np.ndarray) -> np.ndarray:
    """float32 sums [M] of a group's activations x[M, group]: eight lanes (k mod 8), folded in assay.h's order."""
    padded = np.zeros((len(x), -(-x.shape[1] // 8) * 8), np.float32)
    padded[:, : x.shape[1]] = x
    lane = np.zeros((len(x), 8), np.float32)
    for step in padded.reshape(len(x), padded.shape[1] // 8, 8).transpose(1, 0, 2):
        lane = lane + step
    even = (lane[:, 0] + lane[:, 4]) + (lane[:, 2] + lane[:, 6])
    folded: np.ndarray = even + ((lane[:, 1] + lane[:, 5]) + (lane[:, 3] + lane[:, 7]))
    return folded


def w4a16_gemm(
    a: np.ndarray, qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group_size: int
) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T with activations as they are: assay.h's chain, k by k."""
    m, n, k = len(a), len(qweight), a.shape[1]
    x = a.astype(np.float32)
    q = unpack_nibbles(qweight, k).astype(np.float32)
    c = np.zeros((m, n), np.float32)
    for g in range(k // group_size):
        fold = lane_sum(x[:, g * group_size : (g + 1) * group_size])
        zero = np.full(n, 8, np.float32) if zeros is None else zeros[:, g].astype(np.float32)
        part = -zero[None, :] * fold[:, None]
        for i in range(g * group_size, (g + 1) * group_size):
            part = fma(x[:, i, None], q[None, :, i], part)
        c = fma(part, scales[None, :, g].astype(np.float32), c)
    return c

"""Float matrices rounded to nearest into what a format can hold: for conversions that cannot be exact.

One pass, no search and no calibration data: the plain quantisers of the formats' own projects, in numpy.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .. import reference
from ..errors import FormatError
from .dequant import IQ4_VALUES, MXFP4_VALUES, e8m0_half, ue4m3_half
from .weights import Int4Weights, Int8Weights, Weights, WideWeights
from .wide import NF4_VALUES

__all__ = ["round_to"]

_CHUNK = 1 << 20  # weights rounded at a time


def _steps(values: np.ndarray) -> np.ndarray:
    """A divisor for every scale: 1 where it is 0."""
    return np.where(values == 0, np.float32(1), values.astype(np.float32))[..., None]


def _codes(groups: np.ndarray, step: np.ndarray, low: int, high: int, dtype: type) -> np.ndarray:
    return np.clip(np.rint(groups / _steps(step)), low, high).astype(dtype)


def _int4(w: np.ndarray, group_size: int, symmetric: bool) -> Int4Weights:
    qweight, scales, zeros = reference.quantize_int4(w, group_size, symmetric)
    q = np.ascontiguousarray(reference.unpack_nibbles(qweight, w.shape[1]))
    return Int4Weights(q, scales, zeros, group_size)


def _int8(w: np.ndarray, group_size: int) -> Int8Weights:
    return Int8Weights(*reference.quantize_int8(w, group_size), group_size)


def _q5_0(w: np.ndarray, group_size: int) -> Int8Weights:
    groups = w.reshape(len(w), -1, group_size)
    widest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    scales = (widest / np.float32(-16)).astype(np.float16)
    return Int8Weights(_codes(groups, scales, -16, 15, np.int8).reshape(w.shape), scales, group_size)


def _with_minimum(w: np.ndarray, group_size: int, top: int) -> WideWeights:
    """Q4_1 and Q5_1: the group's range over `top` steps, scale and minimum float16."""
    groups = w.reshape(len(w), -1, group_size)
    low = groups.min(-1).astype(np.float16).astype(np.float32)
    scales = ((groups.max(-1) - groups.min(-1)) / np.float32(top)).astype(np.float16).astype(np.float32)
    q = _codes(groups - low[..., None], scales, 0, top, np.uint8 if top == 15 else np.int8)
    return WideWeights(q.reshape(w.shape), scales, low, group_size)


def _k_quant(w: np.ndarray, top: int) -> WideWeights:
    """Q4_K and Q5_K: scales and minimums of 32 are multiples, by 0..63, of two float16 numbers of every 256."""
    groups = w.reshape(len(w), -1, 8, 32)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)

    def sixths(values: np.ndarray) -> np.ndarray:
        d = (values.max(-1) / np.float32(63)).astype(np.float16)
        c = np.clip(np.rint(values / _steps(d)), 0, 63).astype(np.float32)
        return c * d.astype(np.float32)[..., None]

    scales, least = sixths((high - low) / np.float32(top)), sixths(-low)
    q = _codes(groups + least[..., None], scales, 0, top, np.uint8 if top == 15 else np.int8)
    grid = (len(w), -1)
    return WideWeights(q.reshape(w.shape), scales.reshape(grid), -least.reshape(grid), 32)


def _q6_k(w: np.ndarray) -> WideWeights:
    groups = w.reshape(len(w), -1, 16, 16)
    widest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0] / np.float32(-32)
    d = (np.abs(widest).max(-1) / np.float32(127)).astype(np.float16)
    scales = _codes(widest, d, -128, 127, np.int8) * d.astype(np.float32)[..., None]
    q = _codes(groups, scales, -32, 31, np.int8)
    return WideWeights(q.reshape(w.shape), scales.reshape(len(w), -1), None, 16)


def _nearest(groups: np.ndarray, scales: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Code of the nearest value of `table` times the scale; the first of equals."""
    order = np.argsort(table, kind="stable")
    middle = (table[order][1:] + table[order][:-1]) / np.float32(2)
    at: np.ndarray = order[np.searchsorted(middle, groups / _steps(scales))]
    return at.astype(np.uint8)


def _mxfp4(w: np.ndarray) -> WideWeights:
    groups = w.reshape(len(w), -1, 32)
    amax = np.abs(groups).max(-1)
    exponent = np.floor(np.log2(np.where(amax == 0, np.float32(1), amax))) + 125  # 6 is e2m1's largest: two binades up
    e = np.where(amax == 0, 0, exponent).clip(0, 254).astype(np.uint8)
    scales = e8m0_half(e)
    return WideWeights(_nearest(groups, scales, MXFP4_VALUES).reshape(w.shape), scales, None, 32, MXFP4_VALUES)


def _nvfp4(w: np.ndarray, widest: np.float32) -> WideWeights:
    """Block scales in E4M3 under one float32 scale, by which they are divided, that takes the widest weight's to 448."""
    groups = w.reshape(len(w), -1, 16)
    amax = np.abs(groups).max(-1)
    factor = np.float32(448 * 6) / np.maximum(widest, np.float32(1e-30))
    values = ue4m3_half(np.arange(127, dtype=np.uint8))
    wanted = amax / np.float32(12) * factor
    code = np.searchsorted((values[1:] + values[:-1]) / 2, wanted)
    scales = values[code] / factor
    return WideWeights(_nearest(groups, scales, MXFP4_VALUES).reshape(w.shape), scales, None, 16, MXFP4_VALUES)


def _table(w: np.ndarray, group_size: int, table: np.ndarray, half: bool) -> WideWeights:
    """NF4 and IQ4_NL: the group's largest magnitude is the table's."""
    groups = w.reshape(len(w), -1, group_size)
    scales = (np.abs(groups).max(-1) / np.abs(table).max()).astype(np.float16 if half else np.float32)
    scales = scales.astype(np.float32)
    return WideWeights(_nearest(groups, scales, table).reshape(w.shape), scales, None, group_size, table)


_ROUNDERS: dict[str, tuple[int, Callable[[np.ndarray, int], Weights]]] = {  # K is a multiple of the first
    "gptq": (8, lambda w, g: _int4(w, g, False)),
    "gptq_v2": (8, lambda w, g: _int4(w, g, False)),
    "awq": (8, lambda w, g: _int4(w, g, False)),
    "compressed-tensors": (8, lambda w, g: _int4(w, g, False)),
    "hqq": (8, lambda w, g: _int4(w, g, False)),
    "assay": (1, lambda w, g: _int4(w, g, False)),
    "nf4": (64, lambda w, _: _table(w, 64, NF4_VALUES, half=False)),
    "mxfp4": (32, lambda w, _: _mxfp4(w)),
    "nvfp4": (16, lambda w, _: _nvfp4(w, np.abs(w).max())),
    "q4_0": (32, lambda w, _: _int4(w, 32, True)),
    "q4_1": (32, lambda w, _: _with_minimum(w, 32, 15)),
    "q5_0": (32, lambda w, _: _q5_0(w, 32)),
    "q5_1": (32, lambda w, _: _with_minimum(w, 32, 31)),
    "q8_0": (32, lambda w, _: _int8(w, 32)),
    "q4_k": (256, lambda w, _: _k_quant(w, 15)),
    "q5_k": (256, lambda w, _: _k_quant(w, 31)),
    "q6_k": (256, lambda w, _: _q6_k(w)),
    "iq4_nl": (32, lambda w, _: _table(w, 32, IQ4_VALUES, half=True)),
}


def _join(parts: list[Weights]) -> Weights:
    """The rows of all parts, which have one form."""
    if len(parts) == 1:
        return parts[0]
    names = ("q", "scales", "zeros", "minimum")
    there = [name for name in names if getattr(parts[0], name, None) is not None]
    joined: dict[str, Any] = {name: np.concatenate([getattr(p, name) for p in parts]) for name in there}
    return replace(parts[0], **joined)


def round_to(w: np.ndarray, target: str, group_size: int = 128) -> Weights:
    """float32 [N, K] to weights that the format `target` holds, by rounding to nearest.

    `group_size` counts for the formats that leave it open: GPTQ, AWQ, compressed-tensors, HQQ and assay's own INT4.

    Raises
    ------
    FormatError
        Weights that are not finite, K that the format cannot divide, scales beyond its range.
    """
    multiple, rounder = _ROUNDERS[target]
    if not np.isfinite(w).all():
        raise FormatError("weights: expected finite numbers, got a NaN or infinity")
    if w.shape[1] % multiple:
        raise FormatError(f"weights: expected K a multiple of {multiple} ({target}), got K = {w.shape[1]}")
    if multiple <= 8 and w.shape[1] % group_size:
        raise FormatError(f"weights: expected K a multiple of group_size = {group_size}, got K = {w.shape[1]}")
    if target == "nvfp4":
        widest = max(w.max(), -w.min())
        rounder = lambda part, _: _nvfp4(part, widest)  # noqa: E731
    rows = max(1, _CHUNK // w.shape[1])  # bounded scratch memory, whatever the matrix
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _join([rounder(w[at : at + rows], group_size) for at in range(0, len(w), rows)])
    except FormatError:
        raise
    except ValueError as exc:  # a scale that float16 does not hold is infinite
        raise FormatError(f"weights: {exc} ({target})") from exc

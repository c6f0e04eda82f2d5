"""GGML's block types to the forms that run, and back, without changing a weight.

===================  ============================================  ========================
type                 weights                                       runs as
===================  ============================================  ========================
Q4_0                 d (q - 8)                                     `Int4Weights`, group 32
Q4_1                 d q + m                                       `WideWeights` of 4 bits, group 32
Q5_0                 d (q - 16)                                    `Int8Weights`, group 32
Q5_1                 d q + m, q 0..31                              `WideWeights` of 8 bits, group 32
Q8_0                 d q                                           `Int8Weights`, group 32
Q4_K, Q5_K           (d sc) q - (dmin m), 6-bit sc and m           `WideWeights` of 4 and 8 bits, group 32
Q6_K                 (d sc) (q - 32), int8 sc                      `WideWeights` of 8 bits, group 16
Q2_K, Q3_K           (d sc) q - (dmin m); (d sc) (q - 4)           `WideWeights` of 4 and 8 bits, group 16; read only
IQ4_NL, IQ4_XS       d table[q], (d sc) table[q]                   `WideWeights` of 4 bits with a codebook, group 32
MXFP4                2^(e - 128) table[q]                          `WideWeights` of 4 bits with a codebook, group 32
NVFP4                (ue4m3 / 2) table[q]                          `WideWeights` of 4 bits with a codebook, group 16
===================  ============================================  ========================

A product of a float16 and a 6- or 8-bit integer needs at most 19 bits, so that float32 holds scales and minimums exactly
and `dequantize` gives the bits of ``gguf.quants.dequantize``. Blocks: ggml-common.h
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).

The way back finds a d, and integers beside it, with the same products; those that were written need not come back.
"""

from collections.abc import Callable

import numpy as np

from ..errors import FormatError
from ._checks import bad
from .dequant import (
    IQ4_VALUES,
    MXFP4_VALUES,
    _f16,
    _fifth_bits,
    _halves,
    _k_scales,
    e8m0_half,
    iq4_xs_scales,
    q2_codes,
    q2_k_scales,
    q3_codes,
    q3_k_scales,
    ue4m3_half,
)
from .int4 import Int4Weights, from_q4_0, to_q4_0
from .int4.q4 import blocks_of
from .weights import Int8Weights, Weights, WideWeights, as_int4, as_int8, as_wide, split

__all__ = ["GGML_READABLE", "GGML_WRITABLE", "from_ggml", "to_ggml"]

_U8 = np.uint8


def _half_at(b: np.ndarray, at: int) -> np.ndarray:
    """float16 [n] at byte `at` of every block."""
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2")[:, 0].astype(np.float16, copy=False)


# ---- reading: blocks [n, block_bytes] to codes [n, block_size], scales [n, g] and minimums [n, g] ----------------------

_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


def _q4_1(b: np.ndarray) -> _Parts:
    return _halves(b[:, None, 4:]), _f16(b, 0), _f16(b, 2), None


def _q5_0(b: np.ndarray) -> _Parts:
    return (
        (_halves(b[:, None, 6:]) | _fifth_bits(b, 2)).view(np.int8) - np.int8(16),
        _half_at(b, 0)[:, None],
        None,
        None,
    )


def _q5_1(b: np.ndarray) -> _Parts:
    return (_halves(b[:, None, 8:]) | _fifth_bits(b, 4)).view(np.int8), _f16(b, 0), _f16(b, 2), None


def _q8_0(b: np.ndarray) -> _Parts:
    return b[:, 2:].view(np.int8), _half_at(b, 0)[:, None], None, None


def _q2_k(b: np.ndarray) -> _Parts:
    d, m = q2_k_scales(b)
    return q2_codes(b[:, 16:80]), d, -m, None


def _q3_k(b: np.ndarray) -> _Parts:
    return q3_codes(b), q3_k_scales(b), None, None


def _q4_k(b: np.ndarray) -> _Parts:
    d, m = _k_scales(b)
    return _halves(b[:, 16:].reshape(-1, 4, 32)), d[..., 0], -m[..., 0], None


def _q5_k(b: np.ndarray) -> _Parts:
    d, m = _k_scales(b)
    fifth = np.unpackbits(b[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1) << _U8(4)
    q = _halves(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth
    return q.reshape(-1, 256).view(np.int8), d[..., 0], -m[..., 0], None


def _q6_k(b: np.ndarray) -> _Parts:
    low = _halves(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], _U8).reshape(1, 1, 4, 1)
    high = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & _U8(3)).reshape(-1, 8, 32)
    q = (low | (high << _U8(4))).view(np.int8) - np.int8(32)
    return q.reshape(-1, 256), _f16(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32), None, None


def _iq4_nl(b: np.ndarray) -> _Parts:
    return _halves(b[:, None, 2:]), _f16(b, 0), None, IQ4_VALUES


def _iq4_xs(b: np.ndarray) -> _Parts:
    return _halves(b[:, 8:].reshape(-1, 8, 16)), iq4_xs_scales(b), None, IQ4_VALUES


def _mxfp4(b: np.ndarray) -> _Parts:
    if (b[:, 0] == 255).any():
        bad("scale", "E8M0 exponents 0..254 (255 is NaN)", f"255 in block {int((b[:, 0] == 255).argmax())}")
    return _halves(b[:, None, 1:]), e8m0_half(b[:, :1]), None, MXFP4_VALUES


def _nvfp4(b: np.ndarray) -> _Parts:
    if (b[:, :4] & _U8(127) == 127).any():
        bad("scale", "finite E4M3 scales", "NaN (0x7f)")
    return _halves(b[:, 4:].reshape(-1, 4, 8)), ue4m3_half(b[:, :4]), None, MXFP4_VALUES


_READ: dict[str, tuple[int, int, Callable[[np.ndarray], _Parts]]] = {  # bytes a block, group size
    "Q4_1": (20, 32, _q4_1),
    "Q5_0": (22, 32, _q5_0),
    "Q5_1": (24, 32, _q5_1),
    "Q8_0": (34, 32, _q8_0),
    "Q2_K": (84, 16, _q2_k),
    "Q3_K": (110, 16, _q3_k),
    "Q4_K": (144, 32, _q4_k),
    "Q5_K": (176, 32, _q5_k),
    "Q6_K": (210, 16, _q6_k),
    "IQ4_NL": (18, 32, _iq4_nl),
    "IQ4_XS": (136, 32, _iq4_xs),
    "MXFP4": (17, 32, _mxfp4),
    "NVFP4": (36, 16, _nvfp4),
}

#: Types that `from_ggml` reads.
GGML_READABLE = ("Q4_0", *_READ)


def from_ggml(rows: np.ndarray, type_name: str, *, name: str = "") -> Weights:
    """Rows of blocks in the form in which they run.

    Parameters
    ----------
    rows : uint8 [N, row_bytes]
        As `GGUFFile.raw` gives them.
    type_name : str
        "Q4_K", ...: one of `GGML_READABLE`.
    name : str
        Of the tensor, for messages.

    Raises
    ------
    FormatError
        Another type, rows of no whole number of blocks, scales that are not finite.
    """
    if type_name == "Q4_0":
        return from_q4_0(rows, name=name)
    if type_name not in _READ:
        bad(name or "rows", f"a type of {', '.join(GGML_READABLE)}", type_name)
    block_bytes, group_size, read = _READ[type_name]
    blocks = blocks_of(rows, block_bytes, name, type_name)
    n = len(blocks)
    try:
        with np.errstate(invalid="ignore"):
            q, scales, minimum, codebook = read(blocks.reshape(-1, block_bytes))
    except FormatError as exc:
        raise FormatError(f"{name}: {exc}" if name else str(exc)) from None
    q, scales = np.ascontiguousarray(q).reshape(n, -1), scales.reshape(n, -1)
    for what, array in (("scale", scales), ("minimum", minimum)):
        if array is not None and not np.isfinite(array).all():
            row, group = np.argwhere(~np.isfinite(array.reshape(n, -1)))[0]
            bad(name or "rows", f"a finite {what}", f"{array.reshape(n, -1)[row, group]} in row {row}, group {group}")
    if scales.dtype == np.float16:
        return Int8Weights(q, scales, group_size)
    return WideWeights(q, scales, None if minimum is None else minimum.reshape(n, -1), group_size, codebook)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _group(w: Weights, size: int) -> Weights:
    if w.group_size % size:
        bad("group_size", f"a multiple of {size}", str(w.group_size))
    return w if w.group_size == size else split(w, size)


def _exact_half(values: np.ndarray, what: str) -> np.ndarray:
    """uint8 [..., 2]: float16, if it holds the values."""
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    lost = half.astype(np.float32) != values
    if lost.any():
        bad(what, "values that float16 holds exactly", f"{values[lost][0]}, and so on in {lost.sum()} of {lost.size}")
    return half[..., None].view(_U8)


def _codes(q: np.ndarray, low: int, high: int) -> np.ndarray:
    if q.min() < low or q.max() > high:
        bad("q", f"codes of {low}..{high}", f"{q.min()}..{q.max()}")
    return q


def _payload(q: np.ndarray, run: int) -> np.ndarray:
    """uint8 [..., size] to nibbles [..., size/2]: of every `run` weights the first half low, the second high."""
    halves = q.reshape(*q.shape[:-1], -1, 2, run // 2)
    return (halves[..., 0, :] & _U8(15) | (halves[..., 1, :] & _U8(15)) << _U8(4)).reshape(*q.shape[:-1], -1)


def _factor(values: np.ndarray, high: int, low: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """d (uint8 [B, 2], a float16) and integers c of low..high [B, g] with ``values = d c`` exactly.

    The widest value of a block is d times some integer: every integer is tried, from the largest, which quantisers use.
    """
    wide = values.astype(np.float64)
    widest = np.take_along_axis(wide, np.abs(wide).argmax(-1)[:, None], -1)
    d = np.zeros(len(wide), np.float16)
    left = np.flatnonzero(widest[:, 0])
    for c in [*range(high, 0, -1), *([low] if low < 0 else [])]:
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
            step = (widest[left] / c).astype(np.float16)
            ratio = np.rint(wide[left] / step.astype(np.float64))
            fits = np.isfinite(step[:, 0]) & (step[:, 0] != 0)
            fits &= ((ratio * step == wide[left]) & (ratio >= low) & (ratio <= high)).all(-1)
        d[left[fits]] = step[fits, 0]
        left = left[~fits]
        if not left.size:
            break
    if left.size:
        bad(what, f"a float16 times integers of {low}..{high} in every block", f"others in {left.size} of {len(d)}")
    step = np.where(d == 0, 1, d.astype(np.float64))
    return d.astype("<f2")[:, None].view(_U8), np.rint(wide / step[:, None]).astype(np.int16)


def _write_q4_1(w: Weights) -> np.ndarray:
    wide = _group(as_wide(w, 4), 32)
    assert isinstance(wide, WideWeights)
    if wide.codebook is not None:
        bad("codebook", "None (Q4_1 has none)", "a codebook")
    minimum = np.zeros_like(wide.scales) if wide.minimum is None else wide.minimum
    q = wide.q.reshape(wide.n, -1, 32)
    return np.concatenate(
        [_exact_half(wide.scales, "scales"), _exact_half(minimum, "minimum"), _payload(q, 32)], axis=-1
    )


def _fifth(q: np.ndarray) -> np.ndarray:
    """Bit 4 of 32 codes in 4 bytes: [..., 32] to [..., 4]."""
    return np.packbits(q >> _U8(4) & _U8(1), axis=-1, bitorder="little")


def _write_q5_0(w: Weights) -> np.ndarray:
    narrow = _group(as_int8(w), 32)
    assert isinstance(narrow, Int8Weights)
    q = (_codes(narrow.q, -16, 15) + np.int8(16)).view(_U8).reshape(w.n, -1, 32)
    d = _exact_half(narrow.scales.astype(np.float32), "scales")
    return np.concatenate([d, _fifth(q), _payload(q, 32)], axis=-1)


def _write_q5_1(w: Weights) -> np.ndarray:
    wide = _eight_bits(w, 32)
    q = _codes(wide.q, 0, 31).view(_U8).reshape(w.n, -1, 32)
    minimum = np.zeros_like(wide.scales) if wide.minimum is None else wide.minimum
    d, m = _exact_half(wide.scales, "scales"), _exact_half(minimum, "minimum")
    return np.concatenate([d, m, _fifth(q), _payload(q, 32)], axis=-1)


def _eight_bits(w: Weights, size: int) -> WideWeights:
    """8-bit wide weights; INT4 by its codes and minimums, which keeps the codes from being negative."""
    if isinstance(w, Int4Weights):
        w = as_wide(w, 4)
    wide = _group(as_wide(w, 8), size)
    assert isinstance(wide, WideWeights)
    return wide


def _write_q8_0(w: Weights) -> np.ndarray:
    narrow = _group(as_int8(w), 32)
    assert isinstance(narrow, Int8Weights)
    q = narrow.q.reshape(w.n, -1, 32).view(_U8)
    return np.concatenate([_exact_half(narrow.scales.astype(np.float32), "scales"), q], axis=-1)


def _k_header(wide: WideWeights) -> np.ndarray:
    """d, dmin and the twelve bytes of 6-bit scales and mins: [B, 16]."""
    d, scale = _factor(wide.scales.reshape(-1, 8), 63, 0, "scales")
    least = np.zeros_like(wide.scales) if wide.minimum is None else -wide.minimum
    dmin, low = _factor(least.reshape(-1, 8), 63, 0, "minimum")
    sc, m = scale.astype(_U8), low.astype(_U8)
    twelve = np.concatenate(
        [
            sc[:, :4] | (sc[:, 4:] >> _U8(4)) << _U8(6),
            m[:, :4] | (m[:, 4:] >> _U8(4)) << _U8(6),
            sc[:, 4:] & _U8(15) | (m[:, 4:] & _U8(15)) << _U8(4),
        ],
        axis=1,
    )
    return np.concatenate([d, dmin, twelve], axis=1)


def _write_q4_k(w: Weights) -> np.ndarray:
    wide = _group(as_wide(w, 4), 32)
    assert isinstance(wide, WideWeights)
    if wide.codebook is not None:
        bad("codebook", "None (Q4_K has none)", "a codebook")
    _whole(wide.k, 256)
    return np.concatenate([_k_header(wide), _payload(wide.q.reshape(-1, 256), 64)], axis=1)


def _write_q5_k(w: Weights) -> np.ndarray:
    wide = _eight_bits(w, 32)
    _whole(wide.k, 256)
    q = _codes(wide.q, 0, 31).view(_U8).reshape(-1, 256)
    fifth = np.packbits((q.reshape(-1, 8, 32) >> _U8(4)).transpose(0, 2, 1), axis=2, bitorder="little")[..., 0]
    return np.concatenate([_k_header(wide), fifth, _payload(q, 64)], axis=1)


def _write_q6_k(w: Weights) -> np.ndarray:
    wide = _group(as_wide(as_int8(w), 8), 16)
    assert isinstance(wide, WideWeights)
    _whole(wide.k, 256)
    q = (_codes(wide.q, -32, 31) + np.int8(32)).view(_U8).reshape(-1, 256)
    d, scale = _factor(wide.scales.reshape(-1, 16), 127, -128, "scales")
    high = (q >> _U8(4)).reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], _U8).reshape(1, 1, 4, 1)
    two = (high[:, :, 0] | high[:, :, 1] | high[:, :, 2] | high[:, :, 3]).reshape(-1, 64)
    return np.concatenate([_payload(q, 128), two, scale.astype(np.int8).view(_U8), d], axis=1)


def _whole(k: int, size: int) -> None:
    if k % size:
        bad("K", f"a multiple of {size}", str(k))


def _coded(w: Weights, values: np.ndarray, size: int, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, G, size] into the table `values` and scales [N, G]; 0 at both of a table's zeros is the same weight."""
    wide = _group(w, size)
    if not isinstance(wide, WideWeights) or wide.codebook is None or not np.array_equal(wide.codebook, values):
        bad("codebook", f"the values of {type_name}", "others" if isinstance(wide, WideWeights) else "none")
    return wide.q.reshape(wide.n, -1, size), wide.scales


def _write_iq4_nl(w: Weights) -> np.ndarray:
    q, scales = _coded(w, IQ4_VALUES, 32, "IQ4_NL")
    return np.concatenate([_exact_half(scales, "scales"), _payload(q, 32)], axis=-1)


def _write_mxfp4(w: Weights) -> np.ndarray:
    q, scales = _coded(w, MXFP4_VALUES, 32, "MXFP4")
    exponents = np.arange(255, dtype=_U8)
    powers = e8m0_half(exponents)
    e = np.searchsorted(powers, scales).clip(0, 254).astype(_U8)
    if (powers[e] != scales).any():
        bad("scales", "powers of two, 2^-128..2^126", f"{scales[powers[e] != scales][0]}")
    return np.concatenate([e[..., None], _payload(q, 32)], axis=-1)


def _write_nvfp4(w: Weights) -> np.ndarray:
    q, scales = _coded(w, MXFP4_VALUES, 16, "NVFP4")
    _whole(w.k, 64)
    values = ue4m3_half(np.arange(127, dtype=_U8))
    e = np.searchsorted(values, scales).clip(0, 126).astype(_U8)
    if (values[e] != scales).any():
        bad("scales", "halves of unsigned E4M3 numbers", f"{scales[values[e] != scales][0]}")
    return np.concatenate([e.reshape(-1, 4), _payload(q, 16).reshape(-1, 32)], axis=1)


_WRITE: dict[str, Callable[[Weights], np.ndarray]] = {
    "Q4_0": lambda w: to_q4_0(as_int4(w)),
    "Q4_1": _write_q4_1,
    "Q5_0": _write_q5_0,
    "Q5_1": _write_q5_1,
    "Q8_0": _write_q8_0,
    "Q4_K": _write_q4_k,
    "Q5_K": _write_q5_k,
    "Q6_K": _write_q6_k,
    "IQ4_NL": _write_iq4_nl,
    "MXFP4": _write_mxfp4,
    "NVFP4": _write_nvfp4,
}

#: Types that `to_ggml` writes.
GGML_WRITABLE = tuple(_WRITE)


def to_ggml(w: Weights, type_name: str) -> np.ndarray:
    """Rows of blocks, uint8 [N, row_bytes], that hold exactly the same weights; FormatError where the type cannot.

    Any form that fits is taken: Q4_0 can be written as Q5_0, Q5_1 and Q8_0, for instance.
    """
    if type_name not in _WRITE:
        bad("type", f"one of {', '.join(GGML_WRITABLE)}", type_name)
    if isinstance(w, Int4Weights) and w.perm is not None:
        bad("perm", f"None ({type_name} has no order of its own for input features)", "act-order weights")
    try:
        return _WRITE[type_name](w).reshape(w.n, -1)
    except FormatError as exc:
        raise FormatError(f"{type_name}: {exc}") from None

"""GGML's block formats: sizes of all, and numpy dequantisers of the common ones.

The formats are those of ggml-common.h (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h); results equal
``gguf.quants.dequantize`` bit for bit, because the operations and their order are the same single-precision ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import FormatError

__all__ = ["GGML_TYPES", "IQ4_VALUES", "MXFP4_VALUES", "SUPPORTED", "GGMLType", "dequantize_rows"]


class GGMLType(NamedTuple):
    """A storage type: `block_size` weights in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


#: By the type id of the file. Ids that are missing were never assigned or have been withdrawn.
GGML_TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 40),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
}

_BY_NAME = {t.name: t for t in GGML_TYPES.values()}

#: E2M1's sixteen values, doubled so that they are integers: of MXFP4 and NVFP4.
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
#: Of IQ4_NL and IQ4_XS.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

# Weights handled at a time: a few temporaries of this many floats stay within a last-level cache, and memory bounded.
_CHUNK = 1 << 18


def _f16(b: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte `at` of every block, as float32 [n, 1]."""
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2").astype(np.float32)


def _halves(qs: np.ndarray) -> np.ndarray:
    """Low nibbles then high nibbles of every run: [n, r, c] -> [n, 2rc], run by run."""
    return np.concatenate([qs & np.uint8(15), qs >> np.uint8(4)], axis=2).reshape(len(qs), -1)


def _fifth_bits(b: np.ndarray, at: int) -> np.ndarray:
    """Bit 4 of each of 32 weights, from the 32-bit word at byte `at`: [n, 32], 0 or 16."""
    return np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _f32(b: np.ndarray) -> np.ndarray:
    return b.view("<f4").astype(np.float32, copy=False)


def _half(b: np.ndarray) -> np.ndarray:
    return b.view("<f2").astype(np.float32)


def _bf16(b: np.ndarray) -> np.ndarray:
    return (b.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(b: np.ndarray) -> np.ndarray:
    q = _halves(b[:, None, 2:]).view(np.int8) - np.int8(8)
    return _f16(b, 0) * q.astype(np.float32)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * _halves(b[:, None, 4:]).astype(np.float32) + _f16(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    q = (_halves(b[:, None, 6:]) | _fifth_bits(b, 2)).view(np.int8) - np.int8(16)
    return _f16(b, 0) * q.astype(np.float32)


def _q5_1(b: np.ndarray) -> np.ndarray:
    q = _halves(b[:, None, 8:]) | _fifth_bits(b, 4)
    return _f16(b, 0) * q.astype(np.float32) + _f16(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b[:, 2:].view(np.int8).astype(np.float32) * _f16(b, 0)


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``d * scale`` and ``dmin * min`` of the eight sub-blocks of Q4_K and Q5_K, float32 [n, 8, 1].

    Twelve bytes hold eight 6-bit scales and eight 6-bit mins: bytes 0-3 the low four scales, 4-7 the low four mins,
    each with two bits of the high ones on top; 8-11 the low nibbles of the high four scales, and of the high four mins.
    """
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & np.uint8(63), (high & np.uint8(15)) | ((low >> np.uint8(2)) & np.uint8(48))], axis=1)
    least = np.concatenate([mid & np.uint8(63), (high >> np.uint8(4)) | ((mid >> np.uint8(2)) & np.uint8(48))], axis=1)
    return (_f16(b, 0) * scale.astype(np.float32))[:, :, None], (_f16(b, 2) * least.astype(np.float32))[:, :, None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    d, m = _k_scales(b)
    q = _halves(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def _q5_k(b: np.ndarray) -> np.ndarray:
    d, m = _k_scales(b)
    fifth = np.unpackbits(b[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1) << np.uint8(4)
    q = _halves(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def _q6_k(b: np.ndarray) -> np.ndarray:
    d = (_f16(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32))[:, :, None]
    low = _halves(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 8, 32)
    q = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    return (d * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def e8m0_half(e: np.ndarray) -> np.ndarray:
    """2^(e - 128) for exponents uint8, as float32: half of E8M0, for the doubled values; 2^127 for 255 (a NaN)."""
    wide = e.astype(np.uint32)
    low = np.uint32(0x00200000) << np.minimum(wide, 1)  # 2^-128 and 2^-127 are subnormal
    return np.where(e < 2, low, (wide - np.uint32(1)) << np.uint32(23)).view(np.float32)


def ue4m3_half(x: np.ndarray) -> np.ndarray:
    """Half of the unsigned E4M3 numbers in uint8, as float32; the NaN 0x7f is 0, as ggml has it."""
    exponent, mantissa = (x >> np.uint8(3) & np.uint8(15)).astype(np.int32), (x & np.uint8(7)).astype(np.float32)
    normal = np.ldexp(mantissa / 8 + 1, exponent - 8)
    value = np.where(exponent == 0, mantissa * np.float32(2**-10), normal)
    return np.where(x == 127, np.float32(0), value).astype(np.float32)


def iq4_xs_scales(b: np.ndarray) -> np.ndarray:
    """``d * scale`` of the eight sub-blocks of IQ4_XS, float32 [n, 8]: 4 low bits in bytes 4-7, 2 high in bytes 2-3."""
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> (2 * np.arange(8, dtype=np.uint16)) & np.uint16(3)
    low = np.stack([b[:, 4:8] & np.uint8(15), b[:, 4:8] >> np.uint8(4)], axis=-1).reshape(-1, 8)
    scale = (low | high.astype(np.uint8) << np.uint8(4)).view(np.int8) - np.int8(32)
    return _f16(b, 0) * scale.astype(np.float32)


def q2_k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``d * scale`` and ``dmin * min`` of the sixteen sub-blocks of Q2_K, float32 [n, 16], 4 bits each."""
    return _f16(b, 80) * (b[:, :16] & np.uint8(15)).astype(np.float32), _f16(b, 82) * (b[:, :16] >> np.uint8(4)).astype(
        np.float32
    )


def q2_codes(qs: np.ndarray) -> np.ndarray:
    """Codes 0..3 [n, 256] of 64 bytes: of every 32 bytes bits 0-1 are the first 32 weights, 2-3 the next, and so on."""
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (qs.reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)).reshape(-1, 256)


def q3_k_scales(b: np.ndarray) -> np.ndarray:
    """``d * scale`` of the sixteen sub-blocks of Q3_K, float32 [n, 16].

    Twelve bytes hold sixteen 6-bit scales less 32: bytes 0-7 the low nibbles, of scales 0-7 low and of 8-15 high; byte
    8 + i bits 2j and up the two high bits of scale 4j + i.
    """
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & np.uint8(15), packed[:, :8] >> np.uint8(4)], axis=1)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    high = (packed[:, None, 8:] >> shifts & np.uint8(3)).reshape(-1, 16)
    scale = (low | high << np.uint8(4)).view(np.int8) - np.int8(32)
    return _f16(b, 108) * scale.astype(np.float32)


def q3_codes(b: np.ndarray) -> np.ndarray:
    """Codes -4..3 of Q3_K, int8 [n, 256]: two bits in bytes 32-95, less 4 where the bit in bytes 0-31 is not set."""
    high = np.unpackbits(b[:, :32, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(-1, 256)
    return q2_codes(b[:, 32:96]).view(np.int8) - ((high ^ np.uint8(1)) << np.uint8(2)).view(np.int8)


def _q2_k(b: np.ndarray) -> np.ndarray:
    d, m = q2_k_scales(b)
    q = q2_codes(b[:, 16:80]).reshape(-1, 16, 16)
    return (d[:, :, None] * q.astype(np.float32) - m[:, :, None]).reshape(-1, 256)


def _q3_k(b: np.ndarray) -> np.ndarray:
    return (q3_k_scales(b)[:, :, None] * q3_codes(b).reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return _f16(b, 0) * IQ4_VALUES[_halves(b[:, None, 2:])]


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    values = IQ4_VALUES[_halves(b[:, 8:].reshape(-1, 8, 16)).reshape(-1, 8, 32)]
    return (iq4_xs_scales(b)[:, :, None] * values).reshape(-1, 256)


def _mxfp4(b: np.ndarray) -> np.ndarray:
    return e8m0_half(b[:, :1]) * MXFP4_VALUES[_halves(b[:, None, 1:])]


def _nvfp4(b: np.ndarray) -> np.ndarray:
    values = MXFP4_VALUES[_halves(b[:, 4:].reshape(-1, 4, 8)).reshape(-1, 4, 16)]
    return (ue4m3_half(b[:, :4])[:, :, None] * values).reshape(-1, 64)


_DEQUANTIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32,
    "F16": _half,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}

#: Names of the types that `dequantize_rows` knows.
SUPPORTED = tuple(_DEQUANTIZERS)


def dequantize_rows(rows: np.ndarray, type_name: str) -> np.ndarray:
    """Expands rows of blocks.

    Parameters
    ----------
    rows : uint8 [R, row_bytes]
        Any strides; chunks of it are copied.
    type_name
        "Q4_K", ...

    Returns
    -------
    float32 [R, K]
        With ``K = row_bytes / block_bytes * block_size``.

    Raises
    ------
    FormatError
        A type that has no dequantiser here, or rows that are no whole number of blocks.
    """
    dequantizer = _DEQUANTIZERS.get(type_name)
    if dequantizer is None:
        raise FormatError(f"type {type_name}: expected one of {', '.join(SUPPORTED)} to dequantise")
    if rows.ndim != 2 or rows.dtype != np.uint8:
        raise ValueError(f"rows: expected uint8 [R, row_bytes], got {rows.dtype} {list(rows.shape)}")
    _, block_size, block_bytes = _BY_NAME[type_name]
    count, row_bytes = rows.shape
    if row_bytes % block_bytes:
        raise FormatError(f"rows: expected a multiple of {block_bytes} bytes ({type_name}), got {row_bytes}")
    k = row_bytes // block_bytes * block_size
    out = np.empty((count, k), np.float32)
    step = max(1, _CHUNK // max(k, 1))
    with np.errstate(all="ignore"):  # infinite and NaN scales are the file's own and propagate
        for at in range(0, count, step):
            blocks = np.ascontiguousarray(rows[at : at + step]).reshape(-1, block_bytes)
            out[at : at + step] = dequantizer(blocks).reshape(-1, k)
    return out

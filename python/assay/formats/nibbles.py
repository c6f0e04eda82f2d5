"""Codes of 4 bits: two to a byte, the even column in the low nibble, or eight to a 32-bit word."""

import numpy as np

WORDS = ("int32", "uint32")


def pack(q: np.ndarray) -> np.ndarray:
    """uint8 [..., C] to uint8 [..., ceil(C/2)]."""
    both = q[..., 0::2].copy(order="C")
    both[..., : q.shape[-1] // 2] |= q[..., 1::2] << np.uint8(4)
    return both


def unpack(both: np.ndarray) -> np.ndarray:
    """uint8 [R, C/2] to uint8 [R, C]."""
    out = np.empty((both.shape[0], 2 * both.shape[1]), np.uint8)
    np.bitwise_and(both, np.uint8(15), out=out[:, 0::2])
    np.right_shift(both, np.uint8(4), out=out[:, 1::2])
    return out


def from_words(words: np.ndarray) -> np.ndarray:
    """32-bit [R, C] to uint8 [R, 8C], element i of a row at bit 4i: in bytes, low nibble first."""
    kind = "<i4" if words.dtype.kind == "i" else "<u4"
    return unpack(np.ascontiguousarray(words, kind).view(np.uint8))


def to_words(q: np.ndarray) -> np.ndarray:
    """uint8 [R, 8C] to int32 [R, C]."""
    return pack(q).view("<i4").astype(np.int32, copy=False)

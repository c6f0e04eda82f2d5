"""GPTQ, versions 1 and 2.

qweight i32 [K/8, N], bits 4j of word r are row 8r + j; qzeros i32 [G, N/8]; scales [G, N]; g_idx i32 [K], the group of every
input feature. Version 1 stores a zero point less one. https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear
"""

import numpy as np

from .._checks import bad, eights, expect, scales_of, whole_groups
from ..nibbles import WORDS, from_words, to_words
from ..weights import Int4Weights, zeros_or_none
from .act_order import group_indices, in_file_order, in_groups, order_of

_ONES = np.uint32(0x11111111)  # one in every nibble


def from_gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray | None,
    scales: np.ndarray,
    g_idx: np.ndarray | None = None,
    *,
    group_size: int,
    version: int = 1,
    zero_16: str = "wrap",
    scales_dtype: str | None = None,
    name: str = "",
) -> Int4Weights:
    """Reads one GPTQ linear.

    Parameters
    ----------
    qweight : int32 [K/8, N]
    qzeros : int32 [G, N/8] or None
        None: symmetric, every zero point 8.
    scales : float16, float32, or raw bfloat16 as uint16 [G, N]
    g_idx : int32 [K], optional
        Group of every input feature; without it, or when it is k // group_size, there is no permutation.
    group_size : int
        Of the checkpoint's configuration; -1 for one group a row.
    version : {1, 2}
        ``checkpoint_format``: "gptq" is 1 (zero points stored less one), "gptq_v2" is 2.
    zero_16 : {"wrap", "carry", "error"}
        Version 1 stores both z = 0 and z = 16 as 15. "wrap" reads (stored + 1) & 15, nibble by nibble, as AutoGPTQ
        computes. "carry" adds 0x11111111 to the word, so that a stored 15 carries into the next nibble, as GPTQModel
        reads what it wrote by subtracting the same. "error" refuses such a checkpoint.
    scales_dtype : str, optional
        "bfloat16" when `scales` is raw.
    name : str
        Of the module, for messages.

    Raises
    ------
    FormatError
        Naming the tensor, what was wanted and what came.
    """
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version}")
    if zero_16 not in ("wrap", "carry", "error"):
        raise ValueError(f"zero_16: expected 'wrap', 'carry' or 'error', got {zero_16!r}")
    at = f"{name}." if name else ""
    expect(qweight, f"{at}qweight", WORDS, (None, None), says=" (K/8, N)")
    k, n = 8 * qweight.shape[0], qweight.shape[1]
    eights(f"{at}qweight", K=k, N=n)
    size, groups = whole_groups(k, group_size, f"{at}qweight")
    s = scales_of(scales, f"{at}scales", (groups, n), scales_dtype, " (K/group_size, N)")
    zeros = None
    if qzeros is not None:
        expect(qzeros, f"{at}qzeros", WORDS, (groups, n // 8), says=" (K/group_size, N/8)")
        stored = from_words(qzeros)
        if version == 1:
            if zero_16 == "error" and (stored == 15).any():
                g, column = np.argwhere(stored == 15)[0]
                bad(f"{at}qzeros", "stored zero points 0..14 (version 1 stores zero - 1)", f"15 at [{g}, {column}]")
            if zero_16 == "carry":
                stored = from_words(qzeros.astype(np.uint32, casting="unsafe") + _ONES)
            else:
                stored = (stored + np.uint8(1)) & np.uint8(15)
        zeros = zeros_or_none(stored.T)
    perm = order_of(g_idx, f"{at}g_idx", k, size)
    q = from_words(qweight.T)
    return Int4Weights(in_groups(q, perm), np.ascontiguousarray(s.T), zeros, size, perm)


def to_gptq(w: Int4Weights, *, version: int = 1, zero_16: str = "wrap") -> dict[str, np.ndarray]:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` as a GPTQ checkpoint holds them (see `from_gptq`).

    N and K must be multiples of 8. Scales keep their dtype. `zero_16`, "wrap" or "carry", is how version 1 is going to
    be read.
    """
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version}")
    if zero_16 not in ("wrap", "carry"):
        raise ValueError(f"zero_16: expected 'wrap' or 'carry', got {zero_16!r}")
    eights("q", K=w.k, N=w.n)
    zeros = w.zero_points().T
    if version == 1 and zero_16 == "wrap":
        zeros = (zeros - np.uint8(1)) & np.uint8(15)
    words = to_words(zeros)
    if version == 1 and zero_16 == "carry":
        words = (words.view(np.uint32) - _ONES).view(np.int32)
    return {
        "qweight": np.ascontiguousarray(to_words(in_file_order(w)).T),
        "qzeros": words,
        "scales": np.ascontiguousarray(w.scales.T),
        "g_idx": group_indices(w),
    }

"""AWQ, version "gemm".

qweight i32 [K, N/8], qzeros i32 [G, N/8], scales [G, N]; bits 4i of word c are column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
https://github.com/casper-hansen/AutoAWQ, utils/packing_utils
"""

from collections.abc import Sequence

import numpy as np

from .._checks import eights, expect, scales_of, whole_groups
from ..nibbles import WORDS, from_words, to_words
from ..weights import Int4Weights, zeros_or_none
from .act_order import refuse_order

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of 8 that each nibble of a word holds
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # and back: nibble that holds each column


def from_awq(
    qweight: np.ndarray,
    qzeros: np.ndarray | None,
    scales: np.ndarray,
    *,
    group_size: int,
    scales_dtype: str | None = None,
    name: str = "",
) -> Int4Weights:
    """Reads one AWQ linear of version "gemm".

    Parameters
    ----------
    qweight : int32 [K, N/8]
    qzeros : int32 [G, N/8] or None
        None: symmetric, every zero point 8.
    scales : float16, float32, or raw bfloat16 as uint16 [G, N]
    group_size, scales_dtype, name
        As for `from_gptq`.

    Raises
    ------
    FormatError
        Naming the tensor, what was wanted and what came.
    """
    at = f"{name}." if name else ""
    expect(qweight, f"{at}qweight", WORDS, (None, None), says=" (K, N/8)")
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    eights(f"{at}qweight", K=k, N=n)
    size, groups = whole_groups(k, group_size, f"{at}qweight")
    s = scales_of(scales, f"{at}scales", (groups, n), scales_dtype, " (K/group_size, N)")
    zeros = None
    if qzeros is not None:
        expect(qzeros, f"{at}qzeros", WORDS, (groups, n // 8), says=" (K/group_size, N/8)")
        zeros = zeros_or_none(_columns(from_words(qzeros), _NIBBLE).T)
    q = np.ascontiguousarray(_columns(from_words(qweight), _NIBBLE).T)
    return Int4Weights(q, np.ascontiguousarray(s.T), zeros, size)


def to_awq(w: Int4Weights) -> dict[str, np.ndarray]:
    """``qweight``, ``qzeros`` and ``scales`` as an AWQ "gemm" checkpoint holds them (see `from_awq`).

    N and K must be multiples of 8; act-order weights are refused.
    """
    refuse_order(w, "AWQ")
    eights("q", K=w.k, N=w.n)
    return {
        "qweight": to_words(_columns(w.q.T, _ORDER)),
        "qzeros": to_words(_columns(w.zero_points().T, _ORDER)),
        "scales": np.ascontiguousarray(w.scales.T),
    }


def _columns(codes: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Codes [R, C] with every eight columns in another order."""
    return codes.reshape(len(codes), -1, 8)[..., list(order)].reshape(codes.shape)

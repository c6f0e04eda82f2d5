"""HQQ's "4bit_u8".

Groups as rows u8 [N G / 2, group_size], the first half of the rows in the high nibbles; scale and float zero [N G, 1].
https://github.com/mobiusml/hqq, core/bitpack.py
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._checks import bad, eights, expect, matrix_shape, scales_of, whole_groups
from ..weights import Int4Weights, zeros_or_none
from .act_order import refuse_order


def from_hqq(
    W_q: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    shape: Sequence[int],
    *,
    group_size: int,
    axis: int = 1,
    scales_dtype: str | None = None,
    name: str = "",
) -> Int4Weights:
    """Reads one HQQ linear packed as "4bit_u8", where its float zero points are integers of 0..15.

    HQQ's optimiser moves zero points off the integers; such a checkpoint has no exact INT4 form and is refused with
    a FormatError that says so.

    Parameters
    ----------
    W_q : uint8 [N G / 2, group_size]
        First half of the groups in the high nibbles.
    scale, zero : float16, float32, or raw bfloat16 as uint16 [N G, 1]
        w = (q - zero) scale
    shape : (N, K)
        ``meta["shape"]``
    axis : int
        ``meta["axis"]``; groups run along K only with 1.
    scales_dtype : str, optional
        "bfloat16" when `scale` and `zero` are raw.
    group_size, name
        As for `from_gptq`.
    """
    q, s, z, size = read_groups(
        W_q, scale, zero, shape, group_size=group_size, axis=axis, scales_dtype=scales_dtype, name=name
    )
    exact = (z == np.rint(z)) & (z >= 0) & (z <= 15)
    if not exact.all():
        first = int(np.flatnonzero(~exact)[0])
        bad(
            f"{name}.zero" if name else "zero",
            "integers of 0..15 (other zero points are not representable without loss)",
            f"{z.flat[first]} in group {first}, and so on in {int((~exact).sum())} of {z.size} groups",
        )
    return Int4Weights(q, s, zeros_or_none(z.astype(np.uint8)), size)


def to_hqq(w: Int4Weights) -> dict[str, Any]:
    """``W_q``, ``scale``, ``zero`` and ``shape`` of HQQ's "4bit_u8" with axis 1 (see `from_hqq`).

    K must be a multiple of 8 and the number of groups even; act-order weights are refused.
    """
    refuse_order(w, "HQQ")
    eights("q", K=w.k)
    return group_tensors(w.q, w.scales, w.zero_points().astype(w.scales.dtype))


def read_groups(
    W_q: np.ndarray, scale: np.ndarray, zero: np.ndarray, shape: Sequence[int], *, group_size: int, axis: int,
    scales_dtype: str | None, name: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:  # fmt: skip
    """Codes uint8 [N, K], scales and zero points [N, G], and the group size; parameters as `from_hqq`."""
    at = f"{name}." if name else ""
    if axis != 1:
        bad(f"{at}axis", "1 (with axis 0 a group is not a run along K: not representable)", str(axis))
    n, k = matrix_shape(shape, f"{at}shape")
    eights(f"{at}shape", K=k)
    size, per_row = whole_groups(k, group_size, f"{at}shape")
    groups = n * per_row
    if groups % 2:
        bad(f"{at}shape", "an even number of groups (two share a byte)", f"{groups}")
    expect(W_q, f"{at}W_q", ("uint8",), (groups // 2, size), says=" (N G / 2, group_size)")
    s = scales_of(scale, f"{at}scale", (groups, 1), scales_dtype, " (N G, 1)")
    z = scales_of(zero, f"{at}zero", (groups, 1), scales_dtype, " (N G, 1)")
    q = np.concatenate([W_q >> np.uint8(4), W_q & np.uint8(15)])
    return q.reshape(n, k), s.reshape(n, per_row), z.reshape(n, per_row), size


def group_tensors(q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> dict[str, Any]:
    """``W_q``, ``scale``, ``zero`` and ``shape`` of codes [N, K] with scales and zero points [N, G]."""
    if scale.size % 2:
        bad("q", "an even number of groups (two share a byte)", f"{scale.size}")
    groups = q.reshape(scale.size, -1)
    half = len(groups) // 2
    return {
        "W_q": groups[:half] << np.uint8(4) | groups[half:],
        "scale": scale.reshape(-1, 1),
        "zero": zero.reshape(-1, 1),
        "shape": q.shape,
    }

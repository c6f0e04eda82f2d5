"""compressed-tensors' "pack-quantized".

weight_packed i32 [N, K/8], element i of a row at bit 4i; weight_scale [N, G]; weight_zero_point i32 [ceil(N/8), G], packed
along N; codes and zeros stored plus 8; weight_shape; weight_g_idx.
https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized
"""

import numpy as np

from .._checks import bad, eights, expect, scales_of, whole_groups
from ..nibbles import WORDS, from_words, to_words
from ..weights import Int4Weights, zeros_or_none
from .act_order import group_indices, in_file_order, in_groups, order_of


def from_compressed_tensors(
    weight_packed: np.ndarray,
    weight_scale: np.ndarray,
    weight_shape: np.ndarray,
    weight_zero_point: np.ndarray | None = None,
    weight_g_idx: np.ndarray | None = None,
    *,
    group_size: int,
    scales_dtype: str | None = None,
    name: str = "",
) -> Int4Weights:
    """Reads one linear of compressed-tensors' "pack-quantized" format, 4 bits.

    Parameters
    ----------
    weight_packed : int32 [N, K/8]
    weight_scale : float16, float32, or raw bfloat16 as uint16 [N, G]
    weight_shape : int32 or int64 [2]
        (N, K)
    weight_zero_point : int32 [ceil(N/8), G] or int8 [N, G], optional
        Packed along N, or (older writers) one signed zero point to a byte.
    weight_g_idx : int32 [K], optional
        As GPTQ's g_idx; all -1 is as good as absent.
    group_size, scales_dtype, name
        As for `from_gptq`; -1 for the strategy "channel".

    Raises
    ------
    FormatError
        Naming the tensor, what was wanted and what came.
    """
    at = f"{name}." if name else ""
    expect(weight_shape, f"{at}weight_shape", ("int32", "int64"), (2,), says=" (N and K)")
    n, k = (int(x) for x in weight_shape)
    if n < 1:
        bad(f"{at}weight_shape", "N >= 1", f"N = {n}")
    eights(f"{at}weight_shape", K=k)
    expect(weight_packed, f"{at}weight_packed", WORDS, (n, k // 8), says=" (N, K/8)")
    size, groups = whole_groups(k, group_size, f"{at}weight_shape")
    s = scales_of(weight_scale, f"{at}weight_scale", (n, groups), scales_dtype, " (N, K/group_size)")
    zeros = None
    if weight_zero_point is not None:
        where = f"{at}weight_zero_point"
        if isinstance(weight_zero_point, np.ndarray) and weight_zero_point.dtype == np.int8:
            z = expect(weight_zero_point, where, ("int8",), (n, groups), says=" (N, K/group_size)")
            if z.min() < -8 or z.max() > 7:
                bad(where, "-8..7", str(z.min() if z.min() < -8 else z.max()))
            zeros = zeros_or_none((z + np.int8(8)).astype(np.uint8))
        else:
            expect(weight_zero_point, where, WORDS, (-(-n // 8), groups), says=" (ceil(N/8), K/group_size)")
            zeros = zeros_or_none(from_words(weight_zero_point.T)[:, :n].T)
    perm = order_of(weight_g_idx, f"{at}weight_g_idx", k, size)
    q = from_words(weight_packed)
    return Int4Weights(in_groups(q, perm), s, zeros, size, perm)


def to_compressed_tensors(w: Int4Weights) -> dict[str, np.ndarray]:
    """``weight_packed``, ``weight_scale``, ``weight_shape``, and where there are any ``weight_zero_point`` and
    ``weight_g_idx`` (see `from_compressed_tensors`).

    K must be a multiple of 8.
    """
    eights("q", K=w.k)
    out = {
        "weight_packed": to_words(in_file_order(w)),
        "weight_scale": w.scales,
        "weight_shape": np.array([w.n, w.k], np.int64),
    }
    if w.zeros is not None:
        padded = np.pad(w.zeros, ((0, -w.n % 8), (0, 0)))
        out["weight_zero_point"] = np.ascontiguousarray(to_words(padded.T).T)
    if w.perm is not None:
        out["weight_g_idx"] = group_indices(w)
    return out

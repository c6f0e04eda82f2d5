"""INT4 checkpoints of other projects, repacked both ways without changing a weight.

Every converter goes through one form, `Int4Weights`: codes one to a byte, ``w = scale (q - zero)`` in groups along K.
The layouts, with W of N output and K input features and G groups a row:

======================  ============================================================================================
GPTQ (v1, v2)           qweight i32 [K/8, N], bits 4j of word r are row 8r+j; qzeros i32 [G, N/8]; scales [G, N]; g_idx
                        i32 [K], the group of every input feature. Version 1 stores a zero point less one.
                        https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear
AWQ (gemm)              qweight i32 [K, N/8], qzeros i32 [G, N/8], scales [G, N]; bits 4i of word c are column
                        8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. https://github.com/casper-hansen/AutoAWQ, utils/packing_utils
compressed-tensors      weight_packed i32 [N, K/8], element i of a row at bit 4i; weight_scale [N, G]; weight_zero_point
(pack-quantized)        i32 [ceil(N/8), G], packed along N; codes and zeros stored plus 8; weight_shape; weight_g_idx.
                        https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized
GGUF Q4_0, Q4_1         blocks of 32: f16 d (and m), then 16 bytes, byte j the elements j (low) and j + 16 (high).
                        d (q - 8), or d q + m. https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
HQQ (4bit_u8)           groups as rows u8 [N G / 2, group_size], the first half of the rows in the high nibbles; scale
                        and float zero [N G, 1]. https://github.com/mobiusml/hqq, core/bitpack.py
======================  ============================================================================================

What a format cannot hold exactly is refused by name, never rounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..errors import FormatError

__all__ = [
    "Int4Weights",
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "from_hqq",
    "from_q4_0",
    "from_q4_1",
    "to_awq",
    "to_compressed_tensors",
    "to_gptq",
    "to_hqq",
    "to_q4_0",
    "to_q4_1",
]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of 8 that each nibble of a word holds
_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # and back: nibble that holds each column
_WORDS = ("int32", "uint32")
_ONES = np.uint32(0x11111111)  # one in every nibble
_BLOCK = 32  # weights of a GGML block


@dataclass(frozen=True, eq=False)
class Int4Weights:
    """INT4 weights, unpacked: ``w[n, k] = scales[n, g] (q[n, k] - zeros[n, g])`` with ``g = k // group_size``.

    Attributes
    ----------
    q : uint8 [N, K]
        Codes 0..15. With `perm`, columns are in the order of their groups.
    scales : float16 or float32 [N, G]
        Finite.
    zeros : uint8 [N, G] or None
        Zero points 0..15; None means 8 everywhere. The ``from_*`` converters never give an array of all 8.
    group_size : int
        Weights along K that share a scale; divides K.
    perm : int32 [K] or None
        Column j of `q` is input feature ``perm[j]`` (GPTQ's act-order): multiply ``a[:, perm]``, not ``a``.

    Raises
    ------
    ValueError
        Naming the field, what was wanted and what came.
    """

    q: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    group_size: int
    perm: np.ndarray | None = None

    def __post_init__(self) -> None:
        _expect(self.q, "q", ("uint8",), (None, None), ValueError)
        n, k = self.q.shape
        if n < 1 or k < 1:
            raise ValueError(f"q: expected uint8 [N, K] with N, K >= 1, got {[n, k]}")
        if self.group_size < 1 or k % self.group_size:
            raise ValueError(f"group_size: expected a divisor of K = {k}, got {self.group_size}")
        grid = (n, k // self.group_size)
        _expect(self.scales, "scales", ("float16", "float32"), grid, ValueError)
        if not np.isfinite(self.scales).all():
            raise ValueError("scales: expected finite values, got a NaN or infinity")
        if self.q.max() > 15:
            raise ValueError(f"q: expected 0..15, got {self.q.max()}")
        if self.zeros is not None:
            _expect(self.zeros, "zeros", ("uint8",), grid, ValueError)
            if self.zeros.max() > 15:
                raise ValueError(f"zeros: expected 0..15, got {self.zeros.max()}")
        if self.perm is not None:
            _expect(self.perm, "perm", ("int32",), (k,), ValueError)
            if not np.array_equal(np.sort(self.perm), np.arange(k)):
                raise ValueError(f"perm: expected every number of 0..{k - 1} once")

    @property
    def n(self) -> int:
        """Output features."""
        return self.q.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.q.shape[1]

    def pack_args(self) -> dict[str, Any]:
        """Arguments of `assay.pack`: ``assay.pack(**w.pack_args())``.

        qweight uint8 [N, ceil(K/2)] (low nibble = even k), scales, zeros, k and group_size. `assay.pack` keeps scales
        as float16, so float32 scales that float16 cannot hold are rounded there, and there only.
        """
        return {
            "qweight": _pack(self.q),
            "scales": self.scales,
            "zeros": None if self.zeros is None else np.ascontiguousarray(self.zeros),
            "k": self.k,
            "group_size": self.group_size,
        }

    def dequantize(self) -> np.ndarray:
        """float32 [N, K], columns in the layer's own order (`perm` undone)."""
        groups = self.q.reshape(self.n, -1, self.group_size).astype(np.float32)
        groups -= np.float32(8) if self.zeros is None else self.zeros[..., None].astype(np.float32)
        groups *= self.scales[..., None].astype(np.float32)
        w = groups.reshape(self.n, self.k)
        if self.perm is None:
            return w
        out = np.empty_like(w)
        out[:, self.perm] = w
        return out


# ---- checks --------------------------------------------------------------------------------------------------------


def _expect(
    array: Any,
    where: str,
    dtypes: Sequence[str],
    shape: Sequence[int | None],
    error: type[ValueError] = FormatError,
    says: str = "",
) -> np.ndarray:
    """`array`, if it is of one of the dtypes and of the shape; None in a shape stands for any size."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{where}: expected numpy.ndarray, got {type(array).__name__}")
    fits = len(array.shape) == len(shape) and all(w is None or w == s for s, w in zip(array.shape, shape, strict=True))
    if array.dtype.name not in dtypes or not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise error(f"{where}: expected {' or '.join(dtypes)} [{wanted}]{says}, got {array.dtype} {list(array.shape)}")
    return array


def _bad(where: str, wanted: str, got: str) -> NoReturn:
    raise FormatError(f"{where}: expected {wanted}, got {got}")


def _groups(k: int, group_size: int, where: str) -> tuple[int, int]:
    """(group size, groups a row); -1 stands for one group a row."""
    size = k if group_size == -1 else group_size
    if size < 1:
        _bad(where, "a positive group_size or -1", str(group_size))
    if k % size:
        _bad(where, f"K to be a multiple of group_size = {size} (no short last group)", f"K = {k}")
    return size, k // size


def _eights(where: str, **sizes: int) -> None:
    for axis, size in sizes.items():
        if size % 8 or size < 1:
            _bad(where, f"{axis} to be a multiple of 8 (eight codes to a word)", f"{axis} = {size}")


def _scales(array: Any, where: str, shape: tuple[int, int], dtype: str | None, says: str) -> np.ndarray:
    """float16 and float32 as they are; bfloat16, as raw uint16, widened exactly."""
    if dtype not in (None, "float16", "float32", "bfloat16"):
        raise ValueError(f"scales_dtype: expected 'float16', 'float32' or 'bfloat16', got {dtype!r}")
    if dtype == "bfloat16":
        raw = _expect(array, where, ("uint16",), shape, says=says + " (raw bfloat16)")
        scales = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        scales = _expect(array, where, (dtype,) if dtype else ("float16", "float32"), shape, says=says)
    if not np.isfinite(scales).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(scales))[0])
        _bad(where, "finite scales", f"{scales[bad]} at {list(bad)}")
    return np.array(scales, order="C")  # a copy: tensors of a file may be unaligned, and are the file's


def _zeros_or_none(zeros: np.ndarray) -> np.ndarray | None:
    """None for the symmetric case: the kernels have a faster form for it."""
    return None if (zeros == 8).all() else np.ascontiguousarray(zeros)


def _zeros_of(w: Int4Weights) -> np.ndarray:
    return np.full(w.scales.shape, 8, np.uint8) if w.zeros is None else w.zeros


def _order(g_idx: Any, where: str, k: int, group_size: int) -> np.ndarray | None:
    """Permutation that sorts input features by group; None when they are sorted, or the tensor is absent."""
    if g_idx is None:
        return None
    _expect(g_idx, where, ("int32", "int64"), (k,), says=" (K)")
    if (g_idx == -1).all():  # compressed-tensors' value before one is assigned
        return None
    groups = k // group_size
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        _bad(where, f"groups 0..{groups - 1}", f"{low if low < 0 else high}")
    counts = np.bincount(g_idx, minlength=groups)
    uneven = np.flatnonzero(counts != group_size)
    if uneven.size:
        _bad(where, f"every group {group_size} times", f"group {uneven[0]} {counts[uneven[0]]} times")
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if np.array_equal(perm, np.arange(k)) else perm


def _sorted(q: np.ndarray, perm: np.ndarray | None) -> np.ndarray:
    return q if perm is None else np.ascontiguousarray(q[:, perm])


def _g_idx(w: Int4Weights) -> np.ndarray:
    """The group of every input feature, in the layer's own order."""
    groups = (np.arange(w.k) // w.group_size).astype(np.int32)
    if w.perm is None:
        return groups
    out = np.empty_like(groups)
    out[w.perm] = groups
    return out


def _in_file_order(w: Int4Weights) -> np.ndarray:
    if w.perm is None:
        return w.q
    out = np.empty_like(w.q)
    out[:, w.perm] = w.q
    return out


def _refuse_perm(w: Int4Weights, name: str) -> None:
    if w.perm is not None:
        _bad("perm", f"None ({name} has no order of its own for input features)", "act-order weights")


# ---- nibbles -------------------------------------------------------------------------------------------------------


def _pack(q: np.ndarray) -> np.ndarray:
    """uint8 [R, C] to uint8 [R, ceil(C/2)], low nibble = even column."""
    both = q[:, 0::2].copy(order="C")
    both[:, : q.shape[1] // 2] |= q[:, 1::2] << np.uint8(4)
    return both


def _unpack(both: np.ndarray) -> np.ndarray:
    out = np.empty((both.shape[0], 2 * both.shape[1]), np.uint8)
    np.bitwise_and(both, np.uint8(15), out=out[:, 0::2])
    np.right_shift(both, np.uint8(4), out=out[:, 1::2])
    return out


def _from_words(words: np.ndarray) -> np.ndarray:
    """32-bit [R, C] to uint8 [R, 8C], element i of a row at bit 4i: in bytes, low nibble first."""
    kind = "<i4" if words.dtype.kind == "i" else "<u4"
    return _unpack(np.ascontiguousarray(words, kind).view(np.uint8))


def _to_words(q: np.ndarray) -> np.ndarray:
    """uint8 [R, 8C] to int32 [R, C]."""
    return _pack(q).view("<i4").astype(np.int32, copy=False)


# ---- GPTQ ----------------------------------------------------------------------------------------------------------


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
    _expect(qweight, f"{at}qweight", _WORDS, (None, None), says=" (K/8, N)")
    k, n = 8 * qweight.shape[0], qweight.shape[1]
    _eights(f"{at}qweight", K=k, N=n)
    size, groups = _groups(k, group_size, f"{at}qweight")
    s = _scales(scales, f"{at}scales", (groups, n), scales_dtype, " (K/group_size, N)")
    zeros = None
    if qzeros is not None:
        _expect(qzeros, f"{at}qzeros", _WORDS, (groups, n // 8), says=" (K/group_size, N/8)")
        stored = _from_words(qzeros)
        if version == 1:
            if zero_16 == "error" and (stored == 15).any():
                g, column = np.argwhere(stored == 15)[0]
                _bad(f"{at}qzeros", "stored zero points 0..14 (version 1 stores zero - 1)", f"15 at [{g}, {column}]")
            if zero_16 == "carry":
                stored = _from_words(qzeros.astype(np.uint32, casting="unsafe") + _ONES)
            else:
                stored = (stored + np.uint8(1)) & np.uint8(15)
        zeros = _zeros_or_none(stored.T)
    perm = _order(g_idx, f"{at}g_idx", k, size)
    q = _from_words(qweight.T)
    return Int4Weights(_sorted(q, perm), np.ascontiguousarray(s.T), zeros, size, perm)


def to_gptq(w: Int4Weights, *, version: int = 1, zero_16: str = "wrap") -> dict[str, np.ndarray]:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` as a GPTQ checkpoint holds them (see `from_gptq`).

    N and K must be multiples of 8. Scales keep their dtype. `zero_16`, "wrap" or "carry", is how version 1 is going to
    be read.
    """
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version}")
    if zero_16 not in ("wrap", "carry"):
        raise ValueError(f"zero_16: expected 'wrap' or 'carry', got {zero_16!r}")
    _eights("q", K=w.k, N=w.n)
    zeros = _zeros_of(w).T
    if version == 1 and zero_16 == "wrap":
        zeros = (zeros - np.uint8(1)) & np.uint8(15)
    words = _to_words(zeros)
    if version == 1 and zero_16 == "carry":
        words = (words.view(np.uint32) - _ONES).view(np.int32)
    return {
        "qweight": np.ascontiguousarray(_to_words(_in_file_order(w)).T),
        "qzeros": words,
        "scales": np.ascontiguousarray(w.scales.T),
        "g_idx": _g_idx(w),
    }


# ---- AWQ -----------------------------------------------------------------------------------------------------------


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
    _expect(qweight, f"{at}qweight", _WORDS, (None, None), says=" (K, N/8)")
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    _eights(f"{at}qweight", K=k, N=n)
    size, groups = _groups(k, group_size, f"{at}qweight")
    s = _scales(scales, f"{at}scales", (groups, n), scales_dtype, " (K/group_size, N)")
    zeros = None
    if qzeros is not None:
        _expect(qzeros, f"{at}qzeros", _WORDS, (groups, n // 8), says=" (K/group_size, N/8)")
        zeros = _zeros_or_none(_awq_columns(qzeros, _AWQ_NIBBLE).T)
    q = np.ascontiguousarray(_awq_columns(qweight, _AWQ_NIBBLE).T)
    return Int4Weights(q, np.ascontiguousarray(s.T), zeros, size)


def _awq_columns(words: np.ndarray, nibbles: Sequence[int]) -> np.ndarray:
    codes = _from_words(words)
    return codes.reshape(len(codes), -1, 8)[..., list(nibbles)].reshape(codes.shape)


def to_awq(w: Int4Weights) -> dict[str, np.ndarray]:
    """``qweight``, ``qzeros`` and ``scales`` as an AWQ "gemm" checkpoint holds them (see `from_awq`).

    N and K must be multiples of 8; act-order weights are refused.
    """
    _refuse_perm(w, "AWQ")
    _eights("q", K=w.k, N=w.n)

    def words(codes: np.ndarray) -> np.ndarray:
        return _to_words(codes.reshape(len(codes), -1, 8)[..., list(_AWQ_ORDER)].reshape(codes.shape))

    return {"qweight": words(w.q.T), "qzeros": words(_zeros_of(w).T), "scales": np.ascontiguousarray(w.scales.T)}


# ---- compressed-tensors --------------------------------------------------------------------------------------------


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
    _expect(weight_shape, f"{at}weight_shape", ("int32", "int64"), (2,), says=" (N and K)")
    n, k = (int(x) for x in weight_shape)
    if n < 1:
        _bad(f"{at}weight_shape", "N >= 1", f"N = {n}")
    _eights(f"{at}weight_shape", K=k)
    _expect(weight_packed, f"{at}weight_packed", _WORDS, (n, k // 8), says=" (N, K/8)")
    size, groups = _groups(k, group_size, f"{at}weight_shape")
    s = _scales(weight_scale, f"{at}weight_scale", (n, groups), scales_dtype, " (N, K/group_size)")
    zeros = None
    if weight_zero_point is not None:
        where = f"{at}weight_zero_point"
        if isinstance(weight_zero_point, np.ndarray) and weight_zero_point.dtype == np.int8:
            z = _expect(weight_zero_point, where, ("int8",), (n, groups), says=" (N, K/group_size)")
            if z.min() < -8 or z.max() > 7:
                _bad(where, "-8..7", str(z.min() if z.min() < -8 else z.max()))
            zeros = _zeros_or_none((z + np.int8(8)).astype(np.uint8))
        else:
            _expect(weight_zero_point, where, _WORDS, (-(-n // 8), groups), says=" (ceil(N/8), K/group_size)")
            zeros = _zeros_or_none(_from_words(weight_zero_point.T)[:, :n].T)
    perm = _order(weight_g_idx, f"{at}weight_g_idx", k, size)
    q = _from_words(weight_packed)
    return Int4Weights(_sorted(q, perm), s, zeros, size, perm)


def to_compressed_tensors(w: Int4Weights) -> dict[str, np.ndarray]:
    """``weight_packed``, ``weight_scale``, ``weight_shape``, and where there are any ``weight_zero_point`` and
    ``weight_g_idx`` (see `from_compressed_tensors`).

    K must be a multiple of 8.
    """
    _eights("q", K=w.k)
    out = {
        "weight_packed": _to_words(_in_file_order(w)),
        "weight_scale": w.scales,
        "weight_shape": np.array([w.n, w.k], np.int64),
    }
    if w.zeros is not None:
        padded = np.pad(w.zeros, ((0, -w.n % 8), (0, 0)))
        out["weight_zero_point"] = np.ascontiguousarray(_to_words(padded.T).T)
    if w.perm is not None:
        out["weight_g_idx"] = _g_idx(w)
    return out


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def _blocks(rows: Any, block_bytes: int, name: str, type_name: str) -> np.ndarray:
    """[N, K/32, block_bytes]"""
    where = name or "rows"
    _expect(rows, where, ("uint8",), (None, None), says=f" ({type_name} rows)")
    n, row_bytes = rows.shape
    if n < 1 or row_bytes < 1 or row_bytes % block_bytes:
        _bad(where, f"rows of whole {type_name} blocks ({block_bytes} bytes)", f"uint8 {[n, row_bytes]}")
    return np.ascontiguousarray(rows).reshape(n, -1, block_bytes)


def _halfs(blocks: np.ndarray, at: int, where: str, what: str) -> np.ndarray:
    """The f16 at byte `at` of every block, [N, K/32]."""
    value = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float16, copy=False)
    if not np.isfinite(value).all():
        n, b = np.argwhere(~np.isfinite(value))[0]
        _bad(where, f"a finite {what}", f"{value[n, b]} in row {n}, block {b}")
    return value


def _block_codes(payload: np.ndarray) -> np.ndarray:
    both = np.concatenate([payload & np.uint8(15), payload >> np.uint8(4)], axis=-1)
    return both.reshape(len(both), -1)


def _block_payload(q: np.ndarray) -> np.ndarray:
    blocks = q.reshape(len(q), -1, 2, _BLOCK // 2)
    return blocks[:, :, 0] | blocks[:, :, 1] << np.uint8(4)


def from_q4_0(rows: np.ndarray, *, name: str = "") -> Int4Weights:
    """Reads GGUF Q4_0 rows, exactly: group size 32, zero point 8.

    Parameters
    ----------
    rows : uint8 [N, K/32 * 18]
        As `GGUFFile.raw` gives them.
    name : str
        Of the tensor, for messages.
    """
    blocks = _blocks(rows, 18, name, "Q4_0")
    return Int4Weights(_block_codes(blocks[..., 2:]), _halfs(blocks, 0, name or "rows", "scale"), None, _BLOCK)


def from_q4_1(rows: np.ndarray, *, name: str = "") -> Int4Weights:
    """Reads GGUF Q4_1 rows where they are exactly INT4 with integer zero points.

    A block is d q + m. It equals d (q - z) only if m = -d z for an integer z of 0..15, which llama.cpp's quantiser has
    no reason to give (but `to_q4_1` does); any other block is a FormatError that says how many there are.

    Parameters
    ----------
    rows : uint8 [N, K/32 * 20]
    """
    where = name or "rows"
    blocks = _blocks(rows, 20, name, "Q4_1")
    d, m = _halfs(blocks, 0, where, "scale"), _halfs(blocks, 2, where, "minimum")
    step, least = d.astype(np.float64), m.astype(np.float64)  # products of a f16 and 0..15 are exact here
    z = np.clip(np.rint(-least / np.where(step == 0, 1, step)), 0, 15)
    wrong = -step * z != least
    if wrong.any():
        n, b = np.argwhere(wrong)[0]
        _bad(
            where,
            "minimums m = -d z with an integer z of 0..15 (other Q4_1 blocks are not representable without loss)",
            f"d = {d[n, b]}, m = {m[n, b]} in row {n}, block {b}, and so on in {wrong.sum()} of {wrong.size} blocks",
        )
    return Int4Weights(_block_codes(blocks[..., 4:]), d, _zeros_or_none(z.astype(np.uint8)), _BLOCK)


def _block_scales(w: Int4Weights, name: str) -> tuple[np.ndarray, np.ndarray]:
    """f16 scales and zeros a block of 32: a wider group's are repeated."""
    _refuse_perm(w, name)
    if w.group_size % _BLOCK:
        _bad("group_size", f"a multiple of 32 ({name} has a scale for every 32 weights)", str(w.group_size))
    with np.errstate(over="ignore"):
        d = w.scales.astype(np.float16)
    lost = d.astype(np.float32) != w.scales
    if lost.any():
        at = tuple(int(i) for i in np.argwhere(lost)[0])
        _bad("scales", f"values that float16 holds exactly ({name})", f"{w.scales[at]} at {list(at)}")
    repeat = w.group_size // _BLOCK
    return np.repeat(d, repeat, axis=1), np.repeat(_zeros_of(w), repeat, axis=1)


def to_q4_0(w: Int4Weights) -> np.ndarray:
    """GGUF Q4_0 rows, uint8 [N, K/32 * 18]; FormatError for zero points other than 8 and what Q4_0 cannot hold."""
    d, zeros = _block_scales(w, "Q4_0")
    if (zeros != 8).any():
        _bad("zeros", "8 everywhere (Q4_0 is symmetric)", str(zeros[zeros != 8][0]))
    out = np.empty((*d.shape, 18), np.uint8)
    out[..., :2] = d.astype("<f2")[..., None].view(np.uint8)
    out[..., 2:] = _block_payload(w.q)
    return out.reshape(w.n, -1)


def to_q4_1(w: Int4Weights) -> np.ndarray:
    """GGUF Q4_1 rows, uint8 [N, K/32 * 20]; FormatError where float16 cannot hold a minimum -d z exactly."""
    d, zeros = _block_scales(w, "Q4_1")
    wanted = 0.0 - d.astype(np.float64) * zeros
    with np.errstate(over="ignore"):
        m = wanted.astype(np.float16)
    lost = m.astype(np.float64) != wanted
    if lost.any():
        n, b = np.argwhere(lost)[0]
        _bad(
            "zeros",
            "minimums -d z that float16 holds exactly (Q4_1)",
            f"{wanted[n, b]} in row {n}, block {b}, and so on in {lost.sum()} of {lost.size} blocks",
        )
    out = np.empty((*d.shape, 20), np.uint8)
    out[..., :2] = d.astype("<f2")[..., None].view(np.uint8)
    out[..., 2:4] = m.astype("<f2")[..., None].view(np.uint8)
    out[..., 4:] = _block_payload(w.q)
    return out.reshape(w.n, -1)


# ---- HQQ -----------------------------------------------------------------------------------------------------------


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
    at = f"{name}." if name else ""
    if axis != 1:
        _bad(f"{at}axis", "1 (with axis 0 a group is not a run along K: not representable)", str(axis))
    if len(shape) != 2 or min(shape) < 1:
        _bad(f"{at}shape", "(N, K)", str(tuple(shape)))
    n, k = (int(x) for x in shape)
    _eights(f"{at}shape", K=k)
    size, per_row = _groups(k, group_size, f"{at}shape")
    groups = n * per_row
    if groups % 2:
        _bad(f"{at}shape", "an even number of groups (two share a byte)", f"{groups}")
    _expect(W_q, f"{at}W_q", ("uint8",), (groups // 2, size), says=" (N G / 2, group_size)")
    s = _scales(scale, f"{at}scale", (groups, 1), scales_dtype, " (N G, 1)")
    z = _scales(zero, f"{at}zero", (groups, 1), scales_dtype, " (N G, 1)")
    exact = (z == np.rint(z)) & (z >= 0) & (z <= 15)
    if not exact.all():
        first = int(np.flatnonzero(~exact)[0])
        _bad(
            f"{at}zero",
            "integers of 0..15 (other zero points are not representable without loss)",
            f"{z[first, 0]} in group {first}, and so on in {int((~exact).sum())} of {groups} groups",
        )
    q = np.concatenate([W_q >> np.uint8(4), W_q & np.uint8(15)])
    zeros = _zeros_or_none(z.astype(np.uint8).reshape(n, per_row))
    return Int4Weights(q.reshape(n, k), s.reshape(n, per_row), zeros, size)


def to_hqq(w: Int4Weights) -> dict[str, Any]:
    """``W_q``, ``scale``, ``zero`` and ``shape`` of HQQ's "4bit_u8" with axis 1 (see `from_hqq`).

    K must be a multiple of 8 and the number of groups even; act-order weights are refused.
    """
    _refuse_perm(w, "HQQ")
    _eights("q", K=w.k)
    if w.scales.size % 2:
        _bad("q", "an even number of groups (two share a byte)", f"{w.scales.size}")
    groups = w.q.reshape(w.scales.size, w.group_size)
    half = len(groups) // 2
    return {
        "W_q": groups[:half] << np.uint8(4) | groups[half:],
        "scale": w.scales.reshape(-1, 1),
        "zero": _zeros_of(w).astype(w.scales.dtype).reshape(-1, 1),
        "shape": (w.n, w.k),
    }

"""Formats that run in the wider form: MXFP4, NVFP4, bitsandbytes' 4 bits, HQQ with float zero points. Both ways.

======================  ============================================================================================
MXFP4                   ``*_blocks`` u8 [..., rows, G, 16], even element in the low nibble; ``*_scales`` u8 [..., rows,
(gpt-oss)               G], E8M0. e2m1 2^(s - 127). OCP Microscaling Formats 1.0; transformers' integrations/mxfp4
NVFP4                   weight_packed u8 [N, K/2], even element low; weight_scale e4m3 [N, K/16]; one float32 global
                        scale: compressed-tensors divides by weight_global_scale, ModelOpt multiplies by weight_scale_2
bitsandbytes NF4, FP4   weight u8 [numel/2, 1], even element in the high nibble; absmax, one for every blocksize
                        elements of the flattened matrix, float32 or 8-bit codes with an absmax of their own
                        https://github.com/bitsandbytes-foundation/bitsandbytes, functional.QuantState
HQQ (4bit_u8)           as in `assay.formats.int4.hqq`; (q - zero) scale with a float zero point
======================  ============================================================================================

Exactness. MXFP4: exact. NVFP4: the scale is one float32 product (or quotient) of the block's and the global one, as the
library computes it. bitsandbytes: the values of its float32 arithmetic, products with the codebook rounded as there; with
``w4a8`` a codebook must be int8, and rounding it so is a loss that `int8_codebook` reports. HQQ: -zero scale is exact for
16-bit zero points and scales, and rounded once to float32 for wider ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FormatError
from ._checks import bad, expect, matrix_shape
from .dequant import MXFP4_VALUES, e8m0_half, ue4m3_half
from .int4.hqq import group_tensors, read_groups
from .nibbles import pack, unpack
from .weights import ConversionError, Weights, WideWeights, conversion_error, split

__all__ = [
    "FP4_VALUES",
    "NF4_VALUES",
    "NestedAbsmax",
    "from_bnb4",
    "from_hqq_float",
    "from_mxfp4",
    "from_nvfp4",
    "int8_codebook",
    "to_bnb4",
    "to_hqq_float",
    "to_mxfp4",
    "to_nvfp4",
]

#: bitsandbytes' NormalFloat table: quantiles of a normal distribution (QLoRA, https://arxiv.org/abs/2305.14314).
NF4_VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
#: bitsandbytes' FP4 table, e2m1 in an order of its own.
FP4_VALUES = np.array(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
) / np.float32(12)  # fmt: skip
_LARGEST = 65504.0  # no weight of a model is beyond float16's range


def _wide_codes(w: Weights, values: np.ndarray, size: int, what: str) -> WideWeights:
    """The weights, if they are codes into `values`, in groups of `size`."""
    if not isinstance(w, WideWeights) or w.codebook is None or not np.array_equal(w.codebook, values):
        bad("codebook", f"the values of {what}", "others" if isinstance(w, WideWeights) else f"{type(w).__name__}")
    if w.minimum is not None:
        bad("minimum", f"None ({what} has none)", "an array")
    if w.group_size % size:
        bad("group_size", f"a multiple of {size} ({what})", str(w.group_size))
    return w if w.group_size == size else split(w, size)


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray, *, name: str = "") -> WideWeights:
    """Reads a gpt-oss matrix, or a stack of experts with rows flattened; exact.

    Parameters
    ----------
    blocks : uint8 [..., rows, G, 16]
    scales : uint8 [..., rows, G]
        E8M0 exponents; 255, a NaN, is refused.
    name : str
        Of the module, for messages.

    Raises
    ------
    FormatError
        Naming the tensor, what was wanted and what came.
    """
    if blocks.ndim not in (3, 4) or blocks.dtype != np.uint8 or blocks.shape[-1] != 16 or not blocks.size:
        bad(f"{name}_blocks", "uint8 [..., rows, G, 16]", f"{blocks.dtype} {list(blocks.shape)}")
    expect(scales, f"{name}_scales", ("uint8",), blocks.shape[:-1], says=" (the blocks' groups)")
    if (scales == 255).any():
        at = [int(i) for i in np.argwhere(scales == 255)[0]]
        bad(f"{name}_scales", "exponents 0..254 (255 is NaN)", f"255 at {at}")
    groups = blocks.shape[-2]
    q = unpack(np.ascontiguousarray(blocks).reshape(-1, groups * 16))
    return WideWeights(q, e8m0_half(scales).reshape(-1, groups), None, 32, MXFP4_VALUES)


def to_mxfp4(w: Weights) -> dict[str, np.ndarray]:
    """``blocks`` uint8 [N, G, 16] and ``scales`` uint8 [N, G]; FormatError for what is no MXFP4."""
    wide = _wide_codes(w, MXFP4_VALUES, 32, "MXFP4")
    powers = e8m0_half(np.arange(255, dtype=np.uint8))
    e = np.searchsorted(powers, wide.scales).clip(0, 254).astype(np.uint8)
    wrong = powers[e] != wide.scales
    if wrong.any():
        bad("scales", "powers of two, 2^-128..2^126", str(wide.scales[wrong][0]))
    return {"blocks": pack(wide.q.reshape(wide.n, -1, 32)), "scales": e}


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------


def from_nvfp4(
    weight_packed: np.ndarray, weight_scale: np.ndarray, global_scale: np.ndarray, *, divide: bool, name: str = ""
) -> WideWeights:
    """Reads an NVFP4 matrix.

    Parameters
    ----------
    weight_packed : uint8 [N, K/2]
    weight_scale : uint8 [N, K/16]
        Raw E4M3, not negative, finite.
    global_scale : float32 [1] or []
    divide : bool
        Block scales are divided by it (compressed-tensors' weight_global_scale) or multiplied (ModelOpt's
        weight_scale_2). A direction that gives weights beyond float16's range is taken for a mistake and refused.
    """
    at = f"{name}." if name else ""
    expect(weight_packed, f"{at}weight_packed", ("uint8",), (None, None), says=" (N, K/2)")
    n, k = weight_packed.shape[0], 2 * weight_packed.shape[1]
    if n < 1 or k < 1 or k % 16:
        bad(f"{at}weight_packed", "N >= 1 and K a multiple of 16", f"N = {n}, K = {k}")
    expect(weight_scale, f"{at}weight_scale", ("uint8",), (n, k // 16), says=" (E4M3 [N, K/16])")
    if (weight_scale > 126).any():
        i = tuple(int(i) for i in np.argwhere(weight_scale > 126)[0])
        bad(f"{at}weight_scale", "finite E4M3 scales >= 0", f"{int(weight_scale[i]):#x} at {list(i)}")
    if global_scale.size != 1 or global_scale.dtype != np.float32:
        bad(f"{at}global scale", "one float32", f"{global_scale.dtype} {list(global_scale.shape)}")
    factor = np.float32(global_scale.reshape(-1)[0])
    if not np.isfinite(factor) or factor <= 0:
        bad(f"{at}global scale", "a positive number", str(factor))
    half = ue4m3_half(weight_scale)
    with np.errstate(over="ignore"):
        scales = half / factor if divide else half * factor
        largest = 12 * float(scales.max())
    if not largest <= _LARGEST:
        bad(
            f"{at}global scale",
            f"weights within {_LARGEST:.0f} (block scales {'divided' if divide else 'multiplied'} by it)",
            f"{largest:.3g} from {factor} (is it the reciprocal?)",
        )
    return WideWeights(unpack(np.ascontiguousarray(weight_packed)), scales, None, 16, MXFP4_VALUES)


def to_nvfp4(w: Weights, *, divide: bool = True) -> dict[str, np.ndarray]:
    """``weight_packed``, ``weight_scale`` (raw E4M3) and ``global_scale`` float32 [1] that give exactly these weights.

    The global scale is searched for: the widest scale is some E4M3 number over it.
    """
    wide = _wide_codes(w, MXFP4_VALUES, 16, "NVFP4")
    scales, back = np.unique(wide.scales, return_inverse=True)
    values = ue4m3_half(np.arange(127, dtype=np.uint8))
    widest = np.float32(scales[-1])
    if scales[0] < 0:
        bad("scales", "E4M3 numbers times one global scale, none negative", str(scales[0]))
    for value in values[:0:-1] if widest > 0 else np.ones(1, np.float32):
        near = (value / widest if divide else widest / value) if widest > 0 else np.float32(1)
        for factor in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
            with np.errstate(over="ignore"):
                table = (values / factor if divide else values * factor).astype(np.float32)
            codes = np.searchsorted(table, scales).clip(0, 126)
            if np.isfinite(factor) and factor > 0 and np.array_equal(table[codes], scales):
                return {
                    "weight_packed": pack(wide.q),
                    "weight_scale": codes.astype(np.uint8)[back].reshape(wide.scales.shape),
                    "global_scale": np.array([factor], np.float32),
                }
    raise FormatError(f"scales: expected E4M3 numbers times one global scale, got {len(scales)} others")


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """The second level of bitsandbytes' double quantisation: ``quant_map[code] absmax[block] + offset``.

    Attributes
    ----------
    quant_map : float32 [256]
    absmax : float32 [ceil(blocks / blocksize)]
    offset : float
    blocksize : int
    """

    quant_map: np.ndarray
    absmax: np.ndarray
    offset: float
    blocksize: int


def from_bnb4(
    weight: np.ndarray,
    absmax: np.ndarray,
    shape: Sequence[int],
    *,
    quant_map: np.ndarray,
    blocksize: int = 64,
    nested: NestedAbsmax | None = None,
    name: str = "",
) -> WideWeights:
    """Reads a bitsandbytes 4-bit matrix: NF4 or FP4, by its table.

    Parameters
    ----------
    weight : uint8 [numel/2, 1]
        Even element in the high nibble.
    absmax : float32 [numel/blocksize], or uint8 with `nested`
    shape : (N, K)
    quant_map : float32 [16]
    blocksize : int
        Elements of the flattened matrix that share an absmax. Where blocks straddle rows the groups are their common
        divisors with K, at least 16.
    nested : NestedAbsmax, optional

    Raises
    ------
    FormatError
        Naming the tensor, what was wanted and what came.
    """
    at = f"{name}." if name else ""
    n, k = matrix_shape(shape, f"{at}shape")
    if not isinstance(blocksize, int) or blocksize < 16:
        bad(f"{at}blocksize", "a number from 16 up", repr(blocksize))
    if weight.dtype != np.uint8 or weight.size * 2 != n * k:
        bad(
            f"{at}weight", f"uint8 of {n * k / 2:g} bytes ({n} x {k} of 4 bits)", f"{weight.dtype} {list(weight.shape)}"
        )
    blocks = -(-n * k // blocksize)
    expect(absmax.reshape(-1), f"{at}absmax", ("uint8",) if nested else ("float32",), (blocks,))
    expect(quant_map.reshape(-1), f"{at}quant_map", ("float32",), (16,))
    scales = absmax.reshape(-1)
    if nested is not None:
        level = -(-blocks // nested.blocksize) if nested.blocksize > 0 else 0
        expect(nested.absmax.reshape(-1), f"{at}nested_absmax", ("float32",), (level,))
        expect(nested.quant_map.reshape(-1), f"{at}nested_quant_map", ("float32",), (256,))
        of_block = nested.absmax.reshape(-1)[np.arange(blocks) // nested.blocksize]
        scales = nested.quant_map.reshape(-1)[scales] * of_block + np.float32(nested.offset)
    if not np.isfinite(scales).all() or not np.isfinite(quant_map).all():
        bad(f"{at}absmax", "finite numbers", "a NaN or infinity")
    size = math.gcd(blocksize, k)
    if size < 16:
        bad(f"{at}shape", f"K and blocksize {blocksize} with a common divisor of at least 16", f"K = {k}")
    of_group = np.arange(n * k // size) // (blocksize // size)
    codes = unpack(weight.reshape(1, -1)).reshape(-1, 2)[:, ::-1]  # the high nibble is first here
    grid = np.ascontiguousarray(scales[of_group], np.float32).reshape(n, -1)
    return WideWeights(
        np.ascontiguousarray(codes).reshape(n, k), grid, None, size, np.array(quant_map.reshape(-1), np.float32)
    )


def to_bnb4(w: Weights, *, blocksize: int = 64) -> dict[str, np.ndarray]:
    """``weight`` uint8 [N K / 2, 1], ``absmax`` float32 and ``quant_map`` float32 [16], without double quantisation.

    Blocks must not straddle rows; FormatError for what has no codebook, or a group smaller than a block.
    """
    if not isinstance(w, WideWeights) or w.codebook is None or w.minimum is not None:
        bad("codebook", "16 values and no minimum (bitsandbytes)", type(w).__name__)
    if w.group_size % blocksize:
        bad("group_size", f"a multiple of blocksize = {blocksize}", str(w.group_size))
    wide = w if w.group_size == blocksize else split(w, blocksize)
    return {
        "weight": (wide.q[:, 0::2] << np.uint8(4) | wide.q[:, 1::2]).reshape(-1, 1),
        "absmax": wide.scales.reshape(-1),
        "quant_map": wide.codebook if wide.codebook is not None else NF4_VALUES,
    }


def int8_codebook(w: WideWeights) -> tuple[WideWeights, ConversionError]:
    """The weights with the codebook rounded to int8, which int8 activations need, and what that costs them.

    The table is stretched so that its widest value is 127.
    """
    if w.codebook is None:
        bad("codebook", "16 values", "None")
    step = np.abs(w.codebook).max() / np.float32(127)
    if step == 0:
        return w, ConversionError(0.0, 0.0)
    rounded = WideWeights(w.q, w.scales * step, w.minimum, w.group_size, np.rint(w.codebook / step))
    return rounded, conversion_error(w.dequantize(), rounded.dequantize())


# ---- HQQ -------------------------------------------------------------------------------------------------------------


def from_hqq_float(
    W_q: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    shape: Sequence[int],
    *,
    group_size: int,
    axis: int = 1,
    scales_dtype: str | None = None,
    name: str = "",
) -> WideWeights:
    """Reads an HQQ matrix packed as "4bit_u8" with float zero points: minimum = -zero scale.

    Parameters as `assay.formats.int4.from_hqq`.
    """
    q, scale, zero, size = read_groups(
        W_q, scale, zero, shape, group_size=group_size, axis=axis, scales_dtype=scales_dtype, name=name
    )
    s, z = scale.astype(np.float32), zero.astype(np.float32)
    minimum = np.float32(0) - z * s
    if not np.isfinite(minimum).all():
        bad(f"{name}.zero" if name else "zero", "products -zero scale within float32's range", "an infinity")
    return WideWeights(q, s, minimum, size)


def to_hqq_float(w: Weights, *, dtype: str = "float16") -> dict[str, Any]:
    """``W_q``, ``scale``, ``zero`` and ``shape`` of "4bit_u8" with axis 1, whose (q - zero) scale is exactly this.

    `dtype` is that of scale and zero, "float16" or "float32"; FormatError where it holds no such zero point.
    """
    if not isinstance(w, WideWeights) or w.bits != 4 or w.codebook is not None:
        bad("q", "codes of 4 bits without a codebook (HQQ)", type(w).__name__)
    minimum = np.zeros_like(w.scales) if w.minimum is None else w.minimum
    with np.errstate(over="ignore"):
        scale = w.scales.astype(dtype)
        zero = (-minimum.astype(np.float64) / np.where(w.scales == 0, 1, w.scales)).astype(dtype)
    lost = (zero.astype(np.float64) * scale != -minimum.astype(np.float64)) | (scale.astype(np.float32) != w.scales)
    if lost.any():
        bad("minimum", f"-zero scale with {dtype} numbers (HQQ)", f"others in {lost.sum()} of {lost.size} groups")
    return group_tensors(w.q, scale, zero)

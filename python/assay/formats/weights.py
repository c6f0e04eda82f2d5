"""The forms in which weights run: INT4, int8 with a scale a group, and the wider form.

Every quantised format is read into one of three, without changing a weight:

=============  ==================================================  =====================
`Int4Weights`  scale (q - zero), q 0..15, float16 scales            `assay.pack`
`Int8Weights`  scale q, q int8, float16 scales                      `assay.pack_int8`
`WideWeights`  scale v + minimum, v int8 or codebook[0..15], with   `assay.pack_wide`
               float32 scale and minimum
=============  ==================================================  =====================

This module only holds arrays and moves weights from form to form where that is exact.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import FormatError
from ._checks import expect
from .nibbles import pack

__all__ = [
    "ConversionError",
    "Int4Weights",
    "Int8Weights",
    "Weights",
    "WideWeights",
    "as_int4",
    "as_int8",
    "as_wide",
    "conversion_error",
    "regroup",
    "run_bits_per_weight",
    "split",
    "zeros_or_none",
]

_WIDE_GROUPS = (128, 64, 32, 16)  # what the kernels take, beside K
_NARROW_GROUPS = (128, 64, 32)


def _check_grid(q: np.ndarray, group_size: int) -> tuple[int, int]:
    """(N, G), after looking at the codes' shape and the group size."""
    n, k = q.shape
    if n < 1 or k < 1:
        raise ValueError(f"q: expected [N, K] with N, K >= 1, got {[n, k]}")
    if group_size < 1 or k % group_size:
        raise ValueError(f"group_size: expected a divisor of K = {k}, got {group_size}")
    return n, k // group_size


def _finite(array: np.ndarray, where: str) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: expected finite values, got a NaN or infinity")


class _Codes:
    """A matrix by its codes."""

    q: np.ndarray

    @property
    def n(self) -> int:
        """Output features."""
        return self.q.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.q.shape[1]


@dataclass(frozen=True, eq=False)
class Int4Weights(_Codes):
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
        expect(self.q, "q", ("uint8",), (None, None), ValueError)
        grid = _check_grid(self.q, self.group_size)
        expect(self.scales, "scales", ("float16", "float32"), grid, ValueError)
        _finite(self.scales, "scales")
        if self.q.max() > 15:
            raise ValueError(f"q: expected 0..15, got {self.q.max()}")
        if self.zeros is not None:
            expect(self.zeros, "zeros", ("uint8",), grid, ValueError)
            if self.zeros.max() > 15:
                raise ValueError(f"zeros: expected 0..15, got {self.zeros.max()}")
        if self.perm is not None:
            expect(self.perm, "perm", ("int32",), (self.k,), ValueError)
            if not np.array_equal(np.sort(self.perm), np.arange(self.k)):
                raise ValueError(f"perm: expected every number of 0..{self.k - 1} once")

    def pack_args(self) -> dict[str, Any]:
        """Arguments of `assay.pack`: ``assay.pack(**w.pack_args())``.

        qweight uint8 [N, ceil(K/2)] (low nibble = even k), scales, zeros, k and group_size. `assay.pack` keeps scales
        as float16, so float32 scales that float16 cannot hold are rounded there, and there only.
        """
        return {
            "qweight": pack(self.q),
            "scales": self.scales,
            "zeros": None if self.zeros is None else np.ascontiguousarray(self.zeros),
            "k": self.k,
            "group_size": self.group_size,
        }

    def zero_points(self) -> np.ndarray:
        """uint8 [N, G], of the symmetric form too."""
        return np.full(self.scales.shape, 8, np.uint8) if self.zeros is None else self.zeros

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


@dataclass(frozen=True, eq=False)
class Int8Weights(_Codes):
    """int8 weights: ``w[n, k] = scales[n, k // group_size] q[n, k]``.

    Attributes
    ----------
    q : int8 [N, K]
    scales : float16 or float32 [N, G]
        Finite.
    group_size : int
        Divides K.

    Raises
    ------
    ValueError
        Naming the field, what was wanted and what came.
    """

    q: np.ndarray
    scales: np.ndarray
    group_size: int

    def __post_init__(self) -> None:
        expect(self.q, "q", ("int8",), (None, None), ValueError)
        expect(self.scales, "scales", ("float16", "float32"), _check_grid(self.q, self.group_size), ValueError)
        _finite(self.scales, "scales")

    def pack_args(self) -> dict[str, Any]:
        """Arguments of `assay.pack_int8`, which rounds float32 scales that float16 cannot hold."""
        w = regroup(self, _NARROW_GROUPS)
        return {"qweight": w.q, "scales": w.scales}

    def dequantize(self) -> np.ndarray:
        """float32 [N, K]."""
        groups = self.q.reshape(self.n, -1, self.group_size).astype(np.float32)
        groups *= self.scales[..., None].astype(np.float32)
        return groups.reshape(self.n, self.k)


@dataclass(frozen=True, eq=False)
class WideWeights(_Codes):
    """Weights of the wider form: ``w[n, k] = scales[n, g] v[n, k] + minimum[n, g]``, ``g = k // group_size``.

    Attributes
    ----------
    q : int8 [N, K], or uint8 [N, K] of 0..15
        8 bits: v = q. 4 bits: v = codebook[q], or q where there is no codebook.
    scales : float32 [N, G]
        Finite.
    minimum : float32 [N, G] or None
        None: 0 everywhere.
    group_size : int
        Divides K.
    codebook : float32 [16] or None
        Values of the 16 codes; only with 4 bits.

    Raises
    ------
    ValueError
        Naming the field, what was wanted and what came.
    """

    q: np.ndarray
    scales: np.ndarray
    minimum: np.ndarray | None
    group_size: int
    codebook: np.ndarray | None = None

    def __post_init__(self) -> None:
        expect(self.q, "q", ("int8", "uint8"), (None, None), ValueError)
        grid = _check_grid(self.q, self.group_size)
        if self.bits == 4 and self.q.max() > 15:
            raise ValueError(f"q: expected 0..15, got {self.q.max()}")
        for name, array in (("scales", self.scales), ("minimum", self.minimum)):
            if array is not None:
                expect(array, name, ("float32",), grid, ValueError)
                _finite(array, name)
        if self.codebook is not None:
            if self.bits == 8:
                raise ValueError("codebook: expected None with int8 codes, got an array")
            expect(self.codebook, "codebook", ("float32",), (16,), ValueError)
            _finite(self.codebook, "codebook")

    @property
    def bits(self) -> int:
        """8 (int8 codes) or 4."""
        return 8 if self.q.dtype == np.int8 else 4

    def pack_args(self) -> dict[str, Any]:
        """Arguments of `assay.pack_wide`; a codebook that is not of integers runs with 16-bit activations only."""
        w = regroup(self, _WIDE_GROUPS)
        return {
            "qweight": w.q if w.bits == 8 else pack(w.q),
            "scales": w.scales,
            "minimum": w.minimum,
            "codebook": w.codebook,
            "bits": w.bits,
            "group_size": w.group_size,
        }

    def dequantize(self) -> np.ndarray:
        """float32 [N, K]: the product rounded, then the sum."""
        values = self.q.astype(np.float32) if self.codebook is None else self.codebook[self.q]
        groups = values.reshape(self.n, -1, self.group_size)
        groups *= self.scales[..., None]
        if self.minimum is not None:
            groups += self.minimum[..., None]
        return groups.reshape(self.n, self.k)


Weights = Int4Weights | Int8Weights | WideWeights
W = TypeVar("W", bound=Weights)


# ---- from form to form, exactly --------------------------------------------------------------------------------------


def regroup(w: W, sizes: tuple[int, ...]) -> W:
    """The same weights with groups of a size that the kernels take, scales repeated: 256 as twice 128, 96 as 32.

    `sizes` is in falling order. Weights whose group size is in it, is K, or has no divisor in it come back as they are.
    """
    if w.group_size in sizes or w.group_size == w.k:
        return w
    size = next((s for s in sizes if w.group_size % s == 0), None)
    return w if size is None else split(w, size)


def split(w: W, size: int) -> W:
    """The same weights in groups of `size`, a divisor of theirs, scales repeated."""
    times = w.group_size // size
    grids = {name: getattr(w, name, None) for name in ("scales", "zeros", "minimum")}
    repeated: dict[str, Any] = {
        name: np.repeat(grid, times, axis=1) for name, grid in grids.items() if grid is not None
    }
    return replace(w, group_size=size, **repeated)


def _no_order(w: Weights) -> None:
    if isinstance(w, Int4Weights) and w.perm is not None:
        raise FormatError("perm: expected None (only INT4 runs with an order of input features), got act-order weights")


def _offset_codes(w: Int4Weights) -> np.ndarray:
    """int8 [N, K]: q - zero, -15..15."""
    zeros = np.int8(8) if w.zeros is None else w.zeros.view(np.int8)[..., None]
    return (w.q.view(np.int8).reshape(w.n, -1, w.group_size) - zeros).reshape(w.n, w.k)


def as_int8(w: Weights) -> Int8Weights:
    """The weights as int8 codes with a scale a group; FormatError where that would change one.

    INT4 always fits (q - zero is an integer of -15..15), the wider form without a minimum and with 8 bits or a codebook
    of integers.
    """
    _no_order(w)
    if isinstance(w, Int8Weights):
        return w
    if isinstance(w, Int4Weights):
        return Int8Weights(_offset_codes(w), w.scales, w.group_size)
    if w.minimum is not None and w.minimum.any():
        raise FormatError(f"minimum: expected 0 everywhere (int8 has none), got {w.minimum[w.minimum != 0][0]}")
    if w.bits == 8:
        return Int8Weights(w.q, w.scales, w.group_size)
    if w.codebook is None:
        return Int8Weights(w.q.view(np.int8), w.scales, w.group_size)
    codes = w.codebook.astype(np.int8)
    if not np.array_equal(codes, w.codebook):
        raise FormatError(f"codebook: expected integers of -128..127, got {w.codebook[codes != w.codebook][0]}")
    return Int8Weights(codes[w.q], w.scales, w.group_size)


def as_wide(w: Weights, bits: int = 8) -> WideWeights:
    """The weights in the wider form with codes of 8 bits, or of 4; FormatError where that would change one."""
    _no_order(w)
    if isinstance(w, WideWeights) and w.bits == bits:
        return w
    if isinstance(w, Int4Weights) and bits == 4:
        scales = w.scales.astype(np.float32)
        zeros = np.float32(8) if w.zeros is None else w.zeros.astype(np.float32)
        minimum = np.float32(0) - scales * zeros
        if w.scales.dtype != np.float16 and ((scales.astype(np.float64) * zeros) != -minimum.astype(np.float64)).any():
            raise FormatError("scales: expected products -scale zero that float32 holds exactly")
        return WideWeights(w.q, scales, minimum, w.group_size)
    if bits == 4:
        raise FormatError(f"q: expected codes of 4 bits, got {type(w).__name__} of 8")
    if isinstance(w, WideWeights) and w.minimum is not None:
        if w.codebook is not None:
            raise FormatError("minimum: expected None together with a codebook")
        return WideWeights(w.q.view(np.int8), w.scales, w.minimum, w.group_size)
    narrow = as_int8(w)
    return WideWeights(narrow.q, narrow.scales.astype(np.float32), None, narrow.group_size)


def as_int4(w: Weights) -> Int4Weights:
    """The weights as INT4 with integer zero points; FormatError where that would change one.

    int8 codes fit when every group spans at most 16 of them, around 0; the wider form when every minimum is -scale z for
    an integer z of 0..15.
    """
    if isinstance(w, Int4Weights):
        return w
    if isinstance(w, WideWeights) and w.bits == 4 and w.codebook is None:
        least = np.float64(0) if w.minimum is None else w.minimum.astype(np.float64)
        step = w.scales.astype(np.float64)
        zeros = np.clip(np.rint(-least / np.where(step == 0, 1, step)), 0, 15)
        wrong = -step * zeros != least
        if wrong.any():
            raise FormatError(
                "minimum: expected -scale z with an integer z of 0..15 (INT4's zero points), got others in"
                f" {wrong.sum()} of {wrong.size} groups"
            )
        zeros = np.broadcast_to(zeros, step.shape)
        return Int4Weights(w.q, w.scales, zeros_or_none(zeros.astype(np.uint8)), w.group_size)
    codes = as_int8(w)
    groups = codes.q.reshape(codes.n, -1, codes.group_size).astype(np.int16)
    zeros = np.where(groups.min(-1) >= -8, np.maximum(8 - np.maximum(groups.max(-1) - 7, 0), 0), -groups.min(-1))
    shifted = groups + zeros[..., None]
    if zeros.min() < 0 or zeros.max() > 15 or shifted.min() < 0 or shifted.max() > 15:
        raise FormatError(
            f"q: expected groups that span at most 16 codes around 0 (INT4), got {groups.min()}..{groups.max()}"
        )
    q = np.ascontiguousarray(shifted.reshape(codes.q.shape).astype(np.uint8))
    return Int4Weights(q, codes.scales, zeros_or_none(zeros.astype(np.uint8)), codes.group_size)


def zeros_or_none(zeros: np.ndarray) -> np.ndarray | None:
    """None for the symmetric case: the kernels have a faster form for it."""
    return None if (zeros == 8).all() else np.ascontiguousarray(zeros)


# ---- what a form costs, and what a lossy one loses -------------------------------------------------------------------


def run_bits_per_weight(w: Weights) -> float:
    """Bits a weight that one product reads, padding of N and K apart.

    Codes and, a group: INT4 16 for the scale and 8 for a zero point, int8 16, the wider form 32 for the scale and 32 for
    a minimum.
    """
    if isinstance(w, Int4Weights):
        w = regroup(w, _NARROW_GROUPS)
        return 4 + (16 if w.zeros is None else 24) / w.group_size
    if isinstance(w, Int8Weights):
        return 8 + 16 / regroup(w, _NARROW_GROUPS).group_size
    w = regroup(w, _WIDE_GROUPS)
    return w.bits + (32 if w.minimum is None else 64) / w.group_size


class ConversionError(NamedTuple):
    """What a conversion changed: the largest error over the largest weight, and RMS error over RMS weight."""

    max_relative: float
    rms_relative: float


def conversion_error(before: np.ndarray, after: np.ndarray) -> ConversionError:
    """Error of `after` against `before`, both float [N, K] and finite; 0 for matrices of zeros that stayed so."""
    lost_max = lost_sum = whole_max = whole_sum = 0.0
    rows = max(1, (1 << 20) // max(before.shape[1], 1))  # bounded scratch memory, whatever the matrix
    for at in range(0, len(before), rows):
        whole = before[at : at + rows].astype(np.float64)
        off = after[at : at + rows] - whole
        lost_max, whole_max = max(lost_max, float(np.abs(off).max())), max(whole_max, float(np.abs(whole).max()))
        lost_sum, whole_sum = lost_sum + float(np.square(off).sum()), whole_sum + float(np.square(whole).sum())

    def relative(lost: float, of: float) -> float:
        return lost / of if of else (0.0 if not lost else float("inf"))

    return ConversionError(relative(lost_max, whole_max), relative(lost_sum, whole_sum) ** 0.5)

"""int8 GEMM: C[M, N] = A[M, K] @ W[N, K].T, the INT4 GEMM's sibling for weights of eight bits, w = scale q.

GGUF's Q8_0 is this with group 32, without loss. The contract is the INT4 GEMM's: row i of the output has the same bits for
every M, every number of threads, every position in the batch, and every C variant.
"""

from typing import Any

import numpy as np

from .. import reference
from .._ffi import FLOAT_DTYPES, Tensor, as_tensor, check, ffi, lib, thread_count, variant_index, workspace
from ._backends import twin, widen
from ._gemm import aligned_empty, check_group, gemm_tensors, half_scales, pointer
from .wide import PackedWide, wide_gemm


class PackedInt8:
    """A weight matrix in the int8 kernels' layout; make one with :func:`pack_int8`.

    Attributes
    ----------
    n, k : int
        Output and input features.
    group_size : int
        Weights along K that share a scale: 32, 64, 128 or k.
    data : numpy.ndarray
        uint8, the packed stream (csrc/kernels.h draws it). Read only.
    """

    __slots__ = ("_struct", "data", "group_size", "k", "n")

    def __init__(self, n: int, k: int, group_size: int, data: np.ndarray) -> None:
        self.n, self.k, self.group_size, self.data = n, k, group_size, data
        data.flags.writeable = False
        self._struct = ffi.new(
            "assay_w8 *", {"n": n, "k": k, "group_size": group_size, "data": Tensor(data, "uint8", data).ptr}
        )

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weights reads."""
        return self.data.nbytes

    def __repr__(self) -> str:
        return f"PackedInt8(n={self.n}, k={self.k}, group_size={self.group_size}, {self.nbytes} bytes)"

    def unpack(self) -> tuple[np.ndarray, np.ndarray]:
        """What :func:`pack_int8` was given: qweight int8 [N, K] and scales float16 [N, G]."""
        qweight = np.empty((self.n, self.k), np.int8)
        scales = np.empty((self.n, self.k // self.group_size), np.float16)
        check(lib.assay_w8_unpack(self._struct, pointer(qweight, "int8_t *"), pointer(scales, "uint16_t *")), "unpack")
        return qweight, scales

    def dequantize(self) -> np.ndarray:
        """float32 [N, K]."""
        qweight, scales = self.unpack()
        return qweight.astype(np.float32) * np.repeat(scales.astype(np.float32), self.group_size, axis=1)


def quantize_int8(w: Any, group_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Quantises float weights to int8 by rounding to nearest.

    Parameters
    ----------
    w : float32 [N, K]
        Finite. numpy or any CPU DLPack tensor.
    group_size : int
        32, 64, 128 (a divisor of K) or K.

    Returns
    -------
    qweight : int8 [N, K]
        -127..127.
    scales : float16 [N, K / group_size]
    """
    array = np.asarray(as_tensor(w, "w", ("float32",), 2).array)
    n, k = array.shape
    if n == 0 or k == 0:
        raise ValueError(f"w: expected at least one row and column, got shape {[n, k]}")
    check_group(k, group_size)
    if not np.isfinite(array).all():
        raise ValueError("w: expected finite weights, got a NaN or infinity")
    with np.errstate(over="ignore"):
        qweight, scales = reference.quantize_int8(array, group_size)
    if not np.isfinite(scales).all():
        raise ValueError("w: a group's scale is beyond float16's range (65504)")
    return qweight, scales


def pack_int8(qweight: Any, scales: Any, *, num_threads: int | None = None) -> PackedInt8:
    """Packs int8 weights into the kernels' layout, once.

    Parameters
    ----------
    qweight : int8 [N, K]
    scales : float16 or float32 [N, K / group_size]
        Finite. float32 is rounded to float16, in which scales are kept.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    q = as_tensor(qweight, "qweight", ("int8",), 2, contiguous=True).array
    s = as_tensor(scales, "scales", ("float16", "float32"), 2).array
    n, k = q.shape
    if n < 1 or k < 1:
        raise ValueError(f"qweight: expected int8 [N, K] with N, K >= 1, got {list(q.shape)}")
    if s.shape[0] != n or s.shape[1] < 1 or k % s.shape[1]:
        raise ValueError(f"scales: expected [N, K/group_size] with N, K = {n}, {k}, got {list(s.shape)}")
    group_size = k // s.shape[1]
    check_group(k, group_size)
    s16 = half_scales(s)
    size = lib.assay_w8_packed_bytes(n, k, group_size)
    if not size:
        raise ValueError(f"qweight: expected N <= 2^28 and K <= 2^17, got N = {n}, K = {k}")
    data = aligned_empty(size)
    status = lib.assay_w8_pack(
        n, k, group_size, pointer(q, "int8_t *"), pointer(s16, "uint16_t *"), pointer(data, "void *"),
        thread_count(num_threads),
    )  # fmt: skip
    check(status, "pack_int8")
    return PackedInt8(n, k, group_size, data)


def w8a8_gemm(a: Any, w: PackedInt8 | PackedWide, out: Any = None, *, backend: str = "c", isa: str | None = None,
              num_threads: int | None = None) -> Any:  # fmt: skip
    """int8 weights, activations quantised to int8 per row and group on the way in.

    Parameters and result as :func:`assay.w4a8_gemm`, with `w` a :class:`PackedInt8`, or a :class:`assay.PackedWide` of 8 bits.
    """
    if isinstance(w, PackedWide):
        return wide_gemm(a, w, out, 8, False, backend, isa, num_threads)
    if not isinstance(w, PackedInt8):
        raise TypeError(f"w: expected PackedInt8 (see assay.pack_int8), got {type(w).__name__}")
    x, c = gemm_tensors(a, w.n, w.k, out)
    m = x.array.shape[0]
    if backend == "c":
        size = lib.assay_w8_gemm_workspace(w._struct, m)
        if not size:
            raise ValueError(f"a: expected at most 2^24 rows, got {m}")
        scratch, held = workspace(size)
        status = lib.assay_w8a8_gemm(
            w._struct, x.ptr, FLOAT_DTYPES[x.dtype], x.row_stride, m, ffi.cast("float *", c.ptr), c.row_stride,
            variant_index(isa), thread_count(num_threads), scratch, held,
        )  # fmt: skip
        check(status, "w8a8_gemm", isa)
    else:
        c.array[...] = _other_backend(backend, widen(x), w, isa)
    return c.array if out is None else out


def _other_backend(backend: str, x: np.ndarray, w: PackedInt8, isa: str | None) -> np.ndarray:
    found = twin(backend, "int8", isa)
    if found is not None:
        result: np.ndarray = found.gemm(x, w.data, w.n, w.k, w.group_size)
        return result
    qweight, scales = w.unpack()
    return reference.w8a8_gemm(x, qweight, scales, w.group_size)

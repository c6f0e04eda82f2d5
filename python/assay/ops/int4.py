"""INT4 GEMM: C[M, N] = A[M, K] @ W[N, K].T on weights packed once.

Weights are quantised in groups along K, w = scale (q - zero) with q in 0..15. The arithmetic is stated in csrc/assay.h
and, readable aloud, in :mod:`assay.reference`. Row i of the output has the same bits for every M, every number of
threads, every position in the batch, and every C variant.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import reference
from .._ffi import FLOAT_DTYPES, Tensor, as_tensor, check, ffi, lib, thread_count, variant_index, workspace
from ._backends import twin, widen, widen_a16
from ._devices import on_device
from ._gemm import aligned_empty, check_group, gemm_tensors, half_scales, pointer
from .wide import PackedWide, wide_gemm

if TYPE_CHECKING:
    from ..cuda.gemm import DeviceInt4


class PackedInt4:
    """A weight matrix in the kernels' layout; make one with :func:`pack`.

    Attributes
    ----------
    n, k : int
        Output and input features.
    group_size : int
        Weights along K that share a scale: 32, 64, 128 or k.
    symmetric : bool
        Zero point 8 everywhere.
    data : numpy.ndarray
        uint8, the packed stream (csrc/kernels.h draws it). Read only.
    """

    __slots__ = ("_struct", "data", "group_size", "k", "n", "symmetric")

    def __init__(self, n: int, k: int, group_size: int, symmetric: bool, data: np.ndarray) -> None:
        self.n, self.k, self.group_size, self.symmetric, self.data = n, k, group_size, symmetric, data
        data.flags.writeable = False
        self._struct = ffi.new(
            "assay_w4 *",
            {"n": n, "k": k, "group_size": group_size, "symmetric": symmetric, "data": Tensor(data, "uint8", data).ptr},
        )

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weights reads."""
        return self.data.nbytes

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"PackedInt4(n={self.n}, k={self.k}, group_size={self.group_size}, {kind}, {self.nbytes} bytes)"

    def unpack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What :func:`pack` was given: qweight uint8 [N, ceil(K/2)], scales float16 [N, G], zeros uint8 [N, G] or None."""
        groups = self.k // self.group_size
        qweight = np.empty((self.n, (self.k + 1) // 2), np.uint8)
        scales = np.empty((self.n, groups), np.float16)
        zeros = None if self.symmetric else np.empty((self.n, groups), np.uint8)
        status = lib.assay_w4_unpack(
            self._struct, pointer(qweight, "uint8_t *"), pointer(scales, "uint16_t *"),
            ffi.NULL if zeros is None else pointer(zeros, "uint8_t *"),
        )  # fmt: skip
        check(status, "unpack")
        return qweight, scales, zeros

    def dequantize(self) -> np.ndarray:
        """float32 [N, K]."""
        return reference.dequantize_int4(*self.unpack(), self.k, self.group_size)

    def to_device(self, device: int = 0) -> "DeviceInt4":
        """The same weights on a GPU, in the order of its kernels, for the ops whose activations are there."""
        from ..cuda.gemm import pack_on_device

        return pack_on_device(*self.unpack(), self.k, self.group_size, device)


def pack(qweight: Any, scales: Any, zeros: Any = None, *, k: int | None = None, group_size: int | None = None,
         num_threads: int | None = None) -> PackedInt4:  # fmt: skip
    """Packs INT4 weights into the kernels' layout, once.

    Parameters
    ----------
    qweight : uint8 [N, ceil(K/2)]
        Low nibble = even k.
    scales : float16 or float32 [N, K / group_size]
        Finite. float32 is rounded to float16, in which scales are kept.
    zeros : uint8 [N, K / group_size], optional
        Zero points 0..15; without them every zero point is 8 (symmetric).
    k : int, optional
        Input features, when odd (default: 2 * qweight.shape[1]).
    group_size : int, optional
        Default: K / scales.shape[1].

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    q = as_tensor(qweight, "qweight", ("uint8",), 2, contiguous=True).array
    s = as_tensor(scales, "scales", ("float16", "float32"), 2).array
    n = q.shape[0]
    k = 2 * q.shape[1] if k is None else k
    if n < 1 or k < 1 or q.shape[1] != (k + 1) // 2:
        raise ValueError(f"qweight: expected uint8 [N, ceil(K/2)] with N, K >= 1 (K = {k}), got {list(q.shape)}")
    if group_size is None:
        if s.shape[1] < 1 or k % s.shape[1]:
            raise ValueError(f"scales: expected [N, K/group_size] with K = {k}, got {list(s.shape)}")
        group_size = k // s.shape[1]
    check_group(k, group_size)
    grid = (n, k // group_size)
    if s.shape != grid:
        raise ValueError(f"scales: expected [N, K/group_size] = {list(grid)}, got {list(s.shape)}")
    s16 = half_scales(s)
    z = None
    if zeros is not None:
        z = as_tensor(zeros, "zeros", ("uint8",), 2, contiguous=True).array
        if z.shape != grid:
            raise ValueError(f"zeros: expected [N, K/group_size] = {list(grid)}, got {list(z.shape)}")
        if z.max() > 15:
            raise ValueError(f"zeros: expected 0..15, got {int(z.max())}")
    size = lib.assay_w4_packed_bytes(n, k, group_size, z is None)
    if not size:
        raise ValueError(f"qweight: expected N <= 2^28 and K <= 2^20, got N = {n}, K = {k}")
    data = aligned_empty(size)
    status = lib.assay_w4_pack(
        n, k, group_size, pointer(q, "uint8_t *"), pointer(s16, "uint16_t *"),
        ffi.NULL if z is None else pointer(z, "uint8_t *"), pointer(data, "void *"), thread_count(num_threads),
    )  # fmt: skip
    check(status, "pack")
    return PackedInt4(n, k, group_size, z is None, data)


def w4a8_gemm(a: Any, w: "PackedInt4 | PackedWide | DeviceInt4", out: Any = None, *, backend: str = "c",
              isa: str | None = None, num_threads: int | None = None, stream: Any = None) -> Any:  # fmt: skip
    """INT4 weights, activations quantised to int8 per row and group on the way in.

    Parameters
    ----------
    a : float32, float16 or bfloat16 [M, K]
        numpy or any DLPack tensor; rows may be strided, the last dimension dense. A row with a NaN or infinity
        comes out NaN, other rows do not notice. An array on a GPU makes the call run there.
    w : PackedInt4, or PackedWide of 4 bits; on a GPU, :meth:`PackedInt4.to_device`'s
    out : float32 [M, N], optional
        Written in place and returned.
    backend : {"c", "numba", "reference"}
    isa : str, optional
        Force a C variant ("scalar", "avx2", ...). :class:`assay.UnsupportedError` when this CPU lacks it.
    num_threads : int, optional
        1 runs on the calling thread alone. Default: ASSAY_NUM_THREADS, else the CPUs this process may use.
    stream : optional
        On a GPU: the CUDA stream to run on (its address, or a stream of torch, CuPy, Numba or assay.cuda). Default: the one
        that `a` is used on (docs/cuda.md).

    Returns
    -------
    float32 [M, N]
        numpy, or on a GPU an :class:`assay.cuda.DeviceArray`, which other libraries read by DLPack.
    """
    return _gemm(a, w, out, False, backend, isa, num_threads, stream)


def w4a16_gemm(a: Any, w: "PackedInt4 | PackedWide | DeviceInt4", out: Any = None, *, backend: str = "c",
               isa: str | None = None, num_threads: int | None = None, stream: Any = None) -> Any:  # fmt: skip
    """INT4 weights, activations at their own precision, float32 sums.

    float16 and bfloat16 are widened exactly, except that a bfloat16 smaller than 2^-100 in size counts as zero. On a GPU
    activations are float16 or bfloat16, and the products are its tensor cores'.

    Parameters and result as :func:`w4a8_gemm`.
    """
    return _gemm(a, w, out, True, backend, isa, num_threads, stream)


def _on_host(w: Any) -> PackedInt4:
    if isinstance(w, PackedInt4):
        return w
    from ..cuda.gemm import DeviceInt4

    if isinstance(w, DeviceInt4):
        raise TypeError(f"a: expected an array on cuda:{w.device} as w is, got one on the host")
    raise TypeError(f"w: expected PackedInt4 (see assay.pack), got {type(w).__name__}")


def _gemm(a: Any, w: "PackedInt4 | PackedWide | DeviceInt4", out: Any, a16: bool, backend: str, isa: str | None,
          num_threads: int | None, stream: Any) -> Any:  # fmt: skip
    if on_device(a, backend, stream):
        from ..cuda.gemm import w4_gemm

        return w4_gemm(a, w, out, a16, isa, stream)
    if isinstance(w, PackedWide):
        return wide_gemm(a, w, out, 4, a16, backend, isa, num_threads)
    w = _on_host(w)
    x, c = gemm_tensors(a, w.n, w.k, out)
    m = x.array.shape[0]
    if backend == "c":
        size = lib.assay_w4_gemm_workspace(w._struct, m, a16)
        if not size:
            raise ValueError(f"a: expected at most 2^24 rows, got {m}")
        scratch, held = workspace(size)
        status = (lib.assay_w4a16_gemm if a16 else lib.assay_w4a8_gemm)(
            w._struct, x.ptr, FLOAT_DTYPES[x.dtype], x.row_stride, m, ffi.cast("float *", c.ptr), c.row_stride,
            variant_index(isa), thread_count(num_threads), scratch, held,
        )  # fmt: skip
        check(status, "w4a16_gemm" if a16 else "w4a8_gemm", isa)
    else:
        c.array[...] = _other_backend(backend, a16, (widen_a16 if a16 else widen)(x), w, isa)
    return c.array if out is None else out


def _other_backend(backend: str, a16: bool, x: np.ndarray, w: PackedInt4, isa: str | None) -> np.ndarray:
    found = twin(backend, "int4", isa)
    if found is not None:
        result: np.ndarray = found.gemm(x, w.data, w.n, w.k, w.group_size, w.symmetric, a16)
        return result
    qweight, scales, zeros = w.unpack()
    return (reference.w4a16_gemm if a16 else reference.w4a8_gemm)(x, qweight, scales, zeros, w.group_size)


class SplitGemm:
    """One GEMM for threads that the caller owns.

    Each of the `nth` threads calls ``prepare(ith, nth)``, waits for the others, then calls ``run(ith, nth)``. No thread
    of assay's takes part. The result in `out` has the same bits as :func:`w4a8_gemm`'s or :func:`w4a16_gemm`'s.

    Parameters
    ----------
    a, w, out
        As for :func:`w4a8_gemm`.
    a16 : bool
        w4a16 instead of w4a8.
    """

    def __init__(self, a: Any, w: PackedInt4, out: Any = None, *, a16: bool = False, isa: str | None = None) -> None:
        self._w, self._a16, self._isa = _on_host(w), a16, isa
        self._a, self._c = gemm_tensors(a, w.n, w.k, out)
        self._m = self._a.array.shape[0]
        self._size = lib.assay_w4_gemm_workspace(w._struct, self._m, a16)
        self._scratch = ffi.from_buffer(np.empty(self._size, np.uint8))
        #: float32 [M, N]
        self.out = self._c.array if out is None else out

    def prepare(self, ith: int, nth: int) -> None:
        """This thread's share of the activations."""
        status = lib.assay_w4_gemm_prepare(
            self._w._struct, self._a.ptr, FLOAT_DTYPES[self._a.dtype], self._a.row_stride, self._m, self._a16,
            variant_index(self._isa), ith, nth, self._scratch, self._size,
        )  # fmt: skip
        check(status, "prepare", self._isa)

    def run(self, ith: int, nth: int) -> None:
        """This thread's share of the columns, once every thread's ``prepare`` has returned."""
        status = lib.assay_w4_gemm_run(
            self._w._struct, FLOAT_DTYPES[self._a.dtype], self._m, ffi.cast("float *", self._c.ptr), self._c.row_stride, self._a16,
            variant_index(self._isa), ith, nth, self._scratch, self._size,
        )  # fmt: skip
        check(status, "run", self._isa)

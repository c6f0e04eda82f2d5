"""Wide GEMM: C[M, N] = A[M, K] @ W[N, K].T for weights that float16 scales and integer zero points cannot hold.

w[n, k] = scale[n, g] v + minimum[n, g] with float32 scales and minimums, v an int8 code or one of sixteen values that a
4-bit code names. Without loss: GGUF's Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, MXFP4, NVFP4, HQQ's float zeros, and with 16-bit
activations NF4. The contract is the INT4 GEMM's: row i of the output has the same bits for every M, every number of
threads, every position in the batch, and every C variant. csrc/assay.h states the arithmetic.
"""

from typing import Any

import numpy as np

from .. import reference
from .._ffi import FLOAT_DTYPES, Tensor, as_tensor, check, ffi, lib, thread_count, variant_index, workspace
from ._backends import twin, widen, widen_a16
from ._gemm import GROUP_SIZES, aligned_empty, check_group, gemm_tensors, pointer

WIDE_GROUP_SIZES = (16, *GROUP_SIZES)
LONGEST_K = 1 << 17


class PackedWide:
    """A weight matrix in the wide kernels' layout; make one with :func:`pack_wide`.

    Attributes
    ----------
    n, k : int
        Output and input features.
    bits : {4, 8}
        Of a code.
    group_size : int
        Weights along K that share a scale: 16, 32, 64, 128 or k.
    codebook : numpy.ndarray or None
        float32 [16], the value of each 4-bit code; None for 8 bits.
    has_minimum : bool
    data : numpy.ndarray
        uint8, the packed stream (csrc/kernels.h draws it). Read only.
    """

    __slots__ = ("_struct", "bits", "codebook", "data", "group_size", "has_minimum", "k", "n")

    def __init__(self, n: int, k: int, bits: int, group_size: int, codebook: np.ndarray | None, has_minimum: bool,
                 data: np.ndarray) -> None:  # fmt: skip
        self.n, self.k, self.bits, self.group_size = n, k, bits, group_size
        self.codebook, self.has_minimum, self.data = codebook, has_minimum, data
        data.flags.writeable = False
        values = [0.0] * 16 if codebook is None else codebook.tolist()
        self._struct = ffi.new(
            "assay_wide *",
            {"n": n, "k": k, "group_size": group_size, "bits": bits, "has_minimum": has_minimum, "codebook": values,
             "data": Tensor(data, "uint8", data).ptr},
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weights reads."""
        return self.data.nbytes

    @property
    def integer(self) -> bool:
        """Whether int8 activations can be used: 8 bits, or a codebook of integers in -127..127."""
        return self.codebook is None or bool(
            ((np.rint(self.codebook) == self.codebook) & (abs(self.codebook) <= 127)).all()
        )

    def __repr__(self) -> str:
        kind = "with minimum" if self.has_minimum else "without minimum"
        return (f"PackedWide(n={self.n}, k={self.k}, bits={self.bits}, group_size={self.group_size}, {kind}, "
                f"{self.nbytes} bytes)")  # fmt: skip

    def unpack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What :func:`pack_wide` was given: qweight, scales float32 [N, G], minimum float32 [N, G] or None."""
        grid = (self.n, self.k // self.group_size)
        four = self.bits == 4
        qweight = np.empty((self.n, (self.k + 1) // 2 if four else self.k), np.uint8 if four else np.int8)
        scales = np.empty(grid, np.float32)
        minimum = np.empty(grid, np.float32) if self.has_minimum else None
        status = lib.assay_wide_unpack(
            self._struct, pointer(qweight, "void *"), pointer(scales, "float *"),
            ffi.NULL if minimum is None else pointer(minimum, "float *"),
        )  # fmt: skip
        check(status, "unpack")
        return qweight, scales, minimum

    def dequantize(self) -> np.ndarray:
        """float32 [N, K]."""
        qweight, scales, minimum = self.unpack()
        return reference.dequantize_wide(self._values(qweight), scales, minimum, self.group_size)

    def _values(self, qweight: np.ndarray) -> np.ndarray:
        return reference.wide_values(qweight, self.codebook, self.k)


def pack_wide(qweight: Any, scales: Any, minimum: Any = None, codebook: Any = None, *, bits: int, group_size: int,
              num_threads: int | None = None) -> PackedWide:  # fmt: skip
    """Packs weights w = scale v + minimum into the wide kernels' layout, once.

    Parameters
    ----------
    qweight : uint8 [N, ceil(K/2)] (bits 4, low nibble = even k) or int8 [N, K] (bits 8)
    scales : float32 [N, K / group_size]
        Finite.
    minimum : float32 [N, K / group_size], optional
        Added to each weight of a group. Finite.
    codebook : float32 [16], optional
        The value of each 4-bit code; default 0..15. Finite; integers in -127..127 for :func:`assay.w4a8_gemm`.
    bits : {4, 8}
    group_size : int
        16, 32, 64, 128 (a divisor of K) or K. K = group_size * scales.shape[1], at most 2^17.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    dtype = "uint8" if bits == 4 else "int8"
    q = as_tensor(qweight, "qweight", (dtype,), 2, contiguous=True).array
    s = _terms(scales, "scales")
    n, groups = s.shape
    if n < 1 or groups < 1 or group_size < 1:
        raise ValueError(
            f"scales: expected [N, K/group_size] with N, K, group_size >= 1, got {list(s.shape)} and {group_size}"
        )
    k = groups * group_size
    want = (n, (k + 1) // 2 if bits == 4 else k)
    if q.shape != want:
        shape = "[N, ceil(K/2)]" if bits == 4 else "[N, K]"
        raise ValueError(f"qweight: expected {dtype} {shape} = {list(want)} (K = {groups} groups of {group_size}), "
                         f"got {list(q.shape)}")  # fmt: skip
    check_group(k, group_size, WIDE_GROUP_SIZES)
    low = None
    if minimum is not None:
        low = _terms(minimum, "minimum")
        if low.shape != s.shape:
            raise ValueError(f"minimum: expected [N, K/group_size] = {list(s.shape)}, got {list(low.shape)}")
    book = _codebook(codebook, bits)
    size = lib.assay_wide_packed_bytes(n, k, group_size, bits, low is not None)
    if not size:
        raise ValueError(f"qweight: expected N <= 2^28 and K <= 2^17, got N = {n}, K = {k}")
    data = aligned_empty(size)
    status = lib.assay_wide_pack(
        n, k, group_size, bits, pointer(q, "void *"), pointer(s, "float *"),
        ffi.NULL if low is None else pointer(low, "float *"), pointer(data, "void *"), thread_count(num_threads),
    )  # fmt: skip
    check(status, "pack_wide")
    return PackedWide(n, k, bits, group_size, book, low is not None, data)


def _terms(value: Any, name: str) -> np.ndarray:
    array = np.ascontiguousarray(as_tensor(value, name, ("float32",), 2).array)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got a NaN or infinity")
    return array


def _codebook(codebook: Any, bits: int) -> np.ndarray | None:
    if bits == 8:
        if codebook is not None:
            raise ValueError("codebook: expected None with bits = 8 (a code is its own value)")
        return None
    book = np.arange(16, dtype=np.float32)
    if codebook is not None:
        book = np.array(as_tensor(codebook, "codebook", ("float32",), 1).array)
    if book.shape != (16,) or not np.isfinite(book).all():
        raise ValueError(f"codebook: expected 16 finite values, got {book.tolist()}")
    book.flags.writeable = False
    return book


def w8a16_gemm(a: Any, w: PackedWide, out: Any = None, *, backend: str = "c", isa: str | None = None,
               num_threads: int | None = None) -> Any:  # fmt: skip
    """Weights of eight bits, activations at their own precision, float32 sums.

    Parameters and result as :func:`assay.w4a8_gemm`, with `w` a :class:`PackedWide` of 8 bits.
    """
    if not isinstance(w, PackedWide):
        raise TypeError(f"w: expected PackedWide (see assay.pack_wide), got {type(w).__name__}")
    return wide_gemm(a, w, out, 8, True, backend, isa, num_threads)


def wide_gemm(a: Any, w: PackedWide, out: Any, bits: int, a16: bool, backend: str, isa: str | None,
              num_threads: int | None) -> Any:  # fmt: skip
    """The GEMMs of a :class:`PackedWide`, by whichever public function they were asked for: its bits are `bits`."""
    if w.bits != bits:
        raise ValueError(f"w: expected {bits}-bit weights, got {w!r}")
    if not a16 and not w.integer:
        assert w.codebook is not None
        raise ValueError(f"w: int8 activations need a codebook of integers in -127..127, got {w.codebook.tolist()}")
    x, c = gemm_tensors(a, w.n, w.k, out)
    m = x.array.shape[0]
    if backend == "c":
        size = lib.assay_wide_gemm_workspace(w._struct, m, a16)
        if not size:
            raise ValueError(f"a: expected at most 2^24 rows, got {m}")
        scratch, held = workspace(size)
        status = lib.assay_wide_gemm(
            w._struct, x.ptr, FLOAT_DTYPES[x.dtype], x.row_stride, m, ffi.cast("float *", c.ptr), c.row_stride, a16,
            variant_index(isa), thread_count(num_threads), scratch, held,
        )  # fmt: skip
        check(status, "wide_gemm", isa)
    else:
        c.array[...] = _other_backend(backend, a16, (widen_a16 if a16 else widen)(x), w, isa)
    return c.array if out is None else out


def _other_backend(backend: str, a16: bool, x: np.ndarray, w: PackedWide, isa: str | None) -> np.ndarray:
    found = twin(backend, "wide", isa)
    if found is not None:
        result: np.ndarray = found.gemm(x, w.data, w.n, w.k, w.group_size, w.bits, w.codebook, w.has_minimum, a16)
        return result
    qweight, scales, minimum = w.unpack()
    gemm = reference.wide_a16_gemm if a16 else reference.wide_a8_gemm
    return gemm(x, w._values(qweight), scales, minimum, w.group_size)

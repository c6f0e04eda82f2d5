"""INT4 GEMM on a GPU; called by the ops of the same names when their arrays are there."""

from typing import Any

import numpy as np

from .._ffi import FLOAT_DTYPES, ffi, lib
from ._arrays import DeviceArray, to_device
from ._place import place
from ._status import check
from ._twin import for_numba, twin

#: csrc/cuda/w4_layout.h.
_TILE, _STEP, _STEP_BYTES, _PAD = 32, 32, 512, 128


class DeviceInt4:
    """An INT4 weight matrix in a GPU's memory and in its kernels' order; made by ``PackedInt4.to_device``.

    Attributes
    ----------
    n, k, group_size : int
    symmetric : bool
    device : int
        "cuda:device".
    data : DeviceArray
        uint8, the packed form (csrc/cuda/w4_layout.h draws it).
    """

    __slots__ = ("_struct", "data", "device", "group_size", "k", "n", "symmetric")

    def __init__(self, n: int, k: int, group_size: int, symmetric: bool, data: DeviceArray) -> None:
        self.n, self.k, self.group_size, self.symmetric, self.data = n, k, group_size, symmetric, data
        self.device = data.device
        self._struct = ffi.new(
            "assay_cuda_w4 *",
            {
                "data": ffi.cast("void *", data.address),
                "n": n,
                "k": k,
                "group_size": group_size,
                "symmetric": symmetric,
            },
        )

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weights reads."""
        return self.data.nbytes

    def unpack(self, columns: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The first `columns` (default: all) as ``assay.pack`` takes them: qweight uint8 [columns, ceil(K/2)], scales float16
        [columns, G], zeros uint8 [columns, G] or None."""
        n, groups = self.n if columns is None else min(columns, self.n), self.k // self.group_size
        all_tiles, tiles, steps = -(-self.n // _TILE), -(-n // _TILE), -(-self.k // _PAD) * (_PAD // _STEP)
        words = self.data.part(0, (tiles, steps, 8, 4, 4), "uint32").numpy()  # [tile, step, n, t, j]
        # Bits 4 i + 16 e of a word are q of column 8 j + n and k = 16 (i / 2) + 8 (i % 2) + 2 t + e of its step.
        nibbles = (
            words[..., None, None] >> (16 * np.arange(2, dtype=np.uint32)[:, None] + 4 * np.arange(4, dtype=np.uint32))
            & 15
        )
        q = nibbles.reshape(tiles, steps, 8, 4, 4, 2, 2, 2).transpose(0, 4, 2, 1, 6, 7, 3, 5).astype(np.uint8)
        q = q.reshape(tiles * _TILE, steps * _STEP)[:n, : self.k]
        q = np.pad(q, ((0, 0), (0, self.k % 2)))
        at = all_tiles * steps * _STEP_BYTES
        scales = self.data.part(
            at, (tiles, groups, 4, 4, 2), "float16"
        ).numpy()  # [tile, group, t, j, e]: column 8 j + 2 t + e
        scales = scales.transpose(0, 3, 2, 4, 1).reshape(tiles * _TILE, groups)[:n]
        zeros = None
        if not self.symmetric:
            at += all_tiles * groups * 2 * _TILE
            zeros = self.data.part(at, (tiles, groups, 8, 4), "uint8").numpy()  # [tile, group, n, j]: column 8 j + n
            zeros = np.ascontiguousarray(zeros.transpose(0, 3, 2, 1).reshape(tiles * _TILE, groups)[:n])
        return q[:, ::2] | q[:, 1::2] << 4, np.ascontiguousarray(scales), zeros

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return (
            f"DeviceInt4(n={self.n}, k={self.k}, group_size={self.group_size}, {kind}, {self.nbytes} bytes "
            f"on cuda:{self.device})"
        )


def packed_bytes(n: int, k: int, group_size: int, symmetric: bool) -> int:
    """Bytes of a packed matrix on a GPU; 0 when its shape is not supported."""
    return int(lib.assay_cuda_w4_packed_bytes(n, k, group_size, symmetric))


def pack_on_device(qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, k: int, group_size: int,
                   device: int) -> DeviceInt4:  # fmt: skip
    """Canonical host arrays (see ``assay.pack``) to the GPU's order, and there."""
    n = len(scales)
    size = lib.assay_cuda_w4_packed_bytes(n, k, group_size, zeros is None)
    if not size:
        raise ValueError(f"to_device: expected N and K below 2^24, got N = {n}, K = {k}")
    packed = np.empty(size, np.uint8)
    status = lib.assay_cuda_w4_pack(
        n, k, group_size, ffi.from_buffer("uint8_t[]", qweight), ffi.from_buffer("uint16_t[]", scales.view(np.uint16)),
        ffi.NULL if zeros is None else ffi.from_buffer("uint8_t[]", zeros), ffi.from_buffer(packed),
    )  # fmt: skip
    check(status, "to_device")
    return DeviceInt4(n, k, group_size, zeros is None, to_device(packed, device))


def w4_gemm(a: Any, w: Any, out: Any, a16: bool, kernel: str | None, stream: Any) -> Any:
    """``assay.w4a16_gemm`` and ``assay.w4a8_gemm``, which say what the arguments are."""
    name = "w4a16_gemm" if a16 else "w4a8_gemm"
    if not isinstance(w, DeviceInt4):
        raise TypeError(f"w: expected weights on the GPU as a is (PackedInt4.to_device), got {type(w).__name__}")
    if kernel not in ({None, "gemv"} if a16 else {None}):
        raise ValueError(f"isa: expected None{' or gemv' if a16 else ''} for arrays on a GPU, got {kernel!r}")
    dtypes = ("float16", "bfloat16") if a16 else tuple(FLOAT_DTYPES)
    with place((a, w.data), stream, out) as here:
        x = here.tensor(a, "a", dtypes, 2)
        weights = here.tensor(w.data, "w", ("uint8",), 1)
        m, k = x.shape
        if k != w.k:
            raise ValueError(f"a: expected [M, K] with K = {w.k}, got {list(x.shape)}")
        c, result = here.output(out, "out", "float32", (m, w.n))
        to = ffi.cast("float *", c.address)
        if kernel == "gemv":
            if m > 8:
                raise ValueError(f"a: expected at most 8 rows for isa='gemv', got {m}")
            status = lib.assay_cuda_w4a16_gemv(
                w._struct, x.ptr, FLOAT_DTYPES[x.dtype], x.row_stride, m, to, c.row_stride, here.stream
            )
            check(status, name)
            return result
        size = lib.assay_cuda_w4_gemm_workspace(w._struct, m, a16)
        if not size:
            raise ValueError(f"a: expected at most 2^20 rows, got {m}")
        status = (lib.assay_cuda_w4a16_gemm if a16 else lib.assay_cuda_w4a8_gemm)(
            w._struct, x.ptr, FLOAT_DTYPES[x.dtype], x.row_stride, m, to, c.row_stride,
            here.workspace(size, "w4_gemm", zeros=True), size, here.stream,
        )  # fmt: skip
        if status == lib.ASSAY_CUDA_EIMAGE and a16:  # no kernels are compiled for this GPU
            run = twin("cuda_int4").w4a16_gemm
            queue, rows, packed, written = for_numba(here.handle, x, weights, c)
            run(packed, w.n, w.k, w.group_size, w.symmetric, rows, FLOAT_DTYPES[x.dtype], written, queue)
        else:
            check(status, name)
    return result

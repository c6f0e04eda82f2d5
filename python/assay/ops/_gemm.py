"""What the INT4, the int8 and the wide GEMM share: arguments and memory."""

import mmap
import threading
from contextlib import suppress
from typing import Any

import numpy as np

from .._ffi import FLOAT_NAMES, Tensor, as_output, as_tensor, ffi

GROUP_SIZES = (32, 64, 128)


def pointer(array: np.ndarray, kind: str) -> Any:
    """Address of an array that the caller keeps."""
    if array.flags.c_contiguous and array.size:  # a third of the time of asking numpy for the address
        return ffi.cast(kind, ffi.from_buffer(array))
    return ffi.cast(kind, array.__array_interface__["data"][0])


def check_group(k: int, group_size: int, sizes: tuple[int, ...] = GROUP_SIZES) -> None:
    if group_size not in sizes and group_size != k:
        listed = ", ".join(map(str, sizes))
        raise ValueError(f"group_size: expected {listed} or K = {k}, got {group_size}")
    if k % group_size:
        raise ValueError(f"group_size: expected a divisor of K = {k}, got {group_size}")


_HUGE_PAGE = 2 << 20
#: Weights that take less than half of this share it with others: resident is only what they touch.
_SLAB = 32 << 20


def _huge_empty(nbytes: int) -> np.ndarray:
    """uint8 [nbytes] at the start of a huge page, on huge pages to its end where the system grants them."""
    whole = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(memory, np.uint8)
    skip = -raw.__array_interface__["data"][0] % _HUGE_PAGE
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, skip, whole)
    return raw[skip : skip + nbytes]


class _Slabs:
    """Small pieces of memory, one behind the other on huge pages; a slab is freed with the last of its pieces."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab = np.empty(0, np.uint8)
        self._used = 0

    def take(self, nbytes: int) -> np.ndarray:
        with self._lock:
            if self._used + nbytes > self._slab.nbytes:
                self._slab, self._used = _huge_empty(_SLAB), 0
            at = self._used
            self._used = -(-(at + nbytes) // 64) * 64
            return self._slab[at : at + nbytes]


_slabs = _Slabs()


def aligned_empty(nbytes: int) -> np.ndarray:
    """uint8 [nbytes] on a cache line, on huge pages where the system grants them.

    On small pages a stream of weights waits for address translation: products of up to 16 rows with matrices of 0.1 to 1.4 MB
    take 1.2 to 1.6 times as long (``benchmarks/closure.py --pages``). So matrices smaller than a huge page share them.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.empty(nbytes + 63, np.uint8)
        skip = -raw.__array_interface__["data"][0] % 64
        return raw[skip : skip + nbytes]
    return _slabs.take(nbytes) if nbytes < _SLAB // 2 else _huge_empty(nbytes)


def half_scales(scales: np.ndarray) -> np.ndarray:
    """Scales as the kernels keep them: float16, C order, finite."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(scales, np.float16)
    if not np.isfinite(half).all():
        raise ValueError("scales: expected finite values within float16's range (65504)")
    return half


def gemm_tensors(a: Any, n: int, k: int, out: Any) -> tuple[Tensor, Tensor]:
    """Activations [M, K] and output float32 [M, N] of a GEMM, checked."""
    x = as_tensor(a, "a", FLOAT_NAMES, 2)
    if x.array.shape[1] != k:
        raise ValueError(f"a: expected [M, K] with K = {k}, got {list(x.array.shape)}")
    c = as_output(out, "out", "float32", (x.array.shape[0], n))
    if out is not None and np.may_share_memory(c.array, x.array, 0):
        raise ValueError("out: expected memory of its own, got memory shared with a")
    return x, c

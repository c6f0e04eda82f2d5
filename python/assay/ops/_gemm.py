"""What the INT4, the int8 and the wide GEMM share: arguments and memory."""

import mmap
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


def aligned_empty(nbytes: int) -> np.ndarray:
    """uint8 [nbytes] on a cache line; from 2 MiB on huge pages as far as they fill.

    On small pages a stream of weights waits for address translation: an INT4 matrix of 2.4 MB takes 15 to 25% longer.
    """
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.empty(nbytes + 63, np.uint8)
        skip = -raw.__array_interface__["data"][0] % 64
        return raw[skip : skip + nbytes]
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(memory, np.uint8)
    skip = -raw.__array_interface__["data"][0] % _HUGE_PAGE
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, skip, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return raw[skip : skip + nbytes]


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

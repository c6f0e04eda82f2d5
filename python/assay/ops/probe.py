"""The roofs: what this machine can do at most, measured by the same threads that run the kernels."""

import numpy as np

from .._ffi import check, ffi, lib, thread_count, variant_index
from ..errors import AssayError


def _seconds(value: float, what: str, isa: str | None) -> float:
    if value <= 0:
        check(lib.ASSAY_EISA if isa else lib.ASSAY_EINVAL, what, isa)
    return value


def read_bandwidth(
    buffer: np.ndarray, num_threads: int | None = None, repeats: int = 1, isa: str | None = None, ahead: int = 0
) -> float:
    """Bytes per second of reading all of `buffer` `repeats` times, in order.

    Parameters
    ----------
    buffer : numpy.ndarray
        C-contiguous; several times the last-level cache to measure DRAM, a fraction of it to measure the cache.
    ahead : int
        Bytes that a line is asked for before it is read; 0 leaves it to the processor's own prefetcher.
    """
    if not buffer.flags.c_contiguous or not buffer.nbytes:
        raise ValueError(f"buffer: expected a C-contiguous array with elements, got shape {list(buffer.shape)}")
    if ahead < 0:
        raise ValueError(f"ahead: expected 0 bytes or more, got {ahead}")
    time_s = lib.assay_probe_read(
        ffi.from_buffer(buffer), buffer.nbytes, repeats, ahead, variant_index(isa), thread_count(num_threads)
    )
    return float(buffer.nbytes * repeats / _seconds(time_s, "read_bandwidth", isa))


_PEAKS = {"int8": lib.assay_probe_int8, "fp32": lib.assay_probe_fp32, "exp": lib.assay_probe_exp}


def run_peak(kind: str, iterations: int, num_threads: int | None = None, isa: str | None = None) -> tuple[float, float]:
    """Operations done by `iterations` turns of a peak loop on every thread, and the seconds that they took.

    Parameters
    ----------
    kind : {"int8", "fp32", "exp"}
        "exp" counts elements.
    """
    call = _PEAKS.get(kind)
    if call is None:
        raise ValueError(f"kind: expected int8, fp32 or exp, got {kind!r}")
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
    ops = ffi.new("double *")
    time_s = call(iterations, variant_index(isa), thread_count(num_threads), ops)
    return float(ops[0]), float(_seconds(time_s, f"{kind}_peak", isa))


def _peak(kind: str, num_threads: int | None, seconds: float, isa: str | None) -> float:
    if not 0 < seconds <= 10:
        raise ValueError(f"seconds: expected over 0 and at most 10, got {seconds}")
    iterations = 1000
    while True:
        ops, time_s = run_peak(kind, iterations, num_threads, isa)
        if time_s >= seconds / 2 or iterations > 1 << 40:
            return ops / time_s
        iterations = max(2 * iterations, int(iterations * min(seconds / time_s, 100)))


def int8_peak(num_threads: int | None = None, seconds: float = 0.01, isa: str | None = None) -> float:
    """Operations per second (a multiply-add counts two) of the tier's densest int8 dot-product loop."""
    return _peak("int8", num_threads, seconds, isa)


def fp32_peak(num_threads: int | None = None, seconds: float = 0.01, isa: str | None = None) -> float:
    """Operations per second (a multiply-add counts two) of independent float32 FMAs."""
    return _peak("fp32", num_threads, seconds, isa)


def exp_rate(num_threads: int | None = None, seconds: float = 0.01, isa: str | None = None) -> float:
    """Elements per second of sum exp(x - m) in float32 (relative error below 1.7e-7, csrc/cpu/vexp.h), x in L1."""
    return _peak("exp", num_threads, seconds, isa)


def dispatch_latency(num_threads: int, repeats: int = 1001) -> float:
    """Median seconds of handing a job to `num_threads` threads until every one has begun and all have ended."""
    value = float(lib.assay_dispatch_latency(num_threads, repeats))
    if value < 0:
        raise AssayError(
            f"dispatch_latency: expected 1..256 threads and 1..100000 repeats, got {num_threads}, {repeats}"
        )
    return value

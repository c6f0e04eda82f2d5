"""The roofs: DRAM and last-level-cache read bandwidth, int8 and float32 peak, at each number of threads."""

import mmap
from collections.abc import Iterable

import numpy as np

from ..machine import Machine, memory_bytes
from ..ops import probe

#: One near-roof reading: long enough to be steady, short enough to stand beside every visit to a point.
SLICE_BYTES = 16 << 20
#: A cache may be larger than it is said to be, as in a virtual machine.
MIN_BUFFER_BYTES = 256 << 20


def read_buffer(machine: Machine) -> np.ndarray:
    """Memory to read from: at least four last-level caches, at most an eighth of what is free; on huge pages if granted."""
    wanted = max(4 * machine.last_level_cache_bytes, MIN_BUFFER_BYTES)
    size = int(min(wanted, (memory_bytes("MemAvailable") or 8 * wanted) // 8))
    size = max(size // SLICE_BYTES, 2) * SLICE_BYTES
    memory = mmap.mmap(-1, size)
    if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without transparent huge pages: the reading is a little lower, and true
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = 1
    return buffer


def thread_counts(threads: Iterable[int]) -> list[int]:
    """The counts at which roofs are read: those of the points, and the powers of two below the largest."""
    given = set(threads)
    return sorted(given | {1 << i for i in range(max(given).bit_length()) if 1 << i < max(given)})


class Roofs:
    """Measures roofs, keeping all readings.

    Attributes
    ----------
    readings : dict
        (name, threads) to a list of values, in bytes or operations per second.
    buffer : numpy.ndarray
        uint8, what the DRAM roof reads.
    """

    def __init__(self, machine: Machine, threads: list[int]) -> None:
        self._machine, self._threads = machine, thread_counts(threads)
        self.buffer = read_buffer(machine)
        self._at = 0
        self.readings: dict[tuple[str, int], list[float]] = {}

    @property
    def cached(self) -> tuple[np.ndarray, int]:
        """The part of the buffer that stands for the last-level cache, and how often one reading goes over it."""
        size = max(1 << 20, min(self._machine.last_level_cache_bytes // 4, 8 << 20))
        return self.buffer[:size], max(1, (32 << 20) // size)

    def near(self, threads: int) -> dict[str, float]:
        """DRAM bandwidth and int8 peak right now: a slice that was not read lately, and two milliseconds of products."""
        self._at = (self._at + SLICE_BYTES) % self.buffer.nbytes
        part = self.buffer[self._at : self._at + SLICE_BYTES]
        found = {"dram_read": probe.read_bandwidth(part, threads), "int8_peak": probe.int8_peak(threads, seconds=0.002)}
        for name, value in found.items():
            self._keep(name, threads, value)
        return found

    def measure(self) -> None:
        """One reading of every roof at every number of threads."""
        cached, repeats = self.cached
        for t in self._threads:
            self._keep("dram_read", t, probe.read_bandwidth(self.buffer, t))
            probe.read_bandwidth(cached, t)  # brings it in
            self._keep("llc_read", t, probe.read_bandwidth(cached, t, repeats=repeats))
            self._keep("int8_peak", t, probe.int8_peak(t))
            self._keep("fp32_peak", t, probe.fp32_peak(t))

    def _keep(self, name: str, threads: int, value: float) -> None:
        self.readings.setdefault((name, threads), []).append(value)

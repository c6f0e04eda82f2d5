"""The roofs: DRAM and last-level-cache read bandwidth, int8 and float32 peak, at each number of threads.

``int8_peak`` is the best tier's. Where that is AMX's tiles, which kernels leave to the vector instructions when rows are few,
``int8_vector_peak`` is theirs. ``read_64MiB`` and so on read so many bytes over and over, as steps of a model do: what a large or
shared cache keeps of them is then faster than DRAM.
"""

from collections.abc import Iterable

import numpy as np

from ..machine import Machine
from ..ops import info, probe
from ..profile import SET_ROOFS
from .arena import Arena

#: One near-roof reading: long enough to be steady, short enough to stand beside every visit to a point.
SLICE_BYTES = 16 << 20
#: What a reading of a working set goes over at least.
SET_BYTES = 256 << 20


def thread_counts(threads: Iterable[int]) -> list[int]:
    """The counts at which roofs are read: those of the points, and the powers of two below the largest."""
    given = set(threads)
    return sorted(given | {1 << i for i in range(max(given).bit_length()) if 1 << i < max(given)})


class Roofs:
    """Measures roofs, keeping all readings.

    Parameters
    ----------
    arena
        What the DRAM roof reads.

    Attributes
    ----------
    readings : dict
        (name, threads) to a list of values, in bytes or operations per second.
    """

    def __init__(self, machine: Machine, threads: list[int], arena: Arena) -> None:
        self._machine, self._threads, self._arena = machine, thread_counts(threads), arena
        self._vector = "avx512vnni" if info.kernel_versions()["probe"] == "amx" else None
        self.readings: dict[tuple[str, int], list[float]] = {}

    @property
    def cached(self) -> tuple[np.ndarray, int]:
        """The part of the arena that stands for the last-level cache, and how often one reading goes over it."""
        size = max(1 << 20, min(self._machine.last_level_cache_bytes // 4, 8 << 20))
        size = min(size, self._arena.data.nbytes)
        return self._arena.data[:size], max(1, (32 << 20) // size)

    def near(self, threads: int) -> dict[str, float]:
        """DRAM bandwidth and int8 peak right now: a slice that was not read lately, and two milliseconds of products."""
        part = self._arena.take(min(SLICE_BYTES, self._arena.data.nbytes // 2))
        found = {"dram_read": probe.read_bandwidth(part, threads), "int8_peak": probe.int8_peak(threads, seconds=0.002)}
        for name, value in found.items():
            self._keep(name, threads, value)
        return found

    def measure(self) -> None:
        """One reading of every roof at every number of threads."""
        cached, repeats = self.cached
        for t in self._threads:
            self._keep("dram_read", t, probe.read_bandwidth(self._arena.data, t))
            probe.read_bandwidth(cached, t)  # brings it in
            self._keep("llc_read", t, probe.read_bandwidth(cached, t, repeats=repeats))
            for name, size in SET_ROOFS.items():
                if size <= self._arena.data.nbytes // 2:
                    part = self._arena.data[:size]
                    probe.read_bandwidth(part, t)  # what the caches keep of it is there from here on
                    self._keep(name, t, probe.read_bandwidth(part, t, repeats=max(1, SET_BYTES // size)))
            self._keep("int8_peak", t, probe.int8_peak(t))
            if self._vector is not None:
                self._keep("int8_vector_peak", t, probe.int8_peak(t, isa=self._vector))
            self._keep("fp32_peak", t, probe.fp32_peak(t))

    def _keep(self, name: str, threads: int, value: float) -> None:
        self.readings.setdefault((name, threads), []).append(value)

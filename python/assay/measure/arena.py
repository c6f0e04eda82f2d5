"""The memory that timed calls read: larger than the last-level cache, one for all points and roofs.

A call takes the next piece, whatever it is a call of, so that what it reads was last touched a whole arena ago. The
content is noise that serves as anything: as float32 it is normal; as packed weights its codes are random, and every 16 bits
at an even place are a finite float16 scale, neither subnormal nor large. It repeats every `PERIOD_BYTES`.
"""

import mmap
from typing import Any

import numpy as np

from ..machine import Machine, memory_bytes
from ..ops.int4 import aligned_empty

#: How many last-level caches the arena is, and how small it may not be: a cache may be larger than it is said to be, as in a
#: virtual machine.
CACHES = 2.5
MIN_BYTES = 256 << 20
PERIOD_BYTES = 64 << 20


class Ring:
    """Memory whose pieces are handed out in turn; `data` is the whole, `period` a copy of its first period on the host."""

    data: Any
    period: np.ndarray

    def __init__(self) -> None:
        self._at = 0

    def take(self, nbytes: int) -> Any:
        """The next `nbytes` on a cache line; from the start again where they would not fit.

        Raises
        ------
        ValueError
            More than the whole.
        """
        if nbytes > self.data.nbytes:
            raise ValueError(f"arena: expected at most {self.data.nbytes} bytes, got {nbytes}")
        return self._piece(self._at, nbytes)

    def take_slot(self, nbytes: int) -> tuple[int, Any]:
        """The next of the `slots` of `nbytes` within a period, and which of them it is: equal ones have equal content."""
        slots, period = self.slots(nbytes), self.period.nbytes
        lap, within = divmod(self._at, period)
        slot = -(-within // nbytes)
        if slot >= slots:
            lap, slot = lap + 1, 0
        if lap * period + (slot + 1) * nbytes > self.data.nbytes:
            lap = slot = 0
        return slot, self._piece(lap * period + slot * nbytes, nbytes)

    def slots(self, nbytes: int) -> int:
        """How many pieces of `nbytes` a period holds, one behind the other.

        Raises
        ------
        ValueError
            None.
        """
        if nbytes > self.period.nbytes:
            raise ValueError(f"arena: expected at most {self.period.nbytes} bytes, got {nbytes}")
        return self.period.nbytes // nbytes

    def _piece(self, at: int, nbytes: int) -> Any:
        if at + nbytes > self.data.nbytes:
            at = 0
        self._at = -(-(at + nbytes) // 64) * 64
        return self._part(at, nbytes)

    def _part(self, at: int, nbytes: int) -> Any:
        return self.data[at : at + nbytes]


class Arena(Ring):
    """Noise larger than the cache.

    Parameters
    ----------
    machine
        Its last-level cache decides the size; an eighth of the free memory is the most.
    seed
        Of the noise.
    nbytes
        The size wanted, instead of `CACHES` last-level caches.
    at_least
        What one call may read: the arena is a quarter larger, if memory allows.

    Attributes
    ----------
    data : numpy.ndarray
        uint8, the whole, on huge pages if granted; a multiple of a page.
    """

    def __init__(self, machine: Machine, seed: int = 0, nbytes: float | None = None, at_least: float = 0.0) -> None:
        super().__init__()
        wanted = max(CACHES * machine.last_level_cache_bytes, MIN_BYTES) if nbytes is None else nbytes
        wanted = max(wanted, 1.25 * at_least)
        size = int(min(wanted, (memory_bytes("MemAvailable") or 8 * wanted) / 8))
        size = max(size // mmap.PAGESIZE, 2) * mmap.PAGESIZE
        self.data = aligned_empty(size)
        period = self.data[: min(PERIOD_BYTES, size)]
        self.period = fill(period, seed)
        for at in range(period.nbytes, size, period.nbytes):
            self.data[at : at + period.nbytes] = period[: size - at]


def fill(period: np.ndarray, seed: int) -> np.ndarray:
    """Noise into uint8 memory; the float32 view of it."""
    noise = period[: period.nbytes // 4 * 4].view(np.float32)
    np.random.default_rng([seed, 7]).standard_normal(out=noise, dtype=np.float32)
    # The high half of a float32 of 2^-15 to 8 in size is a float16 of 0.5 to 4 already; the few smaller ones are set to 1.
    noise[np.abs(noise) < 2.0**-15] = 1.0
    words = noise.view(np.uint32)
    # The low half as a float16: exponent 8 to 15 of 31, so 2^-7 to 2.
    words &= np.uint32(0xFFFFBFFF)
    words |= np.uint32(0x00002000)
    return noise

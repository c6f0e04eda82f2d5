"""The process that reads the roofs between the contenders' turns."""

import statistics

from assay import machine
from assay.measure.arena import Arena, Ring
from assay.measure.roofs import SLICE_BYTES, Roofs
from assay.ops import probe

READINGS = 5
#: Ways of reading memory: left to the processor's prefetcher, and lines asked for so many bytes ahead. On Granite Rapids the
#: second is faster by a tenth on two threads and by a sixth on one.
AHEAD = (0, 1024, 2048)


def dram_read(memory: Ring, threads: int) -> float:
    """Bytes per second of reading DRAM right now, the fastest way: of each, the median of a few short readings.

    Memory that lay idle for a while is slow when it is touched again, as in a virtual machine whose host then maps it anew. So
    the whole is read once before, from where the readings begin: what they read was touched a moment ago, and all the rest since.
    """
    pieces = max(1, memory.data.nbytes // SLICE_BYTES)
    size = min(SLICE_BYTES, memory.data.nbytes)
    for _ in range(pieces):
        probe.read_bandwidth(memory.take(size), threads)
    return max(
        statistics.median(probe.read_bandwidth(memory.take(size), threads, ahead=ahead) for _ in range(READINGS))
        for ahead in AHEAD
    )


class Reader:
    """DRAM and cache bandwidth, int8 peak, rate of exponentials."""

    def __init__(self) -> None:
        here = machine.describe()
        self._arena = Arena(here)
        self._roofs = Roofs(here, [1], self._arena)

    def versions(self) -> dict[str, str]:
        return {}

    def read(self, threads: int) -> dict[str, float]:
        """Bytes per second and operations per second right now: medians of a few short readings."""
        cached, repeats = self._roofs.cached
        probe.read_bandwidth(cached, threads)  # brings it in
        cache = probe.read_bandwidth(cached, threads, repeats=repeats)
        int8 = statistics.median(probe.int8_peak(threads, seconds=0.002) for _ in range(READINGS))
        exp = statistics.median(probe.exp_rate(threads, seconds=0.002) for _ in range(READINGS))
        return {"llc_read": cache, "exp_rate": exp, "dram_read": dram_read(self._arena, threads), "int8_peak": int8}

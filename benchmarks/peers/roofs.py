"""The process that reads the roofs between the contenders' turns."""

import statistics

from assay import machine
from assay.measure.arena import Arena
from assay.measure.roofs import Roofs
from assay.ops import probe

READINGS = 5


class Reader:
    """DRAM and cache bandwidth, int8 peak, rate of exponentials."""

    def __init__(self) -> None:
        here = machine.describe()
        self._roofs = Roofs(here, [1], Arena(here))

    def versions(self) -> dict[str, str]:
        return {}

    def read(self, threads: int) -> dict[str, float]:
        """Bytes per second and operations per second right now: medians of a few short readings."""
        cached, repeats = self._roofs.cached
        probe.read_bandwidth(cached, threads)  # brings it in
        cache = probe.read_bandwidth(cached, threads, repeats=repeats)
        near = [self._roofs.near(threads) for _ in range(READINGS)]
        exp = statistics.median(probe.exp_rate(threads, seconds=0.002) for _ in range(READINGS))
        found = {name: statistics.median(r[name] for r in near) for name in near[0]}
        return {"llc_read": cache, "exp_rate": exp, **found}

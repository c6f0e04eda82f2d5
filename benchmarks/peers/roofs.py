"""The process that reads the roofs between the contenders' turns."""

from assay import machine
from assay.measure.roofs import Roofs
from assay.ops import probe


class Reader:
    """DRAM and cache bandwidth, int8 peak."""

    def __init__(self) -> None:
        self._roofs = Roofs(machine.describe(), [1])

    def versions(self) -> dict[str, str]:
        return {}

    def read(self, threads: int) -> dict[str, float]:
        """Bytes per second and operations per second right now."""
        cached, repeats = self._roofs.cached
        probe.read_bandwidth(cached, threads)  # brings it in
        cache = probe.read_bandwidth(cached, threads, repeats=repeats)
        return {**self._roofs.near(threads), "llc_read": cache}

"""The process that reads the roofs between the contenders' turns."""

from assay import machine
from assay.measure.roofs import Roofs


class Reader:
    """DRAM bandwidth and int8 peak."""

    def __init__(self) -> None:
        self._roofs = Roofs(machine.describe(), [1])

    def versions(self) -> dict[str, str]:
        return {}

    def read(self, threads: int) -> dict[str, float]:
        """Bytes per second and operations per second right now."""
        return self._roofs.near(threads)

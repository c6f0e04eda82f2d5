"""What a GPU does while it is timed: clocks, what holds them back, temperature, watts, joules; by NVML (nvidia-ml-py).

Without it, without its library, or of a GPU that it does not know nothing is read, and `why` says so. A field that a GPU does
not have is left out.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU down (nvml.h). The others are an idle GPU and clocks that
#: somebody set.
SLOWED = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Reading:
    """One look; None where the GPU does not say."""

    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttled: tuple[str, ...] = field(default=())


def conditions(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """Of several looks: median clocks and watts, the highest temperature, everything that slowed the GPU in any of them."""
    if not readings:
        return None
    found: dict[str, Any] = {}
    ways: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
        ("sm_clock_hz", statistics.median), ("memory_clock_hz", statistics.median), ("temperature_c", max),
        ("power_w", statistics.median),
    )  # fmt: skip
    for name, way in ways:
        values = [value for reading in readings if (value := getattr(reading, name)) is not None]
        if values:
            found[name] = float(way(values))
    slowed = {reason for reading in readings for reason in reading.throttled}
    if slowed:
        found["throttled"] = sorted(slowed)
    return found or None


class Watch:
    """Reads one GPU.

    Parameters
    ----------
    uuid : str
        32 hexadecimal digits, as the driver tells.

    Attributes
    ----------
    why : str
        Why there is nothing to read; empty when there is.
    driver : str
        Version of the display driver.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self.why = self.driver = ""
        try:
            import pynvml
        except ImportError:
            self.why = "nvidia-ml-py is not installed (pip install 'assay[gpu]')"
            return
        parts = (uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:])
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-" + "-".join(parts))
            driver = pynvml.nvmlSystemGetDriverVersion()
        except pynvml.NVMLError as exc:
            self.why = f"NVML: {exc}"
            return
        self.driver = driver.decode() if isinstance(driver, bytes) else str(driver)
        self._nvml = pynvml

    def _ask(self, name: str, *more: Any) -> float | None:
        function = getattr(self._nvml, name, None)
        if function is None:
            return None
        try:
            return float(function(self._handle, *more))
        except self._nvml.NVMLError:
            return None

    def read(self) -> Reading | None:
        """A look now; None without NVML."""
        if self._nvml is None:
            return None

        def scaled(value: float | None, by: float) -> float | None:
            return None if value is None else value * by

        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # nvidia-ml-py before 12.535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        bits = int(reasons or 0)
        return Reading(
            scaled(self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM), 1e6),
            scaled(self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM), 1e6),
            self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
            scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3),
            tuple(name for bit, name in SLOWED.items() if bits & bit),
        )

    def joules(self) -> float | None:
        """Since the driver was loaded; None where it is not counted (before Volta)."""
        if self._nvml is None:
            return None
        found = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None else 1e-3 * found

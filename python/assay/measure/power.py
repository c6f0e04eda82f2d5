"""Watts of this machine while it measures: RAPL energy counters of the CPU, NVML of the GPUs, where they are readable.

RAPL: the kernel's powercap files, ``energy_uj`` that wraps at ``max_energy_range_uj`` (Linux Documentation/power/powercap).
Most systems let only root read them, and virtual machines have none: that is said, never guessed at.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


def _rapl(root: Path) -> tuple[dict[str, tuple[Path, int]], str]:
    """Readable package counters with the value they wrap at, and why there are none."""
    domains = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1)
    if not domains:
        return {}, f"no RAPL domain in {root}"
    found, why = {}, ""
    for path in domains:
        try:
            name = (path / "name").read_text().strip()
            int((path / "energy_uj").read_text())
            found[f"{name} ({path.name})"] = path / "energy_uj", int((path / "max_energy_range_uj").read_text())
        except (OSError, ValueError) as exc:
            why = f"{path / 'energy_uj'}: {getattr(exc, 'strerror', None) or exc}"
    return found, why


def gpu_watts() -> tuple[dict[str, float], str]:
    """Watts now by GPU, and why there are none."""
    try:
        import pynvml
    except ImportError:
        return {}, "nvidia-ml-py is not installed (pip install 'assay[gpu]')"
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            watts = {f"gpu {i}": pynvml.nvmlDeviceGetPowerUsage(h) * 1e-3 for i, h in enumerate(handles)}
            return watts, "" if watts else "NVML sees no GPU"
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as exc:
        return {}, f"NVML: {exc}"


class Meter:
    """Mean watts of each CPU package from when it was made (or the last `reading`); a counter may wrap once between."""

    def __init__(self, root: Path = POWERCAP, clock: Callable[[], float] = time.monotonic) -> None:
        self._domains, self._why = _rapl(root)
        self._clock = clock
        self._start = clock()
        self._first = self._counters()

    def _counters(self) -> dict[str, int]:
        values = {}
        for name, (path, _) in self._domains.items():
            try:
                values[name] = int(path.read_text())
            except (OSError, ValueError) as exc:  # readable before, gone now: a domain that was taken offline
                self._why = f"{path}: {getattr(exc, 'strerror', None) or exc}"
        return values

    def reading(self) -> dict[str, Any]:
        """``{"cpu_w": {domain: watts}, "gpu_w": {gpu: watts now}, "not_readable": [why, ...]}``; starts anew."""
        now, at = self._counters(), self._clock()
        seconds = max(at - self._start, 1e-9)
        cpu = {}
        for name, value in now.items():
            if name in self._first:
                moved = value - self._first[name]
                cpu[name] = 1e-6 * (moved if moved >= 0 else moved + self._domains[name][1]) / seconds
        self._start, self._first = at, now
        gpu, why = gpu_watts()
        return {"cpu_w": cpu, "gpu_w": gpu, "not_readable": [w for w in (self._why, why) if w]}


def describe(reading: dict[str, Any]) -> str:
    """One line: watts by domain, and what was not readable."""
    watts = [f"{name} {value:.1f} W" for name, value in (*reading["cpu_w"].items(), *reading["gpu_w"].items())]
    missing = "; ".join(reading["not_readable"])
    return "power: " + ", ".join([*watts, *([f"not readable: {missing}"] if missing else [])])

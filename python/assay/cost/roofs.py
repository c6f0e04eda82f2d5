"""The measured ceilings of a profile, and which of them bounds what."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from assay.errors import ProfileError
from assay.profile import SET_ROOFS, Roof, Sample

COMPUTE_ROOF = {
    "w4a8_gemm": "int8_peak",
    "w4a16_gemm": "fp32_peak",
    "w8a8_gemm": "int8_peak",
    "w4a16_gemv": "fp32_peak",
    "moe_experts": "int8_peak",
}


class Roofs:
    """Measured ceilings by name and threads; of a thread count without one, the nearest is taken.

    ``earlier``: medians by ``name@threads`` of earlier runs on the machine, as a profile's ``settings.earlier`` has them.
    """

    def __init__(self, roofs: Iterable[Roof], earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._earlier = [run["roofs"] for run in earlier]
        self._by_name: dict[str, dict[int, Roof]] = {}
        for roof in roofs:
            self._by_name.setdefault(roof.name, {})[roof.threads] = roof

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def drift(self, roof: Roof) -> float:
        """90% half width, in log, of what a roof will be when a prediction is used.

        Within a run 1.645 sigma, sigma = IQR / 1.349. Between runs, where there were several: the 90th percentile of how far
        the medians of two runs were apart (the largest of fewer than ten). The two are independent.
        """
        within = 1.645 / 1.349 * roof.spread
        key = f"{roof.name}@{roof.threads}"
        medians = np.log([*(run[key] for run in self._earlier if key in run), roof.median])
        if medians.size < 2:
            return within
        apart = np.sort([abs(a - b) for i, a in enumerate(medians) for b in medians[:i]])
        return math.hypot(within, float(apart[min(math.ceil(0.9 * (apart.size + 1)), apart.size) - 1]))

    def threads(self, name: str) -> tuple[int, ...]:
        """Thread counts at which a roof was measured."""
        return tuple(sorted(self._by_name.get(name, {})))

    def reuse(self, working_set: float, threads: int) -> tuple[float, Roof]:
        """How many times as fast as DRAM so many bytes are read that are read again and again, at least 1; and the roof that says so.

        Between measured sizes the logarithm of the speed is linear in that of the size, and it never grows with the size. 1 where
        no such roof was measured.
        """
        dram = self.get("dram_read", threads)
        knots = [(size, self.get(name, threads)) for name, size in SET_ROOFS.items() if name in self]
        if not knots:
            return 1.0, dram
        speeds = np.maximum.accumulate([math.log(max(roof.median / dram.median, 1.0)) for _, roof in knots[::-1]])[::-1]
        sizes = [math.log(size) for size, _ in knots]
        size = math.log(max(working_set, 1.0))
        nearest = min(range(len(knots)), key=lambda i: abs(sizes[i] - size))
        # Beyond the largest set that was read nothing is kept, whatever the last reading was a little above DRAM.
        gain = 0.0 if size > sizes[-1] else float(np.interp(size, sizes, speeds))
        return math.exp(gain), knots[nearest][1]

    def named(self, name: str) -> str:
        """The roof that stands for `name` here."""
        return "fp16_peak" if name == "fp32_peak" and name not in self and "fp16_peak" in self else name

    def get(self, name: str, threads: int) -> Roof:
        """The roof, at the nearest measured thread count in ratio (the lower of two equally near).

        Where there is no ``fp32_peak``, as on a GPU, ``fp16_peak`` stands for it: what products of 16-bit floats run at there.

        Raises
        ------
        ProfileError
            The profile has no roof of that name.
        """
        found = self._by_name.get(self.named(name))
        if not found:
            raise ProfileError(f"$.roofs: expected a roof {name!r}, got {', '.join(self._by_name) or 'none'}")
        return found[min(found, key=lambda t: (abs(math.log(t / threads)), t))]


def memory_roof_name(params: Mapping[str, Any]) -> str:
    """Name of the roof that a product's weights stream under."""
    return "llc_read" if params.get("resident") == "llc" else "dram_read"


def roof_of(sample: Sample, name: str, roofs: Roofs) -> float:
    """The roof to normalise a sample by: the one measured next to it, else the profile's median."""
    near = (sample.roof_near or {}).get(roofs.named(name))
    if near is not None:
        return near
    return roofs.get(name, sample.threads).median

"""What a calibration runs on: this machine's CPU, or one of its GPUs. A run asks a device and knows nothing else of it."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .. import machine, profile
from ..ops import info
from .arena import Arena
from .clock import Timer
from .contention import Contention
from .points import Point, candidates, grid
from .power import Meter
from .roofs import Roofs
from .sequence import SequenceTimer
from .workloads import Workloads

#: Below this ratio of int8 peaks two threads share one core: everything measured at two threads is then one core's.
ONE_CORE_RATIO = 1.7
#: Share of the processors that others may take before a calibration says so: a call on all threads waits for the last of them.
TAKEN = 0.03

#: (name, threads) to values in the roof's unit.
Readings = Mapping[tuple[str, int], Sequence[float]]


class PointTimer(Protocol):
    """Times one point; see :class:`assay.measure.clock.Timer`."""

    samples: list[float]
    conditions: dict[str, Any] | None

    def visit(self, budget_s: float) -> float:
        """Adds samples for about so many seconds; returns the seconds it took."""
        ...


class Device(Protocol):
    """What a calibration runs on.

    Attributes
    ----------
    threads : list of int
        Thread counts to measure at.
    memory_note : str
        Of points that would not fit: "they need more than ...".
    """

    threads: list[int]
    memory_note: str

    def machine(self, complete: bool) -> profile.Machine:
        """As the profile describes it; with what was read during the run when that is over."""
        ...

    def kernels(self) -> dict[str, str]:
        """The variant of each kernel."""
        ...

    def compiler(self) -> str:
        """What made the kernels."""
        ...

    def grid(self, mode: str) -> list[Point]:
        """The points of a calibration."""
        ...

    def candidates(self) -> list[Point]:
        """What a full one may measure besides."""
        ...

    def prepare(self, at_least: float) -> int:
        """Makes the memory that calls read, for calls of `at_least` bytes if it can be had; its bytes."""
        ...

    def readings(self) -> Readings:
        """All roofs so far."""
        ...

    def measure_roofs(self) -> None:
        """One reading of every roof."""
        ...

    def near(self, threads: int) -> dict[str, float]:
        """Some roofs right now."""
        ...

    def timer(self, point: Point) -> tuple[str, PointTimer]:
        """The variant and the timer of a point, whose answer was checked."""
        ...

    def notes(self, readings: Readings) -> list[str]:
        """Warnings about the whole run."""
        ...

    def joules(self, timer: PointTimer) -> float | None:
        """Joules that one call takes; None where none are counted."""
        ...


class RoofMeter(Protocol):
    """Measures roofs, keeping all readings; see :class:`assay.measure.roofs.Roofs`."""

    @property
    def readings(self) -> Readings:
        """All so far."""
        ...

    def measure(self) -> None:
        """One reading of every roof."""
        ...

    def near(self, threads: int) -> dict[str, float]:
        """Some roofs right now."""
        ...


class Roofed:
    """The part of `Device` that a `RoofMeter` answers; there is one from `Device.prepare` on."""

    _roofs: RoofMeter | None = None

    def readings(self) -> Readings:
        return self._roofs.readings if self._roofs else {}

    def measure_roofs(self) -> None:
        assert self._roofs is not None
        self._roofs.measure()

    def near(self, threads: int) -> dict[str, float]:
        assert self._roofs is not None
        return self._roofs.near(threads)


class Host(Roofed):
    """This machine's CPU."""

    memory_note = "an eighth of the free memory"

    def __init__(self, threads: list[int], seed: int) -> None:
        self.threads, self._seed = threads, seed
        self._meter = Meter()
        isa = tuple(t["isa"] for t in info.isa_tiers() if t["supported"])
        self._machine = machine.describe(isa)
        self._workloads: Workloads | None = None
        self._contention: Contention | None = None

    def machine(self, complete: bool) -> profile.Machine:
        here = self._machine
        return profile.Machine(
            fingerprint=here.fingerprint(),
            cpu=here.cpu,
            isa=here.isa,
            cores=here.cores,
            memory_bytes=here.memory_bytes,
            caches={"l1d_bytes": here.l1d_bytes, "l2_bytes": here.l2_bytes, "l3_bytes": here.l3_bytes},
            os=here.os,
            numpy=np.__version__,
            python=platform.python_version(),
            extra={"cpu_id": here.cpu_id, "architecture": here.architecture, "virtual": here.virtual}
            | ({"power": self._meter.reading()} if complete else {}),
        )

    def kernels(self) -> dict[str, str]:
        return info.kernel_versions()

    def compiler(self) -> str:
        return info.compiler()

    def grid(self, mode: str) -> list[Point]:
        return grid(mode, self.threads)

    def candidates(self) -> list[Point]:
        return candidates(self.threads)

    def prepare(self, at_least: float) -> int:
        arena = Arena(self._machine, self._seed, at_least=at_least)
        self._roofs = Roofs(self._machine, self.threads, arena)
        self._workloads = Workloads(arena, self._seed)
        self._contention = Contention()
        return int(arena.data.nbytes)

    def timer(self, point: Point) -> tuple[str, PointTimer]:
        assert self._workloads is not None
        if point.op == "sequence":
            variant, order = self._workloads.stack(point)
            return variant, SequenceTimer(order)
        made = self._workloads.make(point)
        return made.variant, Timer(made.rotation)

    def notes(self, readings: Readings) -> list[str]:
        taken = self._contention.share() if self._contention else None
        busy = []
        if taken is not None and taken > TAKEN:
            busy = [
                f"others kept {100 * taken:.0f}% of the processors busy (programs, or other guests of this machine's host) while"
                " this was measured: calibrate again when it is idle"
            ]
        return busy + self._one_core(readings)

    def _one_core(self, readings: Readings) -> list[str]:
        if ("int8_peak", 1) not in readings or ("int8_peak", 2) not in readings:
            return []
        ratio = statistics.median(readings["int8_peak", 2]) / statistics.median(readings["int8_peak", 1])
        if ratio >= ONE_CORE_RATIO:
            return []
        return [
            f"two threads reached {ratio:.2f} times the int8 peak of one: they shared a core for much of this run,"
            " and what was measured at two threads is too slow"
        ]

    def joules(self, timer: PointTimer) -> float | None:
        return None

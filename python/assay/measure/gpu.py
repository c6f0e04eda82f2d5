"""A GPU as what a calibration runs on; nothing of it is touched before the first call that needs it."""

import hashlib
import json
import platform
from typing import Any

import numpy as np

from .. import cuda, profile
from .. import machine as host
from ..errors import UnsupportedError
from .device import PointTimer, Readings, Roofed
from .events import EventTimer, Lane
from .gpu_data import SHARE, DeviceArena, DeviceData, variant_of
from .gpu_points import gpu_candidates, gpu_grid
from .gpu_roofs import DeviceRoofs
from .nvml import Watch
from .points import Point
from .workloads import Workloads

#: Seconds of calls whose joules are counted: the counter moves some ten times a second.
ENERGY_S = 1.0


def parse_device(text: str) -> int | None:
    """The ordinal of "cuda" or "cuda:N"; None of "cpu"."""
    kind, colon, number = text.strip().lower().partition(":")
    if kind == "cpu" and not colon:
        return None
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {text!r}")
    return int(number or 0)


class Gpu(Roofed):
    """One GPU of this machine.

    Raises
    ------
    UnsupportedError
        No driver, no such GPU, or one that this build has no kernels for: naming what is missing.
    """

    threads = [1]  # noqa: RUF012 the protocol's, never changed
    memory_note = f"{SHARE:.0%} of the free memory of the GPU"

    def __init__(self, ordinal: int, seed: int) -> None:
        self._gpu = cuda.device(ordinal)
        (major, minor), self._driver = cuda.driver()
        self._cuda_version = f"{major}.{minor}"
        if self._gpu.capability < (8, 0):
            raise UnsupportedError(
                f"cuda:{ordinal}: expected compute capability 8.0 or newer, got {self._gpu.capability[0]}."
                f"{self._gpu.capability[1]} ({self._gpu.name})"
            )
        code = cuda.code_for(self._gpu)
        if code is None:
            raise UnsupportedError(
                f"cuda:{ordinal}: expected kernels for {variant_of(self._gpu)} ({self._gpu.name}), got none in this build and no"
                " NVRTC to make them: pip install 'assay[cuda]'"
            )
        self._code, self._seed = code, seed
        self._watch = Watch(self._gpu.uuid)
        first = self._watch.read()
        self._idle_w = first.power_w if first else None
        self._workloads: Workloads | None = None
        self._lane: Lane | None = None

    def machine(self, complete: bool) -> profile.Machine:
        gpu, watch = self._gpu, self._watch
        kept = {
            "name": gpu.name, "capability": gpu.capability, "sms": gpu.sms, "l2": gpu.l2_bytes,
            "memory": round(gpu.memory_bytes / 2**30), "clock": gpu.clock_hz, "memory_clock": gpu.memory_clock_hz,
            "bus": gpu.memory_bus_bits,
        }  # fmt: skip
        about: dict[str, Any] = {
            "clock_hz": gpu.clock_hz, "memory_clock_hz": gpu.memory_clock_hz, "memory_bus_bits": gpu.memory_bus_bits,
            "ecc": gpu.ecc, "cuda": self._cuda_version, "driver": watch.driver or None, "code": self._code,
            "nvml": watch.why or "read",
        }  # fmt: skip
        if self._idle_w is not None:
            about["idle_w"] = self._idle_w
        now = watch.read() if complete else None
        watts = {f"cuda:{gpu.ordinal}": now.power_w} if now and now.power_w is not None else {}
        power = {"cpu_w": {}, "gpu_w": watts, "not_readable": [watch.why] if watch.why else []}
        here = host.describe()
        return profile.Machine(
            fingerprint=hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16],
            cpu=gpu.name,
            isa=(variant_of(gpu),),
            cores=gpu.sms,
            memory_bytes=gpu.memory_bytes,
            caches={"l1d_bytes": None, "l2_bytes": gpu.l2_bytes, "l3_bytes": None},
            os=here.os,
            numpy=np.__version__,
            python=platform.python_version(),
            extra={"kind": "gpu", "device": f"cuda:{gpu.ordinal}", "host_cpu": here.cpu, "gpu": about}
            | ({"power": power} if complete else {}),
        )

    def kernels(self) -> dict[str, str]:
        return dict.fromkeys(("int4_gemm", "moe_route", "spec_verify"), variant_of(self._gpu))

    def compiler(self) -> str:
        return self._code

    def grid(self, mode: str) -> list[Point]:
        return gpu_grid(mode, self._gpu.l2_bytes)

    def candidates(self) -> list[Point]:
        return gpu_candidates()

    def prepare(self, at_least: float) -> int:
        arena = DeviceArena(self._gpu, self._seed, at_least)
        self._lane = Lane(self._gpu, self._watch)
        self._roofs = DeviceRoofs(self._gpu, arena, self._lane)
        self._workloads = Workloads(DeviceData(arena, self._gpu), self._seed)
        return int(arena.data.nbytes)

    def timer(self, point: Point) -> tuple[str, PointTimer]:
        assert self._workloads is not None
        assert self._lane is not None
        made = self._workloads.make(point)
        warm = point.op == "moe_route" or point.params.get("resident") == "llc"
        return made.variant, EventTimer(made.rotation, self._lane, warm=warm)

    def notes(self, readings: Readings) -> list[str]:
        return [f"clocks, power and throttling were not seen: {self._watch.why}"] if self._watch.why else []

    def joules(self, timer: PointTimer) -> float | None:
        assert isinstance(timer, EventTimer)
        return timer.joules(ENERGY_S)

"""The calibration run: points in turns, in several passes, saved as it goes, resumed where it stopped."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from .. import __version__, profile
from ..cost import roofs as cost_roofs
from ..cost import stored, uncertainty
from ..errors import AssayError, ProfileError
from .device import Device, Host, PointTimer
from .points import Point

#: Seconds of measuring, and passes over the points that they are divided into at first.
BUDGET_S = {"quick": 28.0, "full": 300.0}
PASSES = {"quick": 3, "full": 5}
#: The share of a full calibration's time for its grid; the rest goes where the model is least sure.
GRID_SHARE = 0.6
#: Points that are added between two looks at the model, and the standard deviation of log time that is good enough.
ROUND_POINTS, TARGET_DEVIATION = 8, 0.03
#: A killed process loses at most this much.
SAVE_EVERY_S = 2.0

#: Seconds that making a point's data and checking its answer takes beside the measuring, as two cores of 2024 took them.
SETUP_S = 0.03

#: Called with the seconds that passed since the last call, and what comes next.
Progress = Callable[[float, str], None]


class InterruptedRunError(AssayError):
    """Ctrl-C during a calibration; what was measured is kept.

    Attributes
    ----------
    partial : Path
        The file that the same command goes on from.
    points : int
        Points that hold samples.
    """

    def __init__(self, partial: Path, points: int) -> None:
        super().__init__(f"interrupted: {points} points are kept in {partial}; the same command goes on from there")
        self.partial, self.points = partial, points


@dataclass
class _Series:
    """A point's samples so far; never both such as were taken while the clocks were held back and others."""

    point: Point
    variant: str = ""
    times: list[float] | None = None
    near: dict[str, list[float]] | None = None
    conditions: dict[str, Any] | None = None
    discarded: int = 0

    @property
    def throttled(self) -> bool:
        return bool((self.conditions or {}).get("throttled"))

    def add(self, times: list[float], near: dict[str, float], conditions: dict[str, Any] | None) -> None:
        slowed = bool((conditions or {}).get("throttled"))
        if self.times and slowed and not self.throttled:
            self.discarded += len(times)
            return
        if self.times and self.throttled and not slowed:
            self.discarded += len(self.times)
            self.times = self.near = None
        self.times = [*(self.times or []), *times]
        kept = self.near or {}
        self.near = {name: [*kept.get(name, []), value] for name, value in near.items()}
        if conditions:
            joules = {k: v for k, v in (self.conditions or {}).items() if k == "energy_j"}
            self.conditions = joules | conditions

    def described(self) -> dict[str, Any] | None:
        """The conditions, as the profile has them."""
        more = {"discarded_samples": self.discarded} if self.discarded else {}
        return {**(self.conditions or {}), **more} or None


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Where an unfinished calibration for `path` is kept."""
    return Path(f"{os.fspath(path)}.partial")


class Run:
    """One calibration.

    Parameters
    ----------
    mode : {"quick", "full"}
    threads
        Thread counts of the CPU to measure at.
    seed
        Of the data and of the order of the points.
    path
        The profile to write.
    budget_s
        Seconds of measuring (set-up and checks come on top); default by mode.
    points
        Default: the device's grid.
    device
        Default: this machine's CPU.
    """

    def __init__(
        self,
        mode: str,
        threads: list[int],
        seed: int,
        path: str | os.PathLike[str],
        *,
        budget_s: float | None = None,
        command: list[str] | None = None,
        points: list[Point] | None = None,
        device: Device | None = None,
    ) -> None:
        self.device: Device = device or Host(threads, seed)
        self.mode, self.threads, self.seed, self.path = mode, self.device.threads, seed, Path(path)
        self.budget_s = BUDGET_S[mode] if budget_s is None else budget_s
        self.command = command or ["assay", "calibrate", f"--{mode}"]
        self.notes: list[str] = []
        self.refinement: dict[str, float] = {}
        self.measured_s = 0.0
        chosen = self.device.grid(mode) if points is None else points
        order = np.random.default_rng(seed).permutation(len(chosen))
        self._series = [_Series(chosen[i]) for i in order]
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._earlier_roofs: dict[tuple[str, int], list[float]] = {}
        self._saved_at = perf_counter()
        self._reported_at = perf_counter()
        self._earlier = self._runs_before()
        self._disturbed = False

    def _runs_before(self) -> list[Any]:
        """What the profile that this run replaces, if it is this machine's, knows of the roofs of that and earlier runs."""
        if not self.path.exists():
            return []
        try:
            old = profile.load(self.path)
        except ProfileError:
            return []
        same = old.complete and old.machine.fingerprint == self.device.machine(False).fingerprint
        if not same:
            return []
        # A disturbed run says how busy the machine was, not how fast it is on another day.
        return list(old.settings.get("earlier", [])) if old.settings.get("disturbed") else old.runs_until_now()

    @property
    def expected_s(self) -> float:
        """Seconds from now to the end: what is left of the budget, and making and checking the points."""
        return max(self.budget_s - self.measured_s, 0.0) + SETUP_S * len(self._series)

    # ---- what is known so far ----

    def _readings(self) -> dict[tuple[str, int], list[float]]:
        now = self.device.readings()
        keys = [*self._earlier_roofs, *(key for key in now if key not in self._earlier_roofs)]
        return {key: [*self._earlier_roofs.get(key, []), *now.get(key, [])] for key in keys}

    def collect(self, complete: bool) -> profile.Profile:
        """The samples as a profile; fitted when complete."""
        made = profile.Profile(
            created_utc=self._started,
            command=self.command,
            seed=self.seed,
            package={"assay": __version__, "kernels": self.device.kernels(), "compiler": self.device.compiler()},
            machine=self.device.machine(complete),
            settings={
                "mode": self.mode, "threads": self.threads, "budget_s": self.budget_s,
                "measured_s": round(self.measured_s, 3), "notes": self.notes, "refinement": self.refinement,
                "earlier": self._earlier, "disturbed": self._disturbed,
            },
            roofs=[profile.Roof.of(name, t, values) for (name, t), values in self._readings().items()],
            samples=[
                profile.Sample.of(
                    s.point.op, s.variant, s.point.threads, s.point.params, moved_bytes=s.point.bytes, ops=s.point.ops,
                    time_s=s.times, held_out=s.point.held_out,
                    roof_near={name: statistics.median(values) for name, values in (s.near or {}).items()},
                    conditions=s.described(),
                )
                for s in self._series if s.times
            ],
        )  # fmt: skip
        if complete:
            made.fits, made.accuracy = stored.summarise(made)
            made.complete = True
        return made

    def resume(self) -> str | None:
        """Takes over an earlier unfinished run of the same kind; says what was found, or None."""
        partial = partial_path(self.path)
        if not partial.exists():
            return None
        try:
            old = profile.load(partial)
        except ProfileError as exc:
            return f"set aside: {exc} ({self._set_aside(partial)})"
        now = self.collect(complete=False)
        for what, was, wanted in (
            ("machine", old.machine.fingerprint, now.machine.fingerprint),
            ("mode", old.settings["mode"], self.mode),
            ("threads", old.settings["threads"], self.threads),
            ("seed", old.seed, self.seed),
            ("kernels", old.package["kernels"], now.package["kernels"]),
            ("version", old.package["assay"], now.package["assay"]),
        ):
            if was != wanted:
                moved = self._set_aside(partial)
                return f"an unfinished run with another {what} ({was}, now {wanted}) was set aside as {moved}"
        by_key = {series.point.key: series for series in self._series}
        for sample in old.samples:
            point = Point(sample.op, sample.threads, dict(sample.params), sample.held_out)
            series = by_key.get(point.key)
            if series is None:  # added where the model was least sure
                series = _Series(point)
                self._series.append(series)
            series.variant = sample.variant
            series.times = list(sample.time_s)
            series.near = {name: [value] for name, value in (sample.roof_near or {}).items()}
            series.conditions = dict(sample.conditions) if sample.conditions else None
            series.discarded = int((series.conditions or {}).pop("discarded_samples", 0))
        self._earlier_roofs = {(roof.name, roof.threads): list(roof.samples) for roof in old.roofs}
        self.measured_s = float(old.settings.get("measured_s", 0.0))
        self._started = old.created_utc
        return f"going on from {len(old.samples)} points measured earlier ({self.measured_s:.0f} s)"

    @staticmethod
    def _set_aside(partial: Path) -> Path:
        aside = partial.with_name(partial.name + ".old")
        partial.replace(aside)
        return aside

    # ---- measuring ----

    def measure(self, progress: Progress) -> profile.Profile:
        """Measures until the budget is spent, fits, writes the profile, removes the partial file.

        Raises
        ------
        InterruptedRunError
            Ctrl-C; the partial file holds everything measured.
        AssayError
            A kernel gave a wrong answer.
        """
        try:
            self._measure(progress)
        except KeyboardInterrupt:
            profile.save(self.collect(complete=False), partial_path(self.path))
            raise InterruptedRunError(partial_path(self.path), sum(1 for s in self._series if s.times)) from None
        disturbed = self.device.notes(self._readings())
        self.notes += disturbed
        self._disturbed = bool(disturbed)
        if flagged := sum(s.throttled for s in self._series):
            self.notes.append(f"{flagged} points were only measured while the clocks were held back, and say so")
        self._report(progress, "fitting")
        done = self.collect(complete=True)
        profile.save(done, self.path)
        partial_path(self.path).unlink(missing_ok=True)
        return done

    def _measure(self, progress: Progress) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._report(progress, "roofs")
        size = self.device.prepare(max(s.point.bytes for s in self._series))
        self._leave_out(size)
        grid_s = self.budget_s * (GRID_SHARE if self.mode == "full" else 1.0)
        visit_s = grid_s / PASSES[self.mode] / max(len(self._series), 1)
        queue = sorted(
            self._series, key=lambda s: s.times is not None
        )  # when resuming, points without samples come first
        timers: list[PointTimer | None] = [None] * len(queue)
        while self.measured_s < grid_s or not all(s.times for s in self._series):
            self._measure_roofs()
            for i, series in enumerate(queue):
                if self.measured_s >= grid_s and all(s.times for s in self._series):
                    break
                timers[i] = self._visit(series, timers[i], visit_s, progress)
        if self.mode == "full":
            self._refine(visit_s * PASSES[self.mode], size, progress)
        for i, series in enumerate(queue):
            if series.throttled:
                timers[i] = self._visit(series, timers[i], visit_s, progress)
        self._count_joules(queue, timers, progress)

    def _count_joules(self, queue: list[_Series], timers: list[PointTimer | None], progress: Progress) -> None:
        """Energy of the two largest points of every op: in bytes, and in operations."""
        chosen: set[int] = set()
        for op in {series.point.op for series in queue}:
            mine = [i for i, series in enumerate(queue) if series.point.op == op]
            chosen |= {max(mine, key=lambda i: queue[i].point.bytes), max(mine, key=lambda i: queue[i].point.ops)}
        for i in sorted(chosen):
            series = queue[i]
            if series.conditions is None or "energy_j" in series.conditions:
                continue
            self._report(progress, f"energy of {series.point.op}")
            begun = perf_counter()
            timer = timers[i] or self.device.timer(series.point)[1]
            if (joules := self.device.joules(timer)) is not None:
                series.conditions["energy_j"] = joules
            self.measured_s += perf_counter() - begun

    def _leave_out(self, nbytes: int) -> None:
        """Drops the points whose calls would read more than the arena has."""
        kept = [s for s in self._series if s.point.bytes <= nbytes]
        if left := len(self._series) - len(kept):
            self.notes.append(f"{left} points were left out: they need more than {self.device.memory_note}")
        self._series = kept

    def _measure_roofs(self) -> None:
        begun = perf_counter()
        self.device.measure_roofs()
        self.measured_s += perf_counter() - begun

    def _visit(self, series: _Series, timer: PointTimer | None, visit_s: float, progress: Progress) -> PointTimer:
        """Adds samples of one point; its timer, made and checked if there was none."""
        self._report(progress, f"{series.point.op} {series.point.label}")
        if timer is None:
            series.variant, timer = self.device.timer(series.point)
        begun = perf_counter()
        near = self.device.near(series.point.threads)
        before = len(timer.samples)
        timer.visit(max(visit_s - (perf_counter() - begun), visit_s / 4))
        series.add(timer.samples[before:], near, timer.conditions)
        self.measured_s += perf_counter() - begun
        if perf_counter() - self._saved_at > SAVE_EVERY_S:
            profile.save(self.collect(complete=False), partial_path(self.path))
            self._saved_at = perf_counter()
        return timer

    def _refine(self, visit_s: float, most_bytes: int, progress: Progress) -> None:
        """Measures where the model is least sure until it is sure enough everywhere, or the time is spent."""
        rng = np.random.default_rng([self.seed, 1])
        done = {series.point.key for series in self._series}
        open_points = [p for p in self.device.candidates() if p.key not in done and p.bytes <= most_bytes]
        grid_points = len(self._series)
        largest = 0.0
        while open_points and self.measured_s < self.budget_s:
            begun = perf_counter()
            now = self.collect(complete=False)
            found = uncertainty.deviations(
                now.samples, cost_roofs.Roofs(now.roofs), [(p.op, p.params, p.threads) for p in open_points], rng
            )
            self.measured_s += perf_counter() - begun
            largest = float(found.max())
            chosen = [i for i in np.argsort(-found)[:ROUND_POINTS] if found[i] > TARGET_DEVIATION]
            if not chosen:
                break
            self._measure_roofs()
            for i in chosen:
                series = _Series(open_points[i])
                self._visit(series, None, visit_s, progress)
                self._series.append(series)
            open_points = [p for i, p in enumerate(open_points) if i not in set(chosen)]
        self.refinement = {
            "points": len(self._series) - grid_points,
            "largest_deviation": largest,
            "target_deviation": TARGET_DEVIATION,
        }

    def _report(self, progress: Progress, what: str) -> None:
        now = perf_counter()
        progress(now - self._reported_at, what)
        self._reported_at = now

"""Kernel times of a device from a table of measured calls: a physical law, and kriging of what it leaves over.

    t = (t0 + sum_j a_j x_j + (t_mem^p + t_cmp^p)^(1/p)) exp(r)
    t_mem = bytes / (BW eta_b),   t_cmp = ops / (P eta_f)

The law is fitted robustly in log time; ``x_j`` are counts of fixed work (`assay.cost.workload`). ``r`` is interpolated by
local kriging in the workload's coordinates, and falls back to its neighbours' mean away from them: there the physics
extrapolates. Intervals are split conformal (Lei et al. 2018) on points whose whole group the kriging did not see, with the
score ``|error| / sd``, ``sd`` the root of the kriging variance: an interval widens where points are far. Of a small table
the whole fit is repeated without each part of the groups in turn, since the search for scales would have seen all of them.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from assay.cost import kriging
from assay.cost.kriging import Kriging
from assay.cost.roofline import FloatArray, IntArray, smooth_max
from assay.cost.solve import minimise
from assay.cost.workload import Work, work_of
from assay.tables import KernelTable

LEVEL = 0.9
LAW_POINTS = 2500  # the law has ten parameters at most: more points would not move it
CALIBRATION = 300  # points that set the interval
FEWEST = 20  # points of a table below which nothing is fitted
REFITTED = 300  # points of a table up to which intervals are set on fits that saw nothing of the points judged
FOLDS = 5
DEFAULT_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Device:
    """Datasheet of a device: dense peaks. ``ops_per_s`` is for 16-bit numbers. Zero where not known."""

    name: str
    memory_bytes_per_s: float
    ops_per_s: float
    multiprocessors: int
    known: bool = True

    def ops_at(self, activation_bytes: float) -> float:
        """Peak at the width of the activations: twice at one byte, where no table says otherwise."""
        return self.ops_per_s * (2.0 if activation_bytes <= 1.0 else 1.0)


def unknown_device(name: str) -> Device:
    """A device that no datasheet here describes: its roofs are read off its points."""
    return Device(name, 0.0, 0.0, DEFAULT_MULTIPROCESSORS, known=False)


@dataclass(frozen=True)
class Law:
    """Fitted physics of one kernel class; ``seconds_per`` are the coefficients of the fixed work."""

    overhead_s: float
    bytes_per_s: float
    ops_per_s: float
    p: float
    seconds_per: tuple[float, ...]

    def parts(self, work: Work) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Seconds of memory, compute, and of all that is fixed, [n] each."""
        fixed = self.overhead_s + work.fixed @ np.asarray(self.seconds_per)
        return work.bytes / self.bytes_per_s, work.ops / self.ops_per_s, fixed

    def log_time(self, work: Work) -> FloatArray:
        """Log seconds of the law alone."""
        memory, compute, fixed = self.parts(work)
        return np.log(fixed + smooth_max(memory, compute, self.p))

    def regime(self, work: Work) -> npt.NDArray[np.str_]:
        """Which of "overhead", "memory", "compute" is the largest part of each call."""
        memory, compute, fixed = self.parts(work)
        return np.array(["memory", "compute", "overhead"])[np.argmax(np.stack([memory, compute, fixed]), axis=0)]


@dataclass(frozen=True)
class Prediction:
    """Seconds with their 90% interval, [n]; ``outside`` where the call lies outside of the fitted points' range."""

    time_s: FloatArray
    low_s: FloatArray
    high_s: FloatArray
    outside: npt.NDArray[np.bool_]
    regime: npt.NDArray[np.str_]


@dataclass(frozen=True)
class DeviceModel:
    """One kernel class of one device: law, kriging of its residual, and the conformal factor of its intervals."""

    device: Device
    law: Law
    residual: Kriging
    score: float  # the interval is exp(+- score sd)
    low: FloatArray
    high: FloatArray
    least_log: float = 0.0  # no interval is narrower than exp(+- this)

    def predict(self, table: KernelTable, *, few: bool = False) -> Prediction:
        """Times of the calls in ``table`` (its measured times are not looked at); ``few`` where they are some dozen at most."""
        work = work_of(table, self.device.multiprocessors)
        base = self.law.log_time(work)
        correction, variance = (self.residual.predict_few if few else self.residual.predict)(work.features)
        time = np.exp(base + correction)
        half = np.clip(self.score * np.sqrt(variance), self.least_log, 50.0)
        slack = 1e-9 + 0.25 * (self.high - self.low)
        beyond = (work.features < self.low - slack) | (work.features > self.high + slack)
        outside = np.asarray(beyond.any(axis=1), dtype=np.bool_)
        return Prediction(time, time * np.exp(-half), time * np.exp(half), outside, self.law.regime(work))


def fit_law(work: Work, time_s: FloatArray, device: Device, activation_bytes: float, rng: np.random.Generator) -> Law:
    """The physics, robustly in log time; peaks from the datasheet, or from the fastest points where there is none."""
    some = rng.choice(time_s.size, min(LAW_POINTS, time_s.size), replace=False)
    moved, ops, fixed, target = work.bytes[some], work.ops[some], work.fixed[some], np.log(time_s[some])
    bandwidth = float(np.quantile(work.bytes / time_s, 0.99))
    peak = max(float(np.quantile(work.ops / time_s, 0.99)), 1.0)
    if device.known:
        bandwidth, peak = device.memory_bytes_per_s, device.ops_at(activation_bytes)
    least = float(np.quantile(time_s, 0.02))
    unit = least / np.maximum(fixed.max(axis=0, initial=1.0), 1.0) if fixed.size else np.zeros(fixed.shape[1])

    def model(stack: FloatArray) -> FloatArray:
        value = np.exp(np.clip(stack, -30.0, 30.0))
        extra = (value[:, 4:] * unit) @ fixed.T if fixed.shape[1] else 0.0
        body = smooth_max(moved / bandwidth / value[:, 1:2], ops / peak / value[:, 2:3], 1.0 + value[:, 3:4])
        return np.log(least * value[:, :1] + extra + body)

    start = np.concatenate([[-0.3, -0.3, -0.5, 0.5], np.zeros(fixed.shape[1])])
    theta = minimise(
        model,
        target,
        start=start,
        prior_mean=start,
        prior_sd=np.concatenate([[1.0, 1.0, 1.0, 0.7], np.full(fixed.shape[1], 3.0)]),
        spread=np.zeros(target.size),
    )
    value = np.exp(np.clip(theta, -30.0, 30.0))
    return Law(
        overhead_s=float(least * value[0]),
        bytes_per_s=float(bandwidth * value[1]),
        ops_per_s=float(peak * value[2]),
        p=float(1.0 + value[3]),
        seconds_per=tuple((value[4:] * unit).tolist()),
    )


def timer_step(time_s: FloatArray) -> float:
    """Resolution of the clock, seconds, where times repeat so much that it shows; else 0."""
    values = np.unique(time_s)
    if values.size * 3 > time_s.size or values.size < 10:
        return 0.0
    short = values[: max(10, values.size // 20)]
    return float(np.quantile(np.diff(short), 0.75))


def timer_noise(time_s: FloatArray, residual: FloatArray) -> FloatArray:
    """Variance that the clock's step adds to each point, relative to that of the residuals and at most as large, [n]."""
    spread = max(float(np.median(np.abs(residual - np.median(residual)))) * 1.4826, 0.01)
    return np.asarray(np.minimum((timer_step(time_s) / time_s / spread) ** 2 / 12.0, 1.0))


def held_together(work: Work, points: int, hide: str) -> IntArray:
    """Group of each point of which all or none is hidden; each point by itself where there is but one group."""
    alone = np.arange(points, dtype=np.int64)
    if hide == "point":
        return alone
    group: IntArray = getattr(work, hide)
    return group if np.unique(group).size > 1 else alone


def fit_device(table: KernelTable, device: Device, *, hide: str = "shape", seed: int = 0) -> DeviceModel:
    """Model of one kernel class from its measured points.

    Parameters
    ----------
    table
        Points of one op, dtype and kernel variant.
    device
        Datasheet, or `unknown_device`.
    hide
        What future calls will differ in: "shape", "model" or "point". Scales and intervals are set by hiding such groups.
    seed
        Of the choice of points that scales and intervals are set on.

    Raises
    ------
    ValueError
        Fewer than `FEWEST` points.
    """
    if len(table) < FEWEST:
        raise ValueError(f"points: expected at least {FEWEST} of {table.op} {table.dtype}, got {len(table)}")
    model, residual, group, rng = _fit(table, device, hide, seed)
    if len(table) <= REFITTED and np.unique(group).size > 1:
        scores = _refitted_scores(table, device, hide, seed, group)
    else:
        picked = rng.choice(len(table), min(CALIBRATION, len(table)), replace=False)
        mean, variance = kriging.hidden(model.residual, group, picked)
        scores = np.abs(residual[picked] - mean) / np.sqrt(variance)
    rank = min(math.ceil((scores.size + 1) * LEVEL), scores.size)
    return replace(model, score=float(np.sort(scores)[rank - 1]))


def _fit(
    table: KernelTable, device: Device, hide: str, seed: int
) -> tuple[DeviceModel, FloatArray, IntArray, np.random.Generator]:
    """The model but for its score, what the law left over, the groups, and the generator as the fit leaves it."""
    rng = np.random.default_rng(seed)
    work = work_of(table, device.multiprocessors)
    law = fit_law(work, table.time_s, device, table.format.activation_bytes, rng)
    residual = np.log(table.time_s) - law.log_time(work)
    group = held_together(work, len(table), hide)
    noise = timer_noise(table.time_s, residual)
    fitted = kriging.fit(work.features, residual, group=group, scale=work.start, noise=noise, rng=rng)
    model = DeviceModel(device, law, fitted, 1.0, work.features.min(axis=0), work.features.max(axis=0))
    return model, residual, group, rng


def _refitted_scores(table: KernelTable, device: Device, hide: str, seed: int, group: IntArray) -> FloatArray:
    """Score of every point under the fit to the other parts' groups."""
    names = np.random.default_rng(seed).permutation(np.unique(group))
    found = []
    for part in np.array_split(names, min(FOLDS, names.size)):
        out = np.isin(group, part)
        if (~out).sum() < FEWEST // 2:
            continue
        model = _fit(table.take(~out), device, hide, seed)[0]
        prediction = model.predict(table.take(out))
        deviation = np.log(prediction.high_s / prediction.time_s)  # at a score of 1
        found.append(np.abs(np.log(table.time_s[out] / prediction.time_s)) / deviation)
    return np.concatenate(found) if found else np.array([np.inf])


TRANSFER_LOG = math.log(2.0)  # half width on a device known by its datasheet alone, where no third device shows better


def transferred(
    model: DeviceModel, device: Device, activation_bytes: float, half_log: float = TRANSFER_LOG
) -> DeviceModel:
    """The model of another device of which only the datasheet is known: the same utilisations, overhead and residual.

    Raises
    ------
    ValueError
        One of the two devices has no datasheet.
    """
    if not (device.known and model.device.known):
        raise ValueError(f"device: expected two with datasheets, got {model.device.name} and {device.name}")
    law = model.law
    return replace(
        model,
        device=device,
        law=replace(
            law,
            bytes_per_s=law.bytes_per_s * device.memory_bytes_per_s / model.device.memory_bytes_per_s,
            ops_per_s=law.ops_per_s * device.ops_at(activation_bytes) / model.device.ops_at(activation_bytes),
        ),
        least_log=half_log,
    )

"""Joules of a call: power as idle plus what memory and arithmetic draw at the share of their roofs in use.

    P = P_idle + P_mem u_mem + P_cmp u_cmp,   u = (time of the roof) / (time of the call),   E = P t

Coefficients are not negative, fitted robustly in relative error; what they leave over in log power is kriged in the
coordinates of the kernel's time, with scales of its own. Intervals are split conformal, as those of the times are.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from assay.cost import kriging
from assay.cost.device import CALIBRATION, LEVEL, DeviceModel, held_together
from assay.cost.kriging import Kriging
from assay.cost.roofline import FloatArray
from assay.cost.solve import non_negative
from assay.cost.workload import Work, work_of
from assay.tables import KernelTable


@dataclass(frozen=True)
class Energy:
    """Watts, and joules with their 90% interval, [n] each."""

    power_w: FloatArray
    joules: FloatArray
    low_j: FloatArray
    high_j: FloatArray


@dataclass(frozen=True)
class PowerModel:
    """Fitted watts: ``idle_w`` always, ``memory_w`` and ``compute_w`` at full use of either roof."""

    time: DeviceModel
    idle_w: float
    memory_w: float
    compute_w: float
    most_w: float
    residual: Kriging
    score: float = 0.0  # the interval of joules is exp(+- score sd)

    def predict(self, table: KernelTable) -> Energy:
        """Energy of each call of ``table`` (its measured times and powers are not looked at)."""
        work = work_of(table, self.time.device.multiprocessors)
        late, time_variance = self.time.residual.predict(work.features)
        more, power_variance = self.residual.predict(work.features)
        seconds, watts = self._at(work, late, more)
        half = np.minimum(self.score * np.sqrt(time_variance + power_variance), 50.0)
        joules = watts * seconds
        return Energy(watts, joules, joules * np.exp(-half), joules * np.exp(half))

    def _at(self, work: Work, late: FloatArray, more: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Seconds and watts where the laws of time and power are off by the logs ``late`` and ``more``."""
        seconds = np.exp(self.time.law.log_time(work) + late)
        law = _shares(self.time, work, seconds) @ np.array([self.idle_w, self.memory_w, self.compute_w])
        return seconds, np.minimum(np.maximum(law, 1e-3) * np.exp(more), self.most_w)


def _shares(model: DeviceModel, work: Work, time_s: FloatArray) -> FloatArray:
    memory, compute, _ = model.law.parts(work)
    return np.stack([np.ones(time_s.size), np.minimum(memory / time_s, 1.5), np.minimum(compute / time_s, 1.5)], axis=1)


def fit_power(table: KernelTable, model: DeviceModel, seed: int = 0, *, hide: str = "shape") -> PowerModel:
    """Power of one kernel class from its ``power_w``; ``hide`` and ``seed`` as in `assay.cost.device.fit_device`.

    Raises
    ------
    ValueError
        The table has no power.
    """
    if table.power_w is None:
        raise ValueError("power_w: expected watts, got a table without them")
    rng = np.random.default_rng(seed)
    work = work_of(table, model.device.multiprocessors)
    shares = _shares(model, work, table.time_s)
    some = rng.choice(len(table), min(2500, len(table)), replace=False)
    idle, memory, compute = non_negative(shares[some], table.power_w[some]).tolist()
    left = np.log(table.power_w / np.maximum(shares @ np.array([idle, memory, compute]), 1e-3))
    group = held_together(work, len(table), hide)
    residual = kriging.fit(
        work.features,
        left,
        group=group,
        scale=model.residual.scale,
        noise=np.zeros(len(table)),
        rng=rng,
        nugget=0.1,
    )
    power = PowerModel(model, idle, memory, compute, float(table.power_w.max()) * 1.05, residual)
    picked = rng.choice(len(table), min(CALIBRATION, len(table)), replace=False)
    late, time_variance = kriging.hidden(model.residual, group, picked)
    more, power_variance = kriging.hidden(residual, group, picked)
    seconds, watts = power._at(work_of(table.take(picked), model.device.multiprocessors), late, more)
    error = np.abs(np.log(watts * seconds / (table.power_w * table.time_s)[picked]))
    scores = np.sort(error / np.sqrt(time_variance + power_variance))
    rank = min(math.ceil((scores.size + 1) * LEVEL), scores.size)
    return replace(power, score=float(scores[rank - 1]))

"""Joules of a call: power as idle plus what memory and arithmetic draw at the share of their roofs in use.

    P = P_idle + P_mem u_mem + P_cmp u_cmp,   u = (time of the roof) / (time of the call),   E = P t

Coefficients are not negative, fitted robustly in relative error; what they leave over in log power is kriged in the
coordinates, and with the scales, of the kernel's time.
"""

from dataclasses import dataclass, replace

import numpy as np

from assay.cost.device import DeviceModel
from assay.cost.kriging import Kriging
from assay.cost.roofline import FloatArray
from assay.cost.solve import non_negative
from assay.cost.workload import Work, work_of
from assay.tables import KernelTable


@dataclass(frozen=True)
class PowerModel:
    """Fitted watts: ``idle_w`` always, ``memory_w`` and ``compute_w`` at full use of either roof."""

    time: DeviceModel
    idle_w: float
    memory_w: float
    compute_w: float
    most_w: float
    residual: Kriging

    def predict(self, table: KernelTable) -> tuple[FloatArray, FloatArray]:
        """Watts and joules of each call of ``table``."""
        work = work_of(table, self.time.device.multiprocessors)
        seconds = self.time.predict(table).time_s
        law = _shares(self.time, work, seconds) @ np.array([self.idle_w, self.memory_w, self.compute_w])
        correction, _ = self.residual.predict(work.features)
        watts = np.minimum(law * np.exp(correction), self.most_w)
        return watts, watts * seconds


def _shares(model: DeviceModel, work: Work, time_s: FloatArray) -> FloatArray:
    memory, compute, _ = model.law.parts(work)
    return np.stack([np.ones(time_s.size), np.minimum(memory / time_s, 1.5), np.minimum(compute / time_s, 1.5)], axis=1)


def fit_power(table: KernelTable, model: DeviceModel, seed: int = 0) -> PowerModel:
    """Power of one kernel class from its ``power_w``.

    Raises
    ------
    ValueError
        The table has no power.
    """
    if table.power_w is None:
        raise ValueError("power_w: expected watts, got a table without them")
    work = work_of(table, model.device.multiprocessors)
    shares = _shares(model, work, table.time_s)
    some = np.random.default_rng(seed).choice(len(table), min(2500, len(table)), replace=False)
    idle, memory, compute = non_negative(shares[some], table.power_w[some]).tolist()
    law = np.maximum(shares @ np.array([idle, memory, compute]), 1e-3)
    residual = replace(model.residual, residual=np.log(table.power_w / law), noise=np.zeros(len(table)), nugget=0.1)
    return PowerModel(model, idle, memory, compute, float(table.power_w.max()) * 1.05, residual)

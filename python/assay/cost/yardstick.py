"""What the model has to beat: a roofline with one efficiency, and a gradient-boosted regressor on log features."""

import numpy as np

from assay.cost.device import Device
from assay.cost.roofline import FloatArray
from assay.cost.workload import work_of
from assay.tables import KernelTable


def roofline(train: KernelTable, test: KernelTable, device: Device) -> FloatArray:
    """Seconds at the larger of both roofs, all calls at the one efficiency that is right in the median of ``train``."""
    fitted = work_of(train, device.multiprocessors)
    asked = work_of(test, device.multiprocessors)
    bandwidth = float(np.quantile(fitted.bytes / train.time_s, 0.99))
    peak = max(float(np.quantile(fitted.ops / train.time_s, 0.99)), 1.0)
    if device.known:
        bandwidth, peak = device.memory_bytes_per_s, device.ops_at(train.format.activation_bytes)
    ideal = np.maximum(fitted.bytes / bandwidth, fitted.ops / peak)
    return np.maximum(asked.bytes / bandwidth, asked.ops / peak) * float(np.median(train.time_s / ideal))


def regressor(train: KernelTable, test: KernelTable, seed: int = 0) -> FloatArray | None:
    """Seconds by scikit-learn's HistGradientBoostingRegressor on logs of the sizes, bytes and operations.

    None where scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ImportError:
        return None

    def features(table: KernelTable) -> FloatArray:
        work = work_of(table, 1)
        columns = [np.log1p(v) for v in table.sizes.values()] + [np.log(work.bytes), np.log1p(work.ops)]
        return np.stack(columns, axis=1)

    model = HistGradientBoostingRegressor(max_iter=200, early_stopping=False, random_state=seed)
    with threadpool_limits(1):  # its threads wait by spinning, which is slow where other classes are fitted beside it
        model.fit(features(train), np.log(train.time_s))
        return np.asarray(np.exp(model.predict(features(test))), dtype=np.float64)

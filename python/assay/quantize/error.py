"""What quantisation did to weights and to outputs, in float64."""

from typing import NamedTuple

import numpy as np

from ..reference import dequantize_int4

#: Weights handled at a time.
_CHUNK = 1 << 22


class QuantizationError(NamedTuple):
    """Relative root mean squares; 0 where neither the value nor the error is anything but zero.

    Attributes
    ----------
    weight : float
        ||W' - W|| / ||W||
    output : float or None
        ||A W'^T - A W^T|| / ||A W^T|| for the activations A that were given.
    """

    weight: float
    output: float | None


def quantization_error(
    w: np.ndarray,
    qweight: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    group_size: int,
    activations: np.ndarray | None = None,
) -> QuantizationError:
    """Relative error of the weights, and of their products with activations, by rows of W at a time.

    Parameters
    ----------
    w : float32 [N, K]
    qweight, scales, zeros
        As :func:`assay.quantize_int4` gives them.
    activations : float32 [T, K], optional
    """
    n, k = w.shape
    a = None if activations is None else activations.astype(np.float64)
    sums = np.zeros(4)  # squares of weights, of their errors, of outputs, of theirs
    step = max(1, _CHUNK // max(k, 1 if a is None else len(a)))
    for at in range(0, n, step):
        part = slice(at, at + step)
        exact = w[part].astype(np.float64)
        back = dequantize_int4(qweight[part], scales[part], None if zeros is None else zeros[part], k, group_size)
        off = back - exact
        sums[:2] += np.square(exact).sum(), np.square(off).sum()
        if a is not None:
            sums[2:] += np.square(a @ exact.T).sum(), np.square(a @ off.T).sum()
    return QuantizationError(_relative(sums[1], sums[0]), None if a is None else _relative(sums[3], sums[2]))


def _relative(off: float, whole: float) -> float:
    if off == 0:
        return 0.0
    return float(np.sqrt(off / whole)) if whole > 0 else float("inf")

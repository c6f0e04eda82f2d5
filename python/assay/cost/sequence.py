"""What calls cost in a model's step beyond the same calls one after another alone.

A kernel that is timed by itself finds its code, its activations and its worker threads as the last call of the same shape
left them; in a step the call before was another. Short stacks of real layers are timed in turns with the same calls alone
(`assay.measure.sequence`), and the difference is taken as so many seconds a call at a number of threads.
"""

import math
from collections.abc import Sequence

import numpy as np

from assay.cost.kernel_model import CostModel
from assay.cost.laws import SequenceClass, sequence_products
from assay.cost.roofline import FloatArray
from assay.profile import Sample

LEVEL = 0.9


def _calls(sample: Sample) -> float:
    return sum(count for _, _, count in sequence_products(sample.params))


def _quantile(values: FloatArray, weights: FloatArray, level: float) -> float:
    """The smallest value up to which the weights come to this share."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, level * total[-1])])


def fit_sequence(samples: Sequence[Sample]) -> tuple[SequenceClass, ...]:
    """One class for each number of threads: the weighted median of (stack - same calls alone) / calls, not below 0.

    The weights are calls a second, since the noise of a long call is more than all that a short one costs another. Half the
    width of the interval is what 90% of the stacks, so weighted, stay within.
    """
    found = []
    for threads in sorted({s.threads for s in samples}):
        mine = [s for s in samples if s.threads == threads]
        alone = np.array([float(s.conditions["alone_s"]) for s in mine])  # type: ignore[index]
        calls = np.array([_calls(s) for s in mine])
        extra = (np.array([s.median_s for s in mine]) - alone) / calls
        weights = calls / alone
        middle = _quantile(extra, weights, 0.5)
        half = _quantile(np.abs(extra - middle), weights, LEVEL)
        found.append(SequenceClass(threads, max(middle, 0.0), max(half, abs(min(middle, 0.0))), len(mine)))
    return tuple(found)


def predicted(sample: Sample, model: CostModel, between: Sequence[SequenceClass]) -> tuple[float, float, float]:
    """Seconds of a sample's stack with the 90% interval: its calls by their law, and what they cost each other."""
    op, m = str(sample.params["of"]), sample.params["m"]
    time = low = high = 0.0
    for n, k, count in sequence_products(sample.params):
        e = model.kernel_time(op, {"m": m, "n": n, "k": k}, sample.threads)
        time, low, high = time + count * e.time_s, low + count * e.low_s, high + count * e.high_s
    term = min(between, key=lambda c: abs(math.log(c.threads / sample.threads)))
    calls = _calls(sample)
    half = calls * term.half_s
    whole = time + calls * term.seconds
    return whole, whole - math.hypot(time - low, half), whole + math.hypot(high - time, half)


def stack_errors(samples: Sequence[Sample], model: CostModel) -> tuple[list[float], list[bool]]:
    """ln(measured / predicted) of every stack whose products have a law, and whether its interval held it.

    What calls cost each other is then taken from stacks of other layers alone.
    """
    errors, inside = [], []
    for sample in samples:
        others = [s for s in samples if s.params["hidden_size"] != sample.params["hidden_size"]]
        if not model.calibrated(str(sample.params["of"])) or not any(s.threads == sample.threads for s in others):
            continue
        time, low, high = predicted(sample, model, fit_sequence(others))
        errors.append(math.log(sample.median_s / time))
        inside.append(low <= sample.median_s <= high)
    return errors, inside

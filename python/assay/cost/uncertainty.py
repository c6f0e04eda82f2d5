"""Where a fitted model is least sure: what `assay calibrate --full` measures next.

Two things make a prediction unsure. The fit itself: laws fitted to resampled points (the bootstrap, Efron 1979) disagree. And
what lies between two measured widths of a product: its time never falls when the batch grows, so it is known to lie between
the times at the neighbouring widths, and no better, since a kernel's blocks of rows make steps anywhere (a uniform law on that range).
"""

import math
from collections.abc import Sequence

import numpy as np

from assay.cost.fit import class_key, fit_classes
from assay.cost.kernel_model import CostModel
from assay.cost.laws import LINEAR_TERMS, OpFit, Params, product_of
from assay.cost.roofline import FloatArray
from assay.cost.roofs import Roofs
from assay.profile import MATRIX_OPS, Sample

MEMBERS = 8
UNKNOWN = math.log(2.0)  # of an op without any point: a factor of two
#: An op, its sizes and a number of threads that may be measured.
Candidate = tuple[str, Params, int]


def committee(
    samples: Sequence[Sample], roofs: Roofs, rng: np.random.Generator, members: int = MEMBERS
) -> list[CostModel]:
    """Models fitted to `members` bootstrap resamples of what is not held out, every class resampled by itself."""
    classes: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        if not sample.held_out and sample.op in (*MATRIX_OPS, *LINEAR_TERMS):
            classes.setdefault((sample.op, *class_key(sample)), []).append(sample)
    models = []
    for _ in range(members):
        by_op: dict[str, list[Sample]] = {}
        for key, points in classes.items():
            drawn = rng.integers(0, len(points), len(points))
            by_op.setdefault(str(key[0]), []).extend(points[i] for i in drawn)
        fits = {op: OpFit(op, fit_classes(op, drawn, roofs), 0.0, "", len(drawn)) for op, drawn in by_op.items()}
        models.append(CostModel(fits, roofs, {}))
    return models


def deviations(
    samples: Sequence[Sample], roofs: Roofs, candidates: Sequence[Candidate], rng: np.random.Generator
) -> FloatArray:
    """Standard deviation of the log of each candidate's predicted time; `UNKNOWN` where its op was never measured."""
    models = committee(samples, roofs, rng)
    widths: dict[tuple[object, ...], set[float]] = {}
    for sample in samples:
        if sample.op in MATRIX_OPS and not sample.held_out:
            width = float(product_of(sample.op, sample.params).rows[0])
            widths.setdefault((sample.op, sample.threads), set()).add(width)
    found = np.full(len(candidates), UNKNOWN)
    for i, (op, params, threads) in enumerate(candidates):
        if any(op not in model.ops for model in models):
            continue
        logs = np.log([model.kernel_time(op, params, threads).time_s for model in models])
        variance = float(np.var(logs, ddof=1))
        if op in MATRIX_OPS:
            variance += _between(models, op, params, threads, np.array(sorted(widths[op, threads])))
        found[i] = variance**0.5
    return found


def _between(models: Sequence[CostModel], op: str, params: Params, threads: int, widths: FloatArray) -> float:
    """Variance of a uniform law between the log times at the measured widths around one that was not measured."""
    wanted = float(product_of(op, params).rows[0])
    if op == "moe_experts" or wanted in widths:
        return 0.0
    below, above = widths[widths < wanted], widths[widths > wanted]
    if not below.size or not above.size:
        return 0.0
    ends = [
        np.mean([np.log(model.kernel_time(op, {**params, "m": m}, threads).time_s) for model in models])
        for m in (below[-1], above[0])
    ]
    return float(ends[1] - ends[0]) ** 2 / 12.0

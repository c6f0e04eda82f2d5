"""Kernel laws fitted to a profile's samples, with intervals from points that the fit never saw.

The laws are those of `assay.cost.laws`. Everything is robust (Cauchy weights) and in relative error, so that one
disturbed sample does not move a fit (`assay.cost.solve`).

A width costs at least what a narrower one costs: the table is fitted under that constraint, and so a prediction never
falls when the batch grows.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.cost.kernel_model import CostModel
from assay.cost.laws import (
    LINEAR_TERMS,
    GemmClass,
    LinearClass,
    OpFit,
    group_class,
    linear_bytes,
    linear_features,
    product_of,
)
from assay.cost.roofline import FloatArray
from assay.cost.roofs import COMPUTE_ROOF, Roofs, memory_roof_name, roof_of
from assay.cost.sequence import fit_sequence, stack_errors
from assay.cost.solve import minimise, non_negative
from assay.profile import MATRIX_OPS, Profile, Sample

LEVEL = 0.9
MIN_HELD_OUT = 8  # below this many held-out points, leave-one-shape-out residuals set the interval
FLOOR_LOG = 0.02  # no interval is narrower than 2%: repeat runs of one kernel differ by that much anyway
MIN_SHARED = 3  # calls that threads are seen to share, or their law is one of all calls, as one thread's is
P_LOW, P_HIGH = 1.5, 12.0
MEMORY_UTILISATION_MAX = 1.3  # a roof is measured too: a kernel may beat it a little


# ---- one class --------------------------------------------------------------------------------------------


def _knots(m: FloatArray) -> tuple[FloatArray, npt.NDArray[np.intp], FloatArray]:
    """Widths at which the law has a value of its own, the nearest to each of `m`, and each one's share in each of `m`.

    Those that were measured, but of widths less than a fifth apart (tokens an expert gets on average, say) only the narrowest.
    """
    kept: list[float] = []
    for width in np.unique(m):
        if not kept or width >= 1.2 * kept[-1] or float(width).is_integer():
            kept.append(float(width))
    knots = np.array(kept)
    log_m, log_knots = np.log(m), np.log(knots)
    pick = np.stack([np.interp(log_m, log_knots, row) for row in np.eye(knots.size)])
    return knots, pick.argmax(axis=0), pick


def _fit_gemm_class(samples: Sequence[Sample], roofs: Roofs) -> GemmClass:
    first = samples[0]
    products = [product_of(s.op, s.params) for s in samples]
    m, weights, activation_bytes = (
        np.concatenate([getattr(p, name) for p in products]) for name in ("rows", "weights", "activation_bytes")
    )
    time = np.array([s.median_s for s in samples])
    spread = np.array([s.spread for s in samples])
    log_memory = np.log(
        [max(s.bytes, 1.0) / roof_of(s, memory_roof_name(s.params), roofs) for s in samples]
    )  # seconds at 100% of the memory roof
    compute_roof = COMPUTE_ROOF[first.op]
    log_row = np.log(
        [max(s.ops, 1.0) / rows / roof_of(s, compute_roof, roofs) for s, rows in zip(samples, m, strict=True)]
    )  # seconds of one row at 100% of the compute roof
    knots, at_knot, pick = _knots(m)
    log_gaps = np.diff(np.log(knots))

    def unpack(theta: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        slopes = np.exp(theta[:, 4:]) * log_gaps
        log_rows = np.concatenate([theta[:, 3:4], theta[:, 3:4] + np.cumsum(slopes, axis=1)], axis=1)
        p = P_LOW + (P_HIGH - P_LOW) / (1.0 + np.exp(-theta[:, 2:3]))
        log_utilisation = math.log(MEMORY_UTILISATION_MAX) - np.log1p(np.exp(-theta[:, 1:2]))
        return theta[:, 0:1], log_utilisation, p, log_rows

    def model(theta: FloatArray) -> FloatArray:
        log_overhead, log_utilisation, p, log_rows = unpack(theta)
        memory = log_memory - log_utilisation
        compute = log_row + log_rows @ pick
        body = np.maximum(memory, compute) + np.log1p(np.exp(-p * np.abs(memory - compute))) / p
        return np.logaddexp(log_overhead, body)

    overhead = min(5e-6, 0.3 * float(time.min()))
    utilisation = float(np.clip((np.exp(log_memory) / (time - overhead)).max(), 0.1, 1.2))
    body = np.log(np.maximum(time - overhead, 0.1 * time))
    rows = np.array([np.median((body - log_row)[at_knot == j]) for j in range(knots.size)])
    slopes = np.maximum(np.diff(rows) / log_gaps, 0.05)
    start = np.concatenate(
        [
            [math.log(overhead), math.log(utilisation / (MEMORY_UTILISATION_MAX - utilisation)), -1.0, rows[0]],
            np.log(slopes),
        ]
    )
    # Weak priors carry what the points cannot tell. Memory utilisation 0.85 (logit of 0.85/1.3): where a kernel is
    # bound by compute everywhere, nothing shows how well it would stream. Slope 1: a constant compute utilisation.
    mean = np.concatenate([[math.log(3e-6), 0.64, -1.0, rows[0]], np.zeros(slopes.size)])
    deviation = np.concatenate([[1.5, 1.0, 1.5, 3.0], np.full(slopes.size, 1.0)])
    theta = minimise(model, np.log(time), start=start, prior_mean=mean, prior_sd=deviation, spread=spread)
    log_overhead, log_utilisation, p, log_rows = (part[0] for part in unpack(theta[None]))
    narrow = m == m.min()
    moved = np.array([s.bytes for s in samples])
    weight_bytes = np.median(((moved - activation_bytes) / weights)[narrow])
    group = group_class(first.params)
    return GemmClass(
        variant=first.variant,
        threads=first.threads,
        group_size=group,
        symmetric=bool(first.params["symmetric"]),
        overhead_s=float(np.exp(log_overhead[0])),
        memory_utilisation=float(np.exp(log_utilisation[0])),
        p=float(p[0]),
        m=knots,
        log_rows=log_rows,
        weight_bytes=float(np.clip(weight_bytes, 0.5, 2.0)),
        nk_low=float(weights.min()),
        nk_high=float(weights.max()),
        num_samples=len(samples),
        resident=str(first.params.get("resident", "dram")),
    )


def _law_of_threads(one: LinearClass, features: FloatArray, logits: FloatArray, times: FloatArray) -> FloatArray | None:
    """Coefficients of the calls that threads share, ``wait + share * time on one``; None where none were seen to.

    Shared are all from some number of logits on: the number that leaves the least error.
    """
    alone = np.asarray(one.seconds)
    by_one = features @ alone
    terms = np.stack([np.ones_like(by_one), by_one], axis=-1)
    best, least = None, float(np.abs(np.log(times / by_one)).sum())
    for start in np.unique(logits):
        shared = logits >= start
        if shared.sum() < MIN_SHARED:
            break
        law = non_negative(terms[shared], times[shared])
        error = float(np.abs(np.log(times / np.where(shared, terms @ law, by_one))).sum())
        if error < least:
            best, least = law, error
    if best is None:
        return None
    seconds = best[1] * alone
    seconds[0] += best[0]
    return seconds


def _fit_linear_class(samples: Sequence[Sample], one: LinearClass | None) -> LinearClass:
    """The law of one class; `one` is the same on one thread, to which small calls are left."""
    first = samples[0]
    features = np.concatenate([linear_features(first.op, s.params) for s in samples])
    times = np.array([s.median_s for s in samples])
    seconds = None
    if one is not None:
        logits = np.concatenate([linear_bytes(first.op, s.params) for s in samples])
        seconds = _law_of_threads(one, features, logits, times)
    names = sorted(k for k, v in first.params.items() if isinstance(v, (int, float)) and not isinstance(v, bool))
    return LinearClass(
        variant=first.variant,
        threads=first.threads,
        rule=str(first.params.get("rule", "")),
        seconds=tuple(float(c) for c in (non_negative(features, times) if seconds is None else seconds)),
        alone=None if one is None or seconds is None else one.seconds,
        ranges={k: (min(s.params[k] for s in samples), max(s.params[k] for s in samples)) for k in names},
        num_samples=len(samples),
    )


def class_key(sample: Sample) -> tuple[Any, ...]:
    """What samples of one op share that one law is fitted to."""
    if sample.op in MATRIX_OPS:
        kind = group_class(sample.params), bool(sample.params["symmetric"]), sample.params.get("resident", "dram")
        return sample.variant, sample.threads, *kind
    return sample.variant, sample.threads, sample.params.get("rule", "")


def fit_classes(op: str, samples: Sequence[Sample], roofs: Roofs) -> tuple[Any, ...]:
    """The laws of one op's classes, in the order of their keys."""
    by_class: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(class_key(sample), []).append(sample)
    ordered = [by_class[key] for key in sorted(by_class, key=repr)]
    if op in MATRIX_OPS:
        return tuple(_fit_gemm_class(group, roofs) for group in ordered)
    by_one = {key[::2]: _fit_linear_class(group, None) for key, group in by_class.items() if key[1] == 1}
    return tuple(
        _fit_linear_class(by_class[key], by_one.get(key[::2]) if key[1] > 1 else None)
        for key in sorted(by_class, key=repr)
    )


# ---- residuals, intervals, accuracy -----------------------------------------------------------------------


def _shape(sample: Sample) -> tuple[Any, ...]:
    """What is left out together: a whole matrix shape, router or vocabulary, never a neighbouring width alone."""
    keys = {
        "moe_route": ("num_experts", "top_k"),
        "moe_experts": ("hidden_size", "intermediate_size"),
        "chain_verify": ("vocab",),
    }.get(sample.op, ("n", "k"))
    return tuple(sample.params[k] for k in keys)


def conformal_half_width(residuals: npt.ArrayLike, level: float = LEVEL) -> float:
    """The ``ceil((n + 1) level)``-th smallest of ``|residuals|``: covers a new exchangeable point with that chance.

    With fewer points than the level can be promised from (9 for 90%), 1.5 times the largest. Never below 2%.
    """
    values = np.sort(np.abs(np.asarray(residuals, dtype=np.float64)))
    if values.size == 0:
        return math.log(2.0)  # nothing is known: a factor of two
    rank = math.ceil((values.size + 1) * level)
    width = float(values[rank - 1]) if rank <= values.size else 1.5 * float(values[-1])
    return max(width, FLOOR_LOG)


def jackknife_coverage(residuals: npt.ArrayLike, level: float = LEVEL) -> float | None:
    """Share of points inside the interval that the *other* points set.

    Coverage counted on the very points that set the interval is met by construction and says nothing; here each
    point is judged by an interval made without it. None with fewer than two points.
    """
    values = np.abs(np.asarray(residuals, dtype=np.float64))
    if values.size < 2:
        return None
    inside = [values[i] <= conformal_half_width(np.delete(values, i), level) for i in range(values.size)]
    return float(np.mean(inside))


def _log_error(sample: Sample, fit: OpFit, roofs: Roofs, *, near: bool = True) -> float:
    """ln(measured / predicted), the prediction made with the roof measured next to the sample."""
    return math.log(sample.median_s / CostModel({fit.op: fit}, roofs, {}).sample_time(sample, near=near))


def _left_out_errors(op: str, samples: Sequence[Sample], roofs: Roofs) -> list[float]:
    """Residuals of samples predicted by fits without their shape (or, with one shape only, without every fifth)."""
    shapes = sorted({_shape(s) for s in samples})
    if len(shapes) > 1:
        folds = [[s for s in samples if _shape(s) == shape] for shape in shapes]
    else:
        folds = [list(samples[i::5]) for i in range(min(5, len(samples)))]
    errors: list[float] = []
    for fold in folds:
        left = {id(s) for s in fold}
        rest = [s for s in samples if id(s) not in left]
        if not rest:
            continue
        fit = OpFit(op, fit_classes(op, rest, roofs), 0.0, "", len(rest))
        known = {class_key(s) for s in rest}
        errors += [_log_error(s, fit, roofs) for s in fold if class_key(s) in known]
    return errors


def _accuracy(errors: Sequence[float], raw: Sequence[float], source: str, spread: float) -> dict[str, Any]:
    """Row of the accuracy table; ratios are predicted / measured - 1."""
    ratio = np.exp(-np.asarray(errors, dtype=np.float64)) - 1.0
    known = ratio.size > 0
    return {
        "n": int(ratio.size),
        "median_ape": float(np.median(np.abs(ratio))) if known else None,
        "p90_ape": float(np.quantile(np.abs(ratio), 0.9)) if known else None,
        "bias": float(np.median(ratio)) if known else None,
        "coverage": jackknife_coverage(errors),
        "source": source,
        "raw_median_ape": float(np.median(np.abs(np.exp(-np.asarray(raw)) - 1.0))) if raw else None,
        "repeat_spread": spread,
    }


def _fit_op(op: str, samples: Sequence[Sample], roofs: Roofs) -> tuple[OpFit, dict[str, Any]]:
    fitted = [s for s in samples if not s.held_out]
    held_out = [s for s in samples if s.held_out]
    bare = OpFit(op, fit_classes(op, fitted, roofs), 0.0, "", len(samples))
    errors = [_log_error(s, bare, roofs) for s in held_out]
    raw = [_log_error(s, bare, roofs, near=False) for s in held_out]
    source = "held-out"
    if len(errors) < MIN_HELD_OUT:
        left_out = _left_out_errors(op, fitted, roofs)
        source = "leave-one-shape-out" if not errors else "held-out and leave-one-shape-out"
        errors += left_out
    fit = OpFit(op, bare.classes, conformal_half_width(errors), source if errors else "none", len(samples))
    spread = float(np.median([s.spread for s in samples]))
    return fit, _accuracy(errors, raw, source, spread)


# ---- a profile --------------------------------------------------------------------------------------------


def fit_profile(profile: Profile) -> CostModel:
    """Fit every op that has samples which are not held out. Pure: the same profile gives the same model.

    Raises
    ------
    ProfileError
        A needed roof is missing.
    """
    roofs = Roofs(profile.roofs, profile.settings.get("earlier", ()))
    fits: dict[str, OpFit] = {}
    accuracy: dict[str, Any] = {}
    for op in (*MATRIX_OPS, *LINEAR_TERMS):
        samples = [s for s in profile.samples if s.op == op]
        if any(not s.held_out for s in samples):
            fits[op], accuracy[op] = _fit_op(op, samples, roofs)
    model = CostModel(fits, roofs, dict(profile.package.get("kernels", {})), accuracy)
    stacks = [s for s in profile.samples if s.op == "sequence"]
    if not stacks:
        return model
    errors, inside = stack_errors(stacks, model)
    accuracy["sequence"] = {
        **_accuracy(errors, errors, "stacks of layers, predicted whole", float(np.median([s.spread for s in stacks]))),
        "coverage": float(np.mean(inside)) if inside else None,
    }
    return replace(model, sequence=fit_sequence(stacks))

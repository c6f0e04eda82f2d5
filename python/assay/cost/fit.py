"""Kernel laws fitted to a profile's samples, with intervals from points that the fit never saw.

Three laws, all in docs/cost-model.md:

- matrix products: overhead plus the smooth maximum of a memory and a compute term (`assay.cost.roofline`), both as
  utilisations of measured roofs; the compute utilisation is a table over the calibrated widths M;
- routing and verification: non-negative sums of their counts;
- everything robust (Cauchy weights), in relative error, so that one disturbed sample does not move a fit.

A width costs at least what a narrower one costs: the table is fitted under that constraint, and so a prediction never
falls when the batch grows.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.cost.roofline import Estimate, Estimates, FloatArray, from_roofs, shares, smooth_max
from assay.errors import ProfileError
from assay.profile import GEMM_OPS, Profile, Roof, Sample

LAW = 1  # raised when the meaning of the stored numbers changes: older fits are then made anew
LEVEL = 0.9
MIN_HELD_OUT = 8  # below this many held-out points, leave-one-shape-out residuals set the interval
FLOOR_LOG = 0.02  # no interval is narrower than 2%: repeat runs of one kernel differ by that much anyway
RANGE_SLACK = 2.0  # N * K may leave the calibrated range by this factor before a prediction is called extrapolated
COMPUTE_ROOF = {"w4a8_gemm": "int8_peak", "w4a16_gemm": "fp32_peak", "w8a8_gemm": "int8_peak"}
# package.kernels may name the kernel file instead of the op.
KERNEL_OF_OP = {
    "w4a8_gemm": "int4_gemm",
    "w4a16_gemm": "int4_gemm",
    "w8a8_gemm": "int8_gemm",
    "chain_verify": "spec_verify",
}
LINEAR_TERMS = {
    "moe_route": ("call", "token", "token_expert", "token_choice"),
    "chain_verify": ("call", "logit", "sampled_logit"),
}
CAUCHY = 2.385  # tuning constant of the Cauchy weight: 95% efficiency on Gaussian errors
P_LOW, P_HIGH = 1.5, 12.0
MEMORY_UTILISATION_MAX = 1.3  # a roof is measured too: a kernel may beat it a little

Params = Mapping[str, Any]


# ---- robust fitting ---------------------------------------------------------------------------------------


def minimise(
    model: Callable[[FloatArray], FloatArray],
    target: FloatArray,
    *,
    start: FloatArray,
    prior_mean: FloatArray,
    prior_sd: FloatArray,
    spread: FloatArray,
) -> FloatArray:
    """Levenberg-Marquardt with Cauchy weights and a Gaussian prior, in whatever space ``model`` returns.

    Parameters
    ----------
    model
        Maps a stack of parameter vectors [S, P] to predictions [S, n]; the Jacobian is one forward difference, so
        one call with P + 1 vectors.
    target
        What to reach, [n].
    start, prior_mean, prior_sd
        First guess and the prior of each parameter, [P].
    spread
        Relative repeat-to-repeat spread of each target, [n]: noisy points weigh less.
    """
    theta = start.astype(np.float64)
    scale = 0.05
    step = 1e-5

    def cost(residual: FloatArray, at: FloatArray) -> float:
        robust = 0.5 * CAUCHY**2 * np.log1p((residual / CAUCHY) ** 2)
        return float(robust.sum() + 0.5 * (((at - prior_mean) / prior_sd) ** 2).sum())

    for _ in range(3):  # the scale of the residuals is re-estimated between rounds
        sigma = np.hypot(scale, 0.5 * spread)
        damping = 1e-3
        base = model(theta[None])[0]
        now = cost((base - target) / sigma, theta)
        for _ in range(40):
            stack = theta[None] + np.eye(theta.size) * step
            jacobian = ((model(stack) - base) / step).T / sigma[:, None]
            residual = (base - target) / sigma
            weight = 1.0 / (1.0 + (residual / CAUCHY) ** 2)
            gradient = jacobian.T @ (weight * residual) + (theta - prior_mean) / prior_sd**2
            curvature = jacobian.T @ (weight[:, None] * jacobian) + np.diag(1.0 / prior_sd**2)
            improved = False
            while damping < 1e9:
                move = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -gradient)
                trial = theta + np.clip(move, -2.0, 2.0)
                trial_base = model(trial[None])[0]
                trial_cost = cost((trial_base - target) / sigma, trial)
                if trial_cost < now:
                    improved = True
                    break
                damping *= 4.0
            if not improved:
                break
            gain = now - trial_cost
            theta, base, now = trial, trial_base, trial_cost
            damping = max(damping / 8.0, 1e-9)
            if gain < 1e-7 * max(now, 1.0):
                break
        middle = float(np.median(np.abs(base - target)))
        scale = float(np.clip(1.4826 * middle, 0.01, 0.3))
    return theta


def non_negative(features: FloatArray, times_s: FloatArray) -> FloatArray:
    """Coefficients >= 0 of ``features @ c = times_s`` in relative error, robustly; features [n, f] with small f.

    Every subset of columns is tried (f <= 4, so at most 15): the exact non-negative least squares without an
    active-set search to get wrong.
    """
    scaled = features / times_s[:, None]
    norm = np.maximum(np.abs(scaled).max(axis=0), np.finfo(np.float64).tiny)
    scaled = scaled / norm
    weight = np.ones(times_s.size)
    best = np.zeros(features.shape[1])
    subsets = [
        list(chosen)
        for size in range(1, features.shape[1] + 1)
        for chosen in itertools.combinations(range(features.shape[1]), size)
    ]
    for _ in range(6):
        root = np.sqrt(weight)
        least = math.inf
        for chosen in subsets:
            solution = np.linalg.lstsq(scaled[:, chosen] * root[:, None], root, rcond=None)[0]
            if solution.min() < 0:
                continue
            loss = float((weight * (scaled[:, chosen] @ solution - 1.0) ** 2).sum())
            # A column more has to earn its place: without this, noise decides between equal explanations.
            if loss < least * (1.0 - 1e-6):
                least = loss
                best = np.zeros(features.shape[1])
                best[chosen] = solution
        residual = scaled @ best - 1.0
        scale = max(1.4826 * float(np.median(np.abs(residual))), 0.01)
        weight = 1.0 / (1.0 + (residual / (CAUCHY * scale)) ** 2)
    return best / norm


# ---- the laws ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmClass:
    """Fitted law of one (variant, threads, group size, symmetric): see the module's head for the equation.

    ``log_rows`` is ``ln(M / compute_utilisation)`` at the widths ``m``: it never falls, and it is what is interpolated.
    """

    variant: str
    threads: int
    group_size: int
    symmetric: bool
    overhead_s: float
    memory_utilisation: float
    p: float
    m: FloatArray
    log_rows: FloatArray
    weight_bytes: float  # bytes a weight takes packed, scales and zeros included
    nk_low: float
    nk_high: float
    num_samples: int

    def rows(self, m: npt.ArrayLike) -> FloatArray:
        """Rows at full utilisation that M rows cost, ``M / compute_utilisation(M)``."""
        return np.exp(_interpolate(np.log(np.asarray(m, dtype=np.float64)), np.log(self.m), self.log_rows))

    def compute_utilisation(self, m: npt.ArrayLike) -> FloatArray:
        """Share of the compute roof that the kernel reaches at width M where nothing else limits it."""
        return np.asarray(m, dtype=np.float64) / self.rows(m)


@dataclass(frozen=True)
class LinearClass:
    """Fitted law of one (variant, threads, rule): seconds per call, per token and so on, by `LINEAR_TERMS`."""

    variant: str
    threads: int
    rule: str
    seconds: tuple[float, ...]
    ranges: Mapping[str, tuple[float, float]]
    num_samples: int


@dataclass(frozen=True)
class OpFit:
    """All classes of one op, and the half width in log time of its 90% interval."""

    op: str
    classes: tuple[GemmClass, ...] | tuple[LinearClass, ...]
    half_width_log: float
    interval_from: str
    num_samples: int


def _interpolate(x: FloatArray, knots: FloatArray, values: FloatArray) -> FloatArray:
    """Piecewise linear; beyond the knots the slope is 1 (a constant utilisation)."""
    inside = np.interp(x, knots, values)
    return inside + np.maximum(x - knots[-1], 0.0) - np.maximum(knots[0] - x, 0.0)


def _gemm_bytes(m: npt.ArrayLike, n: npt.ArrayLike, k: npt.ArrayLike, weight_bytes: float) -> FloatArray:
    """Bytes one call moves: packed weights, float32 activations in, float32 results out."""
    rows, n_, k_ = (np.asarray(v, dtype=np.float64) for v in (m, n, k))
    return weight_bytes * n_ * k_ + 4.0 * rows * (n_ + k_)


def _linear_features(op: str, params: Params) -> FloatArray:
    """Counts that the seconds of a `LinearClass` multiply, [n, terms]."""
    if op == "moe_route":
        tokens, experts, top_k = (np.asarray(params[k], dtype=np.float64) for k in ("tokens", "num_experts", "top_k"))
        columns: list[FloatArray] = [np.ones(()), tokens, tokens * experts, tokens * top_k]
    else:
        batch, drafts, vocab = (np.asarray(params[k], dtype=np.float64) for k in ("batch", "num_draft", "vocab"))
        rows = np.asarray(params.get("rows_read", batch * (drafts + 1.0)), dtype=np.float64)
        columns = [np.ones(()), rows * vocab]
        if params["rule"] == "rejection":
            columns.append(np.asarray(params.get("rows_sampled", batch), dtype=np.float64) * vocab)
    return np.stack([np.atleast_1d(c) for c in np.broadcast_arrays(*columns)], axis=-1)


def _linear_bytes(op: str, params: Params) -> FloatArray:
    """Bytes of float32 logits that a call reads: only to tell memory from compute."""
    features = _linear_features(op, params)
    return 4.0 * features[..., 2 if op == "moe_route" else 1]


def _group(params: Params) -> int:
    """Group size of a sample; the whole row counts as K."""
    group = int(params["group_size"])
    return int(params["k"]) if group <= 0 else group


def _group_class(params: Params) -> int:
    """Group size as a class: -1 for the whole row, whatever K is."""
    group = int(params["group_size"])
    return -1 if group <= 0 or (group == int(params["k"]) and group > 256) else group


class Roofs:
    """Measured ceilings by name and threads; of a thread count without one, the nearest is taken."""

    def __init__(self, roofs: Iterable[Roof]) -> None:
        self._by_name: dict[str, dict[int, Roof]] = {}
        for roof in roofs:
            self._by_name.setdefault(roof.name, {})[roof.threads] = roof

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def threads(self, name: str) -> tuple[int, ...]:
        """Thread counts at which a roof was measured."""
        return tuple(sorted(self._by_name.get(name, {})))

    def get(self, name: str, threads: int) -> Roof:
        """The roof, at the nearest measured thread count in ratio (the lower of two equally near).

        Raises
        ------
        ProfileError
            The profile has no roof of that name.
        """
        found = self._by_name.get(name)
        if not found:
            raise ProfileError(f"$.roofs: expected a roof {name!r}, got {', '.join(self._by_name) or 'none'}")
        return found[min(found, key=lambda t: (abs(math.log(t / threads)), t))]


def _memory_roof(params: Params) -> str:
    return "llc_read" if params.get("resident") == "llc" else "dram_read"


def _roof_of(sample: Sample, name: str, roofs: Roofs) -> float:
    """The roof to normalise a sample by: the one measured next to it, else the profile's median."""
    if sample.roof_near and name in sample.roof_near:
        return sample.roof_near[name]
    return roofs.get(name, sample.threads).median


def _fit_gemm_class(samples: Sequence[Sample], roofs: Roofs) -> GemmClass:
    first = samples[0]
    m = np.array([s.params["m"] for s in samples], dtype=np.float64)
    n = np.array([s.params["n"] for s in samples], dtype=np.float64)
    k = np.array([s.params["k"] for s in samples], dtype=np.float64)
    time = np.array([s.median_s for s in samples])
    spread = np.array([s.spread for s in samples])
    log_memory = np.log(
        [max(s.bytes, 1.0) / _roof_of(s, _memory_roof(s.params), roofs) for s in samples]
    )  # seconds at 100% of the memory roof
    compute_roof = COMPUTE_ROOF[first.op]
    log_row = np.log(
        [max(s.ops, 1.0) / s.params["m"] / _roof_of(s, compute_roof, roofs) for s in samples]
    )  # seconds of one row at 100% of the compute roof
    knots, at_knot = np.unique(m, return_inverse=True)
    log_gaps = np.diff(np.log(knots))
    pick = np.eye(knots.size)[:, at_knot]

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
    weight_bytes = np.median(
        [
            (s.bytes - 4.0 * s.params["m"] * (s.params["n"] + s.params["k"])) / (s.params["n"] * s.params["k"])
            for s, keep in zip(samples, narrow, strict=True)
            if keep
        ]
    )
    group = _group_class(first.params)
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
        nk_low=float((n * k).min()),
        nk_high=float((n * k).max()),
        num_samples=len(samples),
    )


def _fit_linear_class(samples: Sequence[Sample]) -> LinearClass:
    first = samples[0]
    features = np.concatenate([_linear_features(first.op, s.params) for s in samples])
    times = np.array([s.median_s for s in samples])
    names = sorted(k for k, v in first.params.items() if isinstance(v, (int, float)) and not isinstance(v, bool))
    return LinearClass(
        variant=first.variant,
        threads=first.threads,
        rule=str(first.params.get("rule", "")),
        seconds=tuple(float(c) for c in non_negative(features, times)),
        ranges={k: (min(s.params[k] for s in samples), max(s.params[k] for s in samples)) for k in names},
        num_samples=len(samples),
    )


def _class_key(sample: Sample) -> tuple[str, int, Any, Any]:
    if sample.op in GEMM_OPS:
        return sample.variant, sample.threads, _group_class(sample.params), bool(sample.params["symmetric"])
    return sample.variant, sample.threads, sample.params.get("rule", ""), None


def _fit_classes(op: str, samples: Sequence[Sample], roofs: Roofs) -> tuple[Any, ...]:
    by_class: dict[tuple[str, int, Any, Any], list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(_class_key(sample), []).append(sample)
    ordered = [by_class[key] for key in sorted(by_class, key=repr)]
    if op in GEMM_OPS:
        return tuple(_fit_gemm_class(group, roofs) for group in ordered)
    return tuple(_fit_linear_class(group) for group in ordered)


# ---- residuals, intervals, accuracy -----------------------------------------------------------------------


def _shape(sample: Sample) -> tuple[Any, ...]:
    """What is left out together: a whole matrix shape, router or vocabulary, never a neighbouring width alone."""
    keys = {"moe_route": ("num_experts", "top_k"), "chain_verify": ("vocab",)}.get(sample.op, ("n", "k"))
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
    model = CostModel({fit.op: fit}, roofs, {})
    predicted = model._times(sample.op, sample.params, sample.threads, sample.variant, sample if near else None)
    return math.log(sample.median_s / float(predicted.time_s[0]))


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
        fit = OpFit(op, _fit_classes(op, rest, roofs), 0.0, "", len(rest))
        known = {_class_key(s) for s in rest}
        errors += [_log_error(s, fit, roofs) for s in fold if _class_key(s) in known]
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
    bare = OpFit(op, _fit_classes(op, fitted, roofs), 0.0, "", len(samples))
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


# ---- the model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CostModel:
    """What a profile knows about kernels: fitted laws by op, roofs, which variant runs when none is named, and how far
    predictions of points outside the fits were off (rows as `summarise` returns them)."""

    ops: Mapping[str, OpFit]
    roofs: Roofs
    kernels: Mapping[str, str] = field(default_factory=dict)
    accuracy: Mapping[str, Any] = field(default_factory=dict)

    def calibrated(self, op: str) -> bool:
        """Whether a fitted law stands behind ``op``."""
        return op in self.ops

    def threads(self) -> tuple[int, ...]:
        """Thread counts at which any op was calibrated; those of the memory roof when none was."""
        counts = {c.threads for fit in self.ops.values() for c in fit.classes}
        return tuple(sorted(counts)) or self.roofs.threads("dram_read")

    def kernel_time(self, op: str, params: Params, threads: int, variant: str | None = None) -> Estimate:
        """Predicted time of one call.

        Parameters
        ----------
        op
            One of `GEMM_OPS`, "moe_route" or "chain_verify".
        params
            As in a profile's samples: gemm ``m, n, k`` (``group_size`` 32 and ``symmetric`` True when left out),
            moe_route ``tokens, num_experts, top_k``, chain_verify ``batch, num_draft, vocab, rule``.
        threads
            Threads of the call; the nearest calibrated count stands in for one that is not, and is flagged.

        Raises
        ------
        ProfileError
            The profile has no samples of ``op``.
        ValueError
            A size that is not a finite number above 0.
        """
        return self.kernel_times(op, params, threads, variant).at(0)

    def kernel_times(self, op: str, params: Params, threads: int, variant: str | None = None) -> Estimates:
        """`kernel_time` of many calls at once: any size in ``params`` may be an array, and they broadcast."""
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        if op not in self.ops:
            raise ProfileError(f"$.samples: expected samples of {op}, got {', '.join(self.ops) or 'none'}")
        defaults: dict[str, Any] = {"group_size": 32, "symmetric": True} if op in GEMM_OPS else {"rule": "greedy"}
        full = defaults | dict(params)
        for name in ("m", "n", "k") if op in GEMM_OPS else _linear_sizes(op):
            values = np.asarray(full[name], dtype=np.float64)
            low = 0.0 if name != "num_draft" else -1.0
            if not np.all(np.isfinite(values)) or np.any(values <= low):
                raise ValueError(f"{name}: expected finite numbers above {low:g}, got {full[name]!r}")
        return self._times(op, full, threads, variant, None)

    def roof_times(
        self, moved_bytes: npt.ArrayLike, ops: npt.ArrayLike, threads: int, *, compute: str, note: str
    ) -> Estimates:
        """Price calls without a calibrated kernel on the roofs, at the utilisations that the INT4 kernel reaches.

        ``compute`` names the compute roof. Without an INT4 fit: 80% of memory, 60% of compute, the fractions that
        well-tuned kernels reach (AIConfigurator, BLIS); either way the interval spans from the roof to twice the time.
        """
        memory_utilisation, compute_utilisation, overhead, p = 0.8, 0.6, 5e-6, 4.0
        fit = next((self.ops[op] for op in GEMM_OPS if op in self.ops), None)
        if fit is not None:
            chosen = self._pick(fit, threads, None, group=32)
            assert isinstance(chosen, GemmClass)
            memory_utilisation = float(np.clip(chosen.memory_utilisation, 0.2, 1.0))
            # Of the widest product: at narrow ones memory hides what the arithmetic could reach.
            compute_utilisation = float(np.clip(chosen.compute_utilisation(chosen.m[-1]), 0.05, 1.0))
            overhead, p = chosen.overhead_s, chosen.p
        return from_roofs(
            moved_bytes,
            ops,
            bytes_per_s=self.roofs.get("dram_read", threads).median,
            ops_per_s=self.roofs.get(compute, threads).median,
            memory_utilisation=memory_utilisation,
            compute_utilisation=compute_utilisation,
            overhead_s=overhead,
            p=p,
            notes=(note,),
        )

    def _pick(
        self, fit: OpFit, threads: int, variant: str | None, *, group: int = 0, symmetric: bool = True, rule: str = ""
    ) -> Any:
        """The class nearest to what is asked: variant first, then rule, threads, symmetry, group size."""
        wanted = variant or self.kernels.get(fit.op) or self.kernels.get(KERNEL_OF_OP.get(fit.op, ""))
        if wanted not in {c.variant for c in fit.classes}:
            counts: dict[str, int] = {}
            for c in fit.classes:
                counts[c.variant] = counts.get(c.variant, 0) + c.num_samples
            wanted = max(sorted(counts), key=counts.__getitem__)

        def distance(c: GemmClass | LinearClass) -> tuple[Any, ...]:
            ratio = abs(math.log(c.threads / threads))
            if isinstance(c, GemmClass):
                # The whole row is further from any group than groups are from one another.
                far = 10.0 if (c.group_size < 0) != (group < 0) else abs(math.log(max(c.group_size, 1) / max(group, 1)))
                return c.variant != wanted, ratio, c.threads, c.symmetric != symmetric, far
            return c.variant != wanted, c.rule != rule, ratio, c.threads

        return min(fit.classes, key=distance)

    def _times(self, op: str, params: Params, threads: int, variant: str | None, near: Sample | None) -> Estimates:
        if op in GEMM_OPS:
            return self._gemm_times(op, params, threads, variant, near)
        return self._linear_times(op, params, threads, variant)

    def _gemm_times(self, op: str, params: Params, threads: int, variant: str | None, near: Sample | None) -> Estimates:
        fit = self.ops[op]
        group, symmetric = _group_class(_scalar_k(params)), bool(params["symmetric"])
        chosen = self._pick(fit, threads, variant, group=group, symmetric=symmetric)
        assert isinstance(chosen, GemmClass)
        m, n, k = (np.atleast_1d(np.asarray(params[key], dtype=np.float64)) for key in ("m", "n", "k"))
        m, n, k = np.broadcast_arrays(m, n, k)
        memory_roof = self.roofs.get(_memory_roof(params), threads)
        compute_roof = self.roofs.get(COMPUTE_ROOF[op], threads)
        if near is not None:
            moved: FloatArray = np.array([near.bytes])
            bytes_per_s = _roof_of(near, _memory_roof(params), self.roofs)
            ops_per_s = _roof_of(near, COMPUTE_ROOF[op], self.roofs)
        else:
            moved = _gemm_bytes(m, n, k, _packed_bytes(chosen, group, symmetric, k))
            bytes_per_s, ops_per_s = memory_roof.median, compute_roof.median
        memory = moved / (bytes_per_s * chosen.memory_utilisation)
        compute = 2.0 * n * k * chosen.rows(m) / ops_per_s
        time = chosen.overhead_s + smooth_max(memory, compute, chosen.p)
        memory_s, compute_s = shares(memory, compute, time, chosen.overhead_s, chosen.p)
        notes: list[tuple[str, npt.NDArray[np.bool_]]] = []
        widen = np.zeros(time.shape)
        everywhere = np.ones(time.shape, dtype=bool)
        for differs, text in (
            (chosen.threads != threads, f"{op} was calibrated at {chosen.threads} threads, not {threads}"),
            (
                chosen.group_size != group,
                f"{op} was calibrated at group size {_group_text(chosen.group_size)}, not {_group_text(group)}",
            ),
            (chosen.symmetric != symmetric, f"{op} was calibrated {'' if chosen.symmetric else 'a'}symmetric only"),
            (
                variant is not None and chosen.variant != variant,
                f"{op} was calibrated as {chosen.variant}, not {variant}",
            ),
        ):
            if differs:
                notes.append((text, everywhere))
                widen += math.log(1.25)
        for value, low, high, text in (
            (m, chosen.m[0], chosen.m[-1], f"M outside the calibrated {chosen.m[0]:g} to {chosen.m[-1]:g} of {op}"),
            (
                n * k,
                chosen.nk_low / RANGE_SLACK,
                chosen.nk_high * RANGE_SLACK,
                f"N*K outside the calibrated {chosen.nk_low:.3g} to {chosen.nk_high:.3g} of {op}",
            ),
        ):
            beyond = np.maximum(np.log(np.maximum(low / value, value / high)), 0.0)
            outside = beyond > 1e-9
            if outside.any():
                notes.append((text, outside))
                widen = widen + 0.1 * beyond  # a judgement, not a measurement: 7% more each factor of two beyond
        body = np.maximum(time, np.finfo(np.float64).tiny)
        half = np.sqrt(
            (fit.half_width_log + widen) ** 2
            + (_drift(memory_roof) * memory_s / body) ** 2
            + (_drift(compute_roof) * compute_s / body) ** 2
        )
        return _estimates(
            time,
            half,
            memory_s=memory_s,
            compute_s=compute_s,
            overhead_s=np.full(time.shape, chosen.overhead_s),
            notes=notes,
        )

    def _linear_times(self, op: str, params: Params, threads: int, variant: str | None) -> Estimates:
        fit = self.ops[op]
        rule = str(params.get("rule", "")) if op == "chain_verify" else ""
        chosen = self._pick(fit, threads, variant, rule=rule)
        assert isinstance(chosen, LinearClass)
        features = _linear_features(op, {**params, "rule": chosen.rule})
        time = features @ np.asarray(chosen.seconds)
        overhead = np.full(time.shape, chosen.seconds[0])
        body = time - overhead
        moved = _linear_bytes(op, {**params, "rule": chosen.rule})
        memory_s = np.minimum(body, moved / self.roofs.get("dram_read", threads).median)
        notes: list[tuple[str, npt.NDArray[np.bool_]]] = []
        widen = np.zeros(time.shape)
        everywhere = np.ones(time.shape, dtype=bool)
        for differs, text in (
            (chosen.threads != threads, f"{op} was calibrated at {chosen.threads} threads, not {threads}"),
            (chosen.rule != rule, f"{op} was calibrated with the rule {chosen.rule}, not {rule}"),
            (
                variant is not None and chosen.variant != variant,
                f"{op} was calibrated as {chosen.variant}, not {variant}",
            ),
        ):
            if differs:
                notes.append((text, everywhere))
                widen += math.log(1.25)
        for name, (low, high) in chosen.ranges.items():
            if name not in params:
                continue
            value = np.broadcast_to(np.asarray(params[name], dtype=np.float64), time.shape)
            above = np.log(np.maximum(value, 1e-9) / (max(high, 1e-9) * RANGE_SLACK))
            below = np.log(max(low, 1e-9) / RANGE_SLACK / np.maximum(value, 1e-9))
            beyond = np.maximum(np.maximum(above, below), 0.0) if name != "num_draft" else np.maximum(above, 0.0)
            outside = beyond > 1e-9
            if outside.any():
                notes.append((f"{name} outside the calibrated {low:g} to {high:g} of {op}", outside))
                widen = widen + 0.1 * beyond
        return _estimates(
            time,
            fit.half_width_log + widen,
            memory_s=memory_s,
            compute_s=body - memory_s,
            overhead_s=overhead,
            notes=notes,
        )


def _linear_sizes(op: str) -> tuple[str, ...]:
    return ("tokens", "num_experts", "top_k") if op == "moe_route" else ("batch", "num_draft", "vocab")


def _scalar_k(params: Params) -> Params:
    """The params with one K: the group class is one for the whole call."""
    return {**params, "k": int(np.asarray(params["k"]).flat[0])}


def _group_text(group: int) -> str:
    return "whole row" if group < 0 else str(group)


def _packed_bytes(chosen: GemmClass, group: int, symmetric: bool, k: FloatArray) -> Any:
    """Bytes a weight of the asked class takes, from the fitted class: scales are float16, zeros half a byte a group."""

    def per_group(g: int, sym: bool) -> FloatArray:
        return (2.0 if sym else 2.5) / (k if g < 0 else np.full(k.shape, float(g)))

    if group == chosen.group_size and symmetric == chosen.symmetric:
        return chosen.weight_bytes
    return chosen.weight_bytes + per_group(group, symmetric) - per_group(chosen.group_size, chosen.symmetric)


def _drift(roof: Roof) -> float:
    """90% half width in log of a roof that was measured with this spread: 1.645 sigma, sigma = IQR / 1.349."""
    return 1.645 / 1.349 * roof.spread


def _estimates(
    time: FloatArray,
    half: FloatArray,
    *,
    memory_s: FloatArray,
    compute_s: FloatArray,
    overhead_s: FloatArray,
    notes: list[tuple[str, npt.NDArray[np.bool_]]],
) -> Estimates:
    outside = np.zeros(time.shape, dtype=bool)
    for _, where in notes:
        outside |= where
    return Estimates(
        time_s=time,
        low_s=time * np.exp(-half),
        high_s=time * np.exp(half),
        memory_s=memory_s,
        compute_s=compute_s,
        overhead_s=overhead_s,
        basis="measured",
        in_range=~outside,
        notes=tuple(notes),
    )


# ---- from and to a profile --------------------------------------------------------------------------------


def fit_profile(profile: Profile) -> CostModel:
    """Fit every op that has samples which are not held out. Pure: the same profile gives the same model.

    Raises
    ------
    ProfileError
        A needed roof is missing.
    """
    roofs = Roofs(profile.roofs)
    fits: dict[str, OpFit] = {}
    accuracy: dict[str, Any] = {}
    for op in (*GEMM_OPS, *LINEAR_TERMS):
        samples = [s for s in profile.samples if s.op == op]
        if any(not s.held_out for s in samples):
            fits[op], accuracy[op] = _fit_op(op, samples, roofs)
    return CostModel(fits, roofs, dict(profile.package.get("kernels", {})), accuracy)


def summarise(profile: Profile) -> tuple[dict[str, Any], dict[str, Any]]:
    """``fits`` and ``accuracy`` as a profile stores them (docs/profile-format.md).

    Accuracy is counted on points outside the fit: the held-out ones, joined by leave-one-shape-out points where
    there are fewer than 8. Predictions use the roof measured next to each point when there is one, since the machine's
    drift between two moments is no error of the law; ``raw_median_ape`` is the error without that help. ``coverage`` is
    that of `jackknife_coverage`: no point is judged by an interval that it helped to set.
    """
    model = fit_profile(profile)
    return model_to_json(model), dict(model.accuracy)


def load_model(profile: Profile) -> CostModel:
    """The model of a profile: its stored fits when they belong to its samples, else fitted now."""
    counts: dict[str, int] = {}
    for sample in profile.samples:
        counts[sample.op] = counts.get(sample.op, 0) + 1
    needed = {op for op in (*GEMM_OPS, *LINEAR_TERMS) if any(s.op == op and not s.held_out for s in profile.samples)}
    current = all(
        isinstance(fit, dict) and fit.get("law") == LAW and fit.get("num_samples") == counts.get(op)
        for op, fit in profile.fits.items()
    )
    if profile.fits and current and needed == set(profile.fits) == set(profile.accuracy):
        return model_from_json(profile.fits, profile)
    return fit_profile(profile)


def model_to_json(model: CostModel) -> dict[str, Any]:
    """The fitted laws as JSON values; the roofs and kernels stay where they are in the profile."""
    return {op: _fit_to_json(fit) for op, fit in model.ops.items()}


def _fit_to_json(fit: OpFit) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for c in fit.classes:
        if isinstance(c, GemmClass):
            rows.append(
                {
                    "variant": c.variant,
                    "threads": c.threads,
                    "group_size": c.group_size,
                    "symmetric": c.symmetric,
                    "overhead_s": c.overhead_s,
                    "memory_utilisation": c.memory_utilisation,
                    "p": c.p,
                    "m": c.m.tolist(),
                    "compute_utilisation": c.compute_utilisation(c.m).tolist(),
                    "weight_bytes": c.weight_bytes,
                    "n_times_k": [c.nk_low, c.nk_high],
                    "num_samples": c.num_samples,
                }
            )
        else:
            rows.append(
                {
                    "variant": c.variant,
                    "threads": c.threads,
                    "rule": c.rule,
                    "seconds_per": dict(zip(LINEAR_TERMS[fit.op], c.seconds, strict=False)),
                    "ranges": {k: list(v) for k, v in c.ranges.items()},
                    "num_samples": c.num_samples,
                }
            )
    return {
        "law": LAW,
        "num_samples": fit.num_samples,
        "half_width_log": fit.half_width_log,
        "interval_from": fit.interval_from,
        "classes": rows,
    }


def model_from_json(fits: Mapping[str, Any], profile: Profile) -> CostModel:
    """The model that `model_to_json` wrote, with the roofs and kernels of ``profile``.

    Raises
    ------
    ProfileError
        A fit that `model_to_json` would not have written.
    """
    ops: dict[str, OpFit] = {}
    for op, data in fits.items():
        try:
            read = _gemm_from_json if op in GEMM_OPS else _linear_from_json
            ops[op] = OpFit(
                op,
                tuple(read(op, row) for row in data["classes"]),  # type: ignore[arg-type]
                _above_zero(data["half_width_log"]),
                str(data["interval_from"]),
                int(data["num_samples"]),
            )
            if not ops[op].classes:
                raise ValueError("no classes")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ProfileError(
                f"$.fits.{op}: expected a fit as assay writes it, got a broken one ({error!r})"
            ) from error
    return CostModel(ops, Roofs(profile.roofs), dict(profile.package.get("kernels", {})), dict(profile.accuracy))


def _above_zero(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"expected a finite number above 0, got {value!r}")
    return number


def _gemm_from_json(op: str, row: Mapping[str, Any]) -> GemmClass:
    m = np.array([_above_zero(v) for v in row["m"]])
    utilisation = np.array([_above_zero(v) for v in row["compute_utilisation"]])
    if m.size == 0 or m.size != utilisation.size or np.any(np.diff(m) <= 0):
        raise ValueError(f"m: expected rising widths, one utilisation each, got {m.size} and {utilisation.size}")
    return GemmClass(
        variant=str(row["variant"]),
        threads=int(_above_zero(row["threads"])),
        group_size=int(row["group_size"]),
        symmetric=bool(row["symmetric"]),
        overhead_s=_above_zero(row["overhead_s"]),
        memory_utilisation=_above_zero(row["memory_utilisation"]),
        p=_above_zero(row["p"]),
        m=m,
        log_rows=np.maximum.accumulate(np.log(m / utilisation)),
        weight_bytes=_above_zero(row["weight_bytes"]),
        nk_low=_above_zero(row["n_times_k"][0]),
        nk_high=_above_zero(row["n_times_k"][1]),
        num_samples=int(row["num_samples"]),
    )


def _linear_from_json(op: str, row: Mapping[str, Any]) -> LinearClass:
    seconds = tuple(float(row["seconds_per"][term]) for term in LINEAR_TERMS[op] if term in row["seconds_per"])
    wanted = len(LINEAR_TERMS[op]) - (op == "chain_verify" and row["rule"] != "rejection")
    if len(seconds) != wanted or not all(math.isfinite(s) and s >= 0 for s in seconds) or not any(seconds):
        raise ValueError(f"seconds_per: expected {wanted} finite seconds, got {row['seconds_per']!r}")
    return LinearClass(
        variant=str(row["variant"]),
        threads=int(_above_zero(row["threads"])),
        rule=str(row["rule"]),
        seconds=seconds,
        ranges={str(k): (float(v[0]), float(v[1])) for k, v in row["ranges"].items()},
        num_samples=int(row["num_samples"]),
    )

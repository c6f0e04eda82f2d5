"""Robust least squares in numpy: Levenberg-Marquardt with priors, and exact non-negative sums of few columns.

Both weigh residuals after Cauchy, so that one disturbed sample does not move a fit.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

from assay.cost.roofline import FloatArray

CAUCHY = 2.385  # tuning constant of the Cauchy weight: 95% efficiency on Gaussian errors


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

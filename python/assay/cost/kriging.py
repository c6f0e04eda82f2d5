"""Local ordinary kriging: smooth interpolation of what a law leaves over, with a variance that grows away from data.

A residual ``r(x)`` is taken as a constant plus a Gaussian process with the exponential covariance ``exp(-|S (x - x')|)``
and a nugget; ``S`` is diagonal, one scale a feature. Each prediction solves the ordinary
kriging system of its nearest neighbours (Cressie, Statistics for Spatial Data, 1993, section 3.2; local neighbourhoods
as in Vecchia 1988). Far from all points it returns the neighbours' mean and the full variance.

A measurement that its neighbours contradict (a disturbed call, a choice of kernel that went wrong) counts as noisier: where
its leave-one-out residual (Dubrule, Mathematical Geology 15, 1983), over its standard deviation, is beyond ``caution``, its
noise grows until it is not. How much caution helps is chosen as the scales are.

Scales and nugget are chosen by the error on points whose whole group (a shape, a model) is hidden, by coordinate
descent over a few factors: nothing about the hidden group may help, or interpolation would look better than it is.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.cost.roofline import FloatArray, IntArray

NEIGHBOURS = 48
CANDIDATES = 400  # looked at again when scales are tried
SCALE_FACTORS = (0.1, 0.3, 0.6, 1.6, 3.0)  # never 0: what is off in one sample of points may matter in the next
FINE_FACTORS = (0.6, 1.6)  # of the second round
SEARCHED = 32  # neighbours while scales are tried
GAIN = 0.997  # a change of scale has to earn 0.3% of the loss
CAUTIONS = (3.0, 2.0, 1.5)  # standard deviations


@dataclass(frozen=True)
class Kriging:
    """Residuals at points, and how distance between points is measured."""

    features: FloatArray  # [n, d]
    residual: FloatArray  # [n]
    noise: FloatArray  # [n] relative measuring variance, added to the nugget
    scale: FloatArray  # [d]
    nugget: float
    sigma: float = 1.0  # of the process: typical leave-one-out residual over its kriging deviation
    caution: float = np.inf  # standard deviations beyond which a point counts as disturbed

    def predict(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Residual expected at ``features`` [m, d], and its kriging variance in units of the process variance."""
        mean, variance = np.empty(len(features)), np.empty(len(features))
        nearest = _nearest(self.features * self.scale, features * self.scale, NEIGHBOURS)
        for start in range(0, len(features), 500):
            part = slice(start, start + 500)
            mean[part], variance[part] = self.from_points(nearest[part], features[part])
        return mean, variance

    def from_points(self, near: IntArray, at: FloatArray) -> tuple[FloatArray, FloatArray]:
        """As `predict` at ``at`` [m, d], each from the points ``near`` [m, c] of this model alone."""
        covariance, values = self._system(near)
        to_query = np.exp(-np.sqrt((((self.features[near] - at[:, None]) * self.scale) ** 2).sum(axis=-1)))
        if self.caution < np.inf:
            left, precision = _left_out(covariance, values)
            beyond = np.abs(left) * np.sqrt(precision) / self.sigma / self.caution
            diagonal = np.arange(covariance.shape[1])
            covariance[:, diagonal, diagonal] += np.maximum(beyond**2 - 1.0, 0.0) / precision
        solved = np.linalg.solve(covariance, np.stack([values, np.ones_like(values), to_query], axis=-1))
        by_value, by_one, weight = solved[..., 0], solved[..., 1], solved[..., 2]
        total = by_one.sum(axis=1)
        mean = by_value.sum(axis=1) / total
        predicted = mean + (to_query * (by_value - mean[:, None] * by_one)).sum(axis=1)
        lagrange = (1.0 - weight.sum(axis=1)) ** 2 / total
        variance = np.maximum(1.0 - (to_query * weight).sum(axis=1) + lagrange, 0.0)
        return predicted, variance + self.nugget

    def _system(self, near: IntArray) -> tuple[FloatArray, FloatArray]:
        return _covariance(self.features[near] * self.scale, self.noise[near], self.nugget), self.residual[near]


def fit(
    features: FloatArray,
    residual: FloatArray,
    *,
    group: IntArray,
    scale: FloatArray,
    noise: FloatArray,
    rng: np.random.Generator,
    queries: int = 280,
    nugget: float = 0.015,
) -> Kriging:
    """Kriging with the scales that predict hidden groups best.

    Parameters
    ----------
    features, residual
        Points [n, d] and what the law leaves over there, in log time [n].
    group
        Points of one value are hidden together, [n] integers.
    scale
        Where the search starts, [d].
    noise
        Variance of each measurement relative to that of the residuals, [n].
    queries
        Hidden points looked at.
    """
    picked = rng.choice(len(residual), min(queries, len(residual)), replace=False)
    near = _nearest(features * scale, features[picked] * scale, CANDIDATES, group, group[picked])
    # Single precision is enough to compare scales; squares are kept by feature, for a trial changes one of them.
    points = features[near].astype(np.float32)
    apart = np.ascontiguousarray(np.moveaxis((points - features[picked, None].astype(np.float32)) ** 2, -1, 0))
    values, noises = residual[near].astype(np.float32), noise[near].astype(np.float32)
    rows = np.arange(len(picked))[:, None]

    def loss(scale: FloatArray, nugget: float) -> float:
        square = np.tensordot((scale**2).astype(np.float32), apart, 1)
        if square.shape[1] > SEARCHED:
            keep = np.argpartition(square, SEARCHED, axis=1)[:, :SEARCHED]
        else:
            keep = np.broadcast_to(np.arange(square.shape[1]), square.shape)
        x = points[rows, keep] * scale.astype(np.float32)
        covariance = _covariance(x, noises[rows, keep], nugget)
        held = values[rows, keep]
        solved = np.linalg.solve(covariance, np.stack([held, np.ones_like(held)], axis=-1))
        mean = solved[..., 0].sum(axis=1) / solved[..., 1].sum(axis=1)
        weight = np.exp(-np.sqrt(square[rows, keep]))
        mean = mean + (weight * (solved[..., 0] - mean[:, None] * solved[..., 1])).sum(axis=1)
        return _loss(mean.astype(np.float64) - residual[picked])

    best = loss(scale, nugget)
    for feature, factors in [(i, f) for f in (SCALE_FACTORS, FINE_FACTORS) for i in range(scale.size)]:
        base = scale[feature]
        for factor in factors:
            trial = scale.copy()
            trial[feature] = base * factor
            if trial.any() and (now := loss(trial, nugget)) < best * GAIN:
                best, scale = now, trial
    for factor in (0.5, 0.7, 1.5, 2.0):
        if (now := loss(scale * factor, nugget)) < best * GAIN:
            best, scale = now, scale * factor
            break
    for value in (0.004, 0.05, 0.2):
        if (now := loss(scale, value)) < best * GAIN:
            best, nugget = now, value
    return _cautious(Kriging(features, residual, noise, scale, nugget), group, picked)


def _cautious(model: Kriging, group: IntArray, picked: IntArray) -> Kriging:
    """The model with the caution that predicts hidden groups best; none where none helps."""
    near = _nearest(
        model.features * model.scale, model.features[picked] * model.scale, NEIGHBOURS, group, group[picked]
    )
    left, precision = _left_out(*model._system(near))
    sigma = max(float(np.median(np.abs(left) * np.sqrt(precision))) * 1.4826, 1e-6)

    def loss_at(caution: float) -> float:
        tried = replace(model, sigma=sigma, caution=caution)
        return _loss(tried.from_points(near, model.features[picked])[0] - model.residual[picked])

    chosen, best = np.inf, loss_at(np.inf)
    for caution in CAUTIONS:
        if (now := loss_at(caution)) < best * GAIN:
            chosen, best = caution, now
    return replace(model, sigma=sigma, caution=chosen)


def hidden(model: Kriging, group: IntArray, picked: IntArray) -> tuple[FloatArray, FloatArray]:
    """Prediction and variance at the model's own points ``picked``, each with its whole group hidden."""
    scaled = model.features * model.scale
    near = _nearest(scaled, scaled[picked], NEIGHBOURS, group, group[picked])
    return model.from_points(near, model.features[picked])


def _loss(error: FloatArray) -> float:
    size = np.abs(error)
    return float(np.median(size) + 0.3 * np.mean(np.minimum(size, 0.15)))


def _nearest(
    points: FloatArray,
    at: FloatArray,
    count: int,
    group: IntArray | None = None,
    at_group: IntArray | None = None,
) -> IntArray:
    """Indices [m, count] of the points nearest to each of ``at``, none of its own group."""
    count = min(count, len(points) - 1)
    if count < 1:
        return np.zeros((len(at), 1), dtype=np.int64)
    x, y = points.astype(np.float32), at.astype(np.float32)
    norm = (x * x).sum(axis=1)
    found = np.empty((len(y), count), dtype=np.int64)
    for start in range(0, len(y), 256):
        part = slice(start, start + 256)
        distance = norm - 2.0 * (y[part] @ x.T)
        if group is not None and at_group is not None:
            distance[at_group[part, None] == group] = np.inf
        found[part] = np.argpartition(distance, count, axis=1)[:, :count]
    return found


def _covariance(x: npt.NDArray[Any], noise: npt.NDArray[Any], nugget: float) -> npt.NDArray[Any]:
    """Covariances [m, c, c] of scaled points ``x`` [m, c, d], in their precision."""
    norm = (x * x).sum(axis=-1)
    square = norm[:, :, None] + norm[:, None, :] - 2.0 * (x @ x.transpose(0, 2, 1))
    covariance: npt.NDArray[Any] = np.exp(-np.sqrt(np.maximum(square, 0.0)))
    diagonal = np.arange(covariance.shape[1])
    covariance[:, diagonal, diagonal] = 1.0 + nugget + noise
    return covariance


def _left_out(covariance: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Residual of each value against ordinary kriging from the others [m, c], and one over its kriging variance."""
    inverse = np.linalg.inv(covariance)
    one = inverse.sum(axis=2)
    share = one / one.sum(axis=1)[:, None]
    precision = np.einsum("mii->mi", inverse) - one * share
    pulled = (inverse @ values[..., None])[..., 0]
    precision = np.maximum(precision, 1e-12)
    return (pulled - one * (share * values).sum(axis=1)[:, None]) / precision, precision

"""Local ordinary kriging: smooth interpolation of what a law leaves over, with a variance that grows away from data.

A residual ``r(x)`` is taken as a constant plus a Gaussian process with the exponential covariance ``exp(-|S (x - x')|)``
and a nugget; ``S`` is diagonal, one scale a feature. Each prediction uses the ordinary
kriging system of near points (Cressie, Statistics for Spatial Data, 1993, section 3.2; local neighbourhoods
as in Vecchia 1988). Far from all points it returns the neighbours' mean and the full variance.

Predictions share those systems: a k-d tree over the points cuts space into cells, and all queries in a cell use the points
nearest to its centre, whose covariances are inverted once. So many predictions are a few matrix products a cell.

A measurement that its neighbours contradict (a disturbed call, a choice of kernel that went wrong) counts as noisier: where
its leave-one-out residual (Dubrule, Mathematical Geology 15, 1983), over its standard deviation, is beyond ``caution``, its
noise grows until it is not. How much caution helps is chosen as the scales are.

Scales and nugget are chosen by the error on points whose whole group (a shape, a model) is hidden, by coordinate
descent over a few factors: nothing about the hidden group may help, or interpolation would look better than it is.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.cost.roofline import FloatArray, IntArray

NEIGHBOURS = 48
CANDIDATES = 400  # looked at again when scales are tried
SCALE_FACTORS = (0.1, 0.3, 0.6, 1.6, 3.0)  # never 0: what is off in one sample of points may matter in the next
FINE_FACTORS = (0.6, 1.6)  # of the second round
SEARCHED = 32  # neighbours while scales are tried
CELL_POINTS = 24  # at most, in a cell of the tree
CELL_NEIGHBOURS = 128  # of a cell's centre: they surround its cell, so that errors are those of 48 around each query
GAIN = 0.997  # a change of scale has to earn 0.3% of the loss
DOUBTED = 600  # hidden points that caution is chosen on
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

    @cached_property
    def cells(self) -> "Cells":
        """The kriging systems that predictions share."""
        return Cells(self)

    def predict(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Residual expected at ``features`` [m, d], and its kriging variance in units of the process variance."""
        return self.cells.predict(features)

    def predict_few(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        """As `predict`, each query from the points nearest to itself: no cells to cut, and less work for some dozen queries."""
        return self.from_points(_nearest(self.features * self.scale, features * self.scale, NEIGHBOURS), features)

    def from_points(self, near: IntArray, at: FloatArray) -> tuple[FloatArray, FloatArray]:
        """As `predict` at ``at`` [m, d], each from the points ``near`` [m, c] of this model alone."""
        covariance, values = self.system(near)
        to_query = np.exp(-np.sqrt((((self.features[near] - at[:, None]) * self.scale) ** 2).sum(axis=-1)))
        solved = np.linalg.solve(covariance, np.stack([values, np.ones_like(values), to_query], axis=-1))
        by_value, by_one, weight = solved[..., 0], solved[..., 1], solved[..., 2]
        total = by_one.sum(axis=1)
        mean = by_value.sum(axis=1) / total
        predicted = mean + (to_query * (by_value - mean[:, None] * by_one)).sum(axis=1)
        lagrange = (1.0 - weight.sum(axis=1)) ** 2 / total
        variance = np.maximum(1.0 - (to_query * weight).sum(axis=1) + lagrange, 0.0)
        return predicted, variance + self.nugget

    def system(self, near: IntArray) -> tuple[FloatArray, FloatArray]:
        """Covariances [m, c, c] of the points ``near`` [m, c], those doubted with more noise; and their residuals [m, c]."""
        covariance, values = (
            _covariance(self.features[near] * self.scale, self.noise[near], self.nugget),
            self.residual[near],
        )
        if self.caution < np.inf:
            left, precision = _left_out(covariance, values)
            beyond = np.abs(left) * np.sqrt(precision) / self.sigma / self.caution
            diagonal = np.arange(covariance.shape[1])
            covariance[:, diagonal, diagonal] += np.maximum(beyond**2 - 1.0, 0.0) / precision
        return covariance, values


@dataclass(frozen=True)
class _System:
    """Kriging system of one cell, in single precision: its points relative to the cell's centre, and what is solved once."""

    points: npt.NDArray[np.float32]  # [c, d], scaled
    norm: npt.NDArray[np.float32]  # [c] squares of their lengths
    inverse: npt.NDArray[np.float32]  # [c, c] of the covariances
    weight: npt.NDArray[np.float32]  # [c] inverse (residual - mean)
    ones: npt.NDArray[np.float32]  # [c] inverse 1
    mean: float
    total: float  # 1' inverse 1

    def predict(self, apart: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Means and variances (without the nugget) at ``apart`` [m, d] from the centre."""
        square = apart @ (-2.0 * self.points.T)
        square += self.norm
        square += np.einsum("ij,ij->i", apart, apart)[:, None]
        covariance = np.exp(-np.sqrt(np.maximum(square, 0.0, out=square), out=square))
        lagrange = (1.0 - covariance @ self.ones) ** 2 / np.float32(self.total)
        known = np.einsum("ij,ij->i", covariance @ self.inverse, covariance)
        return self.mean + covariance @ self.weight, 1.0 - known + lagrange


class Cells:
    """Cells of a `Kriging`, cut at the widest gap near the median of the longest side until few points are in each.

    A query's cell is found by comparisons in double precision, so it does not depend on the queries beside it. Systems are
    solved when a cell is first asked for, and kept: ``4 CELL_NEIGHBOURS^2`` bytes each, some 3 KB for each point when all are.
    """

    def __init__(self, model: Kriging) -> None:
        self.model = model
        self.on = model.scale > 0
        self.points = model.features[:, self.on] * model.scale[self.on]
        self.systems: dict[int, _System] = {}
        side: list[int] = []
        cut: list[float] = []
        below: list[int] = []
        cell: list[int] = []
        centres: list[FloatArray] = []
        left = [np.arange(len(self.points))]  # nodes in the order of their numbers: children are appended in pairs
        for at in left:
            inside = self.points[at]
            span = np.ptp(inside, axis=0) if inside.size else np.zeros(1)
            longest = int(span.argmax())
            side.append(longest)
            if len(at) <= CELL_POINTS or span[longest] == 0.0:
                cut.append(0.0)
                below.append(-1)
                cell.append(len(centres))
                centres.append(inside.mean(axis=0))
                continue
            values = inside[:, longest]
            cut.append(_gap(values))
            below.append(len(left))
            cell.append(-1)
            left += [at[values < cut[-1]], at[values >= cut[-1]]]
        self.side, self.cut, self.below, self.cell = (np.array(a) for a in (side, cut, below, cell))
        self.centres = np.array(centres)

    def predict(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        """As `Kriging.predict`."""
        at = features[:, self.on] * self.model.scale[self.on]
        cell = self._cell(at)
        order = np.argsort(cell, kind="stable")
        asked, first = np.unique(cell[order], return_index=True)
        self._solve([int(c) for c in asked if int(c) not in self.systems])
        apart = (at - self.centres[cell])[order].astype(np.float32)
        mean, variance = np.empty(len(at)), np.empty(len(at))
        for c, start, stop in zip(asked.tolist(), first, np.append(first[1:], len(at)), strict=True):
            here = order[start:stop]
            mean[here], variance[here] = self.systems[c].predict(apart[start:stop])
        return mean, np.maximum(variance, 0.0) + self.model.nugget

    def _cell(self, at: FloatArray) -> IntArray:
        node = np.zeros(len(at), dtype=np.int64)
        moving = np.flatnonzero(self.below[node] >= 0)
        while moving.size:
            here = node[moving]
            node[moving] = self.below[here] + (at[moving, self.side[here]] >= self.cut[here])
            moving = moving[self.below[node[moving]] >= 0]
        return self.cell[node]

    def _solve(self, cells: list[int]) -> None:
        model, centres = self.model, self.centres[cells]
        if len(self.points) > CELL_NEIGHBOURS:
            near = _nearest(self.points, centres, CELL_NEIGHBOURS)
        else:
            near = np.broadcast_to(np.arange(len(self.points)), (len(cells), len(self.points)))
        for c, i, centre in zip(cells, near, centres, strict=True):
            apart = self.points[i] - centre
            covariance, values = model.system(i[None])
            inverse = np.linalg.inv(covariance[0])
            ones = inverse.sum(axis=1)
            by_value = inverse @ values[0]
            mean, total = float(by_value.sum() / ones.sum()), float(ones.sum())
            points = apart.astype(np.float32)
            self.systems[c] = _System(
                points,
                np.einsum("ij,ij->i", points, points),
                inverse.astype(np.float32),
                (by_value - mean * ones).astype(np.float32),
                ones.astype(np.float32),
                mean,
                total,
            )


def _gap(values: FloatArray) -> float:
    """Where to cut values that differ: in the widest gap of the middle half, else in the widest of all."""
    rising = np.sort(values)
    quarter = rising.size // 4
    for middle in (rising[quarter : rising.size - quarter], rising):
        gaps = np.diff(middle)
        widest = int(gaps.argmax())
        cut = float(middle[widest] + gaps[widest] / 2.0)
        if middle[widest] < cut <= middle[widest + 1]:
            return cut
    return float(rising[-1])


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
    # Other points than the scales were found on: those would say that nothing need be doubted.
    rest = np.setdiff1d(np.arange(len(residual)), picked)
    if rest.size < picked.size:
        rest = picked
    fresh = rng.choice(rest, min(DOUBTED, rest.size), replace=False)
    return _cautious(Kriging(features, residual, noise, scale, nugget), group, fresh)


def _cautious(model: Kriging, group: IntArray, picked: IntArray) -> Kriging:
    """The model with the caution that predicts hidden groups best; none where none helps."""
    near = _nearest(
        model.features * model.scale, model.features[picked] * model.scale, NEIGHBOURS, group, group[picked]
    )
    left, precision = _left_out(*model.system(near))
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

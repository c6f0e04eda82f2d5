"""Round to nearest with the float16 scale (and zero point) of least squared error, group by group.

The candidates of a group are shrunk and stretched versions of the scale that rounding to nearest takes: a smaller scale
clips the largest weights and rounds the others finer. The best one is then polished by least squares: for fixed codes t
the best scale is sum(x t) / sum(t t), tried with its float16 neighbours. llama.cpp's quantisers search likewise
(make_qx_quants in https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c); here the error is that of the scale
as float16 holds it. Rounding to nearest is the first candidate, so no group comes out worse than with it.
"""

import numpy as np

from ..reference import pack_nibbles

#: Elements handled at a time: the temporaries of an evaluation stay within a second-level cache.
_CHUNK = 1 << 15

#: Factors on the scale of rounding to nearest.
_SHRINK = (0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 1.05, 1.1)
#: Further ones where columns weigh differently: an outlier that hardly counts may be clipped hard.
_SHRINK_WEIGHTED = (0.6, 0.5, 0.4, 0.3, 0.2)
#: For a scale of the other sign, the widest weight at code 7 instead of -8: 8/7 and less.
_FLIPPED = (8 / 7, 1.1, 1.05, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75)
_POLISH_ROUNDS = 2


class _Search:
    """The best scale and zero point so far of `x` [R, group_size] float32, with their weighted squared errors [R]."""

    def __init__(self, x: np.ndarray, importance: np.ndarray | None, symmetric: bool) -> None:
        self.x, self.importance, self.symmetric = x, importance, symmetric
        self.steps, self.weighted = np.empty_like(x), np.empty_like(x)
        self.scale = np.zeros(len(x), np.float16)
        self.zero = np.full(len(x), 8, np.uint8)
        self.error = np.full(len(x), np.inf, np.float32)

    def _codes(self, scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes less the zero point (in a buffer that the next call overwrites), and the scale as float32 [R, 1]."""
        step = scale.astype(np.float32)[:, None]
        t, least = self.steps, -zero.astype(np.float32)[:, None]
        np.divide(self.x, np.where(step == 0, np.float32(1), step), out=t)
        np.rint(t, out=t)
        np.maximum(t, least, out=t)
        np.minimum(t, least + np.float32(15), out=t)
        return t, step

    def _dot(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if self.importance is not None:
            x = np.multiply(x, self.importance, out=self.weighted)  # an einsum of three takes several times as long
        return np.einsum("rg,rg->r", x, y)

    def offer(self, wanted: np.ndarray, zero: np.ndarray) -> None:
        """Takes scales [R] (rounded to float16) and zero points uint8 [R] where they beat the best so far."""
        scale = wanted.astype(np.float16)
        scale = np.where(np.isfinite(scale), scale, np.float16(0))
        t, step = self._codes(scale, zero)
        t *= step
        t -= self.x
        error = self._dot(t, t)
        better = error < self.error
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)
        self.error = np.where(better, error, self.error)

    def polish(self) -> None:
        """Offers the least-squares scale of the best codes, and its float16 neighbours."""
        t, _ = self._codes(self.scale, self.zero)
        below = self._dot(t, t)
        fit = np.where(below > 0, self._dot(self.x, t) / np.where(below > 0, below, np.float32(1)), np.float32(0))
        middle = fit.astype(np.float16)
        for scale in (middle, np.nextafter(middle, np.float16(np.inf)), np.nextafter(middle, np.float16(-np.inf))):
            self.offer(scale, self.zero)


def _search_symmetric(s: _Search) -> None:
    widest = np.take_along_axis(s.x, np.abs(s.x).argmax(-1)[:, None], -1)[:, 0]
    base = widest / np.float32(-8)
    s.offer(base, s.zero)
    for factor in _SHRINK + (_SHRINK_WEIGHTED if s.importance is not None else ()):
        s.offer(base * np.float32(factor), s.zero)
    for factor in _FLIPPED:
        s.offer(base * np.float32(-factor), s.zero)


def _search_asymmetric(s: _Search) -> None:
    low, high = np.minimum(s.x.min(-1), 0), np.maximum(s.x.max(-1), 0)
    base = (high - low) / np.float32(15)
    half = base.astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / np.where(half == 0, np.float32(1), half)), 0, 15).astype(np.uint8)
    s.offer(base, zero)
    centre = (high + low) / np.float32(2)
    for factor in (1.0, *_SHRINK) + (_SHRINK_WEIGHTED if s.importance is not None else ()):
        step = base * np.float32(factor)
        middle = np.rint(np.float32(7.5) - centre / np.where(step == 0, np.float32(1), step))
        for shift in (-1, 0, 1):  # the clipping need not be even on both sides
            s.offer(step, np.clip(middle + shift, 0, 15).astype(np.uint8))


def best_scales(
    groups: np.ndarray, symmetric: bool, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale and zero point of least squared error for each group.

    Parameters
    ----------
    groups : float32 [R, group_size]
        Finite.
    symmetric : bool
        Zero point 8 throughout; the scale may have either sign.
    importance : float32 [R, group_size], optional
        Non-negative weight of each squared error; without it all count the same.

    Returns
    -------
    scales : float16 [R]
    zeros : uint8 [R]
        0..15
    errors : float32 [R]
        The weighted squared error that is left.
    """
    rows, size = groups.shape
    scales, zeros = np.empty(rows, np.float16), np.empty(rows, np.uint8)
    errors = np.empty(rows, np.float32)
    step = max(1, _CHUNK // size)
    with np.errstate(over="ignore", under="ignore"):  # float16 candidates beyond its range are never the best
        for at in range(0, rows, step):
            part = slice(at, at + step)
            search = _Search(
                np.ascontiguousarray(groups[part]), None if importance is None else importance[part], symmetric
            )
            (_search_symmetric if symmetric else _search_asymmetric)(search)
            for _ in range(_POLISH_ROUNDS):
                search.polish()
            scales[part], zeros[part], errors[part] = search.scale, search.zero, search.error
    return scales, zeros, errors


def codes_for(x: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Nearest codes 0..15 (float32, of the shape of `x`) for scales and zero points that broadcast against it."""
    step = scales.astype(np.float32)
    zero = zeros.astype(np.float32)
    t = np.rint(x / np.where(step == 0, np.float32(1), step))
    t += zero
    np.maximum(t, np.float32(0), out=t)
    return np.minimum(t, np.float32(15), out=t)


def quantize_mse(
    w: np.ndarray, group_size: int, symmetric: bool, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """INT4 weights of least squared error a group.

    Parameters
    ----------
    w : float32 [N, K]
        Finite; K a multiple of `group_size`.
    importance : float32 [K], optional
        Non-negative weight of each column's squared error, such as the mean square of its activations.

    Returns
    -------
    qweight : uint8 [N, ceil(K/2)]
    scales : float16 [N, K / group_size]
    zeros : uint8 [N, K / group_size] or None
    """
    n, k = w.shape
    grid = (n, k // group_size)
    groups = w.reshape(-1, group_size)
    weight = None
    if importance is not None:
        weight = np.broadcast_to(importance.reshape(1, grid[1], group_size), (n, grid[1], group_size))
        weight = weight.reshape(-1, group_size)
    scales, zeros, _ = best_scales(groups, symmetric, weight)
    q = codes_for(groups, scales[:, None], zeros[:, None]).astype(np.uint8)
    return pack_nibbles(q.reshape(n, k)), scales.reshape(grid), None if symmetric else zeros.reshape(grid)

"""GPTQ: rounds a column at a time and spreads its error over the columns still to come.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. With H = A^T A of calibration activations A and U the upper Cholesky factor of its
inverse (H^-1 = U^T U), rounding column i to q leaves the error e = (w_i - q) / U_ii, and w_j -= e U_ij for j > i makes
the output's squared error least among all weights that are still free.
"""

from itertools import pairwise

import numpy as np

from ..reference import pack_nibbles
from .search import best_scales, codes_for

#: Columns whose updates are applied at once, as one matrix product, to all columns after them.
_BLOCK = 128
#: Weights handled at a time; rows do not depend on each other.
_CHUNK = 1 << 22
_MAX_DAMPING = 1.0


def inverse_factor(hessian: np.ndarray, percdamp: float) -> np.ndarray:
    """Upper triangular U with H^-1 = U^T U, float64 [K, K], of the damped Hessian.

    ``percdamp`` times the mean of the diagonal is added to the diagonal, ten times more at each failure: a Hessian of
    fewer activations than columns is singular. A column that no activation ever touched gets the mean of the diagonal
    (its weights are then rounded to nearest), and neither receives nor spreads errors.

    Raises
    ------
    ValueError
        A Hessian that is not positive definite with a damping of 1 either.
    """
    h = hessian.astype(np.float64)
    diagonal = h.diagonal().copy()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not dead.all() else 1.0
    h[dead, :] = 0
    h[:, dead] = 0
    diagonal[dead] = mean
    damping = percdamp
    while True:
        np.fill_diagonal(h, diagonal + damping * mean)
        try:
            # With rows and columns reversed, the lower factor L of H becomes an upper R with H = R R^T: U is R^-1.
            upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
            return np.triu(np.linalg.inv(upper))
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-4)
            if damping > _MAX_DAMPING:
                raise ValueError(
                    "hessian: expected a positive semidefinite matrix, got one whose Cholesky factorisation fails"
                    f" with {_MAX_DAMPING:g} times the mean of its diagonal added"
                ) from None


def quantize_gptq(
    w: np.ndarray,
    hessian: np.ndarray,
    group_size: int,
    symmetric: bool,
    *,
    percdamp: float = 0.01,
    act_order: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """INT4 weights by GPTQ, scales by :func:`assay.quantize.best_scales`.

    Parameters
    ----------
    w : float32 [N, K]
        Finite; K a multiple of `group_size`.
    hessian : float [K, K]
        A^T A of activations A [T, K], times any factor.
    percdamp : float
        Share of the mean diagonal that is added to the diagonal.
    act_order : bool
        Columns in descending order of the Hessian's diagonal instead of first to last. Scales and zero points are then
        chosen beforehand from the weights as they came ("static groups"), so that groups stay runs along K and no
        g_idx is needed. Otherwise they are chosen when a group's turn comes, from its corrected weights.

    Returns
    -------
    qweight : uint8 [N, ceil(K/2)]
    scales : float16 [N, K / group_size]
    zeros : uint8 [N, K / group_size] or None

    Raises
    ------
    ValueError
        A Hessian that cannot be factored.
    """
    n, k = w.shape
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else np.arange(k)
    factor = inverse_factor(hessian[np.ix_(order, order)], percdamp).astype(np.float32)
    weight = np.maximum(hessian.diagonal(), 0).astype(np.float64)
    importance = (weight / weight.mean() if weight.any() else np.ones(k)).astype(np.float32)
    grid = (n, k // group_size)
    qweight, scales = np.empty((n, (k + 1) // 2), np.uint8), np.empty(grid, np.float16)
    zeros = np.full(grid, 8, np.uint8)
    rows = max(1, _CHUNK // k)
    for at in range(0, n, rows):
        part = slice(at, at + rows)
        state = _Rows(w[part], factor, order, importance.reshape(-1, group_size), symmetric)
        if act_order:
            state.static_groups()
        state.run(static=act_order)
        qweight[part] = pack_nibbles(state.codes.T)
        scales[part], zeros[part] = state.scales.T, state.zeros.T
    return qweight, scales, None if symmetric else zeros


class _Rows:
    """Some rows of W on their way. Transposed, so that a column of W is contiguous; rows of `left` are in `order`."""

    def __init__(
        self, w: np.ndarray, factor: np.ndarray, order: np.ndarray, importance: np.ndarray, symmetric: bool
    ) -> None:
        n, k = w.shape
        groups, self.group_size = importance.shape
        self.w, self.factor, self.order, self.importance, self.symmetric = w, factor, order, importance, symmetric
        self.left = np.ascontiguousarray(w.T[order], np.float32)
        self.codes = np.empty((k, n), np.uint8)
        self.scales = np.empty((groups, n), np.float16)
        self.zeros = np.full((groups, n), 8, np.uint8)

    def _choose(self, g: int, weights: np.ndarray) -> None:
        """Scale and zero point of group g from weights [N, group_size]."""
        importance = np.broadcast_to(self.importance[g], weights.shape)
        scale, zero, _ = best_scales(weights, self.symmetric, importance)
        self.scales[g], self.zeros[g] = scale, zero

    def static_groups(self) -> None:
        for g in range(len(self.scales)):
            self._choose(g, self.w[:, g * self.group_size : (g + 1) * self.group_size])

    def run(self, static: bool) -> None:
        k = len(self.left)
        # Blocks end where groups do: a group's scale is chosen from weights corrected for all columns before it.
        span = self.group_size if self.group_size > _BLOCK else _BLOCK // self.group_size * self.group_size
        starts = [start for group in range(0, k, span) for start in range(group, min(group + span, k), _BLOCK)]
        for start, end in pairwise([*starts, k]):
            errors = self._block(start, end, static)
            if end < k:
                self.left[end:] -= self.factor[start:end, end:].T @ errors

    def _block(self, start: int, end: int, static: bool) -> np.ndarray:
        """Rounds columns start..end, corrects those within, and gives the errors [end - start, N] for those after."""
        errors = np.empty((end - start, self.left.shape[1]), np.float32)
        for i in range(start, end):
            column = int(self.order[i])
            g = column // self.group_size
            if not static and i % self.group_size == 0:
                self._choose(g, np.ascontiguousarray(self.left[i : i + self.group_size].T))
            x = self.left[i]
            q = codes_for(x, self.scales[g], self.zeros[g])
            self.codes[column] = q
            off = x - (q - self.zeros[g].astype(np.float32)) * self.scales[g].astype(np.float32)
            off /= self.factor[i, i]
            errors[i - start] = off
            self.left[i + 1 : end] -= self.factor[i, i + 1 : end, None] * off
        return errors

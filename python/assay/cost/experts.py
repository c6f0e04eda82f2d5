"""How many distinct experts a step touches: the bytes that a mixture of experts has to read.

E experts, k chosen per token, T tokens in the step. Every function keeps ``k <= U <= min(E, k T)``.
"""

import numpy as np
import numpy.typing as npt

from assay.cost.roofline import FloatArray

# Consecutive tokens of one request choose alike: w of them touch what w^0.73 independent tokens would. Fitted on
# Qwen3.6-35B-A3B (0.693 to 0.747 by data set), checked on DeepSeek-V4-Flash (0.694 to 0.772), for w = 2..16, from the
# routing captures of Doubleword/specdec-calibration. Coarse mixtures (Mixtral) were not measured.
WITHIN_REQUEST_EXPONENT = 0.73


def _check(num_experts: int, top_k: int) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to num_experts ({num_experts}), got {top_k}")


def _at_least_one(values: npt.ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if not np.all(np.isfinite(array)) or np.any(array < 1):
        raise ValueError(f"{name}: expected finite numbers of at least 1, got {values!r}")
    return array


def _popularity(popularity: npt.ArrayLike) -> tuple[FloatArray, float]:
    p = np.asarray(popularity, dtype=np.float64)
    if p.ndim != 1 or p.size == 0 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("popularity: expected a vector of probabilities P(token uses expert), got something else")
    total = float(p.sum())
    if total < 1 - 1e-9:
        raise ValueError(f"popularity: expected a sum of k >= 1 experts per token, got {total}")
    return p, total


def _bounded(touched: npt.ArrayLike, per_token: float, num_experts: int, tokens: FloatArray) -> FloatArray:
    # The closed forms obey the bounds; rounding may miss them by an ulp.
    return np.clip(touched, per_token, np.minimum(float(num_experts), per_token * tokens))


def uniform(num_experts: int, top_k: int, tokens: npt.ArrayLike) -> FloatArray:
    """``E (1 - (1 - k/E)^T)``: independent tokens, equally popular experts, top-k without replacement (exact)."""
    _check(num_experts, top_k)
    t = _at_least_one(tokens, "tokens")
    return _bounded(num_experts * (1.0 - (1.0 - top_k / num_experts) ** t), top_k, num_experts, t)


def skewed(popularity: npt.ArrayLike, tokens: npt.ArrayLike) -> FloatArray:
    """``sum_e (1 - (1 - p_e)^T)``: independent tokens, ``p_e = P(token uses e)``, which sum to k."""
    p, per_token = _popularity(popularity)
    t = _at_least_one(tokens, "tokens")
    touched = (1.0 - (1.0 - p) ** t[..., None]).sum(axis=-1)
    return _bounded(touched, per_token, p.size, t)


def power_law_popularity(num_experts: int, top_k: int, alpha: float) -> FloatArray:
    """Popularities ``p_e`` proportional to ``rank^-alpha``, summing to k, none above 1 (the excess is spread on)."""
    _check(num_experts, top_k)
    if not np.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha: expected a finite number of at least 0, got {alpha}")
    weight = np.arange(1, num_experts + 1, dtype=np.float64) ** -alpha
    full = 0  # how many of the most popular experts are used by every token
    while True:
        rest = weight[full:] * ((top_k - full) / weight[full:].sum())
        if rest.size == 0 or rest[0] <= 1.0:
            return np.concatenate([np.ones(full), rest])
        full += 1


def within_request(
    num_experts: int, top_k: int, width: npt.ArrayLike, exponent: float = WITHIN_REQUEST_EXPONENT
) -> FloatArray:
    """``U(w^beta)``: w consecutive tokens of one request, as a verification of w - 1 drafts sees them."""
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent: expected 0 to 1, got {exponent}")
    w = _at_least_one(width, "width")
    return uniform(num_experts, top_k, w**exponent)


def batch_of_verifies(
    num_experts: int,
    top_k: int,
    batch: npt.ArrayLike,
    width: npt.ArrayLike,
    *,
    exponent: float = WITHIN_REQUEST_EXPONENT,
    popularity: npt.ArrayLike | None = None,
) -> FloatArray:
    """``sum_e (1 - (1 - min(1, p_e u_w / k))^B)``: B independent requests of w consecutive tokens each.

    ``popularity`` None means ``p_e = k/E``; ``batch`` and ``width`` broadcast.
    """
    _check(num_experts, top_k)
    b, w = np.broadcast_arrays(_at_least_one(batch, "batch"), _at_least_one(width, "width"))
    per_request = within_request(num_experts, top_k, w, exponent)
    if popularity is None:
        p, per_token = np.full(num_experts, top_k / num_experts), float(top_k)
    else:
        p, per_token = _popularity(popularity)
        if p.size != num_experts or abs(per_token - top_k) > 1e-6 * top_k:
            raise ValueError(
                f"popularity: expected {num_experts} values that sum to {top_k}, got {p.size}, {per_token}"
            )
    reach = np.minimum(1.0, p * (per_request[..., None] / per_token))
    touched = (1.0 - (1.0 - reach) ** b[..., None]).sum(axis=-1)
    return _bounded(touched, top_k, num_experts, b * w)


def tokens_per_expert(top_k: int, tokens: npt.ArrayLike, distinct: npt.ArrayLike) -> FloatArray:
    """Mean rows of a touched expert's matrix product: ``T k / U``, at least 1."""
    return np.maximum(1.0, np.asarray(tokens, dtype=np.float64) * top_k / np.asarray(distinct, dtype=np.float64))

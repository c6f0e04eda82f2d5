"""MoE routing."""

import numpy as np

from .rows import ROW_OK, row_status, softmax


def scores(row: np.ndarray, scoring: str) -> np.ndarray:
    """Score of every logit of one row, float64."""
    x = row.astype(np.float64)
    if scoring in ("softmax", "softmax_topk"):
        return softmax(row)
    if scoring == "sigmoid":
        return np.exp(-np.logaddexp(0, -x))
    return np.sqrt(np.logaddexp(0, x)) if scoring == "sqrtsoftplus" else x


def route_keys(
    row: np.ndarray, scoring: str, bias: np.ndarray | None, n_group: int, topk_group: int, top2: bool
) -> np.ndarray:
    """By what the experts of one row are chosen: the logit, or with a bias or groups the score plus bias, in float32."""
    if bias is None and n_group == 1:
        return row
    key = scores(row, scoring).astype(np.float32) + (np.float32(0) if bias is None else bias)
    key = np.where(row == -np.inf, -np.inf, key).astype(np.float32).reshape(n_group, -1)
    best = -np.sort(-key, axis=1)[:, : 2 if top2 else 1]
    worth = np.where(best == -np.inf, 0, best).sum(axis=1, dtype=np.float32)
    worth[(best == -np.inf).all(axis=1)] = -np.inf
    key[np.argsort(-worth, kind="stable")[topk_group:]] = -np.inf
    return key.reshape(-1)


def moe_route(
    logits: np.ndarray, top_k: int, renormalize: bool, scoring: str = "softmax", bias: np.ndarray | None = None,
    n_group: int = 1, topk_group: int = 1, top2: bool = False, scaling: float = 1.0, num_shared: int = 0,
    shared_weight: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Weights float32 [T, k + shared], ids int32 [T, k + shared] and status int32 [T] of logits [T, E].

    Ties go to the lower id; minus infinity is never chosen; what cannot be filled holds id -1 and weight 0.
    """
    experts = logits.shape[1]
    weights = np.zeros((len(logits), top_k + num_shared), np.float32)
    ids = np.full((len(logits), top_k + num_shared), -1, np.int32)
    status = np.array([row_status(row) for row in logits], np.int32)
    for t in np.flatnonzero(status == ROW_OK):
        key = route_keys(logits[t], scoring, bias, n_group, topk_group, top2)
        order = np.argsort(-key, kind="stable")[:top_k]
        order = order[key[order] > -np.inf]
        if renormalize and scoring in ("softmax", "softmax_topk"):
            w = softmax(logits[t][order]) if len(order) else np.zeros(0)
        else:
            w = scores(logits[t], scoring)[order]
            w = w / (w.sum() + 1e-20) if renormalize else w
        weights[t, : len(order)] = w * scaling
        ids[t, : len(order)] = order
        weights[t, top_k:] = shared_weight
        ids[t, top_k:] = np.arange(experts, experts + num_shared)
    return weights, ids, status

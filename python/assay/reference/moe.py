"""MoE routing."""

import numpy as np

from .rows import ROW_OK, row_status, softmax


def moe_route(logits: np.ndarray, top_k: int, renormalize: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights float32 [T, k], ids int32 [T, k] and status int32 [T] of logits [T, E]: softmax, then the k largest.

    Ties go to the lower id; minus infinity is never chosen; what cannot be filled holds id -1 and weight 0.
    """
    weights = np.zeros((len(logits), top_k), np.float32)
    ids = np.full((len(logits), top_k), -1, np.int32)
    status = np.array([row_status(row) for row in logits], np.int32)
    for t in np.flatnonzero(status == ROW_OK):
        row = logits[t]
        order = np.argsort(-row, kind="stable")[:top_k]
        order = order[row[order] > -np.inf]
        p = softmax(row)[order]
        weights[t, : len(order)] = p / p.sum() if renormalize else p
        ids[t, : len(order)] = order
    return weights, ids, status

"""Numba twin of moe_route, with the same bits as the C kernels (csrc/cpu/moe_route/moe_route.h)."""

import numpy as np
from numba import njit

from ._vexp import fold16, vexp

_BLOCK = 2048
_OK, _NAN, _EMPTY, _INF = 0, 1, 2, 3


def route(logits: np.ndarray, top_k: int, renormalize: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, ids and status of float32 logits [T, E]; the arguments are checked by :mod:`assay.ops.moe`."""
    tokens = len(logits)
    weights = np.empty((tokens, top_k), np.float32)
    ids = np.empty((tokens, top_k), np.int32)
    status = np.empty(tokens, np.int32)
    _route(np.ascontiguousarray(logits), renormalize, weights, ids, status)
    return weights, ids, status


@njit(cache=True)
def _sum(e):  # type: ignore[no-untyped-def]
    total = 0.0
    lane = np.empty(16, np.float32)
    for at in range(0, len(e), _BLOCK):
        lane[:] = 0
        for i in range(at, min(at + _BLOCK, len(e))):
            lane[i % 16] += e[i]
        total += np.float64(fold16(lane))
    return np.float32(total)


@njit(cache=True)
def _choose(row, w, ids):  # type: ignore[no-untyped-def]
    """The largest logits into w and their ids, sorted; how many there are, or -1 when a logit is NaN."""
    chosen = 0
    for e in range(len(row)):
        x = row[e]
        if np.isnan(x):
            return -1
        if x == -np.inf or (chosen == len(w) and not x > w[chosen - 1]):
            continue
        if chosen < len(w):
            chosen += 1
        j = chosen - 1
        while j > 0 and w[j - 1] < x:
            w[j] = w[j - 1]
            ids[j] = ids[j - 1]
            j -= 1
        w[j] = x
        ids[j] = e
    return chosen


@njit(cache=True)
def _route(logits, renormalize, weights, ids, status):  # type: ignore[no-untyped-def]
    tokens, experts = logits.shape
    all_e = np.empty(experts, np.float32)
    for t in range(tokens):
        w, id_ = weights[t], ids[t]
        chosen = _choose(logits[t], w, id_)
        if chosen < 0:
            status[t] = _NAN
        elif chosen == 0:
            status[t] = _EMPTY
        elif w[0] == np.inf:
            status[t] = _INF
        else:
            status[t] = _OK
        if status[t] != _OK:
            w[:] = 0
            id_[:] = -1
            continue
        largest = w[0]
        for j in range(len(w)):
            if j < chosen:
                w[j] = vexp(w[j] - largest)
            else:
                w[j] = 0
                id_[j] = -1
        if renormalize:
            total = _sum(w)
        else:
            for e in range(experts):
                all_e[e] = vexp(logits[t, e] - largest)
            total = _sum(all_e)
        for j in range(len(w)):
            w[j] /= total

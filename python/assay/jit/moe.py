"""Numba twin of moe_route, with the same bits as the C kernels (csrc/cpu/moe_route/)."""

import numpy as np
from numba import njit

from ._scores import sigmoid, softplus
from ._vexp import fold16, vexp

_BLOCK = 2048
_OK, _NAN, _EMPTY, _INF = 0, 1, 2, 3
_SOFTMAX, _SIGMOID, _SQRTSOFTPLUS, _NONE = 0, 1, 2, 3
_SCORES = {"softmax": 0, "softmax_topk": 0, "sigmoid": 1, "sqrtsoftplus": 2, "none": 3}
_EPS = np.float32(1e-20)


def route(
    logits: np.ndarray, top_k: int, renormalize: bool, scoring: str, bias: np.ndarray | None, n_group: int,
    topk_group: int, top2: bool, scaling: float, num_shared: int, shared_weight: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Weights, ids and status of float32 logits [T, E]; the arguments are checked by :mod:`assay.ops.moe`."""
    tokens, experts = logits.shape
    weights = np.empty((tokens, top_k + num_shared), np.float32)
    ids = np.empty((tokens, top_k + num_shared), np.int32)
    status = np.empty(tokens, np.int32)
    keyed = bias is not None or n_group > 1
    added = np.zeros(experts, np.float32) if bias is None else bias
    _route(
        np.ascontiguousarray(logits), renormalize, _SCORES[scoring], keyed, added, n_group, topk_group, top2,
        np.float32(scaling), weights[:, :top_k], ids[:, :top_k], status,
    )  # fmt: skip
    routed = (status == _OK)[:, None]
    weights[:, top_k:] = np.where(routed, np.float32(shared_weight), np.float32(0))
    ids[:, top_k:] = np.where(routed, np.arange(experts, experts + num_shared), -1)
    return weights, ids, status


@njit(cache=True)
def _sum(e):  # type: ignore[no-untyped-def]
    total = 0.0
    lane = np.empty(16, np.float32)
    for at in range(0, len(e), _BLOCK):
        lane[:] = 0
        for i in range(at, min(at + _BLOCK, len(e))):
            lane[(i - at) % 16] += e[i]
        total += np.float64(fold16(lane))
    return np.float32(total)


@njit(cache=True)
def _choose(row, w, ids):  # type: ignore[no-untyped-def]
    """The largest keys into w and their ids, sorted; how many there are, or -1 when a key is NaN."""
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
def _score(scoring, x):  # type: ignore[no-untyped-def]
    if scoring == _SIGMOID:
        return sigmoid(x)
    if scoring == _SQRTSOFTPLUS:
        return np.float32(np.sqrt(softplus(x)))
    return x


@njit(cache=True)
def _mask_groups(key, n_group, topk_group, top2):  # type: ignore[no-untyped-def]
    size = len(key) // n_group
    worth = np.empty(n_group, np.float32)
    for g in range(n_group):
        best = next_ = np.float32(-np.inf)
        for x in key[g * size : (g + 1) * size]:
            if x > best:
                next_ = best
                best = x
            elif x > next_:
                next_ = x
        worth[g] = best + next_ if top2 and next_ > -np.inf else best
    for g in range(n_group):
        better = 0
        for h in range(n_group):
            if worth[h] > worth[g] or (worth[h] == worth[g] and h < g):
                better += 1
        if better >= topk_group:
            key[g * size : (g + 1) * size] = -np.inf


@njit(cache=True)
def _keys(row, scoring, bias, n_group, topk_group, top2, largest, key):  # type: ignore[no-untyped-def]
    """Keys of a row's logits; returns the softmax's total."""
    total = np.float32(1)
    if scoring == _SOFTMAX:
        for i in range(len(row)):
            key[i] = vexp(row[i] - largest)
        total = _sum(key)
        for i in range(len(row)):
            key[i] /= total
    else:
        for i in range(len(row)):
            key[i] = _score(scoring, row[i])
    for i in range(len(row)):
        key[i] = np.float32(-np.inf) if row[i] == -np.inf else key[i] + bias[i]
    if n_group > 1:
        _mask_groups(key, n_group, topk_group, top2)
    return total


@njit(cache=True)
def _weigh(row, scoring, renormalize, scaling, largest, total, chosen, w, ids):  # type: ignore[no-untyped-def]
    for j in range(len(w)):
        if j >= chosen:
            ids[j] = -1
            w[j] = 0
        else:
            w[j] = row[ids[j]]
    if scoring == _SOFTMAX and renormalize:
        largest = np.float32(-np.inf)
        for j in range(chosen):
            largest = max(largest, w[j])
    for j in range(chosen):
        w[j] = vexp(w[j] - largest) if scoring == _SOFTMAX else _score(scoring, w[j])
    if renormalize:
        total = _sum(w)
        if scoring != _SOFTMAX:
            total += _EPS
    elif scoring != _SOFTMAX:
        total = np.float32(1)
    if chosen == 0:
        total = np.float32(1)
    for j in range(len(w)):
        w[j] = np.float32(w[j] / total) * scaling


@njit(cache=True)
def _route(  # type: ignore[no-untyped-def]
    logits, renormalize, scoring, keyed, bias, n_group, topk_group, top2, scaling, weights, ids, status
):
    tokens, experts = logits.shape
    key = np.empty(experts, np.float32)
    for t in range(tokens):
        row, w, id_ = logits[t], weights[t], ids[t]
        largest = np.float32(-np.inf)
        status[t] = _OK
        for x in row:
            largest = max(largest, x)
            if np.isnan(x):
                status[t] = _NAN
        if status[t] == _OK and abs(largest) == np.inf:
            status[t] = _INF if largest > 0 else _EMPTY
        if status[t] != _OK:
            w[:] = 0
            id_[:] = -1
            continue
        total = np.float32(0)
        if keyed:
            total = _keys(row, scoring, bias, n_group, topk_group, top2, largest, key)
            chosen = _choose(key, w, id_)
        else:
            chosen = _choose(row, w, id_)
            if scoring == _SOFTMAX and not renormalize:
                for e in range(experts):
                    key[e] = vexp(row[e] - largest)
                total = _sum(key)
        _weigh(row, scoring, renormalize, scaling, largest, total, chosen, w, id_)

"""MoE routing for Numba's CUDA target: what csrc/cuda/moe_route.cuh does, to be read, and to run where no kernels are compiled
for a GPU.

A block a token, of sixteen threads: the sixteen lanes in which csrc/cpu/vexp.h sums, so that in Numba's simulator ids and weights
are those of C bit for bit; on a GPU the compiler may fuse a multiplication with an addition, which moves the last bit of a weight.
No warp instructions, which the simulator lacks: what threads tell each other goes through shared memory.
"""

import math
from typing import Any

import numpy as np
from numba import cuda, float32, int32

from .cuda_verify import fma, fold, logit_at, vexp

#: Most experts.
MOST = 2048
_LANES = 16
_OK, _NAN, _EMPTY, _INF = range(4)
_SOFTMAX, _SIGMOID, _SQRTSOFTPLUS, _NONE = range(4)
_MINUS, _PLUS = np.float32(-np.inf), np.float32(np.inf)
_ZERO, _ONE, _TWO, _EPS = np.float32(0), np.float32(1), np.float32(2), np.float32(1e-20)
_C17, _C15, _C13, _C11, _C9, _C7, _C5, _C3 = (_ONE / np.float32(n) for n in (17, 15, 13, 11, 9, 7, 5, 3))


@cuda.jit(device=True)
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)), by csrc/cpu/scores.h's steps."""
    e = vexp(-abs(x))
    return (_ONE if x >= 0 else e) / (_ONE + e)


@cuda.jit(device=True)
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)), by csrc/cpu/scores.h's steps."""
    e = vexp(-abs(x))
    z = e / (_TWO + e)
    z2 = z * z
    p = fma(fma(fma(fma(_C17, z2, _C15), z2, _C13), z2, _C11), z2, _C9)
    p = fma(fma(fma(fma(p, z2, _C7), z2, _C5), z2, _C3), z2, _ONE)
    return (x if x > 0 else _ZERO) + _TWO * z * p


@cuda.jit(device=True)
def score(scoring, x):  # type: ignore[no-untyped-def]
    """The score of a logit; softmax and none: the logit itself."""
    if scoring == _SIGMOID:
        return sigmoid(x)
    if scoring == _SQRTSOFTPLUS:
        return np.float32(math.sqrt(softplus(x)))
    return x


@cuda.jit(device=True)
def worth_of(key, begin, size, top2):  # type: ignore[no-untyped-def]
    """How good a group of keys is: its largest, or its two largest together."""
    best = second = _MINUS
    for i in range(begin, begin + size):
        x = key[i]
        if x > best:
            best, second = x, best
        elif x > second:
            second = x
    return best + second if top2 and second > _MINUS else best


@cuda.jit
def route_rows(  # type: ignore[no-untyped-def]
    logits,
    dtype,
    scoring,
    renormalize,
    bias,
    biased,
    n_group,
    topk_group,
    top2,
    scaling,
    top_k,
    shared_weight,
    weights,
    ids,
    status,
):
    """Grid: tokens. Arguments as assay_route_args of csrc/assay.h."""
    t, lane = cuda.blockIdx.x, cuda.threadIdx.x
    # A line each: the simulator tells shared arrays apart by where they are made.
    key = cuda.shared.array(MOST, float32)
    worth = cuda.shared.array(MOST, float32)
    partial = cuda.shared.array(_LANES, float32)
    where = cuda.shared.array(_LANES, int32)
    experts, width = logits.shape[1], ids.shape[1]
    keyed = biased or n_group > 1

    largest = _MINUS
    for e in range(lane, experts, _LANES):
        x = logit_at(logits, dtype, t, e)
        key[e] = x
        if not math.isnan(largest) and (x > largest or math.isnan(x)):  # a NaN stays
            largest = x
    partial[lane] = largest
    cuda.syncthreads()
    for other in range(_LANES):
        x = partial[other]
        if not math.isnan(largest) and (x > largest or math.isnan(x)):
            largest = x
    found = _NAN if math.isnan(largest) else _INF if largest == _PLUS else _EMPTY if largest == _MINUS else _OK
    cuda.syncthreads()

    total = _ONE
    if scoring == _SOFTMAX and found == _OK and (keyed or not renormalize):
        partial[lane] = 0
        for e in range(lane, experts, _LANES):
            partial[lane] += vexp(key[e] - largest)
        cuda.syncthreads()
        total = fold(partial, 0)
        cuda.syncthreads()
    if keyed:
        where[lane] = _OK
        for e in range(lane, experts, _LANES):
            b = bias[e] if biased else _ZERO
            if math.isnan(b):
                where[lane] = _NAN
            elif b == _PLUS and where[lane] == _OK:
                where[lane] = _INF
            if found == _OK and key[e] > _MINUS:
                key[e] = (vexp(key[e] - largest) / total if scoring == _SOFTMAX else score(scoring, key[e])) + b
        cuda.syncthreads()
        for other in range(_LANES):  # a bias that is none; NaN before infinity
            if found == _OK or (found == _INF and largest < _PLUS and where[other] == _NAN):
                found = where[other]
        cuda.syncthreads()
    if n_group > 1:
        size = experts // n_group
        for g in range(lane, n_group, _LANES):
            worth[g] = worth_of(key, g * size, size, top2)
        cuda.syncthreads()
        for g in range(lane, n_group, _LANES):
            better = 0
            for h in range(n_group):
                if worth[h] > worth[g] or (worth[h] == worth[g] and h < g):
                    better += 1
            if better >= topk_group:
                for i in range(g * size, (g + 1) * size):
                    key[i] = _MINUS
        cuda.syncthreads()

    chosen = 0
    for j in range(top_k if found == _OK else 0):
        best, at = _MINUS, experts
        for e in range(lane, experts, _LANES):
            if key[e] > best:
                best, at = key[e], e
        partial[lane], where[lane] = best, at
        cuda.syncthreads()
        for other in range(_LANES):
            if partial[other] > best or (partial[other] == best and where[other] < at):
                best, at = partial[other], where[other]
        cuda.syncthreads()
        if lane == 0:
            ids[t, j] = at if best > _MINUS else -1
        if best > _MINUS:
            chosen += 1
            if lane == 0:
                key[at] = _MINUS
        cuda.syncthreads()

    if scoring == _SOFTMAX and renormalize and keyed:
        largest = _MINUS
        for j in range(chosen):
            largest = max(largest, logit_at(logits, dtype, t, ids[t, j]))
    partial[lane] = 0
    for j in range(lane, chosen, _LANES):
        x = logit_at(logits, dtype, t, ids[t, j])
        w = vexp(x - largest) if scoring == _SOFTMAX else score(scoring, x)
        weights[t, j] = w
        partial[lane] += w
    cuda.syncthreads()
    if renormalize:
        total = fold(partial, 0) + (_ZERO if scoring == _SOFTMAX else _EPS)
    elif scoring != _SOFTMAX:
        total = _ONE
    for j in range(lane, width, _LANES):
        if found != _OK or chosen <= j < top_k:
            ids[t, j], weights[t, j] = -1, 0
        elif j < top_k:
            weights[t, j] = np.float32(weights[t, j] / total) * scaling
        else:
            ids[t, j], weights[t, j] = experts + j - top_k, shared_weight
    if lane == 0:
        status[t] = found


def route(logits: Any, dtype: int, scoring: int, renormalize: bool, bias: Any, n_group: int, topk_group: int, top2: bool,
          scaling: float, top_k: int, shared_weight: float, weights: Any, ids: Any, status: Any, stream: Any = 0) -> None:  # fmt: skip
    """Routes logits [T, E], E at most `MOST`; arrays are Numba's device arrays, or in the simulator numpy's.

    logits: float32 (dtype 0), or the bits of float16 (1) or bfloat16 (2) as uint16. The rest as assay_route_args of csrc/assay.h;
    top_k is ids' second dimension less the shared experts.
    """
    if not len(logits):
        return
    biased = bias is not None
    if not biased:
        bias = cuda.device_array((1,), np.float32, stream=stream)
    route_rows[len(logits), _LANES, stream](
        logits, dtype, scoring, renormalize, bias, biased, n_group, topk_group, top2, np.float32(scaling), top_k,
        np.float32(shared_weight), weights, ids, status,
    )  # fmt: skip

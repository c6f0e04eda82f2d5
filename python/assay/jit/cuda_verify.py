"""Chain verification for Numba's CUDA target: what csrc/cuda/chain_verify.cuh does, to be read, and to run where no kernels are
compiled for a GPU.

Rules greedy, sampled and rejection (dense or one-hot drafts), with temperature. Sixteen threads a block are the sixteen lanes in
which csrc/cpu/vexp.h adds up a block of 2048 logits. In Numba's simulator the tokens are those of C; on a GPU the compiler
may fuse a multiplication with an addition, which moves the last bit of a sum.
"""

import math
from typing import Any

import numpy as np
from numba import cuda, float32, int32

RULES = ("greedy", "sampled", "rejection")
OK, NAN, EMPTY, INF, BAD_ID, _, BAD_REQUEST = range(7)

_BLOCK = 2048
_LANES = 16
_ACCEPT, _RESIDUAL, _BONUS = 1, 2, 3
_F32 = 0
_F16 = 1
_INFINITY = np.float32(np.inf)
_LARGEST = np.float32(np.finfo(np.float32).max)
_SMALLEST = np.float32(np.finfo(np.float32).tiny)
_LOG2E, _MAGIC = np.float32(float.fromhex("0x1.715476p+0")), np.float32(float.fromhex("0x1.8p+23"))
_LN2_HIGH, _LN2_LOW = np.float32(float.fromhex("0x1.62e4p-1")), np.float32(float.fromhex("0x1.7f7d1cp-20"))
_C5, _C4 = np.float32(float.fromhex("0x1.0fa7ep-7")), np.float32(float.fromhex("0x1.573adp-5"))
_C3, _C2 = np.float32(float.fromhex("0x1.555a6ep-3")), np.float32(float.fromhex("0x1.fffdc4p-2"))
_C1 = np.float32(float.fromhex("0x1.fffff6p-1"))


@cuda.jit(device=True)
def fma(a, b, c):  # type: ignore[no-untyped-def]
    """float32 a b + c by float64, where the product is exact: rounded once but for one sum in 2^29."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@cuda.jit(device=True)
def vexp(x):  # type: ignore[no-untyped-def]
    """exp(x) of float32, by csrc/cpu/vexp.h's steps."""
    if not x >= np.float32(-87):
        return np.float32(0)
    n = fma(x, _LOG2E, _MAGIC) - _MAGIC
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    p = fma(fma(fma(_C5, r, _C4), r, _C3), r, _C2)
    p = fma(fma(p, r, _C1), r, np.float32(1))
    return np.float32(math.ldexp(np.float64(p), int(n)))


@cuda.jit(device=True)
def uniform(seed, position, domain, node):  # type: ignore[no-untyped-def]
    """assay_uniform (csrc/philox.h)."""
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = position & low, position >> word, np.uint64(domain), np.uint64(node)
    k0, k1 = seed & low, seed >> word
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> word) ^ c1 ^ k0, b & low, (a >> word) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return (np.float64(((c1 << word) | c0) >> np.uint64(12)) + 0.5) * 2.0**-52


@cuda.jit(device=True)
def logit_at(logits, dtype, row, token):  # type: ignore[no-untyped-def]
    """float32 of a logit; float16 and bfloat16 come as their bits."""
    if dtype == _F32:
        return np.float32(logits[row, token])
    bits = np.int64(logits[row, token])
    shift, bias, largest = (10, 15, 31) if dtype == _F16 else (7, 127, 255)
    exponent, fraction = (bits & 0x7FFF) >> shift, bits & ((1 << shift) - 1)
    if exponent == largest:
        value = np.float64(np.inf) if fraction == 0 else np.float64(np.nan)
    elif exponent == 0:
        value = math.ldexp(np.float64(fraction), 1 - bias - shift)
    else:
        value = math.ldexp(np.float64(fraction + (1 << shift)), int(exponent) - bias - shift)
    return np.float32(-value if bits & 0x8000 else value)


@cuda.jit(device=True)
def inverse_of(temperature):  # type: ignore[no-untyped-def]
    """1 / temperature, kept finite; 1 where the temperature is 0: greedy."""
    if temperature == 0:
        return np.float32(1)
    return min(max(np.float32(np.float32(1) / temperature), _SMALLEST), _LARGEST)


@cuda.jit(device=True)
def owner_of(cu, batch, row):  # type: ignore[no-untyped-def]
    """The request that a row of logits belongs to."""
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        if cu[middle] + middle <= row:
            low = middle
        else:
            high = middle
    return low


@cuda.jit(device=True)
def fold(lanes, at):  # type: ignore[no-untyped-def]
    """The sum of sixteen lanes, in csrc/cpu/vexp.h's order."""
    a = (lanes[at] + lanes[at + 8]) + (lanes[at + 4] + lanes[at + 12])
    b = (lanes[at + 2] + lanes[at + 10]) + (lanes[at + 6] + lanes[at + 14])
    c = (lanes[at + 1] + lanes[at + 9]) + (lanes[at + 5] + lanes[at + 13])
    d = (lanes[at + 3] + lanes[at + 11]) + (lanes[at + 7] + lanes[at + 15])
    return (a + b) + (c + d)


@cuda.jit
def scan(logits, dtype, cu, temperature, greedy, largest, first, sums):  # type: ignore[no-untyped-def]
    """Grid (blocks, rows): each block's largest logit, where it is, and the sum of exp((l - largest) / T)."""
    block, row, lane = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    # A line each: the simulator tells shared arrays apart by where they are made.
    most = cuda.shared.array(_LANES, float32)
    where = cuda.shared.array(_LANES, int32)
    partial = cuda.shared.array(_LANES, float32)
    t = temperature[owner_of(cu, len(cu) - 1, row)]
    begin, end = block * _BLOCK, min((block + 1) * _BLOCK, logits.shape[1])
    m, at = -_INFINITY, begin + lane
    for i in range(begin + lane, end, _LANES):
        x = logit_at(logits, dtype, row, i)
        if not math.isnan(m) and (x > m or math.isnan(x)):  # a NaN stays
            m, at = x, i
    most[lane], where[lane] = m, at
    cuda.syncthreads()
    for other in range(_LANES):
        x = most[other]
        if not math.isnan(m) and (x > m or math.isnan(x) or (x == m and where[other] < at)):
            m, at = x, where[other]
    partial[lane] = 0
    if not greedy and t > 0 and abs(m) < _INFINITY:
        for i in range(begin + lane, end, _LANES):
            partial[lane] += vexp((logit_at(logits, dtype, row, i) - m) * inverse_of(t))
    cuda.syncthreads()
    if lane == 0:
        largest[row, block], first[row, block], sums[row, block] = m, at, fold(partial, 0)


@cuda.jit(device=True)
def settle(largest, sums, row, inverse_t, state):  # type: ignore[no-untyped-def]
    """A row's shift and normaliser into state[row], and its status."""
    shift = -_INFINITY
    for b in range(largest.shape[1]):
        if math.isnan(largest[row, b]):
            return NAN
        shift = max(shift, largest[row, b])
    if shift == _INFINITY:
        return INF
    if shift == -_INFINITY:
        return EMPTY
    total = np.float64(0)
    for b in range(largest.shape[1]):
        total += np.float64(sums[row, b]) * np.float64(vexp((largest[row, b] - shift) * inverse_t))
    state[row, 0], state[row, 1] = shift, total
    return OK


@cuda.jit(device=True)
def argmax(largest, first, row, shift):  # type: ignore[no-untyped-def]
    """Where a row's largest logit first stands, from its blocks' largest ones."""
    for b in range(largest.shape[1]):
        if largest[row, b] == shift:
            return first[row, b]
    return 0


@cuda.jit(device=True)
def weight_at(logits, dtype, row, shift, inverse_t, q, q_row, scale, excluded, token):  # type: ignore[no-untyped-def]
    """What a draw weighs a token by: exp((l - shift) / T), without the excluded one; above q where there is one."""
    if token >= logits.shape[1] or token == excluded:
        return np.float32(0)
    w = vexp((logit_at(logits, dtype, row, token) - shift) * inverse_t)
    if q_row < 0:
        return w
    return max(np.float32(np.float32(w * scale) - np.float32(q[q_row, token])), np.float32(0))


@cuda.jit(device=True)
def draw(logits, dtype, row, shift, inverse_t, q, q_row, scale, excluded, largest, masses, target, lanes, at):  # type: ignore[no-untyped-def]
    """The token whose cumulated weight first exceeds the target; the last of positive weight when rounding leaves it beyond.

    lanes[at : at + 16]: this thread's scratch.
    """
    before, block = np.float64(0), -1
    last, last_before = 0, np.float64(0)
    for b in range(masses.shape[1]):
        if before + masses[row, b] > target:
            block = b
            break
        if masses[row, b] > 0:
            last, last_before = b, before
        before += masses[row, b]
    if block < 0:
        block, before, target = last, last_before, np.float64(np.inf)
    # p's weights are relative to the block's own largest, as its sum is.
    own = shift if q_row >= 0 else largest[row, block]
    factor = np.float64(1) if q_row >= 0 else np.float64(vexp((own - shift) * inverse_t))
    begin, group, last = block * _BLOCK, -1, 0
    last_before = before
    for g in range((min(_BLOCK, logits.shape[1] - begin) + _LANES - 1) // _LANES):
        for i in range(_LANES):
            lanes[at + i] = weight_at(
                logits, dtype, row, own, inverse_t, q, q_row, scale, excluded, begin + g * _LANES + i
            )
        w = np.float64(fold(lanes, at)) * factor
        if before + w > target:
            group = g
            break
        if w > 0:
            last, last_before = g, before
        before += w
    if group < 0:
        group, before, target = last, last_before, np.float64(np.inf)
    token = begin + group * _LANES
    for i in range(_LANES):
        one = begin + group * _LANES + i
        w = np.float64(weight_at(logits, dtype, row, own, inverse_t, q, q_row, scale, excluded, one)) * factor
        if w > 0:
            token = one
        if before + w > target:
            break
        before += w
    return token


@cuda.jit
def decide(  # type: ignore[no-untyped-def]
    logits, dtype, ids, cu, q, dense, rule, temperature, seed, position, largest, first, sums, state, masses, how,
    out, accepted, emitted, status, path,
):  # fmt: skip
    """A block a request. how: int32 [rows, 2], a row's status and the token drawn there."""
    b, lane = cuda.blockIdx.x, cuda.threadIdx.x
    stop = cuda.shared.array(2, int32)
    partial = cuda.shared.array(_LANES, float32)
    scratch = cuda.shared.array(_LANES * _LANES, float32)
    start, end = cu[b], cu[b + 1]
    drafts, t = end - start, temperature[b]
    valid = 0 <= start <= end <= len(ids) and drafts < out.shape[1] and t >= 0 and t < _INFINITY
    greedy, matches = rule == 0 or t == 0, rule != 2 or t == 0
    inverse_t = np.float32(1) if greedy else inverse_of(t)
    if lane == 0:
        stop[0], stop[1] = drafts if valid else 0, OK if valid else BAD_REQUEST
        for j in range(drafts if valid else 0):
            if ids[start + j] < 0:
                stop[0] = j
                stop[1] = OK if ids[start + j] == -1 else BAD_ID
                break
    cuda.syncthreads()
    present, fault = stop[0], stop[1]
    count = 0 if fault else present + 1
    for k in range(lane, count, _LANES):  # every row of the request
        row = start + b + k
        how[row, 0] = settle(largest, sums, row, inverse_t, state)
        shift, total = np.float32(state[row, 0]), state[row, 1]
        for i in range(largest.shape[1]):
            masses[row, i] = np.float64(sums[row, i]) * np.float64(vexp((largest[row, i] - shift) * inverse_t))
        if how[row, 0] == OK and greedy:
            how[row, 1] = argmax(largest, first, row, shift)
        elif how[row, 0] == OK and matches:
            u = uniform(seed[b], np.uint64(position[b] + k), _BONUS, 0)
            how[row, 1] = draw(logits, dtype, row, shift, inverse_t, q, -1, np.float32(0), -1, largest, masses, u * total,
                               scratch, lane * _LANES)  # fmt: skip
    cuda.syncthreads()
    for j in range(lane, count - 1, _LANES):  # every position's test
        row, token = start + b + j, ids[start + j]
        stands = how[row, 0] == OK
        if stands and matches:
            stands = how[row, 1] == token
        elif stands:
            p = np.float32(0)
            if token < logits.shape[1]:
                p = vexp((logit_at(logits, dtype, row, token) - np.float32(state[row, 0])) * inverse_t)
                p = np.float32(p * np.float32(1 / state[row, 1]))
            share = np.float64(1)
            if dense:
                share = np.float64(q[start + j, token]) if token < logits.shape[1] else np.float64(0)
            stands = 0 <= share < np.inf and uniform(seed[b], np.uint64(position[b] + j), _ACCEPT, 0) * share < p
        if not stands:
            cuda.atomic.min(stop, 0, j)
    cuda.syncthreads()
    last = stop[0]
    row = start + b + last
    rejects = fault == OK and not matches and last < present and how[row, 0] == OK
    token = ids[start + last] if rejects else 0
    shift = np.float32(state[row, 0]) if rejects else np.float32(0)
    scale = np.float32(1 / state[row, 1]) if rejects else np.float32(0)
    for i in range(largest.shape[1] if rejects else 0):  # what is left of p, a block at a time
        own = shift if dense else largest[row, i]
        partial[lane] = 0
        bad = False
        for v in range(i * _BLOCK + lane, min((i + 1) * _BLOCK, logits.shape[1]), _LANES):
            bad = bad or (dense and not 0 <= q[start + last, v] < _INFINITY)
            partial[lane] += weight_at(logits, dtype, row, own, inverse_t, q, start + last if dense else -1, scale,
                                       -1 if dense else token, v)  # fmt: skip
        if bad:
            partial[lane] = np.float32(np.nan)
        cuda.syncthreads()
        if lane == 0:
            factor = np.float64(1) if dense else np.float64(vexp((own - shift) * inverse_t))
            masses[row, i] = np.float64(fold(partial, 0)) * factor if dense or sums[row, i] > 0 else 0.0
        cuda.syncthreads()
    if lane > 0:
        return
    if fault == OK:
        fault = how[row, 0]
    if rejects:
        total = np.float64(0)
        for i in range(largest.shape[1]):
            total += masses[row, i]
        u = uniform(seed[b], np.uint64(position[b] + last), _RESIDUAL, 0)
        drawn = q[start + last, token] if dense and token < logits.shape[1] else np.float32(0)
        if math.isnan(total) or not 0 <= drawn < _INFINITY:
            fault = NAN
        elif total > 0:
            token = draw(logits, dtype, row, shift, inverse_t, q, start + last if dense else -1, scale,
                         -1 if dense else token, largest, masses, u * total, scratch, 0)  # fmt: skip
        else:  # nothing is left over: a token of p
            for i in range(largest.shape[1]):
                masses[row, i] = np.float64(sums[row, i]) * np.float64(vexp((largest[row, i] - shift) * inverse_t))
            token = draw(logits, dtype, row, shift, inverse_t, q, -1, scale, -1, largest, masses, u * state[row, 1],
                         scratch, 0)  # fmt: skip
    elif fault == OK and matches:
        token = how[row, 1]
    elif fault == OK:
        u = uniform(seed[b], np.uint64(position[b] + last), _BONUS, 0)
        token = draw(logits, dtype, row, np.float32(state[row, 0]), inverse_t, q, -1, scale, -1, largest, masses,
                     u * state[row, 1], scratch, 0)  # fmt: skip
    for i in range(out.shape[1]):
        out[b, i] = -1
        if fault == OK and i <= last:
            out[b, i] = ids[start + i] if i < last else token
        if i + 1 < out.shape[1]:
            path[b, i] = i if fault == OK and i < last else -1
    accepted[b] = last if fault == OK else 0
    emitted[b] = last + 1 if fault == OK else 0
    status[b] = fault


def verify(logits: Any, dtype: int, ids: Any, cu: Any, draft_probs: Any, rule: str, temperature: Any, seed: Any, position: Any,
           out: Any, accepted: Any, emitted: Any, status: Any, path: Any, stream: Any = 0) -> None:  # fmt: skip
    """Verifies chains; arrays are Numba's device arrays, or in the simulator numpy's, described in csrc/assay.h.

    logits: float32 (dtype 0), or the bits of float16 (1) or bfloat16 (2) as uint16, [sum K_b + B, V].

    Raises
    ------
    UnsupportedError
        Another rule.
    """
    if rule not in RULES:
        from ..errors import UnsupportedError

        raise UnsupportedError(f"rule: the Numba twin for GPUs has {', '.join(RULES)}, got {rule!r}")
    rows, vocab = logits.shape
    blocks = -(-vocab // _BLOCK)
    largest, sums = (cuda.device_array((rows, blocks), np.float32, stream=stream) for _ in range(2))
    first, how = (
        cuda.device_array((rows, blocks), np.int32, stream=stream),
        cuda.device_array((rows, 2), np.int32, stream=stream),
    )
    masses, state = (cuda.device_array((rows, n), np.float64, stream=stream) for n in (blocks, 2))
    q = cuda.device_array((1, 1), np.float32, stream=stream) if draft_probs is None else draft_probs
    number = RULES.index(rule)
    scan[(blocks, rows), _LANES, stream](logits, dtype, cu, temperature, number == 0, largest, first, sums)
    decide[len(cu) - 1, _LANES, stream](logits, dtype, ids, cu, q, draft_probs is not None, number, temperature, seed, position,
                                        largest, first, sums, state, masses, how, out, accepted, emitted, status, path)  # fmt: skip

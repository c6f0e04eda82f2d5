"""Numba twin of chain verification: the order of operations of csrc/spec_verify.c, and so the same tokens."""

import numpy as np
from numba import njit

from ._vexp import fold16, vexp

_BLOCK = 2048
_OK, _NAN, _EMPTY, _INF, _BAD_ID = 0, 1, 2, 3, 4
_ACCEPT, _RESIDUAL, _BONUS = 1, 2, 3
_LARGEST = np.finfo(np.float32).max
_SMALLEST = np.finfo(np.float32).tiny


def verify_chain(
    logits: np.ndarray,
    draft_token_ids: np.ndarray,
    cu_num_draft_tokens: np.ndarray,
    draft_probs: np.ndarray | None,
    rule: str,
    temperature: np.ndarray,
    seed: np.ndarray,
    position: np.ndarray,
    uniforms: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :func:`assay.reference.verify_chain`; the arguments are checked by :mod:`assay.ops.speculative`."""
    cu = cu_num_draft_tokens.astype(np.int64)
    batch = len(cu) - 1
    out = np.full((batch, int(np.diff(cu).max(initial=0)) + 1), -1, np.int32)
    accepted = np.zeros(batch, np.int32)
    status = np.zeros(batch, np.int32)
    if rule == "greedy":
        temperature = np.zeros_like(temperature)
    # Numba wants one type for each argument; empty stands for none.
    q = np.empty((0, logits.shape[1]), np.float32) if draft_probs is None else np.ascontiguousarray(draft_probs)
    u = np.empty(0) if uniforms is None else uniforms
    x = np.ascontiguousarray(logits)
    given = uniforms is not None
    _verify(x, draft_token_ids, cu, q, draft_probs is not None, temperature, seed, position, u, given, out, accepted,
            status)  # fmt: skip
    return out, accepted, status


@njit(cache=True)
def _uniform(seed, position, domain):  # type: ignore[no-untyped-def]
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1 = position & low, position >> word
    c2, c3 = np.uint64(domain), np.uint64(0)
    k0, k1 = seed & low, seed >> word
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> word) ^ c1 ^ k0, b & low, (a >> word) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    bits = ((c1 << word) | c0) >> np.uint64(12)
    return (np.float64(bits) + 0.5) * 2.0**-52


@njit(cache=True)
def _weights(row, shift, inverse_t, out):  # type: ignore[no-untyped-def]
    """exp of one block into out (zeros behind it); its sum."""
    lane = np.zeros(16, np.float32)
    out[:] = 0
    for i in range(len(row)):
        out[i] = vexp((row[i] - shift) * inverse_t)
        lane[i % 16] += out[i]
    return fold16(lane)


@njit(cache=True)
def _residual(row, shift, inverse_t, scale, q, out):  # type: ignore[no-untyped-def]
    lane = np.zeros(16, np.float32)
    out[:] = 0
    bad = False
    for i in range(len(row)):
        excess = vexp((row[i] - shift) * inverse_t) * scale - q[i]
        bad |= not (q[i] >= 0 and q[i] <= _LARGEST)
        if excess > 0:
            out[i] = excess
        lane[i % 16] += out[i]
    return np.float32(np.nan) if bad else fold16(lane)


@njit(cache=True)
def _read(row, greedy, inverse_t, largest, sums, scratch):  # type: ignore[no-untyped-def]
    """Fills each block's largest logit and sum; status and the row's largest logit."""
    shift = np.float32(-np.inf)
    nan = False
    for b in range(len(largest)):
        block = row[b * _BLOCK : (b + 1) * _BLOCK]
        m = np.float32(-np.inf)
        for x in block:
            nan |= np.isnan(x)
            m = max(m, x)
        largest[b] = m
        sums[b] = 0
        if not greedy and np.isfinite(m):
            sums[b] = _weights(block, m, inverse_t, scratch)
        shift = max(shift, m)
    if nan:
        return _NAN, shift
    if shift == np.inf:
        return _INF, shift
    return (_EMPTY if shift == -np.inf else _OK), shift


@njit(cache=True)
def _block_weight(largest, total, shift, inverse_t):  # type: ignore[no-untyped-def]
    if not total > 0:
        return 0.0
    return np.float64(total) * np.float64(vexp((largest - shift) * inverse_t))


@njit(cache=True)
def _pick(weights, n, factor, at, target):  # type: ignore[no-untyped-def]
    """The element of a block where the cumulated weight passes the target, by groups of 16."""
    lane = np.empty(16, np.float32)
    group, last, last_at = -1, 0, at
    for g in range((n + 15) // 16):
        lane[:] = weights[16 * g : 16 * g + 16]
        w = np.float64(fold16(lane)) * factor
        if at + w > target:
            group = g
            break
        if w > 0:
            last, last_at = g, at
        at += w
    if group < 0:
        group, at, target = last, last_at, np.inf
    found = 16 * group
    for i in range(16 * group, 16 * group + 16):
        w = np.float64(weights[i]) * factor
        if w > 0:
            found = i
        if at + w > target:
            break
        at += w
    return found


@njit(cache=True)
def _place(block_weights, target):  # type: ignore[no-untyped-def]
    block, before, at = 0, 0.0, 0.0
    for b in range(len(block_weights)):
        w = block_weights[b]
        if at + w > target:
            return b, at, target
        if w > 0:
            block, before = b, at
        at += w
    return block, before, np.inf


@njit(cache=True)
def _sample_target(row, shift, inverse_t, largest, sums, excluded, u, scratch):  # type: ignore[no-untyped-def]
    """A token of p, without the excluded one; -1 when nothing is left."""
    blocks = len(largest)
    w = np.empty(blocks)
    for b in range(blocks):
        s = sums[b]
        if excluded >= 0 and excluded // _BLOCK == b and s > 0:
            n = len(row[b * _BLOCK : (b + 1) * _BLOCK])
            _weights(row[b * _BLOCK : b * _BLOCK + n], largest[b], inverse_t, scratch)
            scratch[excluded % _BLOCK] = 0
            lane = np.zeros(16, np.float32)
            for i in range(n):
                lane[i % 16] += scratch[i]
            s = fold16(lane)
        w[b] = _block_weight(largest[b], s, shift, inverse_t)
    total = 0.0
    for b in range(blocks):
        total += w[b]
    if not total > 0:
        return -1
    b, before, target = _place(w, u * total)
    block = row[b * _BLOCK : (b + 1) * _BLOCK]
    _weights(block, largest[b], inverse_t, scratch)
    if excluded >= 0 and excluded // _BLOCK == b:
        scratch[excluded % _BLOCK] = 0
    factor = np.float64(vexp((largest[b] - shift) * inverse_t))
    return b * _BLOCK + _pick(scratch, len(block), factor, before, target)


@njit(cache=True)
def _sample_residual(row, shift, inverse_t, scale, q, u, scratch):  # type: ignore[no-untyped-def]
    """A token of (p - q)+; -1 when it is all zero, -2 when q holds no probabilities."""
    blocks = (len(row) + _BLOCK - 1) // _BLOCK
    w = np.empty(blocks)
    total = 0.0
    for b in range(blocks):
        at = slice(b * _BLOCK, (b + 1) * _BLOCK)
        w[b] = np.float64(_residual(row[at], shift, inverse_t, scale, q[at], scratch))
        total += w[b]
    if np.isnan(total):
        return -2
    if not total > 0:
        return -1
    b, before, target = _place(w, u * total)
    at = slice(b * _BLOCK, (b + 1) * _BLOCK)
    _residual(row[at], shift, inverse_t, scale, q[at], scratch)
    return b * _BLOCK + _pick(scratch, len(row[at]), 1.0, before, target)


@njit(cache=True)
def _verify_request(logits, draft, q, dense, temperature, seed, position, u, given, out):  # type: ignore[no-untyped-def]
    """Status and the number of accepted tokens; out gets the tokens."""
    k, vocab = len(draft), logits.shape[1]
    length = 0
    while length < k and draft[length] != -1:
        if draft[length] < 0 or draft[length] >= vocab:
            return _BAD_ID, 0
        length += 1
    greedy = temperature == 0
    inverse_t = np.float32(1)
    if not greedy:
        inverse_t = min(max(np.float32(1) / temperature, _SMALLEST), _LARGEST)
    blocks = (vocab + _BLOCK - 1) // _BLOCK
    largest, sums = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    scratch = np.empty(_BLOCK, np.float32)
    for i in range(length + 1):
        row = logits[i]
        status, shift = _read(row, greedy, inverse_t, largest, sums, scratch)
        if status != _OK:
            return status, 0
        at = np.uint64(position) + np.uint64(i)
        if greedy:
            token = 0
            while row[token] != shift:
                token += 1
            out[i] = token
            if i == length or token != draft[i]:
                return _OK, i
            continue
        if i == length:
            last = u[k + 1] if given else _uniform(seed, at, _BONUS)
            out[i] = _sample_target(row, shift, inverse_t, largest, sums, -1, last, scratch)
            return _OK, i
        total = 0.0
        for b in range(blocks):
            total += _block_weight(largest[b], sums[b], shift, inverse_t)
        scale = np.float32(1.0 / total)
        x = draft[i]
        p = vexp((row[x] - shift) * inverse_t) * scale
        qx = np.float64(q[i, x]) if dense else 1.0
        if not (qx >= 0 and qx <= _LARGEST):
            return _NAN, 0
        first = u[i] if given else _uniform(seed, at, _ACCEPT)
        if first * qx < np.float64(p):
            out[i] = x
            continue
        again = u[k] if given else _uniform(seed, at, _RESIDUAL)
        if dense:
            token = _sample_residual(row, shift, inverse_t, scale, q[i], again, scratch)
        else:
            token = _sample_target(row, shift, inverse_t, largest, sums, x, again, scratch)
        if token == -2:
            return _NAN, 0
        if token == -1:
            token = _sample_target(row, shift, inverse_t, largest, sums, -1, again, scratch)
        out[i] = token
        return _OK, i
    return _OK, 0


@njit(cache=True)
def _verify(logits, draft, cu, q, dense, temperature, seed, position, u, given, out, accepted, status):  # type: ignore[no-untyped-def]
    for b in range(len(accepted)):
        first, last = cu[b], cu[b + 1]
        rows = logits[first + b : last + b + 1]
        own_q = q[first:last] if dense else q
        own_u = u[first + 2 * b : last + 2 * b + 2] if given else u
        status[b], accepted[b] = _verify_request(
            rows, draft[first:last], own_q, dense, temperature[b], seed[b], position[b], own_u, given, out[b]
        )
        if status[b] != _OK:
            out[b] = -1

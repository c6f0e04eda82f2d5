"""Passes over a row of logits for the twin of verification: the sums of csrc/spec_rows.c and csrc/spec_process.c, with the
same bits. A row here is float32 [V], as processors and filters left it."""

import numpy as np
from numba import njit

from ._intrinsics import bits_of_float
from ._philox import log, unit_interval, words
from ._vexp import fold16, vexp

BLOCK = 2048
_LARGEST = np.finfo(np.float32).max
_SIGN = np.uint32(0x80000000)
_NOISE = np.uint64(4)
_FINE = np.float32(1.5 * 2.0**-23)
_ONE_BITS, _FINE_BITS = (int(np.float32(x).view(np.int32)) for x in (1, _FINE))


@njit(cache=True)
def exponentials(block, shift, inverse_t, out):  # type: ignore[no-untyped-def]
    """exp of one block into out (zeros behind it); its sum."""
    lane = np.zeros(16, np.float32)
    out[:] = 0
    for j in range(len(block)):
        out[j] = vexp((block[j] - shift) * inverse_t)
        lane[j % 16] += out[j]
    return fold16(lane)


@njit(cache=True)
def scan(row, inverse_t, summed, largest, sums):  # type: ignore[no-untyped-def]
    """Each block's largest element, and its sum of exp relative to that."""
    scratch = np.empty(BLOCK, np.float32)
    for b in range(len(largest)):
        block = row[b * BLOCK : (b + 1) * BLOCK]
        m = np.float32(-np.inf)
        for x in block:
            m = max(m, x)
        largest[b], sums[b] = m, 0
        if summed and np.isfinite(m):
            sums[b] = exponentials(block, m, inverse_t, scratch)


@njit(cache=True)
def residual_block(block, shift, inverse_t, scale, q, c, out):  # type: ignore[no-untyped-def]
    lane = np.zeros(16, np.float32)
    out[:] = 0
    bad = False
    for j in range(len(block)):
        excess = vexp((block[j] - shift) * inverse_t) * scale - q[j] * c
        bad |= not (q[j] >= 0 and q[j] <= _LARGEST)
        if excess > 0:
            out[j] = excess
        lane[j % 16] += out[j]
    return np.float32(np.nan) if bad else fold16(lane)


@njit(cache=True)
def residual(row, shift, inverse_t, scale, q, c, mass):  # type: ignore[no-untyped-def]
    scratch = np.empty(BLOCK, np.float32)
    for b in range(len(mass)):
        own = slice(b * BLOCK, (b + 1) * BLOCK)
        mass[b] = np.float64(residual_block(row[own], shift, inverse_t, scale, q[own], c, scratch))


@njit(cache=True)
def fold(weights):  # type: ignore[no-untyped-def]
    """Sum of a block's weights in 16 lanes."""
    lane = np.zeros(16, np.float32)
    for j in range(len(weights)):
        lane[j % 16] += weights[j]
    return fold16(lane)


@njit(cache=True)
def pick(weights, n, factor, at, target):  # type: ignore[no-untyped-def]
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
    for j in range(16 * group, 16 * group + 16):
        w = np.float64(weights[j]) * factor
        if w > 0:
            found = j
        if at + w > target:
            break
        at += w
    return found


@njit(cache=True)
def race(row, shift, inverse_t, seed, position):  # type: ignore[no-untyped-def]
    """The winner of the exponential race."""
    weights = np.empty(BLOCK, np.float32)
    best, winner = np.inf, 0
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        exponentials(block, shift, inverse_t, weights)
        for j in range(0, len(block), 2):
            pair = words(seed, position, _NOISE, np.uint64((start + j) // 2))
            for k in range(2):
                weight = np.float64(weights[j + k])
                if weight > 0:
                    time = -log(1.0 - unit_interval(pair[k])) / weight
                    if time < best:
                        best, winner = time, start + j + k
    return winner


@njit(cache=True)
def race_of(row, shift, inverse_t, uniforms):  # type: ignore[no-untyped-def]
    """The same with uniforms that are given, one a token."""
    weights = np.empty(BLOCK, np.float32)
    best, winner = np.inf, 0
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        exponentials(block, shift, inverse_t, weights)
        for j in range(len(block)):
            weight = np.float64(weights[j])
            if weight > 0:
                time = -log(1.0 - uniforms[start + j]) / weight
                if time < best:
                    best, winner = time, start + j
    return winner


@njit(cache=True)
def exponent_sums(row, shift, inverse_t):  # type: ignore[no-untyped-def]
    """Sums of w z and of w, z = (l - shift) / T, w = exp(z)."""
    scratch = np.empty(BLOCK, np.float32)
    mass, total = 0.0, 0.0
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        lane = np.zeros(16, np.float32)
        w = exponentials(block, shift, inverse_t, scratch)
        for j in range(len(block)):
            if scratch[j] > 0:
                lane[j % 16] += scratch[j] * ((block[j] - shift) * inverse_t)
        total += np.float64(w)
        mass += np.float64(fold16(lane))
    return mass, total


@njit(cache=True)
def logit_keys(row, keys):  # type: ignore[no-untyped-def]
    """Rise with the logit; adding 0 makes both zeros one."""
    for j in range(len(row)):
        bits = np.uint32(bits_of_float(row[j] + np.float32(0)))
        keys[j] = ~bits if bits & _SIGN else bits | _SIGN


@njit(cache=True)
def distance_keys(row, top, inverse_t, center, keys):  # type: ignore[no-untyped-def]
    """Fall with the distance of -log p from the entropy."""
    for j in range(len(row)):
        keys[j] = ~np.uint32(bits_of_float(abs((row[j] - top) * inverse_t - center)))


@njit(cache=True)
def weights_of(row, shift, inverse_t, out):  # type: ignore[no-untyped-def]
    for j in range(len(row)):
        out[j] = vexp((row[j] - shift) * inverse_t)


@njit(cache=True)
def mass_of(weight):  # type: ignore[no-untyped-def]
    """A weight as two integers, of 2^-23 and of 2^-46: what roundings to the nearest of these leave."""
    whole = weight + np.float32(1)
    high = bits_of_float(whole) - _ONE_BITS
    low = bits_of_float((weight - (whole - np.float32(1))) + _FINE) - _FINE_BITS
    return np.int64(high), np.int64(low)


@njit(cache=True)
def mass_value(high, low):  # type: ignore[no-untyped-def]
    carry = low >> 23
    return np.float64(high + carry) * 2.0**-23 + np.float64(low - (carry << 23)) * 2.0**-46


@njit(cache=True)
def total_mass(row, weights):  # type: ignore[no-untyped-def]
    high, low = np.int64(0), np.int64(0)
    for j in range(len(row)):
        if row[j] > -np.inf:
            h, lo = mass_of(weights[j])
            high += h
            low += lo
    return mass_value(high, low)


@njit(cache=True)
def select_first(row, keys, weights, elements, target):  # type: ignore[no-untyped-def]
    """Key and last id of the cut after so many elements, or (0 of them) that much weight; -1: all are needed."""
    counts, highs, lows = np.zeros(BLOCK, np.int64), np.zeros(BLOCK, np.int64), np.zeros(BLOCK, np.int64)
    prefix, count, high, low = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for level in range(3):
        shift = 21 - 11 * level if level < 2 else 0
        bits = 11 if level < 2 else 10
        counts[:] = 0
        highs[:] = 0
        lows[:] = 0
        for j in range(len(row)):
            if row[j] == -np.inf or (level and np.int64(keys[j]) >> (shift + bits) != prefix):
                continue
            bucket = (np.int64(keys[j]) >> shift) & ((1 << bits) - 1)
            counts[bucket] += 1
            h, lo = mass_of(weights[j])
            highs[bucket] += h
            lows[bucket] += lo
        found = -1
        for k in range((1 << bits) - 1, -1, -1):
            if elements:
                enough = count + counts[k] >= elements
            else:
                enough = mass_value(high + highs[k], low + lows[k]) >= target
            if counts[k] and enough:
                found = k
                break
            count += counts[k]
            high += highs[k]
            low += lows[k]
        if found < 0:
            return np.int64(-1), -1
        prefix = (prefix << bits) | found
    last = -1
    for j in range(len(row)):
        if row[j] == -np.inf or np.int64(keys[j]) != prefix:
            continue
        last = j
        count += 1
        h, lo = mass_of(weights[j])
        high += h
        low += lo
        if (elements and count >= elements) or (not elements and mass_value(high, low) >= target):
            break
    return prefix, last


@njit(cache=True)
def cut(row, keys, key, last):  # type: ignore[no-untyped-def]
    """Leaves what comes before (key, last), keys descending and then ids ascending."""
    for j in range(len(row)):
        if not (np.int64(keys[j]) > key or (np.int64(keys[j]) == key and j <= last)):
            row[j] = -np.inf

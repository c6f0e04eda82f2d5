"""Philox4x32-10 and the logarithm of csrc/cpu/logarithm.h, with the same bits."""

import numpy as np
from numba import njit

from ._intrinsics import bits_of_double, double_of_bits

_LN2 = float.fromhex("0x1.62e42fefa39efp-1")


@njit(cache=True)
def words(seed, position, domain, node):  # type: ignore[no-untyped-def]
    """The two 64-bit words of a key: arguments are uint64."""
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1 = position & low, position >> word
    c2, c3 = np.uint64(domain), np.uint64(node)
    k0, k1 = seed & low, seed >> word
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> word) ^ c1 ^ k0, b & low, (a >> word) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return (c1 << word) | c0, (c3 << word) | c2


@njit(cache=True)
def unit_interval(bits):  # type: ignore[no-untyped-def]
    return (np.float64(bits >> np.uint64(12)) + 0.5) * 2.0**-52


@njit(cache=True)
def uniform(seed, position, domain, node):  # type: ignore[no-untyped-def]
    return unit_interval(words(seed, position, domain, node)[0])


@njit(cache=True)
def log(y):  # type: ignore[no-untyped-def]
    bits = bits_of_double(y)
    e = np.int64(bits >> np.uint64(52)) - 1023
    m = double_of_bits((bits & np.uint64(0xFFFFFFFFFFFFF)) | np.uint64(0x3FF0000000000000))
    if m >= 1.5:
        m *= 0.5
        e += 1
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    total = 1.0 / 17.0
    total = total * z + 1.0 / 15.0
    total = total * z + 1.0 / 13.0
    total = total * z + 1.0 / 11.0
    total = total * z + 1.0 / 9.0
    total = total * z + 1.0 / 7.0
    total = total * z + 1.0 / 5.0
    total = total * z + 1.0 / 3.0
    total = total * z + 1.0
    return np.float64(e) * _LN2 + 2.0 * s * total

"""The functions of csrc/cpu/scores.h with the same bits."""

import numpy as np
from numba import njit

from ._intrinsics import fma32
from ._vexp import vexp

_ONE, _TWO, _ZERO = np.float32(1), np.float32(2), np.float32(0)
_TERMS = tuple(np.float32(1) / np.float32(n) for n in (17, 15, 13, 11, 9, 7, 5, 3, 1))


@njit(cache=True)
def sigmoid(x):  # type: ignore[no-untyped-def]
    e = vexp(-abs(x))
    return (_ONE if x >= 0 else e) / (_ONE + e)


@njit(cache=True)
def softplus(x):  # type: ignore[no-untyped-def]
    e = vexp(-abs(x))
    z = e / (_TWO + e)
    z2 = z * z
    p = _TERMS[0]
    for term in _TERMS[1:]:
        p = fma32(p, z2, term)
    return (x if x > 0 else _ZERO) + _TWO * z * p

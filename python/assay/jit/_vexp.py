"""exp of csrc/cpu/vexp.h with the same bits, and the sums that go with it."""

import numpy as np
from numba import njit

from ._intrinsics import bits_of_float, float_of_bits, fma32

_LOG2E = np.float32(float.fromhex("0x1.715476p+0"))
_MAGIC = np.float32(float.fromhex("0x1.8p+23"))
_LN2_HIGH = np.float32(float.fromhex("0x1.62e4p-1"))
_LN2_LOW = np.float32(float.fromhex("0x1.7f7d1cp-20"))
_C5 = np.float32(float.fromhex("0x1.0fa7ep-7"))
_C4 = np.float32(float.fromhex("0x1.573adp-5"))
_C3 = np.float32(float.fromhex("0x1.555a6ep-3"))
_C2 = np.float32(float.fromhex("0x1.fffdc4p-2"))
_C1 = np.float32(float.fromhex("0x1.fffff6p-1"))
_ONE = np.float32(1)
_ZERO = np.float32(0)
_LEAST = np.float32(-87)


@njit(cache=True)
def vexp(x):  # type: ignore[no-untyped-def]
    z = fma32(x, _LOG2E, _MAGIC)
    n = z - _MAGIC
    r = fma32(n, -_LN2_LOW, fma32(n, -_LN2_HIGH, x))
    p = fma32(_C5, r, _C4)
    p = fma32(p, r, _C3)
    p = fma32(p, r, _C2)
    p = fma32(p, r, _C1)
    p = fma32(p, r, _ONE)
    if x < _LEAST:
        return _ZERO
    return float_of_bits(np.uint32(bits_of_float(p) + np.uint32(bits_of_float(z) << np.uint32(23))))


@njit(cache=True)
def fold16(lane):  # type: ignore[no-untyped-def]
    """Overwrites `lane`."""
    width = 8
    while width:
        for i in range(width):
            lane[i] += lane[i + width]
        width //= 2
    return lane[0]

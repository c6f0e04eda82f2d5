"""The C packing of INT4 weights for GPUs against numpy's (w4.py)."""

import numpy as np
import pytest
from assay._assay import ffi, lib
from w4 import Weights

SHAPES = [(1, 1, 1), (31, 64, 32), (32, 128, 128), (33, 96, 32), (70, 37, 37), (256, 320, 64), (40, 300, 300)]


def pointer(array: np.ndarray | None, kind: str):
    return ffi.NULL if array is None else ffi.cast(kind, array.ctypes.data)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_same_bytes(n, k, group_size, symmetric):
    w = Weights(n, k, group_size, symmetric)
    size = lib.assay_cuda_w4_packed_bytes(n, k, group_size, symmetric)
    out = np.full(size + 1, 0xAB, np.uint8)
    scales = w.scales.view(np.uint16)
    status = lib.assay_cuda_w4_pack(
        n, k, group_size, pointer(w.qweight, "uint8_t *"), pointer(scales, "uint16_t *"),
        pointer(w.zeros, "uint8_t *"), pointer(out, "void *"),
    )  # fmt: skip
    assert status == 0
    assert out[-1] == 0xAB
    assert np.array_equal(out[:-1], w.packed)


@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(0, 32, 32), (1, 33, 32), (1, 96, 64), (1, 64, 16), (2**24, 32, 32), (1, -1, -1)]
)
def test_shapes_that_are_none(n, k, group_size):
    assert lib.assay_cuda_w4_packed_bytes(n, k, group_size, 1) == 0
    assert lib.assay_cuda_w4_pack(n, k, group_size, ffi.NULL, ffi.NULL, ffi.NULL, ffi.NULL) == 1

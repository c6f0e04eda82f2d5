"""The GEMM of the public API on a GPU's arrays, against numpy."""

import numpy as np
import pytest

import assay


def weights(n, k, group, symmetric, seed=0):
    rng = np.random.default_rng(seed)
    return assay.pack(
        *assay.quantize_int4(rng.standard_normal((n, k)).astype(np.float32), group_size=group, symmetric=symmetric)[:3]
    )


@pytest.mark.parametrize("m", [1, 5, 17, 70])
@pytest.mark.parametrize("symmetric", [True, False])
def test_w4a16_is_within_rounding_of_numpy(gpu, m, symmetric):
    w = weights(96, 256, 64, symmetric)
    a = np.random.default_rng(1).standard_normal((m, 256)).astype(np.float16)
    got = assay.w4a16_gemm(gpu.to_device(a), w.to_device())
    assert got.shape == (m, 96)
    want = a.astype(np.float64) @ w.dequantize().astype(np.float64).T
    size = np.abs(a.astype(np.float64)) @ np.abs(w.dequantize().astype(np.float64)).T
    # float32 sums of K products in any order, each product exact in float32; scales enter by one more rounding a group.
    assert (np.abs(got.numpy() - want) <= size * 2.0**-24 * (256 + 8)).all()

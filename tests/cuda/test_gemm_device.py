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


def test_arguments_on_both_sides_are_refused(gpu):
    w = weights(40, 64, 32, True)
    a = np.ones((2, 64), np.float16)
    with pytest.raises(TypeError, match="w: expected weights on the GPU"):
        assay.w4a16_gemm(gpu.to_device(a), w)
    with pytest.raises(TypeError, match="a: expected an array on cuda:0 as w is"):
        assay.w4a16_gemm(a, w.to_device())
    with pytest.raises(TypeError, match="out: expected an array on the GPU"):
        assay.w4a16_gemm(gpu.to_device(a), w.to_device(), np.empty((2, 40), np.float32))
    with pytest.raises(TypeError, match="a: expected float16 or bfloat16, got float32"):
        assay.w4a16_gemm(gpu.to_device(a.astype(np.float32)), w.to_device())
    with pytest.raises(ValueError, match=r"a: expected \[M, K\] with K = 64, got \[2, 32\]"):
        assay.w4a16_gemm(gpu.to_device(a[:, :32]), w.to_device())
    with pytest.raises(ValueError, match="backend: expected 'c'"):
        assay.w4a16_gemm(gpu.to_device(a), w.to_device(), backend="numba")


def test_arguments_on_two_devices_are_refused(mock):
    from assay import cuda

    a = cuda.to_device(np.ones((2, 64), np.float16), 1)
    with pytest.raises(ValueError, match="w: expected memory on cuda:1 as the other arguments, got cuda:0"):
        assay.w4a16_gemm(a, weights(40, 64, 32, True).to_device(0))


def test_a_graph_of_the_gemm_has_the_same_bits(gpu):
    w = weights(40, 64, 32, True).to_device()
    stream = gpu.Stream()
    a = gpu.to_device(np.random.default_rng(3).standard_normal((3, 64)).astype(np.float16), stream=stream)
    plain = assay.w4a16_gemm(a, w, stream=stream)
    out = gpu.empty((3, 40), stream=stream)
    with stream.capture() as graph:
        assert assay.w4a16_gemm(a, w, out, stream=stream) is out
    out.fill(0)
    graph.launch(stream)
    np.testing.assert_array_equal(out.numpy(), plain.numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m", [64, 65, 130])
def test_hopper_multiplies_many_rows_by_warpgroups(mock, m, symmetric):
    from assay import cuda

    mock.set(major=9, minor=0, smem_optin=232448, smem_per_sm=233472)
    w = weights(288, 192, 64, symmetric)
    a = np.random.default_rng(2).standard_normal((m, 192)).astype(np.float16)
    got = assay.w4a16_gemm(cuda.to_device(a), w.to_device()).numpy()
    did = mock.counters()
    assert (did.wgmma > 0, did.bulk_bytes > 0, did.mma == 0) == ((True,) * 3 if m > 64 else (False,) * 3)
    want = a.astype(np.float64) @ w.dequantize().astype(np.float64).T
    size = np.abs(a.astype(np.float64)) @ np.abs(w.dequantize().astype(np.float64)).T
    # As in test_w4a16_is_within_rounding_of_numpy.
    assert (np.abs(got - want) <= size * 2.0**-24 * (192 + 8)).all()

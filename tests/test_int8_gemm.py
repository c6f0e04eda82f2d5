"""int8 GEMM: every variant against the reference, bit for bit, and the batch-invariance contract."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from test_int4_gemm import SHAPES, activations

OP = "int8_gemm"


def weights(n, k, group_size, seed=0):
    rng = np.random.default_rng([seed, n, k])
    q = rng.integers(-128, 128, (n, k), dtype=np.int8)
    return q, rng.uniform(-0.1, 0.1, (n, k // group_size)).astype(np.float16)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_variant_equals_reference_bit_for_bit(variant, n, k, group_size):
    w = assay.pack_int8(*weights(n, k, group_size))
    for m in (0, 1, 2, 3, 4, 5, 6, 7, 13):
        a = activations(m, k)
        want = assay.w8a8_gemm(a, w, backend="reference")
        np.testing.assert_allclose(
            assay.w8a8_gemm(a, w, isa=variant), want, rtol=1.2e-7 * (k // group_size + 1), atol=1e-30
        )
        np.testing.assert_array_equal(assay.w8a8_gemm(a, w, isa=variant), assay.w8a8_gemm(a, w, isa="scalar"))


@pytest.mark.parametrize(("n", "k", "group_size"), [(70, 640, 128), (40, 36, 36)])
def test_numba_twin_has_the_same_bits(n, k, group_size):
    w = assay.pack_int8(*weights(n, k, group_size))
    a = activations(3, k)
    a[1, 5] = np.nan
    np.testing.assert_array_equal(assay.w8a8_gemm(a, w, backend="numba"), assay.w8a8_gemm(a, w))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_row_has_the_same_bits_in_any_batch(variant, group_size):
    w = assay.pack_int8(*weights(100, 640, group_size))
    a = activations(290, 640)
    alone = np.concatenate([assay.w8a8_gemm(a[i : i + 1], w, isa=variant, num_threads=1) for i in range(290)])
    for m in (2, 5, 7, 16, 24, 33, 290):
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(assay.w8a8_gemm(a[:m], w, isa=variant, num_threads=threads), alone[:m])


def test_extremes_stay_exact(variant):
    """The largest sums of whole-row groups: 2^17 products of -128 and 127 are just inside int32."""
    k = 1 << 17
    q = np.full((3, k), -128, np.int8)
    w = assay.pack_int8(q, np.full((3, 1), 2.0**-14, np.float16))
    for m in (1, 3):
        got = assay.w8a8_gemm(np.ones((m, k), np.float32), w, isa=variant)
        np.testing.assert_allclose(got, -128.0 * k * 2.0**-14, rtol=1e-6)
    for code in (-128, 127):
        saturating = assay.pack_int8(np.full((32, 64), code, np.int8), np.ones((32, 2), np.float16))
        a = np.full((20, 64), -5.0, np.float32)
        for m in (2, 20):
            np.testing.assert_allclose(assay.w8a8_gemm(a[:m], saturating, isa=variant), -5 * code * 64, rtol=1e-6)


@given(st.integers(1, 80), st.integers(1, 6), st.sampled_from([32, 64, 128, 0]), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_pack_round_trip_and_gemm_on_random_shapes(n, groups, group_size, m):
    k = groups * group_size or 17 * groups
    group_size = group_size or k
    q, scales = weights(n, k, group_size)
    w = assay.pack_int8(q, scales)
    np.testing.assert_array_equal(w.unpack()[0], q)
    np.testing.assert_array_equal(w.unpack()[1], scales)
    a = activations(m, k)
    np.testing.assert_array_equal(assay.w8a8_gemm(a, w), assay.w8a8_gemm(a, w, isa="scalar"))


def test_quantize_round_trip_error():
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    packed = assay.pack_int8(*assay.quantize_int8(w))
    amax = np.abs(w.reshape(64, -1, 32)).max(-1)
    error = np.abs(packed.dequantize() - w).reshape(64, -1, 32).max(-1)
    assert (error <= amax / 127 * 0.6).all()  # half a step, and float16's rounding of the scale


def test_kernel_reads_nothing_beyond_its_arguments(variant, guarded):
    q, scales = weights(33, 64, 32)
    a, out = activations(3, 64), np.empty((3, 33), np.float32)
    w = assay.pack_int8(guarded(q), guarded(scales))
    got = assay.w8a8_gemm(guarded(a), w, guarded(out), isa=variant)
    np.testing.assert_array_equal(got, assay.w8a8_gemm(a, assay.pack_int8(q, scales)))


def test_q8_0_blocks_pack_without_loss(gemma_gguf):
    from assay.formats import open_gguf

    with open_gguf(gemma_gguf) as file:
        name = next(name for name, t in file.tensors.items() if t.type_name == "Q8_0" and "attn_v" in name)
        raw = np.asarray(file.raw(name)).reshape(file.tensors[name].shape[0], -1, 34)
        scales = np.ascontiguousarray(raw[:, :, :2]).view(np.float16)[..., 0]
        q = np.ascontiguousarray(raw[:, :, 2:]).view(np.int8).reshape(len(raw), -1)
        np.testing.assert_array_equal(assay.pack_int8(q, scales).dequantize(), file.dequantize(name))


def test_bad_arguments_say_got_and_wanted():
    q, scales = weights(40, 64, 32)
    w = assay.pack_int8(q, scales)
    a = activations(2, 64)
    cases = [
        (TypeError, "qweight: expected int8, got uint8", lambda: assay.pack_int8(q.view(np.uint8), scales)),
        (ValueError, r"scales: expected \[N, K/group_size\]", lambda: assay.pack_int8(q, scales[:39])),
        (ValueError, "group_size: expected 32, 64, 128 or K", lambda: assay.pack_int8(q, np.ones((40, 4), np.float16))),
        (ValueError, r"a: expected \[M, K\] with K = 64", lambda: assay.w8a8_gemm(a[:, :32], w)),
        (TypeError, "w: expected PackedInt8", lambda: assay.w8a8_gemm(a, q)),
        (ValueError, "backend: expected one of", lambda: assay.w8a8_gemm(a, w, backend="cuda")),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()

"""INT4 GEMM: every variant against the reference, bit for bit, and the batch-invariance contract."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from assay._ffi import lib
from assay.ops.int4 import SplitGemm
from bf16 import BFloat16

OP = "int4_gemm"

OPS = {"w4a8": assay.w4a8_gemm, "w4a16": assay.w4a16_gemm}

# (n, k, group_size): tile - 1, tile, tile + 1 columns; every kind of group; whole rows of awkward length.
SHAPES = [(1, 32, 32), (31, 64, 32), (32, 128, 64), (33, 256, 128), (70, 640, 128), (96, 160, 32), (5, 7, 7),
          (40, 36, 36), (70, 48, 48), (64, 80, 80),
          (64, 999, 999), (33, 1, 1)]  # fmt: skip


def weights(n, k, group_size, symmetric, seed=0):
    rng = np.random.default_rng([seed, n, k])
    q = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = rng.uniform(-0.1, 0.1, (n, k // group_size)).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, 16, scales.shape, dtype=np.uint8)
    return reference.pack_nibbles(q), scales, zeros


def activations(m, k, dtype="float32", seed=1):
    a = np.random.default_rng([seed, m, k]).standard_normal((m, k)).astype(np.float32)
    return a.astype(dtype)


def sizes(shape):
    """Factors from 1 down to where float32 and bfloat16 are subnormal, past 2^-100, below which a bfloat16 counts as zero."""
    return np.random.default_rng(shape).choice(np.float32([1, 1, 1, 2.0**-98, 2.0**-101, 2.0**-120, 2.0**-130]), shape)


@pytest.fixture(params=sorted(OPS))
def gemm(request):
    return OPS[request.param]


@pytest.fixture(params=[True, False], ids=["symmetric", "asymmetric"])
def symmetric(request):
    return request.param


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_variant_equals_reference_bit_for_bit(gemm, variant, n, k, group_size, symmetric):
    qweight, scales, zeros = weights(n, k, group_size, symmetric)
    w = assay.pack(qweight, scales, zeros, k=k, group_size=group_size)
    for m in (0, 1, 2, 3, 4, 5, 6, 7, 13):
        a = activations(m, k)
        want = gemm(a, w, backend="reference")
        # The reference rounds through float64: a tie in a few million sums may differ by one unit in the last place.
        np.testing.assert_allclose(gemm(a, w, isa=variant), want, rtol=1.2e-7 * (k // group_size + 1), atol=1e-30)
        np.testing.assert_array_equal(gemm(a, w, isa=variant), gemm(a, w, isa="scalar"))


@pytest.mark.parametrize(("n", "k", "group_size"), [(70, 640, 128), (96, 160, 32), (40, 36, 36)])
def test_numba_twin_has_the_same_bits(gemm, n, k, group_size, symmetric):
    qweight, scales, zeros = weights(n, k, group_size, symmetric)
    w = assay.pack(qweight, scales, zeros, k=k, group_size=group_size)
    a = activations(3, k)
    a[1, 5] = np.nan
    np.testing.assert_array_equal(gemm(a, w, backend="numba"), gemm(a, w))


def test_error_bound_against_float64(variant, symmetric):
    """Derived: w4a8 rounds each activation by at most amax / 254, so |C - AW'| <= sum_k |w| amax_g / 254; w4a16 only
    sums in float32: |C - AW'| <= (K + G + 20) u (sum |x| (q + z) s), u = 2^-24."""
    n, k, g, m = 64, 1024, 32, 5
    qweight, scales, zeros = weights(n, k, g, symmetric)
    w = assay.pack(qweight, scales, zeros)
    a = activations(m, k)
    dense = w.dequantize().astype(np.float64)
    exact = a.astype(np.float64) @ dense.T
    amax = np.repeat(np.abs(a.reshape(m, -1, g)).max(-1), g, axis=1)
    bound8 = (amax / 254) @ np.abs(dense).T * 1.001 + 1e-6
    assert (np.abs(assay.w4a8_gemm(a, w, isa=variant) - exact) <= bound8).all()
    zero = 8 if zeros is None else np.repeat(zeros, g, axis=1)
    size = (reference.unpack_nibbles(qweight, k) + zero) * np.abs(np.repeat(scales.astype(np.float64), g, axis=1))
    bound16 = (g + k // g + 20) * 2.0**-24 * (np.abs(a).astype(np.float64) @ size.T)
    assert (np.abs(assay.w4a16_gemm(a, w, isa=variant) - exact) <= bound16).all()


@pytest.mark.parametrize("group_size", [32, 128, 640])
def test_a_row_has_the_same_bits_in_any_batch(gemm, variant, group_size, symmetric):
    n, k = 100, 640
    w = assay.pack(*weights(n, k, group_size, symmetric), k=k, group_size=group_size)
    a = activations(24, k)
    alone = np.concatenate([gemm(a[i : i + 1], w, isa=variant, num_threads=1) for i in range(24)])
    for m in (2, 3, 5, 7, 8, 11, 16, 24):
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(gemm(a[:m], w, isa=variant, num_threads=threads), alone[:m])
    order = np.random.default_rng(3).permutation(24)
    np.testing.assert_array_equal(gemm(a[order], w, isa=variant), alone[order])


def test_many_rows_have_the_bits_of_few_on_any_number_of_threads(gemm, variant):
    """From 257 rows on threads take several tiles at a time; 35 tiles leave the last one alone."""
    w = assay.pack(*weights(1100, 64, 32, False), k=64, group_size=32)
    a = activations(260, 64)
    want = np.concatenate([gemm(a[i : i + 20], w, isa=variant, num_threads=1) for i in range(0, 260, 20)])
    for threads in (1, 2):
        np.testing.assert_array_equal(gemm(a, w, isa=variant, num_threads=threads), want)


def test_activation_dtypes_are_widened_exactly(gemm, variant):
    w = assay.pack(*weights(48, 128, 32, True))
    half = activations(4, 128, "float16")
    half[0, 0] = 6e-8  # a subnormal float16
    np.testing.assert_array_equal(gemm(half, w, isa=variant), gemm(half.astype(np.float32), w, isa=variant))


@pytest.mark.parametrize(("n", "k", "group_size"), [*SHAPES, (32, 1280, 128), (33, 4096, 32)])
def test_bfloat16_has_the_same_bits_in_every_variant(gemm, variant, n, k, group_size, symmetric):
    w = assay.pack(*weights(n, k, group_size, symmetric), k=k, group_size=group_size)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13):
        a = activations(m, k)
        if m > 4:
            a = a * sizes(a.shape)
            a[1, k // 2], a[2, k // 3], a[3, 0] = np.nan, np.inf, 3.3e38
        got = gemm(BFloat16(a), w, isa=variant)
        np.testing.assert_array_equal(got, gemm(BFloat16(a), w, isa="scalar"))
        if m <= 4:
            np.testing.assert_array_equal(got, gemm(BFloat16(a).widened(), w, isa=variant))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_tiny_bfloat16_counts_as_zero_in_every_backend(backend, symmetric):
    w = assay.pack(*weights(40, 128, 32, symmetric))
    a = activations(5, 128) * sizes((5, 128))
    a[1] = 2.0**-101
    a[2] = 2.0**-100
    half = BFloat16(a)
    wide = half.widened()
    zeroed = np.where(np.abs(wide) < 2.0**-100, np.float32(0), wide)
    got = assay.w4a16_gemm(half, w)
    np.testing.assert_array_equal(got, assay.w4a16_gemm(zeroed, w))
    np.testing.assert_allclose(assay.w4a16_gemm(half, w, backend=backend), got, rtol=1e-6)
    assert (got[1] == 0).all()
    assert got[2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_nan_and_alone(gemm, variant, bad):
    w = assay.pack(*weights(40, 128, 32, True))
    a = activations(6, 128)
    clean = gemm(a, w, isa=variant)
    a[2, 77] = bad
    got = gemm(a, w, isa=variant)
    assert not np.isfinite(got[2]).any()
    keep = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(got[keep], clean[keep])


def test_extreme_activations(variant):
    """Saturating codes in a whole group, subnormal rows (flushed, as documented), the largest floats."""
    n, k = 32, 128
    qweight = np.full((n, k // 2), 0xFF, np.uint8)
    w = assay.pack(qweight, np.ones((n, 1), np.float16), np.zeros((n, 1), np.uint8))
    a = np.stack([np.full(k, 3.0), np.full(k, -3.0), np.full(k, 1e-40), np.full(k, 3e38)]).astype(np.float32)
    got = assay.w4a8_gemm(a, w, isa=variant)
    np.testing.assert_array_equal(got, assay.w4a8_gemm(a, w, isa="scalar"))
    np.testing.assert_allclose(got[0], 3 * 15 * k, rtol=1e-6)
    np.testing.assert_allclose(got[1], -3 * 15 * k, rtol=1e-6)
    assert (got[2] == 0).all()
    assert np.isinf(got[3]).all()


def test_long_rows_in_one_group(variant):
    """A group as long as the row: integer sums near the end of int32's range stay exact."""
    k = 1 << 17
    qweight = np.full((2, k // 2), 0xFF, np.uint8)
    w = assay.pack(qweight, np.full((2, 1), 2.0**-14, np.float16), np.zeros((2, 1), np.uint8), group_size=k)
    a = np.ones((1, k), np.float32)
    for m in (1, 3):
        got = assay.w4a8_gemm(np.repeat(a, m, axis=0), w, isa=variant)
        np.testing.assert_allclose(got, k * 15 * 2.0**-14, rtol=1e-6)


@given(st.integers(1, 80), st.integers(1, 6), st.sampled_from([32, 64, 128, 0]), st.booleans(), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_pack_round_trip_and_gemm_on_random_shapes(n, groups, group_size, symmetric, m):
    k = groups * group_size or 17 * groups
    group_size = group_size or k
    qweight, scales, zeros = weights(n, k, group_size, symmetric)
    w = assay.pack(qweight, scales, zeros, k=k, group_size=group_size)
    for got, want in zip(w.unpack(), (qweight, scales, zeros), strict=True):
        if want is None:
            assert got is None
        else:
            np.testing.assert_array_equal(got, want)
    a = activations(m, k)
    for gemm in OPS.values():
        np.testing.assert_array_equal(gemm(a, w), gemm(a, w, isa="scalar"))


def test_quantize_round_trip_error():
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    for symmetric, worst in ((True, 1 / 16), (False, 1 / 30)):
        packed = assay.pack(*assay.quantize_int4(w, 32, symmetric))
        spread = np.ptp(w.reshape(64, -1, 32), axis=-1)
        if symmetric:
            spread = 2 * np.abs(w.reshape(64, -1, 32)).max(-1)
        error = np.abs(packed.dequantize() - w).reshape(64, -1, 32).max(-1)
        # Half a step, but for symmetric codes at the far end (+8 does not exist) one whole; float16 scales add 2^-11.
        assert (error <= spread * worst * (2 if symmetric else 1) * 1.01).all()


def test_out_is_written_in_place_and_returned(gemm):
    w = assay.pack(*weights(70, 64, 32, True))
    a = activations(3, 64)
    whole = np.full((3, 100), 7, np.float32)
    out = whole[:, :70]
    assert gemm(a, w, out) is out
    np.testing.assert_array_equal(out, gemm(a, w))
    assert (whole[:, 70:] == 7).all()


def test_strided_rows_unaligned_memory_and_buffers(gemm):
    w = assay.pack(*weights(40, 64, 32, False))
    a = activations(5, 64)
    want = gemm(a, w)
    wide = np.zeros((5, 91), np.float32)
    wide[:, 3:67] = a
    np.testing.assert_array_equal(gemm(wide[:, 3:67], w), want)
    raw = bytearray(a.nbytes + 4)
    shifted = np.frombuffer(raw, np.float32, a.size, 4).reshape(a.shape)
    shifted[:] = a
    np.testing.assert_array_equal(gemm(shifted, w), want)
    np.testing.assert_array_equal(gemm(memoryview(a), w), want)


class DLPackOnly:
    """A tensor known only by its DLPack methods."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **_):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device


def test_dlpack_without_a_copy(gemm):
    w = assay.pack(*weights(40, 64, 32, True))
    a = activations(5, 64)
    out = np.empty((5, 40), np.float32)
    wrapped = DLPackOnly(out)
    assert gemm(DLPackOnly(a), w, wrapped) is wrapped
    np.testing.assert_array_equal(out, gemm(a, w))
    with pytest.raises(TypeError, match="w: expected weights on the GPU"):
        gemm(DLPackOnly(a, (2, 0)), w)


def test_torch_tensors(gemm):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = assay.pack(*weights(40, 64, 32, True))
    a = torch.from_numpy(activations(5, 64))
    out = torch.empty(5, 40)
    gemm(a.bfloat16(), w, out)
    np.testing.assert_array_equal(out.numpy(), gemm(a.bfloat16().float().numpy(), w))


def test_caller_brings_threads(variant, symmetric):
    w = assay.pack(*weights(200, 256, 64, symmetric))
    full = activations(9, 256)
    for a, a16, gemm in (
        (full, False, assay.w4a8_gemm),
        (full, True, assay.w4a16_gemm),
        (BFloat16(full), True, assay.w4a16_gemm),
    ):
        split = SplitGemm(a, w, a16=a16, isa=variant)
        barrier = threading.Barrier(3)

        def part(i, split=split, barrier=barrier):
            split.prepare(i, 3)
            barrier.wait()
            split.run(i, 3)

        team = [threading.Thread(target=part, args=(i,)) for i in range(3)]
        for t in team:
            t.start()
        for t in team:
            t.join()
        np.testing.assert_array_equal(split.out, gemm(a, w, isa=variant))


def test_bad_arguments_say_got_and_wanted():
    qweight, scales, zeros = weights(40, 64, 32, False)
    w = assay.pack(qweight, scales, zeros)
    a = activations(2, 64)
    cases = [
        (TypeError, r"qweight: expected uint8, got int32", lambda: assay.pack(qweight.astype(np.int32), scales)),
        (ValueError, r"scales: expected \[N, K/group_size\] = \[40, 2\], got \[39, 2\]", lambda: assay.pack(qweight, scales[:39])),
        (ValueError, r"group_size: expected 32, 64, 128 or K = 64, got 16", lambda: assay.pack(qweight, scales, group_size=16)),
        (ValueError, r"group_size: expected a divisor of K = 64, got 128", lambda: assay.pack(qweight, scales, group_size=128)),
        (ValueError, r"zeros: expected 0..15, got 16", lambda: assay.pack(qweight, scales, np.full_like(zeros, 16))),
        (ValueError, "scales: expected finite", lambda: assay.pack(qweight, np.full_like(scales, np.inf))),
        (ValueError, r"a: expected \[M, K\] with K = 64, got \[2, 32\]", lambda: assay.w4a8_gemm(a[:, :32], w)),
        (ValueError, r"a: expected 2 dimensions, got 1", lambda: assay.w4a8_gemm(a[0], w)),
        (TypeError, r"a: expected float32 or float16 or bfloat16, got float64", lambda: assay.w4a8_gemm(a.astype(float), w)),
        (TypeError, r"a: expected an array .* got list", lambda: assay.w4a8_gemm([[1.0] * 64], w)),
        (ValueError, "a: expected a dense last dimension", lambda: assay.w4a8_gemm(activations(64, 2).T, w)),
        (ValueError, "a: expected rows that do not overlap", lambda: assay.w4a8_gemm(np.broadcast_to(a[:1], (3, 64)), w)),
        (ValueError, r"out: expected shape \[2, 40\], got \[2, 41\]", lambda: assay.w4a8_gemm(a, w, np.empty((2, 41), np.float32))),
        (TypeError, "out: expected float32, got float64", lambda: assay.w4a8_gemm(a, w, np.empty((2, 40)))),
        (TypeError, "w: expected PackedInt4", lambda: assay.w4a8_gemm(a, qweight)),
        (ValueError, "isa: expected one of scalar", lambda: assay.w4a8_gemm(a, w, isa="sse9")),
        (ValueError, "backend: expected one of c, numba, reference, got 'cuda'", lambda: assay.w4a8_gemm(a, w, backend="cuda")),
        (ValueError, "num_threads: expected 1..256", lambda: assay.w4a8_gemm(a, w, num_threads=0)),
        (ValueError, "w: expected finite weights, got nan at", lambda: assay.quantize_int4(np.full((2, 32), np.nan, np.float32))),
        (ValueError, "float16's range", lambda: assay.quantize_int4(np.full((2, 32), 1e9, np.float32))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    read_only = np.empty((2, 40), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        assay.w4a8_gemm(a, w, read_only)


def test_a_variant_that_the_cpu_lacks_is_an_error():
    from assay.ops import info

    lacking = [v["isa"] for v in info.variants() if v["op"] == "int4_gemm" and not (v["compiled"] and v["supported"])]
    if not lacking:
        pytest.skip("this CPU runs every compiled variant")
    w = assay.pack(*weights(32, 32, 32, True))
    with pytest.raises(assay.UnsupportedError, match=f"isa='{lacking[0]}' is not available"):
        assay.w4a8_gemm(activations(1, 32), w, isa=lacking[0])


def test_kernel_reads_nothing_beyond_its_arguments(gemm, variant, guarded):
    """Each buffer ends at a page that faults."""
    n, k = 33, 64
    qweight, scales, zeros = weights(n, k, 32, False)
    a, out = activations(3, k), np.empty((3, n), np.float32)
    plain = assay.pack(qweight, scales, zeros)
    w = assay.pack(guarded(qweight), guarded(scales), guarded(zeros))
    np.testing.assert_array_equal(gemm(guarded(a), w, guarded(out), isa=variant), gemm(a, plain))
    assert lib.assay_w4_packed_bytes(n, k, 32, 0) == w.nbytes

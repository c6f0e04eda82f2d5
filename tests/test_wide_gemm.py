"""Wide GEMM: float32 scales and minimums, codebooks; every variant against the reference, and the batch-invariance contract."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from assay._ffi import lib
from test_int4_gemm import activations

OP = "wide_gemm"

#: MXFP4's and NVFP4's values, twice: scale 2^(e-1).
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], np.float32)
#: QLoRA's normal-float values (bitsandbytes, csrc/kernels.cu).
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
#: The ends of what int8 activations allow.
WIDEST = np.array([-127, 127, -126, 126, 0, 1, -1, 64, -64, 100, -100, 15, 16, 17, -16, -17], np.float32)
CODEBOOKS = {"codes": None, "fp4": FP4, "widest": WIDEST}

# (n, k, group_size): every kind of group; tile - 1, tile, tile + 1 columns; whole rows of awkward length.
SHAPES = [
    (1, 16, 16),
    (31, 96, 16),
    (33, 64, 32),
    (32, 128, 64),
    (70, 256, 128),
    (40, 36, 36),
    (64, 499, 499),
    (33, 1, 1),
]


def weights(n, k, group_size, bits, minimum, seed=0):
    """Operands of pack_wide."""
    rng = np.random.default_rng([seed, n, k, bits])
    if bits == 4:
        q = reference.pack_nibbles(rng.integers(0, 16, (n, k), dtype=np.uint8))
    else:
        q = rng.integers(-128, 128, (n, k), dtype=np.int8)
    scales = rng.uniform(-0.1, 0.1, (n, k // group_size)).astype(np.float32)
    return q, scales, rng.standard_normal(scales.shape).astype(np.float32) if minimum else None


def ops(bits):
    return (assay.w4a8_gemm, assay.w4a16_gemm) if bits == 4 else (assay.w8a8_gemm, assay.w8a16_gemm)


def parts(q, scales, low, codebook, k):
    """|scale v| and scale v, |minimum| and minimum of each weight, float64."""
    book = np.arange(16, dtype=np.float32) if codebook is None else codebook
    v = reference.wide_values(q, book if q.dtype == np.uint8 else None, k).astype(np.float64)
    group = k // scales.shape[1]
    scaled = np.repeat(scales, group, 1) * v
    offset = np.zeros_like(scaled) if low is None else np.repeat(low, group, 1).astype(np.float64)
    return abs(scaled) + abs(offset), scaled + offset


CASES = [(4, name) for name in CODEBOOKS] + [(8, None)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    bits, name = request.param
    return bits, CODEBOOKS.get(name)


@pytest.fixture(params=[False, True], ids=["scale", "minimum"])
def minimum(request):
    return request.param


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_variant_equals_reference_bit_for_bit(variant, case, n, k, group_size, minimum):
    bits, codebook = case
    operands = weights(n, k, group_size, bits, minimum)
    w = assay.pack_wide(*operands, codebook, bits=bits, group_size=group_size)
    size, _ = parts(*operands, codebook, k)
    for gemm in ops(bits):
        for m in (0, 1, 2, 3, 6, 7, 13):
            a = activations(m, k)
            want = gemm(a, w, backend="reference")
            # The reference rounds through float64: on a tie one unit in the last place of a partial sum.
            assert (abs(gemm(a, w, isa=variant) - want) <= 2.0**-23 * 2 * (abs(a) @ size.T)).all()
            np.testing.assert_array_equal(gemm(a, w, isa=variant), gemm(a, w, isa="scalar"))


@pytest.mark.parametrize(("n", "k", "group_size"), [(70, 96, 16), (40, 36, 36)])
def test_numba_twin_has_the_same_bits(case, n, k, group_size, minimum):
    bits, codebook = case
    w = assay.pack_wide(*weights(n, k, group_size, bits, minimum), codebook, bits=bits, group_size=group_size)
    a = activations(3, k)
    a[1, 5] = np.nan
    for gemm in ops(bits):
        np.testing.assert_array_equal(gemm(a, w, backend="numba"), gemm(a, w))


def test_error_bound_against_float64(variant, case, minimum):
    """Derived as for the INT4 GEMM: int8 activations are off by at most amax / 254 each, so |C - AW'| <= sum |w - minimum|
    amax / 254 + sum |minimum| amax / 254; 16-bit ones only sum in float32, (2 G + group) u of the largest parts."""
    bits, codebook = case
    n, k, g, m = 64, 512, 16, 5
    q, scales, low = weights(n, k, g, bits, minimum)
    w = assay.pack_wide(q, scales, low, codebook, bits=bits, group_size=g)
    largest, dense = parts(q, scales, low, codebook, k)
    np.testing.assert_allclose(w.dequantize(), dense, rtol=1e-6, atol=1e-6)
    a = activations(m, k)
    exact = a.astype(np.float64) @ dense.T
    a8, a16 = ops(bits)
    amax = np.repeat(np.abs(a.reshape(m, -1, g)).max(-1), g, axis=1)
    size = np.abs(a).astype(np.float64) @ largest.T
    assert (np.abs(a8(a, w, isa=variant) - exact) <= (amax / 254) @ largest.T * 1.001 + 2.0**-20 * size).all()
    assert (np.abs(a16(a, w, isa=variant) - exact) <= (2 * k // g + g + 20) * 2.0**-24 * size).all()


def test_float_codebooks_run_with_16_bit_activations_only(variant):
    q, scales, _ = weights(70, 128, 64, 4, False)
    w = assay.pack_wide(q, scales, codebook=NF4, bits=4, group_size=64)
    a = activations(5, 128)
    got = assay.w4a16_gemm(a, w, isa=variant)
    np.testing.assert_array_equal(got, assay.w4a16_gemm(a, w, isa="scalar"))
    np.testing.assert_allclose(got, a.astype(np.float64) @ w.dequantize().T.astype(np.float64), atol=1e-4)
    with pytest.raises(ValueError, match=r"codebook of integers in -127..127, got \[-1.0, -0.69"):
        assay.w4a8_gemm(a, w, isa=variant)


@pytest.mark.parametrize("group_size", [16, 640])
def test_a_row_has_the_same_bits_in_any_batch(variant, case, group_size):
    bits, codebook = case
    w = assay.pack_wide(*weights(100, 640, group_size, bits, True), codebook, bits=bits, group_size=group_size)
    a = activations(24, 640)
    for gemm in ops(bits):
        alone = np.concatenate([gemm(a[i : i + 1], w, isa=variant, num_threads=1) for i in range(24)])
        for m in (2, 5, 7, 16, 24):
            for threads in (1, 2, 3):
                np.testing.assert_array_equal(gemm(a[:m], w, isa=variant, num_threads=threads), alone[:m])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_bad_alone(variant, case, minimum, bad):
    bits, codebook = case
    w = assay.pack_wide(*weights(40, 128, 16, bits, minimum), codebook, bits=bits, group_size=16)
    a = activations(6, 128)
    for gemm in ops(bits):
        clean = gemm(a, w, isa=variant)
        spoilt = a.copy()
        spoilt[2, 77] = bad
        got = gemm(spoilt, w, isa=variant)
        assert not np.isfinite(got[2]).any()
        keep = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(got[keep], clean[keep])
        np.testing.assert_array_equal(got, gemm(spoilt, w, isa="scalar"))


def test_extremes_stay_exact(variant):
    """The largest sums of whole-row groups: 2^17 products of -128 and 127 are just inside int32."""
    k = 1 << 17
    scale = np.full((3, 1), 2.0**-14, np.float32)
    eight = assay.pack_wide(np.full((3, k), -128, np.int8), scale, bits=8, group_size=k)
    four = assay.pack_wide(np.zeros((3, k // 2), np.uint8), scale, codebook=WIDEST, bits=4, group_size=k)
    for m in (1, 3):
        a = np.ones((m, k), np.float32)
        np.testing.assert_allclose(assay.w8a8_gemm(a, eight, isa=variant), -128.0 * k * 2.0**-14, rtol=1e-6)
        np.testing.assert_allclose(assay.w4a8_gemm(a, four, isa=variant), -127.0 * k * 2.0**-14, rtol=1e-6)
        np.testing.assert_allclose(assay.w4a8_gemm(-a, four, isa=variant), 127.0 * k * 2.0**-14, rtol=1e-6)


@given(st.integers(1, 80), st.integers(1, 6), st.sampled_from([16, 32, 64, 128, 0]), st.integers(1, 9),
       st.sampled_from([4, 8]), st.booleans())  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_pack_round_trip_and_gemm_on_random_shapes(n, groups, group_size, m, bits, minimum):
    k = groups * group_size or 17 * groups
    group_size = group_size or k
    operands = weights(n, k, group_size, bits, minimum)
    w = assay.pack_wide(*operands, bits=bits, group_size=group_size)
    for got, want in zip(w.unpack(), operands, strict=True):
        if want is None:
            assert got is None
        else:
            np.testing.assert_array_equal(got, want)
    a = activations(m, k)
    for gemm in ops(bits):
        np.testing.assert_array_equal(gemm(a, w), gemm(a, w, isa="scalar"))


def test_half_activations_are_widened_exactly(variant, case):
    bits, codebook = case
    w = assay.pack_wide(*weights(48, 128, 16, bits, True), codebook, bits=bits, group_size=16)
    half = activations(4, 128, "float16")
    for gemm in ops(bits):
        np.testing.assert_array_equal(gemm(half, w, isa=variant), gemm(half.astype(np.float32), w, isa=variant))


def test_kernel_reads_nothing_beyond_its_arguments(variant, case, guarded):
    bits, codebook = case
    q, scales, low = weights(33, 48, 16, bits, True)
    a, out = activations(3, 48), np.empty((3, 33), np.float32)
    plain = assay.pack_wide(q, scales, low, codebook, bits=bits, group_size=16)
    w = assay.pack_wide(guarded(q), guarded(scales), guarded(low), codebook, bits=bits, group_size=16)
    for gemm in ops(bits):
        np.testing.assert_array_equal(gemm(guarded(a), w, guarded(out), isa=variant), gemm(a, plain))
    assert lib.assay_wide_packed_bytes(33, 48, 16, bits, 1) == w.nbytes


def test_bad_arguments_say_got_and_wanted():
    q, scales, low = weights(40, 64, 32, 4, True)
    w = assay.pack_wide(q, scales, low, bits=4, group_size=32)
    a = activations(2, 64)

    def pack(*args, bits=4, group_size=32):
        return lambda: assay.pack_wide(*args, bits=bits, group_size=group_size)

    cases = [
        (ValueError, "bits: expected 4 or 8, got 5", pack(q, scales, bits=5)),
        (TypeError, "qweight: expected int8, got uint8", pack(q, scales, bits=8)),
        (TypeError, "scales: expected float32, got float16", pack(q, scales.astype(np.float16))),
        (ValueError, "scales: expected finite values", pack(q, np.full_like(scales, np.nan))),
        (ValueError, "minimum: expected finite values", pack(q, scales, np.full_like(scales, np.inf))),
        (ValueError, r"minimum: expected \[N, K/group_size\] = \[40, 2\], got \[40, 1\]", pack(q, scales, low[:, :1])),
        (ValueError, r"qweight: expected uint8 \[N, ceil\(K/2\)\] = \[40, 64\]", pack(q, scales, group_size=64)),
        (
            ValueError,
            "group_size: expected 16, 32, 64, 128 or K = 48, got 24",
            pack(q[:, :24].copy(), scales, group_size=24),
        ),
        (ValueError, "scales: expected .* group_size >= 1", pack(q, scales, group_size=0)),
        (ValueError, "codebook: expected 16 finite values, got", pack(q, scales, low, np.zeros(15, np.float32))),
        (ValueError, "codebook: expected 16 finite values, got", pack(q, scales, low, np.full(16, np.inf, np.float32))),
        (ValueError, "codebook: expected None with bits = 8", pack(*weights(4, 32, 32, 8, True), FP4, bits=8)),
        (ValueError, r"w: expected 8-bit weights, got PackedWide\(n=40", lambda: assay.w8a8_gemm(a, w)),
        (TypeError, "w: expected PackedWide", lambda: assay.w8a16_gemm(a, q)),
        (ValueError, r"a: expected \[M, K\] with K = 64", lambda: assay.w4a8_gemm(a[:, :32], w)),
        (ValueError, "backend: expected one of", lambda: assay.w4a8_gemm(a, w, backend="cuda")),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()

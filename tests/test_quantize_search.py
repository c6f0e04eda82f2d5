"""Least-squares search of scales: never worse than rounding to nearest, and what the error report says is so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from assay.quantize import best_scales

SHAPES = [(30, 32, 32), (3, 128, 64), (7, 256, 128), (5, 96, 96), (40, 33, 33)]


def group_errors(w, quantised, group_size, importance=None):
    """Weighted squared error of each group, float64 [N, K / group_size]."""
    n, k = w.shape
    back = reference.dequantize_int4(*quantised, k, group_size).astype(np.float64)
    squares = (back - w) ** 2 * (1 if importance is None else importance.astype(np.float64))
    return squares.reshape(n, -1, group_size).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_group_worse_than_nearest(n, k, group_size, symmetric, weighted):
    rng = np.random.default_rng(k)
    w = rng.standard_t(3, (n, k)).astype(np.float32)
    importance = rng.exponential(size=k).astype(np.float32) ** 3 if weighted else None
    nearest = group_errors(w, assay.quantize_int4(w, group_size, symmetric), group_size, importance)
    searched = assay.quantize_int4(w, group_size, symmetric, method="mse", importance=importance)
    found = group_errors(w, searched, group_size, importance)
    assert (found <= nearest * (1 + 1e-4)).all()  # the search sums in float32
    assert found.sum() < 0.97 * nearest.sum()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-7, 1e-4, 1.0, 1e3]),
    st.sampled_from(["normal", "constant", "sparse", "positive", "outlier"]),
    st.booleans(),
)
def test_no_group_worse_whatever_its_values(seed, size, kind, symmetric):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((4, 64))
    if kind == "constant":
        w[:] = w[:, :1]
    elif kind == "sparse":
        w *= rng.random(w.shape) < 0.05
    elif kind == "positive":
        w = np.abs(w)
    elif kind == "outlier":
        w[:, 3] *= 100
    w = (w * size).astype(np.float32)
    nearest = group_errors(w, assay.quantize_int4(w, 32, symmetric), 32)
    searched = assay.quantize_int4(w, 32, symmetric, method="mse")
    floor = 32 * (1e-7 * size) ** 2  # float32's rounding of errors next to nothing
    assert (group_errors(w, searched, 32) <= nearest * (1 + 1e-4) + floor).all()
    assay.pack(*searched)


@pytest.mark.parametrize("symmetric", [True, False])
def test_finds_weights_that_int4_holds_exactly(symmetric):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (16, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15  # the whole range, so that the scale is determined
    zero = 8 if symmetric else rng.integers(0, 16, (16, 2)).repeat(32, axis=1)
    w = ((codes - zero) * np.float32(0.0078125)).astype(np.float32)
    quantised = assay.quantize_int4(w, 32, symmetric, method="mse")
    assert np.array_equal(reference.dequantize_int4(*quantised, 64, 32), w)


def test_reported_error_is_that_of_the_codes():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 32)).astype(np.float32)
    importance = rng.random((50, 32)).astype(np.float32)
    for symmetric in (True, False):
        scales, zeros, errors = best_scales(x, symmetric, importance)
        step = scales.astype(np.float64)[:, None]
        zero = zeros.astype(np.float64)[:, None]
        codes = np.clip(np.rint(x / step) + zero, 0, 15)
        exact = (importance * ((codes - zero) * step - x) ** 2).sum(-1)
        np.testing.assert_allclose(errors, exact, rtol=1e-4)
        assert symmetric == (zeros == 8).all()


def test_scale_is_a_minimum_among_float16_neighbours():
    x = np.random.default_rng(2).standard_normal((20, 32)).astype(np.float32)
    scales, _, errors = best_scales(x, True)
    for towards in (np.inf, -np.inf):
        step = np.nextafter(scales, np.float16(towards)).astype(np.float64)[:, None]
        off = np.clip(np.rint(x / step), -8, 7) * step - x
        assert ((off**2).sum(-1) >= errors * (1 - 1e-4)).mean() > 0.9  # polishing ends after two rounds


def test_importance_decides_what_is_clipped():
    w = np.full((1, 32), 0.1, np.float32)
    w[0, 0] = 10
    importance = np.ones(32, np.float32)
    importance[0] = 0
    quantised = assay.quantize_int4(w, 32, method="mse", importance=importance)
    back = reference.dequantize_int4(*quantised, 32, 32)
    assert np.abs(back[0, 1:] - 0.1).max() < 0.05
    plain = reference.dequantize_int4(*assay.quantize_int4(w, 32, method="mse"), 32, 32)
    assert abs(plain[0, 0] - 10) < 0.1


def test_zero_groups_and_zero_importance():
    w = np.zeros((2, 64), np.float32)
    w[1, 40] = 0.9375  # 15/16: its fifteenth is a float16
    for symmetric in (True, False):
        for method in ("rtn", "mse"):
            quantised = assay.quantize_int4(w, 32, symmetric, method=method)
            assert np.array_equal(reference.dequantize_int4(*quantised, 64, 32), w)
    none = assay.quantize_int4(w, 32, method="mse", importance=np.zeros(64, np.float32))
    assert np.array_equal(reference.dequantize_int4(*none, 64, 32), w)


def test_rows_do_not_depend_on_each_other():
    w = np.random.default_rng(3).standard_normal((300, 512)).astype(np.float32)
    whole = assay.quantize_int4(w, 128, False, method="mse")
    part = assay.quantize_int4(w[211:240], 128, False, method="mse")
    assert all(np.array_equal(a[211:240], b) for a, b in zip(whole, part, strict=True))


def test_error_report():
    rng = np.random.default_rng(4)
    w, a = (rng.standard_normal(s).astype(np.float32) for s in ((6, 64), (9, 64)))
    quantised = assay.quantize_int4(w, 32, False)
    back = reference.dequantize_int4(*quantised, 64, 32).astype(np.float64)
    report = assay.quantization_error(w, *quantised, activations=a)
    assert report.weight == pytest.approx(np.linalg.norm(back - w) / np.linalg.norm(w.astype(np.float64)), rel=1e-12)
    a64 = a.astype(np.float64)
    exact = np.linalg.norm(a64 @ (back - w).T) / np.linalg.norm(a64 @ w.T.astype(np.float64))
    assert report.output == pytest.approx(exact, rel=1e-12)
    assert assay.quantization_error(w, *quantised) == (report.weight, None)
    nothing = np.zeros((6, 64), np.float32)
    assert assay.quantization_error(nothing, *assay.quantize_int4(nothing), activations=a) == (0.0, 0.0)
    assert assay.quantization_error(nothing, *quantised).weight == np.inf


W = np.ones((2, 64), np.float32)
Q = assay.quantize_int4(W)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "group_size: expected a divisor of K = 48", lambda: assay.quantize_int4(W[:, :48], 32, method="mse")),
        (ValueError, "w: expected finite weights, got inf at", lambda: assay.quantize_int4(W * np.inf, method="mse")),
        (ValueError, "float16's range", lambda: assay.quantize_int4(W * np.float32(1e9), method="mse")),
        (ValueError, "method: expected one of rtn, mse, gptq, got 'best'", lambda: assay.quantize_int4(W, method="best")),
        (ValueError, "importance: expected only with method 'mse'", lambda: assay.quantize_int4(W, importance=W[0])),
        (ValueError, r"importance: expected float32 \[K\] = \[64\]", lambda: assay.quantize_int4(W, method="mse", importance=W[0, 1:])),
        (ValueError, "importance: expected values of at least 0", lambda: assay.quantize_int4(W, method="mse", importance=-W[0])),
        (ValueError, "importance: expected finite", lambda: assay.quantize_int4(W, method="mse", importance=W[0] * np.nan)),
        (TypeError, "importance: expected float32", lambda: assay.quantize_int4(W, method="mse", importance=W[0].astype(int))),
        (ValueError, "qweight: expected uint8", lambda: assay.quantization_error(W, Q[0][:1], Q[1])),
        (ValueError, "scales: expected", lambda: assay.quantization_error(W, Q[0], Q[1], group_size=64)),
        (ValueError, "scales: expected", lambda: assay.quantization_error(W, Q[0], Q[1][:, :0])),
        (ValueError, "zeros: expected", lambda: assay.quantization_error(W, Q[0], Q[1], np.zeros((2, 1), np.uint8))),
        (ValueError, "activations: expected", lambda: assay.quantization_error(W, Q[0], Q[1], activations=W[:, 1:])),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()

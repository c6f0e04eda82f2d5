"""GPTQ: against a literal implementation of the paper, and against rounding to nearest on correlated activations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from assay.quantize import inverse_factor, quantize_gptq


def correlated(t, k, seed=0):
    """Activations [T, K] of which a few directions hold nearly all."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * (0.9 ** np.arange(k))[:, None]
    return (rng.standard_normal((t, k)) @ mix + 0.01 * rng.standard_normal((t, k))).astype(np.float32)


def weights(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def output_error(w, quantised, a):
    return assay.quantization_error(w, *quantised, activations=a).output


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (256, 32), (384, 128), (200, 200), (35, 35)])
def test_beats_the_search_on_correlated_activations(k, group_size, symmetric, act_order):
    w, a = weights(24, k), correlated(600, k)
    fresh = correlated(600, k)[300:]  # from the same distribution
    searched = assay.quantize_int4(w, group_size, symmetric, method="mse")
    found = assay.quantize_int4(w, group_size, symmetric, method="gptq", activations=a[:300], act_order=act_order)
    assert output_error(w, found, a[:300]) < 0.6 * output_error(w, searched, a[:300])
    assert output_error(w, found, fresh) < 0.6 * output_error(w, searched, fresh)
    packed = assay.pack(*found, k=k)
    assert np.array_equal(packed.dequantize(), reference.dequantize_int4(*found, k, group_size))


def paper(w, hessian, scales, zeros, group_size, order, percdamp):
    """Algorithm 1 of arXiv 2210.17323 without blocks, with scales given: codes [N, K]."""
    h = hessian[np.ix_(order, order)].astype(np.float64)
    h += percdamp * np.mean(np.diag(h)) * np.eye(len(h))
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    left, codes = w[:, order].astype(np.float64), np.zeros(w.shape, np.uint8)
    for i, column in enumerate(order):
        step, zero = (
            scales[:, column // group_size].astype(np.float64),
            zeros[:, column // group_size].astype(np.float64),
        )
        q = np.clip(np.rint(left[:, i] / step) + zero, 0, 15)
        codes[:, column] = q
        left[:, i + 1 :] -= np.outer((left[:, i] - (q - zero) * step) / factor[i, i], factor[i, i + 1 :])
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("k", "group_size"), [(64, 32), (320, 64), (288, 96), (384, 192)])
def test_equals_the_paper(k, group_size, act_order):
    """In float32 and by blocks a code may differ where the exact one lies at a tie, and what follows from it; the
    error of the output must be the paper's."""
    w, a = weights(8, k), correlated(400, k)
    h = (a.T @ a).astype(np.float64)
    qweight, scales, zeros = quantize_gptq(w, h, group_size, False, act_order=act_order)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(k)
    codes = paper(w, h, scales, zeros, group_size, order, 0.01)
    assert (reference.unpack_nibbles(qweight, k) == codes).mean() > 0.98
    exact = output_error(w, (reference.pack_nibbles(codes), scales, zeros), a)
    assert output_error(w, (qweight, scales, zeros), a) == pytest.approx(exact, rel=0.02)


def test_uncorrelated_activations_are_the_weighted_search():
    """With a diagonal Hessian no error has anywhere to go."""
    w = weights(5, 128)
    power = np.linspace(0.1, 2, 128, dtype=np.float32)
    for act_order in (False, True):
        found = assay.quantize_int4(w, 32, method="gptq", hessian=np.diag(power), act_order=act_order)
        searched = assay.quantize_int4(w, 32, method="mse", importance=power)
        back = [reference.dequantize_int4(*x, 128, 32) for x in (found, searched)]
        np.testing.assert_allclose(*(((b - w) ** 2 * power).sum() for b in back), rtol=1e-4)


def test_factor():
    a = correlated(300, 40).astype(np.float64)
    h = a.T @ a
    u = inverse_factor(h, 0.01)
    assert np.array_equal(u, np.triu(u))
    damped = h + 0.01 * np.diag(h).mean() * np.eye(40)
    np.testing.assert_allclose(u.T @ u @ damped, np.eye(40), atol=1e-8)


@pytest.mark.parametrize("percdamp", [0.0, 0.01])
def test_singular_hessian(percdamp):
    """Fewer activations than columns."""
    w, a = weights(6, 128), correlated(5, 128)
    found = assay.quantize_int4(w, 32, method="gptq", activations=a, percdamp=percdamp)
    assert output_error(w, found, a) < 0.5 * output_error(w, assay.quantize_int4(w, 32), a)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_rounded_to_nearest(act_order):
    w, a = weights(6, 64), correlated(200, 64)
    dead = [0, 7, 33, 63]
    a[:, dead] = 0
    qweight, scales, _ = assay.quantize_int4(w, 32, method="gptq", activations=a, act_order=act_order)
    q = reference.unpack_nibbles(qweight, 64)
    step = scales.astype(np.float32).repeat(32, axis=1)
    assert np.array_equal(q[:, dead], np.clip(np.rint(w[:, dead] / step[:, dead]) + 8, 0, 15))


def test_no_activations_at_all_round_to_nearest():
    w = weights(3, 64)
    found = assay.quantize_int4(w, 32, method="gptq", hessian=np.zeros((64, 64)))
    searched = assay.quantize_int4(w, 32, method="mse")
    assert all(np.array_equal(x, y) for x, y in zip(found[:2], searched[:2], strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-12, 1e12), st.booleans(), st.booleans())
def test_scale_of_the_hessian_does_not_matter(seed, factor, symmetric, act_order):
    w, a = weights(3, 64, seed), correlated(80, 64, seed)
    h = (a.T @ a).astype(np.float64)
    found = [
        assay.quantize_int4(w, 32, symmetric, method="gptq", hessian=x, act_order=act_order) for x in (h, h * factor)
    ]
    errors = [output_error(w, x, a) for x in found]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)  # roundings differ; ties may fall the other way


def test_hessian_and_activations_agree():
    w, a = weights(4, 64), correlated(100, 64)
    h = a.astype(np.float64).T @ a.astype(np.float64)
    by_hessian = assay.quantize_int4(w, 64, method="gptq", hessian=h)
    by_activations = assay.quantize_int4(w, 64, method="gptq", activations=a)
    assert all(np.array_equal(x, y) for x, y in zip(by_hessian[:2], by_activations[:2], strict=True))
    assert by_hessian[2] is None


def test_rows_do_not_depend_on_each_other(monkeypatch):
    w, a = weights(40, 64), correlated(100, 64)
    whole = assay.quantize_int4(w, 32, False, method="gptq", activations=a)
    monkeypatch.setattr("assay.quantize.gptq._CHUNK", 64 * 7)
    by_sevens = assay.quantize_int4(w, 32, False, method="gptq", activations=a)
    assert all(np.array_equal(x, y) for x, y in zip(whole, by_sevens, strict=True))


W = np.ones((2, 64), np.float32)
EYE = np.eye(64)


def call(**arguments):
    return lambda: assay.quantize_int4(W, 32, method="gptq", **arguments)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "expected activations or hessian, got neither", call()),
        (ValueError, "expected activations or hessian, got both", call(activations=W, hessian=EYE)),
        (ValueError, "activations: expected float32", call(activations=W[:, :32])),
        (ValueError, "activations: expected float32", call(activations=W[:0])),
        (TypeError, "activations: expected float32", call(activations=EYE)),
        (ValueError, "activations: expected finite values, got nan", call(activations=W * np.nan)),
        (ValueError, r"hessian: expected \[K, K\] = \[64, 64\]", call(hessian=EYE[:, :32])),
        (ValueError, "hessian: expected finite values, got inf", call(hessian=EYE + np.inf)),
        (ValueError, "hessian: expected a symmetric matrix", call(hessian=np.triu(EYE + 1))),
        (ValueError, "hessian: expected a symmetric matrix", call(hessian=-EYE)),
        (ValueError, "hessian: expected a positive semidefinite matrix", call(hessian=5 - 4 * EYE)),
        (ValueError, "percdamp: expected a finite number", call(hessian=EYE, percdamp=-1.0)),
        (ValueError, "percdamp: expected a finite number", call(hessian=EYE, percdamp=np.nan)),
        (ValueError, "importance: expected only with method 'mse'", call(hessian=EYE, importance=W[0])),
        (ValueError, "hessian: expected only with method 'gptq'", lambda: assay.quantize_int4(W, hessian=EYE)),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()

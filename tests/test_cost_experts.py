"""Distinct experts: closed forms against enumeration, and the bounds k <= U <= min(E, kT)."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.cost import experts


@st.composite
def shapes(draw):
    e = draw(st.integers(1, 512))
    return e, draw(st.integers(1, e))


def inside(u, e, k, tokens):
    return k * (1 - 1e-9) <= u <= min(e, k * tokens) * (1 + 1e-9)


@pytest.mark.parametrize(("e", "k", "t"), [(4, 2, 2), (4, 1, 3), (5, 2, 2), (3, 3, 2)])
def test_uniform_is_the_mean_over_all_choices(e, k, t):
    choices = list(itertools.combinations(range(e), k))
    union = [len(set().union(*picked)) for picked in itertools.product(choices, repeat=t)]
    assert float(experts.uniform(e, k, t)) == pytest.approx(np.mean(union))


@pytest.mark.parametrize(
    ("e", "k", "published"),
    [(8, 2, [2, 3.5, 5.5, 7.2, 7.9, 8, 8]), (64, 8, [8, 15, 26.5, 42, 56.4, 63.1, 64]),
     (256, 8, [8, 15.8, 30.5, 57.4, 102, 163.3, 222.4])],
)  # fmt: skip
def test_uniform_against_published_tables(e, k, published):
    np.testing.assert_allclose(experts.uniform(e, k, 2 ** np.arange(7)), published, atol=0.051)


@given(shapes(), st.integers(1, 10000))
def test_uniform_bounds_and_monotone(shape, tokens):
    u = experts.uniform(*shape, np.array([tokens, tokens + 1]))
    assert inside(u[0], *shape, tokens)
    assert u[0] <= u[1]


@given(shapes(), st.floats(0, 3), st.integers(1, 5000))
def test_skew_touches_fewer(shape, alpha, tokens):
    e, k = shape
    p = experts.power_law_popularity(e, k, alpha)
    assert p.sum() == pytest.approx(k)
    assert np.all((p >= 0) & (p <= 1 + 1e-12))
    assert np.all(np.diff(p) <= 1e-12)
    u = float(experts.skewed(np.minimum(p, 1), tokens))
    assert inside(u, e, k, tokens)
    assert u <= float(experts.uniform(e, k, tokens)) * (1 + 1e-9)


@given(shapes(), st.integers(1, 64), st.floats(0, 1))
def test_tokens_of_one_request_touch_fewer(shape, width, exponent):
    u = float(experts.within_request(*shape, width, exponent))
    assert inside(u, *shape, width)
    assert u <= float(experts.uniform(*shape, width)) * (1 + 1e-12)


def test_within_request_against_measured_captures():
    """Consecutive tokens, Qwen3.6-35B-A3B (E = 256, k = 8), mean over data sets: Doubleword/specdec-calibration."""
    measured = [8, 12.9, 17.3, 21.3, 28.4, 34.7, 45.4, 54.2]
    predicted = experts.within_request(256, 8, [1, 2, 3, 4, 6, 8, 12, 16])
    assert np.abs(predicted / measured - 1).max() < 0.02


@given(shapes(), st.integers(1, 300), st.integers(1, 32))
def test_batches_of_verifies(shape, batch, width):
    e, k = shape
    u = experts.batch_of_verifies(e, k, [batch, batch + 1], width)
    assert inside(u[0], e, k, batch * width)
    assert u[0] <= u[1]
    assert float(experts.batch_of_verifies(e, k, batch, 1)) == pytest.approx(float(experts.uniform(e, k, batch)))
    assert float(experts.batch_of_verifies(e, k, 1, width)) == pytest.approx(float(experts.within_request(e, k, width)))


@given(shapes(), st.floats(0, 2), st.integers(1, 100), st.integers(1, 16))
def test_skewed_batches_of_verifies_keep_the_bounds(shape, alpha, batch, width):
    e, k = shape
    p = np.minimum(experts.power_law_popularity(e, k, alpha), 1)
    u = float(experts.batch_of_verifies(e, k, batch, width, popularity=p))
    assert inside(u, e, k, batch * width)


@given(shapes(), st.integers(1, 10000))
def test_rows_of_an_expert(shape, tokens):
    rows = float(experts.tokens_per_expert(shape[1], tokens, experts.uniform(*shape, tokens)))
    assert 1 <= rows <= tokens * (1 + 1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: experts.uniform(0, 1, 1), "num_experts: expected at least 1, got 0"),
        (lambda: experts.uniform(8, 9, 1), r"top_k: expected 1 to num_experts \(8\), got 9"),
        (lambda: experts.uniform(8, 2, 0), "tokens: expected finite numbers of at least 1, got 0"),
        (lambda: experts.uniform(8, 2, math.nan), "tokens"),
        (lambda: experts.skewed([0.5, 1.5], 1), "popularity"),
        (lambda: experts.skewed([0.1, 0.1], 1), "sum of k >= 1"),
        (lambda: experts.within_request(8, 2, 4, 1.5), "exponent: expected 0 to 1, got 1.5"),
        (lambda: experts.power_law_popularity(8, 2, -1), "alpha"),
        (lambda: experts.batch_of_verifies(8, 2, 1, 1, popularity=[0.5, 0.5]), "expected 8 values that sum to 2"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""K-SEQ's rho, which the C kernels find without a pass for each bisection, is the number that the bisections give."""

import numpy as np
import pytest

import assay
from assay.reference.verification import kseq_rho

OP = "spec_verify"
MOST = 1 - 2.0**-53


def laws(name, vocab, rng):
    """(float32 logits [V], float32 q [V])"""
    logits = (2 * rng.standard_normal(vocab)).astype(np.float32)
    p = np.exp(logits - logits.max().astype(np.float64))
    p /= p.sum()
    if name == "uniform draft":
        q = np.full(vocab, 1 / vocab)
    elif name == "equal":
        q = p
    elif name == "nearly equal":
        q = p * (1 + 1e-5 * rng.standard_normal(vocab))
    elif name == "apart":
        q = p[::-1].copy()
        q[np.argmax(p)] = 0
    elif name == "two ratios":
        q = p * np.where(rng.random(vocab) < 0.5, 0.4, 1.7)
    else:
        q = rng.exponential(size=vocab) ** 6
    return logits, (q / q.sum()).astype(np.float32)


def largest_accepted(logits, q, token, count, **how):
    """The greatest uniform number by which the first of `count` siblings stands, by bisection: p / (rho q)."""
    rows = np.tile(logits, (count + 1, 1))
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        uniforms = np.array([u, *[MOST] * (count + 1)])
        got = assay.verify(
            rows, np.full(count, token, np.int32), np.array([0, count], np.int32), parents=np.full(count, -1, np.int32),
            draft_probs=np.tile(q, (count, 1)), rule="kseq", uniforms=uniforms, **how,
        )  # fmt: skip
        low, high = (u, high) if got.num_accepted[0] else (low, u)
    return low


@pytest.mark.parametrize("count", [2, 3, 8, 30])
@pytest.mark.parametrize("law", ["uniform draft", "equal", "nearly equal", "apart", "two ratios", "peaked draft"])
def test_rho_is_that_of_the_bisection(law, count, variant):
    logits, q = laws(law, 2500, np.random.default_rng(count))
    p = np.exp(logits - logits.max().astype(np.float64))
    p /= p.sum()
    token = int(np.argmax(np.where(p > 0, q / p, 0)))
    found = largest_accepted(logits, q, token, count, isa=variant)
    assert found == largest_accepted(logits, q, token, count, backend="numba")
    rho = kseq_rho(p, q.astype(np.float64), count)
    if law != "equal":  # there 1 - (1 - beta)^K - rho beta is 0 for every rho, up to what float32 rounds
        assert found == pytest.approx(p[token] / (rho * q[token]), rel=4e-5 * count)


def test_a_draft_law_that_is_none_is_a_status(variant):
    logits, q = laws("uniform draft", 5000, np.random.default_rng(1))
    for bad in (np.nan, np.inf, -1e-9):
        wrong = q.copy()
        wrong[4321] = bad
        got = assay.verify(np.tile(logits, (3, 1)), np.array([1, 2], np.int32), np.array([0, 2], np.int32),
                           parents=np.array([-1, -1], np.int32), draft_probs=np.tile(wrong, (2, 1)), rule="kseq",
                           uniforms=np.full(4, 0.5), isa=variant)  # fmt: skip
        assert got.status[0] != 0
        assert (got.output_token_ids == -1).all()

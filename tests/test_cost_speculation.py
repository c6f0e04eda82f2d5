"""Expected lengths against enumeration of what can happen, and the step and money that follow."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.cost import economics, speculation

rates = st.lists(st.floats(0, 1), max_size=8)


def enumerated_chain(acceptance):
    """Mean tokens over all outcomes of independent coins, the first failure ending the chain."""
    total = 0.0
    for outcome in itertools.product([True, False], repeat=len(acceptance)):
        chance = math.prod(a if ok else 1 - a for a, ok in zip(acceptance, outcome, strict=True))
        total += chance * (1 + next((i for i, ok in enumerate(outcome) if not ok), len(outcome)))
    return total


@given(rates)
def test_chain_is_the_enumerated_mean(acceptance):
    assert speculation.chain_length(acceptance) == pytest.approx(enumerated_chain(acceptance))


@given(st.floats(0, 0.99), st.integers(0, 20))
def test_equal_rates_give_the_closed_form(a, g):
    assert speculation.chain_length_iid(a, g) == pytest.approx((1 - a ** (g + 1)) / (1 - a))


@given(rates)
def test_a_tree_without_branches_is_a_chain(acceptance):
    parents = list(range(-1, len(acceptance) - 1))
    assert speculation.tree_length(parents, acceptance) == pytest.approx(speculation.chain_length(acceptance))


def test_tree_by_hand():
    #   root -> 0 (.6) -> 2 (.5) ; root -> 1 (.3) -> 3 (.4)
    assert speculation.tree_length([-1, -1, 0, 1], [0.6, 0.3, 0.5, 0.4]) == pytest.approx(1 + 0.6 + 0.3 + 0.3 + 0.12)
    assert speculation.tree_length([], []) == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: speculation.chain_length([0.5, 1.1]), r"acceptance\[1\]: expected a probability, got 1.1"),
        (lambda: speculation.chain_length([math.nan]), r"acceptance\[0\]"),
        (lambda: speculation.chain_length_iid(0.5, -1), "num_draft: expected at least 0, got -1"),
        (lambda: speculation.tree_length([0], [0.5]), r"parents\[0\]: expected -1 or a node before 0, got 0"),
        (lambda: speculation.tree_length([-1, -1], [0.7, 0.7]), "sum to at most 1, got 1.4"),
        (lambda: speculation.tree_length([-1], []), r"acceptance: expected one value a node \(1\), got 0"),
        (lambda: step(verify_s=math.nan), "verify_s"),
        (lambda: step(verify_s=0.0), "above 0"),
        (lambda: step(tokens_per_step=0.5), "tokens_per_step: expected a finite number of at least 1, got 0.5"),
        (lambda: speculation.best_num_draft([0.5], [1.0], 0.1), "verify_s: expected 2 times, got 1"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def step(**changed):
    given_ = {"draft_s": 0.1, "num_draft": 4, "verify_s": 1.2, "plain_step_s": 1.0, "tokens_per_step": 3.2, "batch": 2}
    return speculation.speculative_step(**given_ | changed)


def test_step():
    made = step()
    assert made.step_s == pytest.approx(1.6)
    assert made.time_per_token_s == pytest.approx(0.5)
    assert made.tokens_per_s == pytest.approx(4.0)
    assert made.speedup == pytest.approx(2.0)
    assert step(fixed_s=0.4).speedup == pytest.approx(1.6)


def test_no_drafts_cost_nothing_and_gain_nothing():
    assert step(num_draft=0, verify_s=1.0, tokens_per_step=1.0).speedup == pytest.approx(1.0)


def test_best_number_of_drafts_sees_cliffs():
    acceptance = [0.8] * 6
    smooth = [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3]
    cliff = [1.0, 1.05, 1.1, 3.0, 3.05, 3.1, 3.15]
    assert speculation.best_num_draft(acceptance, smooth, 0.05)[0] == 6
    best, time = speculation.best_num_draft(acceptance, cliff, 0.05)
    assert best == 2
    assert time == pytest.approx((0.1 + 1.1) / 2.44)
    assert speculation.best_num_draft([0.1] * 3, [1.0, 1.5, 2.0, 2.5], 0.1) == (0, 1.0)
    assert speculation.best_num_draft([0.2], [1.0, 1.0], 0.1, fixed_s=5.0)[0] == 0


# ---- money ----


def test_dollars():
    # 1000 tokens/s at $3.6 an hour: a dollar buys a million tokens.
    assert economics.usd_per_million_tokens(3.6, 1000) == pytest.approx(1.0)
    assert economics.usd_per_million_tokens(3.6, 1000, num_devices=2, utilisation=0.5) == pytest.approx(4.0)
    assert economics.usd_per_million_tokens(0.0, 1000) == 0.0


def test_served_tokens():
    assert economics.served_tokens_per_s(4, 100, 0.5, 0.02) == pytest.approx(400 / (2 + 2))
    assert economics.served_tokens_per_s(4, 100, 0.0, 0.02) == pytest.approx(4 / 0.02)


def test_critical_batch():
    # TPU v5e: 197 Tflop/s bf16, 819 GB/s: the JAX scaling book's 240 with two bytes a weight.
    assert economics.critical_batch(197e12, 819e9, 2.0) == pytest.approx(240.5, abs=0.1)
    assert economics.critical_batch(197e12, 819e9, 0.5) == pytest.approx(60.1, abs=0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: economics.usd_per_million_tokens(-1, 1),
            "usd_per_hour: expected a finite number of at least 0, got -1",
        ),
        (lambda: economics.usd_per_million_tokens(math.nan, 1), "usd_per_hour"),
        (lambda: economics.usd_per_million_tokens(1, 0), "tokens_per_s"),
        (lambda: economics.usd_per_million_tokens(1, 1, utilisation=1.5), "utilisation"),
        (lambda: economics.usd_per_million_tokens(1, 1, num_devices=0), "num_devices"),
        (lambda: economics.served_tokens_per_s(0, 1, 1, 1), "batch, osl"),
        (lambda: economics.served_tokens_per_s(1, 1, -1, 1), "prefill_s"),
        (lambda: economics.critical_batch(1, math.inf, 1), "bytes_per_s"),
    ],
)
def test_bad_money(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""The exact law of every rule, through the kernels: total variation from the target, no sampling error."""

import itertools

import numpy as np
import pytest

import assay
from speculation_law import Tree

OP = "spec_verify"  # whose variants are tested
CHAIN, PAIR, FORK, BUSH = (-1, 0, 1), (-1, -1), (-1, -1, 0), (-1, -1, 0, 0)
WITHOUT = ("specinfer_without_replacement", "traversal_without_replacement")
SAMPLED_DRAFTS = ("sampled", "specinfer", "kseq", "traversal", *WITHOUT)
# Of float32 probabilities (a few 1e-7 each) and bisection to 2^-34. Where float32 rounds nothing, tests/test_speculation_exact.py
# holds the same kernels against 1e-12.
BOUND = 1e-6
CASES = [(CHAIN, rule, True) for rule in ("rejection", "block")]
CASES += [(tree, rule, False) for tree in (CHAIN, PAIR, FORK, BUSH) for rule in SAMPLED_DRAFTS]


@pytest.mark.parametrize(("parents", "rule", "chain"), CASES)
def test_kernels_emit_exactly_the_target_law(variant, parents, rule, chain):
    tree = Tree(3, parents, seed=1)
    tv, _ = tree.distance(bits=34, rule=rule, chain=chain, replaced=rule not in WITHOUT, isa=variant)
    assert tv <= BOUND


@pytest.mark.parametrize("parents", [CHAIN, PAIR, FORK, BUSH])
@pytest.mark.parametrize("rule", ["sampled", "target_only", "specinfer", "specinfer_without_replacement", "traversal"])
def test_kernels_emit_the_target_law_for_certain_drafts(variant, parents, rule):
    """One-hot drafts: for every draft, duplicates among siblings and impossible tokens included."""
    drafts = list(itertools.product(range(3), repeat=len(parents)))[:: 1 if len(parents) < 4 else 5]
    tv, _ = Tree(3, parents, seed=2).distance(bits=34, rule=rule, one_hot=True, drafts=drafts, isa=variant)
    assert tv <= 1e-6


@pytest.mark.parametrize(
    ("parents", "rule", "chain"),
    [((-1, 0), "rejection", True), ((-1, 0), "block", True), ((-1, -1), "kseq", False), ((-1, -1), "specinfer", False),
     ((-1, -1, 0), "traversal", False), ((-1, -1), WITHOUT[0], False), ((-1, -1), WITHOUT[1], False)],
)  # fmt: skip
def test_reference_emits_exactly_the_target_law(parents, rule, chain):
    tree = Tree(3, parents, seed=1, exact=True)
    replaced = rule not in WITHOUT
    tv, _ = tree.distance(bits=50, rule=rule, chain=chain, replaced=replaced, backend="reference")
    assert tv <= 1e-12


@pytest.mark.parametrize("rule", ["sampled", "target_only"])
def test_reference_emits_the_target_law_for_certain_drafts(rule):
    drafts = [(0, 1), (1, 1), (2, 1)]
    tv, _ = Tree(3, PAIR, seed=1).distance(bits=50, rule=rule, one_hot=True, drafts=drafts, backend="reference")
    assert tv <= 1e-12


def test_lossy_rules_and_wrong_drafts_are_seen_to_be_biased():
    tree = Tree(3, BUSH, seed=1)
    drafts = [(1, 2, 1, 2), (2, 1, 0, 1)]
    assert tree.distance(bits=20, rule="typical")[0] > 0.1
    for how in ({"threshold_acc": 0.9}, {"threshold_single": 0.3}):
        assert tree.distance(bits=20, rule="target_only", one_hot=True, drafts=drafts, **how)[0] > 0.01
    for rule in ("specinfer", "traversal"):  # drawn without replacement, verified as if with
        assert tree.distance(bits=20, rule=rule, replaced=False)[0] > 1e-3
    assert tree.distance(bits=20, rule="target_only")[0] < 1e-5  # lossless for any drafts, sampled ones too


@pytest.mark.parametrize("rule", WITHOUT)
@pytest.mark.parametrize("parents", [PAIR, BUSH])
def test_independent_drafts_with_the_repeated_passed_over_are_drawn_without_replacement(parents, rule):
    assert Tree(3, parents, seed=1).distance(bits=34, rule=rule, replaced=True)[0] <= 1e-6


def test_acceptance_orders_as_the_papers_prove():
    chain = Tree(3, CHAIN, seed=1)
    _, token = chain.distance(bits=30, rule="rejection", chain=True)
    _, block = chain.distance(bits=30, rule="block", chain=True)
    assert block > token + 0.01
    _, exact = chain.distance(bits=30, rule="sampled", chain=True)
    assert token > exact


def test_lossless_flag():
    tree = Tree(3, PAIR, seed=1)
    drafts, u = [(1, 2)], np.full((1, 4), 0.5)
    for rule in assay.ops.speculative.RULES:
        if rule in ("rejection", "block", "gumbel"):
            continue
        assert tree.run(drafts, u, rule=rule).lossless == (rule != "typical")
    assert not tree.run(drafts, u, rule="target_only", threshold_acc=0.5).lossless
    assert not tree.run(drafts, u, rule="target_only", threshold_single=0.5).lossless
    assert tree.run(drafts, u, rule="typical", temperature=0.0).lossless  # greedy

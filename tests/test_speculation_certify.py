"""The certifier: lossless rules come out lossless, lossy and mistaken practices do not; the transport bound."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.speculation import policies
from assay.speculation.certify import certify, random_models
from assay.speculation.enumerate import Draw, enumerate_law, uniform_law
from assay.speculation.transport import acceptance, all_inside, kseq_rho, transport_bound
from mistaken_policies import (
    MISTAKES,
    mismatch_drawn_anew,
    one_target_draw_per_node,
    stops_after_an_unsure_token,
    target_only_with,
    typical,
)  # fmt: skip

# ---- the enumerator --------------------------------------------------------------------------------------------------


def test_enumerate_law_of_two_dice():
    third = Fraction(1, 3)

    def program(draw):
        a = draw.choose([third] * 3)
        return a + draw.choose([1, 0, 2]) if draw.accept(Fraction(1, 4)) else a

    law, runs = enumerate_law(program)
    assert law == {0: third * Fraction(5, 6), 1: third * Fraction(5, 6), 2: third, 3: third / 6, 4: third / 6}
    assert runs == 9
    assert sum(law.values()) == 1


def test_enumeration_is_bounded_and_refuses_bad_weights():
    with pytest.raises(ValueError, match="program: expected at most 100 ways"):
        enumerate_law(lambda draw: tuple(draw.choose([1, 1]) for _ in range(10)), max_paths=100)
    for weights, message in (([0.5, -0.1], r"weights\[1\]"), ([np.nan], r"weights\[0\]"), ([0, 0], "got none")):
        with pytest.raises(ValueError, match=message):
            Draw().choose(weights)


def test_uniform_law_finds_every_threshold():
    """Two coins and a die that is cast only when the second coin says so."""

    def run(program, u):
        first = u[:, 0] < 0.3 + 0.2 * program
        second = u[:, 1] < 0.25
        die = np.searchsorted([0.1, 0.6], u[:, 2], side="right")
        return np.stack([first, np.where(first, -1, np.where(second, die, 9))], axis=1).astype(int)

    laws, boxes = uniform_law(run, 2, 3, bits=50)
    for program, law in enumerate(laws):
        p = 0.3 + 0.2 * program
        want = {(1, -1): p, (0, 9): (1 - p) * 0.75}
        want |= {(0, d): (1 - p) * 0.25 * w for d, w in enumerate((0.1, 0.5, 0.4))}
        assert law.keys() == want.keys()
        for outcome in want:
            assert law[outcome] == pytest.approx(want[outcome], abs=1e-13)
    assert boxes <= 14


def test_uniform_law_notices_what_its_corners_do_not_show():
    with pytest.raises(ValueError, match="expected outcomes on intervals"):
        uniform_law(lambda _, u: ((u[:, :1] > 0.1) & (u[:, :1] < 0.9)).astype(int), 64, 1)


# ---- rules that are lossless ------------------------------------------------------------------------------------------

LOSSLESS = {
    "rejection": policies.rejection(2),
    "block": policies.block(2),
    "block of three": policies.block(3),
    "specinfer": policies.multi_round([3, 1]),
    "specinfer without replacement": policies.multi_round([2, 2], replacement=False),
    "target only": policies.target_only([2, 1]),
    "sampled": policies.matching(2),
    "K-SEQ": policies.k_seq(2, rho=Fraction(2)),
    "traversal": policies.traversal([-1, -1, 0]),
    "traversal of a chain": policies.traversal([-1, 0]),
    "traversal without replacement": policies.traversal([-1, -1, 0], replacement=False),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_rules_are_exactly_so(name):
    """As fractions: no tolerance at all."""
    found = certify(LOSSLESS[name], exact=True)
    assert found.lossless
    assert found.total_variation == 0
    assert found.counter_example is None
    in_floats = certify(LOSSLESS[name])
    assert in_floats.lossless
    assert in_floats.total_variation <= 1e-12
    assert in_floats.expected_accepted == pytest.approx(found.expected_accepted, abs=1e-12)


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_k_seq_is_lossless_and_needs_its_rho(drafts):
    assert certify(policies.k_seq(drafts), vocab=4).total_variation <= 1e-12
    assert certify(policies.k_seq(drafts, rho=float(drafts))).total_variation <= 1e-12  # larger: lossless, accepts less
    if drafts > 1:
        biased = certify(policies.k_seq(drafts, rho=1.0), vocab=4)
        assert not biased.lossless
        assert biased.total_variation > 1e-3


@pytest.mark.parametrize("drafts", [2, 3])
def test_k_seq_is_exact_at_any_rho_above_the_best(drafts):
    """rho rounded up to a multiple of 2^-16 of K - 1, as the kernels have it, in fractions: no distance at all."""
    for seed in range(3):
        target, draft = random_models(4, [seed, 0], exact=True)
        p, q = (np.array(model(()), float) for model in (target, draft))
        step = Fraction(drafts - 1, 2**16)
        rho = 1 + step * int(np.ceil((kseq_rho(p, q, drafts) - 1 + 1e-9) / float(step)))
        found = certify(policies.k_seq(drafts, rho=rho), vocab=4, target=target, draft=draft)
        assert found.total_variation == 0


def test_traversal_of_a_chain_is_block_verification():
    block, chain = certify(policies.block(3)), certify(policies.traversal([-1, 0, 1]))
    assert chain.expected_accepted == pytest.approx(block.expected_accepted, abs=1e-12)


def test_block_verification_accepts_more_and_as_much_of_certain_drafts():
    token, block = certify(policies.rejection(3)), certify(policies.block(3))
    assert block.expected_accepted > token.expected_accepted + 1e-3
    target, _ = random_models(3, 5)

    def sure(prefix):
        return [float(v == len(prefix) % 3) for v in range(3)]

    alike = [
        certify(rule(3), target=target, draft=sure).expected_accepted for rule in (policies.rejection, policies.block)
    ]
    assert alike[0] == pytest.approx(alike[1], abs=1e-12)


# ---- what is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", MISTAKES, ids=lambda p: p.__qualname__.split(".")[0])
def test_mistaken_and_lossy_practices_are_shown_biased(policy):
    found = certify(policy, vocab=4, settings=6)
    assert not found.lossless
    assert found.total_variation > MISTAKES[policy], found
    c = found.counter_example
    assert abs(c.emitted - c.wanted) > 1e-3
    assert "BIASED" in str(found)
    assert f"tokens {c.tokens}" in str(found)


@pytest.mark.parametrize("policy", [stops_after_an_unsure_token, one_target_draw_per_node, target_only_with()],
                         ids=["stopping time", "one draw", "thresholds 1"])  # fmt: skip
def test_the_right_way_of_the_same_is_lossless(policy):
    found = certify(policy, vocab=4, settings=6)
    assert found.lossless, found
    assert found.total_variation <= 1e-12
    assert str(found).startswith(policy.__qualname__.split(".")[0] + ": lossless")


def test_a_counter_example_is_what_it_says():
    """Its two probabilities, computed by hand for one setting."""
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    found = certify(mismatch_drawn_anew, target=lambda _: p, draft=lambda _: q)
    law = [q[v] * p[v] + sum(q[x] * (1 - p[x]) for x in range(3)) * p[v] for v in range(3)]
    c = found.counter_example
    assert c.emitted == pytest.approx(law[c.tokens[0]], abs=1e-15)
    assert c.wanted == p[c.tokens[0]]
    assert found.total_variation == pytest.approx(sum(abs(a - b) for a, b in zip(law, p, strict=True)) / 2, abs=1e-15)


def test_bad_policies_are_refused():
    cases = [
        ("policy: expected at least one token", lambda: certify(lambda draw, p, q: ())),
        (r"policy: expected .* within 0..2, got \(3,\)", lambda: certify(lambda draw, p, q: (3,))),
        ("vocab, settings: expected at least 2 and 1", lambda: certify(typical, vocab=1)),
        ("target, draft: expected both", lambda: certify(typical, target=lambda x: [1, 0, 0])),
        ("vocab: expected vocab", lambda: certify(lambda draw, p, q: (0,) * 30)),
    ]
    for message, run in cases:
        with pytest.raises(ValueError, match=message):
            run()


# ---- the transport bound ---------------------------------------------------------------------------------------------


def bound_over_all_sets(p, q, drafts, replacement):
    """1 + min over 2^V sets of p(H) - P(all candidates in H), candidates enumerated."""
    draws = {}
    for x in itertools.product(range(len(p)), repeat=drafts):
        weight, left = 1.0, 1.0
        for i, token in enumerate(x):
            if not replacement and token in x[:i]:
                weight = 0.0
                break
            weight *= q[token] / left
            left -= 0.0 if replacement else q[token]
        draws[x] = weight
    sets = [set(h) for n in range(len(p) + 1) for h in itertools.combinations(range(len(p)), n)]
    return 1 + min(sum(p[v] for v in h) - sum(w for x, w in draws.items() if h.issuperset(x)) for h in sets)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 6), drafts=st.integers(1, 3), replacement=st.booleans())
def test_transport_bound_is_the_least_over_all_sets(seed, vocab, drafts, replacement):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(vocab, 0.5)) + 1e-9, rng.dirichlet(np.full(vocab, 0.5)) + 1e-9
    p, q, drafts = p / p.sum(), q / q.sum(), min(drafts, vocab)
    bound = transport_bound(p, q, drafts, replacement=replacement)
    assert bound == pytest.approx(bound_over_all_sets(p, q, drafts, replacement), abs=1e-10)
    rules = ["specinfer", "kseq"] if replacement else ["specinfer_without_replacement"]
    for rule in rules:
        assert acceptance(rule, p, q, drafts) <= bound + 1e-10
    if drafts == 1:
        for rule in [*rules, "rejection"]:
            assert acceptance(rule, p, q, 1) == pytest.approx(bound, abs=1e-10)
        tv = np.abs(p - q).sum() / 2
        assert (1 - tv) / (1 + tv) - 1e-12 <= acceptance("gumbel", p, q) <= bound + 1e-12


@pytest.mark.parametrize("rule", ["specinfer", "specinfer_without_replacement", "kseq", "target_only"])
def test_acceptance_equals_the_enumerated_rule(rule):
    target, draft = random_models(5, 3)
    p, q = target(()), draft(())
    for drafts in (1, 2, 3):
        policy = {
            "specinfer": policies.multi_round([drafts]),
            "specinfer_without_replacement": policies.multi_round([drafts], replacement=False),
            "kseq": policies.k_seq(drafts),
            "target_only": policies.target_only([drafts]),
        }[rule]
        law, _ = enumerate_law(lambda draw, policy=policy: len(policy(draw, target, draft)) - 1)
        assert law.get(1, 0) == pytest.approx(acceptance(rule, p, q, drafts), abs=1e-12)


def test_kseq_rho_is_where_the_residual_ends():
    target, draft = random_models(6, 1)
    p, q = np.array(target(())), np.array(draft(()))
    for drafts in (2, 3, 8):
        rho = kseq_rho(p, q, drafts)
        beta = np.minimum(q, p / rho).sum()
        assert 1 - (1 - beta) ** drafts == pytest.approx(rho * beta, abs=1e-12)
        assert 1 <= rho <= drafts


def test_race_of_clocks():
    """Against enumeration, and at a size where that is out of reach."""
    q = np.array([0.5, 0.3, 0.15, 0.05])
    want = 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7
    assert all_inside(q, [0, 1], 2) == pytest.approx(want, abs=1e-13)
    assert all_inside(q, [0, 1, 2, 3], 4) == 1
    assert all_inside(q, [0], 2) == 0
    wide = np.random.default_rng(0).dirichlet(np.ones(3000))
    assert all_inside(wide, np.arange(1500), 1) == pytest.approx(wide[:1500].sum(), abs=1e-12)


def test_bad_arguments_of_the_bound():
    for message, run in (
        ("p: expected probabilities that sum to 1, got a sum of 1.5", lambda: transport_bound([1, 0.5], [0.5, 0.5], 1)),
        ("q: expected 2 probabilities, as p, got 3", lambda: transport_bound([0.5, 0.5], [0.5, 0.25, 0.25], 1)),
        ("drafts: expected at least 1, got 0", lambda: transport_bound([1, 0], [1, 0], 0)),
        ("drafts: expected at most 1", lambda: transport_bound([0.5, 0.5], [1, 0], 2, replacement=False)),
        ("rule: expected one of", lambda: acceptance("typical", [1, 0], [1, 0])),
        ("drafts: expected 1 with rule='rejection', got 2", lambda: acceptance("rejection", [1, 0], [1, 0], 2)),
    ):
        with pytest.raises(ValueError, match=message):
            run()

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
from assay.speculation.policies import draft_chain, draw_siblings, excess, normalised, ratio, sampled_or, without
from assay.speculation.transport import acceptance, all_inside, kseq_rho, transport_bound

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


def siblings_sorted_after_sampling(draw, target, draft):
    """Drawn without replacement, then tried by descending probability."""
    p, q = list(target(())), list(draft(()))
    drawn = sorted(draw_siblings(draw, q, 2, replacement=False), key=lambda x: (-draft(())[x], x))
    for x in drawn:
        if draw.accept(ratio(p[x], q[x])):
            return (x,)
        p, q = normalised(excess(p, q)) if sum(excess(p, q)) > 0 else p, without(q, [x])
    return (draw.choose(p),)


def draft_law_not_renewed(draw, target, draft):
    """Drawn without replacement, verified as if with it."""
    p, q = list(target(())), draft(())
    for x in draw_siblings(draw, q, 2, replacement=False):
        if draw.accept(ratio(p[x], q[x])):
            return (x,)
        p = normalised(excess(p, q)) if sum(excess(p, q)) > 0 else p
    return (draw.choose(p),)


def target_only_with(threshold_single=1.0, threshold_acc=1.0):
    """SGLang's kernel: a child is taken when coin <= cumulated / threshold_acc, or its own p >= threshold_single."""

    def policy(draw, target, draft):
        p, q = list(target(())), draft(())
        children = sorted(range(len(q)), key=lambda v: (-q[v], v))[:2]
        before, passed = 0.0, 1.0  # the coin is known to lie above `before`
        for c in children:
            cumulated = sum(p[x] for x in children[: children.index(c) + 1])
            reach = 1.0 if p[c] >= threshold_single else min(cumulated / threshold_acc, 1.0)
            if passed <= 0 or draw.accept(max(reach - before, 0) / passed):
                return (c,)
            before = max(before, reach)
            passed = 1 - before
        left = [0 if v in children else p[v] for v in range(len(p))]
        return (sampled_or(draw, left, p),)

    return policy


def dropped_for_its_own_probability(draw, target, draft):
    """The draft ends before a token that its own model gave little (p_min), which had been sampled."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    if q[x] < 0.4:
        return (draw.choose(p),)
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    return (sampled_or(draw, excess(p, q), p),)


def stops_after_an_unsure_token(draw, target, draft):
    """The right way: the unsure token is kept and verified, the draft ends behind it (a stopping time)."""
    x = ()
    while len(x) < 3:
        x += (draw.choose(draft(x)),)
        if draft(x[:-1])[x[-1]] < 0.4:
            break
    for i in range(len(x)):
        p, q = target(x[:i]), draft(x[:i])
        if not draw.accept(ratio(p[x[i]], q[x[i]])):
            return (*x[:i], sampled_or(draw, excess(p, q), p))
    return (*x, draw.choose(target(x)))


def unfiltered_draft_law(draw, target, draft):
    """Sampled from the draft's two best tokens, verified with all its probabilities."""
    p, q = target(()), draft(())
    best = sorted(range(len(q)), key=lambda v: -q[v])[:2]
    x = draw.choose([q[v] if v in best else 0 for v in range(len(q))])
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    return (sampled_or(draw, excess(p, q), p),)


def own_target_draw_per_path(draw, target, draft):
    """Medusa's nucleus rule: each path through a shared node draws its own target token; what matched is kept."""
    q = draft(())
    children = sorted(range(len(q)), key=lambda v: (-q[v], v))[:2]
    matched = [c for c in children if draw.choose(target(())) == c]
    return (matched[0],) if matched else (draw.choose(target(())),)


def one_target_draw_per_node(draw, target, draft):
    """The same with one draw for the node: sample and match."""
    return (draw.choose(target(())),)


def residual_by_place(draw, target, draft):
    """llama.cpp's example: lists of the tokens that survive filtering, subtracted entry by entry."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    mine = [v for v in range(len(p)) if p[v] > 0]
    theirs = [v for v in range(len(q)) if q[v] > 0]
    left = [max(p[v] - (q[theirs[i]] if i < len(theirs) else 0), 0) for i, v in enumerate(mine)]
    return (mine[draw.choose(left)] if sum(left) > 0 else draw.choose(p),)


def draft_noise_in_the_residual(draw, target, draft):
    """One uniform draws the draft token and, after its rejection, the other token."""
    p, q = target(()), draft(())
    left = normalised(excess(p, q)) if sum(excess(p, q)) > 0 else p
    cuts = sorted({0.0, 1.0, *np.cumsum(q[:-1]), *np.cumsum(left[:-1])})
    at = draw.choose(np.diff(cuts).tolist())
    u = (cuts[at] + cuts[at + 1]) / 2
    x = int(np.searchsorted(np.cumsum(q[:-1]), u))
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    return (int(np.searchsorted(np.cumsum(left[:-1]), u)),)


def block_up_to_the_first_failure(draw, target, draft):
    """vllm-ascend's reading of block verification: the prefix ends at the first coin that fails, not after the last that
    holds."""
    x, reach, kept = draft_chain(draw, draft, 2), 1.0, 0
    kept_reach = 1.0
    for i in (1, 2):
        reach = min(reach * target(x[: i - 1])[x[i - 1]] / draft(x[: i - 1])[x[i - 1]], 1)
        z = sum(excess(target(x[:i]), draft(x[:i]), reach))
        h = reach if i == 2 else (z / (z + 1 - reach) if z + 1 - reach > 0 else 1)
        if not draw.accept(h):
            break
        kept, kept_reach = i, reach
    p = target(x[:kept])
    if kept == 2:
        return (*x, draw.choose(p))
    return (*x[:kept], sampled_or(draw, excess(p, draft(x[:kept]), kept_reach), p))


def mismatch_drawn_anew(draw, target, draft):
    """Sample and match, but the token that did not match is thrown away and another one drawn."""
    x, p = draw.choose(draft(())), target(())
    return (x,) if draw.choose(p) == x else (draw.choose(p),)


def typical(draw, target, draft, epsilon=0.09, delta=0.3):
    p, x = np.array(target(())), draw.choose(draft(()))
    entropy = -sum(a * np.log(a) for a in p if a > 0)
    return (x,) if p[x] > min(epsilon, delta * np.exp(-entropy)) else (draw.choose(p.tolist()),)


MISTAKES = {
    siblings_sorted_after_sampling: 0.02,
    draft_law_not_renewed: 0.01,
    target_only_with(threshold_acc=0.9): 0.01,
    target_only_with(threshold_single=0.3): 0.1,
    dropped_for_its_own_probability: 0.01,
    unfiltered_draft_law: 0.01,
    own_target_draw_per_path: 0.02,
    residual_by_place: 0.1,
    draft_noise_in_the_residual: 0.02,
    block_up_to_the_first_failure: 0.005,
    mismatch_drawn_anew: 0.02,
    typical: 0.1,
}


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

"""What verification does at the edges of its data, by every rule and backend: the table of docs/verification.md names these tests."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from assay.ops.speculative import RULES, SparseProbs, uniform
from assay.speculation.certify import certify
from assay.speculation.guard import check_drafts, draft_law, largest_finite
from assay.speculation.policies import excess, ratio, sampled_or

OK, NAN, EMPTY, INF, BAD_ID, BAD_TREE = range(6)
ROWS_READ, ROWS_RESAMPLED, ZERO_DRAFTS, EMPTY_RESIDUALS = range(4)
LEAST, MOST = 5e-324, 1 - 2.0**-53
#: Rules that read a draft distribution.
WITH_Q = ("rejection", "block", "specinfer", "specinfer_without_replacement", "kseq", "traversal",
          "traversal_without_replacement")  # fmt: skip
BY_COIN = (*WITH_Q, "target_only")
BACKENDS = ("c", "numba", "reference")
pytestmark = pytest.mark.filterwarnings("error")


def logits_of(p):
    with np.errstate(divide="ignore"):
        return np.log(np.array(p, float)).astype(np.float32)


def one(p, draft, q=None, **how):
    """One request whose rows have these distributions: a chain of drafts."""
    how.setdefault("uniforms", np.full(len(draft) + 2, 0.5))
    return assay.verify(logits_of(p), np.array(draft, np.int32), np.array([0, len(draft)], np.int32),
                        None if q is None else np.array(q, np.float32), **how)  # fmt: skip


# ---- probabilities of 0 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [*BY_COIN, "sampled", "typical", "greedy"])
def test_a_token_of_probability_zero_never_stands(rule, backend):
    """At the least uniform there is, and with a draft that is sure of it."""
    for p in ([0, 0.25, 0.75], [0.5, 0.5, 0]):
        token = p.index(0)
        q = np.eye(3)[[token]] if rule in WITH_Q else None
        for u in (LEAST, 2.0**-53, 0.5, MOST):
            got = one([p, [1, 1, 1]], [token], q, rule=rule, uniforms=np.full(3, u), backend=backend)
            assert (got.status[0], got.num_accepted[0], got.num_emitted[0]) == (OK, 0, 1)
            assert p[got.output_token_ids[0, 0]] > 0


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, np.nan])
def test_uniforms_are_inside_the_open_interval(bad):
    with pytest.raises(ValueError, match=r"uniforms: expected values inside \(0, 1\)"):
        one([[1, 1], [1, 1]], [0], uniforms=np.array([0.5, bad, 0.5]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", WITH_Q)
def test_a_draft_of_draft_probability_zero(rule, backend):
    """q(x) = 0 < p(x) stands whatever the coin, both 0 does not; either is counted."""
    q = [[0, 1, 0]]
    got = one([[0.5, 0.5, 0], [1, 1, 1]], [0], q, rule=rule, uniforms=np.full(3, MOST), backend=backend)
    assert (got.status[0], got.num_accepted[0], got.counters[0, ZERO_DRAFTS]) == (OK, 1, 1)
    got = one([[0.5, 0.5, 0], [1, 1, 1]], [2], q, rule=rule, uniforms=np.full(3, LEAST), backend=backend)
    assert (got.status[0], got.num_accepted[0], got.counters[0, ZERO_DRAFTS]) == (OK, 0, 1)
    assert got.output_token_ids[0, 0] == 0  # (p - q)+ holds token 0 alone


# ---- residuals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [rule for rule in WITH_Q if rule != "kseq"])
def test_an_empty_residual_gives_a_token_of_the_target(rule, backend):
    """q = p but for rounding, and a coin beyond their ratio: by the residual's own uniform, and counted."""
    p = [0, 0.25, 0.25, 0.5, 0]
    q = [[0, 0.250001, 0.250001, 0.500002, 0.0]]
    for u, token in ((LEAST, 1), (0.3, 2), (0.7, 3), (MOST, 3)):
        got = one([p, p], [3], q, rule=rule, uniforms=np.array([MOST, u, 0.5]), backend=backend)
        assert (got.status[0], got.num_accepted[0], got.counters[0, EMPTY_RESIDUALS]) == (OK, 0, 1)
        assert got.output_token_ids[0, 0] == token


@pytest.mark.parametrize("backend", BACKENDS)
def test_kseq_without_a_residual_gives_a_token_of_the_target(backend):
    p = [0, 0.25, 0.25, 0.5, 0]
    q = [[0, 0.250001, 0.250001, 0.500002, 0.0]]
    for u, token in ((LEAST, 1), (0.3, 2), (0.7, 3), (MOST, 3)):
        got = one([p, p], [3], q, rule="kseq", uniforms=np.array([MOST, u, 0.5]), backend=backend)
        assert (got.status[0], got.num_accepted[0], got.output_token_ids[0, 0]) == (OK, 0, token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", BY_COIN)
def test_a_draw_at_either_end_stays_inside_the_residual(rule, backend):
    """The extreme uniforms give the first and the last token that the residual holds, though sums round."""
    rng = np.random.default_rng(1)
    for vocab in (19, 2100):
        p = rng.dirichlet(np.ones(vocab))
        p[:3] = p[-3:] = 0
        q = np.zeros((1, vocab))
        q[0, 5] = 1
        for u, token in ((LEAST, 3), (MOST, vocab - 4)):
            got = one([p / p.sum(), p], [5], q if rule in WITH_Q else None, rule=rule,
                      uniforms=np.array([MOST, u, 0.5]), backend=backend)  # fmt: skip
            assert (got.num_accepted[0], got.output_token_ids[0, 0]) == (0, token)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_is_made_once_a_request(backend):
    """None where all stands; one for the first rejection, whatever is drafted behind it."""
    p = np.tile([0.5, 0.25, 0.25], (5, 1))
    q = np.full((4, 3), 1 / 3)
    for stands, rows in ((4, (5, 0)), (2, (3, 1)), (0, (1, 1))):
        u = np.where(np.arange(6) < stands, LEAST, MOST)
        got = one(p, [1, 1, 1, 1], q, uniforms=u, backend=backend)
        assert got.num_accepted[0] == stands
        assert tuple(got.counters[0, [ROWS_READ, ROWS_RESAMPLED]]) == rows


# ---- rows that are no distribution ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_bad_row_is_a_status_and_never_a_token(rule, backend):
    rows = np.zeros((8, 30), np.float32)
    rows[1, 7], rows[3, 0], rows[5, 29] = np.nan, np.inf, np.nan
    rows[5, 3] = np.inf
    rows[7] = -np.inf
    cu, none = np.zeros(9, np.int32), np.empty(0, np.int32)
    q = np.zeros((0, 30), np.float32) if rule == "kseq" else None
    got = assay.verify(rows, none, cu, q, rule=rule, seed=1, position=0, backend=backend)
    np.testing.assert_array_equal(got.status, [OK, NAN, OK, INF, OK, NAN, OK, EMPTY])
    bad = got.status != OK
    assert (got.output_token_ids[bad] == -1).all()
    assert (got.num_emitted == ~bad).all()
    assert (got.num_accepted == 0).all()
    assert ((got.output_token_ids[~bad] >= 0) & (got.output_token_ids[~bad] < 30)).all()


def test_a_poisoned_row_can_stand_for_its_largest_finite_logit():
    rows = np.zeros((6, 9), np.float32)
    rows[:, 4] = 9
    rows[1] = [np.nan, 1, 5, np.inf, 2, 5, 0, -np.inf, 0]
    rows[5] = np.nan
    cu, ids = np.array([0, 1, 2, 3], np.int32), np.array([4, 4, 4], np.int32)
    how = {"rule": "sampled", "uniforms": np.full(9, 0.5)}
    first = assay.verify(rows, ids, cu, **how)
    np.testing.assert_array_equal(first.status, [NAN, OK, NAN])
    again = largest_finite(rows, cu, first.status)
    np.testing.assert_array_equal(again[[0, 2, 3, 4]], rows[[0, 2, 3, 4]])
    assert np.isnan(rows[1, 0])  # a copy
    got = assay.verify(again, ids, cu, **how)
    np.testing.assert_array_equal(got.status, [OK, OK, EMPTY])
    assert got.output_token_ids.tolist() == [[4, 2], [4, 4], [-1, -1]]


# ---- what drafts were drawn from ----------------------------------------------------------------------------------------


def test_draft_law_is_the_filtered_distribution():
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    t = np.array([0, 0.5, 1, 1, 2], np.float32)
    law = draft_law(
        logits, temperature=t, top_k=np.array([0, 4, 0, 9, 0]), top_p=np.array([1, 1, 0.6, 1, 1], np.float32)
    )
    np.testing.assert_array_equal(law[0], np.eye(40)[logits[0].argmax()])
    assert [(row > 0).sum() for row in law[[1, 3, 4]]] == [4, 9, 40]
    np.testing.assert_allclose(law.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(law[4], reference.softmax(logits[4], 2.0), rtol=1e-6)
    check_drafts(law.argmax(axis=1), law, 40)
    for message, bad in (
        (r"logits\[1\]: expected one finite", np.array([[0, 1], [np.nan, 0]])),
        ("expected .n, V.", np.zeros(3)),
    ):
        with pytest.raises(ValueError, match=message):
            draft_law(bad)


def test_a_filtered_drafter_needs_its_filtered_law():
    """top_k = 2 of the draft: lossless with what was sampled from, biased with the softmax of all its logits."""

    def policy(honest):
        def run(draw, target, draft):
            p, raw = target(()), draft(())
            filtered = draft_law(logits_of([raw]), top_k=2)[0].astype(float).tolist()
            x = draw.choose(filtered)
            q = filtered if honest else raw
            if draw.accept(ratio(p[x], q[x])):
                return (x,)
            return (sampled_or(draw, excess(p, q), p),)

        return run

    assert certify(policy(True), vocab=4, tolerance=1e-6).lossless  # of float32 probabilities
    assert certify(policy(False), vocab=4).total_variation > 0.01


def test_drafts_that_cannot_have_been_drawn_are_named():
    q = np.array([[0.5, 0.5, 0], [0.25, 0.25, 0.5]], np.float32)
    sparse = SparseProbs(np.array([[0, 1, -1], [2, 0, 1]]), np.array([[0.5, 0.5, 9], [0.5, 0.25, 0.25]], np.float32))
    for form in (q, sparse):
        check_drafts(np.array([1, 2]), form, 3)
        check_drafts(np.array([-1, 2]), form, 3)
        for ids, message in (([2, 2], r"draft_probs\[0\]: expected a probability above 0 for its draft 2, got 0"),
                             ([0, 3], r"draft_token_ids\[1\]: expected an id in \[0, 3\), got 3")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                check_drafts(np.array(ids), form, 3)
    for changed, message in ((q * 0.9, r"draft_probs\[0\]: expected a sum of 1 .* got 0.9"),
                             (q - [[0], [0.3]], r"draft_probs\[1\]: expected finite values of 0 or more")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_drafts(np.array([1, 2]), changed, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", WITH_Q)
def test_every_form_of_one_draft_law_gives_one_result(rule, backend):
    """Dense, sparse, and none at all for a draft that is certain."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        p, u, token = rng.dirichlet(np.ones(6), 2), rng.random(3), int(rng.integers(6))
        how = {"rule": rule, "uniforms": u, "backend": backend}
        dense = one(p, [token], np.eye(6)[[token]], **how)
        sparse = assay.verify(logits_of(p), np.array([token], np.int32), np.array([0, 1], np.int32),
                              SparseProbs(np.array([[token]]), np.ones((1, 1), np.float32)), **how)  # fmt: skip
        assert sparse.output_token_ids.tolist() == dense.output_token_ids.tolist()
        if rule != "kseq":
            assert one(p, [token], **how).output_token_ids.tolist() == dense.output_token_ids.tolist()


# ---- ids, lengths, ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_ids_beyond_the_vocabulary_and_the_end_of_a_draft(rule, backend):
    """An id of V or more is rejected, -1 ends the draft (with what is behind it), below that is a status."""
    p = np.tile([0.25, 0.25, 0.5], (4, 1))
    q = np.full((3, 3), 1 / 3) if rule in WITH_Q else None
    how = {"rule": rule, "backend": backend, "seed": 3, "position": 5, "uniforms": None}
    for ids, accepted_at_most, status in (([3, 2, 2], 0, OK), ([2**31 - 1, 2, 2], 0, OK), ([-1, 2, 2], 0, OK),
                                          ([2, -1, 99], 1, OK), ([2, -2, 2], 0, BAD_ID)):  # fmt: skip
        got = one(p, ids, q, **how)
        assert got.status[0] == status
        assert got.num_accepted[0] <= accepted_at_most
        emitted = got.output_token_ids[0, : got.num_emitted[0]]
        assert len(emitted) == (got.num_accepted[0] + 1 if status == OK else 0)
        assert ((emitted >= 0) & (emitted < 3)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_no_draft_is_plain_sampling(rule, backend):
    """K_b = 0 between requests that have drafts: a token of p, by the number that plain sampling uses."""
    p = np.tile([0.25, 0.25, 0.5], (5, 1))
    ids, cu = np.array([0, 2], np.int32), np.array([0, 1, 1, 2], np.int32)
    q = np.full((2, 3), 1 / 3, np.float32) if rule in WITH_Q else None
    for position in range(12):
        got = assay.verify(logits_of(p), ids, cu, q, rule=rule, seed=4, position=position, backend=backend)
        plain = rule if rule in ("greedy", "gumbel") else "sampled"
        want = assay.sample(logits_of(p[:1]), seed=4, position=position, rule=plain).output_token_ids[0, 0]
        assert (got.num_emitted[1], got.output_token_ids[1].tolist()) == (1, [want, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_budgets_and_stop_ids_cut_what_was_accepted(rule, backend):
    """After acceptance: num_accepted stays, num_emitted is what is left; nothing follows a stop id, and it beats the budget."""
    sure = np.eye(7)[[3, 4, 5, 6]] + 1e-30
    ids = [3, 4, 5]
    q = np.eye(7)[[3, 4, 5]] if rule in WITH_Q else None
    how = {"rule": rule, "backend": backend} | (
        {"uniforms": None, "seed": 1, "position": 0} if rule == "gumbel" else {}
    )
    for stop, most, want in ((None, None, [3, 4, 5, 6]), (None, 2, [3, 4]), (None, 4, [3, 4, 5, 6]), ([4], None, [3, 4]),
                             ([4], 3, [3, 4]), ([5], 2, [3, 4]), ([4], 2, [3, 4]), ([6], None, [3, 4, 5, 6]),
                             ([3, 6], None, [3])):  # fmt: skip
        got = one(sure, ids, q, stop_token_ids=stop, max_emit=most, **how)
        assert (got.status[0], got.num_accepted[0], got.num_emitted[0]) == (OK, 3, len(want))
        assert got.output_token_ids[0].tolist() == want + [-1] * (4 - len(want))
        ended = stop is not None and got.output_token_ids[0, got.num_emitted[0] - 1] in stop
        assert ended == (stop is not None and any(t in stop for t in want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("greedy", "gumbel")])
def test_the_last_token_goes_through_the_processors(rule, backend):
    """The row behind the last draft is filtered, masked and penalised like every other, per request."""
    p = np.array([[1e-9, 1, 1e-9, 1e-9], [0.4, 0.3, 0.2, 0.1]])
    q = np.eye(4)[[1]] if rule in WITH_Q else None
    for extra, allowed in (
        ({}, {0, 1, 2, 3}), ({"top_k": 2}, {0, 1}), ({"top_p": 0.35}, {0}), ({"min_p": 0.4}, {0, 1, 2}),
        ({"banned_token_ids": [0]}, {1, 2, 3}), ({"bitmask": np.array([[15], [12]], np.uint32)}, {2, 3}),
        ({"logit_bias": {3: 30.0, 1: 60.0}}, {1}),
        ({"presence_penalty": 90.0, "generated_token_ids": [[0, 2, 3]], "logit_bias": {1: 140.0}}, {1}),
    ):  # fmt: skip
        seen = set()
        for u in np.linspace(0.01, 0.99, 25):
            uniforms = np.array([0.5, u, u])
            got = one(p, [1], q, rule=rule, backend=backend, uniforms=uniforms, **extra)
            assert (got.status[0], got.num_accepted[0]) == (OK, 1)
            seen.add(int(got.output_token_ids[0, 1]))
        assert seen == allowed, extra


EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
RARE = [0.0, 1.0, 5.0, -3.0, 80.0, -np.inf, -np.inf, np.nan, np.inf, 3e38, -3e38]


@pytest.mark.parametrize("rule", RULES)
@EXAMPLES
@given(data=st.data(), k=st.integers(0, 5), vocab=st.integers(1, 6), poison=st.integers(0, 30))
def test_something_is_emitted_unless_a_status_says_why(rule, data, k, vocab, poison):
    """Any logits, ids, parents and draft laws: no token outside the vocabulary, no count below what it must be; and the
    twin gives the same."""
    usual = RARE[:6] if poison else RARE
    rows = np.array(data.draw(st.lists(st.lists(st.sampled_from(usual), min_size=vocab, max_size=vocab),
                                       min_size=k + 1, max_size=k + 1)), np.float32)  # fmt: skip
    ids = np.array(data.draw(st.lists(st.integers(-2 if poison == 1 else -1, vocab), min_size=k, max_size=k)), np.int32)
    how = {"rule": rule, "seed": data.draw(st.integers(0, 99)), "position": 0}
    if rule not in ("rejection", "block"):
        how["parents"] = np.array([data.draw(st.integers(-1, j - 1 if poison > 2 else j)) for j in range(k)], np.int32)
    if rule in WITH_Q and (rule == "kseq" or data.draw(st.booleans())):
        draws = st.lists(
            st.sampled_from([0.0, 0.25, 0.5, 1.0] + ([np.nan] if poison == 2 else [])), min_size=vocab, max_size=vocab
        )
        how["draft_probs"] = np.array(data.draw(st.lists(draws, min_size=k, max_size=k)), np.float32).reshape(k, vocab)
    got = assay.verify(rows, ids, np.array([0, k], np.int32), **how)
    tokens, n = got.output_token_ids[0], int(got.num_emitted[0])
    if got.status[0]:
        assert (n, got.num_accepted[0], tokens.tolist()) == (0, 0, [-1] * (k + 1))
    else:
        assert n == got.num_accepted[0] + 1 >= 1
        assert ((tokens[:n] >= 0) & (tokens[:n] < vocab)).all()
        assert (tokens[n:] == -1).all()
        path = [-1, *got.accept_index[0][: n - 1].tolist()]
        for row, token in zip(path, tokens[:n], strict=True):
            assert rows[row + 1, token] > -np.inf
    twin = assay.verify(rows, ids, np.array([0, k], np.int32), backend="numba", **how)
    for name in ("output_token_ids", "num_accepted", "num_emitted", "status", "accept_index", "counters"):
        np.testing.assert_array_equal(getattr(twin, name), getattr(got, name), err_msg=name)


# ---- random numbers ---------------------------------------------------------------------------------------------------------

ACCEPT, RESIDUAL, BONUS = 1, 2, 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("greedy", "gumbel")])
def test_every_random_number_has_a_key_of_its_own(rule, backend):
    """With the numbers of (seed, position, purpose, place) handed over, the output is that of the seed; and no two purposes
    share a number, nor any the drafter's."""
    rng = np.random.default_rng(5)
    k = 4
    chain = rule in ("rejection", "block")
    for seed in range(30):
        parents = np.arange(-1, k - 1) if chain else np.array([-1, -1, 0, 0])
        depth = np.arange(k) if chain else np.array([0, 0, 1, 1])
        rank = np.zeros(k, int) if chain else np.array([0, 1, 0, 1])
        p, q = rng.dirichlet(np.ones(5), k + 1), rng.dirichlet(np.ones(5), k)
        q[1], q[3] = (q[1], q[3]) if chain else (q[0], q[2])
        ids = rng.integers(0, 5, k)
        own = {} if chain else {"parents": parents.astype(np.int32)}
        q = q if rule in WITH_Q else None
        seeded = one(p, ids, q, rule=rule, uniforms=None, seed=seed, position=9, backend=backend, **own)
        if rule == "sampled":
            u = [uniform(seed, 9 + d, BONUS) for d in range(k + 2)]
        else:
            place = np.arange(k) if rule.startswith("traversal") else rank
            u = [uniform(seed, int(9 + depth[j]), ACCEPT, int(place[j])) for j in range(k)]
            end = int(9 + seeded.num_accepted[0])
            u += [uniform(seed, end, RESIDUAL), uniform(seed, end, BONUS)]
        given = one(p, ids, q, rule=rule, uniforms=np.array(u), backend=backend, **own)
        assert given.output_token_ids.tolist() == seeded.output_token_ids.tolist()
    numbers = {uniform(7, 9, domain, node) for domain in range(5) for node in range(8)}
    assert len(numbers) == 40


# ---- trees ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_siblings(backend):
    """Target-only counts their probability once. Siblings that were drawn stay: the second is judged by what the first left,
    which without replacement is nothing."""
    p = np.array([[0.3, 0.7], [0.5, 0.5], [0.5, 0.5]])
    pair = {"parents": np.array([-1, -1], np.int32), "backend": backend}
    for u, accepted in ((0.29, 1), (0.31, 0), (0.59, 0)):
        got = one(p, [0, 0], rule="target_only", uniforms=np.array([u, 0.5, 0.5, 0.5]), **pair)
        assert got.num_accepted[0] == accepted
        assert got.output_token_ids[0, 0] == (0 if accepted else 1)
    q = np.array([[0.6, 0.4], [0.6, 0.4]])
    for rule in ("specinfer", "specinfer_without_replacement", "traversal", "traversal_without_replacement"):
        got = one(p, [0, 0], q, rule=rule, uniforms=np.array([0.9, LEAST, 0.5, 0.5]), **pair)
        assert (got.status[0], got.num_accepted[0], got.output_token_ids[0, 0]) == (OK, 0, 1)


# ---- dtypes, mixed batches, log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_temperature_zero_is_greedy_beside_requests_that_sample(rule, backend):
    rng = np.random.default_rng(8)
    p = rng.dirichlet(np.ones(9), 12)
    ids, cu = p.argmax(axis=1)[[0, 1, 3, 4, 6, 7, 9, 10]].astype(np.int32), np.arange(0, 9, 2, dtype=np.int32)
    q = rng.dirichlet(np.ones(9), 8).astype(np.float32) if rule in WITH_Q else None
    how = {"rule": rule, "seed": 1, "position": 0, "backend": backend}
    mixed = assay.verify(logits_of(p), ids, cu, q, temperature=np.array([0, 1, 0, 1], np.float32), **how)
    alone = assay.verify(logits_of(p), ids, cu, q, temperature=1.0, **how)
    greedy = assay.verify(logits_of(p), ids, cu, rule="greedy", backend=backend)
    np.testing.assert_array_equal(mixed.output_token_ids[::2], greedy.output_token_ids[::2])
    np.testing.assert_array_equal(mixed.output_token_ids[1::2], alone.output_token_ids[1::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_logprobs_are_those_of_the_emitted_tokens(rule, backend):
    rng = np.random.default_rng(9)
    p = rng.dirichlet(np.ones(6), 4)
    q = rng.dirichlet(np.ones(6), 3).astype(np.float32) if rule in WITH_Q else None
    how = {"rule": rule, "seed": 2, "uniforms": None, "backend": backend, "return_logprobs": True}
    for position in range(10):
        got = one(p, rng.integers(0, 6, 3), q, position=position, **how)
        n = got.num_emitted[0]
        want = np.log(p[np.arange(n), got.output_token_ids[0, :n]])
        np.testing.assert_allclose(got.logprobs[0, :n], want, atol=2e-6)
        assert np.isnan(got.logprobs[0, n:]).all()


# ---- the documents' table ---------------------------------------------------------------------------------------------------


def test_the_tests_that_the_documents_name_exist():
    root = Path(__file__).parents[1]
    text = (root / "docs" / "verification.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)::(test_\w+)`", text)
    assert len(named) >= 22  # as many as the table of edges has rows
    for module, test in named:
        source = (root / "tests" / f"{module}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), (module, test)

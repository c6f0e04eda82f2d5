"""Trees, processors and the ends of requests: C, Numba and the reference agree; what each row of data must give."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from assay.ops.speculative import RULES, SparseProbs
from bf16 import BFloat16

OP = "spec_verify"  # whose variants are tested
OK, NAN, EMPTY, INF, BAD_ID, BAD_TREE = range(6)
TREE_RULES = [rule for rule in RULES if rule not in ("rejection", "block")]
TOKENS = ("output_token_ids", "num_accepted", "num_emitted", "status", "accept_index")


def forest(seed, batch=4, vocab=50, most=6, *, scale=3.0):
    """Random trees over random logits; siblings drawn from one q near the target."""
    rng = np.random.default_rng([seed, batch, vocab])
    counts = rng.integers(0, most + 1, batch)
    cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    n = int(cu[-1])
    logits = (rng.standard_normal((n + batch, vocab)) * scale).astype(np.float32)
    parents = np.concatenate([[rng.integers(-1, j) if j else -1 for j in range(k)] for k in counts] or [[]]).astype(
        np.int32
    )
    q, ids = np.zeros((n, vocab), np.float32), np.zeros(n, np.int32)
    for b in range(batch):
        own = {}
        for j in range(counts[b]):
            at, parent = cu[b] + j, int(parents[cu[b] + j])
            if parent not in own:
                p = reference.softmax(logits[cu[b] + b + parent + 1])
                own[parent] = (0.6 * p + 0.4 * rng.dirichlet(np.full(vocab, 0.3))).astype(np.float32)
            q[at] = own[parent]
            ids[at] = reference.sample(q[at].astype(float), rng.random())
    return {
        "target_logits": logits, "draft_token_ids": ids, "cu_num_draft_tokens": cu, "draft_probs": q, "parents": parents,
        "seed": rng.integers(0, 2**64, batch, dtype=np.uint64), "position": rng.integers(0, 2**40, batch),
    }  # fmt: skip


def assert_same(got, want, names=(*TOKENS, "counters", "logprobs")):
    for name in names:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


def processors(seed, batch, vocab, rows):
    """Every processor at once, of random strength; some off for some requests."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return rng.choice(np.array(values, np.float32), batch)

    mask = rng.integers(0, 2**32, (rows, -(-vocab // 32)), dtype=np.uint32) | rng.integers(
        0, 2**32, (rows, -(-vocab // 32)), dtype=np.uint32
    )
    return {
        "temperature": pick(0, 0.7, 1, 1.4), "top_k": rng.choice([0, 1, 5, vocab // 2 + 1], batch),
        "top_p": pick(1, 0.95, 0.5), "min_p": pick(0, 0.01), "typical_p": pick(1, 0.9, 0.4),
        "repetition_penalty": pick(1, 1.3), "frequency_penalty": pick(0, 0.2), "presence_penalty": pick(0, -0.3, 0.5),
        "prompt_token_ids": [rng.integers(0, vocab, rng.integers(0, 9)) for _ in range(batch)],
        "generated_token_ids": [rng.integers(0, vocab, rng.integers(0, 9)) for _ in range(batch)],
        "logit_bias": [{int(v): float(rng.normal()) for v in rng.integers(0, vocab, 3)} for _ in range(batch)],
        "banned_token_ids": [int(rng.integers(0, vocab))], "bitmask": mask,
    }  # fmt: skip


EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("rule", TREE_RULES)
@EXAMPLES
@given(seed=st.integers(0, 2**30), vocab=st.sampled_from([2, 3, 17, 50, 2049]), dense=st.booleans(), busy=st.booleans())
def test_backends_agree_on_random_trees(rule, seed, vocab, dense, busy):
    """Tokens of the twin and counters are C's bit for bit; the reference's tokens too, at float64's distance from ties."""
    if rule == "kseq":
        dense = True
    args = forest(seed, vocab=vocab)
    if not dense:
        args["draft_probs"] = None
    if busy:
        args |= processors(seed, 4, vocab, len(args["target_logits"]))
    c = assay.verify(**args, rule=rule, return_logprobs=True)
    assert_same(assay.verify(**args, rule=rule, return_logprobs=True, backend="numba"), c)
    truth = assay.verify(**args, rule=rule, return_logprobs=True, backend="reference")
    np.testing.assert_array_equal(truth.status, c.status)
    assert set(np.unique(c.status)) <= {OK, EMPTY}
    if not busy:  # a filter's boundary may lie within rounding
        assert_same(truth, c, TOKENS)
        np.testing.assert_allclose(truth.logprobs, c.logprobs, atol=2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_chain_is_a_tree(variant, rule):
    args = forest(5, vocab=300)
    chain = np.concatenate([np.arange(-1, k - 1) for k in np.diff(args["cu_num_draft_tokens"])]).astype(np.int32)
    alone = assay.verify(**args | {"parents": None}, rule=rule, isa=variant)
    if rule not in ("rejection", "block"):
        assert_same(assay.verify(**args | {"parents": chain}, rule=rule, isa=variant), alone, TOKENS)
    if rule == "rejection":
        as_tree = assay.verify(**args | {"parents": chain}, rule="specinfer", isa=variant)
        assert_same(as_tree, alone, TOKENS)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_variants_threads_and_batches_leave_a_tree_as_it_is(variant, rule):
    args = forest(7, batch=5, vocab=30000) | processors(7, 5, 30000, 0)
    args["bitmask"] = None
    want = assay.verify(**args, rule=rule, isa="scalar", num_threads=1, return_logprobs=True)
    for threads in (1, 2, 7):
        assert_same(assay.verify(**args, rule=rule, isa=variant, num_threads=threads, return_logprobs=True), want)
    cu = args["cu_num_draft_tokens"]
    for b in range(5):
        nodes, rows = slice(cu[b], cu[b + 1]), slice(cu[b] + b, cu[b + 1] + b + 1)
        one = {k: (v[b : b + 1] if isinstance(v, np.ndarray) or (isinstance(v, list) and k != "banned_token_ids") else v)
               for k, v in args.items()}  # fmt: skip
        one |= {"target_logits": args["target_logits"][rows], "draft_token_ids": args["draft_token_ids"][nodes]}
        one |= {"draft_probs": args["draft_probs"][nodes], "parents": args["parents"][nodes]}
        one["cu_num_draft_tokens"] = np.array([0, cu[b + 1] - cu[b]], np.int32)
        got = assay.verify(**one, rule=rule, isa=variant)
        width = got.output_token_ids.shape[1]
        np.testing.assert_array_equal(got.output_token_ids[0], want.output_token_ids[b, :width])
        np.testing.assert_array_equal(got.accept_index[0], want.accept_index[b, : width - 1])


@pytest.mark.parametrize("rule", ["sampled", "gumbel", "greedy"])
def test_speculation_emits_what_plain_sampling_does(variant, rule):
    """Token by token: every emitted token is sample()'s on the row it comes from."""
    for seed in range(20):
        args = forest(seed, vocab=20, scale=1.0)
        got = assay.verify(**args, rule=rule, top_k=7, temperature=0.8, isa=variant)
        cu = args["cu_num_draft_tokens"]
        for b in range(4):
            rows = [0, *(got.accept_index[b][: got.num_accepted[b]] + 1)]
            for i, row in enumerate(rows):
                logits = args["target_logits"][cu[b] + b + row][None]
                plain = assay.sample(logits, seed=int(args["seed"][b]), position=int(args["position"][b]) + i, rule=rule,
                                     top_k=7, temperature=0.8)  # fmt: skip
                assert plain.output_token_ids[0, 0] == got.output_token_ids[b, i]


def test_gumbel_noise_has_the_right_law():
    """Chi-square over keys: 7 degrees of freedom, 40 is beyond 1 in 10^6."""
    logits = np.tile(np.array([0, 1, -1, 2, 0.5, -np.inf, 1, 0], np.float32), (20000, 1))
    drawn = assay.sample(logits, seed=11, position=np.arange(20000), rule="gumbel").output_token_ids[:, 0]
    p = reference.softmax(logits[0])
    expected = p[p > 0] * len(drawn)
    found = np.bincount(drawn, minlength=8)
    assert found[5] == 0
    assert ((found[p > 0] - expected) ** 2 / expected).sum() < 40


# ---- draft distributions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["specinfer", "specinfer_without_replacement", "kseq", "traversal"])
@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_sparse_draft_probabilities_equal_dense_ones(rule, backend):
    for seed in range(5):
        args = forest(seed, vocab=3000)
        rng = np.random.default_rng(seed)
        n = len(args["draft_token_ids"])
        ids = np.stack([rng.permutation(3000)[:6] for _ in range(n)]).astype(np.int64)
        ids[:, 0] = args["draft_token_ids"]
        probs = rng.dirichlet(np.ones(6), n).astype(np.float32)
        ids[:, 5], probs[:, 5] = -1, 9
        dense = np.zeros((n, 3000), np.float32)
        for j in range(n):
            np.add.at(dense[j], ids[j, :5], probs[j, :5])
        want = assay.verify(**args | {"draft_probs": dense}, rule=rule, backend=backend)
        got = assay.verify(**args | {"draft_probs": SparseProbs(ids, probs)}, rule=rule, backend=backend)
        assert_same(got, want, (*TOKENS, "counters"))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_drafter_with_a_vocabulary_of_its_own(sparse):
    args = forest(3, vocab=40)
    d2t = np.random.default_rng(0).permutation(40)[:12]
    rng = np.random.default_rng(1)
    n = len(args["draft_token_ids"])
    q = rng.dirichlet(np.ones(12), n).astype(np.float32)
    ids = rng.integers(0, 12, n).astype(np.int32)
    wide = np.zeros((n, 40), np.float32)
    wide[:, d2t] = q
    want = assay.verify(**args | {"draft_token_ids": d2t[ids].astype(np.int32), "draft_probs": wide}, rule="specinfer")
    own = SparseProbs(np.tile(np.arange(12), (n, 1)), q) if sparse else q
    got = assay.verify(**args | {"draft_token_ids": ids, "draft_probs": own}, rule="specinfer", draft_to_target=d2t)
    assert_same(got, want, TOKENS)


# ---- processors --------------------------------------------------------------------------------------------------------


def support(logits, **options):
    """Tokens that sampling can emit, by a fine grid of uniforms."""
    u = np.linspace(0.0005, 0.9995, 1000)
    rows = np.tile(np.asarray(logits, np.float32), (1000, 1))
    uniforms = np.stack([u, np.full(1000, 0.5)], axis=1).reshape(-1)
    got = assay.sample(rows, uniforms=uniforms, **options)
    assert (got.status == OK).all()
    return sorted(set(got.output_token_ids[:, 0].tolist()))


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_filters_keep_what_they_say(backend):
    p = np.array([0.1, 0.4, 0.1, 0.3, 0.1])
    row = np.log(p)
    how = {"backend": backend}
    assert support(row, top_k=2, **how) == [1, 3]
    assert support(row, top_k=3, **how) == [0, 1, 3]  # ties at the boundary: the lower id
    assert support(row, top_k=4, **how) == [0, 1, 2, 3]
    assert support(row, top_p=0.39, **how) == [1]
    assert support(row, top_p=0.41, **how) == [1, 3]
    assert support(row, top_p=0.75, **how) == [0, 1, 3]
    assert support(row, top_p=0.5, top_k=2, **how) == [1]  # 0.4 / 0.7 > 0.5: over what top_k left
    assert support(row, min_p=0.5, **how) == [1, 3]
    assert support(row, min_p=1.0, **how) == [1]
    assert support(row, top_k=1, min_p=0.001, **how) == [1]
    # H = 1.418 nats: distances 0.116 (0.3), 0.502 (0.4), 0.884 (0.1s)
    assert support(row, typical_p=0.2, **how) == [3]
    assert support(row, typical_p=0.6, **how) == [1, 3]
    assert support(row, typical_p=0.75, **how) == [0, 1, 3]
    assert support([0.0, -0.0, 0.0, -1], top_k=2, **how) == [0, 1]  # both zeros are equal


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_penalties_masks_and_biases(backend):
    row = np.array([[1.0, 2.0, -1.0, 0.5]], np.float32)

    def logits(**options):
        """log p of each token, shifted so that token 3, which nothing touches, has 0.5."""
        found = []
        for token in range(4):
            got = assay.sample(row, seed=0, position=0, backend=backend, return_logprobs=True, rule="greedy",
                               **options | {"allowed_token_ids": [token]})  # fmt: skip
            assert got.output_token_ids[0, 0] == token
            free = assay.sample(row, uniforms=np.array([1e-9, 0.5]), backend=backend, **options)
            assert free.status[0] == OK
            found.append(got.logprobs[0, 0])
        return found

    assert logits() == [0, 0, 0, 0]  # alone, each is certain
    history = {"prompt_token_ids": [[0]], "generated_token_ids": [[2, 2]]}

    def argmax(**options):
        return int(assay.sample(row, rule="greedy", backend=backend, **options).output_token_ids[0, 0])

    assert argmax() == 1
    assert argmax(banned_token_ids=[1]) == 0
    assert argmax(allowed_token_ids=[2, 3]) == 3
    assert argmax(logit_bias={2: 3.1}) == 2
    assert argmax(logit_bias=[{1: -np.inf, 0: -np.inf}]) == 3
    assert argmax(bitmask=np.array([[0b0100]], np.uint32)) == 2
    assert argmax(bitmask=np.array([[0b1100]], np.int32), allowed_token_ids=[1, 2]) == 2
    assert argmax(repetition_penalty=4.1, prompt_token_ids=[[1]]) == 0
    assert argmax(repetition_penalty=4.1, prompt_token_ids=[[1, 0]]) == 3
    assert argmax(frequency_penalty=0.8, generated_token_ids=[[1]]) == 1
    assert argmax(frequency_penalty=0.8, generated_token_ids=[[1, 1]]) == 0
    assert argmax(presence_penalty=0.8, generated_token_ids=[[1, 1]]) == 1
    assert argmax(presence_penalty=1.2, generated_token_ids=[[1, 1]]) == 0
    assert argmax(presence_penalty=-4.0, **history) == 2
    assert argmax(frequency_penalty=1.2, prompt_token_ids=[[1, 1]]) == 1  # the prompt does not count


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_penalties_see_the_drafts_before_a_row(backend):
    """The same token over and over: each draft of it counts against the next, along its own path alone."""
    rows = np.tile(np.array([[3.0, 2.0, 0.0]], np.float32), (5, 1))
    how = {"rule": "greedy", "frequency_penalty": 0.6, "generated_token_ids": [[]], "backend": backend}
    got = assay.verify(rows, np.array([0, 0, 1, 0], np.int32), np.array([0, 4], np.int32), **how)
    assert got.output_token_ids[0].tolist() == [0, 0, 1, 0, 1]
    # Siblings do not see each other: node 2 hangs from node 0 beside node 1.
    tree = assay.verify(rows[:4], np.array([0, 2, 0], np.int32), np.array([0, 3], np.int32),
                        parents=np.array([-1, 0, 0], np.int32), **how)  # fmt: skip
    assert tree.output_token_ids[0].tolist() == [0, 0, 1, -1]
    assert tree.accept_index[0].tolist() == [0, 2, -1]


# ---- ends of requests, bad data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_stop_ids_and_budgets(backend):
    rows = np.full((4, 9), -5, np.float32)
    for i, token in enumerate((3, 4, 5, 6)):
        rows[i, token] = 5
    ids, cu = np.array([3, 4, 5], np.int32), np.array([0, 3], np.int32)
    how = {"rule": "greedy", "backend": backend, "return_logprobs": True}
    for stop, most, want in (
        (None, None, [3, 4, 5, 6]), ([4], None, [3, 4]), ([6], None, [3, 4, 5, 6]), ([8], None, [3, 4, 5, 6]),
        (None, 2, [3, 4]), ([5], 2, [3, 4]), ([3], 2, [3]), (None, 9, [3, 4, 5, 6]), ([[5, 4]], None, [3, 4]),
    ):  # fmt: skip
        got = assay.verify(rows, ids, cu, stop_token_ids=stop, max_emit=most, **how)
        assert got.output_token_ids[0].tolist() == want + [-1] * (4 - len(want))
        assert got.num_emitted[0] == len(want)
        assert got.num_accepted[0] == 3
        assert got.accept_index[0].tolist() == [0, 1, 2]
        assert np.isfinite(got.logprobs[0]).tolist() == [True] * len(want) + [False] * (4 - len(want))
    none = assay.verify(np.full((4, 9), np.nan, np.float32), ids, cu, max_emit=0, **how)
    assert none.status[0] == OK
    assert none.num_emitted[0] == none.num_accepted[0] == none.counters.sum() == 0
    assert (none.output_token_ids == -1).all()


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
@pytest.mark.parametrize("rule", TREE_RULES)
@pytest.mark.parametrize(
    "parents", [[0, -1, 1], [1, 0, 0], [-1, 1, 0], [-2, 0, 1], [-1, 5, 0], [2, 2, 2]], ids=str
)  # fmt: skip
def test_parents_that_make_no_tree(backend, rule, parents):
    args = forest(1, batch=1, vocab=9, most=0)
    args |= {"target_logits": np.zeros((6, 9), np.float32), "draft_token_ids": np.array([1, 2, 3, 4], np.int32)}
    args |= {"draft_probs": np.full((4, 9), 1 / 9, np.float32), "cu_num_draft_tokens": np.array([0, 3, 4], np.int32)}
    args |= {"parents": np.array([*parents, -1], np.int32), "seed": 1, "position": 0}
    got = assay.verify(**args, rule=rule, backend=backend)
    np.testing.assert_array_equal(got.status, [BAD_TREE, OK])
    assert (got.output_token_ids[0] == -1).all()
    assert got.num_emitted.tolist()[0] == 0
    assert got.num_emitted.tolist()[1] >= 1


@pytest.mark.parametrize("rule", TREE_RULES)
def test_absent_nodes_take_their_descendants_along(variant, rule):
    """Pruned by -1 is the same as never drafted; the poisoned rows behind them are not read."""
    args = forest(2, batch=1, vocab=30, most=0)
    rng = np.random.default_rng(4)
    rows, q = rng.standard_normal((6, 30)).astype(np.float32), np.full((5, 30), 1 / 30, np.float32)
    rows[[2, 4]] = np.nan
    cu, u = np.array([0, 5], np.int32), np.full(7, 0.3)
    ids, parents = np.array([7, -1, 9, 3, 11], np.int32), np.array([-1, -1, -1, 1, 0], np.int32)
    how = {"rule": rule, "isa": variant}
    how |= {"seed": 3, "position": 5} if rule == "gumbel" else {"uniforms": u}
    got = assay.verify(rows, ids, cu, q, parents=parents, **how)
    kept = [0, 2, 4]
    fewer = {"uniforms": np.full(5, 0.3)} if rule != "gumbel" else {}
    want = assay.verify(rows[[0, 1, 3, 5]], ids[kept], np.array([0, 3], np.int32), q[kept],
                        parents=np.array([-1, -1, 0], np.int32), **how | fewer)  # fmt: skip
    assert got.status[0] == want.status[0] == OK
    assert got.output_token_ids[0, :4].tolist() == want.output_token_ids[0].tolist()
    assert args["seed"].shape == (1,)


@pytest.mark.parametrize(("bad", "status"), [(np.nan, NAN), (np.inf, INF)])
@pytest.mark.parametrize("rule", TREE_RULES)
@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_a_mask_does_not_hide_a_poisoned_row(rule, bad, status, backend):
    rows = np.zeros((1, 70), np.float32)
    rows[0, 66] = bad
    how = {"rule": rule, "seed": 0, "position": 0, "backend": backend}
    if rule == "kseq":
        how["draft_probs"] = np.zeros((0, 70), np.float32)
    none, cu = np.empty(0, np.int32), np.array([0, 0], np.int32)
    for extra in ({}, {"banned_token_ids": [66]}, {"allowed_token_ids": [1]}, {"top_k": 3}):
        got = assay.verify(rows, none, cu, **how, **extra)
        assert got.status[0] == status
        assert got.output_token_ids[0, 0] == -1
    rows[0, 66] = 0
    got = assay.verify(rows, none, cu, **how, allowed_token_ids=[])
    assert got.status[0] == EMPTY


def test_half_precision_through_processors(variant):
    for seed in range(3):
        args = forest(seed, vocab=2100)
        half = args["target_logits"].astype(np.float16)
        more = processors(seed, 4, 2100, len(half))
        for rule in ("specinfer", "traversal", "sampled"):
            want = assay.verify(**args | more | {"target_logits": half.astype(np.float32)}, rule=rule, isa=variant)
            assert_same(assay.verify(**args | more | {"target_logits": half}, rule=rule, isa=variant), want, TOKENS)
            brain = BFloat16(args["target_logits"])
            want = assay.verify(**args | more | {"target_logits": brain.widened()}, rule=rule, isa=variant)
            assert_same(assay.verify(**args | more | {"target_logits": brain}, rule=rule, isa=variant), want, TOKENS)


def test_bad_arguments_of_trees_and_processors():
    args = forest(1, vocab=20)
    n = len(args["draft_token_ids"])
    cases = [
        ({"rule": "rejection"}, ValueError, "parents: rule='rejection' is for chains"),
        ({"rule": "block"}, ValueError, "parents: rule='block' is for chains"),
        ({"rule": "kseq", "draft_probs": None}, ValueError, "draft_probs: rule='kseq' needs"),
        ({"rule": "gumbel", "uniforms": np.full(n + 8, 0.5)}, ValueError, "uniforms: expected 2 dimensions, got 1"),
        ({"parents": args["parents"][1:]}, ValueError, r"parents: expected \[sum K_b\]"),
        ({"top_k": -1}, ValueError, "top_k: expected values in"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected values in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, ValueError, "min_p: expected values in"),
        ({"typical_p": np.array([1, 1, 1, np.nan], np.float32)}, ValueError, "typical_p: expected values in"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty: expected values in"),
        ({"presence_penalty": np.ones(3, np.float32)}, ValueError, r"presence_penalty: expected one number or \[B\]"),
        ({"repetition_penalty": 1.1, "prompt_token_ids": [[20], [], [], []]}, ValueError, "prompt_token_ids: expected ids in"),
        ({"repetition_penalty": 1.1, "prompt_token_ids": [[1]]}, ValueError, "prompt_token_ids: expected a sequence"),
        ({"logit_bias": {3: np.inf}}, ValueError, "logit_bias: expected finite"),
        ({"logit_bias": {20: 1.0}}, ValueError, "logit_bias: expected ids in"),
        ({"banned_token_ids": [0.5]}, TypeError, "banned_token_ids: expected integers"),
        ({"bitmask": np.zeros((4, 0), np.uint32)}, ValueError, "bitmask: expected"),
        ({"max_emit": -1}, ValueError, "max_emit: expected values in"),
        ({"threshold_acc": 0.0, "rule": "target_only"}, ValueError, "threshold_acc: expected a number in"),
        ({"posterior_alpha": -1.0, "rule": "typical"}, ValueError, "posterior_alpha: expected"),
        ({"draft_to_target": np.array([20])}, ValueError, "draft_to_target: expected"),
        ({"draft_probs": SparseProbs(np.zeros((n, 2), np.int32), np.zeros((n, 3), np.float32))}, ValueError,
         "draft_probs: expected ids and probs of one shape"),
    ]  # fmt: skip
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            assay.verify(**{"rule": "specinfer"} | args | changes)
    with pytest.raises(ValueError, match="rule: expected sampled, gumbel or greedy"):
        assay.sample(args["target_logits"], rule="specinfer")

"""Verification on the GPU: the kernels' own source, emulated, emits the tokens, statuses and counters of the CPU's op."""

import inspect

import numpy as np
import pytest
import verify_launch

import assay
import test_spec_verify as chains
import test_spec_verify_trees as trees
from assay.ops.speculative import RULES, SparseProbs
from bf16 import BFloat16

BAD_REQUEST = 6
VOCABS = [1, 2, 3, 17, 50, 300, 2047, 2049, 4100, 6500]  # about one block of 2048 and several


def assert_same(got, want, context=""):
    for name, a, b in zip(want._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{name} {context}")


def on_gpu(args, *, team=1, seed=0, **how):
    """assay.verify of these arguments by the emulated kernels, and what each of the launches counted."""
    with pytest.MonkeyPatch.context() as patch:
        counted = verify_launch.emulated(patch, team=team, seed=seed, **how)
        return assay.verify(**args), counted


# ---- the CPU's tokens, on random requests --------------------------------------------------------------------------------


def poison(rng, args):
    """Some of what can be wrong with data."""
    logits, ids, parents, q = (args[k] for k in ("target_logits", "draft_token_ids", "parents", "draft_probs"))
    rows, vocab = logits.shape
    for _ in range(rng.integers(0, 3)):
        logits[rng.integers(rows), rng.integers(vocab)] = rng.choice([np.nan, np.inf, -np.inf])
    if rng.random() < 0.3:
        logits[rng.integers(rows)] = -np.inf
    if len(ids):
        ids[rng.integers(len(ids))] = rng.choice([-1, -2, vocab, vocab + 5])
        if parents is not None and rng.random() < 0.4:
            parents[rng.integers(len(ids))] = rng.choice([-2, 99, 0, 3])
        if isinstance(q, np.ndarray) and rng.random() < 0.4:
            q[rng.integers(len(ids)), rng.integers(vocab)] = rng.choice([np.nan, -0.1, np.inf, 0])


def sparse(rng, q):
    """The likeliest of each row; sometimes padded."""
    ids = np.sort(np.argsort(-q, axis=1)[:, :7], axis=1).astype(np.int32)
    probs = np.take_along_axis(q, ids.astype(int), 1)
    if rng.random() < 0.5:
        ids[:, 0] = -1
    return SparseProbs(ids, probs)


def some_processors(rng, seed, batch, vocab, rows):
    chance = rng.choice([0, 0.4, 1], p=[0.5, 0.25, 0.25])
    if not chance:
        return {"temperature": rng.choice(np.float32([0, 0.5, 1, 1.7]), batch)}
    every = trees.processors(seed, batch, vocab, rows if rng.random() < 0.5 else batch)
    return {name: value for name, value in every.items() if rng.random() < chance}


def some_request(rule, seed):
    """Arguments of verify: anything that it takes."""
    rng = np.random.default_rng([seed, RULES.index(rule)])
    vocab = int(rng.choice(VOCABS))
    batch, most = (int(rng.integers(1, 15)), int(rng.choice([0, 1, 4, 9, 40]))) if vocab < 2000 else (2, 5)
    args = trees.forest(seed, batch=batch, vocab=vocab, most=most, scale=float(rng.choice([0.3, 1, 3])))
    rows, drafts = len(args["target_logits"]), len(args["draft_token_ids"])
    if rule in ("rejection", "block") or rng.random() < 0.3:
        args["parents"] = None
    if rng.random() < 0.3:
        args["target_logits"] = np.round(args["target_logits"] * 2) / 2  # ties
    if rng.random() < 0.4:
        poison(rng, args)
    form = rng.choice(["dense", "sparse", "one-hot"])
    if form == "sparse" and drafts:
        args["draft_probs"] = sparse(rng, args["draft_probs"])
    elif form == "one-hot" and rule != "kseq":
        args["draft_probs"] = None
    args |= some_processors(rng, seed, batch, vocab, rows)
    dtype = rng.choice(["float32", "strided", "float16", "bfloat16"])
    if dtype == "float16":
        args["target_logits"] = args["target_logits"].astype(np.float16)
    elif dtype == "bfloat16":
        args["target_logits"] = BFloat16(args["target_logits"])
    elif dtype == "strided":
        wide = np.full((rows, vocab + 3), np.nan, np.float32)
        wide[:, :vocab] = args["target_logits"]
        args["target_logits"] = wide[:, :vocab]
    if rule != "gumbel" and rng.random() < 0.2:
        args["uniforms"] = rng.uniform(1e-9, 1 - 1e-9, drafts + 2 * batch)
    if rng.random() < 0.2:
        args["stop_token_ids"] = (
            rng.integers(0, vocab, 3) if rng.random() < 0.5 else [rng.integers(0, vocab, 2) for _ in range(batch)]
        )
    if rng.random() < 0.2:
        args["max_emit"] = rng.integers(0, 4, batch).astype(np.int32)
    if rule == "target_only":
        args |= {"threshold_single": float(rng.choice([1, 0.3])), "threshold_acc": float(rng.choice([1, 0.6]))}
    return args | {"rule": rule, "return_logprobs": bool(rng.random() < 0.5)}, int(rng.choice([1, 2, 3]))


@pytest.mark.parametrize("rule", RULES)
def test_random_requests_get_the_cpus_tokens(rule):
    """Rules, forms of q, processors, types, bad data: every output, log-probabilities and counters too, bit for bit."""
    statuses, accepted = set(), 0
    for seed in range(30):
        args, team = some_request(rule, seed)
        want = assay.verify(**args)
        assert_same(on_gpu(args, team=team, seed=seed % 5)[0], want, f"seed {seed}")
        statuses |= set(want.status.tolist())
        accepted += int(want.num_accepted.sum())
    assert len(statuses) > 2
    assert accepted > 20


@pytest.mark.parametrize("rule", ["sampled", "gumbel", "rejection", "typical", "traversal"])
def test_sanitized_requests(rule):
    """A few with every processor, small enough for the sanitizers."""
    args = trees.forest(4, batch=2, vocab=2100, most=2) | {"rule": rule, "return_logprobs": True, "num_threads": 1}
    if rule == "rejection":
        args["parents"] = None
    args |= trees.processors(4, 2, 2100, len(args["target_logits"])) | {"temperature": 0.8}
    assert_same(on_gpu(args, team=2, seed=3)[0], assay.verify(**args))


EDGES = [
    (chains, "greedy_takes_the_first_of_equals_and_stops_at_the_first_mismatch"),
    (chains, "a_token_of_no_probability_is_never_accepted_and_never_emitted"),
    (chains, "a_draft_of_no_draft_probability"),
    (chains, "no_residual_falls_back_to_the_target"),
    (chains, "cdf_overrun_gives_the_last_possible_token"),
    (chains, "a_masked_row_is_empty"),
    (chains, "empty_batches_and_no_drafts"),
    (chains, "extreme_temperatures_and_logits"),
    (chains, "out_and_strided_logits"),
    (chains, "a_draft_below_the_vocabulary"),
    (chains, "a_draft_beyond_the_vocabulary_is_rejected"),
    (chains, "a_poisoned_row_matters_only_where_it_is_reached"),
    (chains, "bad_draft_probabilities"),
    (trees, "a_chain_is_a_tree"),
]


@pytest.mark.parametrize(("module", "name"), EDGES, ids=[name for _, name in EDGES])
def test_edges(module, name, monkeypatch):
    """What the CPU's variants must do there, the GPU must."""
    verify_launch.emulated(monkeypatch, team=2)
    test = getattr(module, f"test_{name}")
    marks = [mark.args for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    cases: list[dict] = [{}]
    for names, values in marks:
        keys = [names] if isinstance(names, str) else list(names)
        cases = [c | dict(zip(keys, [v] if isinstance(names, str) else v, strict=True)) for c in cases for v in values]
    for values in cases:
        if values.get("dense", True) in (True, False):
            test(variant=None, **values)
    assert "variant" in inspect.signature(test).parameters


@pytest.mark.parametrize(("vocab", "drafts", "one_hot"), [(3, 2, False), (3, 2, True)])
def test_kernels_emit_exactly_the_target_law(vocab, drafts, one_hot, monkeypatch):
    """The law by enumeration, as of the CPU's variants: total variation below 1e-6."""
    chain = chains.Chain(vocab, drafts, one_hot=one_hot)
    verify_launch.emulated(monkeypatch)
    found = chain.thresholds(24, isa=None)
    assert chains.distance(chain.emitted_law(found), chain.target_law()) <= 1e-6


# ---- schedules, teams, batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["rejection", "block", "kseq", "traversal"])
def test_the_size_of_a_team_and_the_schedule_change_nothing(rule):
    args = trees.forest(11, batch=3, vocab=20000, most=4) | {"rule": rule}
    if rule in ("rejection", "block"):
        args["parents"] = None
    want = assay.verify(**args)
    assert want.counters[:, 1].sum() > 0  # residuals over the whole vocabulary
    for team, seed, resident in [(1, 0, 0), (1, 7, 1), (2, 3, 2), (4, 5, 5), (7, 1, 7), (16, 2, 0)]:
        assert_same(on_gpu(args, team=team, seed=seed, resident=resident)[0], want, f"{team} {seed}")


def test_a_team_needs_no_room_for_the_whole_grid():
    """More blocks than fit at a time: tickets let each team finish."""
    args = trees.forest(3, batch=9, vocab=5000, most=4) | {"rule": "specinfer", "temperature": 1.0}
    assert_same(on_gpu(args, team=3, seed=4, resident=3)[0], assay.verify(**args))


# ---- what moves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_logits_are_read_once(dtype, bytes_each):
    """By the scan, and then some blocks where a row is drawn from."""
    args = chains.case(4, 8192, 3, dense=False, seed=1, dtype="float32" if dtype == "bfloat16" else dtype)
    rows = len(args["target_logits"])
    if dtype == "bfloat16":
        args["target_logits"] = BFloat16(args["target_logits"])
    for rule, walk_blocks in (("greedy", 0), ("rejection", 3 * 4), ("sampled", rows)):
        _, [counted] = on_gpu(args | {"rule": rule, "temperature": 1.0})
        logits = rows * 8192 * bytes_each
        small = 256 * counted["assay_verify_scan"].threads
        assert logits <= counted["assay_verify_scan"].ldg_bytes <= logits + small
        assert counted["assay_chain_verify"].ldg_bytes <= walk_blocks * 2048 * bytes_each + 400 * 256 * 4
    assert counted["assay_verify_scan"].barriers == 3 * rows * 4


def test_a_rejection_reads_one_row_of_each_more():
    """Its logits and its draft's distribution, and then the block that holds the token, twice."""
    rng = np.random.default_rng(0)
    q = np.zeros((1, 8192), np.float32)
    q[0, 77] = 1
    args = {"target_logits": rng.standard_normal((2, 8192)).astype(np.float32), "draft_token_ids": np.array([77], np.int32),
            "cu_num_draft_tokens": np.array([0, 1], np.int32), "draft_probs": q, "rule": "rejection",
            "uniforms": np.array([0.999, 0.5, 0.5])}  # fmt: skip
    result, [counted] = on_gpu(args)
    assert result.num_accepted[0] == 0
    read = counted["assay_chain_verify"].ldg_bytes
    assert 2 * 8192 * 4 <= read <= 2 * (8192 + 2 * 2048) * 4 + 65536


# ---- what only the device can refuse -------------------------------------------------------------------------------------------


def direct(change, **args):
    """The launches with fields of the call changed behind the checks of assay.verify: statuses."""

    def call(logits, a, written, _isa, _num_threads):
        fields = verify_launch.fields(logits, a, written)
        change(fields["call"])
        verify_launch.launch(fields, a.rule)

    with pytest.MonkeyPatch.context() as patch:
        verify_launch.instead_of_c(patch, call)
        return assay.verify(**args)


@pytest.mark.parametrize("tree", [False, True])
def test_values_that_the_host_cannot_see(tree):
    args = trees.forest(2, batch=4, vocab=40, most=4) | {"rule": "specinfer", "temperature": np.ones(4, np.float32),
                                                         "max_emit": np.full(4, 9, np.int32)}  # fmt: skip
    if not tree:
        args["parents"] = None
    want = assay.verify(**args)
    assert not want.status.any()

    def changed(name, at, value):
        def change(call):
            call[name] = call[name].copy()
            call[name][at] = value

        return change

    for name, value in (("temperature", np.nan), ("temperature", -1), ("temperature", np.inf), ("max_emit", -1)):
        got = direct(changed(name, 2, value), **args)
        assert got.status.tolist() == [0, 0, BAD_REQUEST, 0]
        assert (got.output_token_ids[2] == -1).all()
        assert got.num_emitted[2] == got.num_accepted[2] == 0
        for other in (0, 1, 3):  # do not notice
            np.testing.assert_array_equal(got.output_token_ids[other], want.output_token_ids[other])
    # Offsets that do not rise from 0 are nobody's; the last request alone may claim more than there is.
    for at, value in ((0, 1), (1, -3), (2, 10**6)):
        got = direct(changed("cu_num_draft_tokens", at, value), **args)
        assert (got.status == BAD_REQUEST).all()
        assert (got.output_token_ids == -1).all()
    assert direct(changed("cu_num_draft_tokens", 4, 10**6), **args).status.tolist() == [0, 0, 0, BAD_REQUEST]

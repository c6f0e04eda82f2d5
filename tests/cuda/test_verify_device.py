"""Verification and sampling on a GPU by the public functions, plans and launcher included."""

import numpy as np
import pytest

import assay
import test_spec_verify as chains
import test_spec_verify_trees as trees
from assay.errors import RowError, UnsupportedError
from assay.ops.speculative import RULES, SparseProbs
from assay.ops.tree import tree_build

BAD_REQUEST = 6
ARRAYS = ("target_logits", "draft_token_ids", "draft_probs", "parents", "seed", "position", "temperature", "top_k", "top_p",
          "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "bitmask", "max_emit",
          "uniforms", "stop_token_ids")  # fmt: skip
DTYPES = {"temperature": np.float32, "top_k": np.int32, "max_emit": np.int32, "stop_token_ids": np.int32}


def moved(gpu, args, *, also=()):
    """The arguments with their arrays on the GPU."""
    there = dict(args)
    for name in (*ARRAYS, *also):
        if isinstance(args.get(name), np.ndarray):
            there[name] = gpu.to_device(args[name].astype(DTYPES.get(name, args[name].dtype)))
    if isinstance(args.get("draft_probs"), SparseProbs):
        there["draft_probs"] = SparseProbs(*(gpu.to_device(x) for x in args["draft_probs"]))
    return there


def assert_same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        if isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a.numpy() if hasattr(a, "numpy") else a, b, err_msg=name)
        else:
            assert a == b, name


def request_of(rule, seed=5, vocab=2100):
    args = trees.forest(seed, batch=5, vocab=vocab, most=5) | {"rule": rule, "return_logprobs": True}
    if rule in ("rejection", "block"):
        args["parents"] = None
    return args


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_as_on_the_cpu(gpu, rule):
    args = request_of(rule)
    args["temperature"] = np.array([1, 0, 0.5, 1.3, 1], np.float32)
    want = assay.verify(**args)
    assert_same(assay.verify(**moved(gpu, args)), want)
    assert_same(assay.verify(**moved(gpu, args), stream=gpu.Stream()), want)


@pytest.mark.parametrize("rule", ["sampled", "gumbel", "specinfer", "greedy"])
def test_every_processor_as_on_the_cpu(gpu, rule):
    args = request_of(rule, vocab=300)
    args |= trees.processors(3, 5, 300, len(args["target_logits"]))
    args |= {"stop_token_ids": np.arange(0, 300, 3), "max_emit": np.array([9, 1, 0, 9, 2], np.int32)}
    want = assay.verify(**args)
    assert_same(assay.verify(**moved(gpu, args)), want)
    # The same with all but logits and drafts on the host.
    here = {name: gpu.to_device(args[name]) for name in ("target_logits", "draft_token_ids", "draft_probs", "parents")}
    assert_same(assay.verify(**args | here), want)


def test_offsets_on_the_gpu_and_sparse_drafts(gpu):
    args = chains.case(6, 90, 4)
    cu = args["cu_num_draft_tokens"]
    ids = np.sort(np.argsort(-args["draft_probs"], axis=1)[:, :9], axis=1).astype(np.int32)
    args["draft_probs"] = SparseProbs(ids, np.take_along_axis(args["draft_probs"], ids.astype(int), 1))
    want = assay.verify(**args)
    there = moved(gpu, args, also=("cu_num_draft_tokens",))
    assert_same(assay.verify(**there, max_drafts=int(np.diff(cu).max())), want)
    wide = assay.verify(**there)
    assert wide.output_token_ids.shape == (6, cu[-1] + 1)
    np.testing.assert_array_equal(wide.num_emitted.numpy(), want.num_emitted)
    got = assay.verify(**there, max_drafts=1)
    np.testing.assert_array_equal(got.status.numpy(), np.where(np.diff(cu) > 1, BAD_REQUEST, 0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(gpu, dtype):
    args = chains.case(5, 500, 3, dtype="float16")
    if dtype == "bfloat16":
        bits = (args["target_logits"].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        args["target_logits"] = (bits.astype(np.uint32) << 16).view(np.float32)
        there = moved(gpu, args) | {"target_logits": gpu.to_device(bits, dtype="bfloat16")}
    else:
        there = moved(gpu, args)
    assert_same(assay.verify(**there), assay.verify(**args))


def test_sampling_without_drafts(gpu):
    logits = np.random.default_rng(2).standard_normal((7, 3000)).astype(np.float32)
    for rule in ("sampled", "gumbel", "greedy"):
        want = assay.sample(logits, seed=9, position=4, rule=rule, temperature=0.7)
        assert_same(assay.sample(gpu.to_device(logits), seed=9, position=4, rule=rule, temperature=0.7), want)
    got = assay.sample(gpu.empty((0, 50)), rule="greedy")
    assert got.output_token_ids.numpy().shape == (0, 1)


def test_in_place_and_in_a_graph(gpu):
    """A captured call allocates nothing; its numbers and workspace are those of the call before it."""
    args = chains.case(4, 2500, 3)
    want = assay.verify(**args, temperature=0.8)
    stream = gpu.Stream()
    there = moved(gpu, args, also=("cu_num_draft_tokens",))
    how = {"temperature": 0.8, "max_drafts": want.output_token_ids.shape[1] - 1, "stream": stream}
    first = assay.verify(**there, **how)
    with stream.capture() as graph:
        again = assay.verify(**there, **how, out=first)
        with pytest.raises(ValueError, match="output_token_ids: expected an array while a graph is captured"):
            assay.verify(**there, **how)
        with pytest.raises(ValueError, match="top_k: expected an array on the GPU while a graph is captured"):
            assay.verify(**there, **how, top_k=np.array([1, 2, 3, 4]), out=first)
    assert again.output_token_ids is first.output_token_ids
    for change in (1, -1):
        there["target_logits"].copy_from(change * args["target_logits"])
        gpu.synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert_same(again, assay.verify(**args | {"target_logits": change * args["target_logits"]}, temperature=0.8))


def test_refusals(gpu):
    args = chains.case(3, 40, 3)
    n = len(args["draft_token_ids"])
    there = moved(gpu, args)

    def refused(error, message, **changes):
        with pytest.raises(error, match=message):
            assay.verify(**there | changes)

    refused(UnsupportedError, "draft_to_target: expected None on a GPU", draft_to_target=np.arange(40))
    refused(
        TypeError, "draft_token_ids: expected int32, got int64", draft_token_ids=gpu.to_device(np.zeros(n, np.int64))
    )
    refused(ValueError, rf"draft_probs: expected \[{n}, 40\]", draft_probs=gpu.to_device(np.zeros((n, 39), np.float32)))
    refused(
        ValueError, rf"target_logits: expected sum\(K_b \+ 1\) = {n + 3} rows", target_logits=gpu.empty((n + 2, 40))
    )
    refused(ValueError, "isa: expected None for arrays on a GPU", isa="scalar")
    refused(ValueError, "backend: expected 'c' for arrays on a GPU", backend="reference")
    refused(ValueError, r"temperature: expected one number or \[B\] = \[3\], got \[2\]", temperature=gpu.empty(2))
    refused(ValueError, "seed: expected one for each request", seed=None)
    refused(ValueError, "max_drafts: expected .* or more, got 0", max_drafts=0)
    refused(ValueError, "uniforms: expected", uniforms=gpu.empty(3, "float64"))
    refused(TypeError, "out: expected", out=(1, 2))
    with pytest.raises(TypeError, match="draft_token_ids"):
        assay.verify(args["target_logits"], there["draft_token_ids"], args["cu_num_draft_tokens"], rule="greedy")
    with pytest.raises(ValueError, match="max_drafts: expected None"):
        assay.verify(**args, max_drafts=3)


def test_bad_rows_raise_when_asked_to(gpu):
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = np.nan
    none, cu = np.empty(0, np.int32), np.zeros(4, np.int32)
    with pytest.raises(RowError, match=r"request 1: a NaN .*status 1, 1 of 3 requests"):
        assay.verify(gpu.to_device(logits), none, cu, rule="greedy", on_status="raise")
    hot = gpu.to_device(np.array([1, 1, np.nan], np.float32))
    with pytest.raises(RowError, match="request 2: a value on the GPU that is out of its range"):
        assay.verify(
            gpu.to_device(np.zeros((3, 5), np.float32)),
            none,
            cu,
            rule="sampled",
            seed=1,
            position=0,
            temperature=hot,
            on_status="raise",
        )


def test_trees_as_on_the_cpu(gpu):
    rng = np.random.default_rng(1)
    parents = np.array([[rng.integers(-1, i) if i else -1 for i in range(40)] for _ in range(3)], np.int32)
    parents[1, 9] = 9
    tokens = np.stack([rng.permutation(99)[:40] for _ in range(3)]).astype(np.int32)
    got = tree_build(gpu.to_device(parents), gpu.to_device(tokens), position=7)
    info = got.info.numpy()
    for tree in range(3):
        want = tree_build(parents[tree], tokens[tree], position=7)
        assert (info[tree, 0], info[tree, 1]) == (want.status, want.node)
        if want.status:
            continue
        for name in ("depth", "first_child", "next_sibling", "positions", "mask", "mask_words"):
            np.testing.assert_array_equal(getattr(got, name).numpy()[tree], getattr(want, name), err_msg=name)
        paths = got.retrieve_indices.numpy()[tree, : want.retrieve_indices.size].reshape(want.retrieve_indices.shape)
        np.testing.assert_array_equal(paths, want.retrieve_indices)
    none = tree_build(gpu.empty((0,), "int32"))
    assert none.mask.numpy().tolist() == [[[1]]]
    with pytest.raises(ValueError, match="parents: expected at most 4096 nodes, got 4097"):
        tree_build(gpu.empty((4097,), "int32"))
    with pytest.raises(ValueError, match=r"tokens: expected \[40\] as parents, got \[39\]"):
        tree_build(gpu.empty((40,), "int32"), gpu.empty((39,), "int32"))

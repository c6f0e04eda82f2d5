"""Calls that do without cffi (csrc/python): results and errors are those of the way around them, and nothing is kept or lost."""

import gc
import itertools
import sys
import tracemalloc

import numpy as np
import pytest

import assay
from assay._ffi import calls
from assay.ops.moe import RouteResult
from assay.ops.speculative import VerifyResult
from assay.reference.tree import TreeLayout


def misaligned(array):
    """The same values, one byte off their boundary."""
    room = np.empty(array.nbytes + 1, np.uint8)[1:]
    out = np.ndarray(array.shape, array.dtype, room)
    out[...] = array
    assert out.itemsize == 1 or not out.flags.aligned
    return out


def outcome(call):
    """What a call gave: the bytes, types and shapes of its results, or its error's type and text."""
    try:
        result = call()
    except Exception as exc:  # noqa: BLE001
        return type(exc), str(exc)
    items = (result,) if isinstance(result, np.ndarray) else result
    return [(x.dtype.str, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x for x in items]


def forms(x):
    """A matrix of logits as it may come, rightly and wrongly."""
    wide = np.zeros((len(x), 3 * x.shape[1]), np.float32)
    wide[:, : x.shape[1]] = x
    return [
        x, x.astype(np.float16), wide[:, : x.shape[1]], misaligned(x), np.asfortranarray(x), x[::-1], wide[:, ::3],
        np.broadcast_to(x[0], x.shape), x.astype(float), x.astype(">f4"), x.view(np.uint16), x[0], x[:, :0], x[:0],
        x.view(np.recarray), x.tolist(), None, "no",
    ]  # fmt: skip


NUMBERS = [None, 0, 1, 2, 8, 9, -1, 257, 2**31, 2**70, True, False, 2.0, np.nan, np.int64(2), "2", np.arange(3)]
LOGITS = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)


def test_routing_is_the_same_by_either_way():
    """`out` as a list of Nones changes nothing but the way that a call takes."""
    seen = set()
    for x, k, threads in itertools.product(forms(LOGITS), NUMBERS, NUMBERS):
        for renormalize in (None, True, False, 1, "", np.array([1, 0])):
            direct = outcome(lambda x=x, k=k, r=renormalize, n=threads: assay.moe_route(x, k, r, num_threads=n))
            around = outcome(
                lambda x=x, k=k, r=renormalize, n=threads: assay.moe_route(x, k, r, [None] * 3, num_threads=n)
            )
            assert direct == around, (x, k, renormalize, threads)
            seen.add(direct[0] if isinstance(direct, tuple) else "results")
    assert seen == {"results", TypeError, ValueError}


def test_the_short_way_is_the_one_taken(monkeypatch):
    """Otherwise the tests here would compare a thing with itself."""

    def never(*args, **kwargs):
        raise AssertionError("the common call went the long way")

    monkeypatch.setattr("assay.ops.moe.as_outputs", never)
    for x in forms(LOGITS)[:3]:
        assert assay.moe_route(x, 2).status.tolist() == [0] * 5
        assert assay.moe_route(x, 2, False, num_threads=2).topk_ids.shape == (5, 2)
    with pytest.raises(AssertionError):
        assay.moe_route(LOGITS, 2, scoring="sigmoid")


def whole_route():
    """Every argument of the module's moe_route."""
    out = np.empty((5, 3), np.float32), np.empty((5, 3), np.int32), np.empty(5, np.int32)
    return [RouteResult, LOGITS, 2, True, 1, out, -1, False, 0, np.zeros(8, np.float32), 1, 1, False, 1.0, 1.0, 1]


JUNK = [
    *NUMBERS, (), (None,), (None, None, None), (1, 2, 3), (np.empty((5, 3)),) * 3, np.empty(8, np.float32)[::-1], RouteResult,
    int, np.zeros((5, 3), np.float32), misaligned(np.zeros(8, np.float32)), np.zeros(8, ">f4"), np.zeros((8, 1), np.float32),
    np.full(8, np.nan, np.float32), float("inf"), -1e300, object(),
]  # fmt: skip


def test_results_are_new_arrays_that_own_their_memory():
    first, second = assay.moe_route(LOGITS, 2), assay.moe_route(LOGITS, 2)
    assert type(first) is RouteResult
    for a, b in zip(first, second, strict=True):
        assert a.flags.owndata
        assert a.flags.writeable
        assert not np.shares_memory(a, b)
        assert sys.getrefcount(a) <= 4  # the tuple's, a's, zip's and the call's


# ---- verification ----------------------------------------------------------------------------------------------------


def chain():
    """Arguments of verify in the form that C takes: three requests of 2, 0 and 1 drafts over 40 tokens."""
    rng = np.random.default_rng(1)
    q = rng.dirichlet(np.full(40, 0.5), 3).astype(np.float32)
    return {
        "target_logits": rng.standard_normal((6, 40), dtype=np.float32), "draft_token_ids": np.array([3, 7, 1], np.int32),
        "cu_num_draft_tokens": np.array([0, 2, 2, 3], np.int32), "draft_probs": q, "rule": "rejection",
        "seed": np.arange(3, dtype=np.uint64), "position": np.arange(3),
    }  # fmt: skip


def each(good, *more):
    """One number a request, rightly and wrongly: an array of `good` as the kernel takes it, as others hold it, and numbers."""
    return [
        good, misaligned(good), np.repeat(good, 2)[::2], good[:2], good.astype(float), good.astype(good.dtype.newbyteorder()),
        good.astype(np.int64), good.astype(np.uint64), good[None], -good, good.tolist(), np.array(1, good.dtype), *NUMBERS,
        0.5, 1e-60, 3.4e38, 1e39, -1e-3, float("inf"), np.float32(0.5), *more,
    ]  # fmt: skip


HALVES, ONES = np.full(3, 0.5, np.float32), np.ones(3, np.int32)
#: What each argument may be, beside the others as they are.
VERIFY = {
    "target_logits": forms(np.random.default_rng(2).standard_normal((6, 40), dtype=np.float32)),
    "draft_token_ids": [*each(ONES), np.array([3, -1, 1], np.int32), np.array([-5, 2, 2**31 - 1], np.int32)],
    "cu_num_draft_tokens": [
        *each(ONES), *(np.array(x, np.int32) for x in ([0, 2, 2, 3], [0, 0, 0, 3], [0, 2, 1, 3], [1, 2, 2, 3], [0, 2, 2, 4], [],
                                                     [0], [0, 2**31 - 1, 3], [0, -1, 2, 3], [0, 0, 0, 0])),
        np.array([0, 2, 2, 3]), [0, 2, 2, 3],
    ],
    "draft_probs": [None, *forms(chain()["draft_probs"]), assay.SparseProbs(np.array([[3], [7], [1]]), np.ones((3, 1), np.float32))],
    "rule": [*assay.ops.speculative.RULES, "lucky", None, [], 3],
    "parents": [None, *each(np.array([-1, 0, -1], np.int32)), np.array([-1, 1, -1], np.int32)],
    "temperature": each(HALVES, np.array([0, 1, 2], np.float32), np.array([0, np.nan, 1], np.float32)),
    "top_k": each(ONES, np.array([1, 2**31 - 1, 0], np.int32)),
    "top_p": each(HALVES, np.array([0.5, 0, 1], np.float32), np.array([0.5, 1.5, 1], np.float32)),
    "min_p": each(HALVES, np.array([0.5, 0, 1], np.float32)),
    "typical_p": each(HALVES, np.array([0.5, 0, 1], np.float32)),
    "repetition_penalty": each(HALVES, np.array([0.5, 0, 1], np.float32)),
    "frequency_penalty": each(HALVES),
    "presence_penalty": each(HALVES),
    "max_emit": each(ONES),
    "seed": each(np.arange(3, dtype=np.uint64), np.arange(-1, 2), 2**64 - 1, 2**64),
    "position": each(np.arange(3), 2**63 - 1, 2**63, -(2**63)),
    "num_threads": NUMBERS,
    "return_logprobs": [True, False, 1, 0, None, "", np.bool_(True)],
    "on_status": ["return", "raise", None],
}  # fmt: skip
#: Under which every one of those is tried: temperature 0 and greedy ignore what others need.
SETTINGS = [{}, {"rule": "greedy"}, {"temperature": 0}, {"temperature": np.array([0, 1, 1], np.float32), "return_logprobs": True},
            {"rule": "specinfer", "parents": np.array([-1, -1, -1], np.int32), "top_k": 5, "top_p": 0.9, "max_emit": 1},
            {"rule": "gumbel", "seed": 3, "position": -1, "min_p": 0.1}]  # fmt: skip


def both(args):
    """What a call gives by the short way, and by the other, which an `out` that is a list makes it take."""
    return outcome(lambda: assay.verify(**args)), outcome(lambda: assay.verify(**args, out=[None] * 6))


@pytest.mark.parametrize("name", VERIFY)
def test_verification_is_the_same_by_either_way(name):
    seen = set()
    for setting, value in itertools.product(SETTINGS, VERIFY[name]):
        direct, around = both(chain() | setting | {name: value})
        assert direct == around, (setting, value)
        seen.add(direct[0] if isinstance(direct, tuple) else "results")
    assert {"results"} < seen or name in ("return_logprobs",)


def test_random_arguments_of_verification_are_the_same_by_either_way():
    rng = np.random.default_rng(3)
    results = 0
    for _ in range(4000):
        args = chain()
        for name in rng.choice(list(VERIFY), rng.integers(1, 6), replace=False):
            # The first of each are more often right.
            args[name] = VERIFY[name][min(int(rng.exponential(6)), len(VERIFY[name]) - 1)]
        direct, around = both(args)
        assert direct == around, args
        results += isinstance(direct, list)
    assert results > 400


def test_the_short_way_is_the_one_that_verification_takes(monkeypatch):
    want = [outcome(lambda r=rule: assay.verify(**chain() | {"rule": r})) for rule in assay.ops.speculative.RULES]

    def never(*args, **kwargs):
        raise AssertionError("the common call went the long way")

    monkeypatch.setattr("assay.ops.speculative.as_tensor", never)
    for rule, expected in zip(assay.ops.speculative.RULES, want, strict=True):
        if rule not in ("typical", "target_only"):
            assert outcome(lambda r=rule: assay.verify(**chain() | {"rule": r})) == expected
    assert (
        assay.verify(**chain(), temperature=HALVES, top_k=3, top_p=0.5, min_p=0.1, max_emit=ONES).status.tolist()
        == [0] * 3
    )
    with pytest.raises(AssertionError):
        assay.verify(**chain() | {"rule": "typical"})


def whole_verify():
    """Every argument of the module's verify."""
    x = chain()
    out = assay.verify(**x, return_logprobs=True)
    ints = (
        out.output_token_ids,
        out.num_accepted,
        out.num_emitted,
        out.status,
        out.accept_index,
        out.counters,
        out.logprobs,
    )
    edits = np.array([0, 1, 1, 2], np.int32), np.array([4, 5], np.int32), np.zeros(2, np.float32), ONES[:2], ONES[:2]
    mask, stop = np.full((3, 2), -1, np.int32).view(np.uint32), np.array([9], np.int32)
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    return [
        VerifyResult, x["target_logits"], x["draft_token_ids"], x["cu_num_draft_tokens"], x["draft_probs"], 5, None, 1, True,
        ones, ONES, ones, zeros, ones, ones, zeros, zeros, ONES, x["seed"], x["position"], ints, -1, False,
        np.full(9, 0.5), None, None, *edits, mask, False, stop, None, 0.09, 0.3, 1.0, 1.0,
    ]  # fmt: skip


def test_outputs_that_share_memory_are_refused_by_the_short_way_too(layer):
    args = chain()
    out = assay.verify(**args)
    assert assay.verify(**args, out=out).output_token_ids is out.output_token_ids
    shared = {
        "num_emitted": out.num_accepted,
        "status": args["draft_token_ids"],
        "num_accepted": args["cu_num_draft_tokens"][1:],
    }
    for name, array in shared.items():
        with pytest.raises(ValueError, match="memory of its own"):
            assay.verify(**args, out=out._replace(**{name: array}))
    route = assay.moe_route(LOGITS, 5)
    assert assay.moe_route(LOGITS, 5, out=route).topk_ids is route.topk_ids
    with pytest.raises(ValueError, match="memory of its own"):
        assay.moe_route(LOGITS, 5, out=route._replace(status=route.topk_ids[0]))
    with pytest.raises(ValueError, match="memory of its own"):
        assay.moe_route(LOGITS, 8, out=(LOGITS, np.empty((5, 8), np.int32), None))
    y = np.empty((5, 32), np.float32)
    assert assay.moe_experts(**layer, out=y) is y
    np.testing.assert_array_equal(y, assay.moe_experts(**layer))
    with pytest.raises(ValueError, match="memory of its own"):
        assay.moe_experts(**layer, out=layer["x"])


# ---- the expert layer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer():
    """Arguments of moe_experts in the form that C takes: five tokens, two of six experts each."""
    rng = np.random.default_rng(4)
    experts = assay.quantize_experts(
        rng.standard_normal((6, 64, 32), dtype=np.float32), rng.standard_normal((6, 32, 32), dtype=np.float32)
    )
    return {
        "x": rng.standard_normal((5, 32), dtype=np.float32), "topk_ids": rng.integers(-1, 7, (5, 2)).astype(np.int32),
        "topk_weights": rng.random((5, 2), np.float32), "experts": experts, "num_threads": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights", "a16", "weights_on_input", "num_threads"])
def test_the_expert_layer_is_the_same_by_either_way(layer, name):
    """return_cost makes a call take the long way."""
    given = layer.get(name)
    switches = [True, False]
    values = (
        [*forms(given), given.astype(np.int64), given[:, :1]]
        if isinstance(given, np.ndarray)
        else [*NUMBERS, *switches]
    )
    seen = set()
    for a16, on_input, value in itertools.product(switches, switches, values):
        args = layer | {"a16": a16, "weights_on_input": on_input, name: value}
        direct = outcome(lambda args=args: assay.moe_experts(**args))
        around = outcome(lambda args=args: (assay.moe_experts(**args, return_cost=True)[0],))
        assert direct == around, args
        seen.add(direct[0] if isinstance(direct, tuple) else "results")
    assert {"results", TypeError} <= seen


def test_the_short_way_is_the_one_that_the_expert_layer_takes(layer, monkeypatch):
    want = outcome(lambda: assay.moe_experts(**layer))  # and makes this thread's workspace

    def never(*args, **kwargs):
        raise AssertionError("the common call went the long way")

    monkeypatch.setattr("assay.ops.moe_experts.as_tensor", never)
    assert outcome(lambda: assay.moe_experts(**layer)) == want
    with pytest.raises(AssertionError):
        assay.moe_experts(**layer, num_shared=1)


@pytest.fixture(scope="module")
def whole_experts(layer):
    """Every argument of the module's moe_experts."""
    room = np.empty(1 << 16, np.uint8)
    return [
        layer["experts"]._bytes,
        layer["x"],
        layer["topk_ids"],
        layer["topk_weights"],
        False,
        True,
        1,
        room,
        np.empty((5, 32), np.float32),
    ]


# ---- the entries themselves ------------------------------------------------------------------------------------------


def strange_calls(good, short):
    """Calls of an entry with one or two arguments that are none, or the wrong number of them."""
    for given in (good, short):
        for i, bad in itertools.product(range(len(given)), JUNK):
            yield [*given[:i], bad, *given[i + 1 :]]
            for j in range(i):
                yield [*given[:j], bad, *given[j + 1 : i], bad, *given[i + 1 :]]
        for i, array in enumerate(given):
            if isinstance(array, np.ndarray):
                for bad in (
                    misaligned(array),
                    array.astype(array.dtype.newbyteorder()),
                    array[:-1],
                    array[..., None],
                    -array,
                ):
                    yield [*given[:i], bad, *given[i + 1 :]]
        for i, arrays in enumerate(given):
            for k in range(len(arrays) if isinstance(arrays, tuple) else 0):
                frozen = arrays[k].copy()
                frozen.flags.writeable = False
                for bad in (frozen, arrays[k][:-1], arrays[k].astype(np.complex64), misaligned(arrays[k]), None, 3):
                    yield [*given[:i], (*arrays[:k], bad, *arrays[k + 1 :]), *given[i + 1 :]]
    for count in range(len(good) + 2):
        yield (good * 2)[:count]


def answer(entry, args):
    try:
        found = entry(*args)
    except (TypeError, ValueError) as exc:  # and no SystemError
        return type(exc)
    assert type(found) in (int, np.ndarray, RouteResult, TreeLayout, VerifyResult), args
    return type(found)


@pytest.mark.parametrize("name", ["moe_experts", "moe_route", "tree_build", "verify"])
def test_strange_arguments_are_refused_and_nothing_is_kept(name, whole_experts):
    if name == "moe_route":
        entry, good, result = calls.moe_route, whole_route(), RouteResult
        short = [*good[:5], None]
    elif name == "moe_experts":
        entry, good, result = calls.moe_experts, whole_experts, np.ndarray
        short = [*good[:6], None, good[7], None]
    elif name == "tree_build":
        entry, result = calls.tree_build, TreeLayout
        good = [TreeLayout, np.array([-1, 0, 0, 1], np.int32), np.array([7, 8, 9, 7], np.int32), 3, 4]
        short = [*good[:2], None, 0, None]
    else:
        entry, good, result = calls.verify, whole_verify(), VerifyResult
        short = [*good[:14], 1.0, 0.0, 0.0, *good[17:21]]  # penalties need some of what is cut off
    assert answer(entry, good) is result
    assert answer(entry, short) is result
    every = list(strange_calls(good, short))
    if name == "verify":
        every = every[::3]
    kinds = {answer(entry, args) for args in every}  # also the first time, which fills caches
    assert {int, result, TypeError} <= kinds <= {int, result, RouteResult, TypeError, ValueError}
    held = [
        x
        for x in (None, True, False, result, *JUNK, *good)
        if isinstance(x, bool) or not isinstance(x, int | float | str)
    ]
    gc.collect()
    tracemalloc.start()
    try:
        before, bytes_before = [sys.getrefcount(x) for x in held], tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            for args in every:
                answer(entry, args)
        gc.collect()
        bytes_after, after = tracemalloc.get_traced_memory()[0], [sys.getrefcount(x) for x in held]
    finally:
        tracemalloc.stop()
    # Five rounds of each would lose five references or more; the interpreter itself holds a few of None and True.
    assert all(abs(b - a) < 5 for a, b in zip(before, after, strict=True)), list(zip(before, after, strict=True))
    assert bytes_after - bytes_before < 8192

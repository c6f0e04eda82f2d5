"""Calls that do without cffi (csrc/python): results and errors are those of the way around them, and nothing is kept or lost."""

import gc
import itertools
import sys
import tracemalloc

import numpy as np
import pytest

import assay
from assay._ffi import calls, lib
from assay.ops.moe import RouteResult


def misaligned(array):
    """The same values, one byte off their boundary."""
    room = np.empty(array.nbytes + 1, np.uint8)[1:]
    out = np.ndarray(array.shape, array.dtype, room)
    out[...] = array
    assert not out.flags.aligned
    return out


def outcome(call):
    """What a call gave: the bytes, types and shapes of its results, or its error's type and text."""
    try:
        result = call()
    except Exception as exc:  # noqa: BLE001
        return type(exc), str(exc)
    return [(x.dtype.str, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x for x in result]


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
    """`out` of Nones changes nothing but the way that a call takes."""
    seen = set()
    for x, k, threads in itertools.product(forms(LOGITS), NUMBERS, NUMBERS):
        for renormalize in (None, True, False, 1, "", np.array([1, 0])):
            direct = outcome(lambda x=x, k=k, r=renormalize, n=threads: assay.moe_route(x, k, r, num_threads=n))
            around = outcome(
                lambda x=x, k=k, r=renormalize, n=threads: assay.moe_route(x, k, r, (None, None, None), num_threads=n)
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


def whole_call():
    """Every argument of the module's moe_route."""
    out = np.empty((5, 3), np.float32), np.empty((5, 3), np.int32), np.empty(5, np.int32)
    return [RouteResult, LOGITS, 2, True, 1, out, -1, False, 0, np.zeros(8, np.float32), 1, 1, False, 1.0, 1.0, 1]


JUNK = [
    *NUMBERS, (), (None,), (None, None, None), (1, 2, 3), (np.empty((5, 3)),) * 3, np.empty(8, np.float32)[::-1], RouteResult,
    int, np.zeros((5, 3), np.float32), misaligned(np.zeros(8, np.float32)), np.zeros(8, ">f4"), np.zeros((8, 1), np.float32),
    np.full(8, np.nan, np.float32), float("inf"), -1e300, object(),
]  # fmt: skip


def strange_calls():
    """Calls of the module's own moe_route with one or two arguments that are none, or the wrong number of them."""
    good = whole_call()
    read_only = tuple(x.copy() for x in good[5])
    read_only[1].flags.writeable = False
    for given in (good, good[:5]):
        for i, bad in itertools.product(range(len(given)), [*JUNK, read_only]):
            yield [*given[:i], bad, *given[i + 1 :]]
            for j in range(i):
                yield [*given[:j], bad, *given[j + 1 : i], bad, *given[i + 1 :]]
    for count in range(len(good) + 2):
        yield (good * 2)[:count]


def answer(entry, args):
    try:
        found = entry(*args)
    except (TypeError, ValueError) as exc:  # and no SystemError
        return type(exc)
    assert type(found) in (int, RouteResult), args
    return type(found)


def test_strange_arguments_are_refused_and_nothing_is_kept():
    assert answer(calls.moe_route, whole_call()) is RouteResult
    every = list(strange_calls())
    kinds = {answer(calls.moe_route, args) for args in every}  # also the first time, which fills caches
    assert kinds == {int, RouteResult, TypeError, ValueError}
    held = [None, True, False, lib, RouteResult, LOGITS, *JUNK, *whole_call()]
    held = [x for x in held if not isinstance(x, int | float | str) or isinstance(x, bool)]
    gc.collect()
    tracemalloc.start()
    try:
        before, bytes_before = [sys.getrefcount(x) for x in held], tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            for args in every:
                answer(calls.moe_route, args)
        gc.collect()
        bytes_after, after = tracemalloc.get_traced_memory()[0], [sys.getrefcount(x) for x in held]
    finally:
        tracemalloc.stop()
    # Five rounds of each would lose five references or more; the interpreter itself holds a few of None and True.
    assert all(abs(b - a) < 5 for a, b in zip(before, after, strict=True)), list(zip(before, after, strict=True))
    assert bytes_after - bytes_before < 4096


def test_results_are_new_arrays_that_own_their_memory():
    first, second = assay.moe_route(LOGITS, 2), assay.moe_route(LOGITS, 2)
    assert type(first) is RouteResult
    for a, b in zip(first, second, strict=True):
        assert a.flags.owndata
        assert a.flags.writeable
        assert not np.shares_memory(a, b)
        assert sys.getrefcount(a) <= 4  # the tuple's, a's, zip's and the call's

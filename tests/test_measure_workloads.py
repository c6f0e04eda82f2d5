"""Workloads: data larger than the cache, and an answer that is checked before it is timed."""

from dataclasses import replace

import numpy as np
import pytest

from assay import machine
from assay.errors import AssayError
from assay.measure.points import Point
from assay.measure.workloads import Workloads
from assay.ops import info, int4, moe, speculative

LLC = 1 << 20
GEMM = {"m": 3, "n": 64, "k": 256, "group_size": 32, "symmetric": True}
POINTS = [
    Point("w4a8_gemm", 1, GEMM),
    Point("w4a8_gemm", 2, {**GEMM, "group_size": 128, "symmetric": False}),
    Point("w4a16_gemm", 1, {**GEMM, "m": 1}),
    Point("moe_route", 2, {"tokens": 9, "num_experts": 16, "top_k": 4}),
    Point("chain_verify", 1, {"batch": 2, "num_draft": 3, "vocab": 1000, "rule": "greedy"}),
    Point("chain_verify", 2, {"batch": 2, "num_draft": 3, "vocab": 1000, "rule": "rejection"}),
    Point("chain_verify", 1, {"batch": 1, "num_draft": 0, "vocab": 50000, "rule": "rejection"}),
]


def small_cache():
    return replace(machine.describe(), l1d_bytes=None, l2_bytes=None, l3_bytes=LLC)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p.op}-{p.label}")
def test_every_call_runs_and_names_its_variant(point):
    work = Workloads(small_cache(), 0).make(point)
    kernel = {"moe_route": "moe_route", "chain_verify": "spec_verify"}.get(point.op, "int4_gemm")
    assert work.variant == info.kernel_versions()[kernel]
    for call in work.calls:
        assert call() is not None


@pytest.mark.parametrize("point", [POINTS[0], POINTS[1], POINTS[6]], ids=lambda p: p.label)
def test_calls_rotate_through_more_than_twice_the_cache(point):
    work = Workloads(small_cache(), 0).make(point)
    places = set()
    total = 0
    for call in work.calls:
        data = call.args[1].data if point.op.endswith("_gemm") else call.args[0]
        places.add(data.__array_interface__["data"][0])
        total += data.nbytes
    assert len(places) == len(work.calls), "no two calls share their data"
    assert total > 2 * LLC


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    def result(seed):
        return Workloads(small_cache(), seed).make(POINTS[0]).calls[0]()

    assert np.array_equal(result(1), result(1))
    assert not np.array_equal(result(1), result(2))


def test_every_draft_is_accepted_whichever_logits_come():
    """The work of a call is then the same in each: all K + 1 rows."""
    for point in POINTS[4:]:
        for call in Workloads(small_cache(), 0).make(point).calls:
            assert np.asarray(call().num_accepted).tolist() == [point.params["num_draft"]] * point.params["batch"]


def spoiled(function):
    """The op with its last number wrong."""

    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        if kwargs.get("backend") == "reference":
            return result
        array = getattr(result, "topk_weights", getattr(result, "output_token_ids", result))
        array[-1, 0] += 1
        return result

    return wrong


@pytest.mark.parametrize(
    ("point", "module", "name"),
    [
        (POINTS[0], int4, "w4a8_gemm"),
        (POINTS[2], int4, "w4a16_gemm"),
        (POINTS[3], moe, "moe_route"),
        (POINTS[4], speculative, "verify_chain"),
    ],
)
def test_a_wrong_answer_stops_the_run_and_says_which(monkeypatch, point, module, name):
    if point.op == "w4a8_gemm":
        point = replace(point, params={**point.params, "m": 2})  # the two rows that are compared
    monkeypatch.setattr(module, name, spoiled(getattr(module, name)))
    with pytest.raises(AssayError, match="gave a wrong answer") as caught:
        Workloads(small_cache(), 0).make(point)
    kernel = {"moe_route": "moe_route", "chain_verify": "spec_verify"}.get(point.op, "int4_gemm")
    for word in (point.op, point.label, info.kernel_versions()[kernel]):
        assert word in str(caught.value)

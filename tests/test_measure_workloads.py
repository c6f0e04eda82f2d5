"""Workloads: data larger than the cache, and an answer that is checked before it is timed."""

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest

from assay import machine
from assay.errors import AssayError
from assay.measure import arena as arena_module
from assay.measure.arena import Arena
from assay.measure.points import Point
from assay.measure.workloads import Workloads, missed_mass
from assay.ops import info, int4, moe, speculative
from assay.profile import MATRIX_OPS

GEMM = {"m": 3, "n": 64, "k": 256, "group_size": 32, "symmetric": True}
EXPERTS = {"tokens": 3, "top_k": 2, "distinct_experts": 4, "hidden_size": 96, "intermediate_size": 64, "group_size": 32,
           "symmetric": True}  # fmt: skip
POINTS = [
    Point("w4a8_gemm", 1, GEMM),
    Point("w4a8_gemm", 2, {**GEMM, "group_size": 128, "symmetric": False}),
    Point("w4a16_gemm", 1, {**GEMM, "m": 1}),
    Point("moe_route", 2, {"tokens": 9, "num_experts": 16, "top_k": 4}),
    Point("chain_verify", 1, {"batch": 2, "num_draft": 3, "vocab": 1000, "rule": "greedy"}),
    Point("chain_verify", 2, {"batch": 2, "num_draft": 3, "vocab": 1000, "rule": "rejection"}),
    Point("chain_verify", 1, {"batch": 1, "num_draft": 0, "vocab": 50000, "rule": "rejection"}),
    Point("w8a8_gemm", 2, {**GEMM, "n": 40}),
    Point("moe_experts", 2, EXPERTS),
    Point("moe_experts", 1, {**EXPERTS, "group_size": 64, "symmetric": False, "hidden_size": 128}),
]


def make(point, seed=0, nbytes=1 << 20):
    arena = Arena(machine.describe(), seed, nbytes)
    return arena, Workloads(arena, seed).make(point)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p.op}-{p.label}")
def test_every_call_runs_and_names_its_variant(point):
    _, work = make(point)
    kernel = {"moe_route": "moe_route", "chain_verify": "spec_verify", "w8a8_gemm": "int8_gemm"}
    assert work.variant == info.kernel_versions()[kernel.get(point.op, "int4_gemm")]
    for call in islice(work.rotation, 5):
        result = call()
        assert np.isfinite(np.asarray(result)).all() if point.op in MATRIX_OPS else result is not None


@pytest.mark.parametrize("point", [p for p in POINTS if p.op != "moe_route"], ids=lambda p: p.label)
def test_no_call_reads_what_was_read_within_one_lap_of_the_arena(point):
    arena, work = make(point)
    start = arena.data.__array_interface__["data"][0]
    places = []
    for call in islice(work.rotation, 200):
        if point.op == "moe_experts":
            held = call.args[3]
            places += [(a.__array_interface__["data"][0] - start, a.nbytes) for a in (held.gate_up, held.down)]
        else:
            data = call.args[0] if point.op == "chain_verify" else call.args[1].data
            places.append((data.__array_interface__["data"][0] - start, data.nbytes))
    laps = 0
    for (at, nbytes), (following, _) in pairwise(places):
        assert following >= at + nbytes or following == 0
        laps += following == 0
        assert at >= 0
        assert at + nbytes <= arena.data.nbytes
    assert laps >= 1
    used = sum(n for _, n in places) / max(laps, 1)
    assert used > 0.4 * arena.data.nbytes, "most of the arena is used"


def test_calls_of_two_points_take_turns_on_the_arena():
    arena = Arena(machine.describe(), 0, 1 << 20)
    work = Workloads(arena, 0)
    first, second = work.make(POINTS[0]).rotation, work.make(POINTS[7]).rotation
    places = [next(r).args[1].data.__array_interface__["data"][0] for r in (first, second, first, second)]
    assert places == sorted(places)
    assert len(set(places)) == 4


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    def result(seed):
        return next(make(POINTS[0], seed)[1].rotation)()

    assert np.array_equal(result(1), result(1))
    assert not np.array_equal(result(1), result(2))


def test_every_draft_is_accepted_whichever_logits_come():
    """The work of a call is then the same in each: all K + 1 rows."""
    for point in POINTS[4:7]:
        for call in islice(make(point)[1].rotation, 40):
            assert np.asarray(call().num_accepted).tolist() == [point.params["num_draft"]] * point.params["batch"]


def test_an_expert_layer_touches_as_many_experts_as_its_point_says():
    _, work = make(POINTS[8])
    for call in islice(work.rotation, 20):
        assert len(np.unique(call.args[1])) == EXPERTS["distinct_experts"]
        assert all(len(set(row)) == EXPERTS["top_k"] for row in call.args[1].tolist())


def test_the_noise_of_an_arena_serves_as_logits_and_as_scales():
    arena = Arena(machine.describe(), 3, 3 << 20)
    assert np.isfinite(arena.period).all()
    assert np.abs(arena.period.mean()) < 0.01
    assert arena.period.std() == pytest.approx(1.0, abs=0.01)
    as_scales = np.abs(arena.data.view(np.float16))
    assert np.isfinite(as_scales).all()
    assert as_scales.min() >= 2.0**-7
    assert as_scales.max() < 16


def test_an_arena_repeats_its_period_and_gives_no_more_than_it_has(monkeypatch):
    monkeypatch.setattr(arena_module, "PERIOD_BYTES", 1 << 20)
    arena = Arena(machine.describe(), 0, (5 << 19) + 4096)
    assert arena.data.nbytes == (5 << 19) + 4096
    assert np.array_equal(arena.data[: 1 << 20], arena.data[1 << 20 : 2 << 20])
    assert np.array_equal(arena.data[2 << 20 :], arena.data[: arena.data.nbytes - (2 << 20)])
    for _ in range(40):
        slot, piece = arena.take_slot(300_000)
        assert np.array_equal(piece, arena.period.view(np.uint8)[slot * 300_000 : (slot + 1) * 300_000])
    with pytest.raises(ValueError, match="expected at most 2625536 bytes, got 3000000"):
        arena.take(3_000_000)
    with pytest.raises(ValueError, match="expected at most 1048576 bytes, got 2000000"):
        arena.take_slot(2_000_000)


def test_an_arena_is_larger_than_the_cache_and_an_eighth_of_free_memory_at_most(monkeypatch):
    here = replace(machine.describe(), l1d_bytes=None, l2_bytes=None, l3_bytes=2 << 20)
    monkeypatch.setattr(arena_module, "MIN_BYTES", 1 << 20)
    assert Arena(here).data.nbytes == 5 << 20
    monkeypatch.setattr(arena_module, "memory_bytes", lambda key: 8 << 20)
    assert Arena(here).data.nbytes == 1 << 20


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
        (POINTS[6], speculative, "verify_chain"),
    ],
)
def test_a_wrong_answer_stops_the_run_and_says_which(monkeypatch, point, module, name):
    if point.op == "w4a8_gemm":
        point = replace(point, params={**point.params, "m": 2})  # the two rows that are compared
    monkeypatch.setattr(module, name, spoiled(getattr(module, name)))
    with pytest.raises(AssayError, match="gave a wrong answer") as caught:
        make(point)
    kernel = {"moe_route": "moe_route", "chain_verify": "spec_verify"}.get(point.op, "int4_gemm")
    for word in (point.op, point.label, info.kernel_versions()[kernel]):
        assert word in str(caught.value)


def test_a_draw_at_a_boundary_may_fall_on_either_side_and_no_further():
    """Ten equal tokens: 0.5 is the boundary of tokens 4 and 5."""
    logits = np.zeros(10, np.float32)
    assert missed_mass(logits, 4, 0.5) < 1e-12
    assert missed_mass(logits, 5, 0.5 - 1e-9) == pytest.approx(1e-9, rel=1e-6)
    assert missed_mass(logits, 3, 0.5) == pytest.approx(0.1)
    assert missed_mass(logits, 7, 0.5) == pytest.approx(0.2)
    assert missed_mass(logits, 0, 0.05) == 0.0


def test_checks_hold_wherever_in_the_noise_a_point_begins():
    """Real vocabularies at many places: some draws lie at a boundary that float32 sums put on the other side."""
    arena = Arena(machine.describe(), 0, 64 << 20)
    work = Workloads(arena, 0)
    for _ in range(40):
        for vocab in (32000, 50304):
            work.make(Point("chain_verify", 1, {"batch": 2, "num_draft": 1, "vocab": vocab, "rule": "rejection"}))

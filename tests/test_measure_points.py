"""The grid: what is held out was never fitted, bytes are those of the packed weights, every point is legal."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay.measure.points import GEMM_SHAPES, Point, grid, packed_bytes
from assay.profile import Profile, Sample
from synthetic import synthetic_profile

GEMM = ("w4a8_gemm", "w4a16_gemm")


def modes():
    return pytest.mark.parametrize("mode", ["quick", "full"])


def kind(point):
    p = point.params
    return (point.op, point.threads, p["group_size"], p["symmetric"])


@modes()
def test_no_point_twice(mode):
    points = grid(mode, [1, 2])
    assert max(Counter(p.key for p in points).values()) == 1
    assert max(Counter((p.op, p.label) for p in points).values()) == 1


@modes()
def test_held_out_gemm_points_are_new_shapes_or_new_widths(mode):
    """Of each op, threads and kind of quantisation: the (N, K) was never fitted, or M lies between fitted ones."""
    points = [p for p in grid(mode, [1, 2]) if p.op in GEMM]
    new_shapes = 0
    for point in (p for p in points if p.held_out):
        n, k, m = (point.params[key] for key in ("n", "k", "m"))
        fitted = [p.params for p in points if not p.held_out and kind(p) == kind(point)]
        assert fitted, point
        widths = {p["m"] for p in fitted if (p["n"], p["k"]) == (n, k)}
        if not widths:
            new_shapes += 1
        else:
            assert m not in widths
            assert min(widths) < m < max(widths), "between, not beyond"
    assert new_shapes >= 10


@modes()
def test_held_out_points_of_the_other_ops(mode):
    points = grid(mode, [1])
    route = [p for p in points if p.op == "moe_route"]
    fitted = {(p.params["num_experts"], p.params["top_k"]) for p in route if not p.held_out}
    held = [p for p in route if p.held_out]
    assert not fitted & {(p.params["num_experts"], p.params["top_k"]) for p in held}, "whole kinds of router"
    verify = [p for p in points if p.op == "chain_verify"]
    shapes = {tuple(sorted(p.params.items())) for p in verify if not p.held_out}
    held_verify = [p for p in verify if p.held_out]
    assert not shapes & {tuple(sorted(p.params.items())) for p in held_verify}
    assert len(held) >= 4
    assert len(held_verify) >= 4
    assert {p.params["rule"] for p in held_verify} == {"greedy", "rejection"}


@modes()
@pytest.mark.parametrize("threads", [[1], [1, 2], [1, 16]])
def test_every_thread_count_gets_the_same_points(mode, threads):
    points = grid(mode, threads)
    assert {p.threads for p in points} == set(threads)
    per_count = {t: {p.key[2:] + (p.op,) for p in points if p.threads == t} for t in threads}
    assert len(set(map(frozenset, per_count.values()))) == 1
    assert len(grid(mode, threads)) == len(points)


def test_full_contains_more_of_every_kind():
    quick, full = grid("quick", [2]), grid("full", [2])
    assert {p.key for p in quick if p.op in GEMM} <= {p.key for p in full}
    assert {(p.params["group_size"], p.params["symmetric"]) for p in full if p.op == "w4a8_gemm"} == {
        (32, True), (128, True), (32, False), (128, False)
    }  # fmt: skip
    assert max(p.params["m"] for p in full if p.op == "w4a8_gemm") == 512


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode: expected quick or full, got 'fast'"):
        grid("fast", [1])


@modes()
def test_a_profile_accepts_every_point(mode):
    """The schema's own check of params, bytes and operations, and nothing lost on the way."""
    points = grid(mode, [1, 3])
    profile = synthetic_profile()
    profile.samples = [
        Sample.of(
            p.op,
            "scalar",
            p.threads,
            p.params,
            moved_bytes=p.bytes,
            ops=p.ops,
            time_s=[1e-3],
            held_out=p.held_out,
            conditions={"alone_s": 9e-4} if p.op == "sequence" else None,
        )
        for p in points
    ]
    again = Profile.from_json(profile.to_json()).samples
    assert [Point(s.op, s.threads, dict(s.params), s.held_out) for s in again] == points
    assert [s.bytes for s in again] == [p.bytes for p in points]


@given(
    st.integers(1, 100),
    st.integers(1, 12),
    st.sampled_from([32, 64, 128, "row"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_packed_bytes_are_what_pack_makes(n, groups, group_size, symmetric, seed):
    k = 32 * groups + 2 if group_size == "row" else groups * group_size
    group = k if group_size == "row" else group_size
    rng = np.random.default_rng(seed)
    scales = np.ones((n, k // group), np.float16)
    zeros = None if symmetric else rng.integers(0, 16, scales.shape, dtype=np.uint8)
    packed = assay.pack(np.zeros((n, k // 2), np.uint8), scales, zeros, group_size=group)
    assert packed_bytes(n, k, group, symmetric) == packed.nbytes


def test_bytes_and_operations_of_known_points():
    n, k = GEMM_SHAPES["llama-8b-attn"]
    gemm = Point("w4a8_gemm", 1, {"m": 3, "n": n, "k": k, "group_size": 32, "symmetric": True})
    assert gemm.ops == 2 * 3 * 4096 * 4096
    assert gemm.bytes == 4096 * 4096 * 4.5 / 8 + 4 * 3 * (4096 + 4096)
    route = Point("moe_route", 1, {"tokens": 5, "num_experts": 64, "top_k": 8})
    assert route.bytes == 5 * (64 * 4 + 8 * 4 + 8 * 4)
    verify = Point("chain_verify", 1, {"batch": 2, "num_draft": 3, "vocab": 1000, "rule": "greedy"})
    assert verify.bytes == 2 * 4 * 1000 * 4
    assert verify.ops == 2 * 4 * 1000

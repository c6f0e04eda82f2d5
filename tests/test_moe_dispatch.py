"""Alignment, permutation, capacity, expert choice, load statistics, placement of copies."""

import numpy as np
import pytest

import assay
from assay.ops import moe_load

OP = "moe_experts"


def routing(tokens, experts, top_k, seed=0):
    rng = np.random.default_rng([seed, tokens, experts])
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    if tokens > 5:
        ids[2, 0], ids[3], ids[4, -1] = -1, -1, experts
    return ids, rng.random((tokens, top_k)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 3, 2), (1, 8, 8), (40, 7, 3), (9, 300, 4)])
def test_align_is_a_stable_sort_padded_to_blocks(tokens, experts, top_k, block):
    ids, _ = routing(tokens, experts, top_k)
    got = assay.moe_align(ids, experts, block)
    flat = ids.reshape(-1)
    rows, blocks = [], []
    for e in range(experts):
        own = np.flatnonzero(flat == e).tolist()
        assert got.counts[e] == len(own)
        padded = own + [flat.size] * (-len(own) % block)
        rows += padded
        blocks += [e] * (len(padded) // block)
    assert got.sorted_token_ids.tolist() == rows
    assert got.expert_ids.tolist() == blocks
    assert got.num_tokens_post_padded == len(rows)
    for slot, at in enumerate(got.position.reshape(-1)):
        if 0 <= flat[slot] < experts:
            assert rows[at] == slot
        else:
            assert at == -1


def test_align_with_an_expert_map_keeps_local_experts():
    ids, _ = routing(20, 6, 2)
    table = np.array([-1, 1, -1, 0, 2, -1], np.int32)
    got = assay.moe_align(ids, 6, 4, table)
    local = np.where((ids >= 0) & (ids < 6), table[np.clip(ids, 0, 5)], -1).astype(np.int32)
    for a, b in zip(got, assay.moe_align(local, 3, 4), strict=True):
        np.testing.assert_array_equal(a, b)
    nobody = assay.moe_align(ids, 6, 4, np.full(6, -1, np.int32))
    assert nobody.num_tokens_post_padded == 0
    assert (nobody.position == -1).all()


@pytest.mark.parametrize("block", [1, 8])
def test_unpermute_inverts_permute_and_sums_in_slot_order(variant, block):
    ids, w = routing(23, 5, 3)
    x = np.random.default_rng(1).standard_normal((23, 19)).astype(np.float32)
    alignment = assay.moe_align(ids, 5, block)
    rows = assay.moe_permute(x, alignment)
    assert rows.shape == (alignment.num_tokens_post_padded, 19)
    got = assay.moe_unpermute(rows, alignment, w, isa=variant)
    want = np.zeros_like(x)
    for j in range(3):  # in float64, whose product of floats is exact: one rounding a slot, as an FMA
        live = (ids[:, j] >= 0) & (ids[:, j] < 5)
        want[live] = (w[live, j, None].astype(np.float64) * x[live] + want[live]).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    assert not got[3].any()
    alone = assay.moe_unpermute(rows, alignment._replace(position=alignment.position[7:8]), w[7:8], num_threads=1)
    np.testing.assert_array_equal(alone, got[7:8])


def test_capacity_serves_first_choices_first():
    ids = np.array([[0, 1], [0, 1], [1, 0], [-1, 0]], np.int32)
    w = np.array([[0.5, 0.4], [0.9, 0.1], [0.8, 0.2], [0, 0.3]], np.float32)
    got = assay.moe_capacity(w, ids, 2, 2)
    assert got.topk_ids.tolist() == [[0, 1], [0, -1], [1, -1], [-1, -1]]
    assert got.counts.tolist() == [2, 2]
    np.testing.assert_array_equal(got.topk_weights, np.where(got.topk_ids >= 0, w, 0))
    by_weight = assay.moe_capacity(w, ids, 2, 1, priority="weight")
    assert by_weight.topk_ids.tolist() == [[-1, -1], [0, -1], [1, -1], [-1, -1]]
    assert ids[1, 1] == 1  # the argument is left as it was
    for junk in (np.nan, 9):  # of an empty slot
        w[3, 0] = junk
        assert assay.moe_capacity(w, ids, 2, 1, priority="weight").topk_ids.tolist() == by_weight.topk_ids.tolist()


def test_capacity_factor_and_no_limit():
    ids, w = routing(40, 8, 2)
    kept = assay.moe_capacity(w, ids, 8, capacity_factor=1.0).counts
    assert kept.max() <= 10
    loose = assay.moe_capacity(w, ids, 8, capacity_factor=8.0)
    np.testing.assert_array_equal(loose.topk_ids, np.where(ids < 8, ids, -1))
    assert not assay.moe_capacity(w, ids, 8, 0).counts.any()


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_expert_choice_takes_the_best_tokens_of_each_expert(backend):
    x = np.random.default_rng(2).standard_normal((50, 6)).astype(np.float32)
    x[9, 3] = np.nan
    got = assay.moe_expert_choice(x, 7, backend=backend)
    p = np.exp(x.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    p[9] = -1
    want = np.argsort(-p, axis=0, kind="stable")[:7].T
    np.testing.assert_array_equal(got.token_ids, want)
    np.testing.assert_allclose(got.token_weights, np.take_along_axis(p.T, want, axis=1), rtol=1e-5)
    assert np.flatnonzero(got.status).tolist() == [9]
    tied = assay.moe_expert_choice(np.zeros((5, 2), np.float32), 3, backend=backend)
    np.testing.assert_array_equal(tied.token_ids, [[0, 1, 2]] * 2)


def test_load_statistics():
    even = assay.moe_load(np.tile(np.arange(8), (4, 1)), 8)
    assert even.distinct_experts == 8
    assert (even.coefficient_of_variation, even.jain_index, even.max_over_mean) == (0, 1, 1)
    one = assay.moe_load(np.array([[3, -1], [3, 8]], np.int32), 8)
    assert one.counts.tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    assert one.distinct_experts == 1
    assert one.jain_index == pytest.approx(1 / 8)
    assert one.max_over_mean == 8
    assert one.coefficient_of_variation == pytest.approx(np.sqrt(7))
    assert assay.moe_load(np.full((2, 2), -1), 4).distinct_experts == 0


def test_rebalancing_gives_the_published_example():
    """The example of EPLB's README: 12 experts of two layers, 16 copies, 4 groups, 2 nodes, 8 GPUs."""
    weight = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                       [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])  # fmt: skip
    got = assay.rebalance_experts(weight, 16, 4, 2, 8)
    assert got.phy2log.tolist() == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                                    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "nodes", "gpus", "copies"), [(4, 2, 4, 24), (3, 2, 4, 20), (1, 1, 8, 16), (16, 4, 8, 32)]
)
def test_rebalancing_places_every_expert_and_its_tables_agree(groups, nodes, gpus, copies):
    experts = 16 if groups != 3 else 15
    weight = np.random.default_rng(groups).random((3, experts)) ** 3
    got = assay.rebalance_experts(weight, copies, groups, nodes, gpus)
    for layer in range(3):
        counts = np.bincount(got.phy2log[layer], minlength=experts)
        np.testing.assert_array_equal(counts, got.logcnt[layer])
        assert counts.min() >= 1
        for e in range(experts):
            held = got.log2phy[layer, e]
            assert (got.phy2log[layer, held[held >= 0]] == e).all()
            assert (held >= 0).sum() == counts[e]
        if groups % nodes == 0:  # a group stays within a node
            node = np.arange(copies) // (copies // nodes)
            for group in range(groups):
                of_group = got.phy2log[layer] // (experts // groups) == group
                assert len(set(node[of_group])) == 1


def test_copies_go_to_the_busiest():
    expert, rank, count = moe_load.replicate_experts(np.array([[8.0, 1, 3]]), 6)
    assert expert.tolist() == [[0, 1, 2, 0, 0, 2]]  # 8, then 4 against 3, then a tie of 3 and 8/3
    assert count.tolist() == [[3, 1, 2]]
    assert rank.tolist() == [[0, 0, 0, 1, 2, 1]]


def test_bad_arguments_say_got_and_wanted():
    ids, w = routing(6, 4, 2)
    alignment = assay.moe_align(ids, 4)
    cases = [
        (TypeError, "topk_ids: expected int32", lambda: assay.moe_align(ids.astype(int), 4)),
        (ValueError, r"num_experts, block_size: expected 1..2\^31 - 2, got 4, 0", lambda: assay.moe_align(ids, 4, 0)),
        (ValueError, r"num_experts, block_size: expected 1..2\^31 - 2", lambda: assay.moe_align(ids, 2**40)),
        (ValueError, r"expert_map: expected \[num_experts\] = \[4\]", lambda: assay.moe_align(ids, 4, 1, np.int32([0]))),
        (ValueError, r"x: expected \[T, H\] with T = 6", lambda: assay.moe_permute(np.zeros((5, 2), np.float32), alignment)),
        (ValueError, "y: expected", lambda: assay.moe_unpermute(np.zeros((1, 2), np.float32), alignment, w)),
        (ValueError, "capacity: expected either", lambda: assay.moe_capacity(w, ids, 4)),
        (ValueError, "capacity: expected at least 0", lambda: assay.moe_capacity(w, ids, 4, -1)),
        (ValueError, r"num_experts: expected 1..2\^31 - 2, got 0", lambda: assay.moe_capacity(w, ids, 0, capacity_factor=1.0)),
        (ValueError, "priority: expected", lambda: assay.moe_capacity(w, ids, 4, 1, priority="luck")),
        (ValueError, r"capacity: expected 1..T = 1..6", lambda: assay.moe_expert_choice(np.zeros((6, 4), np.float32), 7)),
        (TypeError, "topk_ids: expected integers", lambda: assay.moe_load(w, 4)),
        (ValueError, "num_replicas: expected a multiple of 3", lambda: assay.rebalance_experts(np.ones((1, 4)), 8, 1, 1, 3)),
        (ValueError, "num_replicas: expected at least one copy", lambda: assay.rebalance_experts(np.ones((1, 4)), 3, 1, 1, 3)),
        (ValueError, "weight: expected", lambda: assay.rebalance_experts(-np.ones((1, 4)), 4, 1, 1, 1)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()

"""Draft trees on the GPU: the kernels' own source, emulated, gives what the CPU's op does, statuses and all."""

import numpy as np
import pytest
from emulator import emulate
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.ops.tree import MOST_NODES, tree_build
from test_speculation_tree import DUPLICATE, OK, TOO_DEEP, assert_same, parent_lists

WARPS = 8


def build(parents, tokens=None, *, position=None, max_depth=None, seed=0):
    """Layouts of several trees of one size; parents [trees, n]."""
    parents = np.asarray(parents, np.int32)
    trees, n = parents.shape
    rows, depth = n + 1, n if max_depth is None else min(max_depth, n)
    words = -(-rows // 64)
    out = {
        "depth": np.full((trees, rows), -9, np.int32), "first_child": np.full((trees, rows), -9, np.int32),
        "next_sibling": np.full((trees, rows), -9, np.int32), "positions": np.full((trees, rows), -9, np.int64),
        "mask": np.full((trees, rows, rows), 9, np.uint8), "mask_words": np.full((trees, rows, words), 9, np.uint64),
        "retrieve": np.full((trees, max(n, 1) * (depth + 1)), -9, np.int32), "info": np.full((trees, 4), -9, np.int32),
    }  # fmt: skip
    fields = out | {
        "trees": trees, "nodes": n, "parents": parents if n else np.zeros(1, np.int32), "max_depth": depth,
        "tokens": None if tokens is None else np.ascontiguousarray(tokens, np.int32) if n else np.zeros(1, np.int32),
        "position": position,
    }  # fmt: skip
    emulate("assay_tree_links", trees, fields, seed=seed)
    emulate("assay_tree_masks", -(-trees * rows // WARPS), fields, seed=seed)
    return out


def layout(out, tree=0):
    """Of one tree, as tree_build returns it."""
    status, node, leaves, deepest = out["info"][tree]
    empty = tree_build([5])
    if status:
        return empty._replace(status=int(status), node=int(node))
    paths = out["retrieve"][tree, : leaves * (deepest + 1)].reshape(leaves, deepest + 1)
    arrays = {name: out[name][tree] for name in empty._fields[2:-1]}
    return empty._replace(status=int(status), node=int(node), retrieve_indices=paths, **arrays)


@settings(max_examples=60, deadline=None)
@given(parents=parent_lists(), position=st.integers(0, 2**40), data=st.data())
def test_layout_is_the_cpus(parents, position, data):
    n = len(parents)
    tokens = data.draw(st.none() | st.lists(st.integers(-1, 9), min_size=n, max_size=n))
    depth = data.draw(st.none() | st.integers(0, 20))
    seed = data.draw(st.integers(0, 5))
    out = build(
        [parents], None if tokens is None else [tokens], position=np.array([position]), max_depth=depth, seed=seed
    )
    assert_same(layout(out), tree_build(parents, tokens, position=position, max_depth=depth))


@settings(max_examples=60, deadline=None)
@given(parents=st.lists(st.integers(-5, 70), max_size=70))
def test_any_parents_give_the_cpus_status(parents):
    assert_same(layout(build([parents])), tree_build(parents))


def test_faults_say_how_deep_the_nodes_before_them_are():
    for parents, depth, want in [([-1, 0, 1, 7], None, (1, 3, 0, 3)), ([-1, 0, 1, 2], 2, (TOO_DEEP, 2, 0, 2)),
                                 ([*range(-1, 39), 50], None, (1, 40, 0, 40))]:  # fmt: skip
        assert tuple(build([parents], max_depth=depth)["info"][0]) == want


@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 63, 64, 65, 200])
def test_trees_of_a_batch_do_not_notice_each_other(nodes):
    rng = np.random.default_rng(nodes)
    parents = np.array([[rng.integers(-1, i) if i else -1 for i in range(nodes)] for _ in range(5)])
    tokens = np.stack([rng.permutation(1000)[:nodes] for _ in range(5)])
    parents[1] = np.arange(-1, nodes - 1)
    parents[2] = -1
    parents[3, -1] = nodes
    tokens[4] = 3
    position = rng.integers(0, 2**40, 5)
    out = build(parents, tokens, position=position, seed=nodes)
    for tree in range(5):
        want = tree_build(parents[tree], tokens[tree], position=int(position[tree]))
        assert_same(layout(out, tree), want)


def test_statuses_and_the_largest_tree():
    assert layout(build([[-1, 0, 0]], [[1, 5, 5]]))[:2] == (DUPLICATE, 2)
    assert layout(build([[-1, -1]], [[-1, -1]]))[:2] == (DUPLICATE, 1)
    none = layout(build(np.empty((1, 0))))
    assert none.mask.tolist() == [[1]]
    assert none.retrieve_indices.tolist() == [[0]]
    star = build(np.full((1, MOST_NODES), -1))
    assert star["info"][0].tolist() == [OK, -1, MOST_NODES, 1]
    chain = np.arange(-1, 599)
    assert_same(layout(build([chain])), tree_build(chain))


def test_optional_outputs_may_be_missing():
    rows = 4
    need = {name: np.zeros((1, rows), np.int32) for name in ("depth", "first_child", "next_sibling")}
    need |= {
        "info": np.zeros((1, 4), np.int32),
        "trees": 1,
        "nodes": 3,
        "parents": np.array([-1, 0, 0], np.int32),
        "max_depth": 3,
    }
    emulate("assay_tree_links", 1, need)
    emulate("assay_tree_masks", 1, need)
    assert need["info"][0].tolist() == [OK, -1, 0, 2]
    np.testing.assert_array_equal(need["depth"][0], tree_build([-1, 0, 0]).depth)

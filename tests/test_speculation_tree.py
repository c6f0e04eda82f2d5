"""Draft trees: layouts against the reference, other people's forms, trees by expected acceptance, moves in the cache."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.ops.tree import MOST_NODES, tree_build
from assay.speculation.cache import accepted_rows, kv_moves, split_slots
from assay.speculation.tree import DraftTree, expected_length, optimal_tree, select_best, top_scores

OK, BAD_PARENT, DUPLICATE, TOO_DEEP = range(4)


@st.composite
def parent_lists(draw, most=90):
    n = draw(st.integers(0, most))
    reach = draw(st.sampled_from([1, 3, most]))  # 1: a chain
    return [draw(st.integers(max(-1, i - reach), i - 1)) for i in range(n)]


def assert_same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert np.asarray(a).dtype == np.asarray(b).dtype, name


@pytest.mark.parametrize("backend", ["c", "numba"])
@settings(max_examples=60, deadline=None)
@given(parents=parent_lists(), position=st.integers(0, 2**40), data=st.data())
def test_layout_equals_the_reference(backend, parents, position, data):
    tokens = data.draw(st.none() | st.lists(st.integers(-1, 9), min_size=len(parents), max_size=len(parents)))
    depth = data.draw(st.none() | st.integers(0, 20))
    how = {"position": position, "max_depth": depth}
    got = tree_build(parents, tokens, backend=backend, **how)
    assert_same(got, tree_build(parents, tokens, backend="reference", **how))


@settings(max_examples=60, deadline=None)
@given(parents=st.lists(st.integers(-5, 40), max_size=30))
def test_any_parents_give_a_layout_or_a_status(parents):
    """Cycles, missing and later parents: never a hang, never an index outside."""
    got = tree_build(parents)
    bad = [i for i, p in enumerate(parents) if not -1 <= p < i]
    if bad:
        assert (got.status, got.node) == (BAD_PARENT, bad[0])
        assert got.mask.size == got.retrieve_indices.size == 0
        with pytest.raises(ValueError, match=rf"parents\[{bad[0]}\]: expected -1 or a node before {bad[0]}, got"):
            DraftTree(parents)
    else:
        assert got.status == OK
        assert len(DraftTree(parents)) == len(parents)


def test_a_tree_drawn_by_hand():
    """0 -> (1, 2), 1 -> 3, and 4 beside 0."""
    tree = DraftTree([-1, 0, 0, 1, -1], [7, 8, 9, 7, 5])
    got = tree.layout
    np.testing.assert_array_equal(
        got.mask,
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 1, 0],
         [1, 0, 0, 0, 0, 1]],
    )  # fmt: skip
    np.testing.assert_array_equal(got.mask_words[:, 0], [0b1, 0b11, 0b111, 0b1011, 0b10111, 0b100001])
    np.testing.assert_array_equal(got.depth, [0, 1, 2, 2, 3, 1])
    np.testing.assert_array_equal(tree.positions(100), [100, 101, 102, 102, 103, 101])
    np.testing.assert_array_equal(got.first_child, [1, 2, 4, -1, -1, -1])
    np.testing.assert_array_equal(got.next_sibling, [-1, 5, 3, -1, -1, -1])
    np.testing.assert_array_equal(got.retrieve_indices, [[0, 1, 3, -1], [0, 1, 2, 4], [0, 5, -1, -1]])
    assert tree.path(3) == [0, 1, 3]
    np.testing.assert_array_equal(tree.children(), [0, 4])
    np.testing.assert_array_equal(tree.ranks, [0, 0, 1, 0, 1])


def test_bits_of_the_mask_in_more_than_one_word():
    parents = np.arange(-1, 199)
    got = tree_build(parents)
    assert got.mask_words.shape == (201, 4)
    bits = np.unpackbits(got.mask_words.view(np.uint8), axis=1, bitorder="little")[:, :201]
    np.testing.assert_array_equal(bits, np.tri(201, dtype=np.uint8))


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_statuses_and_the_largest_tree(backend):
    assert tree_build([-1, 0, 0], [1, 5, 5], backend=backend)[:2] == (DUPLICATE, 2)
    assert tree_build([-1, -1], [-1, -1], backend=backend)[:2] == (DUPLICATE, 1)
    assert tree_build([-1, 0, 0], [1, 5, 6], backend=backend).status == OK
    assert tree_build([-1, 0, 1], max_depth=2, backend=backend)[:2] == (TOO_DEEP, 2)
    none = tree_build([], backend=backend, max_depth=0)
    assert none.mask.tolist() == [[1]]
    assert none.retrieve_indices.tolist() == [[0]]
    if backend == "c":
        star = tree_build(np.full(MOST_NODES, -1), np.arange(MOST_NODES))
        assert star.status == OK
        assert star.retrieve_indices.shape == (MOST_NODES, 2)


def test_bad_arguments_say_got_and_wanted():
    cases = [
        (ValueError, "parents: expected at most 4096 nodes, got 4097", lambda: tree_build(np.full(4097, -1))),
        (TypeError, "parents: expected int32 or int64, got float64", lambda: tree_build(np.zeros(3))),
        (ValueError, "parents: expected values of 32 bits, got 4294967296", lambda: tree_build([2**32])),
        (ValueError, r"tokens: expected \[n\] = \[1\], got \[2\]", lambda: tree_build([-1], [1, 2])),
        (ValueError, "max_depth: expected 0 or more, got -1", lambda: tree_build([-1], max_depth=-1)),
        (ValueError, "position: expected 0 or more, got -3", lambda: tree_build([-1], position=-3)),
        (ValueError, "backend: expected one of", lambda: tree_build([-1], backend="cuda")),
        (ValueError, r"tokens: expected one a node \(2\), got 1", lambda: DraftTree([-1, 0], [3])),
        (ValueError, r"tokens\[2\]: expected siblings to differ, got token 5 twice under node 0",
         lambda: DraftTree([-1, 0, 0], [4, 5, 5]).validate()),
        (ValueError, r"parents\[1\]: expected at most 1 levels",
         lambda: DraftTree([-1, 0]).validate(max_depth=1)),
        (ValueError, r"candidates: expected at least \[2, 1\], got \[1, 4\]",
         lambda: DraftTree([-1, 0]).fill(np.zeros((1, 4), int))),
        (ValueError, r"choices: expected the parent \[1\] of \[1, 0\]", lambda: DraftTree.from_choices([[0], [1, 0]])),
        (ValueError, "choices: expected non-empty paths", lambda: DraftTree.from_choices([[]])),
        (ValueError, "paths: expected a path from row 0", lambda: DraftTree.from_paths([[1, 2]])),
        (ValueError, "paths: expected a path from row 0", lambda: DraftTree.from_paths([[0, -1, 2]])),
        (ValueError, "paths: expected one parent of row 2, got 1 and 3",
         lambda: DraftTree.from_paths([[0, 1, 2], [0, 3, 2]])),
        (ValueError, r"paths: expected rows 1..2, got \[1, 3\]", lambda: DraftTree.from_paths([[0, 1, 3]])),
        (ValueError, "selected_index: expected the parent 1 of candidate 4, which is missing",
         lambda: DraftTree.from_parent_list([-1, 0, 1], [0, 4], [5, 6], 2)),
        (ValueError, "selected_index: expected candidates below 4, got 4",
         lambda: DraftTree.from_parent_list([-1, 0], [0, 4], [5, 6], 2)),
        (ValueError, "parent_list: expected -1", lambda: DraftTree.from_parent_list([0], [0], [1], 2)),
        (ValueError, "selected_index: expected candidate numbers that ascend",
         lambda: DraftTree.from_parent_list([-1], [1, 0], [1, 2], 2)),
        (ValueError, "acceptance: expected probabilities", lambda: optimal_tree([0.8, 0.3], 4)),
        (ValueError, "budget: expected 0..4096 nodes, got -1", lambda: optimal_tree([0.8], -1)),
        (ValueError, "log_probs: expected values of at most 0", lambda: select_best(DraftTree([-1]), [np.nan], 1)),
    ]  # fmt: skip
    for error, message, run in cases:
        with pytest.raises(error, match=message):
            run()


# ---- other people's forms ---------------------------------------------------------------------------------------------

CHOICES = [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [3], [0, 0, 2], [1, 1], [0, 3]]


def test_medusa_choices():
    """Against the definition: a row sees exactly the prefixes of its path, and head i fills level i + 1."""
    tree = DraftTree.from_choices(CHOICES)
    paths = sorted((tuple(c) for c in CHOICES), key=lambda c: (len(c), c))
    for i, path in enumerate(paths):
        seen = {paths[j - 1] for j in np.flatnonzero(tree.layout.mask[i + 1]) if j}
        assert seen == {path[:n] for n in range(1, len(path) + 1)}
    top_k = 10
    np.testing.assert_array_equal(
        tree.tree_indices(top_k), [0, *(path[-1] + top_k * (len(path) - 1) + 1 for path in paths)]
    )
    heads = np.arange(30).reshape(3, 10) * 7
    flat = np.concatenate([[99], heads.reshape(-1)])
    np.testing.assert_array_equal(tree.fill(heads).tokens, flat[tree.tree_indices(top_k)][1:])


def test_forms_of_one_tree_agree():
    """A tree written as parent list with selected candidates, as padded paths and as sequences is one tree."""
    # Drafting with top_k 2: candidates 0, 1 under the root; 0 and 1 were expanded (2, 3 and 4, 5), then 2 and 5.
    tree = DraftTree.from_parent_list([-1, 0, 1, 2, 5], [0, 1, 2, 5, 6, 9], [10, 11, 12, 15, 16, 19], 2)
    np.testing.assert_array_equal(tree.parents, [-1, -1, 0, 1, 2, 3])
    np.testing.assert_array_equal(tree.ranks, [0, 1, 0, 1, 0, 1])
    paths = tree.layout.retrieve_indices
    np.testing.assert_array_equal(DraftTree.from_paths(paths, tree.tokens).parents, tree.parents)
    merged = DraftTree.from_sequences([[10, 12, 16], [11, 15, 19], [10, 12]])
    assert {tuple(merged.tokens[merged.path(i)]) for i in range(6)} == {
        tuple(tree.tokens[tree.path(i)]) for i in range(6)
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8))
def test_merged_sequences_hold_each_prefix_once(sequences):
    tree = DraftTree.from_sequences(sequences).validate()
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    paths = [tuple(tree.tokens[tree.path(i)].tolist()) for i in range(len(tree))]
    assert sorted(paths) == sorted(prefixes)


def test_dedupe_moves_children_to_the_first():
    tree, new = DraftTree([-1, -1, 0, 1, 1], [5, 5, 6, 6, 7]).dedupe()
    np.testing.assert_array_equal(tree.parents, [-1, 0, 0])
    np.testing.assert_array_equal(tree.tokens, [5, 6, 7])
    np.testing.assert_array_equal(new, [0, 0, 1, 1, 2])


# ---- by expected acceptance --------------------------------------------------------------------------------------------


def every_tree(nodes, ranks, depth):
    """All shapes of exactly so many nodes whose siblings have ranks 0, 1, ...: forests of (subtree, subtree, ...)."""
    if nodes == 0:
        return [()]
    if depth == 0 or ranks == 0:
        return []
    found = []
    for first in range(1, nodes + 1):
        for below in every_tree(first - 1, 99, depth - 1):
            found += [(below, *rest) for rest in every_tree(nodes - first, ranks - 1, depth)]
    return found


def value(forest, table, level):
    p = table[min(level, len(table) - 1)]
    return sum(p[r] * (1 + value(below, table, level + 1)) for r, below in enumerate(forest) if r < len(p))


def fits(forest, table, level, deepest):
    return level <= deepest and (
        not forest or (len(forest) <= len(table[0]) and all(fits(b, table, level + 1, deepest) for b in forest))
    )


@pytest.mark.parametrize("seed", range(12))
def test_optimal_tree_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    ranks, levels = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    if seed % 2:
        table = rng.dirichlet(np.full(ranks + 1, 0.5), levels)[:, :ranks]  # ranks in no order, by depth
        given_table, deepest = table, levels
    else:
        table = rng.dirichlet(np.full(ranks + 1, 0.5), 1)[:, :ranks]
        given_table, deepest = table[0], levels
    for budget in range(7):
        shapes = [f for n in range(budget + 1) for f in every_tree(n, ranks, deepest) if fits(f, table, 0, deepest)]
        best = max(value(f, table, 0) for f in shapes)
        tree = optimal_tree(given_table, budget, max_depth=deepest)
        assert len(tree) <= budget
        assert expected_length(tree, given_table) == pytest.approx(best, abs=1e-12)


def test_optimal_tree_of_sixty_four_nodes():
    tree = optimal_tree([0.55, 0.18, 0.08, 0.05, 0.03], 64)
    assert len(tree) == 64
    chain, star = DraftTree(np.arange(-1, 63)), DraftTree(np.full(5, -1))
    table = [0.55, 0.18, 0.08, 0.05, 0.03]
    assert expected_length(tree, table) > max(expected_length(chain, table), expected_length(star, table))
    assert int(optimal_tree(table, 64, max_depth=3).depth.max()) == 3
    assert len(optimal_tree([0.0, 0.0], 8)) == 0


def test_top_scores_are_the_best_paths():
    """With enough width nothing is cut while growing, so that the result is the best of all paths."""
    vocab, depth = 3, 3
    rng = np.random.default_rng(0)
    rows = {
        x: np.log(rng.dirichlet(np.ones(vocab))) for n in range(depth) for x in itertools.product(range(3), repeat=n)
    }
    tree, logs = top_scores(lambda paths: [rows[tuple(p)] for p in paths], depth=depth, width=27, budget=9)
    score = {x: sum(rows[x[:i]][x[i]] for i in range(len(x)))
             for n in range(1, depth + 1) for x in itertools.product(range(3), repeat=n)}  # fmt: skip
    best = sorted(score, key=lambda x: -score[x])[:9]
    got = [tuple(tree.tokens[tree.path(i)].tolist()) for i in range(len(tree))]
    assert sorted(got) == sorted(best)
    np.testing.assert_allclose([logs[tree.path(i)].sum() for i in range(9)], [score[x] for x in got])
    tree.validate()


@settings(max_examples=60, deadline=None)
@given(parents=parent_lists(40), seed=st.integers(0, 99), budget=st.integers(0, 45))
def test_select_best_gives_a_tree(parents, seed, budget):
    rng = np.random.default_rng(seed)
    logs = np.where(rng.random(len(parents)) < 0.1, 0.0, -rng.exponential(size=len(parents)))
    tree = DraftTree(parents)
    chosen_tree, chosen = select_best(tree, logs, budget)
    assert len(chosen_tree) == min(budget, len(parents))
    for new, old in enumerate(chosen):
        parent = chosen_tree.parents[new]
        assert (chosen[parent] if parent >= 0 else -1) == parents[old]


# ---- after acceptance ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(0, 4), paged=st.booleans())
def test_moves_in_place_leave_the_accepted_rows_in_sequence(seed, batch, paged):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, batch)
    cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    context = rng.integers(0, 7, batch)
    accept = np.full((batch, 9), -1, np.int32)
    for b in range(batch):
        nodes = np.sort(rng.permutation(counts[b])[: rng.integers(0, counts[b] + 1)])
        accept[b, : len(nodes)] = nodes
    block_size, blocks = 3, 8
    table = rng.permutation(batch * blocks).reshape(batch, blocks)
    moves = kv_moves(accept, cu, context, **({"block_table": table, "block_size": block_size} if paged else {}))

    def slot(b, position):
        return table[b, position // block_size] * block_size + position % block_size if paged else position

    first = np.concatenate([[0], np.cumsum(counts + 1)])
    kept, bounds = accepted_rows(accept, cu)
    for b in range(batch):
        cache = np.full(batch * blocks * block_size, -1)
        for i in range(context[b]):
            cache[slot(b, i)] = 1000 + i
        for r in range(counts[b] + 1):
            cache[slot(b, context[b] + r)] = first[b] + r
        for m in range(moves.cu_num_moves[b], moves.cu_num_moves[b + 1]):
            cache[moves.destination[m]] = cache[moves.source[m]]
        got = [cache[slot(b, i)] for i in range(moves.context_lens[b])]
        assert got == [1000 + i for i in range(context[b])] + kept[bounds[b] : bounds[b + 1]].tolist()
    if not paged:
        assert (moves.source > moves.destination).all()
    slots = rng.permutation(first[-1]) + 50
    stay, free = split_slots(slots, accept, cu)
    np.testing.assert_array_equal(stay, slots[kept])
    assert sorted([*stay, *free]) == sorted(slots)


def test_bad_moves_are_refused():
    cases = [
        ("accept_index: expected nodes of each request that ascend", [[1, 0]], [0, 2], [0], {}),
        ("accept_index: expected nodes of each request that ascend", [[-1, 0]], [0, 2], [0], {}),
        ("accept_index: expected nodes of each request that ascend", [[2]], [0, 2], [0], {}),
        (r"accept_index: expected \[B, W\] with B = 2", [[0]], [0, 2, 3], [0, 0], {}),
        ("context_lens: expected one of 0 or more a request", [[0]], [0, 2], [-1], {}),
        ("block_table, block_size: expected both", [[1]], [0, 2], [0], {"block_size": 4}),
        ("block_table: expected .* covers every position", [[1]], [0, 2], [9],
         {"block_size": 4, "block_table": [[0, 1]]}),
        ("block_table: expected a block for every position", [[1]], [0, 2], [0],
         {"block_size": 1, "block_table": [[0, -1, -1]]}),
    ]  # fmt: skip
    for message, accept, cu, context, how in cases:
        with pytest.raises(ValueError, match=message):
            kv_moves(accept, cu, context, **how)

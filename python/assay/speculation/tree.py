"""Draft trees: from the forms that others keep them in, and by expected acceptance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ..ops.tree import MOST_NODES, TreeLayout, tree_build

_FAULTS = {
    1: "parents[{node}]: expected -1 or a node before {node}, got {parent}",
    2: "tokens[{node}]: expected siblings to differ, got token {token} twice under node {parent}",
    3: "parents[{node}]: expected at most {max_depth} levels, got a deeper node",
}


@dataclass(frozen=True)
class DraftTree:
    """Draft tokens that share prefixes. Its nodes hang from a root, the last emitted token, which is none of them.

    Attributes
    ----------
    parents : int32 [n]
        Parent of each node by index, before it; -1 for a child of the root.
    tokens : int32 [n] or None
        None for a shape that is still to be filled (see `with_tokens`).
    ranks : int32 [n]
        Which of the drafter's candidates at its place a node takes, 0 the likeliest. By default siblings count up.

    Raises
    ------
    ValueError
        A parent that does not come before its child (missing parents and cycles are such), more than 4096 nodes.
    """

    parents: np.ndarray
    tokens: np.ndarray | None = None
    ranks: np.ndarray | None = None

    def __post_init__(self) -> None:
        parents = _int32(self.parents, "parents")
        object.__setattr__(self, "parents", parents)
        for name in ("tokens", "ranks"):
            value = getattr(self, name)
            if value is not None:
                array = _int32(value, name)
                if len(array) != len(parents):
                    raise ValueError(f"{name}: expected one a node ({len(parents)}), got {len(array)}")
                object.__setattr__(self, name, array)
        if self.ranks is None:
            object.__setattr__(self, "ranks", _sibling_ranks(parents))
        self._raise_for(self.layout, None)

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def layout(self) -> TreeLayout:
        """Attention mask (dense and in bits), depths, links and paths; row 0 is the root, row i + 1 node i."""
        return tree_build(self.parents)

    @property
    def depth(self) -> np.ndarray:
        """int32 [n]: 1 for a child of the root."""
        return self.layout.depth[1:]

    def positions(self, root: int) -> np.ndarray:
        """int64 [n + 1]: of the root and each node, the root being at that position."""
        return root + self.layout.depth.astype(np.int64)

    def validate(self, *, unique: bool = True, max_depth: int | None = None) -> "DraftTree":
        """Itself; ValueError for siblings of the same token (where `unique`), or more levels than `max_depth`."""
        tokens = self.tokens if unique else None
        self._raise_for(tree_build(self.parents, tokens, max_depth=max_depth), max_depth)
        return self

    def with_tokens(self, tokens: Any) -> "DraftTree":
        return DraftTree(self.parents, tokens, self.ranks)

    def children(self, node: int = -1) -> np.ndarray:
        """Node indices, in draw order."""
        return np.flatnonzero(self.parents == node)

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the root to `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def fill(self, candidates: Any) -> "DraftTree":
        """Tokens from a table: a node at depth d of rank r gets ``candidates[d - 1][r]`` (Medusa's heads)."""
        table = np.asarray(candidates)
        if table.ndim != 2:
            raise ValueError(f"candidates: expected [depth, rank], got {table.ndim} dimensions")
        if len(self) and (self.depth.max() > table.shape[0] or self.ranks.max() >= table.shape[1]):  # type: ignore[union-attr]
            wanted = [int(self.depth.max()), int(self.ranks.max()) + 1]  # type: ignore[union-attr]
            raise ValueError(f"candidates: expected at least {wanted}, got {list(table.shape)}")
        return self.with_tokens(table[self.depth - 1, self.ranks])

    def tree_indices(self, top_k: int) -> np.ndarray:
        """int64 [n + 1]: Medusa's indices of the rows into ``[root, head 0's top_k, head 1's top_k, ...]``."""
        inside = (self.depth.astype(np.int64) - 1) * top_k + np.asarray(self.ranks, np.int64) + 1
        return np.concatenate([[0], inside])

    def dedupe(self) -> tuple["DraftTree", np.ndarray]:
        """Without repeated siblings, whose children go to the first of them; and the new index of each old node."""
        if self.tokens is None:
            raise ValueError("tokens: expected a tree with tokens, got None")
        index: dict[tuple[int, int], int] = {}
        new = np.empty(len(self), np.int32)
        kept: list[int] = []
        for i, (parent, token) in enumerate(zip(self.parents.tolist(), self.tokens.tolist(), strict=True)):
            key = (-1 if parent < 0 else int(new[parent]), token)
            if key not in index:
                index[key] = len(kept)
                kept.append(i)
            new[i] = index[key]
        parents = [key[0] for key in index]
        return DraftTree(np.array(parents, np.int32), self.tokens[kept]), new

    def _raise_for(self, layout: TreeLayout, max_depth: int | None) -> None:
        if layout.status:
            node = layout.node
            token = None if self.tokens is None else int(self.tokens[node])
            text = _FAULTS[layout.status]
            raise ValueError(text.format(node=node, parent=int(self.parents[node]), token=token, max_depth=max_depth))

    # ---- from what others keep ------------------------------------------------------------------------------------

    @classmethod
    def chain(cls, tokens: Any) -> "DraftTree":
        """Each token the child of the one before."""
        array = _int32(tokens, "tokens")
        return cls(np.arange(-1, len(array) - 1, dtype=np.int32), array)

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> "DraftTree":
        """A shape from Medusa's choices: paths of ranks, ``[[0], [0, 0], [1], ...]``.

        Nodes are in Medusa's order, by length and then by value. ValueError where a path's parent is missing.
        """
        paths = sorted({tuple(int(r) for r in choice) for choice in choices}, key=lambda path: (len(path), path))
        index = {path: i for i, path in enumerate(paths)}
        index[()] = -1
        for path in paths:
            if not path or min(path) < 0:
                raise ValueError(f"choices: expected non-empty paths of ranks from 0, got {list(path)}")
            if path[:-1] not in index:
                raise ValueError(f"choices: expected the parent {list(path[:-1])} of {list(path)}, which is missing")
        parents = np.array([index[path[:-1]] for path in paths], np.int32)
        return cls(parents, None, np.array([path[-1] for path in paths], np.int32))

    @classmethod
    def from_parent_list(cls, parent_list: Any, selected_index: Any, tokens: Any, top_k: int) -> "DraftTree":
        """From the lists that SGLang's and EAGLE's drafting leave behind.

        Drafting numbers its candidates level after level: ``top_k`` children of the root first, then ``top_k`` children
        of each expanded candidate.

        Parameters
        ----------
        parent_list : int [1 + m]
            The expanded candidates: -1 (the root), then the candidate numbers that were expanded, in order.
            Candidate c is a child of ``parent_list[c // top_k]``.
        selected_index : int [n]
            The candidates that are in the tree, ascending.
        tokens : int [n]
            Their tokens.

        Raises
        ------
        ValueError
            A selected candidate whose parent is not selected, indices out of range or order.
        """
        expanded, selected = _int32(parent_list, "parent_list"), _int32(selected_index, "selected_index")
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        if (np.diff(selected) <= 0).any() or (len(selected) and selected[0] < 0):
            raise ValueError("selected_index: expected candidate numbers that ascend from 0 on")
        if len(expanded) < 1 or expanded[0] != -1:
            raise ValueError(f"parent_list: expected -1 (the root) first, got {expanded[:1].tolist()}")
        place = {int(c): i for i, c in enumerate(selected)}
        parents = []
        for c in selected.tolist():
            if c // top_k >= len(expanded):
                raise ValueError(f"selected_index: expected candidates below {len(expanded) * top_k}, got {c}")
            above = int(expanded[c // top_k])
            if above >= 0 and above not in place:
                raise ValueError(f"selected_index: expected the parent {above} of candidate {c}, which is missing")
            parents.append(-1 if above < 0 else place[above])
        return cls(np.array(parents, np.int32), tokens, selected % top_k)

    @classmethod
    def from_paths(cls, paths: Any, tokens: Any = None) -> "DraftTree":
        """From padded paths, as TensorRT-LLM keeps them: int [num_paths, length], entries rows of the step, -1 pads.

        Row 0 is the root, so the first column is 0; row r is node r - 1. Every row has to lie on some path.
        """
        table = np.asarray(paths)
        if table.ndim != 2 or table.dtype.kind not in "iu":
            raise ValueError(
                f"paths: expected integers [num_paths, length], got {table.dtype} of {table.ndim} dimensions"
            )
        above: dict[int, int] = {}
        for path in table.tolist():
            rows = path[: path.index(-1)] if -1 in path else path
            if not rows or rows[0] != 0 or any(x != -1 for x in path[len(rows) :]):
                raise ValueError(f"paths: expected a path from row 0 with -1 behind it, got {path}")
            for parent, row in pairwise(rows):
                if above.setdefault(row, parent) != parent:
                    raise ValueError(f"paths: expected one parent of row {row}, got {above[row]} and {parent}")
        if sorted(above) != list(range(1, len(above) + 1)):
            raise ValueError(f"paths: expected rows 1..{len(above)}, got {sorted(above)}")
        return cls(np.array([above[row] - 1 for row in sorted(above)], np.int32), tokens)

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> "DraftTree":
        """The prefix tree of token sequences (SpecInfer's merged token tree), in the order in which they come."""
        index: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            at = -1
            for token in sequence:
                at = index.setdefault((at, int(token)), len(index))
        return cls(np.array([p for p, _ in index], np.int32), np.array([t for _, t in index], np.int32))


def _int32(x: Any, name: str) -> np.ndarray:
    array = np.asarray(x)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers [n], got {array.dtype} of {array.ndim} dimensions")
    if array.min() < -(2**31) or array.max() >= 2**31:
        raise ValueError(f"{name}: expected values of 32 bits, got {array[np.abs(array).argmax()]}")
    return np.ascontiguousarray(array, np.int32)


def _sibling_ranks(parents: np.ndarray) -> np.ndarray:
    seen: dict[int, int] = {}
    ranks = np.empty(len(parents), np.int32)
    for i, parent in enumerate(parents.tolist()):
        ranks[i] = seen.get(parent, 0)
        seen[parent] = int(ranks[i]) + 1
    return ranks


# ---- by expected acceptance ---------------------------------------------------------------------------------------


def optimal_tree(acceptance: Any, budget: int, *, max_depth: int | None = None) -> DraftTree:
    """The shape of at most `budget` nodes with the most expected accepted tokens (Sequoia, arXiv:2402.12374).

    Parameters
    ----------
    acceptance : float [ranks] or [depth, ranks]
        P(the child of this rank is accepted | its parent was), for a child at any depth, or one row a depth (then no
        deeper node is made). Siblings exclude each other: a row sums to at most 1. Rank r needs ranks 0..r-1 beside it,
        as siblings are drawn in order.
    budget : int
        0..4096 nodes, the root not counted.
    max_depth : int, optional
        Levels of nodes. Default: rows of `acceptance`, or no limit.

    Returns
    -------
    DraftTree
        Without tokens, parents first, siblings by rank. Its expected length is :func:`expected_length`.

    Notes
    -----
    Dynamic programme over (depth, nodes in the subtree), exact for any table; O(depth * ranks * budget^2).
    """
    table = np.asarray(acceptance, np.float64)
    if table.ndim not in (1, 2) or table.size == 0:
        raise ValueError(f"acceptance: expected [ranks] or [depth, ranks], got shape {list(table.shape)}")
    rows = table.reshape(-1, table.shape[-1])
    if not ((rows >= 0) & (rows <= 1)).all() or (rows.sum(axis=1) > 1 + 1e-9).any():
        raise ValueError("acceptance: expected probabilities whose rows sum to at most 1")
    if not 0 <= budget <= MOST_NODES:
        raise ValueError(f"budget: expected 0..{MOST_NODES} nodes, got {budget}")
    if max_depth is not None and max_depth < 0:
        raise ValueError(f"max_depth: expected 0 or more, got {max_depth}")
    levels = budget if table.ndim == 1 else min(len(rows), budget)
    levels = levels if max_depth is None else min(levels, max_depth)
    ranks = min(rows.shape[1], budget)

    # forests[m]: the best value of m nodes at the current level and below, children of one node; cuts[level][rank][m]:
    # how many of them the child of that rank takes.
    below = np.full(budget + 1, -np.inf)
    below[0] = 0.0
    cuts = []
    nodes, taken = np.ogrid[: budget + 1, : budget + 1]
    possible, rest = (taken >= 1) & (taken <= nodes), np.maximum(nodes - taken, 0)
    for level in range(levels - 1, -1, -1):
        p = rows[level if table.ndim == 2 else 0]
        subtree = np.concatenate([[-np.inf], 1.0 + below[:-1]])  # a node and what hangs from it
        forest = np.full(budget + 1, -np.inf)
        forest[0] = 0.0
        level_cuts = np.zeros((ranks, budget + 1), np.int32)
        for rank in range(ranks - 1, -1, -1):
            gain = np.where(np.isneginf(subtree), -np.inf, p[rank] * np.where(np.isneginf(subtree), 0.0, subtree))
            values = gain[None, :] + forest[rest]  # [nodes, of which the child takes]
            values[~possible] = -np.inf
            take = values.argmax(axis=1)
            best = values[np.arange(budget + 1), take]
            best[0] = 0.0
            level_cuts[rank] = take
            forest = best
        below = forest
        cuts.append(level_cuts)
    cuts.reverse()
    return _cut_tree(cuts, int(np.argmax(below)) if levels else 0)


def _cut_tree(cuts: list[np.ndarray], nodes: int) -> DraftTree:
    """The tree that the dynamic programme's decisions describe, level by level."""
    parents: list[int] = []
    ranks: list[int] = []
    level = [(-1, nodes)]  # a node, and how many nodes hang from it
    for taken in cuts:
        following = []
        for node, count in level:
            rank, left = 0, count
            while left:
                take = int(taken[rank, left])
                following.append((len(parents), take - 1))
                parents.append(node)
                ranks.append(rank)
                left, rank = left - take, rank + 1
        level = following
    return DraftTree(np.array(parents, np.int32), None, np.array(ranks, np.int32))


def expected_length(tree: DraftTree, acceptance: Any) -> float:
    """Expected accepted draft tokens of a shape: the sum over nodes of the product of acceptances on the way to it."""
    rows = np.atleast_2d(np.asarray(acceptance, np.float64))
    reached = np.empty(len(tree))
    for i, (parent, depth, rank) in enumerate(zip(tree.parents, tree.depth, tree.ranks, strict=True)):  # type: ignore[arg-type]
        p = rows[depth - 1 if len(rows) > 1 else 0, rank]
        reached[i] = p * (reached[parent] if parent >= 0 else 1.0)
    return float(reached.sum())


def select_best(tree: DraftTree, log_probs: Any, budget: int) -> tuple[DraftTree, np.ndarray]:
    """EAGLE-2's reranking: the `budget` nodes of the largest cumulative log-probability (arXiv:2406.16858).

    Parameters
    ----------
    log_probs : float [n]
        Of each node's token given its parent, at most 0. A path's score is the sum along it, so that a parent never
        scores below its child; ties go to the earlier node, and the choice is a tree.

    Returns
    -------
    (DraftTree, int64 [m])
        The tree and the nodes that were chosen, ascending.
    """
    given = np.asarray(log_probs, np.float64)
    if given.shape != (len(tree),):
        raise ValueError(f"log_probs: expected one a node ({len(tree)}), got shape {list(given.shape)}")
    if not (given <= 1e-9).all():
        raise ValueError("log_probs: expected values of at most 0, got a larger one or NaN")
    if budget < 0:
        raise ValueError(f"budget: expected 0 or more, got {budget}")
    score = np.minimum(given, 0.0)
    for i, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            score[i] += score[parent]
    chosen = np.sort(np.argsort(-score, kind="stable")[:budget])
    chosen = chosen[score[chosen] > -np.inf]
    new = np.full(len(tree) + 1, -1, np.int32)  # the last entry is the root
    new[chosen] = np.arange(len(chosen))
    tokens = None if tree.tokens is None else tree.tokens[chosen]
    ranks = None if tree.ranks is None else tree.ranks[chosen]
    return DraftTree(new[tree.parents[chosen]], tokens, ranks), chosen


def top_scores(
    expand: Callable[[list[list[int]]], Any], *, depth: int, width: int, budget: int
) -> tuple[DraftTree, np.ndarray]:
    """EAGLE-2's dynamic tree: grown by the draft's own confidence, then reranked (arXiv:2406.16858).

    Parameters
    ----------
    expand
        The draft model: token paths from the root (at first one empty path) to log-probabilities [paths, V].
    depth, width
        Levels to grow; at each the `width` best nodes are expanded, by `width` children each.
    budget
        Nodes of the result, see :func:`select_best`.

    Returns
    -------
    (DraftTree, float64 [m])
        The tree and its tokens' log-probabilities given their parents. Children are top-k and not sampled: rules that
        need no draft distribution verify such trees (greedy, sampled, gumbel, target_only).
    """
    if depth < 1 or width < 1:
        raise ValueError(f"depth, width: expected at least 1, got {depth}, {width}")
    parents: list[int] = []
    tokens: list[int] = []
    logs: list[float] = []
    totals: list[float] = []
    level: list[int] = [-1]
    paths: dict[int, list[int]] = {-1: []}
    for _ in range(depth):
        rows = np.asarray(expand([paths[node] for node in level]), np.float64)
        if rows.ndim != 2 or len(rows) != len(level):
            raise ValueError(f"expand: expected log-probabilities [{len(level)}, V], got shape {list(rows.shape)}")
        fresh = []
        for node, row in zip(level, rows, strict=True):
            for token in np.argsort(-row, kind="stable")[:width].tolist():
                if row[token] == -np.inf:
                    continue
                fresh.append(len(parents))
                paths[len(parents)] = [*paths[node], token]
                parents.append(node)
                tokens.append(token)
                logs.append(float(row[token]))
                totals.append(logs[-1] + (totals[node] if node >= 0 else 0.0))
        level = sorted(sorted(fresh, key=lambda i: (-totals[i], i))[:width])
        if not level:
            break
    grown = DraftTree(np.array(parents, np.int32), np.array(tokens, np.int32))
    tree, chosen = select_best(grown, logs, budget)
    return tree, np.array(logs)[chosen]

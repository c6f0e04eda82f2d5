"""Draft trees: what verification and the forward pass need to know of one."""

from typing import NamedTuple

import numpy as np

#: Statuses of a tree, as in assay.h.
TREE_OK, TREE_BAD_PARENT, TREE_DUPLICATE, TREE_TOO_DEEP = range(4)


class TreeLayout(NamedTuple):
    """A draft tree as a forward pass and a verification see it. Row 0 is the root, row i + 1 is node i.

    Attributes
    ----------
    status : int
        0, or what is wrong: 1 a parent that does not come before its child, 2 siblings with the same token, 3 deeper
        than allowed. Then `node` is where, and the arrays are empty.
    node : int
        The node at fault, -1 for none.
    depth : int32 [n + 1]
    positions : int64 [n + 1]
        Of each row in its sequence.
    first_child, next_sibling : int32 [n + 1]
        Rows, -1 for none; siblings ascend.
    mask : uint8 [n + 1, n + 1]
        1 where a row attends to a column: itself and its ancestors. The context before the root is seen by all.
    mask_words : uint64 [n + 1, ceil((n + 1) / 64)]
        The same in bits: column j is bit j % 64 of word j // 64.
    retrieve_indices : int32 [leaves, greatest depth + 1]
        The rows from the root to each leaf, leaves ascending; -1 pads.
    """

    status: int
    node: int
    depth: np.ndarray
    positions: np.ndarray
    first_child: np.ndarray
    next_sibling: np.ndarray
    mask: np.ndarray
    mask_words: np.ndarray
    retrieve_indices: np.ndarray


def fault(parents: np.ndarray, tokens: np.ndarray | None, max_depth: int) -> tuple[int, int]:
    """Status and the node at fault: a bad parent or depth of the first node, else the last duplicate's second sibling."""
    depth: list[int] = []
    for i, parent in enumerate(parents.tolist()):
        if not -1 <= parent < i:
            return TREE_BAD_PARENT, i
        depth.append(1 + (depth[parent] if parent >= 0 else 0))
        if depth[i] > max_depth:
            return TREE_TOO_DEEP, i
    if tokens is not None:
        for i in range(len(parents) - 1, -1, -1):
            twins = np.flatnonzero((parents[i + 1 :] == parents[i]) & (tokens[i + 1 :] == tokens[i]))
            if len(twins):
                return TREE_DUPLICATE, i + 1 + int(twins[0])
    return TREE_OK, -1


def tree_build(parents: np.ndarray, tokens: np.ndarray | None, position: int, max_depth: int) -> TreeLayout:
    """Everything of :class:`TreeLayout`, from parents int32 [n] (-1: a child of the root) and tokens int32 [n] or None."""
    status, node = fault(parents, tokens, max_depth)
    if status:
        none = np.empty(0, np.int32)
        return TreeLayout(status, node, none, none.astype(np.int64), none, none, np.empty((0, 0), np.uint8),
                          np.empty((0, 0), np.uint64), np.empty((0, 0), np.int32))  # fmt: skip
    rows = len(parents) + 1
    paths: list[list[int]] = [[0]]
    for i, parent in enumerate(parents.tolist()):
        paths.append([*paths[parent + 1], i + 1])
    depth = np.array([len(path) - 1 for path in paths], np.int32)
    first_child, next_sibling = np.full(rows, -1, np.int32), np.full(rows, -1, np.int32)
    for r in range(rows):
        children = np.flatnonzero(parents == r - 1) + 1
        if len(children):
            first_child[r] = children[0]
        next_sibling[children[:-1]] = children[1:]
    mask = np.zeros((rows, rows), np.uint8)
    words = np.zeros((rows, (rows + 63) // 64), np.uint64)
    for r, path in enumerate(paths):
        mask[r, path] = 1
        for j in path:
            words[r, j // 64] |= np.uint64(1 << j % 64)
    leaves = [path for path, child in zip(paths, first_child, strict=True) if child < 0]
    retrieve = np.full((len(leaves), int(depth.max()) + 1), -1, np.int32)
    for row, path in zip(retrieve, leaves, strict=True):
        row[: len(path)] = path
    return TreeLayout(TREE_OK, -1, depth, position + depth.astype(np.int64), first_child, next_sibling, mask, words,
                      retrieve)  # fmt: skip

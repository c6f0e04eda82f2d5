"""Numba twin of csrc/spec_tree.c: the same arrays."""

import numpy as np
from numba import njit

from ..reference.tree import TreeLayout

_OK, _BAD_PARENT, _DUPLICATE, _TOO_DEEP = range(4)


def tree_build(parents: np.ndarray, tokens: np.ndarray | None, position: int, max_depth: int) -> TreeLayout:
    """As :func:`assay.reference.tree_build`; the arguments are checked by :mod:`assay.ops.tree`."""
    rows = len(parents) + 1
    depth, first, following = (np.full(rows, -1, np.int32) for _ in range(3))
    # Numba wants one type for each argument; empty stands for none.
    ids = np.empty(0, np.int32) if tokens is None else tokens
    status, node = _link(parents, ids, max_depth, depth, first, following)
    if status:
        none = np.empty(0, np.int32)
        return TreeLayout(status, node, none, none.astype(np.int64), none, none, np.empty((0, 0), np.uint8),
                          np.empty((0, 0), np.uint64), np.empty((0, 0), np.int32))  # fmt: skip
    mask = np.zeros((rows, rows), np.uint8)
    words = np.zeros((rows, (rows + 63) // 64), np.uint64)
    retrieve = np.full((np.count_nonzero(first < 0), depth.max() + 1), -1, np.int32)
    _write(parents, depth, first, mask, words, retrieve)
    positions = position + depth.astype(np.int64)
    return TreeLayout(_OK, -1, depth, positions, first, following, mask, words, retrieve)


@njit(cache=True)
def _link(parents, tokens, max_depth, depth, first, following):  # type: ignore[no-untyped-def]
    n = len(parents)
    depth[0] = 0
    for i in range(n):
        if parents[i] < -1 or parents[i] >= i:
            return _BAD_PARENT, i
        depth[i + 1] = depth[parents[i] + 1] + 1
        if depth[i + 1] > max_depth:
            return _TOO_DEEP, i
    for i in range(n - 1, -1, -1):
        parent = parents[i] + 1
        sibling = first[parent]
        while len(tokens) and sibling >= 0:
            if tokens[sibling - 1] == tokens[i]:
                return _DUPLICATE, sibling - 1
            sibling = following[sibling]
        following[i + 1] = first[parent]
        first[parent] = i + 1
    return _OK, -1


@njit(cache=True)
def _write(parents, depth, first, mask, words, retrieve):  # type: ignore[no-untyped-def]
    leaf = 0
    for r in range(len(depth)):
        if r:
            mask[r] = mask[parents[r - 1] + 1]
            words[r] = words[parents[r - 1] + 1]
        mask[r, r] = 1
        words[r, r // 64] |= np.uint64(1) << np.uint64(r % 64)
        if first[r] < 0:
            at = r
            for d in range(depth[r], -1, -1):
                retrieve[leaf, d] = at
                if d:
                    at = parents[at - 1] + 1
            leaf += 1

"""Draft trees: attention masks, positions and links from parents."""

from typing import Any

import numpy as np

from .. import reference
from .._ffi import as_tensor, check, ffi, lib
from ..reference.tree import TreeLayout
from ._backends import twin
from ._devices import on_device

#: A tree may have so many nodes.
MOST_NODES: int = lib.ASSAY_TREE_MOST_NODES

_ARGS = ffi.typeof("assay_tree_args *")
#: numpy takes a dtype in a third of the time of a type.
_INT32, _INT64, _UINT8, _UINT64 = (np.dtype(name) for name in ("int32", "int64", "uint8", "uint64"))
_INTS, _LONGS, _BYTES, _WORDS = (ffi.typeof(f"{name}[]") for name in ("int32_t", "int64_t", "uint8_t", "uint64_t"))


def tree_build(parents: Any, tokens: Any = None, *, position: int = 0, max_depth: int | None = None,
               backend: str = "c", stream: Any = None) -> Any:  # fmt: skip
    """The layout of one draft tree; on a GPU of one or several.

    Parameters
    ----------
    parents : int32 or int64 [n]
        Each node's parent by index, which comes before it; -1 for a child of the root, the last emitted token.
        At most 4096 nodes; none is fine. An array on a GPU, int32 [n] or of several trees [trees, n], makes the call run there.
    tokens : int32 or int64 [n], optional
        Where given, siblings must differ.
    position : int
        Of the root in its sequence.
    max_depth : int, optional
        Deeper trees get a status. Default: none is too deep.
    backend : {"c", "numba", "reference"}
    stream : optional
        On a GPU: as for :func:`assay.w4a8_gemm`.

    Returns
    -------
    TreeLayout
        A bad tree is no exception but a status (see there); :class:`assay.DraftTree` raises. On a GPU an
        :class:`assay.cuda.tree.DeviceTrees`, of which nothing was looked at.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    if on_device(parents, backend, stream):
        from ..cuda.tree import build

        return build(parents, tokens, position, max_depth, stream)
    up = _ids(parents, "parents")
    n = len(up)
    if n > MOST_NODES:
        raise ValueError(f"parents: expected at most {MOST_NODES} nodes, got {n}")
    ids = None if tokens is None else _ids(tokens, "tokens")
    if ids is not None and len(ids) != n:
        raise ValueError(f"tokens: expected [n] = [{n}], got [{len(ids)}]")
    deepest = n if max_depth is None else min(int(max_depth), n)
    if deepest < 0:
        raise ValueError(f"max_depth: expected 0 or more, got {max_depth}")
    if not 0 <= position < 2**62:
        raise ValueError(f"position: expected 0 or more, got {position}")
    if backend == "c":
        return _call(up, ids, int(position), deepest)
    found = twin(backend, "tree", None)
    layout: TreeLayout = (found or reference).tree_build(up, ids, int(position), deepest)
    return layout


def _ids(x: Any, name: str) -> np.ndarray:
    if type(x) is np.ndarray and x.dtype is _INT32 and x.flags.c_contiguous and x.ndim == 1:
        return x  # as ids mostly come: told in half the time of viewing them
    if isinstance(x, list | tuple):
        x = np.array(x, np.int64)
    array = as_tensor(x, name, ("int32", "int64"), 1).array
    low, high = -(2**31), 2**31 - 1
    if array.dtype == np.int64 and array.size and not (low <= array.min() and array.max() <= high):
        raise ValueError(f"{name}: expected values of 32 bits, got {array[(array < low) | (array > high)][0]}")
    return np.ascontiguousarray(array, np.int32)


def _call(parents: np.ndarray, tokens: np.ndarray | None, position: int, max_depth: int) -> TreeLayout:
    n = parents.size
    rows = n + 1
    ints = np.empty(4 + 3 * rows + max(n, 1) * (max_depth + 1), _INT32)
    positions, mask = np.empty(rows, _INT64), np.empty((rows, rows), _UINT8)
    words = np.empty((rows, (rows + 63) // 64), _UINT64)
    args, buffer = ffi.new(_ARGS), ffi.from_buffer
    args.nodes, args.max_depth, args.position = n, max_depth, position
    if n:
        args.parents = buffer(_INTS, parents)
        if tokens is not None:
            args.tokens = buffer(_INTS, tokens)
    at = buffer(_INTS, ints)
    args.info = at
    at += 4
    args.depth, args.first_child, args.next_sibling, args.retrieve = at, at + rows, at + 2 * rows, at + 3 * rows
    args.positions, args.mask, args.mask_words = buffer(_LONGS, positions), buffer(_BYTES, mask), buffer(_WORDS, words)
    check(lib.assay_tree_build(args), "tree_build")
    status, node, leaves, deepest = ints[:4].tolist()
    if status:
        none = np.empty(0, np.int32)
        return TreeLayout(
            status, node, none, positions[:0], none, none, mask[:0, :0], words[:0, :0], none[:, None][:, :0]
        )
    depth, first_child, next_sibling = ints[4 : 4 + 3 * rows].reshape(3, rows)
    paths = ints[4 + 3 * rows :][: leaves * (deepest + 1)].reshape(leaves, deepest + 1)
    return TreeLayout(status, node, depth, positions, first_child, next_sibling, mask, words, paths)

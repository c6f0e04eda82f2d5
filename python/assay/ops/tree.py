"""Draft trees: attention masks, positions and links from parents."""

from typing import Any

import numpy as np

from .. import reference
from .._ffi import aligned, as_tensor, calls, check, lib
from ..reference.tree import TreeLayout
from ._backends import twin
from ._devices import on_device

#: A tree may have so many nodes.
MOST_NODES: int = lib.ASSAY_TREE_MOST_NODES


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
    if backend == "c" and stream is None:  # as arguments mostly come
        found = calls.tree_build(TreeLayout, parents, tokens, position, max_depth)
        if type(found) is TreeLayout:
            return found
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
        answer = calls.tree_build(
            TreeLayout, aligned(up), None if ids is None else aligned(ids), int(position), deepest
        )
        if type(answer) is int:
            check(answer, "tree_build")
        return answer
    layout: TreeLayout = (twin(backend, "tree", None) or reference).tree_build(up, ids, int(position), deepest)
    return layout


def _ids(x: Any, name: str) -> np.ndarray:
    if isinstance(x, list | tuple):
        x = np.array(x, np.int64)
    array = as_tensor(x, name, ("int32", "int64"), 1).array
    low, high = -(2**31), 2**31 - 1
    if array.dtype == np.int64 and array.size and not (low <= array.min() and array.max() <= high):
        raise ValueError(f"{name}: expected values of 32 bits, got {array[(array < low) | (array > high)][0]}")
    return np.ascontiguousarray(array, np.int32)

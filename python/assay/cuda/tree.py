"""Draft trees on a GPU: the device path of :mod:`assay.ops.tree`."""

from typing import Any, NamedTuple

import numpy as np

from .._ffi import ffi, lib
from ._arrays import DeviceArray
from ._place import place
from ._status import check
from .moe import pointer_to

_MOST_NODES = lib.ASSAY_TREE_MOST_NODES
_C_TYPES = {"int32": "int32_t *", "int64": "int64_t *", "uint8": "uint8_t *", "uint64": "uint64_t *"}


class DeviceTrees(NamedTuple):
    """Layouts of several trees of n nodes, on the GPU: :class:`assay.TreeLayout` with a leading dimension [trees].

    Attributes
    ----------
    info : int32 [trees, 4]
        Status, the node at fault or -1, leaves, greatest depth. Where the status is not 0 the rest means nothing.
    depth, first_child, next_sibling : int32 [trees, n + 1]
    positions : int64 [trees, n + 1]
    mask : uint8 [trees, n + 1, n + 1]
    mask_words : uint64 [trees, n + 1, ceil((n + 1) / 64)]
    retrieve_indices : int32 [trees, max(n, 1) (max_depth + 1)]
        The first leaves (greatest depth + 1) values of a row are the paths, one after the other.
    """

    info: DeviceArray
    depth: DeviceArray
    first_child: DeviceArray
    next_sibling: DeviceArray
    positions: DeviceArray
    mask: DeviceArray
    mask_words: DeviceArray
    retrieve_indices: DeviceArray


def build(parents: Any, tokens: Any, position: Any, max_depth: int | None, stream: Any) -> DeviceTrees:
    """parents and tokens: int32 [n] or [trees, n] on a GPU; position: int, the same for all, or int64 [trees] there."""
    dimensions = len(parents.shape)
    if dimensions not in (1, 2):
        raise ValueError(f"parents: expected [n] or [trees, n], got {list(parents.shape)}")
    with place((parents, tokens), stream) as here:
        up = here.tensor(parents, "parents", ("int32",), dimensions, contiguous=True)
        ids = None if tokens is None else here.tensor(tokens, "tokens", ("int32",), dimensions, contiguous=True)
        trees, n = up.shape if dimensions == 2 else (1, *up.shape)
        if n > _MOST_NODES:
            raise ValueError(f"parents: expected at most {_MOST_NODES} nodes, got {n}")
        if ids is not None and ids.shape != up.shape:
            raise ValueError(f"tokens: expected {list(up.shape)} as parents, got {list(ids.shape)}")
        deepest = n if max_depth is None else min(int(max_depth), n)
        if deepest < 0:
            raise ValueError(f"max_depth: expected 0 or more, got {max_depth}")
        if isinstance(position, int):
            if not 0 <= position < 2**62:
                raise ValueError(f"position: expected 0 or more, got {position}")
            position = here.upload(np.full(max(trees, 1), position, np.int64))
        root = here.tensor(position, "position", ("int64",), 1, contiguous=True)
        if root.size < trees:
            raise ValueError(f"position: expected an int or [trees] = [{trees}], got {list(root.shape)}")
        rows = n + 1
        shapes = {
            "info": ("int32", (trees, 4)), "depth": ("int32", (trees, rows)), "first_child": ("int32", (trees, rows)),
            "next_sibling": ("int32", (trees, rows)), "positions": ("int64", (trees, rows)),
            "mask": ("uint8", (trees, rows, rows)), "mask_words": ("uint64", (trees, rows, -(-rows // 64))),
            "retrieve": ("int32", (trees, max(n, 1) * (deepest + 1))),
        }  # fmt: skip
        made = {name: here.output(None, name, dtype, shape) for name, (dtype, shape) in shapes.items()}
        args = ffi.new("assay_cuda_tree_args *", {
            "trees": trees, "nodes": n, "parents": pointer_to(up, "int32_t *"), "tokens": pointer_to(ids, "int32_t *"),
            "max_depth": deepest, "position": pointer_to(root, "int64_t *"),
            **{name: pointer_to(tensor, _C_TYPES[tensor.dtype]) for name, (tensor, _) in made.items()},
        })  # fmt: skip
        if trees:
            check(lib.assay_cuda_tree_build(args, here.stream), "tree_build")
    return DeviceTrees(*(result for _, result in made.values()))

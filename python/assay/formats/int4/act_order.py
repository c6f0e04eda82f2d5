"""Input features in an order of their groups: GPTQ's act-order, and its ``g_idx``."""

from typing import Any

import numpy as np

from .._checks import bad, expect
from ..weights import Int4Weights


def order_of(g_idx: Any, where: str, k: int, group_size: int) -> np.ndarray | None:
    """Permutation that sorts input features by group; None when they are sorted, or the tensor is absent."""
    if g_idx is None:
        return None
    expect(g_idx, where, ("int32", "int64"), (k,), says=" (K)")
    if (g_idx == -1).all():  # compressed-tensors' value before one is assigned
        return None
    groups = k // group_size
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        bad(where, f"groups 0..{groups - 1}", f"{low if low < 0 else high}")
    counts = np.bincount(g_idx, minlength=groups)
    uneven = np.flatnonzero(counts != group_size)
    if uneven.size:
        bad(where, f"every group {group_size} times", f"group {uneven[0]} {counts[uneven[0]]} times")
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if np.array_equal(perm, np.arange(k)) else perm


def in_groups(q: np.ndarray, perm: np.ndarray | None) -> np.ndarray:
    """Columns of a file in the order of their groups."""
    return q if perm is None else np.ascontiguousarray(q[:, perm])


def group_indices(w: Int4Weights) -> np.ndarray:
    """The group of every input feature, in the layer's own order."""
    groups = (np.arange(w.k) // w.group_size).astype(np.int32)
    if w.perm is None:
        return groups
    out = np.empty_like(groups)
    out[w.perm] = groups
    return out


def in_file_order(w: Int4Weights) -> np.ndarray:
    """The codes with their columns in the layer's own order: `in_groups` undone."""
    if w.perm is None:
        return w.q
    out = np.empty_like(w.q)
    out[:, w.perm] = w.q
    return out


def refuse_order(w: Int4Weights, name: str) -> None:
    """FormatError for weights with an order, which the format `name` cannot tell."""
    if w.perm is not None:
        bad("perm", f"None ({name} has no order of its own for input features)", "act-order weights")

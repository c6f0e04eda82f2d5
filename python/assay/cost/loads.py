"""Rows that each expert of a rank gets, as the collectors of measured tables hand them out.

Tables name a distribution; what a kernel does depends on the rows of each expert behind that name. AIConfigurator's
collectors (docs/POWER_LAW_DISTRIBUTION.md there) time rank 0 of ``ep``:

- balanced: token t goes to experts ``t + i ceil(E / k)`` modulo E (fewer tokens than ``ceil(E / k)`` are spread evenly);
- power law: the load of each expert is drawn from a density ``x^-alpha`` on [1, 0.8 T] ([0.01, 2] where T k <= E), scaled to
  T k pairs, rounded, at most T; what is missing goes to the emptiest experts, what is too much is cut from the fullest. The
  rank with the largest sum is the one that is timed.

What is counted here is the mean over draws with a fixed seed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from assay.cost.roofline import FloatArray, IntArray

DRAWS = 24  # the mean of a load's blocks is then known to some percent; the tables themselves average five
BLOCKS = (16, 32, 64, 128)  # rows of the tiles that grouped products use


@dataclass(frozen=True)
class Loads:
    """Of the timed rank, means over draws, [n] each: ``pairs`` rows in all, ``touched`` experts with any, the largest
    share ``most`` of one expert, and ``blocks`` [n, len(BLOCKS)] tiles of so many rows that hold them."""

    pairs: FloatArray
    touched: FloatArray
    most: FloatArray
    blocks: FloatArray


def loads_of(sizes: Mapping[str, FloatArray]) -> Loads:
    """Loads of every point of an expert table (sizes as `assay.tables.SIZES` names them)."""
    keys = np.stack([sizes[name] for name in ("tokens", "num_experts", "top_k", "ep", "alpha")], axis=1)
    unique, where = np.unique(keys, axis=0, return_inverse=True)
    rows = np.array([_rank(int(t), int(e), int(k), int(p), a) for t, e, k, p, a in unique.tolist()])
    rows = rows[where.reshape(-1)]
    return Loads(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:])


@lru_cache(maxsize=1 << 17)
def _rank(tokens: int, experts: int, top_k: int, ep: int, alpha: float) -> tuple[float, ...]:
    every = _loads(tokens, experts, top_k, alpha)
    local = max(experts // ep, 1)
    ranks = every[:, : local * ep].reshape(len(every), ep, local)
    fullest = ranks.sum(axis=2).argmax(axis=1) if alpha > 0 else np.zeros(len(every), dtype=np.int64)
    rank = ranks[np.arange(len(every)), fullest]
    blocks = [float(np.ceil(rank / rows).sum(axis=1).mean()) for rows in BLOCKS]
    # A rank that gets nothing still launches; one row keeps every logarithm finite.
    pairs, touched = float(rank.sum(axis=1).mean()), float((rank > 0).sum(axis=1).mean())
    most = float(rank.max(axis=1).mean())
    return (max(pairs, 1.0), max(touched, 1.0), max(most, 1.0), *(max(b, 1.0) for b in blocks))


@lru_cache(maxsize=64)
def _loads(tokens: int, experts: int, top_k: int, alpha: float) -> IntArray:
    """Rows of each expert, [draws, experts]; they sum to ``tokens * top_k``."""
    if alpha == 0:
        return _balanced(tokens, experts, top_k)[None]
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    high = max(high, 1.001 * low)
    u = np.random.default_rng(experts).random((DRAWS, experts))
    if abs(alpha - 1.0) < 1e-9:
        drawn = low * (high / low) ** u
    else:
        power = 1.0 - alpha
        drawn = ((high**power - low**power) * u + low**power) ** (1.0 / power)
    total = tokens * top_k
    loads = np.round(drawn / drawn.sum(axis=1, keepdims=True) * total).astype(np.int64)
    return _topped_up(np.minimum(loads, tokens), total)


def _balanced(tokens: int, experts: int, top_k: int) -> IntArray:
    stride = math.ceil(experts / top_k)
    if tokens < stride:
        first = (np.arange(tokens) * stride / tokens)[:, None] + np.arange(top_k) * stride
        return np.bincount(first.astype(np.int64).reshape(-1) % experts, minlength=experts)
    offset = (np.arange(experts)[:, None] - np.arange(top_k) * stride) % experts
    return np.asarray((tokens // experts + (offset < tokens % experts)).sum(axis=1), dtype=np.int64)


def _topped_up(loads: IntArray, total: int) -> IntArray:
    """``loads`` [draws, experts] with each row's sum made ``total``: the emptiest are filled up, the fullest are cut."""
    for index, row in enumerate(loads):
        missing = total - int(row.sum())
        if missing == 0:
            continue
        order = np.sort(row) if missing > 0 else -np.sort(-row)
        # Raising the j emptiest to the level of the next costs this much; cutting is the same upside down.
        cost = np.abs(np.arange(1, row.size) * order[1:] - np.cumsum(order)[:-1])
        level = int(np.searchsorted(cost, abs(missing), side="right"))
        flat, rest = divmod(abs(int(order[: level + 1].sum()) + missing), level + 1)
        chosen = np.argsort(row if missing > 0 else -row, kind="stable")[: level + 1]
        loads[index, chosen] = flat
        loads[index, chosen[:rest]] += 1
    return loads

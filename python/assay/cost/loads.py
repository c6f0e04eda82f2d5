"""Rows that each expert of a rank gets, as the collectors of measured tables hand them out.

Tables name a distribution; what a kernel does depends on the rows of each expert behind that name. AIConfigurator's
collectors (docs/POWER_LAW_DISTRIBUTION.md there) time rank 0 of ``ep``:

- balanced: token t goes to experts ``t + i ceil(E / k)`` modulo E (fewer tokens than ``ceil(E / k)`` are spread evenly);
- power law: the load of each expert is drawn from a density ``x^-alpha`` on [1, 0.8 T] ([0.01, 2] where T k <= E), scaled to
  T k pairs, rounded, at most T; what is missing then goes to the emptiest expert of each rank in turn, what is too much is
  taken from the fullest. The rank with the largest sum is the one that is timed.

What is counted here is the mean over draws with a fixed seed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from assay.cost.roofline import FloatArray, IntArray

DRAWS = 16  # the mean of a load's blocks is then known to some percent; the tables themselves average five
BLOCKS = (16, 32, 64, 128)  # rows of the tiles that grouped products use


@dataclass(frozen=True)
class Loads:
    """Of the timed rank, means over draws, [n] each: ``tokens`` with any expert there, ``pairs`` rows in all, ``touched``
    experts with any, the rows of the largest ``most``, and ``blocks`` [n, len(BLOCKS)] tiles of so many rows that hold them."""

    tokens: FloatArray
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
    return Loads(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4:])


@lru_cache(maxsize=1 << 17)
def _rank(tokens: int, experts: int, top_k: int, ep: int, alpha: float) -> tuple[float, ...]:
    local = max(experts // ep, 1)
    if alpha == 0:
        rank = _balanced(tokens, experts, top_k)[None, :local]
    else:
        ranks = _drawn(tokens, experts, top_k, alpha)[:, : local * ep].reshape(-1, ep, local)
        missing = tokens * top_k - ranks.sum(axis=(1, 2))
        share = np.sign(missing)[:, None] * ((np.abs(missing)[:, None] + np.arange(ep)[::-1]) // ep)
        ranks = _levelled(ranks, np.maximum(share, -ranks.sum(axis=2)))
        rank = ranks[np.arange(len(ranks)), ranks.sum(axis=2).argmax(axis=1)]
    pairs, touched = float(rank.sum(axis=1).mean()), float((rank > 0).sum(axis=1).mean())
    # Balanced experts of a rank are neighbours, which no token has two of until all have one; drawn ones fall together
    # as often as if independent.
    apart = tokens * (1.0 - np.prod(1.0 - np.minimum(rank / tokens, 1.0), axis=1)).mean()
    here = min(float(tokens), pairs) if alpha == 0 else float(apart)
    blocks = [float(np.ceil(rank / rows).sum(axis=1).mean()) for rows in BLOCKS]
    most = float(rank.max(axis=1).mean())
    # A rank that gets nothing still launches; one row keeps every logarithm finite.
    return tuple(max(value, 1.0) for value in (here, pairs, touched, most, *blocks))


@lru_cache(maxsize=64)
def _drawn(tokens: int, experts: int, top_k: int, alpha: float) -> IntArray:
    """Rounded loads of each expert, [draws, experts], before their sum is made ``tokens * top_k``."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    high = max(high, 1.001 * low)
    u = np.random.default_rng(experts).random((DRAWS, experts))
    if abs(alpha - 1.0) < 1e-9:
        drawn = low * (high / low) ** u
    else:
        power = 1.0 - alpha
        drawn = ((high**power - low**power) * u + low**power) ** (1.0 / power)
    loads = np.round(drawn / drawn.sum(axis=1, keepdims=True) * (tokens * top_k)).astype(np.int64)
    return np.asarray(np.minimum(loads, tokens))


def _balanced(tokens: int, experts: int, top_k: int) -> IntArray:
    stride = math.ceil(experts / top_k)
    if tokens < stride:
        first = (np.arange(tokens) * stride / tokens)[:, None] + np.arange(top_k) * stride
        return np.bincount(first.astype(np.int64).reshape(-1) % experts, minlength=experts)
    offset = (np.arange(experts)[:, None] - np.arange(top_k) * stride) % experts
    return np.asarray((tokens // experts + (offset < tokens % experts)).sum(axis=1), dtype=np.int64)


def _levelled(loads: IntArray, missing: IntArray) -> IntArray:
    """``loads`` [..., experts] with ``missing`` [...] added one by one to the emptiest, or taken from the fullest."""
    sign = np.where(missing < 0, -1, 1)[..., None]
    upright = loads * sign  # taking from the fullest is adding to the emptiest, upside down
    order = np.argsort(upright, axis=-1, kind="stable")
    rising = np.take_along_axis(upright, order, axis=-1)
    total = np.cumsum(rising, axis=-1)
    need = np.abs(missing)[..., None]
    # Raising the j emptiest to the level of the next takes this many.
    cost = np.arange(1, loads.shape[-1]) * rising[..., 1:] - total[..., :-1]
    last = (cost <= need).sum(axis=-1, keepdims=True)
    flat, rest = np.divmod(np.take_along_axis(total, last, axis=-1) + need, last + 1)
    place = np.arange(loads.shape[-1])
    rising = np.where(place <= last, flat + (place < rest), rising)
    filled = np.empty_like(loads)
    np.put_along_axis(filled, order, rising, axis=-1)
    return filled * sign

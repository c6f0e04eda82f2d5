"""How evenly experts are loaded, and how to place copies of the busy ones."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class LoadStatistics(NamedTuple):
    """Of the slots that chose each expert.

    Attributes
    ----------
    counts : int64 [num_experts]
    distinct_experts : int
        With at least one slot.
    coefficient_of_variation : float
        Standard deviation over mean; 0 is even.
    jain_index : float
        ``(sum c)^2 / (E sum c^2)``: 1 is even, 1 / E all on one (Jain, Chiu and Hawe 1984).
    max_over_mean : float
        How much longer the busiest takes than an even load would.
    """

    counts: np.ndarray
    distinct_experts: int
    coefficient_of_variation: float
    jain_index: float
    max_over_mean: float


def moe_load(topk_ids: npt.ArrayLike, num_experts: int) -> LoadStatistics:
    """Statistics of ids of any shape; those outside 0..num_experts-1 (as -1) do not count. Without any: all even."""
    ids = np.asarray(topk_ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"topk_ids: expected integers, got {ids.dtype}")
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    counts = np.bincount(ids[(ids >= 0) & (ids < num_experts)].astype(np.int64), minlength=num_experts)
    total = float(counts.sum())
    if not total:
        return LoadStatistics(counts, 0, 0.0, 1.0, 1.0)
    squares = float((counts.astype(np.float64) ** 2).sum())
    mean = total / num_experts
    return LoadStatistics(
        counts, int(np.count_nonzero(counts)), float(counts.std() / mean), total**2 / (num_experts * squares),
        float(counts.max() / mean),
    )  # fmt: skip


# ---- placing copies of experts: the algorithms of DeepSeek's EPLB, https://github.com/deepseek-ai/EPLB ------------------


class Placement(NamedTuple):
    """Copies of experts on devices.

    Attributes
    ----------
    phy2log : int64 [layers, num_replicas]
        Expert of each physical copy; copies of a GPU are adjacent.
    log2phy : int64 [layers, num_experts, most]
        Copies of each expert by rank, -1 behind them; `most` is num_replicas less num_experts plus 1.
    logcnt : int64 [layers, num_experts]
        Number of copies of each expert.
    """

    phy2log: np.ndarray
    log2phy: np.ndarray
    logcnt: np.ndarray


def balanced_packing(weight: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Items of weight [layers, n] into packs of n / num_packs each: heaviest first into the lightest pack that has room.

    Returns each item's pack and its rank there, int64 [layers, n]. Ties: the earlier item, the lower pack.
    """
    layers, n = weight.shape
    room = n // num_packs
    pack, rank = np.empty((2, layers, n), np.int64)
    for layer in range(layers):
        loads, filled = np.zeros(num_packs), np.zeros(num_packs, np.int64)
        for item in np.argsort(-weight[layer], kind="stable"):
            chosen = int(np.argmin(np.where(filled < room, loads, np.inf)))
            pack[layer, item], rank[layer, item] = chosen, filled[chosen]
            loads[chosen] += weight[layer, item]
            filled[chosen] += 1
    return pack, rank


def replicate_experts(weight: np.ndarray, num_copies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One more copy at a time of the expert whose load per copy is largest, ties to the lower, until there are num_copies.

    Returns each copy's expert and its rank among that expert's, int64 [layers, num_copies], and copies an expert,
    int64 [layers, n].
    """
    layers, n = weight.shape
    expert = np.tile(np.arange(num_copies, dtype=np.int64), (layers, 1))
    rank, count = np.zeros((layers, num_copies), np.int64), np.ones((layers, n), np.int64)
    row = np.arange(layers)
    for copy in range(n, num_copies):
        busiest = (weight / count).argmax(axis=1)
        expert[:, copy], rank[:, copy] = busiest, count[row, busiest]
        count[row, busiest] += 1
    return expert, rank, count


def _inverse(permutation: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.broadcast_to(np.arange(permutation.shape[1]), permutation.shape), axis=1)
    return inverse


def _hierarchical(
    weight: np.ndarray, copies: int, groups: int, nodes: int, gpus: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups to nodes, then copies within each node, then copies to its GPUs."""
    layers, n = weight.shape
    group_size, a_node, a_gpu = n // groups, n // nodes, copies // gpus
    node, rank = balanced_packing(weight.reshape(layers, groups, group_size).sum(-1), nodes)
    first = (node * (groups // nodes) + rank) * group_size
    log2mid = (first[:, :, None] + np.arange(group_size)).reshape(layers, n)
    mid2log = _inverse(log2mid)
    by_node = np.take_along_axis(weight, mid2log, axis=1).reshape(-1, a_node)
    expert, copy_rank, count = replicate_experts(by_node, copies // nodes)
    gpu, place = balanced_packing(np.take_along_axis(by_node / count, expert, axis=1), gpus // nodes)
    phy2copy = _inverse(gpu * a_gpu + place)
    phy2mid = np.take_along_axis(expert, phy2copy, axis=1).reshape(layers, nodes, -1)
    of_node = (phy2mid + np.arange(0, n, a_node)[None, :, None]).reshape(layers, -1)
    phy2log = np.take_along_axis(mid2log, of_node, axis=1)
    phy_rank = np.take_along_axis(copy_rank, phy2copy, axis=1).reshape(layers, -1)
    return phy2log, phy_rank, np.take_along_axis(count.reshape(layers, -1), log2mid, axis=1)


def rebalance_experts(
    weight: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """Copies of experts so that GPUs are evenly loaded, by EPLB's algorithms and with its arguments and results.

    Parameters
    ----------
    weight : float [layers, num_experts]
        Load of each expert, for example counts of :func:`moe_load` over a window.
    num_replicas : int
        Physical copies in all: at least num_experts, a multiple of num_gpus.
    num_groups : int
        Expert groups; where num_nodes divides them a group stays within a node (hierarchical), else copies go anywhere
        (global).
    num_nodes, num_gpus : int

    Raises
    ------
    ValueError
        Numbers that do not divide as they must, or a load that is negative or not finite.
    """
    load: np.ndarray = np.asarray(weight, np.float64)
    if load.ndim != 2 or not load.size or not np.isfinite(load).all() or (load < 0).any():
        raise ValueError(f"weight: expected [layers, experts] of finite loads of at least 0, got {list(load.shape)}")
    layers, n = load.shape
    if min(num_groups, num_nodes, num_gpus) < 1 or num_replicas < n:
        raise ValueError(f"num_replicas: expected at least one copy of {n} experts, got {num_replicas}")
    for name, value, divisor in (("num_replicas", num_replicas, num_gpus), ("num_gpus", num_gpus, num_nodes)):
        if value % divisor:
            raise ValueError(f"{name}: expected a multiple of {divisor}, got {value}")
    hierarchical = num_groups % num_nodes == 0
    if hierarchical and n % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {n} experts, got {num_groups}")
    groups, nodes = (num_groups, num_nodes) if hierarchical else (1, 1)
    phy2log, rank, count = _hierarchical(load, num_replicas, groups, nodes, num_gpus)
    log2phy = np.full((layers, n, num_replicas - n + 1), -1, np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, rank] = np.arange(num_replicas)
    return Placement(phy2log, log2phy, count)

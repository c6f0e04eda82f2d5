"""Which tokens go to which expert: alignment, permutation, capacity, expert choice."""

from typing import Any, NamedTuple

import numpy as np

from .._ffi import as_output, as_tensor, check, ffi, lib, thread_count, variant_index
from ..cuda import device_of
from ..cuda import moe as on_device
from ._gemm import pointer
from .moe import moe_route

_MOST = 2**31 - 2


class Alignment(NamedTuple):
    """Slots sorted by expert; a slot is one of a token's choices, ``t * k + j`` of topk_ids [T, k].

    Attributes
    ----------
    sorted_token_ids : int32 [P]
        Slots, rising within each expert; T * k where an expert's were padded to whole blocks.
    expert_ids : int32 [P / block_size]
        Local expert of each block.
    num_tokens_post_padded : int
        P.
    position : int32 [T, k]
        Where each slot went, -1 for an empty one.
    counts : int64 [experts]
        Slots of each local expert, padding not counted.

    On a GPU sizes stay there: the arrays are DeviceArrays, sorted_token_ids and expert_ids as long as P can become, with
    T * k and -1 behind P, and num_tokens_post_padded is int32 [1].
    """

    sorted_token_ids: Any
    expert_ids: Any
    num_tokens_post_padded: Any
    position: Any
    counts: Any


def _ids(topk_ids: Any) -> np.ndarray:
    ids = np.ascontiguousarray(as_tensor(topk_ids, "topk_ids", ("int32",), 2).array)
    if ids.size > _MOST:
        raise ValueError(f"topk_ids: expected fewer than 2^31 slots, got {ids.size}")
    return ids


def moe_align(topk_ids: Any, num_experts: int, block_size: int = 1, expert_map: Any = None, *,
              num_local_experts: int | None = None, stream: Any = None) -> Alignment:  # fmt: skip
    """Sorts slots by expert, each expert's padded to whole blocks: a stable counting sort, the same for any number of threads.

    Parameters
    ----------
    topk_ids : int32 [T, k]
        An id outside 0..num_experts-1 (as -1) is an empty slot and goes nowhere.
    num_experts : int
    block_size : int
        Rows of a block; 1 for no padding.
    expert_map : int32 [num_experts], optional
        The local number of each expert, -1 for those of other ranks, whose slots go nowhere.
    num_local_experts : int, optional
        With an expert_map: local numbers are below it, slots of greater ones go nowhere. Default: up to the largest in the
        map; on a GPU, where the map is not looked at beforehand, num_experts.
    stream : optional
        CUDA stream of a call on a GPU; see :mod:`assay.cuda`.
    """
    if num_local_experts is not None and (expert_map is None or not 0 <= num_local_experts <= _MOST):
        raise ValueError(f"num_local_experts: expected at least 0, and an expert_map with it, got {num_local_experts}")
    if device_of(topk_ids) is not None:
        if not 1 <= num_experts <= _MOST or not 1 <= block_size <= _MOST:
            raise ValueError(f"num_experts, block_size: expected 1..2^31 - 2, got {num_experts}, {block_size}")
        return Alignment(*on_device.align(topk_ids, num_experts, block_size, expert_map, num_local_experts, stream))
    ids = _ids(topk_ids)
    if not 1 <= num_experts <= _MOST or not 1 <= block_size <= _MOST:
        raise ValueError(f"num_experts, block_size: expected 1..2^31 - 2, got {num_experts}, {block_size}")
    local, table, owner = num_experts, ffi.NULL, None
    if expert_map is not None:
        owner = as_tensor(expert_map, "expert_map", ("int32",), 1, contiguous=True).array
        if owner.shape != (num_experts,):
            raise ValueError(f"expert_map: expected [num_experts] = [{num_experts}], got {list(owner.shape)}")
        local = int(max(owner.max(), -1)) + 1 if num_local_experts is None else num_local_experts
        table = pointer(owner, "int32_t *")
    offsets, counts, cursor = np.zeros(local + 1, np.int64), np.zeros(local, np.int64), np.zeros(local, np.int64)
    slots = pointer(ids, "int32_t *")
    bounds = pointer(offsets, "int64_t *")
    code = lib.assay_moe_offsets(
        slots, ids.size, num_experts, table, local, block_size, bounds, pointer(counts, "int64_t *")
    )
    check(code, "moe_align")
    total = int(offsets[-1])
    if total > _MOST:
        raise ValueError(f"block_size: expected fewer than 2^31 slots with padding, got {total}")
    ordered, blocks = np.empty(total, np.int32), np.empty(total // block_size, np.int32)
    position = np.empty(ids.shape, np.int32)
    code = lib.assay_moe_sort(
        slots, ids.size, num_experts, table, local, block_size, bounds, pointer(cursor, "int64_t *"),
        pointer(ordered, "int32_t *"), pointer(blocks, "int32_t *"), pointer(position, "int32_t *"),
    )  # fmt: skip
    check(code, "moe_align")
    return Alignment(ordered, blocks, total, position, counts)


def moe_permute(x: Any, alignment: Alignment) -> np.ndarray:
    """Tokens x [T, H] in the order of their experts, [P, H]: one row a slot, zeros where the alignment pads.

    The dtype is x's; bfloat16 comes as its uint16 bits.
    """
    a = as_tensor(x, "x", ("float32", "float16", "bfloat16"), 2).array
    tokens, top_k = alignment.position.shape
    if len(a) != tokens:
        raise ValueError(f"x: expected [T, H] with T = {tokens}, got {list(a.shape)}")
    rows = alignment.sorted_token_ids
    out: np.ndarray = np.zeros((len(rows), a.shape[1]), a.dtype)
    filled = rows < tokens * top_k
    out[filled] = a[rows[filled] // max(top_k, 1)]
    return out


def moe_unpermute(y: Any, alignment: Alignment, topk_weights: Any, out: Any = None, *, isa: str | None = None,
                  num_threads: int | None = None, stream: Any = None) -> Any:  # fmt: skip
    """Each token's weighted sum of its experts' rows y float32 [P, H]: float32 [T, H], slots in order, one FMA a slot.

    The bits do not depend on the batch, the number of threads, the C variant or the device; empty slots add nothing.
    """
    if device_of(y) is not None:
        return on_device.unpermute(y, alignment, topk_weights, out, stream)
    rows = as_tensor(y, "y", ("float32",), 2)
    tokens, top_k = alignment.position.shape
    weights = np.ascontiguousarray(as_tensor(topk_weights, "topk_weights", ("float32",), 2).array)
    if weights.shape != (tokens, top_k):
        raise ValueError(f"topk_weights: expected [T, k] = {[tokens, top_k]}, got {list(weights.shape)}")
    if rows.array.shape[0] != alignment.num_tokens_post_padded:
        raise ValueError(f"y: expected {alignment.num_tokens_post_padded} rows, got {rows.array.shape[0]}")
    n = rows.array.shape[1]
    c = as_output(out, "out", "float32", (tokens, n))
    if out is not None and np.may_share_memory(c.array, rows.array, 0):
        raise ValueError("out: expected memory of its own, got memory shared with y")
    position = np.ascontiguousarray(alignment.position, np.int32)
    if position.size and position.max() >= len(rows.array):
        raise ValueError(f"alignment: expected positions below {len(rows.array)}, got {position.max()}")
    code = lib.assay_moe_combine(
        ffi.cast("float *", rows.ptr), rows.row_stride, n, pointer(position, "int32_t *"), pointer(weights, "float *"),
        tokens, top_k, ffi.cast("float *", c.ptr), c.row_stride, variant_index(isa), thread_count(num_threads),
    )  # fmt: skip
    check(code, "moe_unpermute", isa)
    return c.array if out is None else out


class Capacity(NamedTuple):
    """A routing with what exceeded its experts' capacity dropped.

    Attributes
    ----------
    topk_weights : float32 [T, k]
        0 in a dropped slot; the others as they were.
    topk_ids : int32 [T, k]
        -1 in a dropped slot.
    counts : int64 [num_experts]
        Slots that each expert kept.
    """

    topk_weights: np.ndarray
    topk_ids: np.ndarray
    counts: np.ndarray


def moe_capacity(topk_weights: Any, topk_ids: Any, num_experts: int, capacity: int | None = None, *,
                 capacity_factor: float | None = None, priority: str = "position") -> Capacity:  # fmt: skip
    """Drops what exceeds each expert's capacity.

    All first choices are served before all second ones (GShard); among the tokens' choices of one rank, the order is
    `priority`.

    Parameters
    ----------
    topk_weights, topk_ids : float32 [T, k], int32 [T, k]
    num_experts : int
    capacity : int, optional
        Slots an expert takes. Either this or:
    capacity_factor : float, optional
        ``capacity = ceil(capacity_factor T k / num_experts)``.
    priority : {"position", "weight"}
        Tokens in order, or those with the largest weight first, ties to the earlier (batch-priority routing, V-MoE).
    """
    ids = _ids(topk_ids).copy()
    weights = np.array(as_tensor(topk_weights, "topk_weights", ("float32",), 2).array, order="C")
    if weights.shape != ids.shape or ids.shape[1] < 1:
        raise ValueError(f"topk_weights: expected [T, k] as topk_ids {list(ids.shape)}, got {list(weights.shape)}")
    if not 1 <= num_experts <= _MOST:
        raise ValueError(f"num_experts: expected 1..2^31 - 2, got {num_experts}")
    if (capacity is None) == (capacity_factor is None):
        raise ValueError("capacity: expected either capacity or capacity_factor, got both or neither")
    if capacity is None:
        assert capacity_factor is not None
        if not np.isfinite(capacity_factor) or capacity_factor < 0:
            raise ValueError(f"capacity_factor: expected a finite number of at least 0, got {capacity_factor}")
        capacity = int(np.ceil(capacity_factor * ids.size / num_experts))
    if capacity < 0:
        raise ValueError(f"capacity: expected at least 0 slots, got {capacity}")
    if priority not in ("position", "weight"):
        raise ValueError(f"priority: expected 'position' or 'weight', got {priority!r}")
    order = None
    if priority == "weight":
        chosen = np.where((ids >= 0) & (ids < num_experts), weights, -np.inf)  # an empty slot's weight says nothing
        order = np.argsort(-chosen.max(axis=1), kind="stable").astype(np.int64)
    counts = np.zeros(num_experts, np.int64)
    code = lib.assay_moe_capacity(
        pointer(ids, "int32_t *"), pointer(weights, "float *"), ids.shape[0], ids.shape[1], num_experts,
        min(capacity, 2**62), ffi.NULL if order is None else pointer(order, "int64_t *"), pointer(counts, "int64_t *"),
    )  # fmt: skip
    check(code, "moe_capacity")
    return Capacity(weights, ids, counts)


class ExpertChoice(NamedTuple):
    """Which tokens each expert takes.

    Attributes
    ----------
    token_weights : float32 [E, capacity]
        The token's softmax over experts; 0 in an empty place.
    token_ids : int32 [E, capacity]
        Descending by weight, ties to the earlier token; -1 in an empty place.
    status : int32 [T]
        Of the tokens' rows, as :class:`RouteResult`'s; a token whose status is not 0 is taken by nobody.
    """

    token_weights: np.ndarray
    token_ids: np.ndarray
    status: np.ndarray


def moe_expert_choice(router_logits: Any, capacity: int, *, backend: str = "c", isa: str | None = None) -> ExpertChoice:
    """Each expert takes the `capacity` tokens of the largest scores, a softmax over experts (Zhou et al. 2022).

    Experts are equally loaded; a token has any number of experts, none included. A token's experts depend on its batch.

    Parameters
    ----------
    router_logits : float32, float16 or bfloat16 [T, E]
    capacity : int
        1..T.
    """
    x = as_tensor(router_logits, "router_logits", ("float32", "float16", "bfloat16"), 2)
    tokens, experts = x.array.shape
    if not 1 <= capacity <= tokens:
        raise ValueError(f"capacity: expected 1..T = 1..{tokens}, got {capacity}")
    # Every expert's softmax by the routing kernel, then put back in the experts' order and turned.
    every = moe_route(router_logits, experts, False, backend=backend, isa=isa)
    scores = np.full((tokens, experts), -np.inf, np.float32)
    rows, slots = np.nonzero(every.topk_ids >= 0)
    scores[rows, every.topk_ids[rows, slots]] = every.topk_weights[rows, slots]
    taken = moe_route(np.ascontiguousarray(scores.T), capacity, False, scoring="none", backend=backend, isa=isa)
    return ExpertChoice(taken.topk_weights, taken.topk_ids, every.status)

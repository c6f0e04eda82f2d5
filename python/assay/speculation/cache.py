"""After acceptance: what moves in the key-value cache, which slots are free again, which hidden states go on."""

from typing import Any, NamedTuple

import numpy as np


class KVMoves(NamedTuple):
    """Copies that bring the accepted rows of every request together behind its context.

    Attributes
    ----------
    source, destination : int64 [m]
        Slots, to be copied in this order or all at once from a gathered copy. Within a request both ascend in the sequence
        and no source lies before its destination, so that copying one by one in place overwrites nothing still needed.
    cu_num_moves : int64 [B + 1]
        Where each request's begin.
    context_lens : int64 [B]
        Tokens in the cache afterwards: the context, the root and the accepted drafts.
    """

    source: np.ndarray
    destination: np.ndarray
    cu_num_moves: np.ndarray
    context_lens: np.ndarray


def kv_moves(
    accept_index: Any, cu_num_draft_tokens: Any, context_lens: Any, *, block_table: Any = None,
    block_size: int | None = None,
) -> KVMoves:  # fmt: skip
    """The moves after a step that wrote row r (0: the root, i + 1: node i) of request b at ``context_lens[b] + r``.

    Parameters
    ----------
    accept_index : int [B, W]
        Accepted nodes, from the root on, -1 pads: :func:`assay.verify`'s.
    cu_num_draft_tokens : int [B + 1]
    context_lens : int [B]
        Tokens in the cache before the step.
    block_table : int [B, blocks], optional
        For a paged cache: position i lies at ``block_table[b, i // block_size] * block_size + i % block_size``. Without
        it slots are positions, each request having a cache of its own.

    Raises
    ------
    ValueError
        Accepted nodes that do not ascend or do not exist, blocks that the table lacks.
    """
    accepted, counts, context = _arguments(accept_index, cu_num_draft_tokens, context_lens)
    b, i = np.nonzero(accepted >= 0)
    source, destination = context[b] + 1 + accepted[b, i], context[b] + 1 + i
    moved = source != destination
    b, source, destination = b[moved], source[moved], destination[moved]
    if (block_table is None) != (block_size is None):
        raise ValueError("block_table, block_size: expected both or neither")
    if block_table is not None and block_size is not None:
        source = _slots(block_table, block_size, b, source)
        destination = _slots(block_table, block_size, b, destination)
    per_request = np.bincount(b, minlength=len(counts))
    after = context + 1 + (accepted >= 0).sum(axis=1)
    return KVMoves(source, destination, np.concatenate([[0], np.cumsum(per_request)]), after)


def accepted_rows(accept_index: Any, cu_num_draft_tokens: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the step ([sum(K_b + 1), ...]: hidden states, logits) that stand: each root and the accepted nodes.

    Returns
    -------
    (int64 [m], int64 [B + 1])
        Row indices, request after request, and where each request's begin.
    """
    accepted, counts, _ = _arguments(accept_index, cu_num_draft_tokens, None)
    first = np.concatenate([[0], np.cumsum(counts + 1)[:-1]]) if len(counts) else np.empty(0, np.int64)
    rows = np.concatenate([np.zeros((len(counts), 1), np.int64), np.where(accepted >= 0, accepted + 1, -1)], axis=1)
    b, i = np.nonzero(rows >= 0)
    return first[b] + rows[b, i], np.concatenate([[0], np.cumsum((rows >= 0).sum(axis=1))])


def split_slots(slots: Any, accept_index: Any, cu_num_draft_tokens: Any) -> tuple[np.ndarray, np.ndarray]:
    """For caches that hand out single slots and need no moves: those of the step that stay, and those free again.

    Parameters
    ----------
    slots : int [sum(K_b + 1)]
        Where each row of the step was written.
    """
    given = np.asarray(slots)
    rows, _ = accepted_rows(accept_index, cu_num_draft_tokens)
    total = int(np.asarray(cu_num_draft_tokens)[-1]) + len(np.asarray(cu_num_draft_tokens)) - 1
    if given.shape != (total,):
        raise ValueError(f"slots: expected one a row ({total}), got shape {list(given.shape)}")
    free = np.ones(total, bool)
    free[rows] = False
    return given[rows], given[free]


def _arguments(accept_index: Any, cu: Any, context: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    accepted = np.asarray(accept_index, np.int64)
    counts = np.diff(np.asarray(cu, np.int64))
    if accepted.ndim != 2 or len(accepted) != len(counts) or (counts < 0).any():
        raise ValueError(f"accept_index: expected [B, W] with B = {len(counts)} requests, got {list(accepted.shape)}")
    lens = np.zeros(len(counts), np.int64) if context is None else np.asarray(context, np.int64)
    if lens.shape != (len(counts),) or (lens < 0).any():
        raise ValueError(f"context_lens: expected one of 0 or more a request ({len(counts)}), got {lens.tolist()}")
    there = accepted >= 0
    gap = there[:, 1:] & (accepted[:, 1:] <= accepted[:, :-1])  # a pad before a node is -1, hence below it
    if (accepted >= counts[:, None]).any() or gap.any() or (there[:, 1:] & ~there[:, :-1]).any():
        raise ValueError("accept_index: expected nodes of each request that ascend, and -1 behind them")
    return accepted, counts, lens


def _slots(block_table: Any, block_size: int, b: np.ndarray, position: np.ndarray) -> np.ndarray:
    table = np.asarray(block_table)
    block, offset = position // block_size, position % block_size
    if table.ndim != 2 or (len(block) and block.max() >= table.shape[1]):
        raise ValueError(f"block_table: expected [B, blocks] that covers every position, got {list(table.shape)}")
    slots: np.ndarray = table[b, block].astype(np.int64) * block_size + offset
    if (slots < 0).any():
        raise ValueError("block_table: expected a block for every position, got a negative one")
    return slots

"""From a row of logits to the distribution that tokens are drawn from: processors, then filters, in float64."""

from typing import Any

import numpy as np

from .rows import ROW_OK, row_status
from .verify_arguments import VerifyArguments


def process(logits: np.ndarray, a: VerifyArguments, b: int, row: int, path: list[int]) -> tuple[np.ndarray, int]:
    """Request b's logits [V] after penalties, bias and mask, and their status. `path`: the drafts before the row."""
    status = row_status(logits)
    if status == ROW_OK:
        logits = logits.astype(np.float64)
        if a.edits is not None:
            logits = _edited(logits, a, b, path)
        if a.bitmask is not None:
            words = a.bitmask[row if a.bitmask_per_row else b]
            ids = np.arange(len(logits))
            logits = np.where(words[ids >> 5] >> (ids & 31).astype(np.uint32) & 1, logits, -np.inf)
        status = row_status(logits)
    return logits, status


def _edited(logits: np.ndarray, a: VerifyArguments, b: int, path: list[int]) -> np.ndarray:
    edits = a.edits
    assert edits is not None
    own = slice(edits.cu[b], edits.cu[b + 1])
    ids, vocab = edits.ids[own], len(logits)
    out = logits.copy()
    if a.repetition_penalty is not None and a.frequency_penalty is not None and a.presence_penalty is not None:
        count, seen = np.zeros(vocab), np.zeros(vocab, bool)
        count[ids] = edits.count[own]
        seen[ids] = edits.in_prompt[own] > 0
        np.add.at(count, np.array(path, int), 1)
        seen |= count > 0
        penalty = float(a.repetition_penalty[b])
        out = np.where(seen, np.where(out > 0, out / penalty, out * penalty), out)
        out -= float(a.frequency_penalty[b]) * count
        out -= float(a.presence_penalty[b]) * (count > 0)
    out[ids] += edits.bias[own]
    return out


def _first(p: np.ndarray, order: np.ndarray, share: float) -> np.ndarray:
    """p with only the fewest tokens, in this order, whose mass reaches that share of the whole."""
    mass = np.cumsum(p[order])
    enough = np.flatnonzero(mass >= share * mass[-1])
    kept = order[: int(enough[0]) + 1] if len(enough) else order
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out


def filtered(logits: np.ndarray, temperature: float, a: VerifyArguments, b: int) -> np.ndarray:
    """The distribution of processed logits: temperature, then top_k, top_p, min_p, typical_p."""
    z = (logits - logits.max()) / temperature
    p = np.exp(z)
    order = np.argsort(-logits, kind="stable")  # ties: the lower id first

    def on(values: Any, off: float) -> bool:
        return values is not None and values[b] != off

    if a.top_k is not None and 0 < a.top_k[b] < len(p):
        p[order[a.top_k[b] :]] = 0
    if a.top_p is not None and on(a.top_p, 1):
        p = _first(p, order, float(a.top_p[b]))
    if a.min_p is not None and on(a.min_p, 0):
        p = np.where(p >= float(a.min_p[b]), p, 0)
    if a.typical_p is not None and on(a.typical_p, 1):
        kept = p > 0
        center = (p[kept] * z[kept]).sum() / p.sum()
        distance = np.where(kept, np.abs(np.where(kept, z, 0) - center), np.inf)  # of -log p from the entropy
        p = _first(p, np.argsort(distance, kind="stable"), float(a.typical_p[b]))
    return p / p.sum()

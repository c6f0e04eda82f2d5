"""Around verification: what it takes for granted, checked, and what can be done about rows that are no distribution."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ops._verify_arguments import SparseProbs, filters, temperatures
from ..reference.distribution import filtered
from ..reference.rows import ROW_INF, ROW_NAN, row_status
from ..reference.verify_arguments import VerifyArguments

#: How far from 1 the sum of float32 probabilities of a large vocabulary may lie, and of float16 ones that were widened.
SUM_TOLERANCE = 2e-3


def draft_law(logits: Any, *, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0,
              typical_p: Any = 1.0) -> np.ndarray:  # fmt: skip
    """The distribution that a drafter samples from: what `draft_probs` of :func:`assay.verify` must be.

    A drafter that filters its logits and hands over the softmax of all of them makes the output biased.

    Parameters
    ----------
    logits : float32 [n, V]
        The draft model's.
    temperature, top_k, top_p, min_p, typical_p : number or [n]
        The drafter's own, as for :func:`assay.verify`. Temperature 0 gives the argmax, the first of equals.

    Returns
    -------
    float32 [n, V]

    Raises
    ------
    ValueError
        A parameter out of its range, as :func:`assay.verify` says it, or a row of logits that is no distribution.
    """
    rows = np.asarray(logits)
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"logits: expected [n, V], got {list(rows.shape)}")
    n, vocab = rows.shape
    t, _ = temperatures(temperature, n)
    a = VerifyArguments("sampled", n, vocab, 1, np.empty(0, np.int32), np.zeros(n + 1, np.int32), t)
    filters(a, top_k, top_p, min_p, typical_p)
    out = np.zeros((n, vocab), np.float32)
    for i, row in enumerate(rows):
        if row_status(row):
            raise ValueError(f"logits[{i}]: expected one finite at least, no NaN and no plus infinity")
        if t[i] == 0:
            out[i, row.argmax()] = 1
        else:
            out[i] = filtered(row.astype(np.float64), float(t[i]), a, i)
    return out


def check_drafts(draft_token_ids: Any, draft_probs: Any, vocab: int) -> None:
    """Whether drafts can have been drawn from what they are said to have been drawn from: for debugging, as it reads all of q.

    Parameters
    ----------
    draft_token_ids : int32 or int64 [sum K_b]
        Those that are absent (-1) are passed over.
    draft_probs : float32 [sum K_b, V] or SparseProbs
    vocab : int

    Raises
    ------
    ValueError
        The first draft at fault: its id is not in [0, vocab), its row has a negative or non-finite value, does not sum to 1
        within 2e-3, or holds 0 for the id.
    """
    ids = np.asarray(draft_token_ids)
    for j, token in enumerate(ids.tolist()):
        if token == -1:
            continue
        if not 0 <= token < vocab:
            raise ValueError(f"draft_token_ids[{j}]: expected an id in [0, {vocab}), got {token}")
        if isinstance(draft_probs, SparseProbs):
            own, values = np.asarray(draft_probs.ids[j]), np.asarray(draft_probs.probs[j], np.float64)
            values = values[(own >= 0) & (own < vocab)]
            of_draft = float(np.asarray(draft_probs.probs[j], np.float64)[own == token].sum())
        else:
            values = np.asarray(draft_probs[j], np.float64)
            of_draft = float(values[token])
        bad = values[~((values >= 0) & np.isfinite(values))]
        if bad.size:
            raise ValueError(f"draft_probs[{j}]: expected finite values of 0 or more, got {bad[0]}")
        if abs(values.sum() - 1) > SUM_TOLERANCE:
            raise ValueError(f"draft_probs[{j}]: expected a sum of 1 within {SUM_TOLERANCE}, got {values.sum():.6g}")
        if of_draft == 0:
            raise ValueError(f"draft_probs[{j}]: expected a probability above 0 for its draft {token}, got 0")


def largest_finite(target_logits: Any, cu_num_draft_tokens: Sequence[int] | np.ndarray, status: Any) -> np.ndarray:
    """Logits for a second try, in which a poisoned row stands for the argmax of what is finite in it.

    One of three things to do with a row that holds a NaN or a plus infinity; the others are :func:`assay.verify`'s own, to let
    the request emit nothing, and to raise.

    Parameters
    ----------
    target_logits : float32 or float16 [sum(K_b + 1), V]
    cu_num_draft_tokens : int [B + 1]
    status : int [B]
        Of a first try. Only rows of requests that failed for a NaN or a plus infinity change.

    Returns
    -------
    array of the same dtype
        A copy. A row that had a NaN or a plus infinity is 0 at its largest finite logit (the first of equals) and minus
        infinity elsewhere; where nothing in it is finite, it becomes empty, which is status 2.
    """
    out = np.array(target_logits)
    cu = np.asarray(cu_num_draft_tokens)
    for b in np.flatnonzero(np.isin(np.asarray(status), (ROW_NAN, ROW_INF))):
        for row in out[cu[b] + b : cu[b + 1] + b + 1]:
            if row_status(row) in (ROW_NAN, ROW_INF):
                finite = np.isfinite(row)
                best = int(np.where(finite, row, -np.inf).argmax())
                row[:] = -np.inf
                if finite[best]:
                    row[best] = 0
    return out

"""Numba twin of verification: the order of operations of csrc/spec_*.c, and so the same tokens."""

import numpy as np

from ..reference.verify_arguments import VerifyArguments, VerifyOutputs
from ._verify_rows import OK, BadRowError, Request
from ._verify_rules import walk


def verify(logits: np.ndarray, a: VerifyArguments, out: VerifyOutputs) -> None:
    """As :func:`assay.reference.verify`; the arguments are checked by :mod:`assay.ops.speculative`."""
    for b in range(a.batch):
        out.output_token_ids[b], out.accept_index[b] = -1, -1
        out.num_accepted[b] = out.num_emitted[b] = 0
        out.status[b], out.counters[b] = OK, 0
        if out.logprobs is not None:
            out.logprobs[b] = np.nan
        try:
            _verify_request(logits, a, b, out)
        except BadRowError as bad:
            out.status[b] = bad.status


def _verify_request(logits: np.ndarray, a: VerifyArguments, b: int, out: VerifyOutputs) -> None:
    r = Request(logits, a, b)
    most = 2**31 - 1 if a.max_emit is None else int(a.max_emit[b])
    if not most:
        return
    try:
        path, token = walk(r)
    finally:
        out.counters[b] = r.counters
    tokens = [*(r.token(node) for node in path), token]
    stops = set() if a.stop_ids is None else set(a.stop_ids.tolist())
    if a.stop_ids is not None and a.cu_stop is not None:
        stops = set(a.stop_ids[a.cu_stop[b] : a.cu_stop[b + 1]].tolist())
    emitted = next((k + 1 for k, t in enumerate(tokens) if k + 1 >= most or t in stops), len(tokens))
    out.num_accepted[b], out.num_emitted[b] = len(path), emitted
    out.output_token_ids[b, :emitted] = tokens[:emitted]
    out.accept_index[b, : len(path)] = [node - 1 for node in path]
    if out.logprobs is not None:
        for k, (node, t) in enumerate(zip([0, *path], tokens[:emitted], strict=False)):
            out.logprobs[b, k] = r.log_probability(r.row(node), t)

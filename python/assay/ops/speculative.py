"""Verification of speculative drafts: which draft tokens stand, and the token that follows them."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import reference
from .._ffi import FLOAT_DTYPES, FLOAT_NAMES, Tensor, as_tensor, check, ffi, lib, thread_count, variant_index, workspace
from ._backends import twin, widen
from ._outputs import as_outputs, copy_back, dense

_RULES = {"greedy": 0, "rejection": 1}
_MOST = 2**31 - 1


class VerifyResult(NamedTuple):
    """What each request emits.

    Attributes
    ----------
    output_token_ids : int32 [B, max K_b + 1]
        The accepted draft tokens and the one that follows them; -1 pads.
    num_accepted : int32 [B]
        Draft tokens accepted; one token more is emitted where the status is 0.
    status : int32 [B]
        0, or why the request emits nothing: 1 a NaN in a row of logits that was reached (or a draft probability that
        was read is negative or not finite), 2 such a row is minus infinity throughout, 3 it holds a plus infinity,
        4 a draft token id is outside [-1, V).
    """

    output_token_ids: Any
    num_accepted: Any
    status: Any


def verify_chain(target_logits: Any, draft_token_ids: Any, cu_num_draft_tokens: Any, draft_probs: Any = None, *,
                 temperature: Any = 1.0, seed: Any = None, position: Any = None, rule: str = "rejection",
                 uniforms: Any = None, out: Any = None, backend: str = "c", isa: str | None = None,
                 num_threads: int | None = None) -> VerifyResult:  # fmt: skip
    """Verifies one chain of draft tokens a request, a ragged batch of them in one call.

    Request b drafted ``K_b = cu[b + 1] - cu[b]`` tokens (none is fine) and owns K_b + 1 rows of `target_logits`, from
    row ``cu[b] + b`` on. With p = softmax(logits / temperature) and q the draft's distribution:

    - ``rule="greedy"``: a draft token is accepted while it is the argmax (the first of equals).
    - ``rule="rejection"``: accepted when u q(x) < p(x), else a token of (p - q)+ takes its place; after the last, one of
      p (Leviathan et al. 2023, arXiv:2211.17192, Algorithm 1). The output has the law of sampling from p token by token.
      A request of temperature 0 is greedy in the same call.

    Both are lossless. u is a function of the request's seed, the token's position and its purpose alone
    (Philox4x32-10), so a request's output does not depend on the batch around it, on threads, or on the C variant.

    Parameters
    ----------
    target_logits : float32, float16 or bfloat16 [sum(K_b + 1), V]
        numpy or any CPU DLPack tensor; rows may be strided. A row is read once, and once more only where it must be
        resampled; rows after a request's first rejection are not read.
    draft_token_ids : int32 or int64 [sum K_b]
        -1 ends a request's draft early.
    cu_num_draft_tokens : int32 [B + 1]
        Starts at 0, does not decrease.
    draft_probs : float32 [sum K_b, V], optional
        The distribution each draft token was sampled from, in C order, filtered just as the drafter filtered it.
        Without it drafts count as certain (one-hot), right for n-gram and other deterministic drafts.
    temperature : float or float32 [B]
        0 (greedy) or more.
    seed : int or uint64 [B]
    position : int or int64 [B]
        Of the first new token in its sequence: what keeps the random numbers of successive calls apart.
        Both are needed for rejection at temperature above 0, unless `uniforms` are given.
    uniforms : float64 [sum K_b + 2 B], optional
        Random numbers in (0, 1) to use instead: request b's begin at ``cu[b] + 2 b``: K_b for acceptance, one for the
        residual, one for the last token.
    out : (int32 [B, max K_b + 1], int32 [B], int32 [B]), optional
        Written in place, for example an earlier result.
    backend : {"c", "numba", "reference"}
        The reference computes in float64.
    isa, num_threads
        As for :func:`assay.w4a8_gemm`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came. Bad data in a row is no exception but a status.
    """
    logits = as_tensor(target_logits, "target_logits", FLOAT_NAMES, 2)
    cu = as_tensor(cu_num_draft_tokens, "cu_num_draft_tokens", ("int32", "int64"), 1)
    counts, batch, drafts = _counts(cu.array)
    rows, vocab = logits.shape
    if vocab < 1 or vocab > _MOST:
        raise ValueError(f"target_logits: expected [sum(K_b + 1), V] with 1 <= V < 2^31, got {list(logits.shape)}")
    if rows != drafts + batch:
        raise ValueError(f"target_logits: expected sum(K_b + 1) = {drafts + batch} rows, got {rows}")
    ids = as_tensor(draft_token_ids, "draft_token_ids", ("int32", "int64"), 1)
    if ids.shape != (drafts,):
        raise ValueError(f"draft_token_ids: expected [sum K_b] = [{drafts}], got {list(ids.shape)}")
    q = None
    if draft_probs is not None:
        q = as_tensor(draft_probs, "draft_probs", ("float32",), 2, contiguous=True)
        if q.shape != (drafts, vocab):
            raise ValueError(f"draft_probs: expected [sum K_b, V] = {[drafts, vocab]}, got {list(q.shape)}")
    if rule not in _RULES:
        raise ValueError(f"rule: expected one of {', '.join(_RULES)}, got {rule!r}")
    t = _per_request(temperature, "temperature", "float32", ("float32", "float64"), batch)
    hottest = float(t.max(initial=0))
    if not (hottest < np.inf and t.min(initial=0) >= 0):  # a NaN fails both
        bad = t[~(np.isfinite(t) & (t >= 0))][0]
        raise ValueError(f"temperature: expected finite values of 0 or more, got {bad}")
    sampled = rule == "rejection" and hottest > 0
    u = None if uniforms is None else _uniforms(uniforms, drafts + 2 * batch)
    if sampled and u is None and (seed is None or position is None):
        missing = "seed" if seed is None else "position"
        raise ValueError(f"{missing}: expected one for each request (or uniforms) with rule='rejection', got None")
    seeds = _per_request(0 if seed is None else seed, "seed", "uint64", ("uint64", "int64"), batch)
    positions = _per_request(0 if position is None else position, "position", "int64", ("int64", "int32"), batch)

    width = int(counts.max(initial=0)) + 1
    outputs, result = as_outputs(
        out, ("output_token_ids", "num_accepted", "status"), ("int32",) * 3, ((batch, width), (batch,), (batch,)),
        [logits, ids, cu, *([] if q is None else [q])],
    )  # fmt: skip
    # Ids beyond int32 stay outside the vocabulary.
    id32 = np.ascontiguousarray(ids.array if ids.dtype == "int32" else np.clip(ids.array, -2, _MOST), np.int32)
    cu32 = np.ascontiguousarray(cu.array, np.int32)
    if backend == "c":
        written = dense(outputs)
        _call(logits, id32, cu32, q, rule, t, seeds, positions, u, written, isa, num_threads)
        copy_back(outputs, written)
    else:
        probs = None if q is None else q.array
        found = _other_backend(backend, isa)(widen(logits), id32, cu32, probs, rule, t, seeds, positions, u)
        for tensor, array in zip(outputs, found, strict=True):
            tensor.array[...] = array
    return VerifyResult(*result)


def uniform(seed: int, position: int, domain: int, node: int = 0) -> float:
    """The random number in (0, 1) that verification draws: domain 1 accepts, 2 resamples, 3 draws the last token."""
    return float(lib.assay_uniform(seed & (2**64 - 1), position, domain, node))


def _counts(cu: np.ndarray) -> tuple[np.ndarray, int, int]:
    """K_b, B and sum K_b."""
    if len(cu) < 1:
        raise ValueError("cu_num_draft_tokens: expected [B + 1] values, got none")
    if cu[0] != 0:
        raise ValueError(f"cu_num_draft_tokens: expected to start at 0, got {int(cu[0])}")
    ends = cu.astype(np.int64)
    counts = ends[1:] - ends[:-1]
    if counts.min(initial=0) < 0:
        at = int(np.flatnonzero(counts < 0)[0])
        raise ValueError(
            f"cu_num_draft_tokens: expected not to decrease, got {int(cu[at])} then {int(cu[at + 1])} at index {at + 1}"
        )
    if int(cu[-1]) + len(cu) > _MOST:
        raise ValueError(f"cu_num_draft_tokens: expected fewer than 2^31 rows, got {int(cu[-1])} drafts")
    return counts, len(counts), int(cu[-1])


_RANGES = {dtype: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)) for dtype in ("int64", "uint64")}


@lru_cache(maxsize=64)
def _filled(value: Any, dtype: str, batch: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.full(batch, value, dtype)
    array.flags.writeable = False
    return array


def _per_request(value: Any, name: str, dtype: str, dtypes: tuple[str, ...], batch: int) -> np.ndarray:
    """One number for all requests, or an array of one for each, contiguous and of this dtype."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if dtype != "float32":
            low, high = _RANGES[dtype]
            if int(value) != value or not low <= value <= high:
                raise ValueError(f"{name}: expected an integer in {low}..{high}, got {value}")
            value = int(value)
        return _filled(value, dtype, batch)
    array = as_tensor(value, name, dtypes, 1).array
    if array.shape != (batch,):
        raise ValueError(f"{name}: expected one number or [B] = [{batch}], got {list(array.shape)}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array.astype(dtype, copy=False))  # int64 seeds keep their bits


def _uniforms(uniforms: Any, count: int) -> np.ndarray:
    u = as_tensor(uniforms, "uniforms", ("float64",), 1).array
    if u.shape != (count,):
        raise ValueError(f"uniforms: expected [sum K_b + 2 B] = [{count}], got {list(u.shape)}")
    inside = (u > 0) & (u < 1)
    if not inside.all():
        raise ValueError(f"uniforms: expected values inside (0, 1), got {u[~inside][0]}")
    return np.ascontiguousarray(u)


def _call(logits: Tensor, ids: np.ndarray, cu: np.ndarray, q: Tensor | None, rule: str, temperature: np.ndarray,
          seed: np.ndarray, position: np.ndarray, uniforms: np.ndarray | None, outputs: list[Tensor], isa: str | None,
          num_threads: int | None) -> None:  # fmt: skip
    def pointer(kind: str, array: np.ndarray | None) -> Any:
        return ffi.from_buffer(f"{kind}[]", array) if array is not None and array.size else ffi.NULL

    tokens, accepted, status = (t.array for t in outputs)
    batch, vocab = len(temperature), logits.shape[1]
    args = ffi.new(
        "assay_chain_args *",
        {
            "target_logits": logits.ptr,
            "dtype": FLOAT_DTYPES[logits.dtype],
            "ld": logits.row_stride,
            "batch": batch,
            "vocab": vocab,
            "draft_token_ids": pointer("int32_t", ids),
            "cu_num_draft_tokens": pointer("int32_t", cu),
            "draft_probs": pointer("float", None if q is None else q.array),
            "rule": _RULES[rule],
            "temperature": pointer("float", temperature),
            "seed": pointer("uint64_t", seed),
            "position": pointer("int64_t", position),
            "uniforms": pointer("double", uniforms),
            "output_token_ids": pointer("int32_t", tokens),
            "max_out": tokens.shape[1],
            "num_accepted": pointer("int32_t", accepted),
            "status": pointer("int32_t", status),
        },
    )
    scratch, held = workspace(lib.assay_chain_verify_workspace(batch, vocab))
    code = lib.assay_chain_verify(args, variant_index(isa), thread_count(num_threads), scratch, held)
    check(code, "verify_chain", isa)


def _other_backend(backend: str, isa: str | None) -> Any:
    found = twin(backend, "speculative", isa)
    return found.verify_chain if found else reference.verify_chain

"""Verification of speculative drafts: which draft tokens stand, and the token that follows them."""

from typing import Any, NamedTuple

import numpy as np

from .. import reference
from .._ffi import FLOAT_NAMES, Tensor, aligned, as_tensor, calls, check, lib, thread_count, variant_index
from ..errors import RowError
from ..reference.verify_arguments import RULES, VerifyArguments, VerifyOutputs
from . import _verify_arguments as arguments
from ._backends import twin, widen
from ._devices import on_device
from ._outputs import as_outputs, copy_back, dense
from ._verify_arguments import Ragged, SparseProbs

__all__ = ["RULES", "Ragged", "SparseProbs", "VerifyResult", "sample", "uniform", "verify", "verify_chain"]

_RULE_NUMBERS = {name: number for number, name in enumerate(RULES)}
_NONE_DRAFTED = np.empty(0, np.int32)


class VerifyResult(NamedTuple):
    """What each request emits; W = max K_b + 1.

    Attributes
    ----------
    output_token_ids : int32 [B, W]
        The accepted draft tokens and the one that follows them; -1 pads.
    num_accepted : int32 [B]
        Draft tokens that stand, before stop ids and `max_emit` cut the output.
    num_emitted : int32 [B]
        Tokens in `output_token_ids`: num_accepted + 1 where nothing is cut.
    status : int32 [B]
        0, or why the request emits nothing: 1 a NaN in a row of logits that was reached (or a draft probability that
        was read is negative or not finite), 2 such a row is minus infinity throughout, 3 it holds a plus infinity,
        4 a draft token id is below -1, 5 `parents` make no tree, 6 (on a GPU) an offset, a temperature or the like is out of
        its range.
    accept_index : int32 [B, W - 1]
        The accepted drafts, as indices within the request, root to leaf: the rows whose keys and values stay; -1 pads.
    logprobs : float32 [B, W] or None
        log p of every emitted token (of temperature 1 and without top_k and the like where temperature is 0); NaN pads.
    lossless : bool
        Whether what is emitted has the target's law.
    counters : int32 [B, 4]
        Rows read; passes over a row more, for residuals (of kseq one a bisection, also where the CPU knows its outcome without
        one); drafts whose own draft probability is 0; empty residuals that
        the target's distribution replaced.
    """

    output_token_ids: Any
    num_accepted: Any
    num_emitted: Any
    status: Any
    accept_index: Any
    logprobs: Any
    lossless: bool
    counters: Any


def verify(target_logits: Any, draft_token_ids: Any, cu_num_draft_tokens: Any, draft_probs: Any = None, *,
           rule: str = "rejection", parents: Any = None, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0,
           min_p: Any = 0.0, typical_p: Any = 1.0, repetition_penalty: Any = 1.0, frequency_penalty: Any = 0.0,
           presence_penalty: Any = 0.0, prompt_token_ids: Any = None, generated_token_ids: Any = None,
           logit_bias: Any = None, allowed_token_ids: Any = None, banned_token_ids: Any = None, bitmask: Any = None,
           seed: Any = None, position: Any = None, uniforms: Any = None, posterior_threshold: float = 0.09,
           posterior_alpha: float = 0.3, threshold_single: float = 1.0, threshold_acc: float = 1.0,
           stop_token_ids: Any = None, max_emit: Any = None, draft_to_target: Any = None,
           return_logprobs: bool = False, on_status: str = "return", out: Any = None, backend: str = "c", isa: str | None = None,
           num_threads: int | None = None, max_drafts: int | None = None, stream: Any = None) -> VerifyResult:  # fmt: skip
    """Verifies the drafts of a ragged batch of requests, chains or trees, in one call.

    Request b drafted ``K_b = cu[b + 1] - cu[b]`` tokens (none is fine) and owns K_b + 1 rows of `target_logits`, from
    row ``cu[b] + b`` on: the row after its committed tokens, then the row after each draft. p is a row's distribution
    after the processors, q the one that a draft was drawn from, u a uniform number in (0, 1). Rules:

    ``greedy``
        A draft is accepted while it is the argmax (the first of equals).
    ``sampled``
        A token is drawn from p; a draft that equals it is accepted. The output is bit for bit that of plain sampling
        (:func:`sample`) with the same seed, for any drafts.
    ``gumbel``
        The same with the argmax of log p + Gumbel noise keyed by seed, position and token: a drafter that uses the same
        noise agrees most often (Daliri et al., arXiv:2408.07978).
    ``rejection``
        Chains: accepted when u q(x) < p(x), else a token of (p - q)+ takes its place (Leviathan et al.,
        arXiv:2211.17192, Algorithm 1).
    ``block``
        Chains: block verification (Sun et al., arXiv:2403.10444); accepts no fewer. With one-hot drafts it equals
        ``rejection``, which then runs.
    ``specinfer``, ``specinfer_without_replacement``
        Trees, siblings in the order they were drawn, with or without replacement (Miao et al., arXiv:2305.09781; Chen et
        al., arXiv:2402.12374). Siblings sorted after they were drawn make the output biased. One-hot siblings may be in
        any order.
    ``target_only``
        Trees of drafts that are a function of the context (top-k): one u a level against the siblings' cumulated p; the
        leftover is drawn from p without them. `threshold_single` or `threshold_acc` below 1 accept more, lossy (SGLang).
    ``typical``
        Trees: accepted when p(x) > min(posterior_threshold, posterior_alpha exp(-H(p))), H the entropy in nats; the
        longest path, then the most probable. Lossy (Medusa, arXiv:2401.10774, whose epsilon is `posterior_threshold` and
        whose delta is `posterior_alpha`; Medusa's code has defaults of 0.3 and 0.09, its published runs 0.09 and 0.3).
    ``kseq``
        Trees whose siblings were drawn independently from one q: K-SEQ (Sun et al., arXiv:2310.15141), with the best rho.
    ``traversal``, ``traversal_without_replacement``
        Trees, leaf to root (Weng et al., arXiv:2505.12398): ``block`` on trees. One-hot drafts: as ``specinfer``.

    All are lossless but ``typical``, and ``target_only`` with a threshold below 1. A request of temperature 0 is greedy in
    the same call. The exact conditions stand in csrc/assay.h.

    Random numbers are Philox4x32-10 of the request's seed, the token's position, the purpose and the draft's place among
    its siblings: a request's output does not depend on the batch around it, on threads, or on the C variant.

    Parameters
    ----------
    target_logits : float32, float16 or bfloat16 [sum(K_b + 1), V]
        numpy or any DLPack tensor; rows may be strided. On the CPU rows that the walk does not reach are not read. An array
        on a GPU makes the call run there: the other arguments may then be there too, ids as int32, or on the host, from where
        they are copied; results are there.
    draft_token_ids : int32 or int64 [sum K_b]
        -1: absent, with all that follow it; an id of V or more is rejected.
    cu_num_draft_tokens : int32 [B + 1]
        Starts at 0, does not decrease.
    draft_probs : float32 [sum K_b, V], SparseProbs, optional
        The distribution each draft was drawn from, filtered just as the drafter filtered it; siblings have the same (the
        first one's row is read). Without it drafts count as certain (one-hot), right for deterministic drafts.
    rule : str
    parents : int32 [sum K_b], optional
        Index of each draft's parent within its request, less than its own; -1 follows the committed tokens. Siblings are
        in draw order. Without it every draft follows the one before.
    temperature : float or float32 [B]
        0 (greedy) or more.
    top_k, top_p, min_p, typical_p : number or [B]
        Filters, in this order, each over what the one before left. 0, 1, 0 and 1 turn them off. top_k keeps the lower id
        of equals; top_p and typical_p the fewest tokens whose mass reaches it; min_p those at least so likely as that
        share of the likeliest.
    repetition_penalty, frequency_penalty, presence_penalty : number or [B]
        As in vLLM: repetition divides positive and multiplies negative logits of tokens of the prompt, the generated
        text and the drafts before the row; the others count generated and drafted tokens.
    prompt_token_ids, generated_token_ids : sequence of B id arrays, or Ragged, optional
        For the penalties.
    logit_bias : dict, or sequence of B dicts, optional
        Token id to what is added, after the penalties.
    allowed_token_ids, banned_token_ids : ids, or sequence of B of them, optional
    bitmask : int32 or uint32 [B or sum(K_b + 1), ceil(V / 32)], optional
        Bit v mod 32 of word v / 32 allows token v: a grammar's mask, for each request or each row.
    seed : int or uint64 [B]
    position : int or int64 [B]
        Of the first new token in its sequence: what keeps the random numbers of successive calls apart.
        Both are needed for rules that draw, at temperature above 0, unless `uniforms` are given.
    uniforms : float64 [sum K_b + 2 B], optional
        Random numbers in (0, 1) to use instead: request b's begin at ``cu[b] + 2 b``: K_b for acceptance (draft j's;
        target_only: a level's is its first sibling's), one for the residual, one for a token of p. ``sampled``: number d
        draws the token at depth d. ``gumbel``, not on a GPU: [sum(K_b + 1), V] instead, those of which the noise of every
        row's tokens is made.
    stop_token_ids : ids, or sequence of B of them, optional
        The output ends with the first of these.
    max_emit : int or int32 [B], optional
        Most tokens to emit; at 0 nothing is read.
    draft_to_target : int32 or int64 [V_draft], optional
        The target's ids of a drafter's smaller vocabulary, in which `draft_token_ids` and the columns of `draft_probs`
        then are.
    return_logprobs : bool
    on_status : {"return", "raise"}
        What to do where a request's status is not 0: hand it back, that request alone emitting nothing, or raise.
    out : VerifyResult, or tuple of int32 arrays, optional
        An earlier result, or (output_token_ids, num_accepted, num_emitted, status, accept_index, counters), written in
        place; None for those to be made.
    backend : {"c", "numba", "reference"}
        The reference computes in float64.
    isa, num_threads
        As for :func:`assay.w4a8_gemm`.
    max_drafts : int, optional
        On a GPU: the most drafts that a request can have, for the width of the output where `cu_num_draft_tokens` is there too.
        Default: all of them.
    stream : optional
        On a GPU: as for :func:`assay.w4a8_gemm`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came. Bad data in a row is no exception but a status, as are values
        of arrays on a GPU, which the host does not see.
    UnsupportedError
        On a GPU: `draft_to_target`, and `allowed_token_ids` beside a `bitmask` that is there.
    RowError
        With ``on_status="raise"``: the first request whose status is not 0. `out` is written nevertheless.
    """
    if on_status not in ("return", "raise"):
        raise ValueError(f"on_status: expected return or raise, got {on_status!r}")
    if (
        backend == "c" and isa is None and stream is None and max_drafts is None and uniforms is None
        and logit_bias is None and allowed_token_ids is None and banned_token_ids is None and bitmask is None
        and stop_token_ids is None and draft_to_target is None and type(rule) is str
    ):  # fmt: skip
        # The common call, which the checks below would take longer than a small vocabulary. What it refuses, they name.
        found = calls.verify(
            VerifyResult, target_logits, draft_token_ids, cu_num_draft_tokens, draft_probs, _COMMON.get(rule), parents,
            num_threads, return_logprobs, temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
            frequency_penalty, presence_penalty, max_emit, seed, position, _earlier(out),
        )  # fmt: skip
        if type(found) is VerifyResult:
            if on_status == "raise":
                _raise_first(found.status)
            return found
    if on_device(target_logits, backend, stream):
        if isa is not None:
            raise ValueError(f"isa: expected None for arrays on a GPU, got {isa!r}")
        options = {
            "rule": rule, "parents": parents, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "typical_p": typical_p, "repetition_penalty": repetition_penalty, "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty, "prompt_token_ids": prompt_token_ids,
            "generated_token_ids": generated_token_ids, "logit_bias": logit_bias, "allowed_token_ids": allowed_token_ids,
            "banned_token_ids": banned_token_ids, "bitmask": bitmask, "seed": seed, "position": position,
            "uniforms": uniforms, "posterior_threshold": posterior_threshold, "posterior_alpha": posterior_alpha,
            "threshold_single": threshold_single, "threshold_acc": threshold_acc, "stop_token_ids": stop_token_ids,
            "max_emit": max_emit, "draft_to_target": draft_to_target, "return_logprobs": return_logprobs,
        }  # fmt: skip
        given = (target_logits, draft_token_ids, cu_num_draft_tokens, draft_probs)
        return _on_gpu(given, options, on_status, out, max_drafts, stream)
    if max_drafts is not None:
        raise ValueError(f"max_drafts: expected None for arrays on the host, got {max_drafts}")
    logits = as_tensor(target_logits, "target_logits", FLOAT_NAMES, 2)
    cu = arguments.starts(cu_num_draft_tokens)
    batch, drafts, most = arguments.counts(cu)
    rows, vocab = logits.array.shape
    if vocab < 1 or vocab > arguments.MOST:
        raise ValueError(f"target_logits: expected [sum(K_b + 1), V] with 1 <= V < 2^31, got {list(logits.shape)}")
    if rows != drafts + batch:
        raise ValueError(f"target_logits: expected sum(K_b + 1) = {drafts + batch} rows, got {rows}")
    arguments.check_rule(rule, tree=parents is not None, has_q=draft_probs is not None)
    ids = arguments.as_ids(draft_token_ids, "draft_token_ids", drafts)
    d2t = None if draft_to_target is None else arguments.draft_map(draft_to_target, vocab)
    if d2t is not None:
        ids = arguments.translate(ids, d2t)
    t, sampled = arguments.temperatures(temperature, batch)
    sampled = sampled and rule != "greedy"
    a = VerifyArguments(rule, batch, vocab, most + 1, ids, cu, t)
    if return_logprobs:
        a.logprobs = True
    if parents is not None:
        a.parents = arguments.as_ids(parents, "parents", drafts)
    if draft_probs is not None:
        a.draft_probs, a.sparse_ids, a.sparse_probs = arguments.draft_distributions(draft_probs, drafts, vocab, d2t)
    arguments.filters(a, top_k, top_p, min_p, typical_p)
    arguments.penalties(a, repetition_penalty, frequency_penalty, presence_penalty)
    if a.repetition_penalty is not None or logit_bias is not None or banned_token_ids is not None:
        a.edits = arguments.edits(
            batch, vocab, prompt=prompt_token_ids, generated=generated_token_ids, logit_bias=logit_bias,
            banned=banned_token_ids, penalties=a.repetition_penalty is not None,
        )  # fmt: skip
    if bitmask is not None or allowed_token_ids is not None:
        a.bitmask, a.bitmask_per_row = arguments.masks(bitmask, allowed_token_ids, batch, rows, cu, vocab)
    if rule in _WITH_THRESHOLDS:
        arguments.thresholds(a, posterior_threshold, posterior_alpha, threshold_single, threshold_acc)
    if sampled:
        if uniforms is not None:
            a.uniforms = arguments.check_uniforms(uniforms, drafts, batch, vocab if rule == "gumbel" else 0)
        elif seed is None or position is None:
            missing = "seed" if seed is None else "position"
            raise ValueError(f"{missing}: expected one for each request (or uniforms) with rule={rule!r}, got None")
        else:
            a.seed = arguments.per_request(seed, "seed", "uint64", batch)
            a.position = arguments.per_request(position, "position", "int64", batch)
    if stop_token_ids is not None:
        a.stop_ids, a.cu_stop = arguments.stops(stop_token_ids, batch)
    if max_emit is not None:
        a.max_emit = arguments.limited(max_emit, "max_emit", batch)

    lossless = _is_lossless(rule, sampled, threshold_acc, threshold_single)
    if backend == "c" and out is None:
        made = _call(logits, a, None, isa, num_threads)
        if on_status == "raise":
            _raise_first(made.status)
        return made if lossless else made._replace(lossless=False)
    inputs = [logits]
    if out is not None:  # and may lie in one of them
        inputs += [as_tensor(x, "", (x.dtype.name,), x.ndim) for x in (cu, ids, a.draft_probs) if x is not None]
    outputs, result = as_outputs(_earlier(out), _INT_NAMES, ("int32",) * 6, _shapes(batch, most + 1), inputs)
    logprobs = np.empty((batch, most + 1), np.float32) if return_logprobs else None
    stand_ins = dense(outputs)
    tokens, accepted, emitted, status, path, counters = (x.array for x in stand_ins)
    written = VerifyOutputs(tokens, accepted, emitted, status, path, logprobs, counters)
    if backend == "c":
        _call(logits, a, written, isa, num_threads)
    else:
        found = twin(backend, "speculative", isa)
        (found.verify if found else reference.verify)(widen(logits), a, written)
    copy_back(outputs, stand_ins)
    if on_status == "raise":
        _raise_first(written.status)
    tokens, accepted, emitted, status, path, counters = result
    return VerifyResult(tokens, accepted, emitted, status, path, logprobs, lossless, counters)


def _is_lossless(rule: str, sampled: bool, threshold_acc: float, threshold_single: float) -> bool:
    lossy = rule == "typical" or (rule == "target_only" and min(threshold_acc, threshold_single) < 1)
    return not (sampled and lossy)


def _on_gpu(given: tuple[Any, Any, Any, Any], options: dict[str, Any], on_status: str, out: Any, max_drafts: int | None,
            stream: Any) -> VerifyResult:  # fmt: skip
    from ..cuda import verify as device

    ints, logprobs, sampled = device.verify(*given, options, _earlier(out), max_drafts, stream, arguments)
    if on_status == "raise":
        _raise_first(device.read_back(ints[3]))
    lossless = _is_lossless(options["rule"], sampled, options["threshold_acc"], options["threshold_single"])
    tokens, accepted, emitted, status, path, counters = ints
    return VerifyResult(tokens, accepted, emitted, status, path, logprobs, lossless, counters)


_STATUS = ("", "a NaN in a row of logits, or a draft probability that is none", "a row of logits that is minus infinity",
           "plus infinity in a row of logits", "a draft token id below -1", "parents that make no tree",
           "a value on the GPU that is out of its range")  # fmt: skip


def _raise_first(status: np.ndarray) -> None:
    bad = np.flatnonzero(status)
    if bad.size:
        b = int(bad[0])
        raise RowError(f"request {b}: {_STATUS[status[b]]} (status {status[b]}, {bad.size} of {status.size} requests)")


def sample(
    logits: Any, *, seed: Any = None, position: Any = None, rule: str = "sampled", **options: Any
) -> VerifyResult:
    """Plain sampling: a token of each row, as the rules ``sampled`` and ``gumbel`` of :func:`verify` draw it.

    What a loop without speculation calls, and a draft model too: with the same seed and position, verification by the same
    rule emits the same tokens.

    Parameters
    ----------
    logits : float32, float16 or bfloat16 [B, V]
    seed, position
        As for :func:`verify`; position is the sampled token's own.
    rule : {"sampled", "gumbel", "greedy"}
    options
        Temperature, filters, penalties, masks and the rest, as for :func:`verify`.

    Returns
    -------
    VerifyResult
        ``output_token_ids[:, 0]`` are the tokens.
    """
    if rule not in ("sampled", "gumbel", "greedy"):
        raise ValueError(f"rule: expected sampled, gumbel or greedy, got {rule!r}")
    if on_device(logits, options.get("backend", "c"), options.get("stream")):
        rows = int(logits.shape[0])
    else:
        rows = as_tensor(logits, "logits", FLOAT_NAMES, 2).shape[0]
    none = np.zeros(rows + 1, np.int32)
    return verify(logits, _NONE_DRAFTED, none, rule=rule, seed=seed, position=position, **options)


def verify_chain(target_logits: Any, draft_token_ids: Any, cu_num_draft_tokens: Any, draft_probs: Any = None,
                 **options: Any) -> VerifyResult:  # fmt: skip
    """:func:`verify` for chains, by rejection unless `rule` says otherwise."""
    if "parents" in options:
        raise ValueError("parents: verify_chain takes chains; verify takes trees")
    return verify(target_logits, draft_token_ids, cu_num_draft_tokens, draft_probs, **options)


def uniform(seed: int, position: int, domain: int, node: int = 0) -> float:
    """The random number in (0, 1) that verification draws.

    Domain 0 is left to drafters, 1 accepts, 2 resamples, 3 draws a token of p.
    """
    return float(lib.assay_uniform(seed & (2**64 - 1), position, domain, node))


_INT_NAMES = ("output_token_ids", "num_accepted", "num_emitted", "status", "accept_index", "counters")


def _shapes(batch: int, width: int) -> tuple[tuple[int, ...], ...]:
    return (batch, width), (batch,), (batch,), (batch,), (batch, width - 1), (batch, lib.ASSAY_COUNTERS)


def _earlier(out: Any) -> Any:
    if isinstance(out, VerifyResult):
        return tuple(getattr(out, name) for name in _INT_NAMES)
    return out


_WITH_THRESHOLDS = ("typical", "target_only")
#: Numbers of the rules of which no argument but those of the common call says anything.
_COMMON = {name: number for name, number in _RULE_NUMBERS.items() if name not in _WITH_THRESHOLDS}
#: What a request can have, in the C call's order, with what turns it off; the temperature, seed and position beside them.
_PARAMETERS = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "max_emit",
)
_OFF = tuple(calls.LIMITS[name][0] for name in _PARAMETERS)


def _call(logits: Tensor, a: VerifyArguments, written: VerifyOutputs | None, isa: str | None,
          num_threads: int | None) -> VerifyResult:  # fmt: skip
    """The C kernel on checked arguments, which makes the outputs where there are none to write."""
    arrays = () if written is None else tuple(getattr(written, name) for name in (*_INT_NAMES, "logprobs"))
    parameters = [off if (x := getattr(a, name)) is None else x for name, off in zip(_PARAMETERS, _OFF, strict=True)]
    edits = (
        (None,) * 5 if a.edits is None else (a.edits.cu, a.edits.ids, a.edits.bias, a.edits.in_prompt, a.edits.count)
    )
    args = (
        VerifyResult, logits.array, a.ids, a.cu, a.draft_probs, _RULE_NUMBERS[a.rule], a.parents,
        thread_count(num_threads) or None, a.logprobs, a.temperature, *parameters, a.seed, a.position,
        tuple(x for x in arrays if x is not None) or None, variant_index(isa), logits.dtype == "bfloat16", a.uniforms,
        a.sparse_ids, a.sparse_probs, *edits, a.bitmask, a.bitmask_per_row, a.stop_ids, a.cu_stop,
        float(a.posterior_threshold), float(a.posterior_alpha), float(a.threshold_single), float(a.threshold_acc),
    )  # fmt: skip
    found = calls.verify(*args)
    if found == lib.ASSAY_EINVAL:  # the last thing that may be wrong with them
        found = calls.verify(*(aligned(x) if isinstance(x, np.ndarray) else x for x in args))
    if type(found) is not VerifyResult:
        check(found, "verify", isa)
    return found

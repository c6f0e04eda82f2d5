"""Arguments of verification: checked once, and brought into the form that every backend takes."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .._ffi import as_tensor, calls
from ..reference.verify_arguments import RULES, Edits, VerifyArguments

MOST = 2**31 - 1
_INTS = ("int32", "int64")


class SparseProbs(NamedTuple):
    """A draft distribution by its top tokens: row j is what node j was drawn from, zero outside `ids`.

    Attributes
    ----------
    ids : int32 or int64 [sum K_b, k]
        -1 pads; repeated ids add up.
    probs : float32 [sum K_b, k]
    """

    ids: Any
    probs: Any


class Ragged(NamedTuple):
    """Ids of every request in one array: request b's are ``ids[cu[b] : cu[b + 1]]``."""

    ids: Any
    cu: Any


def starts(cu: Any) -> np.ndarray:
    """int32 [B + 1], still unchecked; what int32 cannot hold stays too much for it."""
    array = as_tensor(cu, "cu_num_draft_tokens", _INTS, 1).array
    if array.dtype == np.int64 and not ((array >= 0) & (array <= MOST)).all():
        raise ValueError(
            f"cu_num_draft_tokens: expected values in 0..{MOST}, got {array[(array < 0) | (array > MOST)][0]}"
        )
    return np.ascontiguousarray(array, np.int32)


def counts(cu: np.ndarray) -> tuple[int, int, int]:
    """B, sum K_b and the largest K_b."""
    if len(cu) < 1:
        raise ValueError("cu_num_draft_tokens: expected [B + 1] values, got none")
    ends = cu.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_num_draft_tokens: expected to start at 0, got {ends[0]}")
    most, before = 0, 0
    for i, end in enumerate(ends):
        if end < before:
            raise ValueError(f"cu_num_draft_tokens: expected not to decrease, got {before} then {end} at index {i}")
        most = max(most, end - before)
        before = end
    if before + len(ends) > MOST:
        raise ValueError(f"cu_num_draft_tokens: expected fewer than 2^31 rows, got {before} drafts")
    return len(ends) - 1, before, most


_RANGES = {dtype: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)) for dtype in ("int32", "int64", "uint64")}
_SOURCES = {
    "float32": ("float32", "float64"), "uint64": ("uint64", "int64"), "int64": ("int64", "int32"),
    "int32": ("int32", "int64"),
}  # fmt: skip


@lru_cache(maxsize=256)
def _filled(value: Any, dtype: str, batch: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.full(batch, value, dtype)
    array.flags.writeable = False
    return array


def per_request(value: Any, name: str, dtype: str, batch: int) -> np.ndarray:
    """One number for all requests, or an array of one for each, contiguous and of this dtype."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if dtype != "float32":
            low, high = _RANGES[dtype]
            if not low <= value <= high or int(value) != value:
                raise ValueError(f"{name}: expected an integer in {low}..{high}, got {value}")
            value = int(value)
        return _filled(value, dtype, batch)
    array = as_tensor(value, name, _SOURCES[dtype], 1).array
    if array.shape != (batch,):
        raise ValueError(f"{name}: expected one number or [B] = [{batch}], got {list(array.shape)}")
    with np.errstate(over="ignore"):
        if dtype == "int32":
            array = np.clip(array, *_RANGES["int32"])
        return np.ascontiguousarray(array.astype(dtype, copy=False))  # int64 seeds keep their bits


def limited(value: Any, name: str, batch: int) -> np.ndarray | None:
    """A parameter within its limits, one a request; None where it is off for all."""
    off, least, most, excluded = calls.LIMITS[name]
    if value is None or (off is not None and isinstance(value, int | float) and value == off):
        return None
    array = per_request(value, name, "int32" if name in ("top_k", "max_emit") else "float32", batch)
    fine = (array > least if excluded else array >= least) & (array <= most)
    if not fine.all():
        bounds = f"{'(' if excluded else '['}{least}, {most}]"
        raise ValueError(f"{name}: expected values in {bounds}, got {array[~fine][0]}")
    return array


def filters(a: VerifyArguments, top_k: Any, top_p: Any, min_p: Any, typical_p: Any) -> None:
    a.top_k = limited(top_k, "top_k", a.batch)
    a.top_p = limited(top_p, "top_p", a.batch)
    a.min_p = limited(min_p, "min_p", a.batch)
    a.typical_p = limited(typical_p, "typical_p", a.batch)


def penalties(a: VerifyArguments, repetition: Any, frequency: Any, presence: Any) -> None:
    """All three or none."""
    values = {"repetition_penalty": repetition, "frequency_penalty": frequency, "presence_penalty": presence}
    found = {name: limited(value, name, a.batch) for name, value in values.items()}
    if all(x is None for x in found.values()):
        return
    for name, array in found.items():
        off = per_request(calls.LIMITS[name][0], name, "float32", a.batch)
        setattr(a, name, off if array is None else array)


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def thresholds(a: VerifyArguments, threshold: float, alpha: float, single: float, acc: float) -> None:
    for name, value in (("posterior_threshold", threshold), ("posterior_alpha", alpha)):
        _check_number(value, name)
        if not 0 <= value < np.inf:
            raise ValueError(f"{name}: expected a finite number of 0 or more, got {value}")
    for name, value in (("threshold_single", single), ("threshold_acc", acc)):
        _check_number(value, name)
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
    a.posterior_threshold, a.posterior_alpha, a.threshold_single, a.threshold_acc = threshold, alpha, single, acc


def temperatures(value: Any, batch: int) -> tuple[np.ndarray, bool]:
    """Temperatures, and whether any is above 0."""
    if type(value) is float and 0 <= value <= 1e30:
        return _filled(value, "float32", batch), value > 2.0**-150  # less becomes 0 as float32
    t = per_request(value, "temperature", "float32", batch)
    hottest = float(t.max(initial=0))
    if not (hottest < np.inf and t.min(initial=0) >= 0):  # a NaN fails both
        bad = t[~(np.isfinite(t) & (t >= 0))][0]
        raise ValueError(f"temperature: expected finite values of 0 or more, got {bad}")
    return t, hottest > 0


def check_uniforms(uniforms: Any, drafts: int, batch: int, noise: int = 0) -> np.ndarray:
    """Of a rule that draws by uniforms, or by the noise of so many tokens a row."""
    shape, name = (
        ((drafts + 2 * batch,), "[sum K_b + 2 B]") if not noise else ((drafts + batch, noise), "[sum(K_b + 1), V]")
    )
    u = as_tensor(uniforms, "uniforms", ("float64",), len(shape)).array
    if u.shape != shape:
        raise ValueError(f"uniforms: expected {name} = {list(shape)}, got {list(u.shape)}")
    inside = (u > 0) & (u < 1)
    if not inside.all():
        raise ValueError(f"uniforms: expected values inside (0, 1), got {u[~inside][0]}")
    return np.ascontiguousarray(u)


def as_ids(x: Any, name: str, count: int) -> np.ndarray:
    """int32 [sum K_b]; ids beyond int32 stay outside the vocabulary."""
    tensor = as_tensor(x, name, _INTS, 1)
    if tensor.shape != (count,):
        raise ValueError(f"{name}: expected [sum K_b] = [{count}], got {list(tensor.shape)}")
    if tensor.dtype == "int32":
        return np.ascontiguousarray(tensor.array)
    return np.clip(tensor.array, -2 if name == "draft_token_ids" else -(2**31), MOST).astype(np.int32)


# ---- drafts ---------------------------------------------------------------------------------------------------------


def draft_map(draft_to_target: Any, vocab: int) -> np.ndarray:
    """int64 [V_draft]: the target's id of each of the drafter's."""
    d2t = as_tensor(draft_to_target, "draft_to_target", _INTS, 1).array.astype(np.int64)
    if len(d2t) < 1 or d2t.min() < 0 or d2t.max() >= vocab:
        raise ValueError(f"draft_to_target: expected [V_draft] ids in [0, V) with V = {vocab}")
    return d2t


def translate(ids: np.ndarray, d2t: np.ndarray) -> np.ndarray:
    """Draft ids in the target's vocabulary; unknown ones stay outside it, negative ones as they are."""
    known = (ids >= 0) & (ids < len(d2t))
    found = np.where(known, d2t[np.clip(ids, 0, len(d2t) - 1)], np.where(ids >= 0, MOST, ids))
    return found.astype(np.int32)


def draft_distributions(
    draft_probs: Any, drafts: int, vocab: int, d2t: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Dense probabilities, or ids and values of sparse ones, or neither."""
    if draft_probs is None:
        return None, None, None
    if not isinstance(draft_probs, SparseProbs):
        width = vocab if d2t is None else len(d2t)
        q = as_tensor(draft_probs, "draft_probs", ("float32",), 2, contiguous=True)
        if q.shape != (drafts, width):
            name = "V" if d2t is None else "V_draft"
            raise ValueError(f"draft_probs: expected [sum K_b, {name}] = {[drafts, width]}, got {list(q.shape)}")
        if d2t is None:
            return q.array, None, None
        order = np.argsort(d2t, kind="stable")
        ids = np.ascontiguousarray(np.broadcast_to(d2t[order].astype(np.int32), q.shape))
        return None, ids, np.ascontiguousarray(q.array[:, order])
    raw = as_tensor(draft_probs.ids, "draft_probs.ids", _INTS, 2).array
    probs = as_tensor(draft_probs.probs, "draft_probs.probs", ("float32",), 2).array
    if raw.shape != probs.shape or len(raw) != drafts:
        raise ValueError(
            f"draft_probs: expected ids and probs of one shape [{drafts}, k], got {list(raw.shape)} and {list(probs.shape)}"
        )
    ids = np.clip(raw, -1, MOST).astype(np.int32, copy=False)
    if d2t is not None:
        ids = translate(ids, d2t)
    if (ids[:, 1:] < ids[:, :-1]).any():
        order = np.argsort(ids, axis=1, kind="stable")
        ids, probs = np.take_along_axis(ids, order, 1), np.take_along_axis(probs, order, 1)
    return None, np.ascontiguousarray(ids), np.ascontiguousarray(probs)


# ---- processors ----------------------------------------------------------------------------------------------------


def _id_array(x: Any, name: str, vocab: int) -> np.ndarray:
    ids = np.asarray(x if not hasattr(x, "__dlpack__") else as_tensor(x, name, _INTS, 1).array)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(ids.shape)}")
    ids = ids.astype(np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
        raise ValueError(f"{name}: expected ids in [0, V) with V = {vocab}, got {ids[(ids < 0) | (ids >= vocab)][0]}")
    return ids


def ragged(x: Any, name: str, batch: int, vocab: int, *, shared: bool) -> list[np.ndarray | None]:
    """One id array (or None) for each request; `shared` ones may come as one array for all."""
    if x is None:
        return [None] * batch
    if isinstance(x, Ragged):
        ids = _id_array(x.ids, name, vocab)
        cu = as_tensor(x.cu, f"{name}.cu", _INTS, 1).array.astype(np.int64)
        if len(cu) != batch + 1 or cu[0] != 0 or cu[-1] != len(ids) or (np.diff(cu) < 0).any():
            raise ValueError(
                f"{name}.cu: expected [B + 1] = [{batch + 1}] rising from 0 to {len(ids)}, got {cu.tolist()}"
            )
        return [ids[cu[b] : cu[b + 1]] for b in range(batch)]
    if not hasattr(x, "__len__"):
        raise TypeError(f"{name}: expected ids, or a sequence of them for each request, got {type(x).__name__}")
    if shared and (hasattr(x, "__array__") or not any(v is None or hasattr(v, "__len__") for v in x)):
        return [_id_array(x, name, vocab)] * batch
    if not isinstance(x, Sequence) or len(x) != batch:
        got = f"{len(x)} of them" if isinstance(x, Sequence) else type(x).__name__
        raise ValueError(f"{name}: expected a sequence of ids for each of {batch} requests, got {got}")
    return [None if v is None else _id_array(v, name, vocab) for v in x]


def _biases(logit_bias: Any, batch: int, vocab: int) -> list[tuple[np.ndarray, np.ndarray] | None]:
    if isinstance(logit_bias, Mapping):
        logit_bias = [logit_bias] * batch
    if not isinstance(logit_bias, Sequence) or len(logit_bias) != batch:
        raise ValueError(
            f"logit_bias: expected one dict, or one for each of {batch} requests, got {type(logit_bias).__name__}"
        )
    found: list[tuple[np.ndarray, np.ndarray] | None] = []
    for bias in logit_bias:
        if bias is not None and not isinstance(bias, Mapping):
            raise TypeError(f"logit_bias: expected dicts from ids to values, got {type(bias).__name__}")
        if not bias:
            found.append(None)
            continue
        values = np.array(list(bias.values()), np.float32)
        if not (values < np.inf).all():
            raise ValueError(
                f"logit_bias: expected finite values or minus infinity, got {values[~(values < np.inf)][0]}"
            )
        found.append((_id_array(np.array(list(bias)), "logit_bias", vocab), values))
    return found


def edits(
    batch: int, vocab: int, *, prompt: Any, generated: Any, logit_bias: Any, banned: Any, penalties: bool
) -> Edits | None:
    """The tokens that penalties, biases and bans touch; None when there are none."""
    if isinstance(logit_bias, Mapping | Sequence) and not logit_bias:
        logit_bias = None
    if not penalties and logit_bias is None and banned is None:
        return None
    prompts = ragged(prompt if penalties else None, "prompt_token_ids", batch, vocab, shared=False)
    outputs = ragged(generated if penalties else None, "generated_token_ids", batch, vocab, shared=False)
    bans = ragged(banned, "banned_token_ids", batch, vocab, shared=True)
    biases = _biases(logit_bias, batch, vocab) if logit_bias is not None else [None] * batch
    parts: list[list[np.ndarray]] = []
    for before, after, bias, ban in zip(prompts, outputs, biases, bans, strict=True):
        given = [x for x in (before, after, ban, bias and bias[0]) if x is not None]
        ids = np.unique(np.concatenate(given)) if given else np.empty(0, np.int64)
        value, seen, count = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
        if before is not None:
            seen[np.searchsorted(ids, before)] = 1
        if after is not None:
            np.add.at(count, np.searchsorted(ids, after), 1)
        if bias is not None:
            value[np.searchsorted(ids, bias[0])] = bias[1]
        if ban is not None:
            value[np.searchsorted(ids, ban)] = -np.inf
        parts.append([ids.astype(np.int32), value, seen, count])
    cu = np.concatenate([[0], np.cumsum([len(p[0]) for p in parts])]).astype(np.int32)
    if not parts:  # no requests
        parts.append([np.empty(0, dtype) for dtype in (np.int32, np.float32, np.int32, np.int32)])
        cu = np.zeros(1, np.int32)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Edits(cu, *columns)


def masks(
    bitmask: Any, allowed: Any, batch: int, rows: int, cu: np.ndarray, vocab: int
) -> tuple[np.ndarray | None, bool]:
    """uint32 words of the allowed tokens, and whether they are one row of words for each row of logits."""
    words = -(-vocab // 32)
    given, per_row = None, False
    if bitmask is not None:
        given = as_tensor(bitmask, "bitmask", ("int32", "uint32"), 2, contiguous=True).array.view(np.uint32)
        if given.shape[0] not in (batch, rows) or given.shape[1] < words:
            raise ValueError(
                f"bitmask: expected [B or rows, {words}] = [{batch} or {rows}, {words}], got {list(given.shape)}"
            )
        per_row = given.shape[0] == rows
    if allowed is None:
        return given, per_row
    table = np.zeros((batch, words * 32), bool)
    for b, ids in enumerate(ragged(allowed, "allowed_token_ids", batch, vocab, shared=True)):
        table[b, slice(None) if ids is None else ids] = True
    packed = np.packbits(table, axis=1, bitorder="little").view(np.uint32)
    if given is None:
        return packed, False
    if per_row:
        packed = np.repeat(packed, np.diff(cu) + 1, axis=0)
    return np.ascontiguousarray(given[:, :words] & packed), per_row


def stops(stop_token_ids: Any, batch: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Stop ids, and where each request's begin; None for those when they are the same for all."""
    if stop_token_ids is None:
        return None, None
    lists = ragged(stop_token_ids, "stop_token_ids", batch, MOST, shared=True)
    if batch and all(x is lists[0] for x in lists):
        return (None if lists[0] is None else lists[0].astype(np.int32)), None
    arrays = [np.empty(0, np.int64) if x is None else x for x in lists]
    cu = np.concatenate([[0], np.cumsum([len(x) for x in arrays])]).astype(np.int32)
    return np.concatenate([*arrays, np.empty(0, np.int64)]).astype(np.int32), cu


def check_rule(rule: str, *, tree: bool, has_q: bool) -> None:
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if tree and rule in ("rejection", "block"):
        raise ValueError(
            f"parents: rule={rule!r} is for chains; for trees take specinfer, target_only, kseq or traversal"
        )
    if rule == "kseq" and not has_q:
        raise ValueError("draft_probs: rule='kseq' needs the distribution that siblings were drawn from, got None")

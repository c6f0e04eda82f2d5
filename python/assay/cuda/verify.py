"""Verification on a GPU: the device path of :mod:`assay.ops.speculative`.

What is on the GPU stays there and is not looked at; what comes as numbers, lists or host arrays is checked as for the CPU's op
and copied over. Numbers are copied once and kept, so that a call on device arrays and numbers alone can be captured.
"""

from collections import OrderedDict
from threading import Lock
from typing import Any

import numpy as np

from .._ffi import FLOAT_DTYPES, FLOAT_NAMES, as_tensor, ffi, lib
from ..errors import UnsupportedError
from ..reference.verify_arguments import RULES, VerifyArguments
from ._arrays import DeviceArray, DeviceTensor, device_of
from ._place import Place, place
from ._status import check
from .moe import pointer_to

_INT_NAMES = ("output_token_ids", "num_accepted", "num_emitted", "status", "accept_index", "counters")
_C_TYPES = {"int32": "int32_t *", "uint32": "uint32_t *", "int64": "int64_t *", "uint64": "uint64_t *", "float32": "float *",
            "float64": "double *"}  # fmt: skip

_MOST_KEPT = 256
_kept: "OrderedDict[tuple[Any, ...], DeviceArray]" = OrderedDict()
_lock = Lock()


def forget_numbers() -> None:
    """Frees the arrays that stand for numbers; graphs that were captured with them can no longer be launched."""
    with _lock:
        _kept.clear()


class _Call:
    """One call's arguments on their way into assay_cuda_verify_args. checks: ops' module that checks what is on the host."""

    def __init__(self, here: Place, checks: Any) -> None:
        self.here, self.checks = here, checks
        self.fields: dict[str, Any] = {}
        self.held: list[Any] = []
        self.edits = self.stops = 0  # how long those lists are

    def put(self, name: str, tensor: DeviceTensor | None) -> None:
        if tensor is None:
            return
        if not tensor.size:  # given, though there is nothing in it
            tensor = self._on_device(name, np.zeros(1, tensor.dtype))
        self.held.append(tensor)
        self.fields[name] = ffi.cast(_C_TYPES[tensor.dtype], tensor.ptr)

    def upload(self, name: str, array: np.ndarray | None) -> None:
        """A host array's copy."""
        if array is not None:
            self.put(name, self._on_device(name, array))

    def _on_device(self, name: str, array: np.ndarray) -> DeviceTensor:
        array = np.ascontiguousarray(array) if array.size else np.zeros(1, array.dtype)
        items = array.reshape(-1).view(np.dtype((np.void, array.itemsize)))
        uniform = bool((items == items[0]).all())
        key = (self.here.device, self.here.handle, array.dtype.str, array.shape, items[0].tobytes())
        with _lock:
            copy = _kept.get(key) if uniform else None
            if copy is None:
                if self.here.capturing:
                    raise ValueError(f"{name}: expected an array on the GPU while a graph is captured, or numbers that a call "
                                     "before, on the same stream, had too")  # fmt: skip
                copy = self.here.upload(array)
                if uniform:
                    _kept[key] = copy
                    if len(_kept) > _MOST_KEPT:
                        _kept.popitem(last=False)
        return self.here.tensor(copy, name, (array.dtype.name,), array.ndim)

    def one_each(self, name: str, value: Any, dtype: str, batch: int, checked: Any) -> None:
        """A number for each request: of the device's as it is, else `checked(value)`, copied."""
        if device_of(value) is None:
            self.upload(name, checked(value))
            return
        tensor = self.here.tensor(value, name, (dtype, "int64") if dtype == "uint64" else (dtype,), 1, contiguous=True)
        if tensor.shape != (batch,):
            raise ValueError(f"{name}: expected one number or [B] = [{batch}], got {list(tensor.shape)}")
        self.put(name, tensor)
        if dtype == "uint64":  # int64 seeds keep their bits
            self.fields[name] = ffi.cast("uint64_t *", self.fields[name])

    def matrix(self, name: str, value: Any, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> DeviceTensor:
        tensor = self.here.tensor(value, name, dtypes, len(shape), contiguous=True)
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
        return tensor


def _limit(call: _Call, name: str, batch: int) -> Any:
    return lambda value: call.checks.limited(value, name, batch)


def _draft_distribution(call: _Call, draft_probs: Any, drafts: int, vocab: int) -> None:
    if draft_probs is None:
        return
    if isinstance(draft_probs, call.checks.SparseProbs):
        if device_of(draft_probs.ids) is None:
            _, ids, probs = call.checks.draft_distributions(draft_probs, drafts, vocab, None)
            call.upload("draft_prob_ids", ids)
            call.upload("draft_prob_values", probs)
            call.fields["draft_prob_width"] = 0 if ids is None else ids.shape[1]
            return
        found = call.here.tensor(draft_probs.ids, "draft_probs.ids", ("int32",), 2, contiguous=True)
        shape = (drafts, found.shape[1])
        call.put("draft_prob_ids", call.matrix("draft_probs.ids", draft_probs.ids, ("int32",), shape))
        call.put("draft_prob_values", call.matrix("draft_probs.probs", draft_probs.probs, ("float32",), shape))
        call.fields["draft_prob_width"] = shape[1]
    elif device_of(draft_probs) is None:
        dense, _, _ = call.checks.draft_distributions(draft_probs, drafts, vocab, None)
        call.upload("draft_probs", dense)
    else:
        call.put("draft_probs", call.matrix("draft_probs", draft_probs, ("float32",), (drafts, vocab)))


def _bitmask(call: _Call, bitmask: Any, allowed: Any, batch: int, rows: int, cu: np.ndarray | None, vocab: int) -> None:
    if bitmask is None and allowed is None:
        return
    if bitmask is not None and device_of(bitmask) is not None:
        if allowed is not None:
            raise UnsupportedError(
                "allowed_token_ids: expected none beside a bitmask on the GPU: join them in the bitmask"
            )
        words = call.here.tensor(bitmask, "bitmask", ("int32", "uint32"), 2, contiguous=True)
        if words.shape[0] not in (batch, rows) or words.shape[1] < -(-vocab // 32):
            raise ValueError(f"bitmask: expected [B or rows, {-(-vocab // 32)}] = [{batch} or {rows}, {-(-vocab // 32)}], "
                             f"got {list(words.shape)}")  # fmt: skip
        call.held.append(words)
        call.fields |= {"bitmask": ffi.cast("uint32_t *", words.ptr), "bitmask_ld": words.shape[1],
                        "bitmask_per_row": words.shape[0] == rows}  # fmt: skip
        return
    if cu is None:
        cu = np.zeros(batch + 1, np.int32)
        if allowed is not None and bitmask is not None:
            raise UnsupportedError(
                "allowed_token_ids: expected none beside a bitmask when cu_num_draft_tokens is on the GPU"
            )
    packed, per_row = call.checks.masks(bitmask, allowed, batch, rows, cu, vocab)
    if packed is not None:
        call.upload("bitmask", packed)
        call.fields |= {"bitmask_ld": packed.shape[1], "bitmask_per_row": per_row}


def verify(target_logits: Any, draft_token_ids: Any, cu_num_draft_tokens: Any, draft_probs: Any, options: dict[str, Any],
           out: Any, max_drafts: int | None, stream: Any, checks: Any) -> tuple[list[Any], Any, bool]:  # fmt: skip
    """The six integer outputs, log-probabilities or None, and whether any request draws; arguments as :func:`assay.verify`."""
    rule = options["rule"]
    if options["draft_to_target"] is not None:
        raise UnsupportedError(
            "draft_to_target: expected None on a GPU: translate draft_token_ids and draft_probs before"
        )
    checks.check_rule(rule, tree=options["parents"] is not None, has_q=draft_probs is not None)
    if rule == "gumbel" and options["uniforms"] is not None:
        raise UnsupportedError("uniforms: expected None with rule='gumbel' on a GPU, whose noise is keyed")
    with place((target_logits, draft_token_ids, cu_num_draft_tokens, draft_probs), stream, out) as here:
        call = _Call(here, checks)
        logits = here.tensor(target_logits, "target_logits", FLOAT_NAMES, 2)
        rows, vocab = logits.shape
        if not 1 <= vocab <= call.checks.MOST:
            raise ValueError(f"target_logits: expected [sum(K_b + 1), V] with 1 <= V < 2^31, got {list(logits.shape)}")
        host_cu, batch, drafts, most = _offsets(call, cu_num_draft_tokens, rows, max_drafts)
        if device_of(draft_token_ids) is None:
            call.upload("draft_token_ids", call.checks.as_ids(draft_token_ids, "draft_token_ids", drafts))
        else:
            call.put("draft_token_ids", call.matrix("draft_token_ids", draft_token_ids, ("int32",), (drafts,)))
        parents = options["parents"]
        if parents is not None and device_of(parents) is None:
            call.upload("parents", call.checks.as_ids(parents, "parents", drafts))
        elif parents is not None:
            call.put("parents", call.matrix("parents", parents, ("int32",), (drafts,)))
        _draft_distribution(call, draft_probs, drafts, vocab)
        sampled = _processors(call, options, batch, rows, vocab, drafts, host_cu)
        names = _INT_NAMES
        shapes = _shapes(batch, most)
        given = (None,) * len(names) if out is None else out
        if not isinstance(given, tuple | list) or len(given) != len(names):
            raise TypeError(f"out: expected ({', '.join(names)}), got {type(out).__name__}")
        results = []
        for one, name, shape in zip(given, names, shapes, strict=True):
            tensor, result = here.output(one, name, "int32", shape)
            if not tensor.contiguous:
                raise ValueError(
                    f"{name}: expected C order, got strides {list(tensor.strides)} for shape {list(shape)}"
                )
            call.put(name, tensor)
            results.append(result)
        logprobs = None
        if options["return_logprobs"]:
            tensor, logprobs = here.output(None, "logprobs", "float32", (batch, most + 1))
            call.put("logprobs", tensor)
        args = ffi.new("assay_cuda_verify_args *", {
            "call": {
                "target_logits": pointer_to(logits, "void *"), "dtype": FLOAT_DTYPES[logits.dtype], "ld": logits.row_stride,
                "batch": batch, "vocab": vocab, "rule": RULES.index(rule), "max_out": most + 1, **call.fields,
            },
            "drafts": drafts, "edits": call.edits, "stops": call.stops,
        })  # fmt: skip
        size = lib.assay_cuda_verify_workspace(args)
        if not size:
            raise ValueError(f"target_logits: expected fewer than 2^31 blocks of 2048 logits, got {list(logits.shape)}")
        check(lib.assay_cuda_verify(args, here.workspace(size, "verify"), size, here.stream), "verify")
    return results, logprobs, sampled


def _shapes(batch: int, most: int) -> tuple[tuple[int, ...], ...]:
    return ((batch, most + 1), (batch,), (batch,), (batch,), (batch, most), (batch, lib.ASSAY_COUNTERS))


def outputs(batch: int, max_drafts: int, device: int = 0) -> tuple[DeviceArray, ...]:
    """What :func:`assay.verify` takes as `out` for so many requests of at most so many drafts: int32 arrays."""
    return tuple(DeviceArray(shape, "int32", device) for shape in _shapes(batch, max_drafts))


def _offsets(call: _Call, cu: Any, rows: int, max_drafts: int | None) -> tuple[np.ndarray | None, int, int, int]:
    """Offsets on the host, if they are, B, sum K_b and the most drafts of a request."""
    if device_of(cu) is None:
        host = as_tensor(cu, "cu_num_draft_tokens", ("int32", "int64"), 1).array
        batch, drafts, most = call.checks.counts(host)
        if rows != drafts + batch:
            raise ValueError(f"target_logits: expected sum(K_b + 1) = {drafts + batch} rows, got {rows}")
        call.upload("cu_num_draft_tokens", np.ascontiguousarray(host, np.int32))
        if max_drafts is not None and max_drafts < most:
            raise ValueError(f"max_drafts: expected {most} or more, got {max_drafts}")
        return host, batch, drafts, most if max_drafts is None else max_drafts
    tensor = call.here.tensor(cu, "cu_num_draft_tokens", ("int32",), 1, contiguous=True)
    batch = tensor.size - 1
    drafts = rows - batch
    if batch < 0 or drafts < 0:
        raise ValueError(
            f"cu_num_draft_tokens: expected [B + 1] with B <= {rows} rows of target_logits, got [{tensor.size}]"
        )
    most = drafts if max_drafts is None else max_drafts
    if not 0 <= most < call.checks.MOST:
        raise ValueError(f"max_drafts: expected 0 or more, got {max_drafts}")
    call.put("cu_num_draft_tokens", tensor)
    return None, batch, drafts, most


def _processors(call: _Call, options: dict[str, Any], batch: int, rows: int, vocab: int, drafts: int,
                cu: np.ndarray | None) -> bool:  # fmt: skip
    """Everything that shapes p, the random numbers and the ends. Returns whether any request may draw."""
    rule = options["rule"]
    sampled = rule != "greedy"

    def temperatures(value: Any) -> np.ndarray:
        nonlocal sampled
        t, draws = call.checks.temperatures(value, batch)
        sampled = sampled and draws
        return t

    call.one_each("temperature", options["temperature"], "float32", batch, temperatures)
    for name, dtype in (("top_k", "int32"), ("top_p", "float32"), ("min_p", "float32"), ("typical_p", "float32")):
        call.one_each(name, options[name], dtype, batch, _limit(call, name, batch))
    if options["max_emit"] is not None:
        call.one_each("max_emit", options["max_emit"], "int32", batch, _limit(call, "max_emit", batch))
    a = VerifyArguments(rule, batch, vocab, 1, np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    named = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    if any(device_of(options[name]) is not None for name in named):
        neutral = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
        for name in named:
            call.one_each(name, options[name], "float32", batch,
                          lambda value, name=name: call.checks.per_request(neutral[name] if value is None else value, name, "float32", batch))  # fmt: skip
        penalised = True
    else:
        call.checks.penalties(a, *(options[name] for name in named))
        for name in named:
            call.upload(name, getattr(a, name))
        penalised = a.repetition_penalty is not None
    found = call.checks.edits(
        batch, vocab, prompt=options["prompt_token_ids"], generated=options["generated_token_ids"],
        logit_bias=options["logit_bias"], banned=options["banned_token_ids"], penalties=penalised,
    )  # fmt: skip
    if found is not None:
        for name, array in (("cu_edits", found.cu), ("edit_token_ids", found.ids), ("edit_bias", found.bias),
                            ("edit_in_prompt", found.in_prompt), ("edit_count", found.count)):  # fmt: skip
            call.upload(name, array)
        call.edits = len(found.ids)
    _bitmask(call, options["bitmask"], options["allowed_token_ids"], batch, rows, cu, vocab)
    if rule in ("typical", "target_only"):
        call.checks.thresholds(a, options["posterior_threshold"], options["posterior_alpha"], options["threshold_single"],
                             options["threshold_acc"])  # fmt: skip
    for name in ("posterior_threshold", "posterior_alpha", "threshold_single", "threshold_acc"):
        call.fields[name] = getattr(a, name)
    uniforms, seed, position = options["uniforms"], options["seed"], options["position"]
    if sampled and uniforms is not None:
        if device_of(uniforms) is None:
            call.upload("uniforms", call.checks.check_uniforms(uniforms, drafts, batch))
        else:
            call.put("uniforms", call.matrix("uniforms", uniforms, ("float64",), (drafts + 2 * batch,)))
    elif sampled and (seed is None or position is None):
        missing = "seed" if seed is None else "position"
        raise ValueError(f"{missing}: expected one for each request (or uniforms) with rule={rule!r}, got None")
    if rule != "greedy" and "uniforms" not in call.fields:
        for name, value, dtype in (("seed", seed, "uint64"), ("position", position, "int64")):
            call.one_each(name, 0 if value is None else value, dtype, batch,
                          lambda v, name=name, dtype=dtype: call.checks.per_request(v, name, dtype, batch))  # fmt: skip
    _stops(call, options["stop_token_ids"], batch)
    return sampled


def _stops(call: _Call, stop_token_ids: Any, batch: int) -> None:
    if stop_token_ids is None:
        return
    if device_of(stop_token_ids) is not None:
        tensor = call.here.tensor(stop_token_ids, "stop_token_ids", ("int32",), 1, contiguous=True)
        call.put("stop_token_ids", tensor)
        call.fields["num_stop"] = call.stops = tensor.size
        return
    ids, cu = call.checks.stops(stop_token_ids, batch)
    if ids is None:
        return
    call.upload("stop_token_ids", ids)
    call.stops = len(ids)
    if cu is None:
        call.fields["num_stop"] = len(ids)
    else:
        call.upload("cu_stop", cu)


def read_back(x: Any) -> np.ndarray:
    """An int32 array of a GPU on the host, once it is written."""
    with place((x,)) as here:
        tensor = here.tensor(x, "status", ("int32",), 1, contiguous=True)
        host = np.empty(tensor.shape, np.int32)
        if tensor.size:
            check(
                lib.assay_cuda_copy(
                    ffi.from_buffer(host), tensor.ptr, host.nbytes, lib.ASSAY_CUDA_TO_HOST, here.stream
                ),
                "status",
            )
            check(lib.assay_cuda_stream_sync(here.stream), "status")
    return host

"""assay.verify with its kernels emulated: the C op's arguments, checked as ever, go to the GPU's kernels instead."""

from types import SimpleNamespace

import numpy as np
from emulator import emulate, structs

from assay._ffi import lib
from assay.ops import speculative
from assay.reference.verify_arguments import RULES, VerifyOutputs

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
BLOCK = 2048
NEEDS_TEAM = ("rejection", "block", "specinfer", "specinfer_without_replacement", "kseq", "traversal", "traversal_without_replacement")  # fmt: skip


def _struct(name: str, *shape: int) -> np.ndarray:
    """Workspace of an argument struct's element, filled with what no kernel should read."""
    return np.full((*shape, structs().sizeof(name)), 0xA5, np.uint8)


def fields(logits, a, written) -> dict:
    """assay_cuda_verify_args of a call: arrays and numbers."""
    array = np.ascontiguousarray
    drafts, batch = int(a.cu[-1]) if a.batch else 0, a.batch
    rows, blocks = drafts + batch, -(-a.vocab // BLOCK)
    # The memory from the first element to the last, whatever the rows' stride.
    extent = (rows - 1) * logits.row_stride + a.vocab if rows else 1
    given = np.lib.stride_tricks.as_strided(logits.array, (extent,), (logits.array.itemsize,))
    call = {
        "target_logits": given.copy(), "dtype": DTYPES[logits.dtype], "ld": logits.row_stride, "batch": batch,
        "vocab": a.vocab, "rule": RULES.index(a.rule), "max_out": a.width, "draft_token_ids": array(a.ids),
        "cu_num_draft_tokens": array(a.cu), "temperature": array(a.temperature),
        "draft_prob_ids": a.sparse_ids, "draft_prob_values": a.sparse_probs,
        "draft_prob_width": 0 if a.sparse_ids is None else a.sparse_ids.shape[1],
        "bitmask_ld": 0 if a.bitmask is None else a.bitmask.shape[1], "bitmask_per_row": a.bitmask_per_row,
        "posterior_threshold": a.posterior_threshold, "posterior_alpha": a.posterior_alpha,
        "threshold_single": a.threshold_single, "threshold_acc": a.threshold_acc,
        "stop_token_ids": a.stop_ids, "cu_stop": a.cu_stop, "num_stop": 0 if a.stop_ids is None else len(a.stop_ids),
    }  # fmt: skip
    for name in (*speculative._PARAMETERS, "parents", "draft_probs", "bitmask", "seed", "position", "uniforms"):
        value = getattr(a, name, None)
        call[name] = None if value is None else array(value)
    if a.edits is not None:
        call |= {"cu_edits": a.edits.cu, "edit_token_ids": a.edits.ids, "edit_bias": a.edits.bias,
                 "edit_in_prompt": a.edits.in_prompt, "edit_count": a.edits.count}  # fmt: skip
    for name in ("output_token_ids", "num_accepted", "num_emitted", "status", "accept_index", "logprobs", "counters"):
        call[name] = getattr(written, name)
    # An array without elements would be NULL in the struct of none.
    call = {k: np.zeros(1, v.dtype) if isinstance(v, np.ndarray) and not v.size else v for k, v in call.items()}
    return {
        "call": call, "drafts": drafts, "edits": 0 if a.edits is None else len(a.edits.ids),
        "stops": 0 if a.stop_ids is None else len(a.stop_ids), "block_count": blocks,
        "blocks": _struct("assay_cuda_block", rows, blocks), "rows": _struct("assay_cuda_row", rows),
        "nodes": _struct("assay_cuda_node", rows), "excluded": np.full(rows, -7, np.int32),
        "masses": np.full((rows, blocks), np.nan), "totals": np.full((rows, blocks), np.nan),
        "tokens": np.full((rows, blocks), -7, np.int32), "orders": _struct("assay_cuda_order", batch),
        "ticket": np.full(1, 12345, np.uint32),
    }  # fmt: skip


def launch(args: dict, rule: str, *, team: int = 1, seed: int = 0, **how) -> dict:
    """The launches of csrc/cuda/verify.c; what each counted."""
    call = args["call"]
    rows, blocks = args["drafts"] + call["batch"], args["block_count"]
    has_q = call["draft_probs"] is not None or call["draft_prob_ids"] is not None
    args["team"] = team if has_q and rule in NEEDS_TEAM else 1
    filtered = any(call[name] is not None for name in ("top_k", "top_p", "min_p", "typical_p"))
    from_leaves = rule == "block" or rule.startswith("traversal")
    chain = call["parents"] is None and rule not in ("typical", "kseq") and not (from_leaves and has_q)
    passes = -(-rows * blocks // 4)
    plan = [("assay_verify_scan", rows * blocks)]
    plan += [("assay_verify_filter", rows)] if filtered and rule != "greedy" else []
    plan += [("assay_verify_race", passes)] if rule == "gumbel" else []
    plan += [("assay_verify_entropy", passes)] if rule == "typical" else []
    plan += [("assay_chain_verify" if chain else "assay_tree_verify", call["batch"] * args["team"])]
    return {name: emulate(name, grid, args, seed=seed, **how) for name, grid in plan}


def instead_of_c(monkeypatch, call) -> None:
    """From here on `call` gets what assay.verify has checked for the C kernel, and the common call is none."""
    monkeypatch.setattr(speculative, "calls", SimpleNamespace(verify=lambda *args: lib.ASSAY_EINVAL))

    def checked(logits, a, written, isa, num_threads):
        made = _outputs(a) if written is None else written
        call(logits, a, made, isa, num_threads)
        ints = (getattr(made, name) for name in speculative._INT_NAMES)
        tokens, accepted, emitted, status, path, counters = ints
        return speculative.VerifyResult(tokens, accepted, emitted, status, path, made.logprobs, True, counters)

    monkeypatch.setattr(speculative, "_call", checked)


def _outputs(a) -> VerifyOutputs:
    """New arrays for the results, as C makes them."""
    shapes = speculative._shapes(a.batch, a.width)
    tokens, accepted, emitted, status, path, counters = (np.empty(shape, np.int32) for shape in shapes)
    logprobs = np.empty((a.batch, a.width), np.float32) if a.logprobs else None
    return VerifyOutputs(tokens, accepted, emitted, status, path, logprobs, counters)


def emulated(monkeypatch, **how) -> list:
    """From here on assay.verify's C backend runs on the emulator; the list gets what each call counted."""
    counted: list = []

    def call(logits, a, written, _isa, _num_threads):
        if a.batch:
            counted.append(launch(fields(logits, a, written), a.rule, **how))

    instead_of_c(monkeypatch, call)
    return counted

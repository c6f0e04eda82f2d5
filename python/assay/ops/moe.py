"""Mixture-of-experts routing: softmax over the experts of each token, then top-k."""

from typing import Any, NamedTuple

import numpy as np

from .. import reference
from .._ffi import FLOAT_DTYPES, FLOAT_NAMES, as_tensor, check, ffi, lib, thread_count, variant_index
from ._backends import twin, widen
from ._outputs import as_outputs, copy_back, dense

_MOST = 2**31 - 1


class RouteResult(NamedTuple):
    """Where each token goes.

    Attributes
    ----------
    topk_weights : float32 [T, top_k]
        Descending; 0 in a slot that could not be filled.
    topk_ids : int32 [T, top_k]
        Distinct within a row; -1 in a slot that could not be filled.
    status : int32 [T]
        0 for a routed row; 1 a NaN, 2 nothing but minus infinity, 3 a plus infinity among its logits. Such a row has
        no experts.
    """

    topk_weights: Any
    topk_ids: Any
    status: Any


def moe_route(router_logits: Any, top_k: int, renormalize: bool = True, out: Any = None, *, backend: str = "c",
              isa: str | None = None, num_threads: int | None = None) -> RouteResult:  # fmt: skip
    """Softmax over experts, then the top_k of them.

    A row's result has the same bits in any batch, for any number of threads and in every C variant; equal logits go to
    the lower id. A logit of minus infinity masks its expert.

    Parameters
    ----------
    router_logits : float32, float16 or bfloat16 [T, E]
        numpy or any CPU DLPack tensor; rows may be strided, the last dimension dense. T = 0 is fine.
    top_k : int
        1..E.
    renormalize : bool
        Weights of the chosen sum to one (Mixtral, Qwen3-MoE); otherwise they are the softmax over all experts (OLMoE).
    out : (float32 [T, top_k], int32 [T, top_k], int32 [T]), optional
        Weights, ids and status to write in place, for example an earlier result.
    backend : {"c", "numba", "reference"}
    isa : str, optional
        Force a C variant. :class:`assay.UnsupportedError` when this CPU lacks it.
    num_threads : int, optional
        1 runs on the calling thread alone. Default: ASSAY_NUM_THREADS, else the CPUs this process may use.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    x = as_tensor(router_logits, "router_logits", FLOAT_NAMES, 2)
    tokens, experts = x.shape
    if experts < 1 or max(tokens, experts) > _MOST:
        raise ValueError(f"router_logits: expected [T, E] with 1 <= E and T, E < 2^31, got {list(x.shape)}")
    if not isinstance(top_k, (int, np.integer)) or isinstance(top_k, bool):
        raise TypeError(f"top_k: expected an int, got {type(top_k).__name__}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1..E = 1..{experts}, got {top_k}")
    top_k = int(top_k)
    outputs, result = as_outputs(
        out, ("topk_weights", "topk_ids", "status"), ("float32", "int32", "int32"),
        ((tokens, top_k), (tokens, top_k), (tokens,)), (x,),
    )  # fmt: skip
    if backend == "c":
        written = dense(outputs)
        weights, ids, status = written
        code = lib.assay_moe_route(
            x.ptr, FLOAT_DTYPES[x.dtype], x.row_stride, tokens, experts, top_k, bool(renormalize),
            ffi.cast("float *", weights.ptr), ffi.cast("int32_t *", ids.ptr), ffi.cast("int32_t *", status.ptr),
            variant_index(isa), thread_count(num_threads),
        )  # fmt: skip
        check(code, "moe_route", isa)
        copy_back(outputs, written)
    else:
        found = _other_backend(backend, widen(x), top_k, bool(renormalize), isa)
        for tensor, array in zip(outputs, found, strict=True):
            tensor.array[...] = array
    return RouteResult(*result)


def _other_backend(
    backend: str, x: np.ndarray, top_k: int, renormalize: bool, isa: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = twin(backend, "moe", isa)
    if found is None:
        return reference.moe_route(x, top_k, renormalize)
    weights, ids, status = found.route(x, top_k, renormalize)
    return weights, ids, status

"""Mixture-of-experts routing: a score of every expert for each token, then top-k."""

from typing import Any, NamedTuple

import numpy as np

from .. import reference
from .._ffi import FLOAT_NAMES, aligned, as_tensor, calls, check, lib, thread_count, variant_index
from ..cuda import device_of
from ..cuda.moe import route as route_on_device
from ._backends import twin, widen
from ._outputs import as_outputs, copy_back, dense

_MOST = 2**31 - 1
#: Most experts that can have a bias or groups.
_MOST_KEYED = 2048
_SCORES = {
    "softmax": lib.ASSAY_SCORE_SOFTMAX,
    "softmax_topk": lib.ASSAY_SCORE_SOFTMAX,
    "sigmoid": lib.ASSAY_SCORE_SIGMOID,
    "sqrtsoftplus": lib.ASSAY_SCORE_SQRTSOFTPLUS,
    "none": lib.ASSAY_SCORE_NONE,
}


class RouteResult(NamedTuple):
    """Where each token goes.

    Attributes
    ----------
    topk_weights : float32 [T, top_k + num_shared]
        In the order of the choice, which for a softmax is descending; 0 in a slot that could not be filled.
    topk_ids : int32 [T, top_k + num_shared]
        Distinct within a row; -1 in a slot that could not be filled.
    status : int32 [T]
        0 for a routed row; 1 a NaN, 2 nothing but minus infinity, 3 a plus infinity among its logits. Such a row has
        no experts.
    """

    topk_weights: Any
    topk_ids: Any
    status: Any


def moe_route(router_logits: Any, top_k: int, renormalize: bool | None = None, out: Any = None, *,
              scoring: str = "softmax", bias: Any = None, n_group: int = 1, topk_group: int = 1,
              group_score: str | None = None, routed_scaling_factor: float = 1.0, num_shared: int = 0,
              shared_weight: float = 1.0, backend: str = "c", isa: str | None = None,
              num_threads: int | None = None, stream: Any = None) -> RouteResult:  # fmt: skip
    """A score of every expert, then the top_k of them.

    A row's result has the same bits in any batch, for any number of threads and in every C variant; equal keys go to
    the lower id. A logit of minus infinity masks its expert. docs/moe.md lists which arguments are which model's router.

    Parameters
    ----------
    router_logits : float32, float16 or bfloat16 [T, E]
        numpy, any CPU DLPack tensor, or an array on a GPU, which then holds the results; rows may be strided, the last
        dimension dense. T = 0 is fine. A GPU takes at most 2048 experts, and has the same bits as the CPU.
    top_k : int
        1..E.
    renormalize : bool, optional
        Weights of the chosen sum to one (Mixtral, Qwen3-MoE); otherwise they are the scores themselves (OLMoE). Default:
        True, but for scoring "none".
    out : (float32 [T, top_k + num_shared], int32 [T, top_k + num_shared], int32 [T]), optional
        Weights, ids and status to write in place, for example an earlier result.
    scoring : {"softmax", "softmax_topk", "sigmoid", "sqrtsoftplus", "none"}
        Score of a logit l: softmax over all experts; softmax over the chosen alone (the same as "softmax" renormalised);
        1 / (1 + exp(-l)); sqrt(log(1 + exp(l))); l itself.
    bias : float32 [E], optional
        Added to the score for the choice only; weights are the score alone, recomputed from the logit (DeepSeek-V3). On a
        GPU, where it is not looked at beforehand, one with a NaN or plus infinity gives every row that status.
    n_group, topk_group : int
        Experts lie in n_group equal groups, and are chosen from the topk_group best of them; all others count as minus
        infinity.
    group_score : {"max", "top2"}, optional
        A group is as good as its largest score plus bias, or its two largest together. Default: "top2" with a bias (DeepSeek-V3),
        "max" without (DeepSeek-V2).
    routed_scaling_factor : float
        Times each weight, last.
    num_shared, shared_weight : int, float
        Each routed row ends in slots for experts E .. E + num_shared - 1 of that weight.
    backend : {"c", "numba", "reference"}
        On a GPU "c" is the compiled kernel, and the Numba-CUDA twin where none is compiled for that architecture.
    isa : str, optional
        Force a C variant. :class:`assay.UnsupportedError` when this CPU lacks it.
    num_threads : int, optional
        1 runs on the calling thread alone. Default: ASSAY_NUM_THREADS, else the CPUs this process may use.
    stream : optional
        CUDA stream of a call on a GPU; see :mod:`assay.cuda`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    if (
        bias is None and isa is None and group_score is None and n_group == 1 and topk_group == 1
        and not num_shared and routed_scaling_factor == 1 and scoring == "softmax" and backend == "c"
    ):  # fmt: skip
        # The common call, on which the checks below would take longer than a few tokens' routing. What it refuses, they name.
        found = calls.moe_route(RouteResult, router_logits, top_k, renormalize, num_threads, out)
        if type(found) is RouteResult:
            return found
    on_device = device_of(router_logits) is not None
    x = None if on_device else as_tensor(router_logits, "router_logits", FLOAT_NAMES, 2)
    shape = tuple(router_logits.shape) if x is None else x.shape
    if len(shape) != 2 or shape[1] < 1 or max(shape) > _MOST:
        raise ValueError(f"router_logits: expected [T, E] with 1 <= E and T, E < 2^31, got {list(shape)}")
    tokens, experts = shape
    top_k = _count(top_k, "top_k", 1, experts, "E")
    if scoring not in _SCORES:
        raise ValueError(f"scoring: expected one of {', '.join(_SCORES)}, got {scoring!r}")
    if renormalize is None or scoring == "softmax_topk":
        renormalize = scoring != "none"
    elif renormalize and scoring == "none":
        raise ValueError("renormalize: expected False with scoring='none', whose weights may have any sign, got True")
    extras = _Extras(top_k, bool(renormalize))
    if num_shared or bias is not None or n_group != 1 or routed_scaling_factor != 1 or topk_group != 1:
        extras.check(experts, bias, n_group, topk_group, group_score, routed_scaling_factor, num_shared, shared_weight)
    if x is None:
        if experts > _MOST_KEYED:
            raise ValueError(f"router_logits: expected at most {_MOST_KEYED} experts on a GPU, got {experts}")
        if backend not in {"c", "numba"} or isa is not None:
            raise ValueError(f"backend: expected 'c' or 'numba', and no isa, on a GPU, got {backend!r}, isa={isa!r}")
        return RouteResult(*route_on_device(
            router_logits, top_k, extras.renormalize, out, _SCORES[scoring], bias, extras.n_group, extras.topk_group,
            extras.top2, extras.scaling, extras.num_shared, extras.shared_weight, backend, stream,
        ))  # fmt: skip
    if bias is not None:
        extras.take_bias(bias, experts)
    width = top_k + extras.num_shared
    outputs, result = as_outputs(
        out, ("topk_weights", "topk_ids", "status"), ("float32", "int32", "int32"),
        ((tokens, width), (tokens, width), (tokens,)), (x,),
    )  # fmt: skip
    if backend == "c":
        written = dense(outputs)
        found = calls.moe_route(
            RouteResult, aligned(x.array), top_k, extras.renormalize, thread_count(num_threads) or None,
            tuple(tensor.array for tensor in written), variant_index(isa), x.dtype == "bfloat16", _SCORES[scoring],
            extras.bias, extras.n_group, extras.topk_group, extras.top2, extras.scaling, extras.shared_weight,
            extras.num_shared,
        )  # fmt: skip
        if type(found) is not RouteResult:
            check(found, "moe_route", isa)
        copy_back(outputs, written)
    else:
        found = twin(backend, "moe", isa)
        run = reference.moe_route if found is None else found.route
        arrays = run(
            widen(x), top_k, extras.renormalize, scoring, extras.bias, extras.n_group, extras.topk_group, extras.top2,
            extras.scaling, extras.num_shared, extras.shared_weight,
        )  # fmt: skip
        for tensor, array in zip(outputs, arrays, strict=True):
            tensor.array[...] = array
    return RouteResult(*result)


class _Extras:
    """What a router may have beyond a softmax and top-k, checked."""

    __slots__ = (
        "bias",
        "n_group",
        "num_shared",
        "renormalize",
        "scaling",
        "shared_weight",
        "top2",
        "top_k",
        "topk_group",
    )

    def __init__(self, top_k: int, renormalize: bool) -> None:
        self.top_k, self.renormalize = top_k, renormalize
        self.bias: np.ndarray | None = None
        self.n_group, self.topk_group, self.top2 = 1, 1, False
        self.scaling, self.num_shared, self.shared_weight = 1.0, 0, 1.0

    def check(self, experts: int, bias: Any, n_group: Any, topk_group: Any, group_score: Any, scaling: Any,
              num_shared: Any, shared_weight: Any) -> None:  # fmt: skip
        self.n_group = _count(n_group, "n_group", 1, experts, "E")
        if experts % self.n_group:
            raise ValueError(f"n_group: expected a divisor of E = {experts}, got {n_group}")
        self.topk_group = _count(topk_group, "topk_group", 1, self.n_group, "n_group")
        if self.top_k > self.topk_group * (experts // self.n_group):
            fits = self.topk_group * (experts // self.n_group)
            raise ValueError(
                f"top_k: expected at most the {fits} experts of topk_group = {topk_group}, got {self.top_k}"
            )
        if group_score not in (None, "max", "top2"):
            raise ValueError(f"group_score: expected 'max' or 'top2', got {group_score!r}")
        if experts > _MOST_KEYED and (bias is not None or self.n_group > 1):
            raise ValueError(
                f"router_logits: expected at most {_MOST_KEYED} experts with a bias or groups, got {experts}"
            )
        self.top2 = group_score == "top2" or (group_score is None and bias is not None)
        self.num_shared = _count(num_shared, "num_shared", 0, 2**20, "2^20")
        for name, value in (("routed_scaling_factor", scaling), ("shared_weight", shared_weight)):
            if not np.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        self.scaling, self.shared_weight = float(scaling), float(shared_weight)

    def take_bias(self, bias: Any, experts: int) -> None:
        self.bias = np.ascontiguousarray(as_tensor(bias, "bias", ("float32",), 1).array)
        if self.bias.shape != (experts,):
            raise ValueError(f"bias: expected [E] = [{experts}], got {list(self.bias.shape)}")
        if not (self.bias < np.inf).all():
            raise ValueError("bias: expected finite values or minus infinity, got NaN or plus infinity")


def _count(value: Any, name: str, least: int, most: int, symbol: str) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least}..{symbol} = {least}..{most}, got {value}")
    return int(value)

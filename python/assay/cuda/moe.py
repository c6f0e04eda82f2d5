"""Routing, sorting and combining on a GPU: the device paths of :mod:`assay.ops.moe` and :mod:`assay.ops.moe_dispatch`."""

from typing import Any

from .._ffi import FLOAT_DTYPES, FLOAT_NAMES, ffi, lib
from ._arrays import DeviceArray, DeviceTensor
from ._place import Place, place
from ._status import check
from ._twin import for_numba, twin

_MOST = 2**31 - 1


def pointer_to(tensor: DeviceTensor | None, kind: str) -> Any:
    """The tensor's memory as a C pointer of that type; NULL without one."""
    return ffi.NULL if tensor is None else ffi.cast(kind, tensor.ptr)


def route(router_logits: Any, top_k: int, renormalize: bool, out: Any, scoring: int, bias: Any, n_group: int, topk_group: int,
          top2: bool, scaling: float, num_shared: int, shared_weight: float, backend: str, stream: Any) -> list[Any]:  # fmt: skip
    """Weights, ids and status of logits on a GPU; numbers are checked by :func:`assay.moe_route`."""
    with place((router_logits, bias), stream, out) as here:
        x = here.tensor(router_logits, "router_logits", FLOAT_NAMES, 2)
        tokens, experts = x.shape
        added = None if bias is None else here.tensor(bias, "bias", ("float32",), 1, contiguous=True)
        if added is not None and added.shape != (experts,):
            raise ValueError(f"bias: expected [E] = [{experts}], got {list(added.shape)}")
        shape = (tokens, top_k + num_shared)
        (weights, ids, status), results = _outputs(
            here, out, ("topk_weights", "topk_ids", "status"), ("float32", "int32", "int32"), (shape, shape, (tokens,))
        )
        args = ffi.new("assay_route_args *", (
            x.ptr, FLOAT_DTYPES[x.dtype], scoring, x.row_stride, tokens, experts, top_k, pointer_to(added, "float *"), n_group,
            topk_group, top2, renormalize, scaling, shared_weight, num_shared, pointer_to(weights, "float *"),
            pointer_to(ids, "int32_t *"), pointer_to(status, "int32_t *"),
        ))  # fmt: skip
        code = lib.ASSAY_CUDA_EIMAGE if backend == "numba" else lib.assay_cuda_moe_route(args, here.stream)
        if code == lib.ASSAY_CUDA_EIMAGE:  # no kernels are compiled for this GPU, or the twin is asked for by name
            run = twin("cuda_moe", backend == "numba").route
            queue, logits, offset, *written = for_numba(here.handle, x, added, weights, ids, status)
            run(logits, FLOAT_DTYPES[x.dtype], scoring, renormalize, offset, n_group, topk_group, top2, scaling, top_k,
                shared_weight, *written, queue)  # fmt: skip
        else:
            check(code, "moe_route")
    return results


def _outputs(here: Place, out: Any, names: tuple[str, ...], dtypes: tuple[str, ...],
             shapes: tuple[tuple[int, ...], ...]) -> tuple[list[DeviceTensor], list[Any]]:  # fmt: skip
    if out is None:
        out = (None,) * len(names)
    elif not isinstance(out, tuple | list) or len(out) != len(names):
        raise TypeError(f"out: expected ({', '.join(names)}), got {type(out).__name__}")
    tensors, results = [], []
    for given, name, dtype, shape in zip(out, names, dtypes, shapes, strict=True):
        tensor, result = here.output(given, name, dtype, shape)
        if not tensor.contiguous:
            raise ValueError(f"{name}: expected C order, got strides {list(tensor.strides)} for shape {list(shape)}")
        tensors.append(tensor)
        results.append(result)
    return tensors, results


def align(topk_ids: Any, num_experts: int, block_size: int, expert_map: Any, num_local: int | None,
          stream: Any) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray, DeviceArray]:  # fmt: skip
    """The fields of an Alignment, on the GPU; the first two have room for the most that padding can come to."""
    with place((topk_ids, expert_map), stream) as here:
        ids = here.tensor(topk_ids, "topk_ids", ("int32",), 2, contiguous=True)
        owner = None
        if expert_map is not None:
            owner = here.tensor(expert_map, "expert_map", ("int32",), 1, contiguous=True)
            if owner.shape != (num_experts,):
                raise ValueError(f"expert_map: expected [num_experts] = [{num_experts}], got {list(owner.shape)}")
        local = num_experts if num_local is None else num_local
        most = lib.assay_cuda_moe_align_most(ids.size, local, block_size)
        if most < 0:
            raise ValueError(
                f"block_size: expected fewer than 2^31 slots with padding, got {ids.size} in blocks of {block_size}"
            )
        made = [
            here.output(None, name, dtype, shape)
            for name, dtype, shape in (
                ("sorted_token_ids", "int32", (most,)), ("expert_ids", "int32", (most // block_size,)),
                ("num_tokens_post_padded", "int32", (1,)), ("position", "int32", ids.shape), ("counts", "int64", (local,)),
                ("offsets", "int32", (local + 1,)),
            )
        ]  # fmt: skip
        ordered, blocks, total, position, counts, offsets = (tensor for tensor, _ in made)
        args = ffi.new("assay_cuda_align_args *", {
            "topk_ids": pointer_to(ids, "int32_t *"), "expert_map": pointer_to(owner, "int32_t *"), "slots": ids.size,
            "num_experts": num_experts, "num_local": local, "block_size": block_size,
            "counts": pointer_to(counts, "int64_t *"), "offsets": pointer_to(offsets, "int32_t *"),
            "sorted_token_ids": pointer_to(ordered, "int32_t *"), "expert_ids": pointer_to(blocks, "int32_t *"),
            "position": pointer_to(position, "int32_t *"), "num_tokens_post_padded": pointer_to(total, "int32_t *"),
        })  # fmt: skip
        size = lib.assay_cuda_moe_align_workspace(args)
        check(lib.assay_cuda_moe_align(args, here.workspace(size), size, here.stream), "moe_align")
        sorted_ids, expert_ids, post_padded, places, slots, _ = (result for _, result in made)
    return sorted_ids, expert_ids, post_padded, places, slots


def unpermute(y: Any, alignment: Any, topk_weights: Any, out: Any, stream: Any) -> Any:
    """Each token's weighted sum of its experts' rows, on a GPU."""
    with place((y, alignment.position, topk_weights), stream, out) as here:
        rows = here.tensor(y, "y", ("float32",), 2)
        position = here.tensor(alignment.position, "alignment.position", ("int32",), 2, contiguous=True)
        weights = here.tensor(topk_weights, "topk_weights", ("float32",), 2, contiguous=True)
        if weights.shape != position.shape:
            raise ValueError(f"topk_weights: expected [T, k] = {list(position.shape)}, got {list(weights.shape)}")
        most = alignment.sorted_token_ids.shape[0]
        if rows.shape[0] < most:
            raise ValueError(f"y: expected at least the {most} rows of the alignment, got {rows.shape[0]}")
        tokens, top_k = position.shape
        c, result = here.output(out, "out", "float32", (tokens, rows.shape[1]))
        args = ffi.new("assay_cuda_combine_args *", {
            "y": pointer_to(rows, "float *"), "ldy": rows.row_stride, "n": rows.shape[1],
            "position": pointer_to(position, "int32_t *"), "topk_weights": pointer_to(weights, "float *"), "tokens": tokens,
            "top_k": top_k, "out": pointer_to(c, "float *"), "ldo": c.row_stride,
        })  # fmt: skip
        check(lib.assay_cuda_moe_combine(args, here.stream), "moe_unpermute")
    return result

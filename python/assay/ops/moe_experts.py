"""The expert layer of a mixture: gate/up, activation, down and the weighted sum on packed INT4 experts, in one call."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import reference
from .._ffi import (
    FLOAT_DTYPES,
    FLOAT_NAMES,
    Tensor,
    as_output,
    as_tensor,
    calls,
    check,
    ffi,
    held_workspace,
    lib,
    thread_count,
    variant_index,
    workspace,
)  # fmt: skip
from ..cuda import device_of
from ..cuda.moe_experts import DeviceExperts
from ..cuda.moe_experts import experts as experts_on_device
from ._backends import twin, widen, widen_a16
from ._gemm import aligned_empty, check_group, half_scales, pointer
from .int4 import PackedInt4
from .quantize import quantize_int4

ACTIVATIONS = {
    "silu": lib.ASSAY_ACT_SILU,
    "gelu": lib.ASSAY_ACT_GELU,
    "gelu_tanh": lib.ASSAY_ACT_GELU_TANH,
    "relu": lib.ASSAY_ACT_RELU,
    "relu2": lib.ASSAY_ACT_RELU2,
    "swiglu_oai": lib.ASSAY_ACT_SWIGLU_OAI,
}


@dataclass(frozen=True)
class ExpertsShape:
    """What an expert computes.

    Attributes
    ----------
    num_experts, hidden, intermediate : int
    activation : str
        One of `ACTIVATIONS`, applied to the gate. "swiglu_oai" is gpt-oss's ``g sigmoid(alpha g) (u + 1)``.
    gated : bool
        False: no up projection; the hidden state is the activation alone.
    limit : float
        Above 0, the gate is clamped to at most it and the up to within it, before the activation.
    alpha : float
        Of "swiglu_oai".
    """

    num_experts: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    gated: bool = True
    limit: float = 0.0
    alpha: float = 1.702


class PackedExperts:
    """All experts of a layer in the kernels' layout, each of both projections in one allocation.

    Attributes
    ----------
    shape : ExpertsShape
    gate_up, down : numpy.ndarray
        uint8 [E, bytes]: each expert's packed INT4 matrix. gate_up is [32 ceil(I / 16), H], tile t of 32 columns being the gates
        of hidden units 16 t .. 16 t + 15 and then their ups; not gated: [I, H]. down is [H, I].
    gate_up_bias : float32 [E, N] in the packed order of columns, or None
    down_bias : float32 [E, H] or None
    """

    __slots__ = (
        "_bytes",
        "_struct",
        "down",
        "down_bias",
        "down_format",
        "gate_up",
        "gate_up_bias",
        "gate_up_format",
        "shape",
    )

    def __init__(self, shape: ExpertsShape, gate_up: np.ndarray, gate_up_format: tuple[int, bool],
                 gate_up_bias: np.ndarray | None, down: np.ndarray, down_format: tuple[int, bool],
                 down_bias: np.ndarray | None) -> None:  # fmt: skip
        self.shape, self.gate_up, self.down = shape, gate_up, down
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias
        self.gate_up_format, self.down_format = gate_up_format, down_format
        for array in (gate_up, down, gate_up_bias, down_bias):
            if array is not None:
                array.flags.writeable = False
        self._struct = ffi.new("assay_experts *", {
            "num_experts": shape.num_experts, "hidden": shape.hidden, "intermediate": shape.intermediate,
            "gate_up_group": gate_up_format[0], "down_group": down_format[0],
            "gate_up_symmetric": gate_up_format[1], "down_symmetric": down_format[1],
            "gated": shape.gated, "activation": ACTIVATIONS[shape.activation], "alpha": shape.alpha, "limit": shape.limit,
            "gate_up": pointer(gate_up, "void *"), "down": pointer(down, "void *"),
            "gate_up_bias": ffi.NULL if gate_up_bias is None else pointer(gate_up_bias, "float *"),
            "down_bias": ffi.NULL if down_bias is None else pointer(down_bias, "float *"),
        })  # fmt: skip
        self._bytes = bytes(ffi.buffer(self._struct))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights: what a call reads for each expert it touches."""
        return int(self.gate_up.shape[1] + self.down.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all experts' weights."""
        return self.gate_up.nbytes + self.down.nbytes

    def expert(self, e: int) -> tuple[PackedInt4, PackedInt4]:
        """The two matrices of expert `e`, on this object's memory."""
        s = self.shape
        up = PackedInt4(_columns(s), s.hidden, *self.gate_up_format, self.gate_up[e])
        return up, PackedInt4(s.hidden, s.intermediate, *self.down_format, self.down[e])

    def to_device(self, device: int = 0, *, stream: Any = None) -> DeviceExperts:
        """A copy in a GPU's memory and its kernels' layout, for :func:`moe_experts` with `x` on that GPU."""
        return DeviceExperts(self, device, stream)

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"PackedExperts(num_experts={s.num_experts}, hidden={s.hidden}, intermediate={s.intermediate}, "
            f"activation={s.activation!r}, {self.nbytes} bytes)"
        )


@dataclass(frozen=True)
class ExpertsCost:
    """What a call of :func:`moe_experts` did, for the cost model.

    Attributes
    ----------
    distinct_experts : int
    tokens_per_expert : numpy.ndarray
        int64 [E]
    weight_bytes : int
        Of the distinct experts: the least that must be read.
    row_blocks : int
        Blocks of rows that a tile of weights was multiplied by, over all experts.
    padded_rows : int
        Rows by which those blocks fall short of the kernel's full height.
    """

    distinct_experts: int
    tokens_per_expert: np.ndarray
    weight_bytes: int
    row_blocks: int
    padded_rows: int


def _columns(shape: ExpertsShape) -> int:
    return -(-shape.intermediate // 16) * 32 if shape.gated else shape.intermediate


def _column_order(shape: ExpertsShape, interleaved: bool) -> np.ndarray:
    """Source row of every packed column of gate_up; -1 for the zeros past I."""
    if not shape.gated:
        return np.arange(shape.intermediate)
    unit = np.arange(_columns(shape) // 2).reshape(-1, 16)
    gate, up = (2 * unit, 2 * unit + 1) if interleaved else (unit, unit + shape.intermediate)
    order = np.stack([gate, up], axis=1).reshape(-1)
    order[np.repeat(unit >= shape.intermediate, 2, axis=0).reshape(-1)] = -1
    return order


def pack_experts(gate_up_qweight: Any, gate_up_scales: Any, down_qweight: Any, down_scales: Any, *,
                 gate_up_zeros: Any = None, down_zeros: Any = None, gate_up_bias: Any = None, down_bias: Any = None,
                 activation: str = "silu", gated: bool = True, interleaved: bool = False, limit: float = 0.0,
                 alpha: float = 1.702, num_threads: int | None = None) -> PackedExperts:  # fmt: skip
    """Packs a layer's INT4 experts into the kernels' layout, once.

    Parameters
    ----------
    gate_up_qweight : uint8 [E, 2 I, H / 2]
        Low nibble = even input feature. Gates first, then ups; interleaved: gate and up of a hidden unit in turn (gpt-oss).
        Not gated: [E, I, H / 2].
    gate_up_scales : float16 or float32 [E, 2 I, H / group]
    down_qweight : uint8 [E, H, ceil(I / 2)]
    down_scales : float16 or float32 [E, H, I / group]
        Groups of 32, 64, 128 or all of the input features, each projection its own.
    gate_up_zeros, down_zeros : uint8, shaped as the scales, optional
        Zero points 0..15; without them 8.
    gate_up_bias : float32 [E, 2 I], optional
        In the order of gate_up_qweight's rows.
    down_bias : float32 [E, H], optional
    activation, gated, limit, alpha
        See :class:`ExpertsShape`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    up_q = as_tensor(gate_up_qweight, "gate_up_qweight", ("uint8",), 3).array
    down_q = as_tensor(down_qweight, "down_qweight", ("uint8",), 3).array
    experts, rows, hidden = up_q.shape[0], up_q.shape[1], down_q.shape[1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == "swiglu_oai" and not gated:
        raise ValueError("gated: expected True with activation='swiglu_oai', got False")
    if min(up_q.shape) < 1 or (gated and rows % 2):
        raise ValueError(f"gate_up_qweight: expected [E, {'2 I' if gated else 'I'}, H / 2], got {list(up_q.shape)}")
    if up_q.shape[2] != (hidden + 1) // 2:
        raise ValueError(
            f"gate_up_qweight: expected ceil(H / 2) = {(hidden + 1) // 2} bytes a row, got {up_q.shape[2]}"
        )
    intermediate = rows // 2 if gated else rows
    if down_q.shape != (experts, hidden, (intermediate + 1) // 2):
        wanted = [experts, hidden, (intermediate + 1) // 2]
        raise ValueError(f"down_qweight: expected [E, H, ceil(I / 2)] = {wanted}, got {list(down_q.shape)}")
    for name, value in (("limit", limit), ("alpha", alpha)):
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    shape = ExpertsShape(experts, hidden, intermediate, activation, gated, float(limit), float(alpha))
    order = _column_order(shape, interleaved)
    up, up_format = _pack_all("gate_up", up_q, gate_up_scales, gate_up_zeros, hidden, order, num_threads)
    down, down_format = _pack_all("down", down_q, down_scales, down_zeros, intermediate, np.arange(hidden), num_threads)
    up_bias = _bias(gate_up_bias, "gate_up_bias", (experts, rows))
    if up_bias is not None:
        up_bias = np.ascontiguousarray(np.where(order < 0, np.float32(0), up_bias[:, order]))
    return PackedExperts(
        shape, up, up_format, up_bias, down, down_format, _bias(down_bias, "down_bias", (experts, hidden))
    )


def _bias(bias: Any, name: str, shape: tuple[int, int]) -> np.ndarray | None:
    if bias is None:
        return None
    array = np.array(as_tensor(bias, name, ("float32",), 2).array, order="C")
    if array.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(array.shape)}")
    return array


def _pack_all(name: str, qweight: np.ndarray, scales: Any, zeros: Any, k: int, order: np.ndarray,
              num_threads: int | None) -> tuple[np.ndarray, tuple[int, bool]]:  # fmt: skip
    """Every expert's matrix, its rows in `order`, packed end to end; also its group size and whether it is symmetric."""
    s = as_tensor(scales, f"{name}_scales", ("float16", "float32"), 3).array
    experts, rows = qweight.shape[:2]
    groups = s.shape[2]
    if s.shape[:2] != (experts, rows) or groups < 1 or k % groups:
        raise ValueError(
            f"{name}_scales: expected [E, rows, K / group] with {[experts, rows]}, K = {k}, got {list(s.shape)}"
        )
    check_group(k, k // groups)
    z = None
    if zeros is not None:
        z = as_tensor(zeros, f"{name}_zeros", ("uint8",), 3).array
        if z.shape != s.shape or z.max() > 15:
            raise ValueError(f"{name}_zeros: expected 0..15 shaped as the scales {list(s.shape)}, got {list(z.shape)}")
    n = len(order)
    size = lib.assay_w4_packed_bytes(n, k, k // groups, z is None)
    if not size:
        raise ValueError(f"{name}_qweight: expected at most 2^28 rows and K <= 2^20, got {[n, k]}")
    packed = aligned_empty(experts * size).reshape(experts, size)
    past = order < 0
    for e in range(experts):
        q = np.ascontiguousarray(qweight[e][order])
        scale = half_scales(s[e][order])
        scale[past] = 0
        zero = None if z is None else np.ascontiguousarray(z[e][order])
        status = lib.assay_w4_pack(
            n, k, k // groups, pointer(q, "uint8_t *"), pointer(scale, "uint16_t *"),
            ffi.NULL if zero is None else pointer(zero, "uint8_t *"), pointer(packed[e], "void *"),
            thread_count(num_threads),
        )  # fmt: skip
        check(status, "pack_experts")
    return packed, (k // groups, z is None)


def quantize_experts(gate_up: Any, down: Any, group_size: int = 32, *, down_group_size: int | None = None,
                     symmetric: bool = True, **options: Any) -> PackedExperts:  # fmt: skip
    """Quantises float32 experts, gate_up [E, 2 I, H] and down [E, H, I], by :func:`quantize_int4`, and packs them.

    `options` are :func:`pack_experts`'s.
    """
    up_w = as_tensor(gate_up, "gate_up", ("float32",), 3).array
    down_w = as_tensor(down, "down", ("float32",), 3).array
    if not len(up_w) or len(up_w) != len(down_w):
        raise ValueError(f"gate_up, down: expected as many experts, at least one, got {len(up_w)} and {len(down_w)}")
    up = [quantize_int4(w, group_size, symmetric) for w in up_w]
    low = [quantize_int4(w, down_group_size or group_size, symmetric) for w in down_w]
    return pack_experts(
        _stacked(up, 0), _stacked(up, 1), _stacked(low, 0), _stacked(low, 1), gate_up_zeros=_stacked(up, 2),
        down_zeros=_stacked(low, 2), **options,
    )  # fmt: skip


def _stacked(parts: list[tuple[Any, ...]], i: int) -> np.ndarray | None:
    return None if parts[0][i] is None else np.stack([part[i] for part in parts])


def moe_experts(x: Any, topk_ids: Any, topk_weights: Any, experts: PackedExperts | DeviceExperts, out: Any = None, *,
                a16: bool = False, weights_on_input: bool = False, num_shared: int = 0, shared_weight: Any = 1.0,
                expert_map: Any = None, return_cost: bool = False, backend: str = "c", isa: str | None = None,
                num_threads: int | None = None, stream: Any = None) -> Any:  # fmt: skip
    """Each token through its experts, weighted and summed.

    A token's output has the same bits in any batch, for any number of threads and in every C variant. Each expert's weights
    are read once, however many tokens chose it.

    Parameters
    ----------
    x : float32, float16 or bfloat16 [T, H]
        A row with a NaN or infinity comes out NaN; other rows do not notice.
    topk_ids : int32 [T, k]
        An id outside 0..E-1 (as -1) is an empty slot and adds nothing.
    topk_weights : float32 [T, k]
    experts : PackedExperts
        With `x` on a GPU what its ``to_device`` made. There a16 takes float16 and bfloat16, hidden units are rounded to
        x's type, and sums are the tensor core's; w4a8 of more than 64 tokens has the CPU's bits.
    out : float32 [T, H], optional
        Written in place and returned.
    a16 : bool
        Activations at their own precision (w4a16); otherwise quantised to int8 per row and group on the way into each
        projection (w4a8).
    weights_on_input : bool
        Weights multiply the token on its way in (Llama-4) and not the expert's output.
    num_shared : int
        The layer's last experts, which every token goes through besides its own.
    shared_weight : float or float32 [T]
        Their weight.
    expert_map : int32 [G], optional
        Expert parallelism: ids are 0..G-1, of which this layer's experts hold those mapped to 0..E-1; -1 is another rank's.
    return_cost : bool
        Also return an :class:`ExpertsCost`.
    backend : {"c", "numba", "reference"}
    isa : str, optional
        Force a C variant. :class:`assay.UnsupportedError` when this CPU lacks it.
    num_threads : int, optional
        1 runs on the calling thread alone. Default: ASSAY_NUM_THREADS, else the CPUs this process may use.
    stream : optional
        CUDA stream of a call on a GPU; see :mod:`assay.cuda`.

    Returns
    -------
    float32 [T, H], or (that, ExpertsCost)
    """
    if (
        type(experts) is PackedExperts and not num_shared and expert_map is None and not return_cost
        and backend == "c" and isa is None and stream is None
    ):  # fmt: skip
        # The common call: between two reads of gigabytes, what is done in Python is done with cold caches, at three times its time.
        found = calls.moe_experts(
            experts._bytes, x, topk_ids, topk_weights, a16, weights_on_input, num_threads, held_workspace(), out
        )
        if type(found) is np.ndarray:
            return found
    if device_of(x) is not None:
        if num_shared or return_cost or backend != "c" or isa is not None:
            raise ValueError(
                "num_shared, return_cost, backend, isa: expected none of them on a GPU, where moe_route(num_shared=...) names the "
                f"shared experts, got num_shared={num_shared}, return_cost={return_cost}, backend={backend!r}, isa={isa!r}"
            )
        return experts_on_device(x, topk_ids, topk_weights, experts, out, a16, weights_on_input, expert_map, stream)
    if not isinstance(experts, PackedExperts):
        raise TypeError(f"experts: expected PackedExperts (see assay.pack_experts), got {type(experts).__name__}")
    shape = experts.shape
    a = as_tensor(x, "x", FLOAT_NAMES, 2)
    tokens = a.array.shape[0]
    if a.array.shape[1] != shape.hidden:
        raise ValueError(f"x: expected [T, H] with H = {shape.hidden}, got {list(a.array.shape)}")
    ids, weights = _slots(topk_ids, topk_weights, tokens, experts, expert_map, num_shared, shared_weight)
    local = None if expert_map is None else as_tensor(expert_map, "expert_map", ("int32",), 1, contiguous=True).array
    if local is not None and (not local.size or local.max() >= shape.num_experts):
        raise ValueError(f"expert_map: expected entries below E = {shape.num_experts}, got {local.tolist()[:8]}")
    c = as_output(out, "out", "float32", (tokens, shape.hidden))
    if out is not None and any(np.may_share_memory(c.array, other, 0) for other in (a.array, ids, weights)):
        raise ValueError("out: expected memory of its own, got memory shared with another argument")
    counts, blocks = np.zeros(shape.num_experts, np.int64), np.zeros(2, np.int64)
    if backend == "c":
        _run(a, ids, weights, experts, c, a16, weights_on_input, local, counts, blocks, isa, num_threads)
    else:
        found = twin(backend, "moe_experts", isa)
        if local is not None:
            ids = np.where((ids >= 0) & (ids < len(local)), local[np.clip(ids, 0, len(local) - 1)], -1)
        run = reference.moe_experts if found is None else found.experts
        rows = (widen_a16 if a16 and not weights_on_input else widen)(a)
        c.array[...] = run(rows, ids, weights, experts, a16, weights_on_input)
        kept = ids[(ids >= 0) & (ids < shape.num_experts)]
        counts = np.bincount(kept, minlength=shape.num_experts)
        blocks = np.array([counts.sum(), counts.sum()])
    result = c.array if out is None else out
    if not return_cost:
        return result
    distinct = int(np.count_nonzero(counts))
    return result, ExpertsCost(
        distinct, counts, distinct * experts.expert_bytes, int(blocks[0]), int(blocks[1] - counts.sum())
    )


def _slots(topk_ids: Any, topk_weights: Any, tokens: int, experts: PackedExperts, expert_map: Any, num_shared: int,
           shared_weight: Any) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Ids and weights of all slots, the shared experts' appended, C order."""
    ids = as_tensor(topk_ids, "topk_ids", ("int32",), 2).array
    weights = as_tensor(topk_weights, "topk_weights", ("float32",), 2).array
    if ids.shape[0] != tokens:
        raise ValueError(f"topk_ids: expected [T, k] with T = {tokens}, got {list(ids.shape)}")
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights: expected {list(ids.shape)} as topk_ids, got {list(weights.shape)}")
    if ids.shape[1] < 1 and not num_shared:
        raise ValueError("topk_ids: expected at least one slot a token, got none")
    if ids.size > 2**24:
        raise ValueError(f"topk_ids: expected at most 2^24 slots, got {ids.size}")
    if num_shared:
        e = experts.shape.num_experts
        if not 0 < num_shared <= e:
            raise ValueError(f"num_shared: expected 0..E = 0..{e}, got {num_shared}")
        if expert_map is not None:
            raise ValueError("num_shared: expected 0 with an expert_map, whose ids name the shared experts themselves")
        share = np.broadcast_to(np.asarray(shared_weight, np.float32).reshape(-1, 1), (tokens, num_shared))
        ids = np.concatenate([ids, np.tile(np.arange(e - num_shared, e, dtype=np.int32), (tokens, 1))], axis=1)
        weights = np.concatenate([weights, share], axis=1)
    return np.ascontiguousarray(ids), np.ascontiguousarray(weights)


def _run(a: Tensor, ids: np.ndarray, weights: np.ndarray, experts: PackedExperts, c: Tensor, a16: bool,
         weights_on_input: bool, local: np.ndarray | None, counts: np.ndarray, blocks: np.ndarray, isa: str | None,
         num_threads: int | None) -> None:  # fmt: skip
    args = ffi.new("assay_experts_args *", (
        experts._struct, a.ptr, FLOAT_DTYPES[a.dtype], a16, a.row_stride, a.array.shape[0], ids.shape[1],
        pointer(ids, "int32_t *"), pointer(weights, "float *"),
        ffi.NULL if local is None else pointer(local, "int32_t *"), 0 if local is None else len(local), weights_on_input,
        ffi.cast("float *", c.ptr), c.row_stride, pointer(counts, "int64_t *"), pointer(blocks, "int64_t *"),
    ))  # fmt: skip
    size = lib.assay_moe_experts_workspace(args)
    if not size:
        raise ValueError(f"x: expected at most 2^24 slots, got {ids.size}")
    scratch, held = workspace(size)
    check(lib.assay_moe_experts(args, variant_index(isa), thread_count(num_threads), scratch, held), "moe_experts", isa)

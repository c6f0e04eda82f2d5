"""The expert layer on a GPU: packed experts in its memory, and the device path of :func:`assay.moe_experts`."""

from typing import Any, Self

import numpy as np

from .._ffi import FLOAT_DTYPES, FLOAT_NAMES, ffi, lib
from ._arrays import DeviceArray, DeviceTensor, to_device
from ._device import pointer
from ._place import place
from ._status import check
from .gemm import DeviceInt4
from .moe import pointer_to


class DeviceExperts:
    """All experts of a layer in a GPU's memory, in its kernels' layout; made by :meth:`assay.PackedExperts.to_device`.

    Attributes
    ----------
    shape : assay.ExpertsShape
    gate_up, down : DeviceArray
        uint8 [E, bytes]: each expert's packed INT4 matrix (csrc/cuda/w4_layout.h), rows of gate_up as in
        :class:`assay.PackedExperts`.
    gate_up_bias, down_bias : DeviceArray or None
        float32 [E, N] in the packed order, [E, H].
    device : int
    """

    __slots__ = ("_struct", "device", "down", "down_bias", "gate_up", "gate_up_bias", "shape")

    def __init__(self, packed: Any, device: int, stream: Any) -> None:
        weights = [to_device(_repacked(packed, which), device, stream=stream) for which in (0, 1)]
        biases = [
            None if bias is None else to_device(bias, device, stream=stream)
            for bias in (packed.gate_up_bias, packed.down_bias)
        ]
        self._hold(packed, *weights, *biases)

    @classmethod
    def like(cls, packed: Any, gate_up: DeviceArray, down: DeviceArray) -> Self:
        """A layer of the shape and formats of a :class:`assay.PackedExperts`, without biases, on weights that are packed for the
        GPU already: uint8 [E, bytes] each."""
        made = cls.__new__(cls)
        made._hold(packed, gate_up, down, None, None)
        return made

    def _hold(self, packed: Any, gate_up: DeviceArray, down: DeviceArray, gate_up_bias: DeviceArray | None,
              down_bias: DeviceArray | None) -> None:  # fmt: skip
        self.shape, self.device = packed.shape, gate_up.device
        self.gate_up, self.down, self.gate_up_bias, self.down_bias = gate_up, down, gate_up_bias, down_bias
        host = packed._struct
        self._struct = ffi.new("assay_experts *", {
            **{name: getattr(host, name) for name in (
                "num_experts", "hidden", "intermediate", "gate_up_group", "down_group", "gate_up_symmetric",
                "down_symmetric", "gated", "activation", "alpha", "limit",
            )},
            "gate_up": pointer(self.gate_up.address), "down": pointer(self.down.address),
            "gate_up_bias": _address(self.gate_up_bias), "down_bias": _address(self.down_bias),
        })  # fmt: skip

    def expert(self, e: int) -> tuple[DeviceInt4, DeviceInt4]:
        """The two matrices of expert `e`, on this object's memory."""
        s, of = self.shape, self._struct
        columns = 32 * -(-s.intermediate // 16) if s.gated else s.intermediate
        up, down = (a.part(e * a.shape[1], (a.shape[1],), "uint8") for a in (self.gate_up, self.down))
        return (
            DeviceInt4(columns, s.hidden, of.gate_up_group, bool(of.gate_up_symmetric), up),
            DeviceInt4(s.hidden, s.intermediate, of.down_group, bool(of.down_symmetric), down),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all experts' weights."""
        return self.gate_up.nbytes + self.down.nbytes

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"DeviceExperts(num_experts={s.num_experts}, hidden={s.hidden}, intermediate={s.intermediate}, "
            f"activation={s.activation!r}, {self.nbytes} bytes on cuda:{self.device})"
        )


def _address(bias: DeviceArray | None) -> Any:
    return ffi.NULL if bias is None else ffi.cast("float *", pointer(bias.address))


def _repacked(packed: Any, which: int) -> np.ndarray:
    """uint8 [E, bytes]: gate_up (0) or down (1) of every expert in the GPU's order."""
    first = packed.expert(0)[which]
    size = lib.assay_cuda_w4_packed_bytes(first.n, first.k, first.group_size, first.symmetric)
    if not size:
        raise ValueError(f"experts: expected matrices of N, K < 2^24 for a GPU, got N = {first.n}, K = {first.k}")
    out = np.empty((packed.shape.num_experts, size), np.uint8)
    for e, row in enumerate(out):
        qweight, scales, zeros = packed.expert(e)[which].unpack()
        code = lib.assay_cuda_w4_pack(
            first.n, first.k, first.group_size, ffi.from_buffer("uint8_t[]", qweight),
            ffi.cast("uint16_t *", ffi.from_buffer(scales)), ffi.NULL if zeros is None else ffi.from_buffer("uint8_t[]", zeros),
            ffi.from_buffer(row),
        )  # fmt: skip
        check(code, "to_device")
    return out


def experts(x: Any, topk_ids: Any, topk_weights: Any, layer: Any, out: Any, a16: bool, on_input: bool, expert_map: Any,
            stream: Any) -> Any:  # fmt: skip
    """float32 [T, H] on the GPU that holds x."""
    if not isinstance(layer, DeviceExperts):
        raise TypeError(
            f"experts: expected DeviceExperts (see PackedExperts.to_device) as x is on a GPU, got {type(layer).__name__}"
        )
    shape = layer.shape
    with place((x, topk_ids, topk_weights, expert_map), stream, out) as here:
        a = here.tensor(x, "x", FLOAT_NAMES if not a16 else ("float16", "bfloat16"), 2)
        for name in ("gate_up", "down"):
            here.tensor(getattr(layer, name), f"experts.{name}", ("uint8",), 2)
        for name in ("gate_up_bias", "down_bias"):
            if (bias := getattr(layer, name)) is not None:
                here.tensor(bias, f"experts.{name}", ("float32",), 2)
        tokens = a.shape[0]
        if a.shape[1] != shape.hidden:
            raise ValueError(f"x: expected [T, H] with H = {shape.hidden}, got {list(a.shape)}")
        ids = here.tensor(topk_ids, "topk_ids", ("int32",), 2, contiguous=True)
        weights = here.tensor(topk_weights, "topk_weights", ("float32",), 2, contiguous=True)
        if ids.shape[0] != tokens or ids.shape[1] < 1:
            raise ValueError(f"topk_ids: expected [T, k] with T = {tokens}, k >= 1, got {list(ids.shape)}")
        if weights.shape != ids.shape:
            raise ValueError(f"topk_weights: expected {list(ids.shape)} as topk_ids, got {list(weights.shape)}")
        if ids.size > 2**24:
            raise ValueError(f"topk_ids: expected at most 2^24 slots, got {ids.size}")
        owner: DeviceTensor | None = None
        if expert_map is not None:
            owner = here.tensor(expert_map, "expert_map", ("int32",), 1, contiguous=True)
            if not owner.size:
                raise ValueError("expert_map: expected at least one entry, got none")
        c, result = here.output(out, "out", "float32", (tokens, shape.hidden))
        args = ffi.new("assay_experts_args *", (
            layer._struct, a.ptr, FLOAT_DTYPES[a.dtype], a16, a.row_stride, tokens, ids.shape[1], pointer_to(ids, "int32_t *"),
            pointer_to(weights, "float *"), pointer_to(owner, "int32_t *"), 0 if owner is None else owner.size, on_input,
            pointer_to(c, "float *"), c.row_stride, ffi.NULL, ffi.NULL,
        ))  # fmt: skip
        size = lib.assay_cuda_moe_experts_workspace(args)
        if not size:
            raise ValueError(
                f"topk_ids: expected fewer than 2^31 slots with padding, got {ids.size} for {shape.num_experts} experts"
            )
        check(lib.assay_cuda_moe_experts(args, here.workspace(size), size, here.stream), "moe_experts")
    return result

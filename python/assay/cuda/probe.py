"""Launches of the probe kernels (csrc/cuda/probe.cuh): what a GPU can do at most, one effect a kernel. None of them waits."""

from typing import Any

from .._ffi import ffi, lib
from ._arrays import DeviceArray
from ._device import current, pointer
from ._status import check

THREADS = 256
#: Operands of all ones, and the operations (a multiply-add counts 2) of one instruction of a warp.
PRODUCTS = {
    "f16": (0x3C003C00, 2 * 16 * 8 * 16),
    "bf16": (0x3F803F80, 2 * 16 * 8 * 16),
    "s8": (0x01010101, 2 * 16 * 8 * 32),
}
_MMA_A_REPEAT = 8


def read(data: DeviceArray, sink: DeviceArray, blocks: int, repeats: int = 1) -> None:
    """Reads all of `data`, of a multiple of 16 bytes, `repeats` times; sink: uint32 [blocks], what each block read, XORed."""
    _launch("read", blocks, THREADS // 32 * 4, sink,
            {"from": pointer(data.address), "bytes": data.nbytes, "repeats": repeats, "sink": ffi.cast("uint32_t *", sink.address)})  # fmt: skip


def write(data: DeviceArray, blocks: int, repeats: int = 1, value: int = 0) -> None:
    """Writes all of `data`, of a multiple of 16 bytes, `repeats` times; the 32-bit `value` last."""
    args = {"to": pointer(data.address), "bytes": data.nbytes, "value": value, "repeats": repeats}
    _launch("write", blocks, 0, data, args)


def empty(sink: DeviceArray) -> None:
    """A kernel of one warp that does nothing, on the stream of `sink`."""
    _launch("empty", 1, 0, sink, {"sink": ffi.NULL, "value": 0})


def multiply(kind: str, sink: DeviceArray, blocks: int, repeats: int) -> int:
    """Tensor-core products of registers; returns the operations of the launch.

    Parameters
    ----------
    kind : {"f16", "bf16", "s8"}
        mma.m16n8k16 with float32 sums, or m16n8k32 of bytes with int32 sums.
    sink : float32 or int32 [256 blocks]
    """
    ones, operations = PRODUCTS[kind]
    _launch(f"mma_{kind}", blocks, 0, sink, {"a": ones, "b": ones, "repeats": repeats, "sink": pointer(sink.address)})
    return blocks * (THREADS // 32) * _MMA_A_REPEAT * repeats * operations


def add(counters: DeviceArray, slots: int, blocks: int, repeats: int) -> int:
    """Every thread adds 1 to one of the first `slots` of uint32 counters, again and again; returns the additions."""
    args = {"counters": ffi.cast("uint32_t *", counters.address), "slots": slots, "repeats": repeats}
    _launch("atomic", blocks, 0, counters, args)
    return blocks * THREADS * repeats


def _launch(probe: str, blocks: int, smem: int, on: DeviceArray, fields: dict[str, Any]) -> None:
    family = "mma" if probe.startswith("mma") else probe
    args = ffi.new(f"assay_probe_{family}_args *", fields)
    with current(on.device):
        check(
            lib.assay_cuda_launch(
                f"assay_probe_{probe}".encode(), blocks, 1, 1, smem, pointer(on.stream), args, ffi.sizeof(args[0])
            ),
            f"probe {probe}",
        )

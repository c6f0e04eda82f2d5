"""The data of calls on a GPU: an arena there, with the content of the host's, and its pieces as what ops take."""

from typing import Any

import numpy as np

from .. import cuda
from ..cuda.gemm import DeviceInt4, packed_bytes
from ..cuda.moe_experts import DeviceExperts
from ..cuda.verify import outputs
from ..ops import moe_experts
from . import arena
from .points import Point

#: How many times L2 the arena is, and the least that it is: one call's data were last touched so long ago.
CACHES = 8.0
#: The most of the free memory that it takes.
SHARE = 0.5


class DeviceArena(arena.Ring):
    """Noise in a GPU's memory: that of :class:`assay.measure.arena.Arena` of the same seed.

    Parameters
    ----------
    at_least
        What one call may read: the arena is a quarter larger, if memory allows.

    Attributes
    ----------
    data : assay.cuda.DeviceArray
        uint8.
    """

    def __init__(self, gpu: cuda.Device, seed: int, at_least: float) -> None:
        super().__init__()
        free, _ = cuda.memory_info(gpu.ordinal)
        size = int(min(max(CACHES * gpu.l2_bytes, 1.25 * at_least), SHARE * free)) // 4096 * 4096
        host = np.empty(min(arena.PERIOD_BYTES, size), np.uint8)
        self.period = arena.fill(host, seed)
        self.data = cuda.empty(size, "uint8", gpu.ordinal)
        for at in range(0, size, host.nbytes):
            part = host[: size - at]
            self.data.part(at, part.shape, "uint8").copy_from(part)
        cuda.synchronize(gpu.ordinal)

    def _part(self, at: int, nbytes: int) -> cuda.DeviceArray:
        return self.data.part(at, (nbytes,), "uint8")


class DeviceData:
    """Calls on device arrays; see :class:`assay.measure.workloads.Data`.

    Tensor cores sum products of 16-bit floats in an order and with a rounding of their own: over K = 14336 with a float32's last
    bit lost at each step of 16, 900 * 2^-23 of the largest partial sum.
    """

    float_error = 1e-3

    def __init__(self, memory: DeviceArena, gpu: cuda.Device) -> None:
        self.arena, self._gpu = memory, gpu

    def variant(self, op: str) -> str:
        return variant_of(self._gpu)

    def put(self, array: np.ndarray) -> cuda.DeviceArray:
        return cuda.to_device(array, self._gpu.ordinal)

    def get(self, array: Any) -> np.ndarray:
        found: np.ndarray = array.numpy()
        return found

    def activations(self, op: str, array: np.ndarray) -> cuda.DeviceArray:
        return self.put(array.astype(np.float16) if op.startswith("w4a16") else array)

    def matrix_bytes(self, op: str, n: int, k: int, group_size: int, symmetric: bool) -> int:
        return packed_bytes(n, k, group_size, symmetric)

    def matrix(self, op: str, n: int, k: int, group_size: int, symmetric: bool, data: Any) -> DeviceInt4:
        return DeviceInt4(n, k, group_size, symmetric, data)

    def head(self, w: Any, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        found: tuple[np.ndarray, np.ndarray, np.ndarray | None] = w.unpack(columns)
        return found

    def experts(
        self, shape: moe_experts.ExpertsShape, known: tuple[int, bool], data: Any, gate_up: int, down: int
    ) -> DeviceExperts:
        # A host's layer without experts says which shape and formats these are of.
        none = np.empty((0, 16), np.uint8)
        form = moe_experts.PackedExperts(shape, none, known, None, none.copy(), known, None)
        touched = shape.num_experts
        return DeviceExperts.like(
            form, data.part(0, (touched, gate_up), "uint8"), data.part(touched * gate_up, (touched, down), "uint8")
        )

    def logits(self, piece: Any, rows: int, vocab: int) -> cuda.DeviceArray:
        found: cuda.DeviceArray = piece.part(0, (rows, vocab), "float32")
        return found

    def options(self, point: Point) -> dict[str, Any]:
        """Outputs, where the op would else make new ones, which a graph cannot."""
        p = point.params

        def array(*shape: int, dtype: str = "int32") -> cuda.DeviceArray:
            return cuda.empty(shape, dtype, self._gpu.ordinal)

        if point.op == "moe_route":
            chosen = p["tokens"], p["top_k"]
            return {"out": (array(*chosen, dtype="float32"), array(*chosen), array(p["tokens"]))}
        if point.op == "chain_verify":
            return {"out": outputs(p["batch"], p["num_draft"], self._gpu.ordinal), "max_drafts": p["num_draft"]}
        return {}


def variant_of(gpu: cuda.Device) -> str:
    """What kernels of a GPU are called in a profile."""
    return f"sm_{gpu.capability[0]}{gpu.capability[1]}"

"""kt-kernel, the experts of ktransformers: RAWINT4, which is INT4 in groups of 32 with bfloat16 scales, int8 activations.

Its wheel asks for another PyTorch than the other peers take, but its kernels need none: `pip install --no-deps kt-kernel`.
"""

import importlib.metadata
from functools import partial
from typing import Any

import numpy as np

from . import experts
from .contender import Cell, Prepared


def bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 bits of float32 values, rounded to the nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Kt(experts.Experts):
    """AMXInt4_KGroup_MOE, on one worker: its dispatcher spins on a core of its own."""

    name = "kt-kernel RAWINT4"
    growth = (0.5 + 4 / experts.GROUP) / (0.5 + 2 / experts.GROUP)  # it widens scales to float32
    MOST_TOKENS = 1024

    def __init__(self) -> None:
        super().__init__()
        import kt_kernel

        self._ext = kt_kernel.kt_kernel_ext
        self._variant = kt_kernel.__cpu_variant__
        workers = self._ext.WorkerPoolConfig()
        workers.subpool_count, workers.subpool_numa_map, workers.subpool_thread_count = 1, [0], [1]
        self._cpu = self._ext.CPUInfer(workers)

    def versions(self) -> dict[str, str]:
        return {"kt-kernel": f"{importlib.metadata.version('kt-kernel')} {self._variant}"}

    def refuses(self, cell: Cell) -> str | None:
        if cell.tokens > self.MOST_TOKENS:
            return f"has room for {self.MOST_TOKENS} tokens"
        return (
            None if cell.threads == 1 else "one worker: with as many as cores its dispatcher waits for scheduler ticks"
        )

    def _dequantized(self, cell: Cell, expert: int, part: int) -> np.ndarray:
        w = experts.matrix(cell, expert, part)
        w.scales = widened(bfloat16(w.scales))
        return w.dequantized()

    def _make(self, cell: Cell, count: int) -> list[Any]:
        named = ("gate", "up", "down")
        codes = [experts.stacked(cell, (part,), "codes") for part in range(3)]
        scales = [bfloat16(experts.stacked(cell, (part,), "scales")) for part in range(3)]
        which = np.arange(cell.num_experts, dtype=np.int64)
        layers = []
        for _ in range(count):
            config = self._ext.moe.MOEConfig(cell.num_experts, cell.top_k, cell.hidden, cell.intermediate, 0)
            config.max_len, config.pool = self.MOST_TOKENS, self._cpu.backend_
            config.quant_config.bits, config.quant_config.group_size = 4, experts.GROUP
            config.quant_config.zero_point = False
            for name, q, s in zip(named, codes, scales, strict=True):
                setattr(config, f"{name}_proj", q.ctypes.data)
                setattr(config, f"{name}_scale", s.ctypes.data)
            layer = self._ext.moe.AMXInt4_KGroup_MOE(config)
            self._cpu.submit(layer.load_weights_task(which.ctypes.data))
            self._cpu.sync()
            layers.append(layer)
        return layers

    def _run(self, layer: Any, arguments: tuple[Any, ...]) -> None:
        self._cpu.submit(layer.forward_task(*arguments, False))
        self._cpu.sync()

    def prepare(self, cell: Cell) -> Prepared:
        layers, want = self._layers(cell)
        x, out = bfloat16(experts.tokens_of(cell)), np.zeros((cell.tokens, cell.hidden), np.uint16)
        count, calls, keep = np.array([cell.tokens], np.int64), [], []
        for logits in experts.routings(cell):
            ids, weights = experts.route(logits, cell.top_k)
            ids = ids.astype(np.int64)
            keep += [ids, weights]
            given = (count.ctypes.data, cell.top_k, *(a.ctypes.data for a in (ids, weights, x, out)))
            calls += [partial(self._run, layer, given) for layer in layers]
        calls[0]()
        return Prepared(calls, widened(out[0]).astype(np.float64), want, experts.TOLERANCE, keep=(x, out, count, keep))

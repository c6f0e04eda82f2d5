"""PyTorch's INT4 product with bfloat16 activations, and bitsandbytes' NF4."""

import copy
from functools import partial
from typing import Any

import numpy as np

from .contender import Cell, Prepared, WeightCache, Weights, activations, copies_needed, product, weights_of

#: bfloat16 scales, zero points, activations and outputs: eight bits each.
TOLERANCE = 0.012


class _Eager:
    """Calls of an eager operation on copies of its weights."""

    library = "torch"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self._cache = WeightCache()

    def versions(self) -> dict[str, str]:
        return {"torch": self.torch.__version__}

    def refuses(self, cell: Cell) -> str | None:
        return None if cell.op == "w4a16" else "takes 16-bit activations"

    def _pack(self, w: Weights) -> tuple[Any, np.ndarray]:
        """The packed weights, and what their checked rows stand for."""
        raise NotImplementedError

    def _copy(self, packed: Any) -> Any:
        raise NotImplementedError

    def _multiply(self, a: Any, packed: Any, cell: Cell) -> Any:
        raise NotImplementedError

    def _held(self, cell: Cell) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        w = weights_of(cell)
        packed, want = self._pack(w)
        return w.ends, want, [packed]

    def prepare(self, cell: Cell) -> Prepared:
        torch = self.torch
        torch.set_num_threads(cell.threads)
        key = (cell.n, cell.k, cell.group_size, cell.symmetric)
        ends, want, copies = self._cache.get(key, lambda: self._held(cell))
        while len(copies) < copies_needed(cell, cell.weight_bytes):
            copies.append(self._copy(copies[0]))
        x = activations(cell.m, cell.k)
        a = torch.from_numpy(x).to(torch.bfloat16)
        with torch.inference_mode():
            got = self._multiply(a, copies[0], cell).float().numpy()[:, ends]
        call = torch.inference_mode()(self._multiply)
        return Prepared([partial(call, a, w, cell) for w in copies], got, product(x, want), TOLERANCE)


class Int4Pack(_Eager):
    """aten::_weight_int4pack_mm_for_cpu, bfloat16 scales and zeros."""

    name = "torch int4pack"

    def pack(self, w: Weights) -> tuple[Any, Any]:
        """(codes, bfloat16 scales and zeros) as the operation takes them."""
        torch = self.torch
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(w.unpacked().astype(np.int32)), 2)
        scales = w.scales.astype(np.float32)
        zero = np.full(scales.shape, 8, np.float32) if w.zeros is None else w.zeros.astype(np.float32)
        # w = (q - 8) scale + zero
        pairs = np.stack([scales, (8 - zero) * scales], -1).transpose(1, 0, 2)
        return packed, torch.from_numpy(np.ascontiguousarray(pairs)).to(torch.bfloat16)

    def multiply(self, a: Any, packed: Any, group_size: int) -> Any:
        """a @ w.T"""
        return self.torch.ops.aten._weight_int4pack_mm_for_cpu(a, packed[0], group_size, packed[1])

    def _pack(self, w: Weights) -> tuple[Any, np.ndarray]:
        return self.pack(w), w.dequantized(w.ends)

    def _copy(self, packed: Any) -> Any:
        return tuple(part.clone() for part in packed)

    def _multiply(self, a: Any, packed: Any, cell: Cell) -> Any:
        return self.multiply(a, packed, cell.group_size)


class Nf4(_Eager):
    """bitsandbytes' NF4: a codebook of 16 values, blocks of 64; the weights are quantised anew."""

    name = "bitsandbytes NF4"
    blocksize = 64

    def __init__(self) -> None:
        super().__init__()
        import bitsandbytes
        import bitsandbytes.functional

        self._bnb = bitsandbytes

    def versions(self) -> dict[str, str]:
        return {"bitsandbytes": self._bnb.__version__, **super().versions()}

    def _pack(self, w: Weights) -> tuple[Any, np.ndarray]:
        torch, functional = self.torch, self._bnb.functional
        dense = torch.from_numpy(w.dequantized()).to(torch.bfloat16)
        codes, state = functional.quantize_4bit(dense, blocksize=self.blocksize, quant_type="nf4")
        rows = functional.dequantize_4bit(codes, state).float().numpy()[w.ends]
        # As its Linear4bit does before the first product of a layer on a CPU with AVX-512 BF16; else the slow path runs.
        if functional.has_avx512bf16():
            codes, state = functional._convert_weight_packed_for_cpu(codes, state)
        return (codes, state), rows

    def _copy(self, packed: Any) -> Any:
        state = copy.copy(packed[1])
        state.absmax = state.absmax.clone()
        return packed[0].clone(), state

    def _multiply(self, a: Any, packed: Any, cell: Cell) -> Any:
        return self._bnb.matmul_4bit(a, packed[0], quant_state=packed[1])

"""The kernels of this package.

w4a8 and w8a8 are timed at their C functions, as their peers are inside a graph; w4a16 through its Python function, as its
peers are through theirs.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np

import assay
from assay.ops import info, int4, int8
from assay.ops.int4 import PackedInt4, aligned_empty
from assay.ops.int8 import PackedInt8

from .contender import Cell, Prepared, WeightCache, activations, copies_needed, product, weights_of

TOLERANCE = {"w4a8": 0.012, "w4a16": 1e-3, "w8a8": 0.012}


class _Recorder:
    """Stands for the compiled module, and keeps one function's call."""

    def __init__(self, lib: Any, name: str) -> None:
        self._lib, self._name = lib, name
        self.call: Callable[[], int] | None = None

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._lib, attribute)
        if attribute != self._name:
            return found

        def record(*arguments: Any) -> Any:
            self.call = partial(found, *arguments)
            return found(*arguments)

        return record


def c_call(op: str, call: Callable[[], object]) -> Callable[[], int]:
    """The C call that a GEMM's Python call makes, to be made again without what Python costs.

    The arrays that `call` was given must outlive it.
    """
    module = int8 if op == "w8a8" else int4
    recorder = _Recorder(module.lib, f"assay_{op}_gemm")
    with patch.object(module, "lib", recorder):
        call()
    if recorder.call is None:
        raise RuntimeError(f"{op}: expected a call of assay_{op}_gemm, got none")
    return recorder.call


class Assay:
    """w4a8, w4a16 and w8a8 GEMM."""

    name = "assay"

    def __init__(self) -> None:
        self._cache = WeightCache()

    def versions(self) -> dict[str, str]:
        return {"assay": f"{assay.__version__} ({', '.join(f'{k} {v}' for k, v in info.kernel_versions().items())})"}

    def refuses(self, cell: Cell) -> str | None:
        if cell.op == "w4a16" and find_spec("ml_dtypes") is None:
            return "needs ml_dtypes for bfloat16 activations"
        return None

    def _copies(self, cell: Cell) -> tuple[Any, list[Any]]:
        w = weights_of(cell)
        if w.bits == 8:
            packed = assay.pack_int8(w.codes, w.scales)
        else:
            packed = assay.pack(w.codes, w.scales, w.zeros, group_size=w.group_size)
        return w, [packed]

    def prepare(self, cell: Cell) -> Prepared:
        key = (cell.n, cell.k, cell.group_size, cell.symmetric, cell.op == "w8a8")
        w, copies = self._cache.get(key, lambda: self._copies(cell))
        while len(copies) < copies_needed(cell, cell.weight_bytes):
            data = aligned_empty(copies[0].nbytes)
            data[:] = copies[0].data
            if isinstance(copies[0], PackedInt8):
                copies.append(PackedInt8(w.n, w.k, w.group_size, data))
            else:
                copies.append(PackedInt4(w.n, w.k, w.group_size, w.symmetric, data))
        gemm: Callable[..., Any] = getattr(assay, f"{cell.op}_gemm")
        a, out = activations(cell.m, cell.k), np.empty((cell.m, cell.n), np.float32)
        if cell.op == "w4a16":
            a = a.astype(import_module("ml_dtypes").bfloat16)
        calls = [partial(gemm, a, packed, out, num_threads=cell.threads) for packed in copies]
        keep = list(calls)
        if cell.op == "w4a16":
            calls[-1]()
        else:
            calls = [c_call(cell.op, call) for call in calls]
        want = product(a, w.dequantized(w.ends))
        return Prepared(calls, out[:, w.ends], want, TOLERANCE[cell.op], keep=keep)

"""OpenVINO: compressed weights in a MatMul, with dynamic quantisation of the activations (w4a8, w8a8) or bf16 (w4a16).

One model holds several independent products; the number of rows is dynamic, as in a language model.
"""

from typing import Any

import numpy as np

from .contender import Cell, Prepared, WeightCache, Weights, activations, copies_needed, product, weights_of

#: Activations are quantised by groups as long as the weights', scales kept as float16.
TOLERANCE = {"w4a8": 0.015, "w8a8": 0.015, "w4a16": 0.01}


class OpenVino:
    """MatMul on i4 (symmetric), u4 (with zero points) or i8 constants.

    Parameters
    ----------
    activations : {"int8", "bf16"}
    """

    def __init__(self, activations: str) -> None:
        import openvino

        self._ov = openvino
        self._core = openvino.Core()
        self._activations = activations
        self.name = f"openvino {activations}"
        self._cache = WeightCache()

    def versions(self) -> dict[str, str]:
        return {"openvino": self._ov.__version__.split("-")[0]}

    def refuses(self, cell: Cell) -> str | None:
        return None if (cell.op == "w4a16") == (self._activations == "bf16") else f"has {self._activations} activations"

    def _constant(self, w: Weights, keep: list[Any]) -> Any:
        ov = self._ov
        from openvino import opset15 as op

        groups = w.k // w.group_size
        shape = [w.n, groups, w.group_size]
        if w.bits == 8:
            codes, kind = w.codes, ov.Type.i8
        elif w.symmetric:
            codes, kind = w.codes ^ np.uint8(0x88), ov.Type.i4  # q - 8 in two's complement
        else:
            codes, kind = w.codes, ov.Type.u4
        # OpenVINO does not copy: the arrays must live as long as the model.
        codes = np.ascontiguousarray(codes).view(np.int8 if w.bits == 8 else np.uint8)
        scales = np.ascontiguousarray(w.scales)[..., None]
        tensor = ov.Tensor(codes.reshape(shape)) if w.bits == 8 else ov.Tensor(codes, shape, kind)
        keep += [codes, scales, tensor]
        value = op.convert(op.constant(tensor, shared_memory=True), np.float16)
        if w.zeros is not None:
            flat = w.zeros.ravel()
            packed = np.ascontiguousarray(flat[::2] | (np.resize(flat[1::2], flat[::2].shape) << 4))
            zeros = ov.Tensor(packed, [w.n, groups, 1], ov.Type.u4)
            keep += [packed, zeros]
            value = op.subtract(value, op.convert(op.constant(zeros, shared_memory=True), np.float16))
        value = op.multiply(value, op.constant(ov.Tensor(scales), shared_memory=True))
        value = op.reshape(value, np.array([w.n, w.k]), False)
        return op.convert(value, np.float32)

    def _model(self, cell: Cell, copies: int) -> tuple[Weights, Any, list[Any]]:
        from openvino import opset15 as op

        w, keep = weights_of(cell), []
        a = op.parameter([-1, w.k], np.float32)
        products = [op.matmul(a, self._constant(w.rolled(i), keep), False, True) for i in range(copies)]
        options = {
            "INFERENCE_NUM_THREADS": cell.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": True,
            "INFERENCE_PRECISION_HINT": "bf16" if cell.op == "w4a16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if cell.op == "w4a16" else cell.group_size,
        }
        compiled = self._core.compile_model(self._ov.Model(products, [a], "products"), "CPU", options)
        return w, compiled, keep

    def prepare(self, cell: Cell) -> Prepared:
        copies = copies_needed(cell, cell.weight_bytes)
        key = (cell.op, cell.n, cell.k, cell.group_size, cell.symmetric, cell.threads, copies)
        w, compiled, keep = self._cache.get(key, lambda: self._model(cell, copies))
        request = compiled.create_infer_request()
        x = activations(cell.m, cell.k)
        request.set_input_tensor(self._ov.Tensor(x, shared_memory=True))
        request.infer()
        got = request.get_output_tensor(0).data[:, w.ends].astype(np.float32)
        want = product(x, w.dequantized(w.ends))
        return Prepared([request.infer], got, want, TOLERANCE[cell.op], copies, (request, compiled, keep, x))

"""ONNX Runtime: com.microsoft.MatMulNBits at accuracy level 4 (int8 activations)."""

from typing import Any

import numpy as np

from .contender import Cell, Prepared, WeightCache, Weights, activations, copies_needed, product, weights_of

TOLERANCE = 0.015


class OnnxRuntime:
    """A model of several independent MatMulNBits of 4 or 8 bits."""

    name = "onnxruntime"

    def __init__(self) -> None:
        import onnx
        import onnxruntime

        self._onnx, self._ort = onnx, onnxruntime
        self._cache = WeightCache()

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": self._ort.__version__}

    def refuses(self, cell: Cell) -> str | None:
        return None

    def _node(self, w: Weights, index: int, tensors: list[Any]) -> Any:
        from onnx import helper, numpy_helper

        groups = w.k // w.group_size
        codes = w.codes if w.bits == 4 else (w.codes.view(np.uint8) ^ np.uint8(0x80))  # zero point 128
        parts = {
            f"b{index}": codes.reshape(w.n, groups, w.group_size * w.bits // 8),
            f"s{index}": w.scales.astype(np.float32).reshape(w.n, groups),
        }
        if w.zeros is not None:
            padded = np.zeros((w.n, groups + groups % 2), np.uint8)
            padded[:, :groups] = w.zeros
            parts[f"z{index}"] = padded[:, ::2] | (padded[:, 1::2] << 4)
        tensors += [numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in parts.items()]
        return helper.make_node(
            "MatMulNBits", ["a", *parts], [f"c{index}"], domain="com.microsoft", K=w.k, N=w.n, bits=w.bits,
            block_size=w.group_size, accuracy_level=4,
        )  # fmt: skip

    def _session(self, cell: Cell, copies: int) -> tuple[Weights, Any]:
        from onnx import TensorProto, helper

        w, tensors = weights_of(cell), []
        nodes = [self._node(w.rolled(i), i, tensors) for i in range(copies)]
        graph = helper.make_graph(
            nodes, "products", [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["m", w.k])],
            [helper.make_tensor_value_info(f"c{i}", TensorProto.FLOAT, ["m", w.n]) for i in range(copies)], tensors,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = cell.threads, 1
        if cell.threads > 1:  # the calling thread is not of the pool
            options.add_session_config_entry(
                "session.intra_op_thread_affinities", ";".join(str(i + 2) for i in range(cell.threads - 1))
            )
        options.log_severity_level = 3
        return w, self._ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def prepare(self, cell: Cell) -> Prepared:
        # A model larger than 2 GB cannot be serialised; nothing here comes near it.
        copies = copies_needed(cell.weight_bytes, cell.m)
        key = (cell.op, cell.n, cell.k, cell.group_size, cell.symmetric, cell.threads, copies)
        w, session = self._cache.get(key, lambda: self._session(cell, copies))
        x = activations(cell.m, cell.k)
        binding = session.io_binding()
        binding.bind_ortvalue_input("a", self._ort.OrtValue.ortvalue_from_numpy(x))
        outputs = [np.empty((cell.m, cell.n), np.float32) for _ in range(copies)]
        for i, out in enumerate(outputs):
            binding.bind_ortvalue_output(f"c{i}", self._ort.OrtValue.ortvalue_from_numpy(out))
        session.run_with_iobinding(binding)
        got = binding.get_outputs()[0].numpy()[:, w.ends]
        want = product(x, w.dequantized(w.ends))
        call = lambda: session.run_with_iobinding(binding)  # noqa: E731
        return Prepared([call], got, want, TOLERANCE, copies, (session, binding, outputs))

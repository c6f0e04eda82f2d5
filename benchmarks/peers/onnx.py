"""ONNX Runtime: com.microsoft.MatMulNBits at accuracy level 4 (int8 activations)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from . import experts
from .contender import Cell, Prepared, WeightCache, Weights, activations, copies_needed, product, weights_of

TOLERANCE = 0.015


def session_of(ort: Any, model: Any, threads: int, values: Mapping[str, Any] | None = None) -> Any:
    """A session with its threads pinned, one core each; `values` are of initialisers that the model only names."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if threads > 1:  # the calling thread is not of the pool
        options.add_session_config_entry(
            "session.intra_op_thread_affinities", ";".join(str(i + 2) for i in range(threads - 1))
        )
    options.log_severity_level = 3
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


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
        return "has int8 activations" if cell.op == "w4a16" else None

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
        return w, session_of(self._ort, model, cell.threads)

    def prepare(self, cell: Cell) -> Prepared:
        # A model larger than 2 GB cannot be serialised; nothing here comes near it.
        copies = copies_needed(cell, cell.weight_bytes)
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


class QMoE(experts.Experts):
    """com.microsoft.QMoE at accuracy level 4: routing, both projections and the weighted sum in one node.

    A session makes a form of the weights of its own, a byte a code, when it is made. It is given them as arrays of this process and
    not in its model, which would hold them three more times meanwhile.
    """

    name = "onnxruntime QMoE"
    growth = (1 + 4 / experts.GROUP) / (0.5 + 2 / experts.GROUP)

    def __init__(self) -> None:
        super().__init__()
        import onnx
        import onnxruntime

        self._onnx, self._ort = onnx, onnxruntime

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": self._ort.__version__}

    def _key(self, cell: Cell) -> tuple[Any, ...]:
        return (*super()._key(cell), cell.threads)

    def _weights(self, cell: Cell) -> dict[str, np.ndarray]:
        """[E, rows, ...] of the experts' matrices; gate and up interleaved row by row."""

        def interleaved(what: str) -> np.ndarray:
            def both(e: int) -> np.ndarray:
                pair = np.stack([getattr(experts.matrix(cell, e, part), what) for part in (0, 1)], 1)
                return pair.reshape(2 * cell.intermediate, -1)

            return np.stack(experts.every_expert(cell, both))

        return {
            "w1": interleaved("codes"), "s1": interleaved("scales").astype(np.float32),
            "w2": experts.stacked(cell, (2,), "codes"), "s2": experts.stacked(cell, (2,), "scales").astype(np.float32),
        }  # fmt: skip

    def _make(self, cell: Cell, count: int) -> list[Any]:
        from onnx import TensorProto, helper

        def outside(name: str, array: np.ndarray) -> Any:
            """A tensor whose values the session is given beside the model."""
            tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.external_data.add(key="location", value="memory")
            return tensor

        weights = self._weights(cell)
        node = helper.make_node(
            "QMoE", ["x", "router", "w1", "s1", "", "w2", "s2"], ["y"], domain="com.microsoft", k=cell.top_k,
            activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
            normalize_routing_weights=1, expert_weight_bits=4, block_size=experts.GROUP, accuracy_level=4,
        )  # fmt: skip
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node], "layer",
            [value("x", TensorProto.FLOAT, ["t", cell.hidden]), value("router", TensorProto.FLOAT, ["t", cell.num_experts])],
            [value("y", TensorProto.FLOAT, ["t", cell.hidden])], [outside(*item) for item in weights.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        values = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
        return [session_of(self._ort, model, cell.threads, values) for _ in range(count)]

    def prepare(self, cell: Cell) -> Prepared:
        sessions, want = self._layers(cell)
        tokens = experts.tokens_of(cell)
        calls, bindings = [], []
        for session in sessions:
            for logits in experts.routings(cell):
                binding, out = session.io_binding(), np.empty_like(tokens)
                for name, array in (("x", tokens), ("router", logits)):
                    binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
                binding.bind_ortvalue_output("y", self._ort.OrtValue.ortvalue_from_numpy(out))
                bindings.append(binding)
                calls.append(partial(session.run_with_iobinding, binding))
        calls[0]()
        got = bindings[0].get_outputs()[0].numpy()[0].astype(np.float64)
        return Prepared(calls, got, want, experts.TOLERANCE)

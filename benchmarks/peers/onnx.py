"""ONNX Runtime: com.microsoft.MatMulNBits at accuracy level 4 (int8 activations)."""

from functools import partial
from typing import Any

import numpy as np

from . import experts
from .contender import Cell, Prepared, WeightCache, Weights, activations, copies_needed, product, weights_of

TOLERANCE = 0.015


def session_of(ort: Any, model: Any, threads: int) -> Any:
    """A session with its threads pinned, one core each."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if threads > 1:  # the calling thread is not of the pool
        options.add_session_config_entry(
            "session.intra_op_thread_affinities", ";".join(str(i + 2) for i in range(threads - 1))
        )
    options.log_severity_level = 3
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
    """com.microsoft.QMoE at accuracy level 4: routing, both projections and the weighted sum in one node."""

    name = "onnxruntime QMoE"

    def __init__(self) -> None:
        super().__init__()
        import onnx
        import onnxruntime

        self._onnx, self._ort = onnx, onnxruntime

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": self._ort.__version__}

    def _parts(self, cell: Cell, which: tuple[int, ...], what: str) -> np.ndarray:
        """[E, rows, ...] of the experts' matrices; gate and up interleaved row by row."""
        each = [
            np.stack([getattr(experts.matrix(cell, e, p), what) for p in which], 1) for e in range(cell.num_experts)
        ]
        return np.stack(each).reshape(cell.num_experts, len(which) * each[0].shape[0], -1)

    def _layer(self, cell: Cell, others: list[Any]) -> Any:
        """Arrays of a layer; the sessions on them are made by number of threads."""
        names = (("w1", (0, 1), "codes"), ("s1", (0, 1), "scales"), ("w2", (2,), "codes"), ("s2", (2,), "scales"))
        parts = {name: self._parts(cell, which, what) for name, which, what in names}
        return {name: v.astype(np.float32) if name[0] == "s" else v for name, v in parts.items()} | {"sessions": {}}

    def _session(self, cell: Cell, layer: dict[str, Any]) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        key = (cell.threads, cell.top_k)
        if key not in layer["sessions"]:
            names = ("w1", "s1", "w2", "s2")
            node = helper.make_node(
                "QMoE", ["x", "router", "w1", "s1", "", "w2", "s2"], ["y"], domain="com.microsoft", k=cell.top_k,
                activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
                normalize_routing_weights=1, expert_weight_bits=4, block_size=experts.GROUP, accuracy_level=4,
            )  # fmt: skip
            value = helper.make_tensor_value_info
            graph = helper.make_graph(
                [node], "layer",
                [value("x", TensorProto.FLOAT, ["t", cell.hidden]), value("router", TensorProto.FLOAT, ["t", cell.num_experts])],
                [value("y", TensorProto.FLOAT, ["t", cell.hidden])],
                [numpy_helper.from_array(layer[name], name) for name in names],
            )  # fmt: skip
            opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
            model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
            layer["sessions"] = {key: session_of(self._ort, model, cell.threads)}
        return layer["sessions"][key]

    def prepare(self, cell: Cell) -> Prepared:
        held = self._layers(cell)
        x = tokens = experts.tokens_of(cell)
        calls, bindings = [], []
        for layer in held["layers"][: experts.layers_needed(cell)]:
            session = self._session(cell, layer)
            for logits in experts.routings(cell):
                binding, out = session.io_binding(), np.empty_like(tokens)
                for name, array in (("x", x), ("router", logits)):
                    binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
                binding.bind_ortvalue_output("y", self._ort.OrtValue.ortvalue_from_numpy(out))
                bindings.append(binding)
                calls.append(partial(session.run_with_iobinding, binding))
        calls[0]()
        got = bindings[0].get_outputs()[0].numpy()[0].astype(np.float64)
        return Prepared(calls, got, held["want"], experts.TOLERANCE)

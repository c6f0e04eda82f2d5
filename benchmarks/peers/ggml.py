"""ggml by ctypes: llama.cpp's (the shared libraries of llama-cpp-python) and ik_llama.cpp's (built beside the project).

A graph holds several independent products, each on its own weights, so that what a graph costs to start is shared.
Q4_0 (w = d (q - 8), groups of 32) and Q8_0 hold the given codes and scales as they are. Q4_K keeps the codes; its scales
and mins are the given ones rounded to the format's six bits.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from assay.formats.dequant import dequantize_rows

from . import experts
from .contender import Cell, Prepared, WeightCache, Weights, activations, copies_needed, product, weights_of

F32, I32 = 0, 26
TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}
TOLERANCE = 0.015
#: Nodes of a graph of products, and of one of a layer.
GRAPH_NODES, LAYER_NODES = 8192, 64


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_mul_mat_id": (c_void_p, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "ggml_moe_up_gate": (c_void_p, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int]),
    "ggml_mul": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_add": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_swiglu_split": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
    "ggml_mul_multi_add": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_set_output": (None, [c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_gallocr_new": (c_void_p, [c_void_p]),
    "ggml_gallocr_alloc_graph": (c_bool, [c_void_p, c_void_p]),
    "ggml_gallocr_free": (None, [c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "iqk_repack_tensor": (None, [c_void_p]),
}


class Library:
    """The functions of ggml that are used, of one or several shared objects."""

    def __init__(self, paths: list[Path]) -> None:
        # Lazily bound: ik_llama.cpp built without its attention leaves symbols open that are never called.
        self._libraries = [ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_GLOBAL) for path in paths]

    def __getattr__(self, name: str) -> Any:
        result, arguments = SIGNATURES[name]
        for library in self._libraries:
            found = getattr(library, name, None)
            if found is not None:
                found.restype, found.argtypes = result, arguments
                setattr(self, name, found)
                return found
        raise AttributeError(f"{name} is in none of {self._libraries}")

    def repack_buffer_type(self) -> int:
        """The buffer type that rearranges weights for this CPU as they are set."""
        reg = self.ggml_backend_cpu_reg()
        address = self.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
        listing = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.ggml_backend_reg_dev_get(reg, 0))
        at = 0
        while listing[at]:
            if self.ggml_backend_buft_name(listing[at]) == b"CPU_REPACK":
                return int(listing[at])
            at += 1
        raise RuntimeError("this ggml has no CPU_REPACK buffer type")


def llama_library() -> tuple[Library, dict[str, str]]:
    """llama.cpp's ggml as llama-cpp-python ships it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        raise ImportError("llama-cpp-python is not installed")
    here = Path(spec.origin).parent / "lib"
    version = importlib.metadata.version("llama-cpp-python")
    return Library([here / f"libggml{part}.so" for part in ("-base", "-cpu", "")]), {"llama-cpp-python": version}


def ik_library() -> tuple[Library, dict[str, str]]:
    """ik_llama.cpp's ggml, built by whoever compares."""
    path = os.environ.get("ASSAY_PEER_IK_LLAMA")
    if not path:
        raise ImportError("set ASSAY_PEER_IK_LLAMA to the libggml.so of a build of ik_llama.cpp")
    return Library([Path(path)]), {"ik_llama.cpp": os.environ.get("ASSAY_PEER_IK_LLAMA_VERSION", "unknown commit")}


# ---- blocks -----------------------------------------------------------------------------------------------


def q4_0_blocks(w: Weights) -> np.ndarray:
    """uint8 [N, K/32 * 18]: scale, then code j beside code j + 16."""
    q = w.unpacked().reshape(w.n, -1, 32)
    blocks = np.empty((w.n, w.k // 32, 18), np.uint8)
    blocks[:, :, :2] = w.scales[..., None].view(np.uint8)
    blocks[:, :, 2:] = q[:, :, :16] | (q[:, :, 16:] << 4)
    return blocks.reshape(w.n, -1)


def q8_0_blocks(w: Weights) -> np.ndarray:
    """uint8 [N, K/32 * 34]: scale, then 32 codes."""
    blocks = np.empty((w.n, w.k // 32, 34), np.uint8)
    blocks[:, :, :2] = w.scales[..., None].view(np.uint8)
    blocks[:, :, 2:] = w.codes.view(np.uint8).reshape(w.n, -1, 32)
    return blocks.reshape(w.n, -1)


def q4_k_blocks(w: Weights) -> np.ndarray:
    """uint8 [N, K/256 * 144]: d, dmin, eight 6-bit scales and mins, codes; scales and mins rounded to the format."""
    scale = w.scales.astype(np.float32).reshape(w.n, -1, 8)
    zeros = np.full(w.scales.shape, 8, np.float32) if w.zeros is None else w.zeros.astype(np.float32)
    least = scale * zeros.reshape(scale.shape)
    d, dmin = (np.maximum(v.max(-1, keepdims=True) / 63, 1e-7).astype(np.float16) for v in (scale, least))
    s, m = (np.clip(np.rint(v / u.astype(np.float32)), 0, 63).astype(np.uint8) for v, u in ((scale, d), (least, dmin)))
    blocks = np.empty((w.n, w.k // 256, 144), np.uint8)
    blocks[:, :, :2], blocks[:, :, 2:4] = d.view(np.uint8), dmin.view(np.uint8)
    blocks[:, :, 4:8] = s[..., :4] | (s[..., 4:] >> 4 << 6)
    blocks[:, :, 8:12] = m[..., :4] | (m[..., 4:] >> 4 << 6)
    blocks[:, :, 12:16] = (s[..., 4:] & 15) | (m[..., 4:] << 4)
    q = w.unpacked().reshape(w.n, -1, 4, 2, 32)
    blocks[:, :, 16:] = (q[:, :, :, 0] | (q[:, :, :, 1] << 4)).reshape(w.n, -1, 128)
    return blocks.reshape(w.n, -1)


BLOCKS = {"Q4_0": q4_0_blocks, "Q8_0": q8_0_blocks, "Q4_K": q4_k_blocks}


def takes(type_name: str, cell: Cell) -> str | None:
    """Why a block format cannot hold a cell's weights."""
    if cell.op == "w4a16" or (cell.op == "w8a8") != (type_name == "Q8_0"):
        return f"{type_name} is not {cell.op}"
    if cell.group_size != 32:
        return f"{type_name} has groups of 32"
    if type_name == "Q4_0" and not cell.symmetric:
        return "Q4_0 is symmetric"
    if type_name == "Q4_K" and cell.k % 256:
        return "Q4_K needs K in multiples of 256"
    return None


# ---- contenders -------------------------------------------------------------------------------------------


class Context:
    """Room for the descriptions of tensors and graphs. ik_llama.cpp has 64 of them in all, so graphs of a cell share one."""

    def __init__(self, ggml: Library, nbytes: int) -> None:
        self._ggml = ggml
        self.handle = ggml.ggml_init(InitParams(nbytes, None, True))
        if not self.handle:
            raise MemoryError(f"ggml has no further context (of {nbytes} bytes)")

    def __del__(self) -> None:
        if self.handle:
            self._ggml.ggml_free(self.handle)


class Tensors:
    """Tensors of one block type on one buffer of a library.

    Parameters
    ----------
    shapes
        Of each tensor, innermost first: (K, N, experts).
    """

    def __init__(self, ggml: Library, type_name: str, form: str, shapes: list[tuple[int, int, int]]) -> None:
        self._ggml, self._form = ggml, form
        self._context = Context(ggml, (len(shapes) + 8) * 512)
        self.all = [ggml.ggml_new_tensor_3d(self._context.handle, TYPES[type_name], *shape) for shape in shapes]
        kind = ggml.repack_buffer_type() if form == "repack" else ggml.ggml_backend_cpu_buffer_type()
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context.handle, kind)
        if not self._buffer:
            raise MemoryError(f"ggml could not hold {len(shapes)} tensors of {shapes[0]}")

    def set(self, index: int, blocks: np.ndarray) -> None:
        """Fills a tensor, rearranged as the form wants it."""
        blocks = np.ascontiguousarray(blocks)
        self._ggml.ggml_backend_tensor_set(self.all[index], blocks.ctypes.data, 0, blocks.nbytes)
        if self._form == "ik":
            self._ggml.iqk_repack_tensor(self.all[index])

    def __del__(self) -> None:
        self._ggml.ggml_backend_buffer_free(self._buffer)


class Graph:
    """A graph of up to `nodes` nodes on an input, with its own memory for their values."""

    #: Bytes of a context that a graph takes, with its tensors.
    BYTES, BYTES_A_NODE = 1 << 16, 1 << 10

    def __init__(self, ggml: Library, threads: int, context: Context, nodes: int) -> None:
        self._ggml, self._context, self.context = ggml, context, context.handle
        self._graph = ggml.ggml_new_graph_custom(self.context, nodes, False)
        self._memory = ggml.ggml_gallocr_new(ggml.ggml_backend_cpu_buffer_type())
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def add(self, node: int) -> None:
        self._ggml.ggml_set_output(node)
        self._ggml.ggml_build_forward_expand(self._graph, node)

    def read(self, node: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32 values of a node."""
        out = np.empty(shape, np.float32)
        self._ggml.ggml_backend_tensor_get(node, out.ctypes.data, 0, out.nbytes)
        return out

    def write(self, node: int, values: np.ndarray) -> None:
        """Fills an input."""
        values = np.ascontiguousarray(values)
        self._ggml.ggml_backend_tensor_set(node, values.ctypes.data, 0, values.nbytes)

    def allocate(self) -> None:
        if not self._ggml.ggml_gallocr_alloc_graph(self._memory, self._graph):
            raise MemoryError("ggml could not allocate the graph")

    def run(self) -> None:
        status = self._ggml.ggml_backend_graph_compute(self._backend, self._graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}")

    def __del__(self) -> None:
        self._ggml.ggml_gallocr_free(self._memory)
        self._ggml.ggml_backend_free(self._backend)


class Ggml:
    """mul_mat of one block format.

    Parameters
    ----------
    type_name : {"Q4_0", "Q4_K", "Q8_0"}
    form : {"repack", "plain", "ik"}
        llama.cpp's CPU_REPACK buffer, llama.cpp's own blocks, or ik_llama.cpp's row-interleaved blocks.
    """

    def __init__(self, type_name: str, form: str) -> None:
        self._type, self._form = type_name, form
        self._ggml, self._versions = ik_library() if form == "ik" else llama_library()
        self.name = f"{'ik_llama' if form == 'ik' else 'ggml'} {type_name} {form}"
        self._cache = WeightCache()

    def versions(self) -> dict[str, str]:
        return self._versions

    def refuses(self, cell: Cell) -> str | None:
        if (self._type, self._form) == ("Q8_0", "repack") and platform.machine() in ("x86_64", "AMD64"):
            return "ggml repacks Q8_0 on Arm only, and crashes on such a buffer here"
        return takes(self._type, cell)

    def _tensors(self, held: "Held", copies: int) -> Tensors:
        """At least `copies` of the weights on a buffer, those that are there if they are enough."""
        found = next((t for t in held.tensors if len(t.all) >= copies), None)
        if found is None:
            shape = (held.k, held.blocks.shape[0], 1)
            found = Tensors(self._ggml, self._type, self._form, [shape] * copies)
            for i in range(copies):
                found.set(i, np.roll(held.blocks, 8 * i, 0))
            held.tensors.append(found)
        return found

    def prepare(self, cell: Cell) -> Prepared:
        held = self._cache.get((cell.n, cell.k, cell.symmetric), lambda: Held(weights_of(cell), self._type))
        tensors = self._tensors(held, copies := copies_needed(cell, held.blocks.nbytes))
        ggml = self._ggml
        context = Context(ggml, Graph.BYTES + GRAPH_NODES * Graph.BYTES_A_NODE)
        graph = Graph(ggml, cell.threads, context, GRAPH_NODES)
        a = ggml.ggml_new_tensor_2d(graph.context, F32, cell.k, cell.m)
        nodes = [ggml.ggml_mul_mat(graph.context, tensor, a) for tensor in tensors.all[:copies]]
        for node in nodes:
            graph.add(node)
        graph.allocate()
        x = activations(cell.m, cell.k)
        graph.write(a, x)
        graph.run()
        got, want = graph.read(nodes[0], (cell.m, cell.n))[:, held.ends], product(x, held.want)
        return Prepared([graph.run], got, want, TOLERANCE, len(nodes), (graph, tensors))


class Held:
    """A matrix as blocks, what its checked rows stand for, and the tensors made of it."""

    def __init__(self, w: Weights, type_name: str) -> None:
        self.k, self.ends, self.blocks = w.k, w.ends, BLOCKS[type_name](w)
        self.want = dequantize_rows(self.blocks[w.ends], type_name).reshape(-1, w.k)
        self.tensors: list[Tensors] = []


class GgmlExperts(experts.Experts):
    """An expert layer by mul_mat_id; ik_llama.cpp's with its fused gate/up and its fused weighted sum.

    Parameters
    ----------
    type_name, form
        As for :class:`Ggml`.
    """

    #: enum ggml_unary_op of ik_llama.cpp
    SILU = 10

    def __init__(self, type_name: str, form: str) -> None:
        super().__init__()
        self._type, self._form = type_name, form
        self._ggml, self._versions = ik_library() if form == "ik" else llama_library()
        self.name = f"{'ik_llama' if form == 'ik' else 'ggml'} {type_name} {form}"

    def versions(self) -> dict[str, str]:
        return self._versions

    def refuses(self, cell: Cell) -> str | None:
        if self._type == "Q4_K" and (cell.hidden % 256 or cell.intermediate % 256):
            return "Q4_K needs K in multiples of 256"
        return None

    def _dequantized(self, cell: Cell, expert: int, part: int) -> np.ndarray:
        w = experts.matrix(cell, expert, part)
        return dequantize_rows(BLOCKS[self._type](w), self._type).reshape(w.n, w.k)

    def _make(self, cell: Cell, count: int) -> list[Any]:
        h, i, e = cell.hidden, cell.intermediate, cell.num_experts
        shapes = [(h, i, e), (h, i, e), (i, h, e)]
        layers = [Tensors(self._ggml, self._type, self._form, shapes) for _ in range(count)]
        for part in range(3):
            blocks = np.stack(
                experts.every_expert(cell, lambda x, part=part: BLOCKS[self._type](experts.matrix(cell, x, part)))
            )
            for layer in layers:
                layer.set(part, blocks)
        return layers

    def _graph(self, cell: Cell, layer: Tensors, logits: np.ndarray, room: Context) -> tuple[Graph, int]:
        """The layer on one routing, run once; and its output."""
        ggml, graph = self._ggml, Graph(self._ggml, cell.threads, room, LAYER_NODES)
        new, context, k = ggml.ggml_new_tensor_3d, graph.context, cell.top_k
        gate, up, down = layer.all
        x = new(context, F32, cell.hidden, 1, cell.tokens)
        ids = ggml.ggml_new_tensor_2d(context, I32, k, cell.tokens)
        weights = new(context, F32, 1, k, cell.tokens)
        if self._form == "ik":
            hidden = ggml.ggml_moe_up_gate(context, up, gate, x, ids, self.SILU)
            out = ggml.ggml_mul_multi_add(context, ggml.ggml_mul_mat_id(context, down, hidden, ids), weights)
        else:
            products = (ggml.ggml_mul_mat_id(context, w, x, ids) for w in (gate, up))
            hidden = ggml.ggml_swiglu_split(context, *products)
            each = ggml.ggml_mul(context, ggml.ggml_mul_mat_id(context, down, hidden, ids), weights)
            row = 4 * cell.hidden
            slots = [ggml.ggml_view_2d(context, each, cell.hidden, cell.tokens, k * row, s * row) for s in range(k)]
            out = slots[0]
            for slot in slots[1:]:
                out = ggml.ggml_add(context, out, slot)
        graph.add(out)
        graph.allocate()
        chosen, share = experts.route(logits, k)
        for node, values in ((x, experts.tokens_of(cell)), (ids, chosen), (weights, share)):
            graph.write(node, values)
        graph.run()
        return graph, out

    def prepare(self, cell: Cell) -> Prepared:
        layers, want = self._layers(cell)
        drawn = list(experts.routings(cell))
        room = Context(self._ggml, len(drawn) * len(layers) * (Graph.BYTES + LAYER_NODES * Graph.BYTES_A_NODE))
        made = [self._graph(cell, layer, logits, room) for logits in drawn for layer in layers]
        graph, out = made[0]
        got = graph.read(out, (cell.tokens, cell.hidden))[0].astype(np.float64)
        return Prepared([g.run for g, _ in made], got, want, experts.TOLERANCE)

"""The model that a GGUF file holds: the roles of its tensors by llama.cpp's names, and its shape from the metadata."""

import re
from dataclasses import dataclass

from ...errors import FormatError
from ...model import Attention, Experts, Matrix, ModelSpec
from .file import GGUFArray, GGUFFile, GGUFTensor


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is in the model: matrix name and role of `assay.model.Matrix`, and the block, None outside them."""

    name: str
    role: str
    layer: int | None


_ROLES = {
    "attn_q": ("attn_q", "attention"),
    "attn_k": ("attn_k", "attention"),
    "attn_v": ("attn_v", "attention"),
    "attn_qkv": ("attn_qkv", "attention"),
    "attn_output": ("attn_output", "attention"),
    "attn_q_a": ("attn_q_a", "attention"),
    "attn_q_b": ("attn_q_b", "attention"),
    "attn_kv_a_mqa": ("attn_kv_a", "attention"),
    "attn_kv_b": ("attn_kv_b", "attention"),
    "attn_k_b": ("attn_k_b", "attention"),
    "attn_v_b": ("attn_v_b", "attention"),
    "ffn_gate": ("ffn_gate", "ffn"),
    "ffn_up": ("ffn_up", "ffn"),
    "ffn_down": ("ffn_down", "ffn"),
    "ffn_gate_exps": ("expert_gate", "expert"),
    "ffn_up_exps": ("expert_up", "expert"),
    "ffn_down_exps": ("expert_down", "expert"),
    "ffn_gate_up_exps": ("expert_gate_up", "expert"),
    "ffn_gate_shexp": ("shared_gate", "shared_expert"),
    "ffn_up_shexp": ("shared_up", "shared_expert"),
    "ffn_down_shexp": ("shared_down", "shared_expert"),
    "ffn_gate_inp": ("router", "router"),
}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)\.weight")
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d{1,6})")  # files from before experts were stacked
# Rotary tables are derived from the configuration: bytes of the file, not parameters.
_TABLES = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_SLIDING_PATTERN = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}  # every n-th layer is global; llama.cpp's llama-model.cpp


def tensor_role(name: str) -> TensorRole:
    """What the tensor `name` is, by llama.cpp's names. Unknown ones have role "other"."""
    if name == "token_embd.weight":
        return TensorRole("token_embd", "embedding", None)
    if name == "output.weight":
        return TensorRole("lm_head", "lm_head", None)
    block = _BLOCK.fullmatch(name)
    if block is None:
        return TensorRole(name, "other", None)
    layer, part = int(block[1]), block[2]
    one = _ONE_EXPERT.fullmatch(part)
    if one is not None:
        return TensorRole(f"expert_{one[1]}", "expert", layer)
    matrix, role = _ROLES.get(part, (part, "other"))
    return TensorRole(matrix, role, layer)


class _Fields:
    """The keys ``{architecture}.*`` with their types checked."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.prefix = file, architecture

    def fail(self, key: str, wanted: str, got: object) -> FormatError:
        return FormatError(f"{self.file.path}: {self.prefix}.{key}: expected {wanted}, got {got!r}")

    def integer(self, key: str, default: int | None = None) -> int | None:
        value = self.file.metadata.get(f"{self.prefix}.{key}")
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(key, "an integer that is not negative", value)
        return value

    def required(self, key: str) -> int:
        value = self.integer(key)
        if value is None:
            raise self.fail(key, "a positive integer", None)
        if value < 1:
            raise self.fail(key, "a positive integer", value)
        return value

    def per_layer(self, key: str, layers: int) -> list[int]:
        """A number for every layer, from one for all or from an array."""
        value = self.file.metadata.get(f"{self.prefix}.{key}")
        if not isinstance(value, GGUFArray):
            return [self.required(key)] * layers
        if value.count != layers or value.type_name in ("string", "array", "float32", "float64"):
            raise self.fail(key, f"{layers} integers", value)
        return [int(v) for v in value.to_list()]

    def windows(self, layers: int) -> list[int | None]:
        """The sliding window of every layer, None for global ones."""
        window = self.integer("attention.sliding_window", 0) or None
        if window is None:
            return [None] * layers
        key = "attention.sliding_window_pattern"
        pattern = self.file.metadata.get(f"{self.prefix}.{key}", _SLIDING_PATTERN.get(self.prefix, 0))
        if isinstance(pattern, GGUFArray):
            return [window if sliding else None for sliding in self.per_layer(key, layers)]
        if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 0:
            raise self.fail(key, "an integer that is not negative, or an array", pattern)
        return [window if pattern == 0 or i % pattern < pattern - 1 else None for i in range(layers)]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200]).strip()


def model_spec(file: GGUFFile) -> ModelSpec:
    """The model that `file` holds: its shape from the metadata, its matrices from the tensors.

    Works for every architecture of llama.cpp's that is made of attention and feed-forward or expert layers (llama,
    mistral, mixtral, qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3, olmoe, deepseek2, gpt-oss and their like).
    `Matrix.stored` and `Matrix.stored_bytes` are the file's.

    Raises
    ------
    FormatError
        A key or tensor is missing, or the two contradict each other: names it, what was expected and what came.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise FormatError(f"{file.path}: general.architecture: expected a string, got {architecture!r}")
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise FormatError(f"{file.path}: split.count: expected a whole model in one file, got one of {parts!r} parts")
    fields = _Fields(file, architecture)
    layers, hidden = fields.required("block_count"), fields.required("embedding_length")
    if layers > len(file.tensors):
        raise fields.fail("block_count", f"at most the number of tensors, {len(file.tensors)}", layers)
    attention = _attention(fields, layers, hidden)
    num_experts = fields.integer("expert_count", 0) or 0
    matrices, vectors, expert_vectors, vector_bytes = _matrices(file, layers, num_experts)
    by_name = {m.name: m for m in matrices}
    if "token_embd" not in by_name:
        raise FormatError(f"{file.path}: expected a tensor 'token_embd.weight', got none")
    embedding = by_name["token_embd"]
    tied = "lm_head" not in by_name
    if tied:
        matrices.remove(embedding)
        matrices.append(
            Matrix("lm_head", embedding.n, embedding.k, 1, "lm_head", embedding.stored, embedding.stored_bytes)
        )
    experts = _experts(fields, matrices, num_experts)
    _check_layers(file, matrices, layers)
    _check_shapes(file, matrices, attention, hidden)
    name = file.metadata.get("general.name")
    spec = ModelSpec(
        name=(_printable(name) if isinstance(name, str) else "") or file.path.stem,
        source=f"{file.path} (GGUF v{file.version}, {_printable(architecture)})",
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=embedding.n,
        matrices=tuple(matrices),
        attention=attention,
        experts=experts,
        tied_embedding=tied,
        max_context=fields.integer("context_length") or None,
        vector_params=vectors,
        expert_vector_params=expert_vectors,
        vector_bytes=vector_bytes,
    )
    try:
        return spec.validate()
    except ValueError as exc:
        raise FormatError(f"{file.path}: {exc}") from exc


def _attention(fields: _Fields, layers: int, hidden: int) -> tuple[Attention, ...]:
    heads = fields.per_layer("attention.head_count", layers)
    has_kv = f"{fields.prefix}.attention.head_count_kv" in fields.file.metadata
    kv_heads = fields.per_layer("attention.head_count_kv", layers) if has_kv else heads
    latent = fields.integer("attention.kv_lora_rank", 0) or 0
    windows = fields.windows(layers)
    kinds: dict[tuple[int, int, int | None], int] = {}
    for at, kind in enumerate(zip(heads, kv_heads, windows, strict=True)):
        if kind[0] < 1 or kind[1] < 1:
            raise fields.fail("attention.head_count", f"attention in every layer, {layers} in all",
                              f"{kind[0]} heads and {kind[1]} kv heads in layer {at}")  # fmt: skip
        kinds[kind] = kinds.get(kind, 0) + 1
    found = []
    for (num_heads, num_kv_heads, window), count in kinds.items():
        default = hidden // num_heads
        head_dim = fields.integer("attention.key_length", default) or default
        v_head_dim = fields.integer("attention.value_length", default) or default
        kv_elements, kind_name = num_kv_heads * (head_dim + v_head_dim), "gqa"
        if latent:
            # newer files describe the absorbed form (one kv head of the latent) and add the plain one under *_mla
            head_dim = fields.integer("attention.key_length_mla", head_dim) or head_dim
            v_head_dim = fields.integer("attention.value_length_mla", v_head_dim) or v_head_dim
            kv_elements, kind_name = latent + fields.required("rope.dimension_count"), "mla"
        found.append(Attention(count, num_heads, num_kv_heads, head_dim, v_head_dim, window, kv_elements, kind_name))
    return tuple(found)


def _matrices(file: GGUFFile, layers: int, num_experts: int) -> tuple[list[Matrix], int, int, int]:
    """Matrices of the file's tensors; vector parameters outside and inside (one) expert; bytes of all vectors."""
    groups: dict[tuple[str, str, int, int], list[tuple[GGUFTensor, int]]] = {}
    vectors, expert_vectors, vector_bytes = 0, 0, 0
    for t in file.tensors.values():
        what = tensor_role(t.name)
        if what.layer is not None and what.layer >= layers:
            raise FormatError(f"{file.path}: tensor {t.name!r}: expected a block below {layers}, got {what.layer}")
        if what.role in ("embedding", "lm_head") and len(t.shape) != 2:
            raise FormatError(f"{file.path}: tensor {t.name!r}: expected 2 dimensions, got {list(t.shape)}")
        if len(t.shape) == 1 or (what.role == "other" and not t.name.endswith(".weight")):
            vector_bytes += t.nbytes
            if "_exps." in t.name and len(t.shape) == 2:
                expert_vectors += t.shape[1]
            elif t.name not in _TABLES:
                vectors += t.num_params
            continue
        n, k = t.shape[-2:]
        stack = t.num_params // (n * k)
        if what.role == "expert":
            whole = _ONE_EXPERT.search(t.name) is None
            wanted = num_experts if whole else 1
            if stack != wanted:
                raise FormatError(f"{file.path}: tensor {t.name!r}: expected {wanted} experts, got {list(t.shape)}")
        else:  # a stack of heads multiplies as one matrix of all their rows
            n, stack = n * stack, 1
        groups.setdefault((what.name, what.role, n, k), []).append((t, stack))
    found = []
    named = {name for name, *_ in groups}
    down = {k for name, _, _, k in groups if name == "ffn_down"}
    for (key, role, n, k), members in groups.items():
        # phi3 keeps gate and up in one tensor that is called ffn_up
        fused = key == "ffn_up" and "ffn_gate" not in named and n % 2 == 0 and n // 2 in down
        name = "ffn_gate_up" if fused else key
        stored: dict[str, int] = {}
        for t, stack in members:
            stored[t.type_name] = stored.get(t.type_name, 0) + stack
        total = sum(stack for _, stack in members)
        per = num_experts if role == "expert" else 1
        if total % per:
            raise FormatError(f"{file.path}: {name}: expected {per} experts in every layer, got {total} in all")
        found.append(Matrix(name, n, k, total // per, role, stored, sum(t.nbytes for t, _ in members)))
    return found, vectors, expert_vectors, vector_bytes


def _experts(fields: _Fields, matrices: list[Matrix], num_experts: int) -> Experts | None:
    if not num_experts:
        return None
    down = [m for m in matrices if m.name == "expert_down"]
    if len(down) != 1:
        raise fields.fail("expert_count", "expert matrices of one shape", f"{len(down)} shapes of expert_down")
    shared = fields.integer("expert_shared_count", 0) or 0
    if not shared and any(m.role == "shared_expert" for m in matrices):
        shared = 1
    return Experts(num_experts, fields.required("expert_used_count"), down[0].count, shared, down[0].n, down[0].k)


def _check_layers(file: GGUFFile, matrices: list[Matrix], layers: int) -> None:
    """Every layer has attention and a feed-forward part."""
    for what, names in (
        ("attention output", ("attn_output",)),
        ("attention query", ("attn_q", "attn_qkv", "attn_q_b")),
        ("feed-forward down", ("ffn_down", "expert_down")),
    ):
        got = sum(m.count for m in matrices if m.name in names)
        if got != layers:
            raise FormatError(
                f"{file.path}: expected a matrix {' or '.join(names)} ({what}) in each of {layers} layers, got {got}"
            )


def _check_shapes(file: GGUFFile, matrices: list[Matrix], attention: tuple[Attention, ...], hidden: int) -> None:
    """The tensors' shapes are those that the metadata says."""
    inputs = {"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_kv_a", "ffn_gate", "ffn_up", "ffn_gate_up",
              "expert_gate", "expert_up", "expert_gate_up", "shared_gate", "shared_up", "router", "token_embd",
              "lm_head"}  # fmt: skip
    outputs = {"attn_output", "ffn_down", "expert_down", "shared_down"}
    rows: dict[str, set[int]] = {}
    for a in attention:
        if a.kind == "gqa":
            rows.setdefault("attn_q", set()).add(a.num_heads * a.head_dim)
            rows.setdefault("attn_k", set()).add(a.num_kv_heads * a.head_dim)
            rows.setdefault("attn_v", set()).add(a.num_kv_heads * a.v_head_dim)
            total = (a.num_heads + a.num_kv_heads) * a.head_dim + a.num_kv_heads * a.v_head_dim
            rows.setdefault("attn_qkv", set()).add(total)
    for m in matrices:
        if (m.name in inputs and m.k != hidden) or (m.name in outputs and m.n != hidden):
            side = "k" if m.name in inputs else "n"
            raise FormatError(
                f"{file.path}: {m.name}: expected {side} = embedding_length = {hidden}, got n = {m.n}, k = {m.k}"
            )
        wanted = rows.get(m.name)
        if wanted is not None and m.n not in wanted:
            raise FormatError(
                f"{file.path}: {m.name}: expected n = {' or '.join(map(str, sorted(wanted)))}"
                f" (heads times their width), got {m.n}"
            )

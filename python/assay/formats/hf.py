"""Hugging Face ``config.json`` files, read into a `assay.model.ModelSpec`.

The families llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma, gemma2, gemma3, phi3, olmoe, deepseek_v2,
deepseek_v3 and gpt_oss are counted to the parameter, each as transformers builds it
(https://github.com/huggingface/transformers, models/*/configuration_*.py and modeling_*.py); gpt2, gpt_neox, opt, bloom,
falcon, phi, starcoder2, mpt, dbrx and llama4 to their matrices. Another ``model_type`` that has the common fields is read as
a llama with those fields; one that lacks a field is refused by the field's name, and so is one whose layers are no
attention (state space, linear attention, recurrence). A ``vision_config`` becomes the tokens of an image.
"""

import json
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import FormatError
from ..model import Attention, Experts, Matrix, ModelSpec, Vision

__all__ = ["load_config", "spec_from_config"]

_MAX_BYTES = 16 << 20
_MAX_DIM = 1 << 24
_MAX_LAYERS = 1 << 16


@dataclass(frozen=True)
class _Family:
    """What a family does unlike llama, where its configuration does not say so."""

    defaults: Mapping[str, Any]
    norms: int = 2  # of the hidden size, per layer
    head_norms: str = ""  # "head": one per head width; "all": over all heads
    qkv_bias: bool = False  # always, on q, k and v
    fused: bool = False  # q, k and v are one matrix, gate and up another
    sinks: bool = False  # attention sinks, and biases on router and experts
    router_bias: bool = False
    gated: bool = True  # gate, up and down; else up and down alone
    wide: int = 0  # inner width of the feed-forward over the hidden size, where the file does not say


_FAMILIES: dict[str, _Family] = {
    "llama": _Family({}),
    "mistral": _Family({}),
    "mixtral": _Family({}),
    "qwen2": _Family({"use_sliding_window": False}, qkv_bias=True),
    "qwen3": _Family({"use_sliding_window": False, "head_dim": 128}, head_norms="head"),
    "qwen3_moe": _Family({"use_sliding_window": False}, head_norms="head"),
    "gemma": _Family({"tie_word_embeddings": True, "head_dim": 256}),
    "gemma2": _Family(
        {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2}, norms=4
    ),
    # published files of the larger Gemma 3 leave out whatever equals these
    "gemma3_text": _Family(
        {
            "tie_word_embeddings": True,
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        norms=4,
        head_norms="head",
    ),
    "phi3": _Family({}, fused=True),
    "olmoe": _Family({}, head_norms="all"),
    "deepseek_v2": _Family({}),
    "deepseek_v3": _Family({}, router_bias=True),
    "gpt2": _Family({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, gated=False, wide=4),
    "gpt_neox": _Family({"attention_bias": True, "mlp_bias": True}, gated=False),
    "opt": _Family({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, gated=False),
    "bloom": _Family({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, gated=False, wide=4),
    "falcon": _Family({"tie_word_embeddings": True}, gated=False, wide=4),
    "phi": _Family({"attention_bias": True, "mlp_bias": True}, gated=False),
    "starcoder2": _Family({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, gated=False),
    "mpt": _Family({"tie_word_embeddings": True}, gated=False, wide=4),
    "dbrx": _Family({}),
    "llama4_text": _Family({}),
    "gpt_oss": _Family({"attention_bias": True, "sliding_window_pattern": 2}, sinks=True),
}
_ALIASES = {"gemma3": "gemma3_text", "llama4": "llama4_text", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2",
            "RefinedWeb": "falcon", "RefinedWebModel": "falcon"}  # fmt: skip
#: Names that families give to the common fields.
_RENAMED = {
    "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers", "n_embd": "hidden_size", "d_model": "hidden_size",
    "n_embed": "hidden_size", "n_head": "num_attention_heads", "n_heads": "num_attention_heads", "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size", "num_kv_heads": "num_key_value_heads", "n_head_kv": "num_key_value_heads",
    "n_positions": "max_position_embeddings", "max_seq_len": "max_position_embeddings", "seq_length": "max_position_embeddings",
}  # fmt: skip
#: Fields that only models have whose layers keep a state instead of a cache.
_STATEFUL = ("mamba_d_state", "mamba_expand", "ssm_cfg", "state_size", "ssm_state_size", "attn_layer_period", "lru_width",
             "linear_num_key_heads", "attention_hidden_size", "conv_L_cache")  # fmt: skip
_LAYER_KINDS = ("full_attention", "sliding_attention")


class _Config:
    """A configuration whose fields are checked as they are read."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        self.values, self.where, self.defaults = values, where, defaults

    def fail(self, field: str, wanted: str, got: object) -> NoReturn:
        shown = "nothing" if got is None else reprlib.repr(got)
        raise FormatError(f"{self.where}: {field}: expected {wanted}, got {shown}")

    def get(self, field: str) -> Any:
        """The field; null counts as absent."""
        value = self.values.get(field)
        return self.defaults.get(field) if value is None else value

    def integer(self, field: str, high: int = _MAX_DIM, low: int = 1) -> int | None:
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(field, f"an integer in {low}..{high}", value)
        return int(value)

    def required(self, *fields: str, high: int = _MAX_DIM) -> int:
        """The first of `fields` that is there."""
        for field in fields:
            value = self.integer(field, high)
            if value is not None:
                return value
        return self.fail(" or ".join(fields), f"an integer in 1..{high}", None)

    def flag(self, field: str, default: bool) -> bool:
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(field, "true or false", value)
        return bool(value)


def load_config(path: str | Path) -> ModelSpec:
    """Reads a ``config.json``, or the one in a folder.

    Raises
    ------
    FormatError
        Not readable, over 16 MiB, no JSON object, or a field missing or out of range: names it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = path / "config.json"
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise FormatError(f"{path}: expected a regular file")
        with path.open("rb") as handle:
            raw = handle.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        if isinstance(exc, FormatError):
            raise
        raise FormatError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    if len(raw) > _MAX_BYTES:
        raise FormatError(f"{path}: expected at most {_MAX_BYTES} bytes, got {max(info.st_size, len(raw))}")
    try:
        config = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as exc:
        raise FormatError(f"{path}: expected UTF-8, got byte {raw[exc.start]:#04x} at offset {exc.start}") from exc
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{path}: expected JSON: {str(exc) or type(exc).__name__}") from exc
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    good_name = isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable()
    fallback = path.resolve().parent.name or path.stem
    return spec_from_config(config, str(name).rstrip("/").rsplit("/", 1)[-1] or fallback if good_name else fallback,
                            str(path))  # fmt: skip


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def spec_from_config(config: object, name: str, source: str) -> ModelSpec:
    """The model that a parsed ``config.json`` describes.

    Parameters
    ----------
    config
        The parsed object. Of a multimodal model (``text_config``) the language model is taken.
    name, source
        For `ModelSpec`; `source` also opens every error.

    Raises
    ------
    FormatError
        A field is missing or out of range: names it, what was expected and what came.
    """
    if not isinstance(config, Mapping):
        raise FormatError(f"{source}: expected a JSON object, got {type(config).__name__}")
    values = dict(config)
    inner = values.get("text_config")
    if inner is not None:
        if not isinstance(inner, Mapping):
            raise FormatError(f"{source}: text_config: expected an object, got {reprlib.repr(inner)}")
        outer = values
        values = dict(inner)
        for field in ("tie_word_embeddings", "model_type"):
            values.setdefault(field, outer.get(field))
    model_type = values.get("model_type", "")
    if not isinstance(model_type, str) and model_type is not None:
        raise FormatError(f"{source}: model_type: expected a string, got {reprlib.repr(model_type)}")
    kind = _ALIASES.get(model_type or "", model_type or "")
    family = _FAMILIES.get(kind, _Family({}))
    values = _common(values, kind)
    c = _Config(values, source, family.defaults)
    stateful = [field for field in _STATEFUL if values.get(field)]
    if stateful:
        c.fail(stateful[0], "a model of attention layers alone", values[stateful[0]])

    layers, hidden = c.required("num_hidden_layers", high=_MAX_LAYERS), c.required("hidden_size")
    vocab = c.required("vocab_size", high=1 << 28)
    context = c.integer("max_position_embeddings", 1 << 40)
    matrices: list[Matrix] = []
    attention, vectors = _attention(c, family, layers, hidden, matrices)
    experts, ffn_vectors, expert_vectors = _feed_forward(c, family, layers, hidden, matrices)
    tied = c.flag("tie_word_embeddings", False)
    if not tied:
        matrices.append(Matrix("token_embd", vocab, hidden, 1, "embedding"))
    matrices.append(Matrix("lm_head", vocab, hidden, 1, "lm_head"))
    spec = ModelSpec(
        name=name,
        source=source if kind in _FAMILIES else f"{source} (model_type {(kind or 'absent')[:40]!r}, read as a llama)",
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab,
        matrices=tuple(matrices),
        attention=attention,
        experts=experts,
        tied_embedding=tied,
        max_context=context,
        vector_params=vectors + ffn_vectors + layers * family.norms * hidden + hidden,
        expert_vector_params=expert_vectors,
        vision=_vision(config, source),
    )
    try:
        return spec.validate()
    except ValueError as exc:
        raise FormatError(f"{source}: {exc}") from exc


def _common(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields under their common names, and what a family keeps elsewhere."""
    found = dict(values)
    if kind == "dbrx":
        for name in ("attn_config", "ffn_config"):
            inner = found.get(name)
            found |= {k: v for k, v in inner.items() if k not in found} if isinstance(inner, Mapping) else {}
        for old, new in (("kv_n_heads", "num_key_value_heads"), ("moe_num_experts", "num_local_experts"),
                         ("moe_top_k", "num_experts_per_tok"), ("ffn_hidden_size", "intermediate_size")):  # fmt: skip
            found.setdefault(new, found.get(old))
    for old, new in _RENAMED.items():
        if found.get(new) is None and found.get(old) is not None:
            found[new] = found[old]
    if kind == "falcon" and found.get("num_key_value_heads") is None and found.get("multi_query", True) is True:
        found["num_key_value_heads"] = 1
    if kind == "llama4_text":
        step = found.get("interleave_moe_layer_step")
        found.setdefault("decoder_sparse_step", step)
        found["moe_intermediate_size"] = found.get("intermediate_size")
        found["intermediate_size"] = found.get("intermediate_size_mlp") or found.get("intermediate_size")
        found.setdefault("n_shared_experts", 1)
    return found


def _vision(config: Mapping[str, Any], source: str) -> Vision | None:
    """How the model sees: from its ``vision_config``, and the fields that say what an image becomes."""
    inner = config.get("vision_config")
    if not isinstance(inner, Mapping):
        return None
    c = _Config(_common(dict(inner), ""), f"{source}: vision_config", {})
    patch, size = c.integer("patch_size", 1024), c.integer("image_size", 1 << 16)
    if patch is None:
        return None
    merge = c.integer("spatial_merge_size", 64) or 1
    outer = _Config(dict(config), source, {})
    fixed = outer.integer("mm_tokens_per_image", 1 << 20) or outer.integer("image_seq_length", 1 << 20)
    patches = 1
    if fixed is None and size is not None and c.integer("spatial_merge_size", 64) is None:
        fixed = (size // patch) ** 2 or None  # a tower of one size without merging: every image is scaled to it
    elif fixed is not None and size is not None:
        patches = max(1, (size // patch) ** 2 // fixed)
    layers = c.integer("num_hidden_layers", _MAX_LAYERS) or c.integer("depth", _MAX_LAYERS) or 0
    hidden = c.integer("embed_dim") or c.integer("hidden_size") or 0
    inner_width = c.integer("intermediate_size") or 4 * hidden
    gated = 3 if c.get("hidden_act") == "silu" else 2
    return Vision(
        patch=patch, merge=merge, tokens=fixed, temporal=c.integer("temporal_patch_size", 64) or 1,
        params=layers * (4 * hidden * hidden + gated * hidden * inner_width), patches_per_token=patches,
    )  # fmt: skip


def _attention(
    c: _Config, family: _Family, layers: int, hidden: int, matrices: list[Matrix]
) -> tuple[tuple[Attention, ...], int]:
    """Attention by kind of layer, and its vector parameters over all layers. Adds its matrices."""
    heads = c.required("num_attention_heads")
    kv_heads = c.integer("num_key_value_heads") or heads
    bias = c.flag("attention_bias", False)

    def add(name: str, n: int, k: int) -> None:
        matrices.append(Matrix(name, n, k, layers, "attention"))

    latent = c.integer("kv_lora_rank")
    if latent is not None:
        rope, nope, v_dim = c.required("qk_rope_head_dim"), c.required("qk_nope_head_dim"), c.required("v_head_dim")
        head_dim, q_rank = nope + rope, c.integer("q_lora_rank")
        if q_rank is None:
            add("attn_q", heads * head_dim, hidden)
        else:
            add("attn_q_a", q_rank, hidden)
            add("attn_q_b", heads * head_dim, q_rank)
        add("attn_kv_a", latent + rope, hidden)
        add("attn_kv_b", heads * (nope + v_dim), latent)
        add("attn_output", hidden, heads * v_dim)
        vectors = latent + (q_rank or 0) + (bias * ((q_rank or 0) + latent + rope + hidden))
        kv_elements, kind = latent + rope, "mla"
    else:
        head_dim = c.integer("head_dim") or 0
        if not head_dim:
            if hidden % heads:
                c.fail("num_attention_heads", f"a divisor of hidden_size = {hidden} (as head_dim is absent)", heads)
            head_dim = hidden // heads
        v_dim, q_n, kv_n = head_dim, heads * head_dim, kv_heads * head_dim
        if family.fused:
            add("attn_qkv", q_n + 2 * kv_n, hidden)
        else:
            add("attn_q", q_n, hidden)
            add("attn_k", kv_n, hidden)
            add("attn_v", kv_n, hidden)
        add("attn_output", hidden, q_n)
        vectors = {"head": 2 * head_dim, "all": q_n + kv_n}.get(family.head_norms, 0)
        vectors += (q_n + 2 * kv_n) * (bias or family.qkv_bias) + hidden * bias + heads * family.sinks
        kv_elements, kind = 2 * kv_n, "gqa"
    windows = _windows(c, layers)
    found = tuple(
        Attention(windows.count(w), heads, kv_heads, head_dim, v_dim, w, kv_elements, kind)
        for w in dict.fromkeys(windows)
    )
    return found, vectors * layers


def _windows(c: _Config, layers: int) -> list[int | None]:
    """The sliding window of every layer, None for global ones."""
    window = c.integer("sliding_window", 1 << 40, low=0) or None
    kinds = c.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            c.fail("layer_types", f"a list of num_hidden_layers = {layers} strings", kinds)
        for kind in kinds:
            if kind not in _LAYER_KINDS:
                c.fail("layer_types", f"only {' and '.join(_LAYER_KINDS)}", kind)
        if window is None and "sliding_attention" in kinds:
            c.fail("sliding_window", "an integer, as layer_types has sliding_attention", window)
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if window is None or not c.flag("use_sliding_window", True):
        return [None] * layers
    pattern = c.integer("sliding_window_pattern", _MAX_LAYERS)
    if pattern is not None:  # every n-th layer is global
        return [window if (i + 1) % pattern else None for i in range(layers)]
    first = c.integer("max_window_layers", _MAX_LAYERS, low=0) if "use_sliding_window" in c.values else None
    return [window if i >= (first or 0) else None for i in range(layers)]


def _feed_forward(
    c: _Config, family: _Family, layers: int, hidden: int, matrices: list[Matrix]
) -> tuple[Experts | None, int, int]:
    """The experts, and vector parameters outside and inside (one) expert over all layers. Adds the matrices."""

    def gated(prefix: str, role: str, n: int, count: int) -> None:
        if family.gated:
            matrices.append(Matrix(f"{prefix}_gate", n, hidden, count, role))
        matrices.append(Matrix(f"{prefix}_up", n, hidden, count, role))
        matrices.append(Matrix(f"{prefix}_down", hidden, n, count, role))

    num_experts = next((e for f in ("num_local_experts", "num_experts", "n_routed_experts")
                        if (e := c.integer(f, _MAX_LAYERS, low=0)) is not None), 0)  # fmt: skip
    sparse = _sparse_layers(c, layers) if num_experts else 0
    vectors = 0
    if sparse < layers:
        n = (c.integer("intermediate_size") or family.wide * hidden) if family.wide else c.required("intermediate_size")
        if family.fused:
            matrices.append(Matrix("ffn_gate_up", 2 * n, hidden, layers, "ffn"))
            matrices.append(Matrix("ffn_down", hidden, n, layers, "ffn"))
        else:
            gated("ffn", "ffn", n, layers - sparse)
        vectors = ((1 + family.gated) * n + hidden) * (layers - sparse) * c.flag("mlp_bias", False)
    if not sparse:
        return None, vectors, 0
    top_k = c.required("num_experts_per_tok", "experts_per_token", high=num_experts)
    n = c.required("moe_intermediate_size", "intermediate_size")
    matrices.append(Matrix("router", num_experts, hidden, sparse, "router"))
    gated("expert", "expert", n, sparse)
    shared = c.integer("n_shared_experts", _MAX_LAYERS, low=0) or 0
    if shared:
        gated("shared", "shared_expert", shared * n, sparse)
    else:
        own = c.integer("shared_expert_intermediate_size", low=0)  # qwen2_moe: one, behind a gate of its own
        if own:
            shared = 1
            gated("shared", "shared_expert", own, sparse)
            vectors += hidden * sparse
    vectors += num_experts * sparse * (family.sinks or family.router_bias)
    expert_vectors = (2 * n + hidden) * sparse * family.sinks
    return Experts(num_experts, top_k, sparse, shared, hidden, n), vectors, expert_vectors


def _sparse_layers(c: _Config, layers: int) -> int:
    """How many layers have experts."""
    first = c.integer("first_k_dense_replace", _MAX_LAYERS, low=0) or 0
    every = c.integer("moe_layer_freq", _MAX_LAYERS) or 1
    step = c.integer("decoder_sparse_step", _MAX_LAYERS) or 1
    dense = c.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or len(dense) > _MAX_LAYERS or not all(type(i) is int for i in dense):
        c.fail("mlp_only_layers", "a list of layer numbers", dense)
    skip = set(dense)
    return sum(i >= first and i % every == 0 and (i + 1) % step == 0 and i not in skip for i in range(layers))

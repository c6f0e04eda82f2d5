"""config.json of the families, counted by hand where no catalog row has them, and values that mean harm."""

import json

import pytest

from assay.catalog import load_model
from assay.errors import FormatError
from assay.formats.hf import load_config, spec_from_config

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 160, "max_position_embeddings": 512,
}  # fmt: skip
LAYER = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64  # q, o, k, v, gate, up, down
EMBEDDING = 160 * 64
BASE = 2 * EMBEDDING + 2 * (LAYER + 128) + 64


def spec(**changes):
    config = {k: v for k, v in (LLAMA | changes).items() if v is not ...}
    return spec_from_config(config, "m", "test")


def test_llama_by_hand():
    s = spec()
    assert s.num_params == BASE
    assert (s.tied_embedding, s.max_context, s.attention[0].head_dim) == (False, 512, 16)
    assert spec(tie_word_embeddings=True).num_params == BASE - EMBEDDING
    assert spec(num_key_value_heads=...).attention[0].num_kv_heads == 4
    assert spec(num_key_value_heads=None).attention[0].num_kv_heads == 4
    assert spec(max_position_embeddings=...).max_context is None
    assert spec(attention_bias=True).num_params == BASE + 2 * (64 + 32 + 32 + 64)
    assert spec(mlp_bias=True).num_params == BASE + 2 * (96 + 96 + 64)
    assert spec(head_dim=8).attention[0].kv_elements_per_token == 32


def test_families_vectors():
    assert spec(model_type="qwen2").num_params == BASE + 2 * (64 + 32 + 32)
    assert spec(model_type="qwen3", head_dim=16).num_params == BASE + 2 * 2 * 16
    assert spec(model_type="gemma2", head_dim=16).num_params == BASE - EMBEDDING + 2 * 2 * 64
    assert spec(model_type="gemma", head_dim=16).num_params == BASE - EMBEDDING
    assert spec(model_type="phi3").num_params == BASE
    assert {m.name for m in spec(model_type="phi3").matrices} == {
        "attn_qkv", "attn_output", "ffn_gate_up", "ffn_down", "token_embd", "lm_head"
    }  # fmt: skip
    assert spec(model_type="olmo-like", num_hidden_layers=2).num_params == BASE


def test_windows():
    def windows(**changes):
        return [(a.window, a.num_layers) for a in spec(num_hidden_layers=12, **changes).attention]

    assert windows() == [(None, 12)]
    assert windows(model_type="mistral", sliding_window=99) == [(99, 12)]
    assert windows(model_type="mistral", sliding_window=None) == [(None, 12)]
    assert windows(model_type="qwen2", sliding_window=99, max_window_layers=3) == [(None, 12)]
    assert windows(model_type="qwen2", sliding_window=99, use_sliding_window=True, max_window_layers=3) == [
        (None, 3), (99, 9)
    ]  # fmt: skip
    assert windows(model_type="gemma2", sliding_window=99) == [(99, 6), (None, 6)]
    assert windows(model_type="gemma3_text", sliding_window=99) == [(99, 10), (None, 2)]
    kinds = ["full_attention"] * 5 + ["sliding_attention"] * 7
    assert windows(model_type="gemma3_text", sliding_window=99, layer_types=kinds) == [(None, 5), (99, 7)]


def test_gemma3_nested_with_defaults_left_out():
    """As the published file of the 27B: the text model is nested and lacks what equals transformers' defaults."""
    inner = {"head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
             "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "sliding_window": 1024}  # fmt: skip
    s = spec_from_config({"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_size": 1}}, "g", "t")
    assert s.matrices == load_model("gemma-3-27b").matrices
    assert s.attention == load_model("gemma-3-27b").attention
    assert s.tied_embedding


def test_experts():
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    s = spec(model_type="qwen3_moe", head_dim=16, **moe)
    assert s.experts.num_layers == 2
    assert s.expert_params == 2 * 8 * 3 * 32 * 64
    assert s.num_params - s.active_params_per_token == s.expert_params * 6 // 8
    s = spec(model_type="qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1, 99], decoder_sparse_step=2, **moe)
    assert s.experts.num_layers == 2  # layers 1, 3, 5 by the step, less layer 1
    assert next(m for m in s.matrices if m.name == "ffn_up").count == 4
    s = spec(model_type="deepseek_v2", n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2,
             moe_intermediate_size=32, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None,
             qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)  # fmt: skip
    shapes = {m.name: (m.n, m.k, m.count) for m in s.matrices}
    assert shapes["attn_q"] == (4 * 12, 64, 2)
    assert shapes["attn_kv_a"] == (20, 64, 2)
    assert shapes["shared_up"] == (64, 64, 1)
    assert s.attention[0].kv_elements_per_token == 20
    assert spec(num_experts=0).experts is None
    s = spec(model_type="qwen2_moe", shared_expert_intermediate_size=48, **moe)
    assert next(m for m in s.matrices if m.name == "shared_up").n == 48


def test_unknown_family_says_so():
    assert "model_type 'brand_new', read as a llama" in spec(model_type="brand_new").source
    assert "model_type 'absent'" in spec(model_type=...).source
    assert spec().source == "test"


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
                                   "intermediate_size"])  # fmt: skip
@pytest.mark.parametrize(
    "value",
    [..., None, 0, -1, 1 << 70, 10**300, "4096", 4096.0, float("nan"), float("inf"), True, [1], [[[]]], {"a": 1}],
    ids=lambda v: "absent" if v is ... else repr(v)[:12],
)
def test_hostile_numbers(field, value):
    with pytest.raises(FormatError, match=rf"^test: {field}: expected an integer in 1\.\.\d+, got") as caught:
        spec(**{field: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads|num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "num_attention_heads: expected a divisor of hidden_size",
        ),
        ({"num_attention_heads": 5, "head_dim": 16}, "expected a divisor of num_heads = 5, got 2"),
        ({"num_experts": 8}, "num_experts_per_tok or experts_per_token: expected an integer in 1..8, got nothing"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok: expected an integer in 1..8, got 9"),
        ({"num_local_experts": -1}, "num_local_experts: expected an integer"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected a list of num_hidden_layers = 2"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: expected only full_attention and sli"),
        ({"layer_types": ["full_attention", ["x"]]}, "layer_types: expected only full_attention"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window: expected an integer, as layer_types"),
        ({"layer_types": 7}, "layer_types"),
        ({"sliding_window": "big"}, "sliding_window: expected an integer"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
        ({"model_type": ["llama"]}, "model_type: expected a string"),
        ({"text_config": [1]}, "text_config: expected an object"),
        ({"text_config": {}}, "num_hidden_layers: expected an integer"),
        ({"kv_lora_rank": 16}, "qk_rope_head_dim: expected an integer"),
        ({"num_experts": 4, "num_experts_per_tok": 1, "mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"num_experts": 4, "num_experts_per_tok": 1, "moe_layer_freq": [0, 1]}, "moe_layer_freq: expected an integer"),
        ({"max_position_embeddings": -5}, "max_position_embeddings"),
    ],
)
def test_hostile_fields(changes, message):
    with pytest.raises(FormatError, match=message):
        spec(**changes)


@pytest.mark.parametrize("config", [None, 3, "x", [LLAMA]])
def test_no_object(config):
    with pytest.raises(FormatError, match="expected a JSON object"):
        spec_from_config(config, "m", "test")


def test_loads_a_file(tmp_path):
    folder = tmp_path / "My Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert load_config(folder).name == "My Model"
    (folder / "config.json").write_text(json.dumps(LLAMA | {"_name_or_path": "org/Thing-7B/"}))
    s = load_config(folder / "config.json")
    assert s.name == "Thing-7B"
    assert s.num_params == BASE
    (folder / "config.json").write_text(json.dumps(LLAMA | {"_name_or_path": "bad\x1b[31m"}))
    assert load_config(folder).name == "My Model"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"not json", "expected JSON"),
        (b"\xff\xfe{\x00", "expected UTF-8, got byte 0xff at offset 0"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"hidden_size": NaN}', "NaN is no JSON number"),
        (b'{"hidden_size": -Infinity}', "-Infinity is no JSON number"),
        (b'{"num_hidden_layers": 1e999}', "num_hidden_layers: expected an integer"),
        (b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b'{"num_hidden_layers": ' + b"9" * 4000 + b"}", "num_hidden_layers: expected an integer"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "expected JSON"),
        (b" " * (16 << 20) + b"{}", "expected at most 16777216 bytes, got 16777218"),
    ],
    ids=range(12),
)
def test_hostile_files(tmp_path, raw, message):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_unreadable(tmp_path):
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.json")
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        load_config(tmp_path)
    with pytest.raises(FormatError, match="regular file"):
        load_config("/dev/zero")

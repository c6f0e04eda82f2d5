"""The model that a GGUF file holds: every architecture's shape, matrices and attention, and files that contradict themselves."""

from pathlib import Path

import numpy as np
import pytest

from assay.errors import FormatError
from assay.formats.gguf import model_spec, open_gguf, tensor_role
from test_formats_gguf import STRING, build, dense_tensors, kv, llama_keys, text, u32, write_model


def spec_of(tmp_path: Path, arch: str, keys: dict, tensors: dict, quant: str = "F16"):
    path = tmp_path / "m.gguf"
    write_model(path, arch, keys, tensors, quant)
    with open_gguf(path) as f:
        return model_spec(f)


def test_dense_llama(tmp_path):
    spec = spec_of(tmp_path, "llama", llama_keys(), dense_tensors(), "Q4_0")
    tensors = dense_tensors()
    assert spec.num_params == sum(int(np.prod(s)) for s in tensors.values())
    assert spec.stored_weight_bytes == sum(
        4 * s[0] if len(s) == 1 else s[0] * s[1] * 18 // 32 for s in tensors.values()
    )
    assert (spec.name, spec.tied_embedding, spec.max_context, spec.experts) == ("A llama", False, 512, None)
    assert (spec.attention[0].num_kv_heads, spec.attention[0].head_dim, spec.attention[0].window) == (2, 16, None)
    q = next(m for m in spec.matrices if m.name == "attn_q")
    assert (q.n, q.k, q.count, q.role, q.stored) == (64, 64, 2, "attention", {"Q4_0": 2})


@pytest.mark.parametrize("stacked", [True, False])
def test_mixtral(tmp_path, stacked):
    tensors = {n: s for n, s in dense_tensors().items() if "ffn_" not in n or "norm" in n}
    for i in range(2):
        tensors[f"blk.{i}.ffn_gate_inp.weight"] = (4, 64)
        for part, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            if stacked:
                tensors[f"blk.{i}.ffn_{part}_exps.weight"] = (4, *shape)
            else:  # as files were before experts were stacked
                tensors |= {f"blk.{i}.ffn_{part}.{e}.weight": shape for e in range(4)}
    spec = spec_of(tmp_path, "llama", llama_keys(expert_count=4, expert_used_count=2), tensors)
    assert spec.num_params == sum(int(np.prod(s)) for s in tensors.values())
    e = spec.experts
    assert (e.num_experts, e.experts_per_token, e.num_layers, e.num_shared, e.hidden, e.intermediate) == (
        4,
        2,
        2,
        0,
        64,
        96,
    )
    up = next(m for m in spec.matrices if m.name == "expert_up")
    assert (up.n, up.k, up.count, up.role, up.stored, up.stored_bytes) == (
        96,
        64,
        2,
        "expert",
        {"F16": 8},
        8 * 96 * 64 * 2,
    )
    assert spec.copies(up) == 8


def test_gpt_oss_biases_and_windows(tmp_path):
    tensors = {n: s for n, s in dense_tensors().items() if "ffn_" not in n or "norm" in n}
    for i in range(2):
        tensors |= {
            f"blk.{i}.attn_q.bias": (64,), f"blk.{i}.attn_sinks.weight": (4,),
            f"blk.{i}.ffn_gate_inp.weight": (4, 64), f"blk.{i}.ffn_gate_inp.bias": (4,),
            f"blk.{i}.ffn_gate_exps.weight": (4, 96, 64), f"blk.{i}.ffn_up_exps.weight": (4, 96, 64),
            f"blk.{i}.ffn_down_exps.weight": (4, 64, 96),
            f"blk.{i}.ffn_gate_exps.bias": (4, 96), f"blk.{i}.ffn_up_exps.bias": (4, 96),
            f"blk.{i}.ffn_down_exps.bias": (4, 64),
        }  # fmt: skip
    keys = llama_keys(expert_count=4, expert_used_count=2, attention__sliding_window=128, expert_feed_forward_length=96)
    spec = spec_of(tmp_path, "gpt-oss", keys, tensors)
    assert spec.num_params == sum(int(np.prod(s)) for s in tensors.values())
    assert spec.expert_vector_params == 2 * (96 + 96 + 64)
    assert [(a.window, a.num_layers) for a in spec.attention] == [(128, 1), (None, 1)]


def test_deepseek2_mla(tmp_path):
    keys = llama_keys(
        attention__head_count_kv=1, attention__q_lora_rank=32, attention__kv_lora_rank=32, rope__dimension_count=8,
        attention__key_length=40, attention__value_length=32, attention__key_length_mla=24,
        attention__value_length_mla=16, expert_count=4, expert_used_count=2, expert_shared_count=1,
        leading_dense_block_count=1,
    )  # fmt: skip
    tensors = {n: s for n, s in dense_tensors().items() if not any(p in n for p in ("attn_q.", "attn_k.", "attn_v."))}
    for part in ("gate", "up", "down"):
        del tensors[f"blk.1.ffn_{part}.weight"]
    for i in range(2):
        tensors |= {
            f"blk.{i}.attn_q_a.weight": (32, 64), f"blk.{i}.attn_q_b.weight": (4 * 24, 32),
            f"blk.{i}.attn_kv_a_mqa.weight": (40, 64), f"blk.{i}.attn_k_b.weight": (4, 32, 16),
            f"blk.{i}.attn_v_b.weight": (4, 16, 32), f"blk.{i}.attn_q_a_norm.weight": (32,),
        }  # fmt: skip
    for part, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
        tensors[f"blk.1.ffn_{part}_exps.weight"] = (4, *shape)
        tensors[f"blk.1.ffn_{part}_shexp.weight"] = shape
    tensors["blk.1.ffn_gate_inp.weight"] = (4, 64)
    spec = spec_of(tmp_path, "deepseek2", keys, tensors)
    assert spec.num_params == sum(int(np.prod(s)) for s in tensors.values())
    (a,) = spec.attention
    assert (a.kind, a.kv_elements_per_token, a.head_dim, a.v_head_dim) == ("mla", 40, 24, 16)
    assert spec.experts.num_layers == 1
    assert spec.experts.num_shared == 1
    shapes = {m.name: (m.n, m.k, m.count, m.role) for m in spec.matrices}
    assert shapes["attn_k_b"] == (128, 16, 2, "attention")
    assert shapes["attn_v_b"] == (64, 32, 2, "attention")
    assert shapes["shared_down"] == (64, 96, 1, "shared_expert")
    assert shapes["router"] == (4, 64, 1, "router")


def test_phi3_fused_and_tied(tmp_path):
    tensors = {"token_embd.weight": (160, 64), "rope_factors_long.weight": (8,)}
    for i in range(2):
        tensors |= {
            f"blk.{i}.attn_qkv.weight": (192, 64), f"blk.{i}.attn_output.weight": (64, 64),
            f"blk.{i}.ffn_up.weight": (192, 64), f"blk.{i}.ffn_down.weight": (64, 96),
        }  # fmt: skip
    spec = spec_of(tmp_path, "phi3", llama_keys(attention__head_count_kv=4), tensors)
    assert spec.tied_embedding
    assert {m.name: (m.n, m.k) for m in spec.matrices} == {
        "attn_qkv": (192, 64), "attn_output": (64, 64), "ffn_gate_up": (192, 64), "ffn_down": (64, 96),
        "lm_head": (160, 64),
    }  # fmt: skip
    assert spec.vector_params == 0  # a rotary table is no parameter
    assert spec.vector_bytes == 32


def test_per_layer_heads_and_patterns(tmp_path):
    tensors = dense_tensors() | {"blk.1.attn_k.weight": (64, 64), "blk.1.attn_v.weight": (64, 64)}
    keys = llama_keys(attention__head_count_kv=[2, 4], attention__sliding_window=9,
                      attention__sliding_window_pattern=[True, False])  # fmt: skip
    spec = spec_of(tmp_path, "llama", keys, tensors)
    assert [(a.num_kv_heads, a.window) for a in spec.attention] == [(2, 9), (4, None)]
    assert sum(m.name == "attn_k" for m in spec.matrices) == 2


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        ({"block_count": 3}, {}, "in each of 3 layers, got 2"),
        ({"block_count": 1}, {}, r"tensor 'blk.1.[a-z_.]+': expected a block below 1, got 1"),
        ({"block_count": 1 << 31}, {}, "block_count: expected at most the number of tensors, 21"),
        ({"embedding_length": 128, "attention.key_length": 16, "attention.value_length": 16}, {},
         "embedding_length = 128"),
        ({"embedding_length": 0}, {}, "embedding_length: expected a positive integer, got 0"),
        ({"attention.head_count": 8}, {}, r"attn_[qkv]: expected n = "),
        ({"attention.head_count": 0}, {}, "attention.head_count: expected a positive integer, got 0"),
        ({"attention.head_count_kv": 3}, {}, "num_kv_heads: expected a divisor|attn_k: expected n"),
        ({"attention.head_count_kv": [2, 0]}, {}, "expected attention in every layer"),
        ({"attention.head_count_kv": [2, 2, 2]}, {}, "head_count_kv: expected 2 integers"),
        ({"attention.head_count_kv": ["a", "b"]}, {}, "head_count_kv: expected 2 integers"),
        ({"expert_count": 4}, {}, "expert_count: expected expert matrices of one shape"),
        ({}, {"blk.1.attn_output.weight": None}, "attn_output"),
        ({}, {"blk.1.ffn_down.weight": None}, "ffn_down"),
        ({}, {"token_embd.weight": None}, "expected a tensor 'token_embd.weight'"),
        ({}, {"token_embd.weight": (160,)}, "'token_embd.weight': expected 2 dimensions"),
        ({}, {"token_embd.weight": (128, 64)}, "lm_head: n: expected vocab_size = 128, got 160"),
        ({}, {"blk.0.ffn_up_exps.weight": (3, 96, 64)}, "expected 0 experts"),
        ({}, {"blk.0.ffn_gate.weight": (96, 32)}, "ffn_gate: expected k = embedding_length = 64"),
    ],
)  # fmt: skip
def test_contradictions(tmp_path, keys, change, message):
    tensors = dense_tensors() | change
    tensors = {name: shape for name, shape in tensors.items() if shape is not None}
    with pytest.raises(FormatError, match=message):
        spec_of(tmp_path, "llama", llama_keys() | keys, tensors)


def test_no_model(tmp_path):
    path = tmp_path / "x.gguf"
    for raw, message in (
        (build(), "general.architecture: expected a string, got None"),
        (build([u32("general.architecture", 1)]), "general.architecture: expected a string, got 1"),
        (build([kv("general.architecture", STRING, text("llama")), kv("split.count", 2, b"\5\0")]), "one of 5 parts"),
        (build([kv("general.architecture", STRING, text("llama")), kv("llama.block_count", STRING, text("2"))]),
         "llama.block_count: expected an integer that is not negative, got '2'"),
    ):  # fmt: skip
        path.write_bytes(raw)
        with open_gguf(path) as f, pytest.raises(FormatError, match=message):
            model_spec(f)


def test_roles():
    assert tensor_role("blk.3.attn_kv_a_mqa.weight") == tensor_role("blk.3.attn_kv_a_mqa.weight")
    assert (tensor_role("blk.12.ffn_up.7.weight").name, tensor_role("blk.12.ffn_up.7.weight").layer) == (
        "expert_up",
        12,
    )
    assert tensor_role("output.weight").role == "lm_head"
    assert tensor_role("mm.patch.weight").role == "other"
    assert tensor_role("blk.0.attn_q.bias").role == "other"

"""Configurations of more families, each against the parameters its publisher counts; towers that see; what is refused."""

import pytest

from assay.errors import FormatError
from assay.formats.hf import spec_from_config

QWEN_VISION = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
LLAMA4 = {
    "model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "vocab_size": 202048, "num_experts_per_tok": 1,
}  # fmt: skip
#: Configuration, and billions of parameters as published (positions learnt by gpt2 and opt, and parallel norms, are left out).
FAMILIES = {
    "gpt2": ({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}, 0.124),
    "pythia-6.9b": ({"model_type": "gpt_neox", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
                     "intermediate_size": 16384, "vocab_size": 50432, "tie_word_embeddings": False}, 6.86),
    "opt-6.7b": ({"model_type": "opt", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_dim": 16384,
                  "vocab_size": 50272}, 6.66),
    "bloom-7b1": ({"model_type": "bloom", "n_layer": 30, "hidden_size": 4096, "n_head": 32, "vocab_size": 250880}, 7.07),
    "falcon-7b": ({"model_type": "falcon", "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71,
                   "multi_query": True, "vocab_size": 65024}, 6.92),
    "phi-2": ({"model_type": "phi", "num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32,
               "intermediate_size": 10240, "vocab_size": 51200}, 2.78),
    "starcoder2-7b": ({"model_type": "starcoder2", "num_hidden_layers": 32, "hidden_size": 4608, "num_attention_heads": 36,
                       "num_key_value_heads": 4, "intermediate_size": 18432, "vocab_size": 49152}, 7.17),
    "mpt-7b": ({"model_type": "mpt", "n_layers": 32, "d_model": 4096, "n_heads": 32, "vocab_size": 50432}, 6.65),
    "dbrx": ({"model_type": "dbrx", "n_layers": 40, "d_model": 6144, "n_heads": 48, "vocab_size": 100352,
              "attn_config": {"kv_n_heads": 8},
              "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752}}, 131.6),
    "llama-4-scout": ({"model_type": "llama4", "text_config": {**LLAMA4, "num_local_experts": 16, "interleave_moe_layer_step": 1}},
                      107.8),
    "llama-4-maverick": ({"model_type": "llama4",
                          "text_config": {**LLAMA4, "num_local_experts": 128, "interleave_moe_layer_step": 2}}, 400.7),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters(name):
    config, billions = FAMILIES[name]
    assert spec_from_config(config, name, "here").num_params / 1e9 == pytest.approx(billions, rel=4e-3)


def test_active_parameters():
    for name in ("llama-4-scout", "llama-4-maverick"):
        assert spec_from_config(FAMILIES[name][0], name, "here").active_params_per_token / 1e9 == pytest.approx(
            17.2, abs=0.1
        )
    assert spec_from_config(FAMILIES["dbrx"][0], "dbrx", "here").active_params_per_token / 1e9 == pytest.approx(
        36.5, abs=0.1
    )


TEXT = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": 100}  # fmt: skip


@pytest.mark.parametrize(
    ("outer", "vision", "tokens", "merge", "temporal"),
    [
        ({}, QWEN_VISION, None, 2, 2),
        ({}, {"hidden_size": 1024, "image_size": 336, "patch_size": 14, "num_hidden_layers": 24}, 576, 1, 1),
        ({"mm_tokens_per_image": 256}, {"hidden_size": 1152, "image_size": 896, "patch_size": 14}, 256, 1, 1),
    ],
)
def test_towers(outer, vision, tokens, merge, temporal):
    seen = spec_from_config({**outer, "text_config": TEXT, "vision_config": vision}, "x", "here").vision
    assert (seen.patch, seen.tokens, seen.merge, seen.temporal) == (14, tokens, merge, temporal)


def test_a_tower_is_counted():
    # Qwen2.5-VL: 676 million in all, of which 630 are in its blocks.
    assert (
        spec_from_config({"text_config": TEXT, "vision_config": QWEN_VISION}, "x", "here").vision.params == 629_964_800
    )
    assert spec_from_config(TEXT, "x", "here").vision is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"state_size": 16}, "state_size"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
        ({"num_attention_heads": 5, "head_dim": 16, "num_key_value_heads": 2}, "num_kv_heads"),
        ({"num_local_experts": 4, "num_experts_per_tok": 8}, "experts_per_tok"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vision_config": {"patch_size": 0}}, "patch_size"),
        ({"vision_config": {"patch_size": 14, "spatial_merge_size": -1}}, "spatial_merge_size"),
    ],
)
def test_what_is_refused(change, word):
    with pytest.raises(FormatError, match=word):
        spec_from_config({**TEXT, **change}, "x", "here")

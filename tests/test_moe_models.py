"""Blocks of transformers' models, routers and experts, beside moe_route and moe_experts on the same weights."""

from importlib import import_module

import numpy as np
import pytest

import assay

HIDDEN, INTERMEDIATE, TOKENS = 64, 96, 21

# name: block, config, E, k, arguments of the config, of moe_route. A block whose router has a bias names where it lies.
MODELS = {
    "mixtral": ("MixtralSparseMoeBlock", "MixtralConfig", 8, 2, {}, {}),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", 32, 8, {"norm_topk_prob": True}, {}),
    "olmoe": ("OlmoeSparseMoeBlock", "OlmoeConfig", 16, 4, {}, {"renormalize": False}),
    "gpt_oss": ("GptOssMLP", "GptOssConfig", 8, 4, {}, {"scoring": "softmax_topk", "bias": "router.bias"}),
    "minimax_m2": ("MiniMaxM2SparseMoeBlock", "MiniMaxM2Config", 16, 3, {},
                   {"scoring": "sigmoid", "bias": "e_score_correction_bias"}),
    "deepseek_v3": ("DeepseekV3MoE", "DeepseekV3Config", 32, 6,
                    {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 2.5, "n_shared_experts": 1},
                    {"scoring": "sigmoid", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 2.5, "num_shared": 1,
                     "bias": "gate.e_score_correction_bias"}),
    "llama4": ("Llama4TextMoe", "Llama4TextConfig", 8, 1, {},
               {"scoring": "sigmoid", "renormalize": False, "num_shared": 1}),
}  # fmt: skip


def config_of(transformers, name, kind, experts, top_k, options):
    """A tiny config; each model has its own names for the number of experts and their width."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 4, "num_hidden_layers": 1, "num_experts_per_tok": top_k}
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        sizes[key] = experts
    sizes["intermediate_size"] = sizes["moe_intermediate_size"] = INTERMEDIATE
    made = getattr(transformers, kind)(**sizes, **options)
    made._experts_implementation = "eager"
    return made


def layer(experts, rng, interleaved=False, biased=False):
    """Packed experts, and what they stand for in the source's order of rows: gate_up [E, 2 I, H], down [E, H, I], biases."""
    gate_up = rng.standard_normal((experts, 2 * INTERMEDIATE, HIDDEN)).astype(np.float32) / np.sqrt(np.float32(HIDDEN))
    down = rng.standard_normal((experts, HIDDEN, INTERMEDIATE)).astype(np.float32) / np.sqrt(np.float32(INTERMEDIATE))
    options = {}
    if biased:
        options = {"activation": "swiglu_oai", "limit": 7.0}
        options["gate_up_bias"] = rng.standard_normal((experts, 2 * INTERMEDIATE)).astype(np.float32)
        options["down_bias"] = rng.standard_normal((experts, HIDDEN)).astype(np.float32)
    packed = assay.quantize_experts(gate_up, down, interleaved=interleaved, **options)
    matrices = [packed.expert(e) for e in range(experts)]
    units = np.stack([m[0].dequantize() for m in matrices]).reshape(experts, -1, 2, 16, HIDDEN)
    gate, up = (units[:, :, i].reshape(experts, -1, HIDDEN)[:, :INTERMEDIATE] for i in (0, 1))
    both = np.stack([gate, up], 2).reshape(gate_up.shape) if interleaved else np.concatenate([gate, up], 1)
    return packed, both, np.stack([m[1].dequantize() for m in matrices]), options


def put(torch, parameter, values):
    """Sets a parameter, transposed where the model holds it so."""
    flip = values.ndim == 3 and tuple(parameter.shape) == values.transpose(0, 2, 1).shape != values.shape
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values.transpose(0, 2, 1) if flip else values)))


def fill(torch, block, experts, gate_up, down, router):
    """The routed experts', the router's and, of one more expert, the shared expert's weights."""
    put(torch, block.experts.gate_up_proj, gate_up[:experts])
    put(torch, block.experts.down_proj, down[:experts])
    put(torch, (block.router if hasattr(block, "router") else block.gate).weight, router)
    if len(gate_up) > experts:
        shared = block.shared_expert if hasattr(block, "shared_expert") else block.shared_experts
        put(torch, shared.gate_proj.weight, gate_up[experts, :INTERMEDIATE])
        put(torch, shared.up_proj.weight, gate_up[experts, INTERMEDIATE:])
        put(torch, shared.down_proj.weight, down[experts])


@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_transformers_agrees(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    block_name, config_name, experts, top_k, config, routing = MODELS[name]
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    block = getattr(module, block_name)(config_of(transformers, name, config_name, experts, top_k, config)).eval()
    rng = np.random.default_rng([experts, top_k])
    routing, gpt_oss = dict(routing), name == "gpt_oss"
    packed, gate_up, down, biases = layer(experts + routing.get("num_shared", 0), rng, gpt_oss, gpt_oss)
    router = rng.standard_normal((experts, HIDDEN)).astype(np.float32) / 8
    fill(torch, block, experts, gate_up, down, router)
    if gpt_oss:
        put(torch, block.experts.gate_up_proj_bias, biases["gate_up_bias"])
        put(torch, block.experts.down_proj_bias, biases["down_bias"])
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    logits = x @ router.T
    if "bias" in routing:
        bias = rng.standard_normal(experts).astype(np.float32) * np.float32(0.1)
        put(torch, block.get_parameter(routing["bias"]) if gpt_oss else block.get_buffer(routing["bias"]), bias)
        routing["bias"] = bias
        if gpt_oss:  # it is of the logits
            logits = logits + routing.pop("bias")
    with torch.no_grad():
        found = block(torch.from_numpy(x)[None])
    want = (found[0] if isinstance(found, tuple) else found).reshape(TOKENS, HIDDEN).numpy()
    route = assay.moe_route(logits, top_k, **routing)
    got = assay.moe_experts(
        x, route.topk_ids, route.topk_weights, packed, a16=True, weights_on_input=name == "llama4"
    )  # fmt: skip
    # Both sum in float32, K <= 96 products of total size < 40, a handful of outputs: 112 * 2^-24 * 40 < 3e-4.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-4)

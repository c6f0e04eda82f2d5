"""The expert layer: variants and twin bit for bit, the reference, a float64 bound, batches, empty slots."""

import numpy as np
import pytest

import assay
from bf16 import BFloat16
from moe_bound import bounded_layer

OP = "moe_experts"

# name: E, H, I, k, options. Sizes off the tile of 32 and off the 16 units of a gate tile, groups of every kind.
LAYERS = {
    "silu": (5, 64, 48, 3, {"down_group_size": 48}),
    "odd_sizes": (3, 40, 23, 2, {"group_size": 40, "down_group_size": 23}),
    "gelu": (4, 96, 33, 2, {"activation": "gelu", "down_group_size": 33, "symmetric": False}),
    "gelu_tanh": (7, 64, 64, 7, {"activation": "gelu_tanh", "interleaved": True}),
    "gpt_oss": (6, 64, 80, 4, {"activation": "swiglu_oai", "interleaved": True, "limit": 1.5, "bias": True,
                               "down_group_size": 80}),
    "relu": (3, 32, 64, 1, {"activation": "relu", "group_size": 32}),
    "relu2_ungated": (4, 64, 45, 2, {"activation": "relu2", "gated": False, "down_group_size": 45, "bias": True}),
    "clamped_silu": (4, 128, 32, 2, {"limit": 0.5, "group_size": 128, "down_group_size": 32, "bias": True}),
}  # fmt: skip


def weights_of(experts, hidden, intermediate, gated=True, seed=0):
    rng = np.random.default_rng([seed, experts, hidden, intermediate])
    gate_up = rng.standard_normal((experts, (2 if gated else 1) * intermediate, hidden)) / np.sqrt(hidden)
    down = rng.standard_normal((experts, hidden, intermediate)) / np.sqrt(intermediate)
    return gate_up.astype(np.float32), down.astype(np.float32)


def layer_of(name):
    experts, hidden, intermediate, top_k, options = LAYERS[name]
    options = dict(options)
    gate_up, down = weights_of(experts, hidden, intermediate, options.get("gated", True))
    if options.pop("bias", False):
        rng = np.random.default_rng(7)
        options["gate_up_bias"] = rng.standard_normal(gate_up.shape[:2]).astype(np.float32)
        options["down_bias"] = rng.standard_normal((experts, hidden)).astype(np.float32)
    return assay.quantize_experts(gate_up, down, options.pop("group_size", 32), **options), top_k


def inputs(packed, tokens, top_k, seed=0, holes=True):
    rng = np.random.default_rng([seed, tokens, top_k])
    experts = packed.shape.num_experts
    x = rng.standard_normal((tokens, packed.shape.hidden)).astype(np.float32)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    if holes and tokens > 6:
        ids[1, 0], ids[3], ids[4, -1] = -1, -1, experts
    return x, ids, rng.random((tokens, top_k)).astype(np.float32)


# 29 tokens: a few rows an expert; 300: blocks of many rows, and more of them than a slab of outputs holds.
@pytest.mark.parametrize("tokens", [29, 300])
@pytest.mark.parametrize("a16", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_variant_and_the_twin_have_portable_c_s_bits(variant, name, a16, tokens):
    packed, top_k = layer_of(name)
    x, ids, w = inputs(packed, tokens, top_k)
    want = assay.moe_experts(x, ids, w, packed, a16=a16, isa="scalar")
    np.testing.assert_array_equal(assay.moe_experts(x, ids, w, packed, a16=a16, isa=variant), want)
    if variant == "scalar":
        np.testing.assert_array_equal(assay.moe_experts(x, ids, w, packed, a16=a16, backend="numba"), want)


# ---- against float64 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a16", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "hidden", "intermediate"), [(8, 2, 256, 896), (128, 8, 128, 64)])
def test_mixtral_and_qwen3_shaped_layers_are_within_the_bound(variant, experts, top_k, hidden, intermediate, a16):
    packed = assay.quantize_experts(*weights_of(experts, hidden, intermediate), symmetric=experts == 8)
    x, _, _ = inputs(packed, 19, top_k)
    logits = np.random.default_rng(3).standard_normal((19, experts)).astype(np.float32)
    route = assay.moe_route(logits, top_k)
    got = assay.moe_experts(x, route.topk_ids, route.topk_weights, packed, a16=a16, isa=variant)
    want, bound = bounded_layer(x, route.topk_ids, route.topk_weights, packed, a16)
    assert (np.abs(got - want) <= bound).all()
    # A worst case, where errors would all add up; they do not, so a tighter second line: int8 steps are 1/254 of the largest.
    rms = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
    assert rms < (1e-5 if a16 else 0.02)


@pytest.mark.parametrize("name", LAYERS)
def test_activations_agree_with_the_reference(name):
    packed, top_k = layer_of(name)
    x, ids, w = inputs(packed, 17, top_k)
    got = assay.moe_experts(x, ids, w, packed, a16=True)
    want = assay.moe_experts(x, ids, w, packed, a16=True, backend="reference")
    # The GEMMs are the reference's to the bit; the activations differ by their polynomials' 4e-7, of outputs of size 10.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a16", [False, True])
def test_a_token_has_the_same_bits_alone_and_among_others(variant, a16):
    packed, top_k = layer_of("gpt_oss")
    x, ids, w = inputs(packed, 70, top_k)
    want = assay.moe_experts(x, ids, w, packed, a16=a16, isa=variant)
    for t in (0, 1, 3, 33, 69):
        one = slice(t, t + 1)
        alone = assay.moe_experts(x[one], ids[one], w[one], packed, a16=a16, isa=variant, num_threads=1)
        np.testing.assert_array_equal(alone, want[one])
    for threads in (1, 2, 3):
        again = assay.moe_experts(x, ids, w, packed, a16=a16, isa=variant, num_threads=threads)
        np.testing.assert_array_equal(again, want)
    reverse = assay.moe_experts(x[::-1].copy(), ids[::-1].copy(), w[::-1].copy(), packed, a16=a16, isa=variant)
    np.testing.assert_array_equal(reverse, want[::-1])


def test_one_expert_gets_all(variant):
    packed, _ = layer_of("silu")
    x, _, w = inputs(packed, 301, 1)  # more rows than a thread keeps of a tile at a time
    ids = np.full((301, 1), 3, np.int32)
    got, cost = assay.moe_experts(x, ids, w, packed, return_cost=True, isa=variant)
    assert cost.tokens_per_expert.tolist() == [0, 0, 0, 301, 0]
    assert cost.distinct_experts == 1
    for t in (0, 127, 128, 129, 300):
        one = slice(t, t + 1)
        np.testing.assert_array_equal(assay.moe_experts(x[one], ids[one], w[one], packed, isa=variant), got[one])


def test_every_expert_of_every_token(variant):
    packed, top_k = layer_of("gelu_tanh")
    assert top_k == packed.shape.num_experts
    x, ids, w = inputs(packed, 9, top_k, holes=False)
    _, cost = assay.moe_experts(x, ids, w, packed, return_cost=True, isa=variant)
    assert cost.tokens_per_expert.tolist() == [9] * top_k
    assert cost.weight_bytes == packed.nbytes


def test_no_tokens_and_no_experts_chosen(variant):
    packed, top_k = layer_of("silu")
    x, ids, w = inputs(packed, 4, top_k)
    assert assay.moe_experts(x[:0], ids[:0], w[:0], packed, isa=variant).shape == (0, 64)
    out = np.full((4, 64), 9, np.float32)
    assert assay.moe_experts(x, np.full_like(ids, -1), w, packed, out, isa=variant) is out
    np.testing.assert_array_equal(out, 0)


def test_an_empty_slot_adds_nothing_whatever_its_weight(variant):
    packed, _ = layer_of("silu")
    x, ids, w = inputs(packed, 8, 2, holes=False)
    want = assay.moe_experts(x, ids[:, :1].copy(), w[:, :1].copy(), packed, isa=variant)
    for hole in (-1, 5, 2**31 - 1, -(2**31)):
        ids[:, 1], w[:, 1] = hole, np.nan
        np.testing.assert_array_equal(assay.moe_experts(x, ids, w, packed, isa=variant), want)


@pytest.mark.parametrize("a16", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_poisoned_token_comes_out_nan_and_harms_no_other(variant, bad, a16):
    packed, top_k = layer_of("clamped_silu")
    x, ids, w = inputs(packed, 12, top_k, holes=False)
    clean = assay.moe_experts(x, ids, w, packed, a16=a16, isa=variant)
    x[5, 7] = bad
    got = assay.moe_experts(x, ids, w, packed, a16=a16, isa=variant)
    keep = np.arange(12) != 5
    np.testing.assert_array_equal(got[keep], clean[keep])
    if not a16 or np.isnan(bad):
        assert np.isnan(got[5]).all()


# ---- options --------------------------------------------------------------------------------------------------------


def test_half_precision_tokens_are_widened_exactly(variant):
    packed, top_k = layer_of("silu")
    x, ids, w = inputs(packed, 9, top_k)
    for given, wide in ((x.astype(np.float16), x.astype(np.float16).astype(np.float32)),
                        (BFloat16(x), BFloat16(x).widened())):  # fmt: skip
        for on_input in (False, True):
            got = assay.moe_experts(given, ids, w, packed, weights_on_input=on_input, isa=variant)
            want = assay.moe_experts(wide, ids, w, packed, weights_on_input=on_input, isa=variant)
            np.testing.assert_array_equal(got, want)


def test_weights_on_the_input_scale_the_token(variant):
    packed, _ = layer_of("silu")
    x, ids, w = inputs(packed, 9, 2)
    got = assay.moe_experts(x, ids, w, packed, weights_on_input=True, isa=variant)
    want = np.zeros_like(got)
    for j in range(2):  # one slot at a time, of a token scaled beforehand; -1 slots add nothing
        part = assay.moe_experts(x * w[:, j, None], ids[:, j, None].copy(), np.ones((9, 1), np.float32), packed)
        want += part
    np.testing.assert_array_equal(got, want)
    twin = assay.moe_experts(x, ids, w, packed, weights_on_input=True, backend="numba")
    np.testing.assert_array_equal(got, twin)


def test_shared_experts_are_slots_of_their_own(variant):
    packed, _ = layer_of("gpt_oss")
    x, ids, w = inputs(packed, 9, 3)
    ids[ids >= 4] -= 4
    share = np.linspace(0.1, 1, 9, dtype=np.float32)
    got = assay.moe_experts(x, ids, w, packed, num_shared=2, shared_weight=share, isa=variant)
    all_ids = np.concatenate([ids, np.tile(np.int32([4, 5]), (9, 1))], axis=1)
    all_w = np.concatenate([w, share[:, None], share[:, None]], axis=1)
    np.testing.assert_array_equal(got, assay.moe_experts(x, all_ids, all_w, packed, isa=variant))


def test_an_expert_map_keeps_this_rank_s_experts(variant):
    packed, top_k = layer_of("gelu_tanh")
    x, ids, w = inputs(packed, 9, top_k)
    table = np.array([-1, 2, -1, 0, 1, -1, 3], np.int32)
    local = np.where((ids >= 0) & (ids < 7), table[np.clip(ids, 0, 6)], -1)
    want = assay.moe_experts(x, local, w, packed, isa=variant)
    for options in ({"isa": variant}, {"backend": "numba"}):
        np.testing.assert_array_equal(assay.moe_experts(x, ids, w, packed, expert_map=table, **options), want)


def test_the_cost_of_a_call():
    packed, top_k = layer_of("silu")
    x, ids, w = inputs(packed, 29, top_k)
    _, cost = assay.moe_experts(x, ids, w, packed, return_cost=True)
    counts = np.bincount(ids[(ids >= 0) & (ids < 5)], minlength=5)
    np.testing.assert_array_equal(cost.tokens_per_expert, counts)
    assert cost.weight_bytes == np.count_nonzero(counts) * packed.expert_bytes
    assert cost.row_blocks >= np.count_nonzero(counts)
    assert cost.padded_rows >= 0


@pytest.mark.parametrize("name", ["silu", "odd_sizes", "relu2_ungated"])
def test_reads_and_writes_nothing_beyond_the_arrays(variant, guarded, name):
    packed, top_k = layer_of(name)
    x, ids, w = (guarded(a) for a in inputs(packed, 9, top_k))
    out = guarded(np.zeros((9, packed.shape.hidden), np.float32))
    for a16 in (False, True):
        got = assay.moe_experts(x, ids, w, packed, out, a16=a16, isa=variant)
        np.testing.assert_array_equal(got, assay.moe_experts(x.copy(), ids, w, packed, a16=a16, isa="scalar"))


def test_bad_arguments_say_got_and_wanted():
    packed, top_k = layer_of("silu")
    x, ids, w = inputs(packed, 9, top_k)
    up_q, up_s, _ = packed.expert(0)[0].unpack()
    down_q, down_s, _ = packed.expert(0)[1].unpack()
    q = (up_q[None], up_s[None], down_q[None], down_s[None])
    cases = [
        (TypeError, "experts: expected PackedExperts", lambda: assay.moe_experts(x, ids, w, up_q)),
        (ValueError, r"x: expected \[T, H\] with H = 64, got \[9, 63\]",
         lambda: assay.moe_experts(x[:, 1:].copy(), ids, w, packed)),
        (TypeError, "topk_ids: expected int32, got int64", lambda: assay.moe_experts(x, ids.astype(int), w, packed)),
        (ValueError, r"topk_ids: expected \[T, k\] with T = 9", lambda: assay.moe_experts(x, ids[1:], w[1:], packed)),
        (ValueError, r"topk_weights: expected \[9, 3\]", lambda: assay.moe_experts(x, ids, w[:, 1:], packed)),
        (ValueError, r"expert_map: expected entries below E = 5",
         lambda: assay.moe_experts(x, ids, w, packed, expert_map=np.int32([5]))),
        (ValueError, "num_shared: expected 0..E = 0..5", lambda: assay.moe_experts(x, ids, w, packed, num_shared=6)),
        (ValueError, "out: expected memory of its own", lambda: assay.moe_experts(x, ids, w, packed, x)),
        (ValueError, "out: expected shape", lambda: assay.moe_experts(x, ids, w, packed, np.zeros((9, 1), np.float32))),
        (ValueError, "backend: expected one of", lambda: assay.moe_experts(x, ids, w, packed, backend="cuda")),
        (assay.UnsupportedError, "isa='neon' is not available", lambda: assay.moe_experts(x, ids, w, packed, isa="neon")),
        (ValueError, "activation: expected one of", lambda: assay.pack_experts(*q, activation="tanh")),
        (ValueError, "gated: expected True with", lambda: assay.pack_experts(*q, activation="swiglu_oai", gated=False)),
        (ValueError, r"down_qweight: expected \[E, H, ceil\(I / 2\)\]", lambda: assay.pack_experts(*q, gated=False)),
        (ValueError, "limit: expected a finite number", lambda: assay.pack_experts(*q, limit=-1)),
        (ValueError, r"gate_up_bias: expected \[1, 96\]",
         lambda: assay.pack_experts(*q, gate_up_bias=np.zeros((1, 95), np.float32))),
        (ValueError, "gate_up_scales: expected", lambda: assay.pack_experts(q[0], q[1][:, 1:], *q[2:])),
        (ValueError, "gate_up, down: expected as many experts, at least one, got 0 and 0",
         lambda: assay.quantize_experts(np.zeros((0, 64, 32), np.float32), np.zeros((0, 32, 32), np.float32))),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()

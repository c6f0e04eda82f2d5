"""Routers beyond a softmax: scores, bias, groups, scaling, shared experts; every backend against the reference."""

import numpy as np
import pytest

import assay
from assay import reference
from bf16 import BFloat16

OP = "moe_route"

DEEPSEEK_V3 = {"scoring": "sigmoid", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
ROUTERS = {
    "deepseek_v2": (160, 6, {"n_group": 8, "topk_group": 3, "renormalize": False, "routed_scaling_factor": 16.0}),
    "deepseek_v3": (256, 8, {**DEEPSEEK_V3, "bias": True, "num_shared": 1}),
    "deepseek_v4": (256, 6, {"scoring": "sqrtsoftplus", "bias": True, "routed_scaling_factor": 1.5}),
    "sigmoid": (128, 8, {"scoring": "sigmoid"}),
    "llama4": (16, 1, {"scoring": "sigmoid", "renormalize": False}),
    "gpt_oss": (32, 4, {"scoring": "softmax_topk"}),
    "logits": (40, 3, {"scoring": "none"}),
    "softmax_bias": (24, 5, {"bias": True}),
    "softmax_bias_all": (24, 5, {"bias": True, "renormalize": False}),
    "shared": (8, 2, {"num_shared": 2, "shared_weight": 0.5, "routed_scaling_factor": 3.0}),
    "shared_wide": (64, 8, {"num_shared": 3, "renormalize": False}),
    "odd": (45, 7, {"scoring": "sigmoid", "n_group": 5, "topk_group": 2, "bias": True, "group_score": "max"}),
    "all": (17, 17, {"scoring": "sqrtsoftplus"}),
    "widest": (2048, 9, {"scoring": "sigmoid", "bias": True, "n_group": 4, "topk_group": 2}),
    "past_the_copy": (2500, 4, {"scoring": "sigmoid"}),
}


def case(name, tokens=23, dtype="float32", ties=False):
    experts, top_k, options = ROUTERS[name]
    rng = np.random.default_rng([experts, top_k, tokens])
    x = rng.standard_normal((tokens, experts)) * 2
    options = dict(options)
    if options.get("bias"):
        options["bias"] = np.round(rng.standard_normal(experts) * 0.2, 1 if ties else 6).astype(np.float32)
    return (np.round(x) if ties else x).astype(dtype), top_k, options


def poison(x):
    x[2] = -np.inf
    x[3, : x.shape[1] - 1] = -np.inf
    x[4, -1] = np.nan
    x[5, 0] = np.inf
    return x


def expected(x, top_k, options):
    o = dict(options)
    renormalize = o.pop("renormalize", o.get("scoring") != "none")
    bias = o.get("bias")
    return reference.moe_route(
        x, top_k, renormalize, o.get("scoring", "softmax"), bias, o.get("n_group", 1), o.get("topk_group", 1),
        o.get("group_score", "top2" if bias is not None else "max") == "top2", o.get("routed_scaling_factor", 1.0),
        o.get("num_shared", 0), o.get("shared_weight", 1.0),
    )  # fmt: skip


def assert_same(got, want):
    for name, a, b in zip(got._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("name", ROUTERS)
def test_variant_equals_portable_c_and_the_reference(variant, name):
    for ties in (False, True):
        x, top_k, options = case(name, ties=ties)
        poison(x)
        got = assay.moe_route(x, top_k, isa=variant, **options)
        assert_same(got, assay.moe_route(x, top_k, isa="scalar", **options))
        if ties and options.get("bias") is not None:
            continue  # float64 breaks ties of float32 keys
        weights, ids, status = expected(x, top_k, options)
        np.testing.assert_array_equal(got.status, status)
        np.testing.assert_array_equal(got.topk_ids, ids)
        # vexp 1.7e-7, its argument |d| 2^-24 with |d| < 20 here, at most 128 additions a lane, a handful of roundings.
        np.testing.assert_allclose(got.topk_weights, weights, rtol=2 * 1.7e-7 + (20 + 128 + 24) * 2.0**-24)


@pytest.mark.parametrize("name", ROUTERS)
def test_numba_twin_has_the_same_bits(name):
    x, top_k, options = case(name, 11, ties=True)
    poison(x)
    want = assay.moe_route(x, top_k, **options)
    assert_same(assay.moe_route(x, top_k, backend="numba", **options), want)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "shared", "llama4", "odd"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_widened_exactly(variant, name, dtype):
    x, top_k, options = case(name, 9)
    x = BFloat16(x) if dtype == "bfloat16" else x.astype(np.float16)
    wide = x.widened() if dtype == "bfloat16" else x.astype(np.float32)
    assert_same(assay.moe_route(x, top_k, isa=variant, **options), assay.moe_route(wide, top_k, **options))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "shared", "shared_wide", "widest"])
def test_emulated_avx512_equals_portable_c(monkeypatch, emulated_calls, name):
    x, top_k, options = case(name)
    poison(x)
    want = assay.moe_route(x, top_k, isa="scalar", **options)
    monkeypatch.setattr("assay.ops.moe.calls", emulated_calls)
    assert_same(assay.moe_route(x, top_k, isa="avx512vnni", **options), want)


@pytest.mark.parametrize("name", ["deepseek_v3", "shared", "softmax_bias_all"])
def test_a_row_has_the_same_bits_alone_and_among_others(name):
    x, top_k, options = case(name, 300)
    want = assay.moe_route(x, top_k, **options)
    for t in (0, 7, 299):
        alone = assay.moe_route(x[t : t + 1], top_k, num_threads=1, **options)
        assert_same(alone, [a[t : t + 1] for a in want])


def test_groups_outside_are_minus_infinity_and_not_zero():
    """Negative keys: a mask of 0 would be chosen before them (the mistake of several implementations)."""
    x = np.array([[-1, -2, -3, -4, -9, -9, -9, -9]], np.float32)
    got = assay.moe_route(x, 4, scoring="none", n_group=2, topk_group=1)
    np.testing.assert_array_equal(got.topk_ids, [[0, 1, 2, 3]])


def test_group_score_is_the_two_largest_with_a_bias_and_the_largest_without():
    x = np.array([[5, -9, 4, 3.5]], np.float32)
    options = {"scoring": "none", "n_group": 2, "topk_group": 1}
    zero = np.zeros(4, np.float32)
    assert assay.moe_route(x, 2, **options).topk_ids.tolist() == [[0, 1]]
    assert assay.moe_route(x, 2, bias=zero, **options).topk_ids.tolist() == [[2, 3]]
    assert assay.moe_route(x, 2, bias=zero, group_score="max", **options).topk_ids.tolist() == [[0, 1]]
    tied = np.array([[1, 0, 1, 0]], np.float32)
    assert assay.moe_route(tied, 2, **options).topk_ids.tolist() == [[0, 1]]


def test_weights_are_the_score_alone_even_where_the_bias_drowns_it(variant):
    x = np.array([[-30.0, -31, 2, 3]], np.float32)
    bias = np.array([100, 100, 0, 0], np.float32)
    got = assay.moe_route(x, 2, False, scoring="sigmoid", bias=bias, isa=variant)
    np.testing.assert_array_equal(got.topk_ids, [[0, 1]])
    np.testing.assert_allclose(got.topk_weights, [[np.exp(-30.0), np.exp(-31.0)]], rtol=1e-5)


def test_a_bias_that_masks_every_expert_leaves_empty_slots(variant):
    x, bias = np.zeros((2, 5), np.float32), np.full(5, -np.inf, np.float32)
    for scoring in ("softmax", "sigmoid", "none"):
        for options in ({"isa": variant}, {"backend": "numba"}, {"backend": "reference"}):
            got = assay.moe_route(x, 3, scoring=scoring, bias=bias, **options)
            assert (got.topk_ids == -1).all()
            assert (got.topk_weights == 0).all()
            assert (got.status == 0).all()


def test_minus_infinity_masks_an_expert_whatever_its_bias_and_a_bias_can_mask(variant):
    x = np.array([[-np.inf, 1, 2, 0]], np.float32)
    bias = np.array([9, 0, -np.inf, 0], np.float32)
    got = assay.moe_route(x, 4, scoring="sigmoid", bias=bias, isa=variant)
    np.testing.assert_array_equal(got.topk_ids, [[1, 3, -1, -1]])
    np.testing.assert_array_equal(got.topk_weights[0, 2:], 0)
    nobody = assay.moe_route(x, 2, scoring="sigmoid", bias=np.full(4, -np.inf, np.float32), isa=variant)
    np.testing.assert_array_equal(nobody.topk_ids, [[-1, -1]])
    np.testing.assert_array_equal(nobody.topk_weights, 0)


def test_softmax_renormalised_is_top_k_then_softmax():
    x, _, _ = case("sigmoid")
    assert_same(assay.moe_route(x, 8, scoring="softmax_topk"), assay.moe_route(x, 8, True))


@pytest.mark.parametrize("experts", [8, 40])
@pytest.mark.parametrize("tokens", [1, 8, 11])
def test_shared_slots_are_written_within_bounds(variant, guarded, experts, tokens):
    x = guarded(np.random.default_rng(0).standard_normal((tokens, experts)).astype(np.float32))
    out = tuple(guarded(np.full((tokens, 5), 7, d)) for d in (np.float32, np.int32)) + (np.zeros(tokens, np.int32),)
    got = assay.moe_route(x, 2, out=out, num_shared=3, shared_weight=0.25, isa=variant)
    plain = assay.moe_route(x, 2, isa=variant)
    np.testing.assert_array_equal(got.topk_ids[:, :2], plain.topk_ids)
    np.testing.assert_array_equal(got.topk_weights[:, :2], plain.topk_weights)
    np.testing.assert_array_equal(got.topk_ids[:, 2:], np.tile(np.arange(experts, experts + 3), (tokens, 1)))
    np.testing.assert_array_equal(got.topk_weights[:, 2:], 0.25)


def test_bad_arguments_say_got_and_wanted():
    x = np.zeros((3, 8), np.float32)
    wide = np.zeros((1, 2050), np.float32)
    cases = [
        ("scoring: expected one of softmax", {"scoring": "tanh"}),
        ("renormalize: expected False with scoring='none'", {"scoring": "none", "renormalize": True}),
        ("n_group: expected a divisor of E = 8, got 3", {"n_group": 3}),
        (r"topk_group: expected 1..n_group = 1..2, got 3", {"n_group": 2, "topk_group": 3}),
        ("top_k: expected at most the 1 experts of topk_group = 1, got 2", {"n_group": 8}),
        ("group_score: expected 'max' or 'top2'", {"n_group": 2, "group_score": "sum"}),
        (r"bias: expected \[E\] = \[8\], got \[7\]", {"bias": np.zeros(7, np.float32)}),
        ("bias: expected finite values", {"bias": np.full(8, np.nan, np.float32)}),
        ("routed_scaling_factor: expected a finite number", {"routed_scaling_factor": np.inf}),
        ("num_shared: expected 0", {"num_shared": -1}),
    ]
    for message, options in cases:
        with pytest.raises(ValueError, match=message):
            assay.moe_route(x, 2, **options)
    with pytest.raises(ValueError, match="expected at most 2048 experts with a bias"):
        assay.moe_route(wide, 2, bias=np.zeros(2050, np.float32))
    with pytest.raises(TypeError, match="bias: expected float32"):
        assay.moe_route(x, 2, bias=np.zeros(8))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def best(values, k):
    """Ones at the k largest values."""
    return np.isin(np.arange(len(values)), np.argsort(-values, kind="stable")[:k])


def over_sum(w):
    return w / w.sum()


def deepseek_v3(x, bias, k):
    """Sigmoid plus bias, the two best of a group together, 4 of 8 groups, the k best of these; sigmoids over their sum."""
    biased = sigmoid(x) + bias
    groups = best(np.sort(biased.reshape(8, -1), axis=1)[:, -2:].sum(axis=1), 4)
    return over_sum(sigmoid(x) * best(np.where(np.repeat(groups, len(x) // 8), biased, -np.inf), k))


#: FlashInfer's RoutingMethodType: what moe_route calls it, and the method as FlashInfer's header says it: (logits, bias, k) to
#: a weight of every expert, 0 for those not chosen.
METHODS = {
    "Default": ({"renormalize": False}, lambda x, _, k: softmax(x) * best(x, k)),
    "Renormalize": ({"scoring": "softmax_topk"}, lambda x, _, k: softmax(np.where(best(x, k), x, -np.inf))),
    "DeepSeekV3": ({"scoring": "sigmoid", "bias": True, "n_group": 8, "topk_group": 4}, deepseek_v3),
    "Llama4": ({"scoring": "sigmoid", "renormalize": False}, lambda x, _, k: sigmoid(x) * best(x, k)),
    "RenormalizeNaive": ({}, lambda x, _, k: over_sum(softmax(x) * best(x, k))),
    "TopK": ({"scoring": "none"}, lambda x, _, k: x * best(x, k)),
    "SigmoidRenorm": ({"scoring": "sigmoid"}, lambda x, _, k: over_sum(sigmoid(x) * best(x, k))),
    "MiniMax2": ({"scoring": "sigmoid", "bias": True}, lambda x, b, k: over_sum(sigmoid(x) * best(sigmoid(x) + b, k))),
    "Sigmoid": ({"scoring": "sigmoid", "renormalize": False}, lambda x, _, k: sigmoid(x) * best(sigmoid(x), k)),
    "TopKSigmoid": ({"scoring": "sigmoid", "renormalize": False}, lambda x, _, k: sigmoid(np.where(best(x, k), x, -700.0))),
    "SqrtSoftplus": ({"scoring": "sqrtsoftplus", "bias": True}, lambda x, b, k: over_sum(
        np.sqrt(np.logaddexp(0, x)) * best(np.sqrt(np.logaddexp(0, x)) + b, k))),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_of_flashinfer(variant, name):
    options, method = METHODS[name]
    rng = np.random.default_rng(17)
    x, bias = rng.standard_normal((20, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    k = 1 if name == "Llama4" else 8
    options = {**options, "bias": bias} if options.get("bias") else options
    got = assay.moe_route(x, k, isa=variant, **options)
    every = np.zeros(x.shape)
    np.put_along_axis(every, got.topk_ids.astype(np.int64), got.topk_weights, 1)
    want = np.stack([method(row.astype(np.float64), bias.astype(np.float64), k) for row in x])
    # As above; sums of 64.
    np.testing.assert_allclose(every, want, rtol=2 * 1.7e-7 + (20 + 64 + 24) * 2.0**-24, atol=1e-300)


def test_transformers_deepseek_v3_router_agrees():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = transformers.DeepseekV3Config(
        hidden_size=64, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=3, routed_scaling_factor=2.5
    )
    router = DeepseekV3TopkRouter(config)
    rng = np.random.default_rng(11)
    weight = rng.standard_normal((64, 64)).astype(np.float32) / 8
    bias = rng.standard_normal(64).astype(np.float32) * 0.1
    x = rng.standard_normal((40, 64)).astype(np.float32)
    with torch.no_grad():
        router.weight.copy_(torch.from_numpy(weight))
        router.e_score_correction_bias.copy_(torch.from_numpy(bias))
        logits, weights, ids = (t.numpy() for t in router(torch.from_numpy(x)))
    got = assay.moe_route(logits, 6, scoring="sigmoid", bias=bias, n_group=8, topk_group=3, routed_scaling_factor=2.5)
    order, own = np.argsort(ids, axis=1), np.argsort(got.topk_ids, axis=1)  # theirs come unsorted
    np.testing.assert_array_equal(np.take_along_axis(got.topk_ids, own, 1), np.take_along_axis(ids, order, 1))
    ours, theirs = np.take_along_axis(got.topk_weights, own, 1), np.take_along_axis(weights, order, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)

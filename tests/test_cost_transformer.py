"""A model as kernel calls: counted by hand, and the laws that any prediction keeps."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.catalog import load_model
from assay.cost.cases import Case, Group, run_pass
from assay.cost.draws import Draws
from assay.cost.fit import fit_profile
from assay.cost.formats import KV_BYTES, WEIGHTS, parse
from assay.cost.machines import Calibrated
from assay.cost.transformer import (
    PRECISIONS,
    check_precision,
    memory_needed,
    predict,
    prefill_chunk,
    prefill_cost,
    step_cost,
    weight_bytes,
)
from synthetic import DRAM, hand_made_model, synthetic_profile

MODEL = fit_profile(synthetic_profile())
DENSE = hand_made_model()
MOE = hand_made_model(num_experts=8)


def by_name(step):
    return {c.name: c for c in step.calls}


def test_calls_of_a_dense_step():
    step = step_cost(DENSE, "int4", 4, 100, MODEL, 2)
    calls = by_name(step)
    assert {n: c.count for n, c in calls.items()} == {
        "attn_q": 2, "attn_kv": 2, "attn_output": 2, "ffn_up": 2, "ffn_down": 2, "lm_head": 1, "attention": 2, "next_token": 1,
    }  # fmt: skip
    one = MODEL.kernel_time("w4a8_gemm", {"m": 4, "n": 4096, "k": 4096}, 2)
    assert calls["attn_q"].time_s == pytest.approx(2 * one.time_s)
    assert step.time_s == pytest.approx(sum(c.time_s for c in step.calls))
    assert step.memory_s + step.compute_s + step.overhead_s == pytest.approx(step.time_s)
    token = MODEL.kernel_time("chain_verify", {"batch": 4, "num_draft": 0, "vocab": 32000, "rule": "greedy"}, 2)
    assert calls["next_token"].time_s == pytest.approx(token.time_s)


def test_calls_of_a_mixture():
    calls = by_name(step_cost(MOE, "int4", 2, 100, MODEL, 2))
    assert calls["expert_up"].count == pytest.approx(2 * 3.5)  # 2 layers, 8 (1 - (3/4)^2) experts
    assert calls["expert_up"].shape.startswith(f"M={4 / 3.5:.4g} ")
    assert calls["moe_route"].count == 2
    assert calls["router"].basis == "roof"
    assert calls["router"].op == "bf16 products"
    alone = by_name(step_cost(MOE, "int4", 1, 100, MODEL, 2))["expert_up"]
    assert alone.count == 4
    assert alone.time_s == pytest.approx(4 * MODEL.kernel_time("w4a8_gemm", {"m": 1, "n": 14336, "k": 4096}, 2).time_s)


def test_experts_are_priced_as_the_fused_layer_where_it_was_calibrated_and_computes_them():
    model = fit_profile(synthetic_profile(experts=True))
    mixtral = load_model("mixtral-8x7b")
    calls = by_name(step_cost(mixtral, "int4", 4, 100, model, 2))
    touched = 8 * (1 - 0.75**4)
    layer = {"tokens": 4, "top_k": 2, "distinct_experts": touched, "hidden_size": 4096, "intermediate_size": 14336}
    assert calls["experts"].op == "moe_experts"
    assert calls["experts"].count == 32
    assert calls["experts"].time_s == pytest.approx(32 * model.kernel_time("moe_experts", layer, 2).time_s)
    assert not {name for name in calls if name.startswith("expert_")}
    # int8 experts, and layers without a gate, are not what that kernel computes.
    assert "experts" not in by_name(step_cost(mixtral, "int8", 4, 100, model, 2))
    assert "experts" not in by_name(step_cost(MOE, "int4", 4, 100, model, 2))
    prefill = by_name(prefill_cost(mixtral, "int4", 256, model, 2))
    assert prefill["experts"].op == "moe_experts"


def test_interval_adds_within_an_op_and_in_quadrature_across():
    step = step_cost(DENSE, "int4", 4, 100, MODEL, 2)
    ups = {}
    for c in step.calls:
        ups[c.op] = ups.get(c.op, 0.0) + c.high_s - c.time_s
    assert step.high_s - step.time_s == pytest.approx(math.sqrt(sum(u * u for u in ups.values())))
    assert len(ups) == 3


def test_cache_reads_by_hand():
    attention = by_name(step_cost(DENSE, "int4", 8, 999, MODEL, 2))["attention"]
    # 2 layers, 8 requests, 1000 positions, 2048 elements of bf16: all the time that 100% of the roof would take at least.
    assert attention.low_s == pytest.approx(2 * 8 * 1000 * 2048 * 2 / MODEL.roofs.get("dram_read", 2).median)
    assert attention.low_s < attention.time_s
    assert attention.high_s == pytest.approx(2 * attention.time_s)
    window = replace(DENSE, attention=(replace(DENSE.attention[0], window=100),))
    capped = by_name(step_cost(window, "int4", 8, 999, MODEL, 2))["attention"]
    assert capped.low_s == pytest.approx(attention.low_s / 10)
    assert abs(DRAM[2] / MODEL.roofs.get("dram_read", 2).median - 1) < 0.05


def test_weights_and_memory_by_hand():
    dense = 2 * (4096 * 4096 * 2 + 2048 * 4096 + 2 * 14336 * 4096) + 32000 * 4096
    assert weight_bytes(DENSE, "int4") == pytest.approx(dense * 4.5 / 8)
    assert weight_bytes(DENSE, "int8") == pytest.approx(dense * 8.5 / 8)
    assert weight_bytes(DENSE, "bf16") == pytest.approx(dense * 2)
    assert weight_bytes(MOE, "bf16") == pytest.approx(MOE.num_params * 2)
    untied = hand_made_model(tied=False)
    assert weight_bytes(untied, "int4") - weight_bytes(DENSE, "int4") == pytest.approx(32000 * 4096 * 2)
    memory = memory_needed(DENSE, "int4", 3, 1000, 64)
    assert memory.kv_bytes == 3 * 1000 * 2 * 2048 * 2
    assert memory.total_bytes == memory.weights_bytes + memory.kv_bytes + memory.workspace_bytes


def test_file_precision_uses_stored_bits():
    with pytest.raises(ValueError, match="got 'file', which needs a model file"):
        check_precision(DENSE, "file")
    stored = hand_made_model(stored_bits=6.0)
    assert weight_bytes(stored, "file") == pytest.approx(weight_bytes(DENSE, "bf16") * 6 / 16)
    row = predict(stored, "file", 1, 128, 32, MODEL, 2)
    assert row.decode.basis == "roof"
    assert weight_bytes(DENSE, "int4") < weight_bytes(stored, "file")


def test_basis_and_width_of_what_is_not_measured():
    int4 = step_cost(DENSE, "int4", 1, 10, MODEL, 2)
    bf16 = step_cost(DENSE, "bf16", 1, 10, MODEL, 2)
    assert (int4.basis, bf16.basis) == ("measured", "roof")
    assert bf16.high_s / bf16.low_s > int4.high_s / int4.low_s
    assert any("no calibrated kernel for bf16" in note for note in bf16.notes)
    assert bf16.time_s > 3 * int4.time_s  # 16 bits against 4.5, both bound by memory


def test_extrapolation_names_what_and_where():
    inside = hand_made_model(vocab=20000)
    step = step_cost(inside, "int4", 8, 100, MODEL, 2)
    assert step.extrapolated == ()
    assert any("M outside" in t for t in step_cost(inside, "int4", 500, 100, MODEL, 2).extrapolated)
    assert any("threads" in t for t in step_cost(inside, "int4", 8, 100, MODEL, 16).extrapolated)
    big = step_cost(hand_made_model(vocab=600_000), "int4", 8, 100, MODEL, 2).extrapolated
    assert any(t.startswith("N*K") and "lm_head" in t for t in big)
    assert any(t.startswith("vocab") and "next_token" in t for t in big)


def test_prefill():
    assert prefill_chunk(MODEL, "int4", 1000) == 128  # the widest calibrated
    assert prefill_chunk(MODEL, "int4", 50) == 50
    assert prefill_chunk(MODEL, "bf16", 1000) == 512
    step = prefill_cost(DENSE, "int4", 300, MODEL, 2)
    rows = [(c.count, c.shape.split()[0]) for c in step.calls if c.name == "attn_q"]
    assert rows == [(4, "M=128"), (2, "M=44")]  # 2 layers; 300 = 2 * 128 + 44
    assert [c.count for c in step.calls if c.name == "lm_head"] == [1]
    times = [prefill_cost(DENSE, "int4", n, MODEL, 2).time_s for n in (1, 2, 64, 128, 129, 300, 1000, 10000)]
    assert times == sorted(times)


def test_throughput_and_dollars_follow():
    row = predict(DENSE, "int4", 8, 512, 128, MODEL, 2, memory_bytes=2**30, usd_per_hour=3.6)
    assert row.tokens_per_s[0] == pytest.approx(8 / row.decode.time_s)
    assert row.tokens_per_s[1] <= row.tokens_per_s[0] <= row.tokens_per_s[2]
    assert row.served_tokens_per_s[0] == pytest.approx(8 * 128 / (8 * row.prefill.time_s + 128 * row.decode.time_s))
    assert row.usd_per_million[0] == pytest.approx(1000 / row.served_tokens_per_s[0])
    assert row.usd_per_million[1] <= row.usd_per_million[0] <= row.usd_per_million[2]
    assert row.usd_per_million_decode[0] < row.usd_per_million[0]
    assert row.fits is True
    assert predict(DENSE, "bf16", 8, 512, 128, MODEL, 2, memory_bytes=2**29).fits is False
    assert predict(DENSE, "bf16", 8, 512, 128, MODEL, 2).fits is None


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PRECISIONS[1:]), st.integers(1, 2000), st.integers(1, 5000), st.booleans(), st.sampled_from([1, 2])
)
def test_a_step_is_monotone_in_batch_and_context_and_holds_its_estimate(precision, batch, context, moe, threads):
    model = MOE if moe else DENSE
    step = step_cost(model, precision, batch, context, MODEL, threads)
    assert step.time_s <= step_cost(model, precision, batch + 1, context, MODEL, threads).time_s * (1 + 1e-9)
    assert step.time_s <= step_cost(model, precision, batch, context + 1, MODEL, threads).time_s * (1 + 1e-9)
    assert 0 < step.low_s <= step.time_s <= step.high_s < math.inf


@pytest.mark.parametrize("weights", [*WEIGHTS, "w4a8,lm_head=bf16,attention=int8"])
@pytest.mark.parametrize("kv", KV_BYTES)
def test_a_server_and_a_step_price_the_same_calls_alike(weights, kv):
    formats = parse(weights)
    case = Case(DENSE, Calibrated("invented", MODEL, 2), formats.weights, kv, by_role=formats.by_role)
    server = run_pass(case, [Group(8, 1, 100, 8)], Draws(0))
    step = step_cost(DENSE, weights, 8, 100, MODEL, 2, kv)
    assert server.time_s[0] == pytest.approx(step.time_s - by_name(step)["next_token"].time_s, rel=1e-9)
    assert case.weights_bytes == pytest.approx(weight_bytes(DENSE, weights))


def test_sixteen_bit_activations_have_their_kernel():
    products = [s for s in synthetic_profile().samples if s.op == "w4a8_gemm"]
    profile = synthetic_profile()
    profile.samples += [
        replace(s, op="w4a16_gemm", median_s=1.5 * s.median_s, time_s=tuple(1.5 * t for t in s.time_s))
        for s in products
    ]
    model = fit_profile(profile)
    step = step_cost(DENSE, "w4a16", 1, 100, model, 2)
    assert {c.op for c in step.calls if c.name.startswith(("attn_", "ffn_"))} == {"w4a16_gemm"}
    case = Case(DENSE, Calibrated("invented", model, 2), "w4a16")
    assert run_pass(case, [Group(1, 1, 100, 1)], Draws(0)).time_s[0] == pytest.approx(
        step.time_s - by_name(step)["next_token"].time_s, rel=1e-9
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch": 0}, r"batch: expected an integer in 1\.\.16777216, got 0"),
        ({"isl": 0}, "isl"),
        ({"osl": -3}, "osl"),
        ({"threads": 0}, "threads"),
        ({"batch": 1.5}, "batch"),
        ({"precision": "int3"}, "precision: expected one of file, int4, bf16, .*nvfp4, got 'int3'"),
        ({"usd_per_hour": -1.0}, "usd_per_hour"),
        ({"usd_per_hour": math.nan}, "usd_per_hour"),
    ],
)
def test_bad_input(changed, words):
    arguments = {"precision": "int4", "batch": 1, "isl": 10, "osl": 10, "threads": 2, "usd_per_hour": None} | changed
    with pytest.raises(ValueError, match=words):
        predict(DENSE, cost_model=MODEL, **arguments)


def test_without_an_int4_fit_everything_is_priced_on_roofs():
    profile = synthetic_profile(threads=(2,))
    profile.samples = []
    bare = fit_profile(profile)
    row = predict(MOE, "int4", 4, 128, 32, bare, 2)
    assert row.decode.basis == "roof"
    assert row.decode.measured_share == 0
    assert "moe_route" not in by_name(row.decode)


def test_influences_are_by_op():
    from assay.cost.draws import Influence
    from assay.cost.explain import step_influences

    cost = fit_profile(synthetic_profile())
    step = step_cost(hand_made_model(), "int4", 4, 256, cost, 2)
    found = step_influences(step)
    assert {i.cause for i in found} == {call.op for call in step.calls}
    assert [i.swing for i in found] == sorted((i.swing for i in found), reverse=True)
    assert all(isinstance(i, Influence) and i.at_low <= step.time_s <= i.at_high for i in found)

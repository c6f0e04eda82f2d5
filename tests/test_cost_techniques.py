"""Techniques: the laws that every price and index keeps, whatever the case."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.catalog import list_devices, load_model
from assay.cost.cases import Case, longest_over_mean, price, touched
from assay.cost.drafting import Speculation
from assay.cost.draws import Draws
from assay.cost.fit import fit_profile
from assay.cost.formats import KV_BYTES, WEIGHTS
from assay.cost.machines import Calibrated, Datasheet, datasheet
from assay.cost.techniques import (
    Technique,
    dense_twin,
    quantised_kv,
    quantised_weights,
    sparse,
    speculative,
    speedups,
)
from synthetic import synthetic_profile

MIXTURE, DENSE = load_model("mixtral-8x7b"), load_model("llama-3.1-8b")
GPU = Datasheet("a device", 141e9, 4.8e12, {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12})
CHAIN = Speculation((1, 1, 1, 1), (0.6, 0.7, 0.8))
TIMES = ("overhead_s", "layer_s", "expert_layer_s", "pass_s")
NO_TIME = dict.fromkeys(TIMES, (1e-30,) * 3)
DRAWS = Draws(64)


@pytest.fixture(scope="module")
def calibrated():
    profile = synthetic_profile()
    return Calibrated("an invented machine", fit_profile(profile), 2, 64e9)


def scaled(machine, factor):
    """A machine that does everything so many times as fast."""
    return replace(
        machine,
        name="faster",
        bytes_per_s=machine.bytes_per_s * factor,
        ops_per_s={kind: rate * factor for kind, rate in machine.ops_per_s.items()},
        **{name: tuple(t / factor for t in getattr(machine, name)) for name in TIMES},
    )


# ---- the index ---------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([DENSE, MIXTURE]),
    st.sampled_from([1, 7, 64]),
    st.sampled_from([2.0, 3.3, 0.25]),
    st.sampled_from([quantised_weights("w4a16"), speculative(CHAIN), quantised_kv("fp8")]),
)
def test_index_is_one_where_nothing_interacts(model, batch, factor, other):
    """Everything f times as fast divides every time by f: it can interact with nothing, and no error is left."""
    base = Case(model, replace(GPU, memory_bytes=None), batch=batch)
    _, found = speedups(base, [Technique("fast", "machine", machine=scaled(base.machine, factor)), other], draws=DRAWS)
    assert found[0].speedup == pytest.approx((factor,) * 3, rel=1e-9)
    assert found[2].interaction == pytest.approx((1.0,) * 3, rel=1e-9)


def test_index_of_pure_bandwidth_is_one():
    """Without operations or overhead, bytes over bandwidth is a product of its factors."""
    machine = replace(GPU, memory_bytes=None, **NO_TIME, ops_per_s={"bf16": 1e30}, p=64.0)
    twice = replace(machine, bytes_per_s=2 * machine.bytes_per_s)
    _, found = speedups(
        Case(DENSE, machine), [quantised_weights("w4a16"), Technique("bus", "machine", machine=twice)], draws=DRAWS
    )
    assert found[2].interaction == pytest.approx((1.0,) * 3, rel=1e-6)


def test_mixture_and_speculation_get_in_each_others_way():
    """Verifying 5 tokens touches more experts than one token does: at batch 1 the index is well below 1."""
    base = Case(dense_twin(MIXTURE), GPU)
    _, found = speedups(base, [Technique("moe", "model", model=MIXTURE), speculative(CHAIN)], draws=DRAWS)
    middle, low, high = found[2].interaction
    assert low <= middle <= high < 0.75
    assert found[2].speedup[0] == pytest.approx(found[0].speedup[0] * found[1].speedup[0] * middle)


def test_shared_errors_cancel():
    _, found = speedups(Case(DENSE, GPU), [quantised_kv("fp8")], draws=DRAWS)
    (speed, slow, fast), (gain, low, high) = found[0].tokens_per_s, found[0].speedup
    assert (high - low) / gain < 0.1 * (fast - slow) / speed


def test_int4_turns_compute_bound_at_a_quarter_of_the_batch():
    machine = replace(GPU, unpacking_utilisation=GPU.compute_utilisation)
    assert machine.critical_batch("bf16") / machine.critical_batch("w4a16") == pytest.approx(16 / 4.5)


# ---- laws of a price ---------------------------------------------------------------------------------------

CASES = st.builds(
    Case,
    st.sampled_from([DENSE, MIXTURE, load_model("gemma-3-1b"), load_model("deepseek-v3"), load_model("gpt-oss-20b")]),
    st.sampled_from([GPU, *(datasheet(row) for row in list_devices() if row["ops_per_s"] > 0)]),
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from(sorted(KV_BYTES)),
    st.integers(1, 512),
    st.sampled_from([1, 100, 5000]),
    st.sampled_from([1, 200]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 0.999]),
    st.sampled_from([None, CHAIN, Speculation((4, 2, 1)), Speculation((1, 1), length=(1.0, 2.0, 3.0))]),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_prices_are_finite_and_positive(case):
    priced = price(case, Draws(8))
    for values in (priced.tokens_per_s, priced.step_s, priced.parts.time_s):
        assert values.shape == (9,)
        assert np.all(np.isfinite(values))
        assert np.all(values > 0)
    parts = priced.parts
    assert parts.memory_s + parts.compute_s + parts.overhead_s == pytest.approx(parts.time_s, rel=1e-9)
    assert np.all(priced.tokens_per_step >= 1)
    assert priced.bound in ("memory", "compute", "overhead")


@settings(max_examples=30, deadline=None)
@given(CASES, st.integers(1, 512))
def test_a_step_is_monotone_in_batch(case, more):
    """And in a batch that memory limits it never falls either, since the batch that runs does not."""
    wider = replace(case, batch=case.batch + more)
    assert price(wider, Draws(0)).step_s[0] >= price(case, Draws(0)).step_s[0] * (1 - 1e-12)
    assert wider.running >= case.running


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_a_step_is_monotone_in_bytes(case):
    case = replace(case, machine=replace(case.machine, memory_bytes=None))
    longer = replace(case, isl=case.isl + 1000)
    assert price(longer, Draws(0)).step_s[0] >= price(case, Draws(0)).step_s[0]
    small, large = replace(case, kv="fp8"), replace(case, kv="bf16")
    assert price(small, Draws(0)).step_s[0] <= price(large, Draws(0)).step_s[0]
    assert small.kv_bytes_per_request < large.kv_bytes_per_request


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([MIXTURE, load_model("olmoe-1b-7b")]), st.integers(1, 300), st.integers(1, 30))
def test_experts_touched_are_bounded(model, requests, width):
    e = model.experts
    values = touched(Case(model, GPU), requests, width, DRAWS)
    assert np.all(values >= e.experts_per_token)
    assert np.all(values <= min(e.num_experts, e.experts_per_token * requests * width) + 1e-9)


def test_units():
    """One dense token at batch 1 without prompt or overhead reads every weight but the embedding once."""
    machine = replace(GPU, **NO_TIME, memory_utilisation=(1.0,) * 3, ops_per_s={"bf16": 1e30}, p=64.0)
    case = Case(DENSE, machine, isl=1, osl=1)
    read = 2.0 * (DENSE.num_params - DENSE.vector_params - DENSE.vocab_size * DENSE.hidden_size)
    assert price(case, Draws(0)).step_s[0] == pytest.approx(read / machine.bytes_per_s, rel=2e-3)


def test_calibrated_kernels_price_and_share_their_errors(calibrated):
    base = Case(DENSE, calibrated)
    _, found = speedups(base, [quantised_weights("w4a8"), speculative(CHAIN)], draws=DRAWS)
    assert found[0].speedup[0] > 1
    assert all(math.isfinite(v) and v > 0 for c in found for v in (*c.speedup, *c.tokens_per_s))
    assert calibrated.critical_batch("w4a8") >= 1


def test_static_batches_wait_for_the_longest():
    assert longest_over_mean(1) == pytest.approx(1.0, abs=1e-3)
    assert 2.0 < longest_over_mean(8) < longest_over_mean(64) < 4.2
    static = Case(DENSE, replace(GPU, memory_bytes=None), batch=32, continuous=False)
    gain = price(replace(static, continuous=True), Draws(0)).tokens_per_s / price(static, Draws(0)).tokens_per_s
    assert 1.5 < gain[0] < longest_over_mean(32)


def test_draws_depend_on_seed_and_name_only():
    first, again, other = Draws(16), Draws(16), Draws(16, seed=1)
    first.normal("b")
    assert np.array_equal(first.normal("a"), again.normal("a"))
    assert not np.array_equal(first.normal("a"), first.normal("b"))
    assert not np.array_equal(first.normal("a"), other.normal("a"))
    assert first.normal("a")[0] == 0


# ---- models ------------------------------------------------------------------------------------------------


def test_twins():
    total, active = dense_twin(MIXTURE), dense_twin(MIXTURE, "active")
    routers = sum(m.num_params for m in MIXTURE.matrices if m.role == "router")
    assert total.num_params == MIXTURE.num_params - routers
    assert active.num_params == MIXTURE.active_params_per_token - routers
    back = sparse(total, 8, 2)
    assert (back.num_params, back.active_params_per_token) == (MIXTURE.num_params, MIXTURE.active_params_per_token)
    wide = sparse(DENSE, 8, 2, "active")
    assert wide.active_params_per_token - 32 * 8 * 4096 == DENSE.num_params


# ---- impossible --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse(DENSE, 8, 9), "experts_per_token"),
        (lambda: sparse(DENSE, 0, 0), "experts_per_token"),
        (lambda: sparse(DENSE, 9, 2), "divisor"),
        (lambda: sparse(MIXTURE, 8, 2), "dense"),
        (lambda: dense_twin(DENSE), "mixture"),
        (lambda: Case(replace(DENSE, vocab_size=0), GPU), "vocab_size"),
        (lambda: Case(replace(DENSE, attention=(replace(DENSE.attention[0], num_kv_heads=5),)), GPU), "num_kv_heads"),
        (lambda: Case(DENSE, GPU, batch=0), "batch"),
        (lambda: Case(DENSE, GPU, prefix_hit=1.0), "prefix_hit"),
        (lambda: Case(DENSE, GPU, prefix_hit=math.nan), "prefix_hit"),
        (lambda: Case(DENSE, GPU, "int3"), "weights"),
        (lambda: Speculation((1,), (0.5, 0.5, 1.5)), "accept"),
        (lambda: Speculation((1,), (math.nan,) * 3), "accept"),
        (lambda: Speculation((1,), length=(1.0, 2.0, 2.5)), "length"),
        (lambda: Speculation(()), "branches"),
        (lambda: Speculation((64,) * 64), "branches"),
        (lambda: Speculation((1,), draft=-1.0), "draft"),
        (lambda: replace(GPU, bytes_per_s=0.0), "bytes_per_s"),
        (lambda: replace(GPU, ops_per_s={"bf16": math.inf}), "ops_per_s"),
        (lambda: datasheet(list_devices()[0], 0), "num_devices"),
        (lambda: speedups(Case(DENSE, GPU), [quantised_kv("fp8")] * 2), "different"),
        (lambda: Technique("x", "batch"), "changes"),
        (lambda: Technique("x", "model"), "model"),
    ],
)
def test_impossible_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_says_so():
    start, found = speedups(Case(MIXTURE, replace(GPU, memory_bytes=24e9)), [quantised_weights("w4a16")], draws=DRAWS)
    assert start.fits is False
    assert found[0].fits is False
    assert "does not fit" in found[0].why

"""Servers in steady state: Little's law, saturation, what rides along; and whole measured servers."""

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.catalog import find_device, load_model
from assay.cost.cases import Case, price, run_pass
from assay.cost.drafting import Speculation
from assay.cost.draws import Draws, Ends, influences, interval
from assay.cost.economics import Owned, affordable_usd, break_even_queries, distilled_usd, rent, token_cost
from assay.cost.fit import fit_profile
from assay.cost.machines import Calibrated, datasheet
from assay.cost.serving import REFUSED, mixed_step, queue_wait_s, steady
from assay.importers.served import read_servers
from synthetic import synthetic_profile

H100, H200 = (datasheet(find_device(name)) for name in ("h100-sxm", "h200-sxm"))
LLAMA, MIXTURE = load_model("llama-3.1-8b"), load_model("qwen3-30b-a3b")
DRAWS = Draws(32)


def case(model=LLAMA, machine=H100, **options):
    return Case(model, machine, **({"batch": 128, "isl": 1000, "osl": 200} | options))


# ---- the fixed point ----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([LLAMA, MIXTURE]),
    st.floats(0.05, 0.89),
    st.sampled_from([None, Speculation((1, 1), (0.6, 0.7, 0.8))]),
)
def test_littles_law(model, load, spec):
    """B = lambda o t / tau: what runs is what arrives times how long it stays."""
    served = case(model, H200, speculation=spec)
    capacity = float(steady(served, 1e-3, Draws(0)).capacity_per_s[0])
    plan = steady(served, load * capacity, Draws(0))
    stays = served.mean_osl * plan.tpot_s[0]
    assert plan.utilisation[0] == pytest.approx(load)
    assert plan.running[0] == pytest.approx(plan.rate_per_s * stays, rel=0.03)  # the grid's interpolation
    assert not plan.saturated


def test_more_arrives_more_runs_and_slower():
    plans = [steady(case(), rate, Draws(0)) for rate in (0.1, 1.0, 5.0, 15.0, 25.0)]
    for a, b in itertools.pairwise(plans):
        assert b.utilisation[0] > a.utilisation[0]
        assert b.running[0] > a.running[0]
        assert b.tpot_s[0] >= a.tpot_s[0] * (1 - 1e-9)
        assert b.prompt_share[0] >= a.prompt_share[0] - 1e-9


def test_waiting_is_refused_near_saturation():
    capacity = float(steady(case(), 1.0, Draws(0)).capacity_per_s[0])
    assert steady(case(), 0.6 * capacity, DRAWS).wait_s is not None
    near = steady(case(), (REFUSED + 0.02) * capacity, DRAWS)
    assert near.wait_s is None
    assert near.why_no_wait.startswith("refused")
    full = steady(case(), 2.0 * capacity, DRAWS)
    assert full.saturated
    assert full.wait_s is None
    assert "no steady state" in full.why_no_wait
    assert full.requests_per_s[0] == pytest.approx(capacity)


def test_memory_limits_the_batch():
    small = replace(H100, memory_bytes=24e9)
    plan = steady(case(machine=small, batch=1024), 0.1, Draws(0))
    served = case(machine=small, batch=1024)
    free = 0.9 * 24e9 - served.weights_bytes
    assert plan.most == math.floor(free / served.kv_bytes_per_request) < 1024
    with pytest.raises(ValueError, match="expected room"):
        steady(case(machine=replace(H100, memory_bytes=12e9)), 1.0)


def test_a_cached_prefix_costs_nothing():
    cold, warm = (steady(case(prefix_hit=h, isl=4000), 2.0, Draws(0)) for h in (0.0, 0.9))
    assert warm.capacity_per_s[0] > cold.capacity_per_s[0]
    assert warm.prompt_share[0] < cold.prompt_share[0]
    assert warm.ttft_s[0] < cold.ttft_s[0]


def test_prompts_and_decoding_share_the_weights():
    """One pass for both is cheaper than one for each, and not cheaper than the decoding alone."""
    served = case(isl=64, osl=64)
    both, alone, _ = mixed_step(served, 16.0, Draws(0))
    assert alone.time_s[0] <= both.time_s[0]
    from assay.cost.cases import Group

    apart = run_pass(served, [Group(16 / 64, 64, 0.0, 1.0)], Draws(0)).time_s[0]
    assert both.time_s[0] < alone.time_s[0] + apart


def test_a_calibrated_machine_serves():
    machine = Calibrated("an invented machine", fit_profile(synthetic_profile()), 2, 64e9, watts=90.0)
    draws = Draws(16)
    plan = steady(Case(LLAMA, machine, "w4a8", batch=8, isl=64, osl=32), 0.01, draws)
    assert plan.capacity_per_s[0] > 0
    assert any("no calibrated kernel" in note for note in draws.notes)
    assert plan.watts is not None
    assert plan.watts[0] == pytest.approx(90.0)


def test_queue():
    """M/M/1: W = rho S / (1 - rho), which Sakasegawa's form is exactly at one place."""
    rho, service = np.array([0.5, 0.8]), np.array([2.0, 2.0])
    assert queue_wait_s(rho, 1.0, service) == pytest.approx(rho * service / (1 - rho))
    assert queue_wait_s(rho, 64.0, service)[0] < 1e-3


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="rate_per_s"):
        steady(case(), rate)


def test_a_static_batch_has_no_steady_state():
    with pytest.raises(ValueError, match="continuous"):
        steady(case(continuous=False), 1.0)


# ---- whole servers, measured ----------------------------------------------------------------------------------

SERVED = Path(os.environ.get("ASSAY_VALIDATION_TABLES", "")) / "served_h200.csv"
KNOWN = {
    "openai/gpt-oss-120b": ("gpt-oss-120b", "mxfp4", (("attention", "bf16"), ("lm_head", "bf16"))),
    "meta-llama/Llama-3.1-70B": ("llama-3.1-70b", "fp8", ()),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama-3.1-8b", "fp8", ()),
}


@pytest.mark.skipif(not SERVED.is_file(), reason="no served_h200.csv of AIConfigurator in ASSAY_VALIDATION_TABLES")
def test_measured_servers():
    """Time per token of servers of one to eight devices, from datasheets: a median error below 15%, no bias beyond 10%."""
    errors, held = [], []
    runs = [r for r in read_servers(SERVED) if r.model in KNOWN and r.devices <= 8]
    for run in runs[::5]:
        name, weights, by_role = KNOWN[run.model]
        machine = datasheet(find_device(run.system), run.devices)
        served = Case(
            load_model(name), machine, weights, batch=run.concurrency, isl=run.isl, osl=run.osl, by_role=by_role
        )
        step, _, tokens = mixed_step(served, float(served.running), DRAWS)
        seconds = step.time_s / tokens
        errors.append(math.log(seconds[0] / run.tpot_s))
        low, high = np.percentile(seconds[1:], [5, 95])
        held.append(low <= run.tpot_s <= high)
    assert len(errors) > 60
    assert np.median(np.abs(errors)) < 0.15
    assert abs(np.median(errors)) < 0.10
    assert np.mean(held) > 0.6


@pytest.mark.parametrize(
    ("chip", "model", "measured"),
    [("groq-lpu", "mixtral-8x7b", 480), ("groq-lpu", "llama-3.1-70b", 300), ("groq-lpu", "llama-3.1-8b", 750),
     ("cerebras-wse-3", "llama-3.1-70b", 450), ("cerebras-wse-3", "llama-3.1-8b", 1800)],
)  # fmt: skip
def test_silicon_that_keeps_weights_on_the_chip(chip, model, measured):
    """Speeds of one user that their makers showed in 2024 (of Llama 2 where Groq's): within the interval."""
    from assay.cost.techniques import enough

    one = Case(load_model(model), datasheet(find_device(chip)), osl=512)
    priced = price(replace(one, machine=enough(one.machine, one)), Draws(128))
    middle, low, high = interval(1.0 / priced.step_s)
    assert low <= measured <= high
    assert middle / 2.5 < measured < middle * 2.5


# ---- what moves an answer ------------------------------------------------------------------------------------


def test_influences_find_the_cause():
    def answer(draws):
        return draws.between("large", 1.0, 2.0, 8.0) * draws.between("small", 0.9, 1.0, 1.1)

    found = influences(answer)
    assert [i.cause for i in found] == ["large", "small"]
    assert (found[0].at_low, found[0].at_high) == pytest.approx((1.0, 8.0))
    assert found[0].swing == pytest.approx(8.0)
    assert Ends("x").between("y", 1.0, 2.0, 3.0) == pytest.approx([2.0, 2.0, 2.0])


def test_bandwidth_moves_small_batches_most():
    found = influences(lambda draws: price(case(batch=1, isl=16), draws).step_s)
    # A part's cause against what no part explains, which no batch changes.
    assert next(i.cause for i in found if i.cause != "unmodelled") == "memory"
    assert {i.cause for i in found} >= {"memory", "compute", "overhead", "layer", "scheduler"}


# ---- money ------------------------------------------------------------------------------------------------------


def test_rent_is_a_range():
    dollars = rent(1.0, 4.0, Draws(2000))
    middle, low, high = interval(dollars)
    assert (middle, low, high) == pytest.approx((2.0, 1.0, 4.0), rel=0.1)
    assert np.all(rent(0.0, 0.0, DRAWS) == 0)


def test_an_owned_machine():
    owned = Owned((20e3,) * 3, 4.0, (0.1,) * 3, (1.25,) * 3, host=0.0)
    # 20,000 dollars over 35,040 hours, and 0.8 kW at 1.25 and ten cents.
    assert owned.usd_per_hour(np.array([800.0]), Draws(0))[0] == pytest.approx(20e3 / 35040 + 0.8 * 1.25 * 0.1)


def test_in_and_out_add_up_to_the_request():
    cost = token_cost(np.array([3.6]), np.array([10.0]), np.array([0.25]), 1000.0, 100.0)
    assert cost.usd_per_request[0] == pytest.approx(1e-4)
    whole = (1000 * cost.usd_per_million_in + 100 * cost.usd_per_million_out) / 1e6
    assert whole[0] == pytest.approx(cost.usd_per_request[0])


def test_subscriptions_and_students():
    assert break_even_queries(20, 0.1) == pytest.approx(200)
    assert affordable_usd(20, 1000) == pytest.approx(0.02)
    assert distilled_usd(np.array([1.0]), np.array([0.1]), 0.2)[0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rent(-1.0, 2.0, DRAWS), "usd_per_hour"),
        (lambda: rent(3.0, 2.0, DRAWS), "usd_per_hour"),
        (lambda: rent(1.0, math.inf, DRAWS), "usd_per_hour"),
        (lambda: Owned((0.0, 1.0, 1.0)), "usd"),
        (lambda: Owned((1.0,) * 3, years=0.0), "years"),
        (lambda: Owned((1.0,) * 3, pue=(0.9, 1.0, 1.1)), "pue"),
        (lambda: Owned((1.0,) * 3, host=-1.0), "host"),
        (lambda: break_even_queries(20, 0.0), "usd_per_query"),
        (lambda: affordable_usd(-20, 10), "usd_per_month"),
        (lambda: distilled_usd(np.ones(1), np.ones(1), 1.5), "handed_over"),
        (lambda: token_cost(np.ones(1), np.ones(1), np.ones(1), 0.0, 1.0), "new_in"),
        (lambda: H100.of(2).of(2), "num_devices"),
        (lambda: datasheet(find_device("apple-m4"), 2), "link"),
        (lambda: DRAWS.between("x", 2.0, 1.0, 3.0), "x: expected"),
    ],
)
def test_impossible_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

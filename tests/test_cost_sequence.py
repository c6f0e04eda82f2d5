"""What calls of a step cost each other, and what a cache keeps of weights that are read again: fitted, stored, priced."""

import json
import math
from dataclasses import replace

import pytest

from assay.cost.fit import fit_profile
from assay.cost.laws import sequence_products
from assay.cost.roofs import Roofs
from assay.cost.sequence import fit_sequence, stack_errors
from assay.cost.stored import load_model, summarise
from assay.cost.transformer import predict, step_cost
from assay.errors import ProfileError
from assay.profile import SET_ROOFS, Profile, Roof, Sample
from synthetic import DRAM, hand_made_model, synthetic_profile

DENSE = hand_made_model()
STACKS = ((576, 192, 1536, 6), (896, 128, 4864, 3))
EXTRA = {1: 1.5e-6, 2: 4e-6}


def stack(law, hidden, kv, width, layers, m, threads, extra, noise=0.0):
    """A sample whose calls take what the law says, and `extra` seconds each beside it."""
    params = {
        "of": "w4a8_gemm",
        "m": m,
        "hidden_size": hidden,
        "kv_size": kv,
        "intermediate_size": width,
        "layers": layers,
    }
    products = sequence_products(params)
    alone = sum(c * law.kernel_time("w4a8_gemm", {"m": m, "n": n, "k": k}, threads).time_s for n, k, c in products)
    calls = sum(c for _, _, c in products)
    assert calls == 7 * layers
    return Sample.of(
        "sequence", "avx2", threads, params, moved_bytes=1e6, ops=1e6, time_s=[alone + calls * (extra + noise)],
        conditions={"alone_s": alone},
    )  # fmt: skip


def with_stacks(noise=0.0, extra=EXTRA):
    made = synthetic_profile()
    law = fit_profile(made)
    signs = iter([1, 1, -1, -1, 0.5, 0.5, -0.5, -0.5])  # at one and at two threads by turns
    made.samples += [
        stack(law, *shape, m, t, extra[t], noise * next(signs)) for shape in STACKS for m in (1, 8) for t in (1, 2)
    ]
    return made


def test_seconds_a_call_are_found_at_each_number_of_threads():
    model = fit_profile(with_stacks())
    assert [(c.threads, c.num_samples) for c in model.sequence] == [(1, 4), (2, 4)]
    for found in model.sequence:
        assert found.seconds == pytest.approx(EXTRA[found.threads], rel=1e-6)
        assert found.half_s == pytest.approx(0.0, abs=1e-12)


def test_the_interval_is_that_of_what_the_samples_leave_over():
    quiet, noisy = fit_profile(with_stacks(1e-7)).sequence, fit_profile(with_stacks(1e-6)).sequence
    for a, b in zip(quiet, noisy, strict=True):
        assert 0 < a.half_s < b.half_s
        assert b.half_s == pytest.approx(10 * a.half_s, rel=0.01)
        assert abs(b.seconds - EXTRA[b.threads]) <= b.half_s


def test_a_negative_difference_is_no_gain_but_widens_the_interval():
    (found,) = {c for c in fit_profile(with_stacks(extra={1: -2e-6, 2: 1e-6})).sequence if c.threads == 1}
    assert found.seconds == 0.0
    assert found.half_s == pytest.approx(2e-6)


def test_short_calls_count_more_than_long_ones():
    law = fit_profile(synthetic_profile())
    short = stack(law, 576, 192, 1536, 6, 1, 1, 2e-6)
    long = stack(law, 4096, 1024, 14336, 1, 1, 1, 9e-6)
    assert fit_sequence([short, long])[0].seconds == pytest.approx(2e-6)


def test_a_step_has_the_term_once_a_call_with_its_share_of_the_interval():
    plain, model = fit_profile(synthetic_profile()), fit_profile(with_stacks(1e-6))
    before, after = (step_cost(DENSE, "int4", 4, 100, m, 2) for m in (plain, model))
    between = next(c for c in after.calls if c.op == "sequence")
    assert between.count == sum(c.count for c in before.calls if c.basis == "measured")
    term = next(c for c in model.sequence if c.threads == 2)
    assert between.time_s == pytest.approx(between.count * term.seconds)
    assert between.bound == "overhead"
    assert after.time_s == pytest.approx(before.time_s + between.time_s)
    half = between.count * term.half_s
    assert after.high_s - after.time_s == pytest.approx(math.hypot(before.high_s - before.time_s, half))
    shown = predict(DENSE, "int4", 1, 64, 64, model, 2)
    assert any(c.op == "sequence" for c in shown.prefill.calls)


def test_no_stacks_no_term():
    assert fit_profile(synthetic_profile()).between_calls(2) is None
    assert not any(
        c.op == "sequence" for c in step_cost(DENSE, "int4", 1, 10, fit_profile(synthetic_profile()), 2).calls
    )


def test_another_thread_count_takes_the_nearest_and_says_so():
    model = fit_profile(with_stacks())
    found = model.between_calls(7)
    assert found.time_s == pytest.approx(EXTRA[2])
    assert found.notes == ("calls of a step were timed at 2 threads, not 7",)
    assert not found.in_range


def test_stacks_are_judged_by_stacks_of_other_layers():
    made = with_stacks()
    model = fit_profile(made)
    errors, inside = stack_errors([s for s in made.samples if s.op == "sequence"], model)
    assert len(errors) == 8
    assert errors == pytest.approx([0.0] * 8, abs=1e-9)
    assert all(inside)
    row = summarise(made)[1]["sequence"]
    assert (row["n"], row["coverage"]) == (8, 1.0)
    # One model's layers alone: nothing to judge them by.
    one = [s for s in made.samples if s.op == "sequence" and s.params["hidden_size"] == 576]
    assert stack_errors(one, model) == ([], [])


def test_the_term_is_stored_and_read_again():
    made = with_stacks(1e-6)
    made.fits, made.accuracy = summarise(made)
    again = Profile.from_json(json.loads(json.dumps(made.to_json())))
    model = load_model(again)
    assert model.sequence == fit_profile(made).sequence
    again.fits["sequence"]["classes"][0]["half_s"] = -1.0
    with pytest.raises(ProfileError, match=r"\$\.fits\.sequence: expected a fit as assay writes it"):
        load_model(again)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"params": {"of": "softmax"}}, r"params\.of: expected w4a8_gemm or"),
        ({"params": {"layers": 0}}, r"params\.layers: expected"),
        ({"conditions": None}, r"conditions\.alone_s: expected a finite number above 0, got None"),
        ({"conditions": {"alone_s": 0.0}}, r"conditions\.alone_s"),
    ],
)
def test_what_a_stack_must_say(changed, message):
    data = with_stacks().to_json()
    sample = next(s for s in data["samples"] if s["op"] == "sequence")
    for key, value in changed.items():
        sample[key] = {**sample[key], **value} if key == "params" else value
    with pytest.raises(ProfileError, match=message):
        Profile.from_json(data)


# ---- weights that are read again ---------------------------------------------------------------------------


def with_cache(gains, spread=0.0):
    """A machine that reads sets of 64, 128, ... MiB so many times as fast as DRAM."""
    made = synthetic_profile()
    made.roofs += [
        Roof.of(name, t, [gain * DRAM[t] * f for f in (1 - spread, 1, 1 + spread)])
        for name, gain in zip(SET_ROOFS, gains, strict=True)
        for t in (1, 2)
    ]
    return made


def test_speed_falls_with_the_set_and_is_never_below_dram():
    roofs = Roofs(with_cache((1.8, 1.9, 0.9, 1.1)).roofs)
    found = [roofs.reuse(mib * 2.0**20, 1)[0] for mib in (1, 64, 90, 128, 200, 256, 512, 513, 1e5)]
    assert found == sorted(found, reverse=True)
    assert found[0] == found[1] == pytest.approx(1.9, rel=0.02)
    assert found[-2:] == [1.0, 1.0]
    assert Roofs(synthetic_profile().roofs).reuse(1.0, 1)[0] == 1.0


def test_a_model_that_a_cache_holds_in_part_is_faster_and_its_slow_end_is_that_of_dram():
    plain, model = fit_profile(synthetic_profile()), fit_profile(with_cache((2.0, 1.5, 1.2, 1.0)))
    small = hand_made_model()
    before, after = (step_cost(small, "int4", 1, 0, m, 1) for m in (plain, model))
    # 450 million weights at 4.5 bits are 253 MB: between 128 and 256 MiB.
    gain = model.roofs.reuse(after_bytes := 4.5 / 8 * sum(m.n * m.k * small.copies(m) for m in small.matrices), 1)[0]
    assert 2**27 < after_bytes < 2**28
    assert 1.2 < gain < 1.5
    assert before.time_s / gain < after.time_s < before.time_s
    assert after.high_s >= before.high_s * 0.999
    assert after.low_s < before.low_s


def test_a_large_model_and_a_prompt_are_priced_from_dram():
    plain, model = fit_profile(synthetic_profile()), fit_profile(with_cache((2.0, 1.5, 1.2, 1.1)))
    for changed in (("bf16", 1, 0), ("int4", 8, 100_000)):  # 1.1 GB of weights; a cache of several GB
        steps = [step_cost(DENSE, changed[0], changed[1], changed[2], m, 1) for m in (plain, model)]
        assert steps[0].time_s == pytest.approx(steps[1].time_s)


def test_a_set_that_is_read_now_fast_now_slow_widens_the_interval():
    steady, shaky = (fit_profile(with_cache((2.0, 1.5, 1.2, 1.0), s)) for s in (0.0, 0.3))
    a, b = (step_cost(replace(DENSE), "int4", 1, 0, m, 1) for m in (steady, shaky))
    assert b.low_s < a.low_s
    assert b.high_s > a.high_s


# ---- a machine whose speed is another at each calibration --------------------------------------------------


def earlier(*speeds, made):
    return [
        {"created_utc": f"2026-01-0{i}", "roofs": {f"{r.name}@{r.threads}": r.median * speed for r in made.roofs}}
        for i, speed in enumerate(speeds, 1)
    ]


def test_what_roofs_moved_between_runs_is_in_the_drift():
    made = synthetic_profile()
    roof = made.roof("dram_read", 1)
    within = 1.645 / 1.349 * roof.spread
    assert Roofs(made.roofs).drift(roof) == pytest.approx(within)
    # Two runs: how far they are apart. Four: the largest of six differences.
    for speeds, apart in (((1.2,), math.log(1.2)), ((1.2, 0.9, 1.0), math.log(1.2 / 0.9))):
        found = Roofs(made.roofs, earlier(*speeds, made=made)).drift(roof)
        assert found == pytest.approx(math.hypot(within, apart))
    # Many: the 90th percentile, which one odd run does not set.
    many = Roofs(made.roofs, earlier(*[1.01, 0.99] * 9, 3.0, made=made)).drift(roof)
    assert math.hypot(within, math.log(1.01)) < many < math.log(3.0) + within


def test_a_step_is_less_sure_on_a_machine_that_was_found_to_change():
    made = synthetic_profile()
    steady = step_cost(DENSE, "int4", 4, 100, fit_profile(made), 2)
    made.settings["earlier"] = earlier(1.3, made=made)
    moved = step_cost(DENSE, "int4", 4, 100, fit_profile(made), 2)
    assert moved.time_s == pytest.approx(steady.time_s)
    assert moved.low_s < steady.low_s
    assert moved.high_s > steady.high_s
    made.fits, made.accuracy = summarise(made)
    read = Profile.from_json(json.loads(json.dumps(made.to_json())))
    assert step_cost(DENSE, "int4", 4, 100, load_model(read), 2).high_s == pytest.approx(moved.high_s)


def test_a_profile_remembers_the_runs_that_it_replaced():
    made = synthetic_profile()
    (first,) = made.runs_until_now()
    assert first["roofs"]["dram_read@2"] == made.roof("dram_read", 2).median
    made.settings["earlier"] = earlier(*[1.0] * 25, made=made)
    kept = made.runs_until_now()
    assert len(kept) == 20
    assert kept[-1] == first


@pytest.mark.parametrize("value", [0.0, "fast", None])
def test_what_an_earlier_run_must_say(value):
    made = synthetic_profile()
    made.settings["earlier"] = [{"created_utc": "2026-01-01", "roofs": {"dram_read@1": value}}]
    with pytest.raises(
        ProfileError, match=r"\$\.settings\.earlier\[0\]\.roofs\.dram_read@1: expected a finite number above 0"
    ):
        Profile.from_json(made.to_json())

"""The fit finds the law behind synthetic samples again; its intervals and errors are honest."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.cost.fit import conformal_half_width, fit_profile, jackknife_coverage
from assay.cost.laws import MATRIX_SIZES
from assay.cost.roofline import shares, smooth_max
from assay.cost.roofs import Roofs
from assay.cost.solve import non_negative
from assay.cost.stored import load_model, model_from_json, model_to_json, summarise
from assay.errors import ProfileError
from assay.profile import Roof, Sample, load, save
from synthetic import DRAM, expert_seconds, gemm_seconds, route_seconds, synthetic_profile, verify_seconds

PROFILE = synthetic_profile()
MODEL = fit_profile(PROFILE)
GEMM = {"n": 4096, "k": 4096}


def gemm_error(model, m, n, k, threads, **kind):
    predicted = model.kernel_time("w4a8_gemm", {"m": m, "n": n, "k": k} | kind, threads).time_s
    return abs(predicted / gemm_seconds(m, n, k, threads, **kind) - 1)


def test_a_law_without_noise_is_found_exactly():
    model = fit_profile(synthetic_profile(noise=0.0))
    for threads in (1, 2):
        for n, k in ((4096, 4096), (9216, 3072), (2048, 2048), (28672, 4096)):
            for m in (1, 2, 3, 5, 8, 16, 64, 128):
                # The roofs themselves are read with 0.5% of noise.
                assert gemm_error(model, m, n, k, threads) < 0.02, (m, n, k, threads)
        route = model.kernel_time("moe_route", {"tokens": 100, "num_experts": 60, "top_k": 6}, threads).time_s
        assert route == pytest.approx(route_seconds(100, 60, 6, threads), rel=1e-6)
        for rule in ("greedy", "rejection"):
            params = {"batch": 8, "num_draft": 5, "vocab": 100000, "rule": rule}
            verify = model.kernel_time("chain_verify", params, threads).time_s
            assert verify == pytest.approx(verify_seconds(8, 5, 100000, rule, threads), rel=1e-6)


def test_the_law_of_expert_layers_is_found_and_kept(tmp_path):
    profile = synthetic_profile(noise=0.0, experts=True)
    profile.fits, profile.accuracy = summarise(profile)
    save(profile, tmp_path / "p.json")
    model = load_model(load(tmp_path / "p.json"))
    assert profile.accuracy["moe_experts"]["median_ape"] < 0.02
    for tokens, distinct in ((1, 4), (6, 20), (32, 30), (256, 32)):
        sizes = (tokens, 4, distinct, 2880, 2880)
        layer = dict(zip(MATRIX_SIZES["moe_experts"], sizes, strict=True))
        for threads in (1, 2):
            told = model.kernel_time("moe_experts", layer, threads)
            assert told.time_s == pytest.approx(expert_seconds(*sizes, threads), rel=0.04)
            assert told.basis == "measured"
    more = [model.kernel_time("moe_experts", layer | {"tokens": t}, 1).time_s for t in (64, 128, 256)]
    assert more == sorted(more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distinct_experts": 1}, "distinct_experts: expected top_k to tokens \\* top_k \\(8\\), got 1"),
        ({"distinct_experts": 9}, "expected top_k to tokens"),
        ({"group_size": 0}, "group_size: expected -1"),
        ({"symmetric": 1}, "symmetric"),
    ],
)
def test_a_profile_of_impossible_expert_layers_is_refused(change, message, tmp_path):
    profile = synthetic_profile(experts=True)
    i = next(i for i, s in enumerate(profile.samples) if s.op == "moe_experts")
    good = {"tokens": 4, "top_k": 2, "distinct_experts": 4, "hidden_size": 64, "intermediate_size": 64,
            "group_size": 32, "symmetric": True}  # fmt: skip
    profile.samples[i] = replace(profile.samples[i], params=good | change)
    with pytest.raises(ProfileError, match=message):
        save(profile, tmp_path / "p.json")


def test_noise_of_two_percent_leaves_an_error_of_that_order():
    errors = [
        gemm_error(MODEL, m, n, k, t)
        for t in (1, 2) for n, k in ((9216, 3072), (2048, 2048), (16384, 4096)) for m in (1, 2, 4, 6, 16, 64)
    ]  # fmt: skip
    assert np.median(errors) < 0.02
    assert max(errors) < 0.06


def test_one_disturbed_sample_in_eight_does_not_move_the_fit():
    profile = synthetic_profile()
    rng = np.random.default_rng(1)
    for i, s in enumerate(profile.samples):
        if not s.held_out and rng.random() < 0.125:
            profile.samples[i] = replace(s, time_s=tuple(3 * t for t in s.time_s), median_s=3 * s.median_s)
    errors = [gemm_error(fit_profile(profile), m, 9216, 3072, t) for t in (1, 2) for m in (1, 2, 4, 8, 16, 64)]
    assert np.median(errors) < 0.04
    _, accuracy = summarise(profile)
    assert accuracy["w4a8_gemm"]["median_ape"] < 0.04


def test_roofs_read_nearby_cancel_drift():
    _, accuracy = summarise(synthetic_profile(drift=0.15, noise=0.01))
    row = accuracy["w4a8_gemm"]
    assert row["median_ape"] < 0.03
    assert row["raw_median_ape"] > 2 * row["median_ape"]


def test_held_out_points_never_enter_the_fit():
    profile = synthetic_profile()
    before, _ = summarise(profile)
    for i, s in enumerate(profile.samples):
        if s.held_out:
            profile.samples[i] = replace(s, time_s=tuple(5 * t for t in s.time_s), median_s=5 * s.median_s)
    after, accuracy = summarise(profile)
    for op, fit in before.items():
        assert fit["classes"] == after[op]["classes"]
    assert accuracy["w4a8_gemm"]["bias"] == pytest.approx(-0.8, abs=0.02)
    assert after["w4a8_gemm"]["half_width_log"] > 1.5


def test_coverage_on_a_large_set():
    """Of new points with the noise of the old ones, about 90% lie inside."""
    rng = np.random.default_rng(5)
    profile = synthetic_profile(noise=0.05, seed=4)
    model = fit_profile(profile)
    inside = total = 0
    for n, k in ((6144, 2048), (2048, 6144), (8192, 4096), (3072, 3072), (5120, 5120)):
        for m in (1, 2, 4, 8, 16, 64):
            for t in (1, 2):
                e = model.kernel_time("w4a8_gemm", {"m": m, "n": n, "k": k}, t)
                measured = gemm_seconds(m, n, k, t) * np.exp(rng.normal(0, 0.05, 40))
                inside += int(((e.low_s <= measured) & (measured <= e.high_s)).sum())
                total += 40
    assert 0.75 <= inside / total <= 1.0
    _, accuracy = summarise(profile)
    for op in ("w4a8_gemm", "chain_verify", "moe_route"):
        assert 0.75 <= accuracy[op]["coverage"] <= 1.0


def test_without_held_out_points_whole_shapes_are_left_out():
    fits, accuracy = summarise(synthetic_profile(held_out=False))
    for op, row in accuracy.items():
        assert row["source"] == "leave-one-shape-out" == fits[op]["interval_from"]
        assert row["n"] > 8
        assert row["median_ape"] < 0.06
        assert row["raw_median_ape"] is None


def test_one_shape_only_is_judged_point_by_point():
    profile = synthetic_profile(held_out=False, threads=(1,))
    profile.samples = [s for s in profile.samples if s.op == "w4a8_gemm" and s.params["n"] == s.params["k"]]
    _, accuracy = summarise(profile)
    assert accuracy["w4a8_gemm"]["n"] == len(profile.samples)


def test_a_single_sample_gives_a_wide_interval():
    profile = synthetic_profile(held_out=False, threads=(1,))
    profile.samples = profile.samples[:1]
    fits, accuracy = summarise(profile)
    assert fits["w4a8_gemm"]["half_width_log"] == pytest.approx(math.log(2))
    assert accuracy["w4a8_gemm"] | {"repeat_spread": 0} == {
        "n": 0, "median_ape": None, "p90_ape": None, "bias": None, "coverage": None, "source": "leave-one-shape-out",
        "raw_median_ape": None, "repeat_spread": 0,
    }  # fmt: skip
    model = fit_profile(profile)
    assert gemm_error(model, 1, 4096, 4096, 1) < 0.1


# ---- what is asked beyond the calibration ----


@pytest.mark.parametrize(
    ("params", "threads", "words"),
    [
        (GEMM | {"m": 4}, 8, "calibrated at 2 threads, not 8"),
        (GEMM | {"m": 256}, 2, "M outside the calibrated 1 to 128"),
        ({"m": 4, "n": 65536, "k": 4096}, 2, "N*K outside"),
        ({"m": 4, "n": 512, "k": 512}, 2, "N*K outside"),
        (GEMM | {"m": 4, "group_size": 128}, 2, "group size 32, not 128"),
        (GEMM | {"m": 4, "group_size": -1}, 2, "group size 32, not whole row"),
        (GEMM | {"m": 4, "symmetric": False}, 2, "calibrated symmetric only"),
    ],
)
def test_outside_is_flagged_and_wider(params, threads, words):
    inside = MODEL.kernel_time("w4a8_gemm", GEMM | {"m": 4}, 2)
    assert inside.in_range
    assert inside.notes == ()
    outside = MODEL.kernel_time("w4a8_gemm", params, threads)
    assert not outside.in_range
    assert any(words in note for note in outside.notes)
    assert outside.high_s / outside.low_s > inside.high_s / inside.low_s


def test_the_nearest_class_is_used():
    model = fit_profile(synthetic_profile(groups=(32, 128, -1)))
    for group in (32, 128, -1):
        e = model.kernel_time("w4a8_gemm", GEMM | {"m": 1, "group_size": group}, 1)
        assert e.in_range
        assert e.time_s == pytest.approx(gemm_seconds(1, 4096, 4096, 1, group_size=group), rel=0.05)
    assert model.kernel_time("w4a8_gemm", GEMM | {"m": 1, "group_size": 64}, 1).in_range is False


def test_bounds_name_what_matters():
    small = MODEL.kernel_time("w4a8_gemm", {"m": 1, "n": 32, "k": 32}, 1)
    decode = MODEL.kernel_time("w4a8_gemm", GEMM | {"m": 1}, 1)
    prefill = MODEL.kernel_time("w4a8_gemm", GEMM | {"m": 128}, 1)
    assert (small.bound, decode.bound, prefill.bound) == ("overhead", "memory", "compute")
    for e in (small, decode, prefill):
        assert e.memory_s + e.compute_s + e.overhead_s == pytest.approx(e.time_s)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["m", "n", "k"])
def test_bad_sizes(name, bad):
    with pytest.raises(ValueError, match=f"{name}: expected finite numbers above 0"):
        MODEL.kernel_time("w4a8_gemm", GEMM | {"m": 1} | {name: bad}, 1)


def test_bad_threads_and_ops():
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        MODEL.kernel_time("w4a8_gemm", GEMM | {"m": 1}, 0)
    with pytest.raises(ProfileError, match="samples of w4a16_gemm, got w4a8_gemm"):
        MODEL.kernel_time("w4a16_gemm", GEMM | {"m": 1}, 1)


def test_a_missing_roof_is_named():
    profile = synthetic_profile()
    profile.roofs = [r for r in profile.roofs if r.name != "int8_peak"]
    with pytest.raises(ProfileError, match="expected a roof 'int8_peak', got dram_read"):
        fit_profile(profile)


# ---- laws ----

sizes = st.integers(1, 300)
dims = st.integers(1, 2000).map(lambda v: 32 * v)


@given(sizes, sizes, dims, dims, st.sampled_from([1, 2, 3]))
def test_monotone_in_rows(m1, m2, n, k, threads):
    low, high = sorted((m1, m2))
    e = MODEL.kernel_times("w4a8_gemm", {"m": np.array([low, high]), "n": n, "k": k}, threads)
    assert e.time_s[0] <= e.time_s[1] * (1 + 1e-12)


@given(sizes, dims, dims, dims, st.sampled_from([1, 2]))
def test_monotone_in_weights(m, n1, n2, k, threads):
    low, high = sorted((n1, n2))
    e = MODEL.kernel_times("w4a8_gemm", {"m": m, "n": np.array([low, high]), "k": k}, threads)
    assert e.time_s[0] <= e.time_s[1] * (1 + 1e-12)


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(1, 10**5), st.sampled_from([1, 2, 64]))
def test_intervals_hold_the_estimate_and_nothing_is_nan(m, n, k, threads):
    e = MODEL.kernel_time("w4a8_gemm", {"m": m, "n": n, "k": k}, threads)
    assert 0 < e.low_s <= e.time_s <= e.high_s < math.inf
    assert min(e.memory_s, e.compute_s, e.overhead_s) >= 0


@given(st.integers(1, 2000), st.integers(0, 32), st.integers(1, 300000), st.sampled_from(["greedy", "rejection"]))
def test_verification_is_monotone_in_drafts(batch, drafts, vocab, rule):
    params = {"batch": batch, "num_draft": np.array([drafts, drafts + 1]), "vocab": vocab, "rule": rule}
    e = MODEL.kernel_times("chain_verify", params, 2)
    assert e.time_s[0] <= e.time_s[1]
    assert np.all((e.low_s <= e.time_s) & (e.time_s <= e.high_s))


def test_a_dip_in_the_samples_becomes_a_plateau():
    """M = 6 measured faster than M = 5: the table stays monotone all the same."""
    profile = synthetic_profile(noise=0.0, held_out=False, threads=(1,))
    for i, s in enumerate(profile.samples):
        if s.op == "w4a8_gemm" and s.params["m"] == 6:
            profile.samples[i] = replace(s, time_s=tuple(0.6 * t for t in s.time_s), median_s=0.6 * s.median_s)
    model = fit_profile(profile)
    e = model.kernel_times("w4a8_gemm", GEMM | {"m": np.arange(1, 129)}, 1)
    assert np.all(np.diff(e.time_s) >= 0)


def test_a_cliff_is_kept():
    """Time doubles from M = 8 to 12 in one step: the table has it, a smooth law would not."""
    profile = synthetic_profile(noise=0.0, held_out=False, threads=(1,))
    for i, s in enumerate(profile.samples):
        if s.op == "w4a8_gemm" and s.params["m"] >= 12:
            profile.samples[i] = replace(s, time_s=tuple(2 * t for t in s.time_s), median_s=2 * s.median_s)
    model = fit_profile(profile)
    for m, factor in ((8, 1), (12, 2)):
        predicted = model.kernel_time("w4a8_gemm", GEMM | {"m": m}, 1).time_s
        assert predicted == pytest.approx(factor * gemm_seconds(m, 4096, 4096, 1), rel=0.05)


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.floats(1.5, 12))
def test_smooth_max_lies_between_its_limits(a, b, p):
    value = float(smooth_max(a, b, p))
    assert max(a, b) <= value * (1 + 1e-12)
    assert value <= max(a, b) * 2 ** (1 / p) * (1 + 1e-12)
    memory, compute = shares(a, b, value + 1.0, 1.0, p)
    assert float(memory + compute) == pytest.approx(value, rel=1e-6, abs=1e-12)


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e-3), min_size=3, max_size=3), st.integers(0, 1000))
def test_non_negative_finds_non_negative_truths(truth, seed):
    features = np.random.default_rng(seed).uniform(0.5, 100, (20, 3))
    times = features @ np.array(truth) + 1e-9
    found = non_negative(np.concatenate([np.ones((20, 1)), features], axis=1), times)
    assert np.all(found >= 0)
    np.testing.assert_allclose(np.concatenate([np.ones((20, 1)), features], axis=1) @ found, times, rtol=1e-3)


# ---- intervals ----


def test_conformal_rank_is_corrected_for_the_sample():
    assert conformal_half_width(np.arange(1, 10) / 10) == 0.9  # n = 9: the largest
    assert conformal_half_width(np.arange(1, 20) / 20) == 0.9  # n = 19: the 18th
    assert conformal_half_width([0.1] * 8) == pytest.approx(0.15)  # too few to promise 90%
    assert conformal_half_width([0.0] * 30) == 0.02
    assert conformal_half_width([]) == pytest.approx(math.log(2))


def test_jackknife_coverage_judges_without_the_point_itself():
    assert jackknife_coverage([0.1]) is None
    assert jackknife_coverage([0.1] * 20) == 1.0
    outlier = [0.1] * 10 + [9.0]
    assert jackknife_coverage(outlier) == pytest.approx(10 / 11)  # the outlier is outside what others set


def test_conformal_covers_at_its_level():
    rng = np.random.default_rng(0)
    hits = [abs(rng.normal()) <= conformal_half_width(rng.normal(size=19)) for _ in range(2000)]
    assert 0.88 <= np.mean(hits) <= 0.92  # sd 0.0067


# ---- stored fits ----


def test_stored_fits_predict_the_same(tmp_path):
    profile = synthetic_profile(groups=(32, -1))
    profile.fits, profile.accuracy = summarise(profile)
    save(profile, tmp_path / "p.json")
    stored, fitted = load_model(load(tmp_path / "p.json")), fit_profile(profile)
    assert model_to_json(stored).keys() == model_to_json(fitted).keys()
    for op, params in (
        ("w4a8_gemm", GEMM | {"m": np.arange(1, 200)}),
        ("moe_route", {"tokens": np.arange(1, 200), "num_experts": 8, "top_k": 2}),
        ("chain_verify", {"batch": np.arange(1, 200), "num_draft": 3, "vocab": 32000, "rule": "rejection"}),
    ):
        a, b = stored.kernel_times(op, params, 2), fitted.kernel_times(op, params, 2)
        np.testing.assert_allclose(a.time_s, b.time_s, rtol=1e-12)
        np.testing.assert_allclose(a.high_s, b.high_s, rtol=1e-12)
    assert stored.accuracy == profile.accuracy


def test_stale_or_foreign_fits_are_made_anew():
    profile = synthetic_profile()
    profile.fits, profile.accuracy = summarise(profile)
    wrong = copy.deepcopy(profile.fits)
    wrong["w4a8_gemm"]["classes"][0]["overhead_s"] = 1.0
    wrong["w4a8_gemm"]["classes"][1]["overhead_s"] = 1.0
    profile.fits = wrong
    assert load_model(profile).kernel_time("w4a8_gemm", GEMM | {"m": 1}, 1).time_s > 1  # current: believed
    profile.fits["w4a8_gemm"]["num_samples"] += 1
    assert load_model(profile).kernel_time("w4a8_gemm", GEMM | {"m": 1}, 1).time_s < 0.1
    profile.fits["w4a8_gemm"]["num_samples"] -= 1
    profile.fits["w4a8_gemm"]["law"] = 99
    assert load_model(profile).kernel_time("w4a8_gemm", GEMM | {"m": 1}, 1).time_s < 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [("overhead_s", -1.0), ("m", [2, 1]), ("m", []), ("compute_utilisation", [1.0]), ("p", "x"), ("n_times_k", [1.0])],
)
def test_broken_fits_are_refused(key, value):
    fits, _ = summarise(PROFILE)
    fits["w4a8_gemm"]["classes"][0][key] = value
    with pytest.raises(ProfileError, match=r"\$\.fits\.w4a8_gemm: expected a fit as assay writes it"):
        model_from_json(json.loads(json.dumps(fits)), PROFILE)


def test_fitting_is_pure():
    assert summarise(synthetic_profile()) == summarise(synthetic_profile())


def test_resident_weights_are_held_against_the_cache():
    profile = synthetic_profile(noise=0.0, threads=(1,), held_out=False)
    fast = [
        Sample.of("w4a8_gemm", "avx2", 1, {"m": m, "n": n, "k": 512, "group_size": 32, "symmetric": True, "resident": "llc"},
                  moved_bytes=0.5625 * n * 512 + 4 * m * (n + 512), ops=2 * m * n * 512,
                  time_s=[4e-6 + 0.5625 * n * 512 / 40e9 / 0.88 + 4 * m * (n + 512) / 40e9 / 0.88])
        for n in (1024, 4096, 8192) for m in (1, 2)
    ]  # fmt: skip
    profile.samples = fast
    model = fit_profile(profile)
    params = {"m": 1, "n": 8192, "k": 512}
    near = model.kernel_time("w4a8_gemm", params | {"resident": "llc"}, 1)
    far = model.kernel_time("w4a8_gemm", params, 1)
    assert far.memory_s / near.memory_s == pytest.approx(40e9 / DRAM[1], rel=0.1)


def test_many_predictions_in_one_call():
    m = np.tile(np.arange(1, 101), 1000)
    e = MODEL.kernel_times("w4a8_gemm", GEMM | {"m": m}, 2)
    assert len(e) == 100_000
    assert e.at(103).time_s == MODEL.kernel_time("w4a8_gemm", GEMM | {"m": 4}, 2).time_s


@pytest.mark.parametrize("shared", [None, {(256, 128), (1024, 64), (1024, 128)}], ids=["many shared", "three shared"])
def test_small_calls_that_one_thread_makes_are_priced_as_on_one(shared):
    """Two threads share work where that is faster: below 6 us it is not, and a call on two takes what it takes on one."""
    profile = synthetic_profile(noise=0.0)

    def seconds(tokens, experts, top_k, threads):
        work = tokens * (20e-9 + 1.2e-9 * experts + 15e-9 * top_k)
        return 2e-6 + (work if threads == 1 or work < 6e-6 else 3e-6 + work / 2)

    kept = [s for s in profile.samples if s.op != "moe_route"]
    like = next(s for s in profile.samples if s.op == "moe_route")
    for threads in (1, 2):
        for tokens in (1, 8, 64, 256, 1024):
            for experts, top_k in ((8, 2), (64, 8), (128, 8), (32, 4)):
                took = seconds(tokens, experts, top_k, threads)
                if shared and took < seconds(tokens, experts, top_k, 1) and (tokens, experts) not in shared:
                    continue
                params = {"tokens": tokens, "num_experts": experts, "top_k": top_k}
                kept.append(
                    replace(
                        like, threads=threads, params=params, time_s=(took,) * 3, median_s=took, held_out=experts == 32
                    )
                )
    profile.samples = kept
    model = fit_profile(profile)
    for tokens in (1, 30, 100, 500, 2000):
        for threads in (1, 2):
            told = model.kernel_time("moe_route", {"tokens": tokens, "num_experts": 96, "top_k": 8}, threads)
            assert told.time_s == pytest.approx(seconds(tokens, 96, 8, threads), rel=0.01)
    assert model_from_json(model_to_json(model), profile).ops["moe_route"] == model.ops["moe_route"]


def test_beside_tiles_an_uncalibrated_float_product_does_not_take_their_utilisation():
    profile = synthetic_profile(noise=0.02)
    profile.samples = [s for s in profile.samples if s.op != "w4a16_gemm"]
    arguments = {"moved_bytes": 1.0, "ops": 1e12, "threads": 1, "compute": "fp32_peak", "note": "none"}
    at_60_percent = 1e12 / 0.6 / Roofs(profile.roofs).get("fp32_peak", 1).median
    int8 = next(r for r in profile.roofs if r.name == "int8_peak" and r.threads == 1)
    profile.roofs.append(Roof.of("int8_vector_peak", 1, [int8.median / 7]))
    priced = fit_profile(profile).roof_times(**arguments)
    assert priced.time_s[0] == pytest.approx(at_60_percent, rel=1e-3)

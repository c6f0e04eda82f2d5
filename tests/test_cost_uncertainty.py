"""Where the model says that it is least sure: between far widths, where points disagree, where nothing was measured."""

import numpy as np
import pytest

from assay.cost.roofs import Roofs
from assay.cost.uncertainty import committee, deviations
from synthetic import synthetic_profile

PROFILE = synthetic_profile()
ROOFS = Roofs(PROFILE.roofs)
SHAPE = {"n": 4096, "k": 4096, "group_size": 32, "symmetric": True}


def asked(samples, *candidates, seed=0):
    return deviations(samples, ROOFS, candidates, np.random.default_rng(seed))


def test_a_width_between_two_measured_ones_is_less_sure_than_they_are():
    fitted = sorted({s.params["m"] for s in PROFILE.samples if s.op == "w4a8_gemm" and not s.held_out})
    below, above = next((a, b) for a, b in zip(fitted[-3:], fitted[-2:], strict=False) if b > a + 1)
    here, between = asked(
        PROFILE.samples,
        ("w4a8_gemm", {**SHAPE, "m": below}, 1),
        ("w4a8_gemm", {**SHAPE, "m": (below + above) // 2}, 1),
    )
    assert between > 3 * here
    # Time grows about as the width does there: a uniform law on log 2 has this deviation.
    assert between == pytest.approx(np.log(above / below) / 12**0.5, rel=0.35)


def test_noise_makes_it_less_sure():
    calm, noisy = (synthetic_profile(noise=n).samples for n in (0.002, 0.1))
    candidate = ("chain_verify", {"batch": 4, "num_draft": 2, "vocab": 100000, "rule": "rejection"}, 2)
    assert asked(noisy, candidate)[0] > 5 * asked(calm, candidate)[0]


def test_what_was_never_measured_comes_first():
    without = [s for s in PROFILE.samples if s.op != "moe_route"]
    found = asked(
        without, ("moe_route", {"tokens": 8, "num_experts": 64, "top_k": 8}, 1), ("w4a8_gemm", {**SHAPE, "m": 1}, 1)
    )
    assert found[0] == np.log(2)
    assert found[1] < found[0]


def test_it_is_a_function_of_its_arguments_and_leaves_held_out_points_alone():
    candidate = ("w4a8_gemm", {**SHAPE, "m": 2}, 1)
    assert asked(PROFILE.samples, candidate, seed=3) == asked(PROFILE.samples, candidate, seed=3)
    fitted = [s for s in PROFILE.samples if not s.held_out]
    assert asked(PROFILE.samples, candidate) == asked(fitted, candidate)
    assert len(committee(fitted, ROOFS, np.random.default_rng(0), members=3)) == 3

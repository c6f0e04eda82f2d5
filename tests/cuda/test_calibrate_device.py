"""Calibration of a real GPU (ASSAY_CUDA_REAL=1), or of the mock with every launch emulated: probes, checks and graphs alike."""

import gc

import mock_driver
import pytest

from assay import profile
from assay.measure import events, gpu_roofs, run
from assay.measure import gpu as gpu_device
from assay.measure.points import Point

SIZES = {"group_size": 32, "symmetric": True}
POINTS = [
    *(Point(op, 1, {"m": m, "n": n, "k": 128, **SIZES}, n == 96)
      for op in ("w4a16_gemm", "w4a8_gemm", "w4a16_gemv") for m in (1, 4) for n in (64, 96, 128)),
    Point("w4a8_gemm", 1, {"m": 1, "n": 64, "k": 128, **SIZES, "resident": "llc"}),
    Point("moe_route", 1, {"tokens": 3, "num_experts": 8, "top_k": 2}),
    Point("moe_experts", 1, {"tokens": 2, "top_k": 2, "distinct_experts": 3, "hidden_size": 64, "intermediate_size": 32, **SIZES}),
    *(Point("chain_verify", 1, {"batch": 2, "num_draft": 2, "vocab": 500, "rule": rule}) for rule in ("greedy", "rejection")),
]  # fmt: skip


@pytest.fixture
def small(request, monkeypatch):
    """On the mock: little to read and multiply, for the emulator does all of it."""
    if not mock_driver.real():
        request.getfixturevalue("mock").set(l2=1 << 17, sms=1)
        for name, value in (
            ("READ_BYTES", 1 << 20),
            ("PEAK_S", 1e-6),
            ("NEAR_S", 1e-6),
            ("NODES", (2, 4)),
            ("ATOMICS", 2),
        ):
            monkeypatch.setattr(gpu_roofs, name, value)
        monkeypatch.setattr(events, "GRAPH_S", 2e-5)
    yield
    gc.collect()


def test_a_calibration_runs(gpu, small, tmp_path):
    path = tmp_path / "p.json"
    made = run.Run("quick", [1], 0, path, budget_s=0.5, points=POINTS, device=gpu_device.Gpu(0, 0)).measure(
        lambda s, what: None
    )
    assert made.complete
    assert profile.load(path) == made
    assert {Point(s.op, 1, dict(s.params)).key for s in made.samples} == {p.key for p in POINTS}
    assert {r.name for r in made.roofs} == {"dram_read", "llc_read", "int8_peak", *profile.GPU_ROOF_UNITS}
    assert set(made.fits) == {"w4a16_gemm", "w4a8_gemm", "w4a16_gemv", "moe_route", "moe_experts", "chain_verify"}
    assert all(min(s.time_s) > 0 for s in made.samples)

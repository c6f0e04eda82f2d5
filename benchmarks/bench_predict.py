"""Predictions a second of one core: ``taskset -c 0 pytest benchmarks/bench_predict.py [--table FILE]...``

A prediction is the time of one call of one kernel at one set of sizes, with its 90% interval, its regime or parts, and whether it
lies outside of what was measured; `CALLS` of them, all different, are asked for at once. Laws: a device's, fitted to the measured
tables named by ``--table`` (one benchmark for the largest kernel class of each file), or else to an invented one of 37,000 GEMM
calls; and a CPU profile's, of an invented machine. Systems that predictions share are solved before the clock starts, as they
are from a model's second batch on; `test_first_batch` has them inside.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from assay.catalog import find_device
from assay.cost.device import Device, DeviceModel, fit_device, unknown_device
from assay.cost.fit import fit_profile
from assay.cost.validation import kernel_classes
from assay.importers import read_tables
from assay.tables import KernelTable
from synthetic import synthetic_profile
from tables import gemm_table

CALLS = 100_000
#: Sizes that future calls differ in; the others (heads, experts, parallelism) are those of the table.
VARIED = ("m", "n", "k", "batch", "isl", "kv_len")


def _device(name: str) -> Device:
    row = find_device(name)
    if row is None:
        return unknown_device(name)
    return Device(row["name"], row["memory_bytes_per_s"], row["ops_per_s"], row["multiprocessors"])


def _asked(table: KernelTable, count: int) -> KernelTable:
    """``count`` calls like those of ``table``, with sizes up to 20% off them."""
    rng = np.random.default_rng(0)
    asked = table.take(rng.integers(0, len(table), count))
    for name, values in asked.sizes.items():
        if name in VARIED:
            values[:] = np.maximum(np.round(values * rng.uniform(0.8, 1.2, count)), 1.0)
    return asked


@pytest.fixture(scope="module")
def device_model(request) -> tuple[DeviceModel, KernelTable]:
    path = request.param
    tables = [gemm_table(sides=68)] if path is None else list(read_tables(path))
    table = max(kernel_classes(tables), key=len)
    return fit_device(table, _device(table.system)), _asked(table, CALLS)


def pytest_generate_tests(metafunc):
    if "device_model" in metafunc.fixturenames:
        paths = metafunc.config.getoption("--table") or [None]
        ids = ["invented gemm" if p is None else Path(p).name for p in paths]
        metafunc.parametrize("device_model", paths, ids=ids, indirect=True)


def _record(benchmark, result, calls: int) -> None:
    assert np.isfinite(result.time_s).all()
    assert (result.low_s <= result.time_s).all()
    assert (result.time_s <= result.high_s).all()
    benchmark.extra_info["predictions_per_s"] = round(calls / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="device law")
@pytest.mark.parametrize("calls", [1_000, 10_000, CALLS])
def test_device_law(benchmark, device_model, calls):
    model, asked = device_model
    some = asked.take(np.arange(calls))
    result = benchmark.pedantic(model.predict, (some,), rounds=5, warmup_rounds=1)
    _record(benchmark, result, calls)


@pytest.mark.benchmark(group="device law")
def test_first_batch(benchmark, device_model):
    model, asked = device_model

    def afresh():  # a copy has no systems yet
        return (replace(model, residual=replace(model.residual)), asked), {}

    _record(benchmark, benchmark.pedantic(DeviceModel.predict, setup=afresh, rounds=2), CALLS)


@pytest.mark.benchmark(group="profile law")
@pytest.mark.parametrize("op", ["w4a8_gemm", "moe_route", "chain_verify"])
def test_profile_law(benchmark, op):
    model = fit_profile(synthetic_profile())
    rng = np.random.default_rng(0)
    names = {
        "w4a8_gemm": {"m": 128, "n": 16384, "k": 16384},
        "moe_route": {"tokens": 128, "num_experts": 128, "top_k": 8},
        "chain_verify": {"batch": 32, "num_draft": 8, "vocab": 150_000},
    }[op]
    params = {name: np.ceil(np.exp(rng.uniform(0, np.log(high), CALLS))) for name, high in names.items()}
    result = benchmark.pedantic(model.kernel_times, (op, params, 1), rounds=5, warmup_rounds=1)
    _record(benchmark, result, CALLS)

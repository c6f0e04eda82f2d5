"""The points of `assay calibrate` as pytest-benchmark benchmarks.

    pytest benchmarks/ --benchmark-json F && assay profile import F -o profile.json

Each point's answer is checked against the reference before it is timed. Options: --full for the points of
`assay calibrate --full`, --seed for the data and the order, --table for bench_predict.py. ASSAY_ISA and ASSAY_NUM_THREADS hold as everywhere.
"""

import platform
import statistics

import numpy as np
import pytest

import assay
from assay import machine
from assay.measure.arena import Arena
from assay.measure.clock import Timer, quiet
from assay.measure.points import Point, grid
from assay.measure.roofs import Roofs
from assay.measure.summary import point_roof
from assay.measure.workloads import Workloads
from assay.ops import info

#: Seconds that a point's rounds are meant to take, and how many rounds at least and at most (as in `calibrate`).
TARGET_S, MIN_ROUNDS, MAX_ROUNDS = 0.12, 5, 45


def pytest_addoption(parser):
    group = parser.getgroup("assay")
    group.addoption("--full", action="store_true", help="the points of assay calibrate --full")
    group.addoption("--table", action="append", help="measured kernels whose device law is timed (bench_predict.py)")
    group.addoption("--seed", type=int, default=0, help="of the data and of the order of the benchmarks")


def pytest_collect_file(file_path, parent):
    named = any(
        str(file_path) == str(parent.config.invocation_params.dir / arg.split("::")[0]) for arg in parent.config.args
    )
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def thread_counts() -> list[int]:
    return sorted({1, info.num_threads()})


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        mode = "full" if metafunc.config.getoption("--full") else "quick"
        points = [p for p in grid(mode, thread_counts()) if p.op in metafunc.module.OPS]
        metafunc.parametrize("point", points, ids=[f"{p.op}-{p.label}" for p in points])
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", thread_counts(), ids=lambda t: f"t{t}")


def pytest_collection_modifyitems(config, items):
    """A seeded order, so that a slow minute of the machine does not fall on one shape alone."""
    order = np.random.default_rng(config.getoption("--seed")).permutation(len(items))
    items[:] = [items[i] for i in order]


def pytest_benchmark_update_machine_info(config, machine_info):
    """What `assay profile import` needs to know of the machine and of the kernels."""
    here = machine.describe(tuple(t["isa"] for t in info.isa_tiers() if t["supported"]))
    machine_info["assay"] = {
        "machine": {
            "fingerprint": here.fingerprint(),
            "cpu": here.cpu,
            "isa": list(here.isa),
            "cores": here.cores,
            "memory_bytes": here.memory_bytes,
            "caches": {"l1d_bytes": here.l1d_bytes, "l2_bytes": here.l2_bytes, "l3_bytes": here.l3_bytes},
            "os": here.os,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "package": {"assay": assay.__version__, "kernels": info.kernel_versions(), "compiler": info.compiler()},
    }


@pytest.fixture(scope="session")
def here():
    return machine.describe(tuple(t["isa"] for t in info.isa_tiers() if t["supported"]))


@pytest.fixture(scope="session")
def arena(here, pytestconfig):
    mode = "full" if pytestconfig.getoption("--full") else "quick"
    return Arena(here, pytestconfig.getoption("--seed"), at_least=max(p.bytes for p in grid(mode, [1])))


@pytest.fixture(scope="session")
def workloads(arena, pytestconfig):
    return Workloads(arena, pytestconfig.getoption("--seed"))


@pytest.fixture(scope="session")
def roofs(here, arena):
    found = Roofs(here, thread_counts(), arena)
    for _ in range(3):
        found.measure()
    return found


def group_of(point: Point) -> str:
    """Op and shape: what stands in one table, with rows (tokens, drafts) and threads as its lines."""
    p = point.params
    if point.op.endswith("_gemm"):
        return f"{point.op} {p['n']}x{p['k']} g{p['group_size']}{'' if p['symmetric'] else ' asym'}"
    if point.op == "moe_route":
        return f"{point.op} {p['num_experts']} experts, top {p['top_k']}"
    if point.op == "moe_experts":
        return f"{point.op} {p['hidden_size']}x{p['intermediate_size']}, top {p['top_k']}"
    return f"{point.op} {p['rule']} {p['vocab']}"


@pytest.fixture
def time_point(benchmark, workloads, roofs):
    """Checks a point's answer, then times it by the rules of :mod:`assay.measure.clock`."""

    def run(point: Point) -> None:
        work = workloads.make(point)
        timer = Timer(work.rotation)
        near = roofs.near(point.threads)
        with quiet():
            calls, sample_s = timer.calibrate()
            rounds = int(min(max(TARGET_S / sample_s, MIN_ROUNDS), MAX_ROUNDS))
            benchmark.group = group_of(point)
            benchmark.pedantic(timer.call, rounds=rounds, iterations=calls)
        roof, amount = point_roof(point.op, point.params, point.bytes, point.ops)
        ceiling = near.get(roof) or statistics.median(roofs.readings[roof, point.threads])
        median_s = benchmark.stats.stats.median
        benchmark.extra_info.update(
            op=point.op,
            variant=work.variant,
            threads=point.threads,
            params=point.params,
            bytes=point.bytes,
            ops=point.ops,
            held_out=point.held_out,
            roof_near=near,
            percent_of_roof={roof: 100 * amount / median_s / ceiling},
        )

    return run

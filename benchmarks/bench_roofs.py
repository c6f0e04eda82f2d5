"""The roofs that the ops are held against."""

import pytest

from assay.ops import probe

#: Iterations are doubled until a run lasts this long.
PEAK_S = 0.005


def _record(benchmark, roof: str, unit: str, work: float, threads: int) -> None:
    benchmark.extra_info.update(roof=roof, unit=unit, work=work, threads=threads)


@pytest.mark.benchmark(group="dram_read")
def test_dram_read(benchmark, arena, threads):
    buffer = arena.data
    benchmark.pedantic(probe.read_bandwidth, (buffer, threads), rounds=7, warmup_rounds=1)
    _record(benchmark, "dram_read", "bytes_per_s", buffer.nbytes, threads)


@pytest.mark.benchmark(group="llc_read")
def test_llc_read(benchmark, roofs, threads):
    part, repeats = roofs.cached
    benchmark.pedantic(probe.read_bandwidth, (part, threads, repeats), rounds=15, warmup_rounds=1)
    _record(benchmark, "llc_read", "bytes_per_s", part.nbytes * repeats, threads)


@pytest.mark.parametrize("kind", ["int8", "fp32"])
def test_peak(benchmark, kind, threads):
    iterations = 1000
    while probe.run_peak(kind, iterations, threads)[1] < PEAK_S:
        iterations *= 2
    work, _ = probe.run_peak(kind, iterations, threads)
    benchmark.group = f"{kind}_peak"
    benchmark.pedantic(probe.run_peak, (kind, iterations, threads), rounds=15, warmup_rounds=1)
    _record(benchmark, f"{kind}_peak", "ops_per_s", work, threads)

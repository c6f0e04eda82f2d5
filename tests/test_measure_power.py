"""Energy counters: watts from invented powercap files, wrapping, unreadable and absent ones."""

import sys
import types

import pytest

from assay.measure.power import Meter, describe, gpu_watts


@pytest.fixture
def domain(tmp_path):
    path = tmp_path / "intel-rapl:0"
    path.mkdir()
    (path / "name").write_text("package-0\n")
    (path / "energy_uj").write_text("1000000\n")
    (path / "max_energy_range_uj").write_text("10000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package: counting it too would count it twice
    return path


def test_watts_are_joules_over_time_and_the_counter_may_wrap(domain):
    now = [0.0]
    meter = Meter(domain.parent, lambda: now[0])
    now[0] = 2.0
    (domain / "energy_uj").write_text("7000000\n")
    assert meter.reading()["cpu_w"] == {"package-0 (intel-rapl:0)": pytest.approx(3.0)}
    now[0] = 3.0
    (domain / "energy_uj").write_text("1000000\n")
    reading = meter.reading()
    assert reading["cpu_w"] == {"package-0 (intel-rapl:0)": pytest.approx(4.0)}
    assert "package-0 (intel-rapl:0) 4.0 W" in describe(reading)


def test_what_cannot_be_read_is_said(domain, tmp_path):
    reading = Meter(tmp_path / "none").reading()
    assert reading["cpu_w"] == {}
    assert any("no RAPL domain in" in why for why in reading["not_readable"])
    (domain / "energy_uj").write_text("garbage")
    reading = Meter(domain.parent).reading()
    assert reading["cpu_w"] == {}
    assert "not readable: " in describe(reading)


def test_a_counter_that_vanishes_is_left_out(domain):
    meter = Meter(domain.parent)
    (domain / "energy_uj").unlink()
    reading = meter.reading()
    assert reading["cpu_w"] == {}
    assert any("energy_uj" in why for why in reading["not_readable"])


def test_gpus_by_nvml(monkeypatch):
    class NVMLError(Exception):
        pass

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetPowerUsage=lambda h: 123456,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert gpu_watts() == ({"gpu 0": pytest.approx(123.456)}, "")

    def fail():
        raise NVMLError("driver not loaded")

    fake.nvmlInit = fail
    assert gpu_watts() == ({}, "NVML: driver not loaded")

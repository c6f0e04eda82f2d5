"""assay doctor: always prints, whatever is broken."""

import json
import os
import subprocess
import sys

import pytest

from assay import machine
from assay.cli import main
from assay.commands import doctor


def test_json_has_every_section(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "assay-doctor"
    assert report["schema_version"] == 1
    for section in ("assay", "machine", "isa_tiers", "kernels", "threads", "libraries", "gpu", "environment"):
        assert "error" not in report[section], report[section]
    selected = [k["op"] for k in report["kernels"] if k["selected"]]
    assert sorted(selected) == sorted({k["op"] for k in report["kernels"]}), "one variant selected for every op"
    assert report["threads"]["used"] >= 1


def test_text_names_every_kernel(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("int4_gemm", "moe_route", "spec_verify", "scalar", "fingerprint", "ASSAY_ISA"):
        assert word in out


@pytest.mark.parametrize(
    "name", ["_assay", "_machine", "_tiers", "_kernels", "_threads", "_libraries", "_gpu", "_environment"]
)
def test_a_broken_probe_is_reported_and_the_rest_stands(monkeypatch, capsys, name):
    def broken():
        raise RuntimeError("the probe broke")

    monkeypatch.setattr(doctor, name, broken)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("the probe broke") == 1
    assert out.count("not available") == 1


def test_without_the_compiled_module_and_with_a_wrong_isa():
    code = "import sys; sys.modules['assay._assay'] = None\nfrom assay.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compiled module does not load" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "assay.cli", "doctor"], capture_output=True, text=True, check=False,
        env={**os.environ, "ASSAY_ISA": "sse9", "ASSAY_NUM_THREADS": "many", "ASSAY_COLOUR": "red"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ASSAY_ISA='sse9' names no tier" in done.stdout
    assert "ASSAY_NUM_THREADS: expected a number" in done.stdout
    assert "ASSAY_COLOUR is set but means nothing" in done.stdout


def test_machine_where_nothing_can_be_read(monkeypatch):
    monkeypatch.setattr(machine, "_read", lambda path: None)
    monkeypatch.setattr(machine, "_SYSTEM_CPU", machine.Path("/nonexistent"))
    here = machine.describe()
    assert here.l3_bytes is None
    assert here.last_level_cache_bytes == 32 << 20
    assert len(here.fingerprint()) == 16


def test_fingerprint_is_stable_and_tells_machines_apart():
    from dataclasses import replace

    here = machine.describe(("scalar", "avx2"))
    assert here.fingerprint() == machine.describe(("scalar", "avx2")).fingerprint()
    assert replace(here, os="another kernel").fingerprint() == here.fingerprint()
    assert replace(here, l3_bytes=(here.l3_bytes or 0) + 1).fingerprint() != here.fingerprint()
    assert replace(here, cores=here.cores + 1).fingerprint() != here.fingerprint()

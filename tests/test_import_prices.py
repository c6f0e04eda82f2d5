"""Importers of accepted lengths and of whole servers."""

import pytest

from assay.errors import FormatError
from assay.importers.inferencex import read_accepted_lengths
from assay.importers.served import read_servers

CURVE = """# a comment
model-x:
  thinking_on:
    1: 1.84   # one draft
    2: 2.51
  thinking_off:
    1: 1.5
"""
HEAD = "model_path,backend,system,precision,isl,osl,tp_size,silicon_data_source,silicon_ttft_ms,silicon_tpot_ms\n"
ROW = "org/m,vllm,h200_sxm,fp8,1024,512,2.0,source=x; silicon_concurrency=8,331.2,15.06\n"


def write(tmp_path, text):
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")
    return path


def test_lengths(tmp_path):
    found = read_accepted_lengths(write(tmp_path, CURVE))
    assert found == {"model-x thinking_on": {1: 1.84, 2: 2.51}, "model-x thinking_off": {1: 1.5}}


@pytest.mark.parametrize(
    "text", ["", "a:\n  b:\n    1: 2.5\n", "a:\n  b:\n    1: 0.5\n", "a:\n  - x\n", "a:\n  b:\n    1: nan\n"]
)
def test_bad_lengths(tmp_path, text):
    with pytest.raises(FormatError, match="expected"):
        read_accepted_lengths(write(tmp_path, text))
    with pytest.raises(FormatError, match="cannot be read"):
        read_accepted_lengths(tmp_path / "none")


def test_servers(tmp_path):
    (run,) = read_servers(write(tmp_path, HEAD + ROW + ROW.replace("silicon_concurrency=8", "unknown")))
    assert (run.model, run.system, run.devices, run.concurrency, run.isl, run.osl) == (
        "org/m",
        "h200_sxm",
        2,
        8,
        1024,
        512,
    )
    assert (run.ttft_s, run.tpot_s) == pytest.approx((0.3312, 0.01506))


@pytest.mark.parametrize(
    "text", ["", HEAD, HEAD.replace("isl,", "") + ROW, HEAD + ROW.replace("15.06", "x"), HEAD + ROW.replace("15.06", "-1"),
             HEAD + ROW.replace("15.06", "nan")]
)  # fmt: skip
def test_bad_servers(tmp_path, text):
    with pytest.raises(FormatError, match="expected"):
        read_servers(write(tmp_path, text))
    with pytest.raises(FormatError, match="cannot be read"):
        read_servers(tmp_path / "none")

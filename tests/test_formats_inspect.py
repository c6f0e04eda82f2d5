"""``assay inspect``: its numbers against sums done here, its four outputs, and files that are no models."""

import csv
import io
import json
import struct

import numpy as np
import pytest

from assay.cli import main
from assay.commands.inspect import collect, error_report
from assay.formats.checkpoint import open_checkpoint
from assay.formats.gguf import open_gguf


@pytest.fixture
def small(tmp_path):
    """A file with a matrix of each kind: two quantised roles, an expert stack, one that INT4 groups do not divide."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "none")
    shapes = {
        "token_embd": (100, 64),
        "blk.0.attn_q": (64, 64),
        "blk.1.attn_q": (64, 64),
        "blk.0.ffn_up_exps": (3, 96, 64),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        w.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    w.add_tensor("blk.0.attn_k.weight", rng.standard_normal((8, 40)).astype(np.float32))
    w.add_tensor("blk.0.attn_v.weight", np.full((4, 64), np.nan, np.float32))
    w.add_tensor("output_norm.weight", np.ones(64, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_types(small):
    with open_checkpoint(small) as checkpoint:
        report = collect(checkpoint)
    assert report["model"] is None
    assert "block_count" in report["model_problem"]
    q8, f32 = report["types"]
    params = 100 * 64 + 2 * 64 * 64 + 3 * 96 * 64
    assert q8 == {"type": "Q8_0", "tensors": 4, "params": params, "bytes": params * 34 // 32, "bits_per_weight": 8.5,
                  "runs_as": "int8", "run_bits_per_weight": 8.5,
                  "share": pytest.approx(q8["bytes"] / (q8["bytes"] + f32["bytes"]))}  # fmt: skip
    assert (f32["tensors"], f32["params"], f32["bytes"]) == (3, 8 * 40 + 4 * 64 + 64, 4 * (8 * 40 + 4 * 64 + 64))


def test_errors_against_numpy(small):
    """Weight and w4a16 errors equal what the specification gives when computed here in float64."""
    from assay import reference

    with open_gguf(small) as f:
        report = error_report(f, max_rows=1000)
        w = f.dequantize("blk.0.ffn_up_exps.weight").reshape(-1, 64)
    rows = {r["name"]: r for r in report["roles"]}
    assert set(rows) == {"token_embd (lm_head)", "attn_q", "expert_up"}
    assert (rows["attn_q"]["matrices"], rows["attn_q"]["stored"], rows["attn_q"]["rows"]) == (2, {"Q8_0": 2}, 128)
    assert (rows["expert_up"]["matrices"], rows["expert_up"]["rows"]) == (3, 288)
    back = reference.dequantize_int4(*reference.quantize_int4(w, 32, True), 64, 32).astype(np.float64)
    want = np.linalg.norm(back - w) / np.linalg.norm(w)
    assert rows["expert_up"]["weight_error"] == pytest.approx(want, rel=1e-6)
    for row in report["roles"]:
        assert 0.05 < row["weight_error"] < 0.2
        assert 0.5 < row["w4a16_error"] / row["weight_error"] < 2
        assert row["w4a8_error"] == pytest.approx(row["w4a16_error"], rel=0.1)
        assert row["w4a8_error"] != row["w4a16_error"]
    reasons = {s["tensor"]: s["reason"] for s in report["skipped"]}
    assert set(reasons) == {"blk.0.attn_k.weight", "blk.0.attn_v.weight"}
    assert "K = 40 is no multiple of 32" in reasons["blk.0.attn_k.weight"]
    assert "finite" in reasons["blk.0.attn_v.weight"]


def test_rows_are_capped_and_repeatable(small):
    with open_gguf(small) as f:
        a, b = error_report(f, max_rows=10), error_report(f, max_rows=10)
    assert a == b
    row = next(r for r in a["roles"] if r["name"] == "token_embd (lm_head)")
    assert (row["rows"], row["rows_share"]) == (10, 0.1)


def test_outputs(small, capsys):
    for fmt in ("table", "md", "csv", "json"):
        assert main(["inspect", str(small), "--error", "--rows", "16", "-o", fmt]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        if fmt == "json":
            data = json.loads(out)
            assert (data["schema"], data["schema_version"]) == ("assay-inspect", 1)
            assert data["error"]["settings"] == {
                "group_size": 32,
                "symmetric": True,
                "tokens": 8,
                "seed": 0,
                "max_rows": 16,
            }
        elif fmt == "csv":
            rows = list(csv.DictReader(io.StringIO(out)))
            assert {r["name"] for r in rows} == {"token_embd (lm_head)", "attn_q", "expert_up"}
            assert float(rows[0]["weight_error"]) > 0
        else:
            assert "At most 16 evenly spaced rows of each matrix" in out
            assert "left out: blk.0.attn_k.weight: K = 40" in out


def test_bad_input(tmp_path, small, capsys):
    assert main(["inspect", str(tmp_path / "none.gguf")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["inspect", str(small), "--rows", "0"]) == 2
    assert "--rows: expected 1 or more, got 0" in capsys.readouterr().err
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert main(["inspect", str(path), "--error"]) == 0
    assert "no model" in capsys.readouterr().out


def test_no_control_characters_reach_the_terminal(tmp_path, capsys):
    path = tmp_path / "x.gguf"
    name = b"\x1b[31m.weight"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
    head += struct.pack("<IQQIQ", 2, 33, 1, 0, 0)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\0" * 132)
    assert main(["inspect", str(path), "--error"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "left out: ?[31m.weight" in out


def test_the_real_file(gemma_gguf):
    with open_checkpoint(gemma_gguf) as checkpoint:
        report, error = collect(checkpoint), error_report(checkpoint.file, max_rows=64)
    assert report["model"]["num_params"] == 268_098_176
    assert [t["type"] for t in report["types"]] == ["Q8_0", "Q5_0", "Q4_K", "Q6_K", "F32"]
    assert report["types"][0]["share"] == pytest.approx(0.729, abs=0.001)
    assert {r["name"] for r in error["roles"]} == {
        "token_embd (lm_head)", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
    }  # fmt: skip
    assert error["skipped"] == []
    for row in error["roles"]:
        assert 0.05 < row["weight_error"] < 0.15, row["name"]
        assert 0.05 < row["w4a8_error"] < 0.2, row["name"]

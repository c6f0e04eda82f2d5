"""``assay predict`` and ``assay profile`` end to end on an invented machine."""

import argparse
import csv
import io
import json
import re
import subprocess
import sys

import pytest

from answers import finite
from assay import catalog
from assay.cli import main
from assay.profile import load, save
from synthetic import gemm_seconds, hand_made_model, synthetic_profile


@pytest.fixture
def run(run, profile_path):
    def call(*args, profile=profile_path):
        return run("predict", *args, *(["--profile", profile] if profile else []))

    return call


def test_table(run):
    status, out, err = run("mixtral-8x7b")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "2 threads, 512 tokens in, 128 out" in lines[0]
    assert [line.split()[:2] for line in lines if line.startswith(("bf16", "int8", "int4"))] == [
        [p, b] for p in ("bf16", "int8", "int4") for b in ("1", "8", "64")
    ]
    assert "Nothing fits the machine's 16.0 GiB: the smallest row, int4 at batch 1, needs" in lines[1]
    assert "Error of w4a8_gemm on 72 points outside the fit (held-out): median" in out
    assert lines[-1].startswith("Next: assay predict mixtral-8x7b --profile")


def test_json(run):
    status, out, _ = run(
        "mixtral-8x7b", "-o", "json", "--batch", "1,4", "--precision", "int4", "--usd-per-hour", "1", "--explain"
    )
    assert status == 0
    answer = json.loads(out)
    assert (answer["schema"], answer["schema_version"]) == ("assay-prediction", 1)
    assert finite(answer)
    assert [(r["precision"], r["batch"]) for r in answer["rows"]] == [("int4", 1), ("int4", 4)]
    for row in answer["rows"]:
        for stem, tail in (
            ("tpot", "_s"),
            ("ttft", "_s"),
            ("tokens_per_s", ""),
            ("served_tokens_per_s", ""),
            ("usd_per_million", ""),
        ):
            assert 0 < row[f"{stem}_low{tail}"] <= row[f"{stem}{tail}"] <= row[f"{stem}_high{tail}"]
        assert row["memory_share"] + row["compute_share"] + row["overhead_share"] == pytest.approx(1)
        assert row["memory_bytes"] == pytest.approx(row["weights_bytes"] + row["kv_bytes"] + row["workspace_bytes"])
        decode = [c for c in row["calls"] if c["phase"] == "decode"]
        assert sum(c["time_s"] for c in decode) == pytest.approx(row["tpot_s"])
    model = catalog.load_model("mixtral-8x7b")
    true = sum(
        gemm_seconds(1, m.n, m.k, 2) * m.count * (2 if m.role == "expert" else 1)  # top 2 of 8 experts
        for m in model.matrices
        if m.role not in ("router", "embedding")
    )
    assert answer["rows"][0]["tpot_s"] == pytest.approx(true, rel=0.05)


def test_json_keys_are_documented(run):
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "predict-output.md").read_text()
    answer = json.loads(run("mixtral-8x7b", "-o", "json", "--batch", "1", "--precision", "int4", "--explain")[1])
    named = list(answer) + [k for k in answer["rows"][0] if not k.endswith(("_low", "_high"))]
    named += list(answer["rows"][0]["calls"][0])
    assert [k for k in named if f"`{k}`" not in text and f"`{k}," not in text] == []


def test_csv_and_markdown(run):
    _, out, _ = run("mixtral-8x7b", "-o", "csv", "--batch", "1")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [r["precision"] for r in rows] == ["bf16", "int8", "int4"]
    assert float(rows[2]["tpot_low_s"]) < float(rows[2]["tpot_s"])
    assert rows[0]["usd_per_million"] == ""
    _, out, _ = run("mixtral-8x7b", "-o", "md", "--batch", "1")
    assert sum(line.startswith("|") for line in out.splitlines()) == 5


def test_explain_shows_the_calls(run):
    _, out, _ = run("mixtral-8x7b", "--explain", "--batch", "1", "--precision", "int4")
    assert "int4, batch 1, decode:" in out
    assert "expert_down  M=1 N=4096 K=14336" in out


def test_every_format_by_tensor_and_of_the_cache(run):
    args = (
        "mixtral-8x7b",
        "-o",
        "json",
        "--batch",
        "8",
        "--precision",
        "bf16,fp8,int8,int4,w4a8,w4a16,mxfp4,nvfp4,int4,lm_head=bf16",
    )
    wide, narrow = (json.loads(run(*args, "--kv", kv)[1])["rows"] for kv in ("bf16", "int8"))
    assert [r["precision"] for r in wide] == [*args[6].split(",")[:8], "int4,lm_head=bf16"]
    assert finite(wide)
    by = {r["precision"]: r for r in wide}
    sizes = [by[name]["weights_bytes"] for name in ("mxfp4", "nvfp4", "int4,lm_head=bf16", "fp8", "int8", "bf16")]
    assert sizes == sorted(sizes)
    assert by["int4"] == by["w4a8"] | {"precision": "int4"}
    assert by["int4"]["weights_bytes"] == by["w4a16"]["weights_bytes"] == by["nvfp4"]["weights_bytes"]
    head = 32000 * 4096
    assert by["int4,lm_head=bf16"]["weights_bytes"] - by["int4"]["weights_bytes"] == pytest.approx(head * 11.5 / 8)
    for one, other in zip(wide, narrow, strict=True):
        assert other["kv_bytes"] / one["kv_bytes"] == pytest.approx(8.5 / 16)
        assert other["tpot_s"] < one["tpot_s"]
    assert "cache in int8" in run("mixtral-8x7b", "--batch", "1", "--kv", "int8")[1]


def test_what_fits_is_the_verdict(run, monkeypatch):
    monkeypatch.setattr(catalog, "resolve_model", lambda text: hand_made_model(stored_bits=5.0))
    rows = json.loads(run("anything.gguf", "--batch", "1,8", "-o", "json")[1])["rows"]
    best = max((r for r in rows if r["fits"]), key=lambda r: r["tokens_per_s"])
    _, out, _ = run("anything.gguf", "--batch", "1,8")
    assert out.splitlines()[1].startswith(f"Fastest that fits: {best['precision']} at batch 8: ")
    assert [line.split()[0] for line in out.splitlines() if line[:4] in ("file", "bf16", "int8", "int4")] == [
        "file", "file", "bf16", "bf16", "int8", "int8", "int4", "int4",
    ]  # fmt: skip
    assert f"--precision {best['precision']} --batch 8 --explain" in out


def test_notes(run, monkeypatch, tmp_path):
    profile = synthetic_profile()
    profile.complete = False
    save(profile, tmp_path / "part.json")
    monkeypatch.setattr(catalog, "resolve_model", lambda text: hand_made_model())
    _, out, _ = run("x", "--batch", "500", "--isl", "5000", "--threads", "3", profile=tmp_path / "part.json")
    for words in (
        "No calibrated kernel for bf16 products, attention, int8 products",
        "extrapolated: M outside the calibrated 1 to 128",
        "extrapolated: w4a8_gemm was calibrated at 2 threads, not 3",
        "measured on another machine (Invented 2-core",
        "calibration was interrupted",
        "more than the model's context of 4096",
    ):
        assert words in out, words


def test_profile_from_the_environment(run, monkeypatch, profile_path, tmp_path):
    monkeypatch.setenv("ASSAY_PROFILE", str(profile_path))
    assert run("mixtral-8x7b", "--batch", "1", profile=None)[0] == 0
    monkeypatch.setenv("ASSAY_PROFILE", str(tmp_path / "none.json"))
    status, out, err = run("mixtral-8x7b", profile=None)
    assert (status, out) == (2, "")
    assert "none.json, got no such file; make one with `assay calibrate --quick`" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch", "0"], "argument --batch: expected an integer from 1 to 65536, got '0'"),
        (["--batch", "1,x"], "got 'x'"),
        (["--batch", ""], "got ''"),
        (["--batch", "70000"], "got '70000'"),
        (["--isl", "0"], "argument --isl: expected an integer from 1 to"),
        (["--osl", "-1"], "argument --osl"),
        (["--threads", "0"], "argument --threads"),
        (["--precision", "int3"], "argument --precision: weights: expected one of bf16, .*, int4, file, got 'int3'"),
        (
            ["--precision", "lm_head=bf16"],
            "argument --precision: expected a format before those of roles, got 'lm_head=bf16'",
        ),
        (
            ["--precision", "int4,head=bf16"],
            "argument --precision: weights: expected roles of attention, .*, got 'head'",
        ),
        (["--precision", "file,lm_head=bf16"], "argument --precision: weights: expected no roles beside 'file'"),
        (["--kv", "int4"], "argument --kv: invalid choice"),
        (["--usd-per-hour", "-1"], "argument --usd-per-hour: expected US dollars an hour from 0 to 1000000, got '-1'"),
        (["--usd-per-hour", "nan"], "got 'nan'"),
        (["--usd-per-hour", "inf"], "got 'inf'"),
    ],
)
def test_bad_arguments(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "mixtral-8x7b", *args])
    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["mixtral-8x7b", "--precision", "file"], "got 'file', which needs a model file"),
        (["no-such-model-at-all"], "no-such-model-at-all"),
    ],
)
def test_bad_models(run, args, words):
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_future_profile(run, tmp_path, profile_path):
    path = tmp_path / "p.json"
    path.write_text(profile_path.read_text().replace('"schema_version": 1', '"schema_version": 7'))
    status, _, err = run("mixtral-8x7b", profile=path)
    assert status == 2
    assert "schema_version 7 is newer than this assay understands (1); upgrade assay" in err


# ---- assay profile ----


def test_profile_show(capsys, profile_path):
    assert main(["profile", "show", str(profile_path)]) == 0
    out = capsys.readouterr().out
    assert "Invented 2-core, 2 cores" in out
    assert "dram_read" in out
    assert "chain_verify" in out
    assert main(["profile", "show", str(profile_path), "-o", "json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {r["op"] for r in summary["ops"]} == {"w4a8_gemm", "moe_route", "chain_verify"}
    assert main(["profile", "show", str(profile_path), "-o", "csv"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 3


def test_profile_import_then_predict(capsys, tmp_path, run):
    """The same points by pytest-benchmark make the same prediction."""
    profile = synthetic_profile()
    benches = [
        {
            "name": f"roof{i}", "stats": {"data": [1e9 / v for v in r.samples]},
            "extra_info": {"roof": r.name, "threads": r.threads, "unit": r.unit, "work": 1e9},
        }
        for i, r in enumerate(profile.roofs)
    ]  # fmt: skip
    for i, s in enumerate(profile.samples):
        extra = {
            "op": s.op,
            "variant": s.variant,
            "threads": s.threads,
            "params": dict(s.params),
            "bytes": s.bytes,
            "ops": s.ops,
        }
        benches.append(
            {"name": f"s{i}", "stats": {"data": list(s.time_s)}, "extra_info": extra | {"held_out": s.held_out}}
        )
    source, target = tmp_path / "bench.json", tmp_path / "p.json"
    source.write_text(json.dumps({"machine_info": {"cpu": {"count": 2}}, "benchmarks": benches}))
    assert main(["profile", "import", str(source), "-o", str(target)]) == 0
    assert f"{len(profile.samples)} samples, 8 roofs" in capsys.readouterr().out
    assert load(target).accuracy["w4a8_gemm"]["n"] == 72
    direct = tmp_path / "direct.json"
    save(profile, direct)
    options = ("mixtral-8x7b", "-o", "json", "--batch", "1", "--precision", "int4")
    imported, measured = (json.loads(run(*options, profile=p)[1])["rows"][0] for p in (target, direct))
    assert imported["tpot_s"] == pytest.approx(measured["tpot_s"], rel=1e-6)
    assert imported["fits"] is None  # pytest-benchmark does not know the machine's memory
    assert measured["fits"] is False


def test_profile_import_refuses_what_cannot_be_fitted(capsys, tmp_path):
    source = tmp_path / "bench.json"
    params = {"m": 1, "n": 64, "k": 64, "group_size": 32, "symmetric": True}
    extra = {"op": "w4a8_gemm", "variant": "avx2", "threads": 1, "params": params, "bytes": 1.0, "ops": 1.0}
    source.write_text(json.dumps({"benchmarks": [{"name": "x", "stats": {"data": [1.0]}, "extra_info": extra}]}))
    assert main(["profile", "import", str(source), "-o", str(tmp_path / "p.json")]) == 2
    assert "expected a roof 'dram_read', got none" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("command", ["predict", "profile"])
def test_help_loads_only_the_standard_library(command):
    code = (
        "import argparse, sys; before = set(sys.modules)\n"
        f"import assay.commands.{command} as c\n"
        "c.add_arguments(argparse.ArgumentParser())\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'assay'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_text_formats():
    from assay.commands import predict

    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    assert "--usd-per-hour" in parser.format_help()


def test_hardware_is_priced_on_published_ceilings(run):
    status, out, err = run("mixtral-8x7b", "--hardware", "h100-sxm", profile=None)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Mixtral-8x7B-v0.1 on NVIDIA H100 SXM, 512 tokens in, 128 out"
    assert "from published ceilings only" in lines[1]
    assert "Nothing was measured here: ceilings as published (dram_read measured, NVIDIA/cuda-samples" in out
    assert "another machine" not in out
    assert lines[-1].startswith("Next: assay predict mixtral-8x7b --hardware h100-sxm --precision")
    status, out, _ = run("mixtral-8x7b", "--hardware", "NVIDIA H100 80GB HBM3", "-o", "json", profile=None)
    answer = json.loads(out)
    assert status == 0
    assert answer["profile"]["mode"] == "published"
    assert {row["basis"] for row in answer["rows"]} == {"roof"}
    assert all(row["tpot_high_s"] > 2 * row["tpot_low_s"] for row in answer["rows"])


def test_hardware_errors(run):
    status, _, err = run("mixtral-8x7b", "--hardware", "h100-sxm")
    assert status == 2
    assert "--hardware: expected no --profile beside it, got both" in err
    status, _, err = run("mixtral-8x7b", "--hardware", "abacus", profile=None)
    assert status == 2
    assert "hardware: expected one of a100-80gb-sxm, h100-sxm" in err

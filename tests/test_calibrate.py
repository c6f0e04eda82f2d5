"""assay calibrate, the command: what it prints, where, and how it ends; on a small grid."""

import json

import pytest

from assay import profile
from assay.cli import main
from assay.measure import device, run, summary
from assay.profile import Sample
from synthetic import synthetic_profile
from test_measure_run import interrupt_after, make_machine_small, small_points


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    make_machine_small(monkeypatch)
    monkeypatch.setattr(device, "grid", lambda mode, threads: [p for p in small_points() if p.threads in threads])
    monkeypatch.setattr(run, "BUDGET_S", {"quick": 0.5, "full": 0.6})


def test_table_says_what_was_measured_and_what_to_do_next(tmp_path, capsys):
    path = tmp_path / "p.json"
    assert main(["calibrate", "--threads", "2", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    made = profile.load(path)
    assert made.complete
    assert made.settings["threads"] == [1, 2]
    for word in ("dram_read", "int8_peak", "w4a8_gemm", "w4a16_gemm", "moe_route", "chain_verify", "median error",
                 str(path), f"{len(made.samples)} points", "Next: assay predict mixtral-8x7b"):  # fmt: skip
        assert word in out, word


def test_json_is_one_object_with_raw_numbers(tmp_path, capsys):
    path = tmp_path / "p.json"
    assert main(["calibrate", "--full", "--threads", "1", "--seed", "4", "--format", "json", "-o", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    made = profile.load(path)
    assert made.settings["mode"] == "full"
    assert made.seed == 4
    assert shown["schema"] == "assay-calibration"
    assert shown["schema_version"] == 1
    assert shown["profile"] == str(path)
    assert {(r["roof"], r["threads"]): r["median"] for r in shown["roofs"]} == {
        (r.name, r.threads): r.median for r in made.roofs
    }
    assert {row["op"] for row in shown["ops"]} == {s.op for s in made.samples}


@pytest.mark.parametrize("fmt", ["md", "csv"])
def test_other_formats(tmp_path, capsys, fmt):
    assert main(["calibrate", "--threads", "1", "--format", fmt, "-o", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    assert ("| op " in out) if fmt == "md" else out.startswith("op,threads,points,")


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(tmp_path, capsys, monkeypatch):
    path = tmp_path / "p.json"
    command = ["calibrate", "--threads", "1", "-o", str(path)]
    real = run.Run.measure
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "measure", lambda self, progress: real(self, interrupt_after(6)))
        assert main(command) == 130
    captured = capsys.readouterr()
    assert captured.out == "", "no result on stdout"
    assert "interrupted: 5 points are kept" in captured.err
    assert main(command) == 0
    assert "going on from 5 points" in capsys.readouterr().err


def test_fresh_throws_the_interrupted_run_away(tmp_path, capsys):
    path = tmp_path / "p.json"
    run.partial_path(path).write_text("anything")
    assert main(["calibrate", "--threads", "1", "--fresh", "-o", str(path)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    assert "set aside" not in capsys.readouterr().err


def test_default_path_is_where_predict_looks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ASSAY_PROFILE", str(tmp_path / "mine.json"))
    assert main(["calibrate", "--threads", "1"]) == 0
    assert profile.load(profile.default_profile_path()).complete
    assert str(tmp_path / "mine.json") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads: expected 1..256, got 0"),
        (["--threads", "999"], "--threads: expected 1..256, got 999"),
        (["--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["-o", "/proc/no/such/place.json"], "/proc/no"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_verdict_names_ops_that_miss_and_how_far_the_machine_moved(tmp_path, capsys, monkeypatch):
    path = tmp_path / "p.json"
    assert main(["calibrate", "--threads", "1", "-o", str(path)]) == 0
    assert "earlier calibration" not in capsys.readouterr().out
    real = summary.verdict
    monkeypatch.setattr(summary, "verdict", lambda made: (["w4a8_gemm"], ["chain_verify"]) if real(made) else None)
    assert main(["calibrate", "--threads", "1", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 ops within 5.0% in the median and 15.0% at the 90th percentile" in out
    assert "not chain_verify (median error" in out
    assert "against 1 earlier calibration the machine's roofs moved by up to" in out


def test_what_an_op_is_held_to():
    made = synthetic_profile()
    row = {"n": 9, "median_ape": 0.04, "p90_ape": 0.14, "bias": 0.0, "coverage": 0.9, "repeat_spread": 0.01}
    made.accuracy = {
        "good": row, "median": row | {"median_ape": 0.06}, "tail": row | {"p90_ape": 0.16},
        "noisy": row | {"median_ape": 0.2, "p90_ape": 0.29, "repeat_spread": 0.2},
        "unknown": row | {"n": 0}, "sequence": row,
    }  # fmt: skip
    assert summary.verdict(made) == (["good", "noisy"], ["median", "tail"])


def test_the_largest_move_of_a_roof():
    made = synthetic_profile()
    assert summary.moved_between_runs(made) is None
    roof = made.roof("llc_read", 1)
    made.settings["earlier"] = [{"created_utc": "", "roofs": {"llc_read@1": roof.median / 1.25, "gone@1": 1.0}}]
    assert summary.moved_between_runs(made) == pytest.approx(0.25)


# ---- the summary ------------------------------------------------------------------------------------------------


def sample(op, params, moved_bytes, ops, near=None):
    return Sample.of(op, "avx2", 1, params, moved_bytes=moved_bytes, ops=ops, time_s=[1e-3], roof_near=near)


def test_each_point_is_held_against_its_roof():
    made = synthetic_profile()
    roof = {r.name: r.median for r in made.roofs if r.threads == 1}
    shape = {"n": 64, "k": 64, "group_size": 32, "symmetric": True}
    route = {"tokens": 1, "num_experts": 8, "top_k": 2}
    verify = {"batch": 1, "num_draft": 1, "vocab": 9, "rule": "greedy"}
    for op, params, name, work in (
        ("w4a8_gemm", {"m": 1, **shape}, "dram_read", 6e6),
        ("w4a8_gemm", {"m": 31, **shape}, "dram_read", 6e6),
        ("w4a8_gemm", {"m": 32, **shape}, "int8_peak", 5e7),
        ("w4a16_gemm", {"m": 32, **shape}, "fp32_peak", 5e7),
        ("moe_route", route, "llc_read", 6e6),
        ("chain_verify", verify, "dram_read", 6e6),
    ):
        found = summary.roof_fraction(made, sample(op, params, 6e6, 5e7))
        assert found == (name, pytest.approx(work / 1e-3 / roof[name]))


def test_a_roof_read_beside_the_point_counts_first():
    params = {"m": 1, "n": 64, "k": 64, "group_size": 32, "symmetric": True}
    found = summary.roof_fraction(synthetic_profile(), sample("w4a8_gemm", params, 6e6, 1, {"dram_read": 1e10}))
    assert found == ("dram_read", pytest.approx(0.6))


def test_without_the_roof_there_is_no_fraction():
    made = synthetic_profile()
    made.roofs = []
    made.accuracy = {}
    rows = summary.op_rows(made)
    assert rows
    assert all(row["best_of_roof"] is None and row["held_out_median_ape"] is None for row in rows)

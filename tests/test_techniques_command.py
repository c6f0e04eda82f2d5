"""``assay techniques`` end to end."""

import csv
import io
import json

import pytest

from assay.cost.stored import summarise
from assay.profile import save
from synthetic import synthetic_profile


@pytest.fixture
def run(run):
    return lambda *args: run("techniques", *args)


def test_table(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Mixtral-8x7B-v0.1's dense twin of equal total parameters on NVIDIA H200 SXM, batch 16")
    assert lines[1].startswith("Most: ")
    assert lines[-1] == "Next: assay techniques mixtral-8x7b --batch 64"
    assert "moe and distil change the same thing: no set holds both." in out


def test_every_technique_and_every_set(run):
    """C10 to C17 alone, in pairs and in threes, less the sets that hold two models."""
    answer = json.loads(run("-o", "json")[1])
    claims = {row["claims"][0] for row in answer["rows"] if len(row["techniques"]) == 1}
    assert claims == {f"C{i}" for i in range(10, 18)}
    sizes = [len(row["techniques"]) for row in answer["rows"]]
    assert [sizes.count(n) for n in (0, 1, 2, 3)] == [1, 8, 28 - 1, 56 - 6]
    for row in answer["rows"][1:]:
        assert row["why"]
        assert row["measured"] is None
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        if len(row["techniques"]) > 1:
            assert row["interaction_low"] <= row["interaction"] <= row["interaction_high"]
            assert row["interaction"] == pytest.approx(row["speedup"] / row["product"])
    by_set = {frozenset(row["techniques"]): row for row in answer["rows"]}
    pair = by_set[frozenset(["moe", "w4a16"])]
    assert (pair["theoretical"], pair["practical"]) == ([16, 16], [6, 12])


def test_explain_shows_the_terms(run):
    out = run("--with", "int4,spec:k=2", "--explain")[1]
    for name in ("none", "w4a16 + spec:k=2"):
        assert f"An answer with {name} takes " in out
    rows = json.loads(run("--with", "int4,spec:k=2", "--explain", "-o", "json")[1])["rows"]
    for row in rows:
        assert row["memory_s"] + row["compute_s"] + row["overhead_s"] == pytest.approx(1 / row["answers_per_s"])


def test_measured_speed_ups_stand_beside(run, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"rows": [{"techniques": ["int8", "spec:k=2"], "speedup": 2.25}]}))
    out = json.loads(run("--with", "spec:k=2,int8", "--measured", str(path), "-o", "json")[1])
    assert [row["measured"] for row in out["rows"]] == [None, None, None, 2.25]
    for text in (
        "{}",
        '{"rows": [{"techniques": ["int8"], "speedup": -1}]}',
        "[",
        '{"rows": [{"techniques": 3, "speedup": 1}]}',
    ):
        path.write_text(text)
        status, _, err = run("--measured", str(path))
        assert status == 2
        assert "measured.json" in err


def test_explain(run):
    explained = json.loads(run("--with", "int4,spec", "--explain", "-o", "json")[1])["explain"]
    assert [line["of"] for line in explained] == ["speedup", "interaction"]
    for line in explained:
        swings = [max(i["at_low"], i["at_high"]) / min(i["at_low"], i["at_high"]) for i in line["inputs"]]
        assert len(swings) == 3
        assert swings == sorted(swings, reverse=True)
    assert "What moves the index of " in run("--with", "int4,spec", "--explain")[1]


def test_quality_is_a_constraint(run):
    args = ("--with", "int4:loss=0.02..0.03,kv=fp8:loss=0.01,batching", "-o", "json")
    every = json.loads(run(*args)[1])["rows"]
    assert max(row["loss_high"] for row in every) == pytest.approx(0.04)
    kept = json.loads(run(*args, "--most-loss", "0.03")[1])["rows"]
    assert all(row["loss_high"] <= 0.03 for row in kept)
    assert len(kept) == len(every) - 2  # the pair of both losses, and the three
    assert run(*args[:2], "--most-loss", "nan")[0] == 2


def test_json_and_csv_agree(run):
    args = (
        "llama-3.1-8b",
        "--with",
        "moe:experts=8:k=2,int4,kv=int8,spec:tree=3-1:accept=0.7,prefix:hit=0.25,batching",
    )
    answer = json.loads(run(*args, "-o", "json")[1])
    assert answer["schema"] == "assay-techniques"
    assert len(answer["rows"]) == 1 + 6 + 15 + 20
    rows = list(csv.DictReader(io.StringIO(run(*args, "-o", "csv")[1])))
    assert [float(r["speedup"]) for r in rows] == [r["speedup"] for r in answer["rows"]]
    for row in answer["rows"]:
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["interaction"] is None or row["interaction_low"] <= row["interaction"] <= row["interaction_high"]


def test_a_seed_decides_the_intervals_and_nothing_else(run):
    one, same, other = (run("phi-3-mini", "--seed", s, "-o", "json")[1] for s in ("1", "1", "2"))
    assert one == same
    assert one != other
    assert [r["speedup"] for r in json.loads(one)["rows"]] == [r["speedup"] for r in json.loads(other)["rows"]]


def test_profile(run, tmp_path):
    profile = synthetic_profile()
    profile.fits, profile.accuracy = summarise(profile)
    save(profile, tmp_path / "p.json")
    status, out, _ = run("llama-3.1-8b", "--profile", str(tmp_path / "p.json"), "--batch", "1")
    assert status == 0
    assert "spec:k=4 + w4a8" in out
    assert "silicon" not in out  # no watts to compare it by
    status, _, err = run("llama-3.1-8b", "--profile", str(tmp_path / "p.json"), "--with", "silicon")
    assert status == 2
    assert "watts" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--with", "int5"), "int5"),
        (("--with", "spec:k=0"), "1 to 64"),
        (("--with", "spec:k=4:k=5"), "each once"),
        (("--with", "spec:k=4:oops=5"), "oops"),
        (("--with", "spec:accept=nan"), "accept"),
        (("--with", "spec:tree=4-x"), "tree"),
        (("--with", "spec:k=2:tree=4"), "k or tree"),
        (("--with", "kv=int4"), "kv"),
        (("--with", "prefix:hit=1"), "prefix_hit"),
        (("--with", "int4,int4"), "different"),
        (("--with", ""), "''"),
        (("--with", "distil:model=x"), "unknown model"),
        (("--with", "adaptive:spread=0"), "spread"),
        (("--with", "adaptive:covered=1"), "covered"),
        (("--with", "silicon:to=apple-m4"), "link"),
        (("--with", "spec:accept=0.9/0.8..0.7"), "accept"),
        (("--with", "spec:k=2:passes=3"), "passes"),
        (("--with", "int4:loss=2"), "loss"),
        (("--most-loss", "2"), "--most-loss"),
        (("--hardware", "abacus"), "abacus"),
        (("--devices", "0"), "num_devices"),
        (("--batch", "0"), "batch"),
        (("--seed", "-1"), "seed"),
        (("no-such-model",), "no-such-model"),
    ],
)
def test_bad_input_is_named(run, args, message):
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert err.startswith("assay techniques: ")
    assert message in err
    assert err.count("\n") == 1

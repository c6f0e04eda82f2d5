"""``assay techniques`` end to end."""

import csv
import io
import json

import pytest

from assay.cli import main
from assay.cost.stored import summarise
from assay.profile import save
from synthetic import synthetic_profile


@pytest.fixture
def run(capsys):
    def call(*args):
        status = main(["techniques", *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_table(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Mixtral-8x7B-v0.1's dense twin of equal total parameters on NVIDIA H200 SXM, batch 1")
    assert lines[1].startswith("Most: moe + w4a16 + spec:k=4, ")
    assert lines[-1] == "Next: assay techniques mixtral-8x7b --batch 64"
    assert sum(" + " in line for line in lines[5:12]) == 3  # the pairs, after base and singles


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
    status, out, _ = run("llama-3.1-8b", "--profile", str(tmp_path / "p.json"))
    assert status == 0
    assert "w4a8 + spec:k=4" in out


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
        (("--with", "distil"), "distil"),
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

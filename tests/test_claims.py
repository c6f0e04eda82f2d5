"""The ledger of claims: every one answered, verdicts computed from the numbers."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest

from assay.catalog import find_device, list_claims, list_videos, load_model, token_price
from assay.cli import main
from assay.cost.claims import CASES, VERDICTS, Value, World, exact, recompute, verdict
from assay.cost.draws import Draws

CLAIMS = {claim["id"]: claim for claim in list_claims()}
NUMBERS = {name: claim["numbers"] for name, claim in CLAIMS.items()}
WORLD = World(load_model, find_device, Draws(64), token_price, tuple(list_videos()), NUMBERS)


@pytest.fixture(scope="module")
def rows():
    return {name: recompute(claim, WORLD) for name, claim in CLAIMS.items()}


def test_every_claim_is_there_and_answered(rows):
    assert list(rows) == [f"C{i:02}" for i in range(1, 39)]
    used = {part["case"] for claim in CLAIMS.values() for part in (claim, *claim.get("also", ()))}
    assert used == set(CASES)
    for row in rows.values():
        assert row["verdict"] in VERDICTS
        assert row["arithmetic"]
        assert bool(row["values"]) == (row["verdict"] != "not testable")
        assert bool(row["depends_on"]) == (row["verdict"] == "depends")
        for value in row["values"]:
            assert value["low"] <= value["value"] <= value["high"]
            assert all(math.isfinite(value[key]) and value[key] > 0 for key in ("low", "value", "high"))


@pytest.mark.parametrize(
    ("values", "claimed", "span", "wanted"),
    [
        ([], (1, 2), False, "not testable"),
        ([exact(1.0), exact(2.0)], (1, 2), False, "consistent"),
        ([exact(2.09)], (1, 2), False, "consistent"),
        ([exact(2.11)], (1, 2), False, "inconsistent"),
        ([exact(0.5), exact(1.5)], (1, 2), False, "depends"),
        ([Value(0.9, 0.5, 1.5)], (1, 2), False, "depends"),
        ([exact(0.5), exact(5.0)], (1, 2), False, "inconsistent"),
        ([exact(0.5), exact(5.0)], (1, 2), True, "depends"),
        ([exact(3.0), exact(5.0)], (1, 2), True, "inconsistent"),
        ([exact(0.9)], (None, 1), False, "consistent"),
        ([exact(1.0)], (None, 1), False, "inconsistent"),
        ([exact(7.0)], (1, None), False, "consistent"),
        ([exact(1.0)], (1, None), False, "inconsistent"),
    ],
)
def test_verdicts(values, claimed, span, wanted):
    assert verdict(values, claimed, span=span) == wanted


def test_contradictions_are_found(rows):
    """A growth of 58% that is 78%, a dense model called sparse, a hundredfold that is tenfold by its own figures, and so on."""
    wrong = ("C07", "C08", "C23", "C24", "C25", "C32")
    assert {name: rows[name]["verdict"] for name in wrong} == dict.fromkeys(wrong, "inconsistent")
    # 10 to 20 calls at $0.01 are $0.10 to $0.20, not $1; 100 calls are.
    assert rows["C06"]["verdict"] == "depends"
    assert [v["value"] for v in rows["C06"]["values"]] == pytest.approx([0.1, 0.2, 1.0])
    # The table's own singles reach 10, and its own practical figures multiply to 9 to 30.
    assert "10 (C13), 10 (C14), 10 (C15)" in rows["C18"]["arithmetic"]
    assert "index of 0.33 to 0.56" in rows["C18"]["arithmetic"]
    # 12B of 123B active would be a tenth, not a fifth.
    assert "10.25" in rows["C25"]["arithmetic"]
    assert rows["C32"]["values"][0]["value"] == pytest.approx(10**0.25 - 1)
    assert rows["C25"]["values"][0]["value"] == pytest.approx(122.6e9, rel=1e-3)
    assert rows["C33"]["verdict"] == "consistent"


@pytest.mark.parametrize(
    ("name", "change"),
    [("C01", {"claimed": [1e9, 2e9]}), ("C29", {"under": [0.2, 0.2]}), ("C31", {"end": [20, 10, 5, 5]}),
     ("C26", {"factors": [[30, 30], [5, 10]]}), ("C03", {"claimed": [5000, 6000]}), ("C17", {"claimed": [100, None]})],
)  # fmt: skip
def test_verdicts_follow_the_numbers(rows, name, change):
    claim = CLAIMS[name]
    other = recompute({**claim, "numbers": {**claim["numbers"], **change}}, WORLD)
    assert rows[name]["verdict"] == "consistent"
    assert other["verdict"] in ("inconsistent", "depends")


def test_unknown_case():
    with pytest.raises(ValueError, match="C99: case: expected"):
        recompute({"id": "C99", "claim": "", "case": "magic", "numbers": {}}, WORLD)


def run(capsys, *args):
    status = main(["claims", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command(capsys):
    status, out, _ = run(capsys, "c10", "C25")
    assert status == 0
    assert out.startswith("2 claims: ")
    answer = json.loads(run(capsys, "-o", "json")[1])
    assert len(answer["rows"]) == 38
    keys = {"id", "claim", "recomputed", "arithmetic", "verdict", "depends_on"}
    assert all(keys <= set(row) for row in answer["rows"])
    table = list(csv.DictReader(io.StringIO(run(capsys, "-o", "csv")[1])))
    assert [row["verdict"] for row in table] == [row["verdict"] for row in answer["rows"]]


def test_a_row_is_as_bad_as_its_worst_part():
    good = {
        "id": "C99",
        "claim": "",
        "case": "product_range",
        "numbers": {"factors": [[2, 2], [3, 3]], "unit": "", "claimed": [6, 6]},
    }
    part = {
        "says": "also",
        "case": "product_range",
        "numbers": {"factors": [[2, 2], [3, 3]], "unit": "", "claimed": [7, 7]},
    }
    assert recompute(good, WORLD)["verdict"] == "consistent"
    assert recompute({**good, "also": [part]}, WORLD)["verdict"] == "inconsistent"
    fine = {**part, "numbers": {**part["numbers"], "claimed": [6, 6]}}
    assert recompute({**good, "also": [fine]}, WORLD)["verdict"] == "consistent"
    nothing = {"says": "also", "case": "none", "numbers": {"reason": "none"}}
    assert recompute({**good, "also": [nothing]}, WORLD)["verdict"] == "consistent"


@pytest.mark.parametrize("args", [["C99"], ["--seed", "-1"], ["C01", "x"]])
def test_bad_input(capsys, args):
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.startswith("assay claims: ")


def test_the_page_is_the_ledgers_output(capsys):
    """docs/claims.md is what the command prints, under a heading; a number may differ in its last printed digit, by libm."""
    page = (Path(__file__).parent.parent / "docs" / "claims.md").read_text(encoding="utf-8")
    out = run(capsys, "-o", "md")[1]
    number = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"

    def split(text):
        body = re.sub(r"-{2,}", "--", re.sub(r" {2,}", " ", text))  # widths of columns follow the numbers
        return re.sub(number, "#", body), [float(n.replace(",", "")) for n in re.findall(number, body)]

    words, numbers = split(page[page.index(out.splitlines()[0][:10]) :])
    said, found = split(out)
    assert words.strip() == said.strip()
    assert numbers == pytest.approx(found, rel=0.0101)

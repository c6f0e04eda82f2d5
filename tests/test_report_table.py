"""How rows and quantities are written."""

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.report import table
from assay.report.table import Column, render

COLUMNS = [
    Column("name", "name"),
    Column(("time_s", "low_s", "high_s"), "time", table.seconds, align="right"),
    Column("fits", "fits", table.yes_no),
]
ROWS = [
    {"name": 'a "b", c|d', "time_s": 0.0123, "low_s": 0.011, "high_s": 0.0141, "fits": True, "hidden": 1},
    {"name": "e", "time_s": None, "low_s": None, "high_s": None, "fits": None},
]


def test_table():
    lines = render(ROWS, COLUMNS).splitlines()
    assert lines[0].split() == ["name", "time", "fits"]
    assert "12.3 ms [11.0, 14.1]" in lines[2]
    assert lines[2].rstrip().endswith("yes")
    assert lines[3].split() == ["e", "-", "-"]


def test_markdown_escapes_bars():
    lines = render(ROWS, COLUMNS, "md").splitlines()
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    assert "c\\|d" in lines[2]
    assert lines[1].split("|")[2].endswith(":")  # right aligned


def test_csv_is_raw_and_rfc_4180():
    text = render(ROWS, COLUMNS, "csv")
    assert text.count("\r\n") == 3
    assert text.replace("\r\n", "").count("\n") == 0
    assert '"a ""b"", c|d"' in text
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert rows[0] == {"name": 'a "b", c|d', "time_s": "0.0123", "low_s": "0.011", "high_s": "0.0141", "fits": "true"}
    assert rows[1] == {"name": "e", "time_s": "", "low_s": "", "high_s": "", "fits": ""}


def test_json_is_raw():
    rows = json.loads(render(ROWS, COLUMNS, "json"))
    assert rows[0] == {k: v for k, v in ROWS[0].items() if k != "hidden"}
    with pytest.raises(ValueError, match="JSON"):
        render([{"name": math.nan}], COLUMNS, "json")


@pytest.mark.parametrize("fmt", table.FORMATS)
def test_no_rows(fmt):
    text = render([], COLUMNS, fmt)
    assert json.loads(text) == [] if fmt == "json" else "time" in text


def test_unknown_format():
    with pytest.raises(ValueError, match="format: expected one of table, md, csv, json, got 'xml'"):
        render(ROWS, COLUMNS, "xml")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (table.seconds(0.0123, 0.011, 0.0141), "12.3 ms [11.0, 14.1]"),
        (table.seconds(41e-6), "41.0 us"),
        (table.seconds(2.1), "2.10 s"),
        (table.seconds(0.99999), "1.00 s"),
        (table.seconds(3e-10), "0.300 ns"),
        (table.seconds(0), "0 ns"),
        (table.seconds(1234), "1234 s"),
        (table.size(24.5 * 2**30), "24.5 GiB"),
        (table.size(512), "512 B"),
        (table.bandwidth(21.3e9), "21.3 GB/s"),
        (table.op_rate(390e9), "390 Gop/s"),
        (table.number(1234567), "1234567"),
        (table.number(0.00012), "0.00012"),
        (table.number(5e12), "5e+12"),
        (table.usd(0.412, 0.38, 0.45), "$0.412 [0.380, 0.450]"),
        (table.percent(0.0321), "3.2%"),
        (table.signed_percent(0.0321), "+3.2%"),
        (table.signed_percent(-0.1), "-10.0%"),
        (table.digits(-0.5), "-0.500"),
    ],
)
def test_quantities(text, wanted):
    assert text == wanted


@given(st.floats(1e-9, 1e6))
def test_seconds_keep_three_digits(value):
    number, unit = table.seconds(value).split()
    factor = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[unit]
    assert float(number) * factor == pytest.approx(value, rel=6e-3)
    assert float(number) < 1000.5 or unit == "s"

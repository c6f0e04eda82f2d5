"""The hardware catalog: every row with its source, none that cannot be, and prices with a date."""

import pytest

from assay.catalog import device_price, find_device, list_devices, list_prices, list_videos, token_price
from assay.catalog.lint import check_device, check_price
from assay.cost.machines import datasheet

ROWS = {row["name"]: row for row in list_devices()}
ASKED_FOR = {
    "a100-80gb-sxm", "h100-sxm", "h200-sxm", "b200", "l40s", "a10", "rtx-4090", "mi300x", "tpu-v5e", "groq-lpu", "cerebras-wse-3",
    "apple-m4", "apple-m4-pro", "apple-m4-max", "epyc-9654", "xeon-6980p", "xeon-8480",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ASKED_FOR))
def test_every_row_can_be(name):
    row = ROWS[name]
    assert check_device(row) == []
    assert find_device(name)["name"] == name
    assert datasheet(row).bytes_per_s == row["memory_bytes_per_s"]


def test_nothing_else_is_there():
    assert set(ROWS) == ASKED_FOR


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("l40s", {"fp8_ops_per_s": 1466e12}, "sparse"),
        ("mi300x", {"ops_per_s": 2615e12}, "sparse"),
        ("h100-sxm", {"ops_per_s": 1979e12}, "sparse"),
        ("h200-sxm", {"fp8_ops_per_s": 3958e12}, "sparse"),
        ("b200", {"fp4_ops_per_s": 18000e12}, "sparse"),
        ("a100-80gb-sxm", {"ops_per_s": 624e12}, "sparse"),
        ("rtx-4090", {"ops_per_s": 330e12}, "sparse"),
        ("cerebras-wse-3", {"ops_per_s": 125e15}, "sparse"),
        ("a100-80gb-sxm", {"fp8_ops_per_s": 624e12}, "fp8_ops_per_s"),
        ("h100-sxm", {"ops_per_s": 989.0}, "operations a byte"),
        ("h100-sxm", {"memory_bytes_per_s": 3.35e15}, "hbm3"),
        ("h100-sxm", {"tdp_w": 7000}, "tdp_w"),
        ("apple-m4-max", {"name": "apple-m4-ultra", "title": "Apple M4 Ultra"}, "made"),
        ("apple-m4-pro", {"memory_bytes_per_s": 546e9}, "Apple M4 Pro"),
        ("h100-sxm", {"source": ""}, "source"),
        ("h100-sxm", {"date": "2023"}, "date"),
        ("h100-sxm", {"memory_bytes": 0}, "memory_bytes"),
        ("h100-sxm", {"memory_bytes": float("nan")}, "memory_bytes"),
        ("h100-sxm", {"memory": "hbm9"}, "memory"),
        ("h100-sxm", {"checked": "", "unverified": []}, "checked"),
        ("h100-sxm", {"unverified": ["color"]}, "unverified"),
        ("h100-sxm", {"tdp_w": None}, "tdp_w"),
    ],
)
def test_what_cannot_be_is_found(name, change, word):
    assert any(word in said for said in check_device({**ROWS[name], **change}))


def test_names_are_told_apart():
    assert find_device("Apple M4 Pro")["name"] == "apple-m4-pro"
    assert find_device("Apple M4")["name"] == "apple-m4"
    assert find_device("Apple M4 Max")["name"] == "apple-m4-max"
    assert find_device("NVIDIA L40") is None


def test_prices_are_dated_ranges():
    for kind in ("hours", "purchases", "tokens"):
        for row in list_prices(kind):
            assert check_price(row) == [], row
    assert device_price("h100-sxm")["low"] < device_price("h100-sxm")["high"]
    assert device_price("groq-lpu") is None
    assert {row["device"] for kind in ("hours", "purchases") for row in list_prices(kind)} <= set(ROWS)
    assert token_price("openai-o1")["usd_out"] == 60
    with pytest.raises(ValueError, match="expected one of"):
        token_price("abacus-1")


@pytest.mark.parametrize(
    "change",
    [{"low": 3.0, "high": 2.0}, {"low": -1.0}, {"high": 1e6}, {"date": "soon"}, {"source": ""}, {"low": float("nan")}],
)
def test_absurd_prices_are_found(change):
    assert check_price({**device_price("h100-sxm"), **change})


def test_videos_have_sources():
    for row in list_videos():
        assert row["source"]
        assert row["measured_source"]
        assert all(find_device(m["device"]) for m in row["measured"])

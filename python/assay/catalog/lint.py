"""What a row of ``hardware.json`` cannot be: sparse peaks entered as dense, memories faster than their kind, chips that
were never made. `check_device` says what is wrong with a row; the tests hold every row against it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["check_device", "check_price"]

_FIELDS = {
    "name": str, "title": str, "match": list, "kind": str, "architecture": str, "memory": str, "source": str, "date": str,
    "checked": str, "unverified": list, "memory_bytes": float, "memory_bytes_per_s": float, "ops_per_s": float,
    "int8_ops_per_s": float, "fp8_ops_per_s": float, "fp4_ops_per_s": float, "sparsity": float, "multiprocessors": float,
    "clock_hz": float, "tdp_w": float, "link_bytes_per_s": float,
}  # fmt: skip
#: Dense operations a clock and multiprocessor (compute unit, core) by number format: the vendors' architecture papers. A
#: sparse figure is twice that, whatever the device.
_PER_CLOCK = {
    "ampere": {"ops_per_s": 2048, "int8_ops_per_s": 4096},
    "ga102": {"ops_per_s": 1024, "int8_ops_per_s": 2048},
    "ada": {"ops_per_s": 1024, "int8_ops_per_s": 2048, "fp8_ops_per_s": 2048},
    "ada-geforce": {"ops_per_s": 512, "int8_ops_per_s": 2048, "fp8_ops_per_s": 1024},
    "hopper": {"ops_per_s": 4096, "int8_ops_per_s": 8192, "fp8_ops_per_s": 8192},
    "blackwell": {"ops_per_s": 8192, "int8_ops_per_s": 16384, "fp8_ops_per_s": 16384, "fp4_ops_per_s": 32768},
    "cdna3": {"ops_per_s": 2048, "int8_ops_per_s": 4096, "fp8_ops_per_s": 4096},
    "apple-m4": {"ops_per_s": 256},
    "zen4": {"ops_per_s": 64, "int8_ops_per_s": 128},
    "amx": {"ops_per_s": 1024, "int8_ops_per_s": 2048},
}
#: Peaks without a clock to hold them against: known dense figures of the whole device.
_DENSE = {
    "tpu": {"ops_per_s": 197e12, "int8_ops_per_s": 394e12},
    "tsp": {"ops_per_s": 188e12, "int8_ops_per_s": 750e12},
    "wse": {"ops_per_s": 12.5e15},
}
#: The fastest memory of a kind on one device, bytes a second: stacks or channels times their rate.
_FASTEST = {
    "hbm2": 1.3e12, "hbm2e": 3.3e12, "hbm3": 5.4e12, "hbm3e": 8.1e12, "gddr6": 0.97e12, "gddr6x": 1.1e12,
    "lpddr5x": 0.85e12, "ddr5": 0.62e12, "mrdimm": 0.85e12, "sram": math.inf,
}  # fmt: skip
#: Operations a byte at the ridge, 16-bit: outside, a unit slipped.
_RIDGE = {"gpu": (30.0, 700.0), "sram": (0.3, 20.0), "soc": (10.0, 120.0), "cpu": (5.0, 900.0)}
_WATTS = {"gpu": (30.0, 1500.0), "sram": (50.0, 30000.0), "soc": (5.0, 300.0), "cpu": (30.0, 700.0)}
#: Apple's chips and their bandwidths: there is no M4 Ultra.
_APPLE = {"apple m4": (120e9,), "apple m4 pro": (273e9,), "apple m4 max": (410e9, 546e9)}
_WITHIN = 0.05


def check_device(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row of the hardware catalog, in words; empty when nothing is found."""
    wrong = [f"{name}: expected {kind.__name__}, got {row.get(name)!r}" for name, kind in _FIELDS.items()
             if not _is(row.get(name), kind)]  # fmt: skip
    if wrong:
        return wrong
    name = str(row["name"])
    if not row["source"]:
        wrong.append("source: expected where the figures are from, got none")
    if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", row["date"]):
        wrong.append(f"date: expected YYYY-MM, got {row['date']!r}")
    for field, table in (("kind", _RIDGE), ("memory", _FASTEST), ("architecture", _PER_CLOCK | _DENSE)):
        if row[field] not in table:
            wrong.append(f"{field}: expected one of {', '.join(table)}, got {row[field]!r}")
    wrong += [
        f"unverified: expected fields of the row, got {field!r}" for field in row["unverified"] if field not in _FIELDS
    ]
    if not row["checked"] and not row["unverified"]:
        wrong.append("checked: expected a second source, or the fields named that have none")
    for field in ("memory_bytes", "memory_bytes_per_s", "ops_per_s", "multiprocessors", "sparsity"):
        if row[field] <= 0:
            wrong.append(f"{field}: expected above 0, got {row[field]}")
    if wrong:
        return wrong
    if row["memory_bytes_per_s"] > _FASTEST[row["memory"]]:
        wrong.append(f"memory_bytes_per_s: expected at most {_FASTEST[row['memory']]:g} of {row['memory']}, got "
                     f"{row['memory_bytes_per_s']:g}")  # fmt: skip
    low, high = _RIDGE[row["kind"]]
    if not low <= row["ops_per_s"] / row["memory_bytes_per_s"] <= high:
        wrong.append(f"ops_per_s: expected {low:g} to {high:g} operations a byte of a {row['kind']}, got "
                     f"{row['ops_per_s'] / row['memory_bytes_per_s']:.4g}")  # fmt: skip
    low, high = _WATTS[row["kind"]]
    if row["tdp_w"] and not low <= row["tdp_w"] <= high:
        wrong.append(f"tdp_w: expected {low:g} to {high:g} W of a {row['kind']}, got {row['tdp_w']:g}")
    wrong += _peaks(row)
    for chip in re.findall(r"m\d(?: \w+)?", name.replace("-", " ")) if name.startswith("apple") else ():
        known = _APPLE.get(f"apple {chip}")
        if known is None:
            wrong.append(f"name: expected a chip that Apple made ({', '.join(_APPLE)}), got {row['title']!r}")
        elif row["memory_bytes_per_s"] not in known:
            wrong.append(f"memory_bytes_per_s: expected {known} of {row['title']}, got {row['memory_bytes_per_s']:g}")
    return wrong


def _peaks(row: Mapping[str, Any]) -> list[str]:
    """Peaks above what the architecture's dense units do: usually the sparse figure."""
    wrong = []
    architecture = row["architecture"]
    for field in ("ops_per_s", "int8_ops_per_s", "fp8_ops_per_s", "fp4_ops_per_s"):
        if architecture in _PER_CLOCK:
            most = _PER_CLOCK[architecture].get(field, 0) * row["multiprocessors"] * row["clock_hz"]
        else:
            most = _DENSE[architecture].get(field, 0.0)
        if row[field] > most * (1.0 + _WITHIN):
            sparse = f", {row[field] / most:.3g} times it: a sparse figure?" if most else ""
            wrong.append(
                f"{field}: expected at most the dense {most:.4g} of {architecture}, got {row[field]:.4g}{sparse}"
            )
        elif row[field] and row[field] < most * (0.5 + _WITHIN):
            wrong.append(f"{field}: expected about the dense {most:.4g} of {architecture}, got {row[field]:.4g}")
    return wrong


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return isinstance(value, kind)


def check_price(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row of ``prices.json``: no date or source, a range that is none, an absurd price."""
    wrong = []
    if not row.get("source"):
        wrong.append("source: expected where the price is from, got none")
    if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", str(row.get("date"))):
        wrong.append(f"date: expected YYYY-MM, got {row.get('date')!r}")
    names, most = (("usd_in", "usd_out"), 1000.0) if "usd_in" in row else (("low", "high"), 1e7)
    if row.get("kind") == "rental":
        most = 100.0
    values = [row.get(name) for name in names]
    if not all(isinstance(v, (int, float)) and 0 < v <= most for v in values):
        wrong.append(f"{names[0]}, {names[1]}: expected above 0 and at most {most:g}, got {values}")
    elif "low" in row and row["low"] > row["high"]:
        wrong.append(f"low: expected at most high, got {values}")
    return wrong

"""Rows and columns as an aligned table, Markdown, CSV (RFC 4180) or JSON; and how quantities are written.

Tables are for people: values are formatted, with units. CSV and JSON are for programs: raw SI values under the keys.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("table", "md", "csv", "json")
MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A column: the key (or keys, for a value with its interval) of its raw values, and how people read them.

    ``format`` gets the values of the keys, in their order; left out, the first value is shown with ``str``. A first
    value of None is shown as "-".
    """

    key: str | tuple[str, ...]
    title: str
    format: Callable[..., str] | None = None
    align: str = "left"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys as a tuple."""
        return (self.key,) if isinstance(self.key, str) else self.key

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell of a row as people read it."""
        values = [row.get(key) for key in self.keys]
        if values[0] is None:
            return MISSING
        return str(values[0]) if self.format is None else self.format(*values)


def render(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], fmt: str = "table") -> str:
    """The rows as text, without a final line end except in CSV, where RFC 4180 ends every record with CR LF.

    Raises
    ------
    ValueError
        A format that is none of `FORMATS`, or NaN or infinity on the way to JSON.
    """
    if fmt not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {fmt!r}")
    keys = list(dict.fromkeys(key for column in columns for key in column.keys))
    if fmt == "json":
        return to_json([{key: row.get(key) for key in keys} for row in rows])
    if fmt == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(keys)
        writer.writerows([_csv_cell(row.get(key)) for key in keys] for row in rows)
        return out.getvalue()
    from tabulate import tabulate

    cells = [[column.text(row) for column in columns] for row in rows]
    if fmt == "md":
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells]
    return tabulate(
        cells,
        headers=[column.title for column in columns],
        tablefmt="pipe" if fmt == "md" else "simple",
        colalign=[column.align for column in columns] if cells else None,
        disable_numparse=True,
    )


def to_json(value: Any) -> str:
    """Indented JSON; NaN and infinity, which JSON lacks, are a ValueError."""
    return json.dumps(value, indent=2, allow_nan=False)


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "; ".join(str(v) for v in value)
    return str(value)


# ---- quantities -------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three significant digits, without an exponent from a thousandth up to a billion."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    rounded = float(f"{value:.3g}")  # first, so that 0.9999 is 1.00 and not 1.000
    places = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{places}f}"


def _scale(value: float, steps: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest step not above the value (the smallest step for less), with its unit."""
    for factor, unit in steps:
        if abs(value) >= factor * 0.9995:
            return factor, unit
    return steps[-1]


TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
SIZES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
BANDWIDTHS = ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s"))
RATES = ((1e15, "Pop/s"), (1e12, "Top/s"), (1e9, "Gop/s"), (1e6, "Mop/s"), (1e3, "kop/s"), (1.0, "op/s"))
PLAIN = ((1.0, ""),)


def quantity(
    value: float, steps: Sequence[tuple[float, str]], low: float | None = None, high: float | None = None
) -> str:
    """A value in a fitting unit, with its interval in the same unit: "12.3 ms [11.0, 14.1]"."""
    factor, unit = _scale(value or high or 0.0, steps)
    text = f"{digits(value / factor)} {unit}".rstrip()
    if low is None or high is None:
        return text
    return f"{text} [{digits(low / factor)}, {digits(high / factor)}]"


def seconds(value: float, low: float | None = None, high: float | None = None) -> str:
    """ "12.3 ms", "41.0 us", "2.10 s"."""
    return quantity(value, TIMES, low, high)


def size(value: float) -> str:
    """ "24.5 GiB"."""
    return quantity(value, SIZES)


def bandwidth(value: float) -> str:
    """ "21.3 GB/s"."""
    return quantity(value, BANDWIDTHS)


def op_rate(value: float) -> str:
    """ "390 Gop/s"."""
    return quantity(value, RATES)


def roof_value(value: float, unit: str) -> str:
    """A roof in its unit: "21.3 GB/s", "390 Gop/s", "1.80 us"."""
    return {"ops_per_s": op_rate, "s": seconds}.get(unit, bandwidth)(value)


def number(value: float, low: float | None = None, high: float | None = None) -> str:
    """ "12.3 [11.0, 14.1]"."""
    return quantity(value, PLAIN, low, high)


def usd(value: float, low: float | None = None, high: float | None = None) -> str:
    """ "$0.412 [0.380, 0.450]"."""
    return "$" + number(value, low, high)


def percent(value: float) -> str:
    """A share as "3.2%"."""
    return f"{100 * value:.1f}%"


def signed_percent(value: float) -> str:
    """A deviation as "+3.2%"."""
    return f"{100 * value:+.1f}%"


def printable(text: str) -> str:
    """Names from a file without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def yes_no(value: bool) -> str:
    """ "yes" or "no"."""
    return "yes" if value else "no"


def error_columns() -> list[Column]:
    """Of how far predictions were from held-out measurements."""
    return [
        Column("median_ape", "median error", percent),
        Column("p90_ape", "90th pct.", percent),
        Column("bias", "bias", signed_percent),
        Column("coverage", "coverage", percent),
    ]

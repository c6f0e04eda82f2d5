"""Whole servers as AIConfigurator collects them: time to first token and per token, by model, lengths and concurrency."""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError

_COLUMNS = ("model_path", "backend", "system", "precision", "isl", "osl", "tp_size", "silicon_data_source", "silicon_ttft_ms",
            "silicon_tpot_ms")  # fmt: skip


@dataclass(frozen=True)
class MeasuredServer:
    """One run: ``concurrency`` requests kept going on ``devices`` devices that share every layer."""

    model: str
    backend: str
    system: str
    precision: str
    isl: int
    osl: int
    devices: int
    concurrency: int
    ttft_s: float
    tpot_s: float


def read_servers(path: str | Path) -> list[MeasuredServer]:
    """Rows of a CSV of measured servers; one without a stated concurrency is left out.

    Raises
    ------
    FormatError
        A missing column, or a number that is none.
    """
    found = []
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise FormatError(f"{path}: cannot be read: {exc}") from exc
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise FormatError(f"{path}: expected columns {', '.join(_COLUMNS)}, got none of {', '.join(missing)}")
    for number, row in enumerate(rows, 2):
        stated = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"] or "")
        if stated is None:
            continue
        try:
            values = [float(row[name]) for name in ("isl", "osl", "tp_size", "silicon_ttft_ms", "silicon_tpot_ms")]
        except (TypeError, ValueError) as exc:
            raise FormatError(f"{path}: line {number}: expected numbers, got {exc}") from exc
        if not all(math.isfinite(v) and v > 0 for v in values):
            raise FormatError(f"{path}: line {number}: expected finite numbers above 0, got {values}")
        isl, osl, devices, ttft, tpot = values
        found.append(
            MeasuredServer(
                row["model_path"], row["backend"], row["system"], row["precision"], int(isl), int(osl), int(devices),
                int(stated[1]), ttft / 1e3, tpot / 1e3,
            )
        )  # fmt: skip
    return found

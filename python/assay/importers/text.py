"""Text formats: our profile, pytest-benchmark, llama.cpp's llama-bench and test-backend-ops.

llama-bench (``-o json|jsonl|csv|md|sql``) times whole prompts and decoding, not kernels: its rows become
`assay.foreign.WholeRun` objects (`read_runs`). ``test-backend-ops perf`` times ``MUL_MAT(type_a=q4_0,...,m=,n=,k=)`` and the like, which are
kernels; so are the samples of our profiles and of our pytest-benchmark files.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..foreign import WholeRun
from ..tables import FORMATS, SIZES, KernelTable

MAX_BYTES = 256 * 2**20
#: GGUF types by what `assay.tables.FORMATS` calls the nearest of them.
GGUF_FORMATS = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "q8_0": "int8_wo",
    "q4_0": "int4_wo",
    "mxfp4": "w4a16_mxfp4",
}
OUR_FORMATS = {"w4a8_gemm": "w4a8", "w4a16_gemm": "int4_wo", "w8a8_gemm": "int8"}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PERF = re.compile(r"^\s*(\w+)\(([^)]*(?:\[[^\]]*\][^)]*)*)\):\s+\d+ runs -\s+([0-9.eE+-]+) us/run")


def kind_of(path: Path) -> str:
    """ "profile" (ours or pytest-benchmark's), "kernels" (test-backend-ops's) or "runs" (llama-bench's), by content.

    Raises
    ------
    FormatError
        Not readable, or none of them.
    """
    text = _text(path)
    if any(_PERF.match(line) for line in _ANSI.sub("", text).splitlines()):
        return "kernels"
    if _runs(text):
        return "runs"
    if text.lstrip()[:1] == "{":
        return "profile"
    raise FormatError(
        f"{path}: expected Parquet, a profile, pytest-benchmark JSON, llama-bench or test-backend-ops output, got none of them"
    )


def read_text(path: Path) -> list[KernelTable]:
    """Kernel points of a text file.

    Raises
    ------
    FormatError
        Not readable, in no known format, or one of whole runs (`read_runs`).
    """
    text = _text(path)
    plain = _ANSI.sub("", text)
    if any(_PERF.match(line) for line in plain.splitlines()):
        return _from_backend_ops(plain, path)
    if _runs(text):
        raise FormatError(f"{path}: expected timings of kernels, got llama-bench's whole runs")
    if text.lstrip()[:1] == "{":
        return _from_profile(text, path)
    raise FormatError(
        f"{path}: expected Parquet, a profile, pytest-benchmark JSON or test-backend-ops output, got none of them"
    )


def read_runs(path: Path) -> list[WholeRun]:
    """The tests of a llama-bench output, in any of its formats.

    Raises
    ------
    FormatError
        Not llama-bench's, or values that cannot be.
    """
    rows = _runs(_text(path))
    if not rows:
        raise FormatError(f"{path}: expected llama-bench output (json, jsonl, csv, md or sql), got none of them")
    return [_run(row, f"{path}: row {i}") for i, row in enumerate(rows)]


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: expected Parquet or UTF-8 text, got neither") from None
    except OSError as exc:
        raise FormatError(f"{path}: cannot be read: {exc.strerror}") from exc


def _from_profile(text: str, path: Path) -> list[KernelTable]:
    """Samples of the matrix products of our profile or of our pytest-benchmark file."""
    from ..errors import ProfileError
    from ..profile import Profile, from_pytest_benchmark

    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise FormatError(f"{path}: expected JSON, got something that does not parse ({exc})") from None
    try:
        profile = from_pytest_benchmark(path) if "benchmarks" in data else Profile.from_json(data)
    except ProfileError as exc:
        raise FormatError(f"{path}: {exc}") from exc
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for s in profile.samples:
        if s.op in OUR_FORMATS:
            key = OUR_FORMATS[s.op], f"{s.op} {s.variant} {s.threads} threads"
            row = (*(float(s.params[name]) for name in ("m", "n", "k")), s.median_s)
            found.setdefault(key, []).append(row)
    if not found:
        raise FormatError(f"{path}: expected samples of {', '.join(OUR_FORMATS)}, got none")
    source = f"assay {profile.package.get('assay', '')}".strip()
    return [_gemm_table(rows, dtype, profile.machine.cpu, source, variant) for (dtype, variant), rows in found.items()]


def _gemm_table(rows: list[tuple[float, ...]], dtype: str, system: str, source: str, variant: str) -> KernelTable:
    columns = np.array(rows, dtype=np.float64).T
    return KernelTable(
        op="gemm",
        dtype=dtype,
        system=system,
        source=source,
        variant=variant,
        sizes=dict(zip(SIZES["gemm"], columns[:3], strict=True)),
        time_s=columns[3],
        notes=() if dtype in FORMATS else (f"{dtype}: unknown number format, priced as 16 bits",),
    )


def _from_backend_ops(text: str, path: Path) -> list[KernelTable]:
    """``MUL_MAT(type_a=q4_0,type_b=f32,m=4096,n=1,k=14336,...):  852 runs - 55.22 us/run``; their n is our M."""
    backend: str = "unknown"
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if named := re.match(r"\s*(?:Backend \d+/\d+|Device description): (.+?)\s*$", line):
            backend = str(named[1])  # "CUDA0", and on the next line the device's own name
        match = _PERF.match(line)
        if not match or match[1] != "MUL_MAT":
            continue
        params = dict(re.findall(r"(\w+)=(\[[^\]]*\]|[^,]+)", match[2]))
        try:
            sizes = tuple(float(int(params[name])) for name in ("n", "m", "k"))
            seconds = float(match[3]) * 1e-6
            kind = str(params["type_a"])
        except (KeyError, ValueError) as exc:
            raise FormatError(
                f"{path}: line {number}: expected type_a, m, n, k and us/run, got {line.strip()!r}"
            ) from exc
        if min(sizes) < 1 or not 0 < seconds < float("inf"):
            raise FormatError(f"{path}: line {number}: expected sizes and a time above 0, got {line.strip()!r}")
        if params.get("bs", "[1,1]") == "[1,1]":
            found.setdefault((GGUF_FORMATS.get(kind, kind), backend), []).append((*sizes, seconds))
    if not found:
        raise FormatError(f"{path}: expected MUL_MAT lines of `test-backend-ops perf`, got none")
    return [_gemm_table(rows, dtype, where, "llama.cpp", "MUL_MAT") for (dtype, where), rows in found.items()]


def _runs(text: str) -> list[dict[str, Any]]:
    """Rows of llama-bench in whichever of its formats, or none."""
    stripped = text.lstrip()
    try:
        if stripped[:1] == "[":
            rows = json.loads(stripped)
        elif stripped[:1] == "{":
            rows = [json.loads(line) for line in stripped.splitlines() if line.strip()]
        elif re.search(r"^CREATE TABLE IF NOT EXISTS", stripped, re.M) or stripped.startswith("INSERT INTO"):
            rows = _sql_rows(stripped)
        elif "|" in stripped.split("\n", 1)[0]:
            rows = _markdown_rows(stripped)
        else:
            rows = list(csv.DictReader(stripped.splitlines()))
    except (json.JSONDecodeError, RecursionError, csv.Error):
        return []
    good = isinstance(rows, list) and all(isinstance(r, dict) and ("avg_ts" in r or "t/s" in r) for r in rows)
    return rows if good else []


def _sql_rows(text: str) -> list[dict[str, Any]]:
    """Runs llama-bench's own two statements, and no others, in an empty database in memory."""
    import sqlite3

    base = sqlite3.connect(":memory:")
    try:
        base.row_factory = sqlite3.Row
        for statement in text.split(";\n"):
            body = statement.strip().rstrip(";")
            if re.match(r"(CREATE TABLE IF NOT EXISTS|INSERT INTO) (test|llama_bench)\s*\(", body):
                base.execute(body)
        name = "llama_bench" if "llama_bench" in text else "test"
        return [dict(row) for row in base.execute(f"SELECT * FROM {name}")]
    except sqlite3.Error:
        return []
    finally:
        base.close()


def _markdown_rows(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.lstrip().startswith("|")]
    cells = [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines]
    if len(cells) < 3:
        return []
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:] if len(row) == len(cells[0])]


def _run(row: dict[str, Any], where: str) -> WholeRun:
    try:
        if "t/s" in row:
            return _markdown_run(row)
        prompt, generated = int(row["n_prompt"]), int(row["n_gen"])
        seconds, rate = float(row["avg_ns"]) * 1e-9, float(row["avg_ts"])
        deviation = float(row.get("stddev_ns") or 0.0) * 1e-9
        run = WholeRun(
            model=str(row.get("model_type") or row.get("model_filename") or "unknown"),
            backend=str(row.get("backends") or "unknown"),
            device=str(row.get("gpu_info") or row.get("cpu_info") or "unknown"),
            threads=int(row.get("n_threads") or 1),
            prompt=prompt,
            generated=generated,
            depth=int(row.get("n_depth") or 0),
            seconds=seconds,
            deviation_s=deviation,
            tokens_per_s=rate,
            params=_above_zero(row.get("model_n_params")),
            size_bytes=_above_zero(row.get("model_size")),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise FormatError(f"{where}: expected the fields of llama-bench, got {exc!r}") from exc
    if not (0 < run.seconds < float("inf") and 0 < run.tokens_per_s < float("inf") and run.prompt + run.generated > 0):
        raise FormatError(
            f"{where}: expected tokens, a time and a rate above 0, got {run.seconds} s, {run.tokens_per_s} t/s"
        )
    return run


def _above_zero(value: Any) -> float | None:
    """The number, None where there is none; ValueError for what is no finite number of at least 0."""
    number = float(value or 0.0)
    if not 0 <= number < float("inf"):
        raise ValueError(f"expected a finite number of at least 0, got {value!r}")
    return number or None


def _scaled(text: str | None, units: dict[str, float]) -> float | None:
    """ "6.74 B" as 6.74e9."""
    number, _, unit = (text or "").partition(" ")
    return _above_zero(float(number) * units[unit]) if unit in units else None


def _markdown_run(row: dict[str, Any]) -> WholeRun:
    """``| llama 7B Q4_0 | 3.56 GiB | 6.74 B | CUDA | 99 | pp512 @ d1024 | 2368.80 ± 93.24 |``."""
    test = re.fullmatch(r"(?:pp(\d+))?\+?(?:tg(\d+))?(?:\s*@\s*d(\d+))?", row["test"])
    rate = re.fullmatch(r"([0-9.]+)(?:\s*±\s*([0-9.]+))?", row["t/s"])
    if not test or not rate or not (test[1] or test[2]):
        raise ValueError(f"test {row['test']!r}, t/s {row['t/s']!r}")
    prompt, generated = int(test[1] or 0), int(test[2] or 0)
    per_s = float(rate[1])
    if per_s <= 0:
        raise ValueError(f"t/s {row['t/s']!r}")
    seconds = (prompt + generated) / per_s
    return WholeRun(
        model=row["model"],
        backend=row.get("backend", "unknown"),
        device="unknown",
        threads=int(row.get("threads") or 1),
        prompt=prompt,
        generated=generated,
        depth=int(test[3] or 0),
        seconds=seconds,
        deviation_s=seconds * float(rate[2] or 0.0) / per_s,
        tokens_per_s=per_s,
        params=_scaled(row.get("params"), {"M": 1e6, "B": 1e9}),
        size_bytes=_scaled(row.get("size"), {"MiB": 2.0**20, "GiB": 2.0**30}),
    )

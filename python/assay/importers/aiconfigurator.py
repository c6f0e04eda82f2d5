"""AIConfigurator's tables (ai-dynamo/aiconfigurator, ``systems/data``): one row a measured point of one kernel.

``latency`` is in milliseconds, ``power`` in watts. Columns by op, as that project's collectors write them: gemm
``gemm_dtype m n k``; moe ``moe_dtype num_tokens hidden_size inter_size topk num_experts moe_tp_size moe_ep_size
distribution``; attention ``batch_size isl num_heads num_key_value_heads head_dim kv_cache_dtype step window_size``;
collectives ``message_size num_gpus``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError, UnsupportedError
from ..tables import FORMATS, SIZES, FloatArray, KernelTable

MAX_ROWS = 20_000_000
OP_NAMES = {
    "gemm": "gemm",
    "moe": "moe",
    "context_attention": "context_attention",
    "generation_attention": "generation_attention",
    "all_reduce": "allreduce",
    "allreduce": "allreduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "alltoall",
}
COLLECTIVES = ("allreduce", "all_gather", "reduce_scatter", "alltoall")
#: Our size -> their column, and what stands for a column that older tables lack.
COLUMNS: Mapping[str, Mapping[str, tuple[str, float | None]]] = {
    "gemm": {"m": ("m", None), "n": ("n", None), "k": ("k", None)},
    "moe": {
        "tokens": ("num_tokens", None),
        "hidden": ("hidden_size", None),
        "inter": ("inter_size", None),
        "top_k": ("topk", None),
        "num_experts": ("num_experts", None),
        "tp": ("moe_tp_size", 1.0),
        "ep": ("moe_ep_size", 1.0),
    },
    "context_attention": {
        "batch": ("batch_size", None),
        "isl": ("isl", None),
        "past": ("step", 0.0),
        "heads": ("num_heads", None),
        "kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", 128.0),
        "window": ("window_size", 0.0),
    },
    "generation_attention": {
        "batch": ("batch_size", None),
        "kv_len": ("step", None),
        "heads": ("num_heads", None),
        "kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", 128.0),
        "window": ("window_size", 0.0),
    },
    **{name: {"bytes": ("message_size", None), "ranks": ("num_gpus", None)} for name in COLLECTIVES},
}
#: Experts without a gate (squared ReLU: two matrices, not three) of published models, Nemotron 3 Nano, Super and Ultra
#: (``mlp_hidden_act: relu2`` in their config.json), as (hidden, inter, top_k, num_experts); of Ultra in its latent space too.
#: The tables have no column for it, and only these collectors and later ones of the same framework measure them so
#: (collector/vllm/collect_moe.py and collector/sglang/collect_moe.py of the commit named in docs/accuracy-gpu.md; earlier
#: ones gave all experts a gate).
UNGATED_EXPERTS = ((2688, 1856, 6, 128), (4096, 2688, 22, 512), (8192, 5120, 22, 512), (2048, 5120, 22, 512))
UNGATED_SINCE: Mapping[str, tuple[int, ...]] = {"vllm": (0, 24), "sglang": (0, 5, 14)}
DTYPE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("gemm_dtype",),
    "moe": ("moe_dtype",),
    "context_attention": ("kv_cache_dtype", "attn_dtype"),
    "generation_attention": ("kv_cache_dtype", "attn_dtype"),
    **dict.fromkeys(COLLECTIVES, ("allreduce_dtype", "nccl_dtype")),
}


def read_parquet(path: Path) -> list[KernelTable]:
    """The tables of one file, split by op, dtype, device, software and kernel.

    Raises
    ------
    UnsupportedError
        pyarrow is not installed.
    FormatError
        Not Parquet, an op that is not known, a missing column, NaN or impossible values; names the file, the column
        and how many rows.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise UnsupportedError("Parquet tables need pyarrow: pip install 'assay[tables]'") from exc
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise FormatError(f"{path}: expected at most {MAX_ROWS} rows, got {file.metadata.num_rows}")
            table = file.read()
    except (pa.ArrowException, OSError) as exc:
        raise FormatError(f"{path}: expected a Parquet file, got one that does not read ({exc})") from exc
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    return read_columns(columns, str(path))


def read_columns(columns: Mapping[str, npt.NDArray[Any]], where: str) -> list[KernelTable]:
    """As `read_parquet`, of columns already in memory; ``where`` starts the messages."""
    rows = len(next(iter(columns.values()))) if columns else 0
    if rows == 0:
        raise FormatError(f"{where}: expected rows, got none")
    names = _texts(columns, "op_name", where)
    tables = []
    for name in sorted(set(names.tolist())):
        if name not in OP_NAMES:
            raise FormatError(f"{where}: op_name: expected one of {', '.join(sorted(OP_NAMES))}, got {name!r}")
        here = names == name
        tables += _one_op(OP_NAMES[name], {k: v[here] for k, v in columns.items()}, where)
    return tables


def _one_op(op: str, columns: Mapping[str, npt.NDArray[Any]], where: str) -> list[KernelTable]:
    sizes: dict[str, FloatArray] = {}
    for size, (column, default) in COLUMNS[op].items():
        if column not in columns and default is not None:
            sizes[size] = np.full(len(columns["op_name"]), default)
        else:
            sizes[size] = _numbers(columns, column, where, low=SIZES[op][size])
    if op == "generation_attention":
        sizes["kv_len"] = (
            sizes["kv_len"] + _numbers(columns, "isl", where, low=0) if "isl" in columns else sizes["kv_len"]
        )
    if op == "moe":
        sizes["alpha"] = _alphas(
            _texts(columns, "distribution", where) if "distribution" in columns else None, sizes, where
        )
        _moe_consistent(sizes, where)
        sizes["matrices"] = _matrices(columns, sizes)
    time_s = _numbers(columns, "latency", where, low=0.0, strict=True) * 1e-3
    power = _power(columns, where) if "power" in columns else None
    dtype_column = next((c for c in DTYPE_COLUMNS[op] if c in columns), None)
    if dtype_column is None:
        raise FormatError(f"{where}: {DTYPE_COLUMNS[op][0]}: expected this column, got {', '.join(columns)}")
    keys = {
        "dtype": _texts(columns, dtype_column, where),
        "system": _texts(columns, "device", where) if "device" in columns else _constant(time_s, "unknown"),
        "framework": _texts(columns, "framework", where) if "framework" in columns else _constant(time_s, "unknown"),
        "version": _texts(columns, "version", where) if "version" in columns else _constant(time_s, ""),
        "variant": _texts(columns, "kernel_source", where)
        if "kernel_source" in columns
        else _constant(time_s, "unknown"),
    }
    stacked = np.stack(list(keys.values()), axis=1)
    unique, inverse = np.unique(stacked, axis=0, return_inverse=True)
    tables = []
    for index, (dtype, system, framework, version, variant) in enumerate(unique.tolist()):
        here = inverse.reshape(-1) == index
        watts = power[here] if power is not None else None
        if watts is not None and not np.isfinite(watts).all():
            watts = None
        notes = () if dtype in FORMATS else (f"{dtype}: unknown number format, priced as 16 bits",)
        tables.append(
            KernelTable(
                op=op,
                dtype=dtype,
                system=system,
                source=f"{framework} {version}".strip(),
                variant=variant,
                sizes={name: values[here] for name, values in sizes.items()},
                time_s=time_s[here],
                power_w=watts,
                notes=notes,
            )
        )
    return tables


def _constant(like: FloatArray, text: str) -> npt.NDArray[Any]:
    return np.full(like.shape, text)


def _texts(columns: Mapping[str, npt.NDArray[Any]], name: str, where: str) -> npt.NDArray[Any]:
    if name not in columns:
        raise FormatError(f"{where}: {name}: expected this column, got only {', '.join(columns)}")
    values = columns[name]
    missing = sum(not isinstance(v, str) for v in values.tolist())
    if missing:
        raise FormatError(f"{where}: {name}: expected text, got nothing in {missing} of {values.size} rows")
    return np.array([str(v) for v in values.tolist()])


def _numbers(
    columns: Mapping[str, npt.NDArray[Any]], name: str, where: str, *, low: float, strict: bool = False
) -> FloatArray:
    if name not in columns:
        raise FormatError(f"{where}: {name}: expected this column, got only {', '.join(columns)}")
    try:
        values = np.array(columns[name], dtype=np.float64)
    except (TypeError, ValueError):
        raise FormatError(f"{where}: {name}: expected numbers, got {columns[name].dtype}") from None
    bad = ~np.isfinite(values) | ((values <= low) if strict else (values < low))
    if bad.any():
        wanted = f"finite numbers {'above' if strict else 'of at least'} {low:g}"
        got = f"{values[np.argmax(bad)]:g}, and {int(bad.sum())} bad of {values.size} rows"
        raise FormatError(f"{where}: {name}: expected {wanted}, got {got}")
    return values


def _power(columns: Mapping[str, npt.NDArray[Any]], where: str) -> FloatArray | None:
    """Watts, or None where the whole column is empty or zero: collectors without NVML leave it so."""
    try:
        values = np.array(columns["power"], dtype=np.float64)
    except (TypeError, ValueError):
        raise FormatError(f"{where}: power: expected numbers, got {columns['power'].dtype}") from None
    if np.all(np.isnan(values) | (values == 0)):
        return None
    bad = values < 0
    if bad.any() or np.isinf(values).any():
        raise FormatError(f"{where}: power: expected watts, got {int(bad.sum())} negative of {values.size} rows")
    return np.where(values > 0, values, np.nan)


def _alphas(distribution: npt.NDArray[Any] | None, sizes: Mapping[str, FloatArray], where: str) -> FloatArray:
    """Exponent of the power law of expert loads: 0 for a balanced load."""
    if distribution is None:
        return np.zeros(sizes["tokens"].shape)
    exponent: dict[str, float] = {}
    for text in set(distribution.tolist()):
        found = re.fullmatch(r"(?:balanced|uniform)|power_law(?:_([0-9.]+))?(?:_\w+)?", text)
        try:
            exponent[text] = 0.0 if text in ("balanced", "uniform") else float((found and found[1]) or 1.01)
        except ValueError:
            found = None
        if found is None:
            raise FormatError(f"{where}: distribution: expected balanced or power_law_EXPONENT, got {text!r}")
    return np.array([exponent[text] for text in distribution.tolist()])


def _matrices(columns: Mapping[str, npt.NDArray[Any]], sizes: Mapping[str, FloatArray]) -> FloatArray:
    """Matrices of an expert: three, or two where a collector is known to have measured it without a gate."""
    matrices = np.full(sizes["tokens"].shape, 3.0)
    if "framework" not in columns or "version" not in columns:
        return matrices
    shape = np.stack([sizes[name] for name in ("hidden", "inter", "top_k", "num_experts")], axis=1)
    ungated = (shape[:, None] == np.array(UNGATED_EXPERTS)).all(axis=2).any(axis=1)
    for framework, version in {tuple(pair) for pair in zip(columns["framework"], columns["version"], strict=True)}:
        since = UNGATED_SINCE.get(str(framework).lower())
        number = re.match(r"\d+(?:\.\d+)*", str(version))
        if since and number and tuple(int(part) for part in number[0].split(".")) >= since:
            matrices[ungated & (columns["framework"] == framework) & (columns["version"] == version)] = 2.0
    return matrices


def _moe_consistent(sizes: Mapping[str, FloatArray], where: str) -> None:
    for name, bad in (
        ("topk", sizes["top_k"] > sizes["num_experts"]),
        ("moe_ep_size", sizes["ep"] > sizes["num_experts"]),
    ):
        if bad.any():
            raise FormatError(
                f"{where}: {name}: expected at most num_experts, got more in {int(bad.sum())} of {bad.size} rows"
            )

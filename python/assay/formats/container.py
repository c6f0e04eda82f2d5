"""The layout in which assay keeps weights ready to be packed.

An assay container is a safetensors file (or shards with an index). A matrix NAME, or a stack of them, is stored as what
`assay.pack`, `assay.pack_int8` and `assay.pack_wide` take:

=================  ============================================================================================
NAME.qweight       U8 [..., N, ceil(K/2)], low nibble = even k, or I8 [..., N, K]
NAME.scales        F16 or F32 [..., N, G]
NAME.zeros         U8 [..., N, G]: INT4's zero points; absent, 8 everywhere
NAME.minimum       F32 [..., N, G]: of the wider form; absent, 0 everywhere
NAME.codebook      F32 [16]: of the wider form
NAME.perm          I32 [K]: column j of qweight is input feature perm[j]
=================  ============================================================================================

``__metadata__`` says ``format`` "assay", ``assay_layout`` "1", and under ``matrices`` a JSON object of NAME to ``form``
("int4", "int8", "wide4", "wide8"), ``shape``, ``group_size`` and ``stored`` (what it was converted from). Other tensors are
as they were.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import FormatError
from ._checks import parse_json, short
from .nibbles import pack, unpack
from .safetensors import SafetensorsFile
from .weights import Int4Weights, Int8Weights, Weights, WideWeights

__all__ = [
    "LAYOUT",
    "container_matrices",
    "form_of",
    "matrix_entry",
    "matrix_parts",
    "read_matrix",
]

LAYOUT = "1"
_FORMS = ("int4", "int8", "wide4", "wide8")


def form_of(w: Weights) -> str:
    """ "int4", "int8", "wide4" or "wide8"."""
    if isinstance(w, Int4Weights):
        return "int4"
    return "int8" if isinstance(w, Int8Weights) else f"wide{w.bits}"


def matrix_entry(w: Weights, shape: tuple[int, ...], stored: str) -> dict[str, Any]:
    """What the metadata says of a matrix."""
    return {"form": form_of(w), "shape": list(shape), "group_size": w.group_size, "stored": stored}


def matrix_parts(name: str, w: Weights, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The tensors of a matrix; `shape` is (..., N, K), whose rows are flattened in `w`."""
    lead = shape[:-1]
    grid = (*lead, w.k // w.group_size)
    four = isinstance(w, Int4Weights) or (isinstance(w, WideWeights) and w.bits == 4)
    parts = {
        f"{name}.qweight": (pack(w.q) if four else w.q).reshape(*lead, -1),
        f"{name}.scales": w.scales.reshape(grid),
    }
    for part in ("zeros", "minimum"):
        array = getattr(w, part, None)
        if array is not None:
            parts[f"{name}.{part}"] = array.reshape(grid)
    for part in ("codebook", "perm"):
        array = getattr(w, part, None)
        if array is not None:
            parts[f"{name}.{part}"] = array
    return parts


def container_matrices(file: SafetensorsFile) -> dict[str, dict[str, Any]] | None:
    """The matrices of an assay container by name, checked one by one against the tensors; None for another file."""
    tables = {name: meta for name, meta in file.shard_metadata.items() if meta.get("format") == "assay"}
    if not tables:
        return None
    found: dict[str, dict[str, Any]] = {}
    for shard, meta in tables.items():
        path = file.path.parent / shard
        if meta.get("assay_layout") != LAYOUT:
            raise FormatError(f"{path}: assay_layout: expected {LAYOUT}, got {meta.get('assay_layout')!r}")
        for name, entry in parse_json(meta.get("matrices", "").encode(), path, "matrices").items():
            where = f"{path}: matrix {short(name)}"
            if name in found:
                raise FormatError(f"{where}: expected once, got twice")
            _check_entry(entry, where)
            qweight = file.tensors.get(f"{name}.qweight")
            *lead, k = entry["shape"]
            four = entry["form"] in ("int4", "wide4")
            wanted = ("U8", (*lead, -(-k // 2))) if four else ("I8", (*lead, k))
            if qweight is None or (qweight.dtype, qweight.shape) != wanted:
                got = "no such tensor" if qweight is None else f"{qweight.dtype} {list(qweight.shape)}"
                raise FormatError(f"{where}: qweight: expected {wanted[0]} {list(wanted[1])}, got {got}")
            found[name] = entry
    return found


def _check_entry(entry: Any, where: str) -> None:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not 2 <= len(shape) <= 8 or not all(type(d) is int and d > 0 for d in shape):
        raise FormatError(f"{where}: shape: expected positive [..., N, K], got {str(shape)[:80]}")
    if entry.get("form") not in _FORMS:
        raise FormatError(f"{where}: form: expected one of {', '.join(_FORMS)}, got {str(entry.get('form'))[:40]}")
    size = entry.get("group_size")
    if type(size) is not int or size < 1 or shape[-1] % size:
        raise FormatError(f"{where}: group_size: expected a divisor of K = {shape[-1]}, got {str(size)[:40]}")
    if not isinstance(entry.get("stored", ""), str):
        raise FormatError(f"{where}: stored: expected a string, got {str(entry['stored'])[:40]}")


def read_matrix(file: SafetensorsFile, name: str, entry: Mapping[str, Any]) -> Weights:
    """One matrix of an assay container, the rows of a stack flattened."""
    *lead, k = entry["shape"]
    n, size, form = int(np.prod(lead)), entry["group_size"], entry["form"]
    where = f"{file.path}: {name}"

    def part(suffix: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> np.ndarray | None:
        tensor = file.tensors.get(f"{name}.{suffix}")
        if tensor is None:
            return None
        if tensor.dtype not in dtypes or tensor.shape != shape:
            raise FormatError(
                f"{where}.{suffix}: expected {' or '.join(dtypes)} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        flat = file.array(f"{name}.{suffix}")
        return np.array(flat.reshape(n, -1) if shape[: len(lead)] == tuple(lead) and len(shape) > 1 else flat)

    grid = (*lead, k // size)
    wide = form.startswith("wide")
    scales = part("scales", grid, ("F32",) if wide else ("F16", "F32"))
    if scales is None:
        raise FormatError(f"{where}.scales: expected {list(grid)}, got no such tensor")
    raw = file.array(f"{name}.qweight").reshape(n, -1)
    q = np.array(raw) if form in ("int8", "wide8") else unpack(raw)[:, :k]
    if form in ("int4", "wide4") and k % 2:
        q = np.ascontiguousarray(q)
    makers: dict[bool, Callable[[], Weights]] = {
        True: lambda: WideWeights(q, scales, part("minimum", grid, ("F32",)), size, part("codebook", (16,), ("F32",))),
        False: lambda: Int4Weights(q, scales, part("zeros", grid, ("U8",)), size, part("perm", (k,), ("I32",))),
    }
    try:
        return Int8Weights(q, scales, size) if form == "int8" else makers[wide]()
    except FormatError:
        raise
    except ValueError as exc:
        raise FormatError(f"{where}: {exc}") from exc

"""Writing safetensors as a stream, and the layout in which assay keeps weights ready to be packed.

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

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import FormatError
from .int4 import Int4Weights, _pack, _unpack
from .safetensors import _DTYPES, SafetensorsFile, _json, _short
from .weights import Int8Weights, Weights, WideWeights

__all__ = [
    "LAYOUT",
    "SafetensorsWriter",
    "container_matrices",
    "form_of",
    "matrix_entry",
    "matrix_parts",
    "read_matrix",
]

LAYOUT = "1"
_CHUNK_BYTES = 1 << 24
_FORMS = ("int4", "int8", "wide4", "wide8")
_NAMES = {np.dtype(d).name: n for n, (_, d) in _DTYPES.items() if d is not None and not n.startswith("F8")}
_NAMES |= {"uint8": "U8", "uint16": "U16"}


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in constant memory, that appears under its name when it is whole.

    Data goes to ``PATH.part`` behind room left for the header, which is written last; an exception in the ``with`` block
    removes the file.

    Parameters
    ----------
    path : Path
    header_bytes : int
        Room for the header. What is not used is filled with spaces, as the format allows.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._room = -(-header_bytes // 8) * 8
        self._header: dict[str, Any] = {}
        self._at = 0
        self._whole = False
        self._file = self._part.open("wb")
        self._file.seek(8 + self._room)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._whole:  # interrupted, or the file cannot be written
            try:
                self._file.close()
            except OSError:  # what is still buffered cannot be written either
                pass
            self._part.unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of data so far."""
        return self._at

    @property
    def names(self) -> list[str]:
        """Tensors so far."""
        return list(self._header)

    def add(self, name: str, array: np.ndarray, dtype: str | None = None) -> None:
        """Appends a tensor; `dtype` is its safetensors name where the array's own does not tell ("BF16", "F8_E4M3")."""
        if name in self._header:
            raise FormatError(f"{self.path}: tensor {_short(name)}: expected once, got twice")
        dtype = dtype or _NAMES[array.dtype.name]
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for at in range(0, flat.size, _CHUNK_BYTES):
            self._file.write(flat[at : at + _CHUNK_BYTES].data)
        end = self._at + flat.size
        self._header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [self._at, end]}
        self._at = end

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header and gives the file its name."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)} | self._header
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise FormatError(f"{self.path}: header: expected at most {self._room} bytes, got {len(text)}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)
        self._whole = True


# ---- the layout ------------------------------------------------------------------------------------------------------


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
        f"{name}.qweight": (_pack(w.q) if four else w.q).reshape(*lead, -1),
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
        for name, entry in _json(meta.get("matrices", "").encode(), path, "matrices").items():
            where = f"{path}: matrix {_short(name)}"
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
    q = np.array(raw) if form in ("int8", "wide8") else _unpack(raw)[:, :k]
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

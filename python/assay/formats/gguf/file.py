"""GGUF v2 and v3, read from a memory map without trusting a byte of it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and offset is checked against the
size of the file before it is used; nothing is allocated in proportion to a number that has not been. Arrays in the
metadata (a vocabulary of 262144 strings) are stepped over and read on request.

A file that another process truncates while it is mapped ends this one by SIGBUS, as with every reader that maps files.
"""

import math
import mmap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError
from .._files import Closing, map_file, unmap
from ..dequant import GGML_TYPES, SUPPORTED, dequantize_rows
from .cursor import ARRAY, SCALARS, STRING, VALUE_NAMES, Cursor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

# Bounds on what a file may ask for. Real files stay a hundred times below each.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 16
_MAX_KEY_BYTES = (1 << 16) - 1  # the specification's own
_MAX_NAME_BYTES = 1024
_MAX_STRING_BYTES = 1 << 26  # of one value outside arrays, which is copied at once
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_DEPTH = 4
_MAX_ELEMENTS = (1 << 63) - 1


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file.

    Attributes
    ----------
    shape : tuple of int
        Row-major, as numpy orders it: a matrix is (N, K), an expert stack (E, N, K). The file lists it backwards.
    type_name : str
        "Q4_K", ...
    nbytes, offset : int
        Where it lies, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    offset: int

    @property
    def num_params(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Rows of K elements over all leading dimensions."""
        return self.num_params // self.shape[-1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits an element, scales included."""
        return 8 * self.nbytes / self.num_params


class GGUFArray:
    """An array of the metadata that stays in the file until it is asked for.

    Attributes
    ----------
    type_name : str
        Of the elements: "string", "float32", "array", ...
    count : int
        How many.
    offset : int
        Of the first element, from the start of the file.
    """

    __slots__ = ("_file", "_type", "count", "offset", "type_name")

    def __init__(self, file: "GGUFFile", type_id: int, count: int, offset: int) -> None:
        self._file, self._type = file, type_id
        self.type_name, self.count, self.offset = VALUE_NAMES[type_id], count, offset

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"GGUFArray({self.type_name}, count={self.count}, offset={self.offset})"

    def to_list(self) -> list[Any]:
        """The elements as Python values; a string's bytes that are no UTF-8 become U+FFFD."""
        return self._file._elements(self._type, self.count, self.offset)

    def to_numpy(self) -> np.ndarray:
        """A copy of the elements, of their own dtype (bool as bool). FormatError for strings and nested arrays."""
        if self._type not in SCALARS:
            raise FormatError(f"{self._file.path}: expected an array of numbers, got {self.type_name}")
        name, _, dtype = SCALARS[self._type]
        data = np.frombuffer(self._file._map(), dtype, self.count, self.offset).copy()
        return data.astype(bool) if name == "bool" else data


class GGUFFile(Closing):
    """An open GGUF file; use it as a context manager.

    Attributes
    ----------
    path : Path
    version : int
    size_bytes : int
    alignment : int
        Bytes; tensors start at multiples of it.
    metadata : dict of str to value
        int, float, bool, str, or `GGUFArray`.
    tensors : dict of str to GGUFTensor
        In the order of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        data = map_file(self.path, len(MAGIC), "GGUF")
        self.size_bytes = len(data)
        self._data: mmap.mmap | None = data
        try:
            self._parse(Cursor(self.path, data))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the map. Arrays that `raw` gave out keep the memory until they go too."""
        data, self._data = self._data, None
        if data is not None:
            unmap(data)

    def _map(self) -> mmap.mmap:
        if self._data is None:
            raise ValueError(f"{self.path}: expected an open file, got a closed one")
        return self._data

    def _parse(self, cur: Cursor) -> None:
        if cur.take(4, "magic") != MAGIC:
            raise FormatError(f"{self.path}: magic: expected {MAGIC!r}, got {bytes(cur.data[:4])!r}")
        self.version = cur.u32("version")
        if self.version not in _VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
            if swapped in (1, *_VERSIONS):
                raise FormatError(f"{self.path}: version: expected little-endian data, got a big-endian file")
            wanted = " or ".join(map(str, _VERSIONS))
            raise FormatError(f"{self.path}: version: expected {wanted}, got {self.version}")
        num_tensors = cur.count("tensor count", 8 + 1 + 4 + 8 + 4 + 8, _MAX_TENSORS, look_ahead=8)
        num_keys = cur.count("key count", 8 + 1 + 4 + 1, _MAX_KEYS)
        keys_begin = cur.at
        for i in range(num_keys):
            key = cur.text(f"key {i}", _MAX_KEY_BYTES)
            if key in self.metadata:
                raise FormatError(f"{self.path}: key {key[:120]!r}: expected once, got twice")
            self.metadata[key] = self._value(cur, f"key {key[:120]!r}")
        self._keys = (keys_begin, cur.at)
        self.alignment = self._alignment()
        found = [self._tensor(cur, i) for i in range(num_tensors)]
        self._place(found, cur.at)

    def _value(self, cur: Cursor, where: str) -> Any:
        type_id = cur.u32(f"{where}: type")
        if type_id == STRING:
            start, length = cur.string(where)
            if length > _MAX_STRING_BYTES:
                raise FormatError(
                    f"{self.path}: {where}: expected a string of at most {_MAX_STRING_BYTES} bytes, got {length}"
                )
            return cur.data[start : start + length].decode("utf-8", "replace")
        if type_id == ARRAY:
            return self._array(cur, where, 1)
        if type_id not in SCALARS:
            raise FormatError(f"{self.path}: {where}: expected a value type of 0..12, got {type_id}")
        name, form, _ = SCALARS[type_id]
        value = cur.unpack(form, where)
        if name == "bool":
            if value > 1:
                raise FormatError(f"{self.path}: {where}: expected a bool of 0 or 1, got {value}")
            return bool(value)
        return value

    def _array(self, cur: Cursor, where: str, depth: int) -> GGUFArray:
        if depth > _MAX_DEPTH:
            raise FormatError(f"{self.path}: {where}: expected arrays nested at most {_MAX_DEPTH} deep, got more")
        type_id = cur.u32(f"{where}: element type")
        if type_id not in VALUE_NAMES:
            raise FormatError(f"{self.path}: {where}: expected an element type of 0..12, got {type_id}")
        least = {STRING: 8, ARRAY: 12}.get(type_id) or SCALARS[type_id][1].size
        count = cur.count(f"{where}: length", least, _MAX_ELEMENTS)
        array = GGUFArray(self, type_id, count, cur.at)
        if type_id == STRING:
            cur.skip_strings(count, where)
        elif type_id == ARRAY:
            cur.step(count, where)
            for _ in range(count):
                self._array(cur, where, depth + 1)
        else:
            cur.at += count * least
        return array

    def _elements(self, type_id: int, count: int, offset: int) -> list[Any]:
        if type_id in SCALARS:
            array = GGUFArray(self, type_id, count, offset).to_numpy()
            return array.tolist()
        cur = Cursor(self.path, self._map(), offset)
        if type_id == STRING:
            spans = (cur.string("array") for _ in range(count))
            return [cur.data[at : at + size].decode("utf-8", "replace") for at, size in spans]
        return [self._array(cur, "array", 1).to_list() for _ in range(count)]

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0 and value & (value - 1) == 0
        if not good:
            raise FormatError(f"{self.path}: general.alignment: expected a power of two, got {value!r}")
        return value

    def _tensor(self, cur: Cursor, index: int) -> GGUFTensor:
        """One entry of the tensor list; its offset still counts from the start of the data."""
        name = cur.text(f"tensor {index}: name", _MAX_NAME_BYTES)
        where = f"tensor {name!r}"
        num_dims = cur.u32(f"{where}: number of dimensions")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise FormatError(f"{self.path}: {where}: expected 1..{_MAX_DIMS} dimensions, got {num_dims}")
        dims = [cur.u64(f"{where}: dimension {i}") for i in range(num_dims)]
        count = math.prod(dims)
        if count < 1 or count > _MAX_ELEMENTS:
            raise FormatError(f"{self.path}: {where}: expected 1..2^63-1 elements, got dimensions {dims}")
        type_id = cur.u32(f"{where}: type")
        kind = GGML_TYPES.get(type_id)
        if kind is None:
            raise FormatError(f"{self.path}: {where}: expected a known ggml type, got type id {type_id}")
        if dims[0] % kind.block_size:
            raise FormatError(
                f"{self.path}: {where}: expected rows of a multiple of {kind.block_size} elements"
                f" ({kind.name}), got {dims[0]}"
            )
        nbytes = count // kind.block_size * kind.block_bytes
        offset = cur.u64(f"{where}: offset")
        if offset % self.alignment:
            raise FormatError(
                f"{self.path}: {where}: expected an offset that is a multiple of {self.alignment}, got {offset}"
            )
        return GGUFTensor(name, tuple(reversed(dims)), kind.name, nbytes, offset)

    def _place(self, found: list[GGUFTensor], header_end: int) -> None:
        """Checks that the tensors lie inside the file and apart, and makes their offsets absolute."""
        start = -(-header_end // self.alignment) * self.alignment
        for t in found:
            if t.name in self.tensors:
                raise FormatError(f"{self.path}: tensor {t.name!r}: expected once, got twice")
            end = start + t.offset + t.nbytes
            if end > self.size_bytes:
                raise FormatError(
                    f"{self.path}: tensor {t.name!r}: expected it to end within the file's {self.size_bytes} bytes,"
                    f" got an end at {end} (truncated file?)"
                )
            self.tensors[t.name] = GGUFTensor(t.name, t.shape, t.type_name, t.nbytes, start + t.offset)
        ordered = sorted(self.tensors.values(), key=lambda t: t.offset)
        for a, b in pairwise(ordered):
            if a.offset + a.nbytes > b.offset:
                raise FormatError(
                    f"{self.path}: tensor {b.name!r}: expected it after {a.name!r}, which ends at"
                    f" {a.offset + a.nbytes}, got offset {b.offset} (overlap)"
                )

    def _get(self, name: str) -> GGUFTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise FormatError(f"{self.path}: expected a tensor {name!r}, got {len(self.tensors)} others")
        return tensor

    def raw_metadata(self) -> bytes:
        """The keys and values as they are in the file."""
        begin, end = self._keys
        return self._map()[begin:end]

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as uint8 [num_rows, row_bytes], read-only, without a copy."""
        t = self._get(name)
        flat = np.frombuffer(self._map(), np.uint8, t.nbytes, t.offset)
        return flat.reshape(t.num_rows, -1)

    def dequantize(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor's values.

        Parameters
        ----------
        rows
            Which rows of K elements, leading dimensions flattened; None for all.

        Returns
        -------
        float32
            Of the tensor's shape, or [R, K] when `rows` is given.

        Raises
        ------
        FormatError
            No such tensor, or a type without a dequantiser.
        """
        t = self._get(name)
        if t.type_name not in SUPPORTED:
            raise FormatError(
                f"{self.path}: tensor {name!r}: expected one of {', '.join(SUPPORTED)} to dequantise, got {t.type_name}"
            )
        data = self.raw(name)
        if rows is None:
            return dequantize_rows(data, t.type_name).reshape(t.shape)
        return dequantize_rows(data[rows], t.type_name)


def open_gguf(path: str | Path) -> GGUFFile:
    """Maps and checks a GGUF file.

    Raises
    ------
    FormatError
        Unreadable, truncated or malformed: names the file, the key or tensor, what was expected and what came.
    """
    return GGUFFile(path)

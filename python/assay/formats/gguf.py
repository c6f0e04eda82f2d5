"""GGUF v2 and v3, read from a memory map without trusting a byte of it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and offset is checked against the
size of the file before it is used; nothing is allocated in proportion to a number that has not been. Arrays in the
metadata (a vocabulary of 262144 strings) are stepped over and read on request.

A file that another process truncates while it is mapped ends this one by SIGBUS, as with every reader that maps files.
"""

import mmap
import re
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import FormatError
from ..model import Attention, Experts, Matrix, ModelSpec
from .dequant import GGML_TYPES, SUPPORTED, dequantize_rows

__all__ = ["MAGIC", "GGUFArray", "GGUFFile", "GGUFTensor", "TensorRole", "model_spec", "open_gguf", "tensor_role"]

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
_MAX_STEPS = 1 << 24  # strings and nested arrays stepped over one by one: about 2 s
_MAX_ELEMENTS = (1 << 63) - 1

_STRING, _ARRAY = 8, 9
#: Value types of fixed size: name, struct format, numpy dtype.
_SCALARS: dict[int, tuple[str, struct.Struct, str]] = {
    0: ("uint8", struct.Struct("<B"), "<u1"),
    1: ("int8", struct.Struct("<b"), "<i1"),
    2: ("uint16", struct.Struct("<H"), "<u2"),
    3: ("int16", struct.Struct("<h"), "<i2"),
    4: ("uint32", struct.Struct("<I"), "<u4"),
    5: ("int32", struct.Struct("<i"), "<i4"),
    6: ("float32", struct.Struct("<f"), "<f4"),
    7: ("bool", struct.Struct("<B"), "<u1"),
    10: ("uint64", struct.Struct("<Q"), "<u8"),
    11: ("int64", struct.Struct("<q"), "<i8"),
    12: ("float64", struct.Struct("<d"), "<f8"),
}
_VALUE_NAMES = {_STRING: "string", _ARRAY: "array"} | {i: s[0] for i, s in _SCALARS.items()}
_U32, _U64 = _SCALARS[4][1], _SCALARS[10][1]


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
        count = 1
        for dim in self.shape:
            count *= dim
        return count

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
        self.type_name, self.count, self.offset = _VALUE_NAMES[type_id], count, offset

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"GGUFArray({self.type_name}, count={self.count}, offset={self.offset})"

    def to_list(self) -> list[Any]:
        """The elements as Python values; a string's bytes that are no UTF-8 become U+FFFD."""
        return self._file._elements(self._type, self.count, self.offset)

    def to_numpy(self) -> np.ndarray:
        """A copy of the elements, of their own dtype (bool as bool). FormatError for strings and nested arrays."""
        if self._type not in _SCALARS:
            raise FormatError(f"{self._file.path}: expected an array of numbers, got {self.type_name}")
        name, _, dtype = _SCALARS[self._type]
        data = np.frombuffer(self._file._map(), dtype, self.count, self.offset).copy()
        return data.astype(bool) if name == "bool" else data


class GGUFFile:
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
        self._data: mmap.mmap | None = None
        try:
            info = self.path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise FormatError(f"{self.path}: expected a regular file")
            with self.path.open("rb") as handle:
                self.size_bytes = handle.seek(0, 2)
                if self.size_bytes < len(MAGIC):
                    raise FormatError(f"{self.path}: expected a GGUF file, got {self.size_bytes} bytes")
                self._data = mmap.mmap(handle.fileno(), self.size_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            if isinstance(exc, FormatError):
                raise
            raise FormatError(f"{self.path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
        try:
            self._parse(_Cursor(self.path, self._data))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the map. Arrays that `raw` gave out keep the memory until they go too."""
        data, self._data = self._data, None
        if data is not None:
            try:
                data.close()
            except BufferError:  # exported: freed with the last view
                return

    def _map(self) -> mmap.mmap:
        if self._data is None:
            raise ValueError(f"{self.path}: expected an open file, got a closed one")
        return self._data

    # ---- parsing -------------------------------------------------------------------------------------------------

    def _parse(self, cur: "_Cursor") -> None:
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
        found: list[GGUFTensor] = []
        for i in range(num_tensors):
            found.append(self._tensor(cur, i))
        self._place(found, cur.at)

    def _value(self, cur: "_Cursor", where: str) -> Any:
        type_id = cur.u32(f"{where}: type")
        if type_id == _STRING:
            start, length = cur.string(where)
            if length > _MAX_STRING_BYTES:
                raise FormatError(
                    f"{self.path}: {where}: expected a string of at most {_MAX_STRING_BYTES} bytes, got {length}"
                )
            return cur.data[start : start + length].decode("utf-8", "replace")
        if type_id == _ARRAY:
            return self._array(cur, where, 1)
        if type_id not in _SCALARS:
            raise FormatError(f"{self.path}: {where}: expected a value type of 0..12, got {type_id}")
        name, form, _ = _SCALARS[type_id]
        value = cur.unpack(form, where)
        if name == "bool":
            if value > 1:
                raise FormatError(f"{self.path}: {where}: expected a bool of 0 or 1, got {value}")
            return bool(value)
        return value

    def _array(self, cur: "_Cursor", where: str, depth: int) -> GGUFArray:
        if depth > _MAX_DEPTH:
            raise FormatError(f"{self.path}: {where}: expected arrays nested at most {_MAX_DEPTH} deep, got more")
        type_id = cur.u32(f"{where}: element type")
        if type_id not in _VALUE_NAMES:
            raise FormatError(f"{self.path}: {where}: expected an element type of 0..12, got {type_id}")
        least = {_STRING: 8, _ARRAY: 12}.get(type_id) or _SCALARS[type_id][1].size
        count = cur.count(f"{where}: length", least, _MAX_ELEMENTS)
        array = GGUFArray(self, type_id, count, cur.at)
        if type_id == _STRING:
            cur.skip_strings(count, where)
        elif type_id == _ARRAY:
            cur.step(count, where)
            for _ in range(count):
                self._array(cur, where, depth + 1)
        else:
            cur.at += count * least
        return array

    def _elements(self, type_id: int, count: int, offset: int) -> list[Any]:
        if type_id in _SCALARS:
            array = GGUFArray(self, type_id, count, offset).to_numpy()
            return array.tolist()
        cur = _Cursor(self.path, self._map(), offset)
        if type_id == _STRING:
            spans = (cur.string("array") for _ in range(count))
            return [cur.data[at : at + size].decode("utf-8", "replace") for at, size in spans]
        return [self._array(cur, "array", 1).to_list() for _ in range(count)]

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0 and value & (value - 1) == 0
        if not good:
            raise FormatError(f"{self.path}: general.alignment: expected a power of two, got {value!r}")
        return value

    def _tensor(self, cur: "_Cursor", index: int) -> GGUFTensor:
        """One entry of the tensor list; its offset still counts from the start of the data."""
        name = cur.text(f"tensor {index}: name", _MAX_NAME_BYTES)
        where = f"tensor {name!r}"
        num_dims = cur.u32(f"{where}: number of dimensions")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise FormatError(f"{self.path}: {where}: expected 1..{_MAX_DIMS} dimensions, got {num_dims}")
        dims = [cur.u64(f"{where}: dimension {i}") for i in range(num_dims)]
        count = 1
        for dim in dims:
            count *= dim
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

    # ---- data ----------------------------------------------------------------------------------------------------

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


class _Cursor:
    """A position in the file; every step is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap, at: int = 0) -> None:
        self.path, self.data, self.at, self.size, self.steps = path, data, at, len(data), 0

    def _short(self, where: str, wanted: int) -> FormatError:
        left = max(self.size - self.at, 0)
        return FormatError(
            f"{self.path}: {where}: expected {wanted} more bytes at offset {self.at}, got {left} (truncated file?)"
        )

    def take(self, size: int, where: str) -> bytes:
        if size > self.size - self.at:
            raise self._short(where, size)
        start, self.at = self.at, self.at + size
        return self.data[start : self.at]

    def unpack(self, form: struct.Struct, where: str) -> Any:
        if form.size > self.size - self.at:
            raise self._short(where, form.size)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def u32(self, where: str) -> int:
        value: int = self.unpack(_U32, where)
        return value

    def u64(self, where: str) -> int:
        value: int = self.unpack(_U64, where)
        return value

    def count(self, where: str, least_bytes: int, limit: int, look_ahead: int = 0) -> int:
        """A count of things of at least `least_bytes` each, which must fit in what is left of the file."""
        value = self.u64(where)
        room = max(self.size - self.at - look_ahead, 0) // least_bytes
        if value > min(room, limit):
            raise FormatError(
                f"{self.path}: {where}: expected at most {min(room, limit)} (what the file has room for), got {value}"
            )
        return value

    def string(self, where: str) -> tuple[int, int]:
        """Start and length of a string, stepped over."""
        length = self.u64(f"{where}: string length")
        if length > self.size - self.at:
            raise self._short(where, length)
        start, self.at = self.at, self.at + length
        return start, length

    def text(self, where: str, limit: int) -> str:
        """A name: not empty, of at most `limit` bytes, valid UTF-8."""
        start, length = self.string(where)
        if not 1 <= length <= limit:
            raise FormatError(f"{self.path}: {where}: expected a name of 1..{limit} bytes, got {length}")
        raw = self.data[start : start + length]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise FormatError(f"{self.path}: {where}: expected UTF-8, got {raw[:40]!r}") from exc

    def step(self, count: int, where: str) -> None:
        """Accounts for `count` things that are walked one by one."""
        self.steps += count
        if self.steps > _MAX_STEPS:
            raise FormatError(f"{self.path}: {where}: expected at most {_MAX_STEPS} strings and arrays, got more")

    def skip_strings(self, count: int, where: str) -> None:
        self.step(count, where)
        at, data, last, read = self.at, self.data, self.size - 8, _U64.unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + read(data, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        raise FormatError(f"{self.path}: {where}: expected {count} strings within the file, got past its end")


def open_gguf(path: str | Path) -> GGUFFile:
    """Maps and checks a GGUF file.

    Raises
    ------
    FormatError
        Unreadable, truncated or malformed: names the file, the key or tensor, what was expected and what came.
    """
    return GGUFFile(path)


# ---- the model that a file holds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is in the model: matrix name and role of `assay.model.Matrix`, and the block, None outside them."""

    name: str
    role: str
    layer: int | None


_ROLES = {
    "attn_q": ("attn_q", "attention"),
    "attn_k": ("attn_k", "attention"),
    "attn_v": ("attn_v", "attention"),
    "attn_qkv": ("attn_qkv", "attention"),
    "attn_output": ("attn_output", "attention"),
    "attn_q_a": ("attn_q_a", "attention"),
    "attn_q_b": ("attn_q_b", "attention"),
    "attn_kv_a_mqa": ("attn_kv_a", "attention"),
    "attn_kv_b": ("attn_kv_b", "attention"),
    "attn_k_b": ("attn_k_b", "attention"),
    "attn_v_b": ("attn_v_b", "attention"),
    "ffn_gate": ("ffn_gate", "ffn"),
    "ffn_up": ("ffn_up", "ffn"),
    "ffn_down": ("ffn_down", "ffn"),
    "ffn_gate_exps": ("expert_gate", "expert"),
    "ffn_up_exps": ("expert_up", "expert"),
    "ffn_down_exps": ("expert_down", "expert"),
    "ffn_gate_up_exps": ("expert_gate_up", "expert"),
    "ffn_gate_shexp": ("shared_gate", "shared_expert"),
    "ffn_up_shexp": ("shared_up", "shared_expert"),
    "ffn_down_shexp": ("shared_down", "shared_expert"),
    "ffn_gate_inp": ("router", "router"),
}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)\.weight")
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d{1,6})")  # files from before experts were stacked
# Rotary tables are derived from the configuration: bytes of the file, not parameters.
_TABLES = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_SLIDING_PATTERN = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}  # every n-th layer is global; llama.cpp's llama-model.cpp


def tensor_role(name: str) -> TensorRole:
    """What the tensor `name` is, by llama.cpp's names. Unknown ones have role "other"."""
    if name == "token_embd.weight":
        return TensorRole("token_embd", "embedding", None)
    if name == "output.weight":
        return TensorRole("lm_head", "lm_head", None)
    block = _BLOCK.fullmatch(name)
    if block is None:
        return TensorRole(name, "other", None)
    layer, part = int(block[1]), block[2]
    one = _ONE_EXPERT.fullmatch(part)
    if one is not None:
        return TensorRole(f"expert_{one[1]}", "expert", layer)
    matrix, role = _ROLES.get(part, (part, "other"))
    return TensorRole(matrix, role, layer)


class _Fields:
    """The keys ``{architecture}.*`` with their types checked."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.prefix = file, architecture

    def fail(self, key: str, wanted: str, got: object) -> FormatError:
        return FormatError(f"{self.file.path}: {self.prefix}.{key}: expected {wanted}, got {got!r}")

    def integer(self, key: str, default: int | None = None) -> int | None:
        value = self.file.metadata.get(f"{self.prefix}.{key}")
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(key, "an integer that is not negative", value)
        return value

    def required(self, key: str) -> int:
        value = self.integer(key)
        if value is None:
            raise self.fail(key, "a positive integer", None)
        if value < 1:
            raise self.fail(key, "a positive integer", value)
        return value

    def per_layer(self, key: str, layers: int) -> list[int]:
        """A number for every layer, from one for all or from an array."""
        value = self.file.metadata.get(f"{self.prefix}.{key}")
        if not isinstance(value, GGUFArray):
            return [self.required(key)] * layers
        if value.count != layers or value.type_name in ("string", "array", "float32", "float64"):
            raise self.fail(key, f"{layers} integers", value)
        return [int(v) for v in value.to_list()]

    def windows(self, layers: int) -> list[int | None]:
        """The sliding window of every layer, None for global ones."""
        window = self.integer("attention.sliding_window", 0) or None
        if window is None:
            return [None] * layers
        key = "attention.sliding_window_pattern"
        pattern = self.file.metadata.get(f"{self.prefix}.{key}", _SLIDING_PATTERN.get(self.prefix, 0))
        if isinstance(pattern, GGUFArray):
            return [window if sliding else None for sliding in self.per_layer(key, layers)]
        if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 0:
            raise self.fail(key, "an integer that is not negative, or an array", pattern)
        return [window if pattern == 0 or i % pattern < pattern - 1 else None for i in range(layers)]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200]).strip()


def model_spec(file: GGUFFile) -> ModelSpec:
    """The model that `file` holds: its shape from the metadata, its matrices from the tensors.

    Works for every architecture of llama.cpp's that is made of attention and feed-forward or expert layers (llama,
    mistral, mixtral, qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3, olmoe, deepseek2, gpt-oss and their like).
    `Matrix.stored` and `Matrix.stored_bytes` are the file's.

    Raises
    ------
    FormatError
        A key or tensor is missing, or the two contradict each other: names it, what was expected and what came.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise FormatError(f"{file.path}: general.architecture: expected a string, got {architecture!r}")
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise FormatError(f"{file.path}: split.count: expected a whole model in one file, got one of {parts!r} parts")
    fields = _Fields(file, architecture)
    layers, hidden = fields.required("block_count"), fields.required("embedding_length")
    if layers > len(file.tensors):
        raise fields.fail("block_count", f"at most the number of tensors, {len(file.tensors)}", layers)
    attention = _attention(fields, layers, hidden)
    num_experts = fields.integer("expert_count", 0) or 0
    matrices, vectors, expert_vectors, vector_bytes = _matrices(file, layers, num_experts)
    by_name = {m.name: m for m in matrices}
    if "token_embd" not in by_name:
        raise FormatError(f"{file.path}: expected a tensor 'token_embd.weight', got none")
    embedding = by_name["token_embd"]
    tied = "lm_head" not in by_name
    if tied:
        matrices.remove(embedding)
        matrices.append(
            Matrix("lm_head", embedding.n, embedding.k, 1, "lm_head", embedding.stored, embedding.stored_bytes)
        )
    experts = _experts(fields, matrices, num_experts)
    _check_layers(file, matrices, layers)
    _check_shapes(file, matrices, attention, hidden)
    name = file.metadata.get("general.name")
    spec = ModelSpec(
        name=(_printable(name) if isinstance(name, str) else "") or file.path.stem,
        source=f"{file.path} (GGUF v{file.version}, {_printable(architecture)})",
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=embedding.n,
        matrices=tuple(matrices),
        attention=attention,
        experts=experts,
        tied_embedding=tied,
        max_context=fields.integer("context_length") or None,
        vector_params=vectors,
        expert_vector_params=expert_vectors,
        vector_bytes=vector_bytes,
    )
    try:
        return spec.validate()
    except ValueError as exc:
        raise FormatError(f"{file.path}: {exc}") from exc


def _attention(fields: _Fields, layers: int, hidden: int) -> tuple[Attention, ...]:
    heads = fields.per_layer("attention.head_count", layers)
    has_kv = f"{fields.prefix}.attention.head_count_kv" in fields.file.metadata
    kv_heads = fields.per_layer("attention.head_count_kv", layers) if has_kv else heads
    latent = fields.integer("attention.kv_lora_rank", 0) or 0
    windows = fields.windows(layers)
    kinds: dict[tuple[int, int, int | None], int] = {}
    for at, kind in enumerate(zip(heads, kv_heads, windows, strict=True)):
        if kind[0] < 1 or kind[1] < 1:
            raise fields.fail("attention.head_count", f"attention in every layer, {layers} in all",
                              f"{kind[0]} heads and {kind[1]} kv heads in layer {at}")  # fmt: skip
        kinds[kind] = kinds.get(kind, 0) + 1
    found = []
    for (num_heads, num_kv_heads, window), count in kinds.items():
        default = hidden // num_heads
        head_dim = fields.integer("attention.key_length", default) or default
        v_head_dim = fields.integer("attention.value_length", default) or default
        kv_elements, kind_name = num_kv_heads * (head_dim + v_head_dim), "gqa"
        if latent:
            # newer files describe the absorbed form (one kv head of the latent) and add the plain one under *_mla
            head_dim = fields.integer("attention.key_length_mla", head_dim) or head_dim
            v_head_dim = fields.integer("attention.value_length_mla", v_head_dim) or v_head_dim
            kv_elements, kind_name = latent + fields.required("rope.dimension_count"), "mla"
        found.append(Attention(count, num_heads, num_kv_heads, head_dim, v_head_dim, window, kv_elements, kind_name))
    return tuple(found)


def _matrices(file: GGUFFile, layers: int, num_experts: int) -> tuple[list[Matrix], int, int, int]:
    """Matrices of the file's tensors; vector parameters outside and inside (one) expert; bytes of all vectors."""
    groups: dict[tuple[str, str, int, int], list[tuple[GGUFTensor, int]]] = {}
    vectors, expert_vectors, vector_bytes = 0, 0, 0
    for t in file.tensors.values():
        what = tensor_role(t.name)
        if what.layer is not None and what.layer >= layers:
            raise FormatError(f"{file.path}: tensor {t.name!r}: expected a block below {layers}, got {what.layer}")
        if what.role in ("embedding", "lm_head") and len(t.shape) != 2:
            raise FormatError(f"{file.path}: tensor {t.name!r}: expected 2 dimensions, got {list(t.shape)}")
        if len(t.shape) == 1 or (what.role == "other" and not t.name.endswith(".weight")):
            vector_bytes += t.nbytes
            if "_exps." in t.name and len(t.shape) == 2:
                expert_vectors += t.shape[1]
            elif t.name not in _TABLES:
                vectors += t.num_params
            continue
        n, k = t.shape[-2:]
        stack = t.num_params // (n * k)
        if what.role == "expert":
            whole = _ONE_EXPERT.search(t.name) is None
            wanted = num_experts if whole else 1
            if stack != wanted:
                raise FormatError(f"{file.path}: tensor {t.name!r}: expected {wanted} experts, got {list(t.shape)}")
        else:  # a stack of heads multiplies as one matrix of all their rows
            n, stack = n * stack, 1
        groups.setdefault((what.name, what.role, n, k), []).append((t, stack))
    found = []
    named = {name for name, *_ in groups}
    down = {k for name, _, _, k in groups if name == "ffn_down"}
    for (key, role, n, k), members in groups.items():
        # phi3 keeps gate and up in one tensor that is called ffn_up
        fused = key == "ffn_up" and "ffn_gate" not in named and n % 2 == 0 and n // 2 in down
        name = "ffn_gate_up" if fused else key
        stored: dict[str, int] = {}
        for t, stack in members:
            stored[t.type_name] = stored.get(t.type_name, 0) + stack
        total = sum(stack for _, stack in members)
        per = num_experts if role == "expert" else 1
        if total % per:
            raise FormatError(f"{file.path}: {name}: expected {per} experts in every layer, got {total} in all")
        found.append(Matrix(name, n, k, total // per, role, stored, sum(t.nbytes for t, _ in members)))
    return found, vectors, expert_vectors, vector_bytes


def _experts(fields: _Fields, matrices: list[Matrix], num_experts: int) -> Experts | None:
    if not num_experts:
        return None
    down = [m for m in matrices if m.name == "expert_down"]
    if len(down) != 1:
        raise fields.fail("expert_count", "expert matrices of one shape", f"{len(down)} shapes of expert_down")
    shared = fields.integer("expert_shared_count", 0) or 0
    if not shared and any(m.role == "shared_expert" for m in matrices):
        shared = 1
    return Experts(num_experts, fields.required("expert_used_count"), down[0].count, shared, down[0].n, down[0].k)


def _check_layers(file: GGUFFile, matrices: list[Matrix], layers: int) -> None:
    """Every layer has attention and a feed-forward part."""
    for what, names in (
        ("attention output", ("attn_output",)),
        ("attention query", ("attn_q", "attn_qkv", "attn_q_b")),
        ("feed-forward down", ("ffn_down", "expert_down")),
    ):
        got = sum(m.count for m in matrices if m.name in names)
        if got != layers:
            raise FormatError(
                f"{file.path}: expected a matrix {' or '.join(names)} ({what}) in each of {layers} layers, got {got}"
            )


def _check_shapes(file: GGUFFile, matrices: list[Matrix], attention: tuple[Attention, ...], hidden: int) -> None:
    """The tensors' shapes are those that the metadata says."""
    inputs = {"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_kv_a", "ffn_gate", "ffn_up", "ffn_gate_up",
              "expert_gate", "expert_up", "expert_gate_up", "shared_gate", "shared_up", "router", "token_embd",
              "lm_head"}  # fmt: skip
    outputs = {"attn_output", "ffn_down", "expert_down", "shared_down"}
    rows: dict[str, set[int]] = {}
    for a in attention:
        if a.kind == "gqa":
            rows.setdefault("attn_q", set()).add(a.num_heads * a.head_dim)
            rows.setdefault("attn_k", set()).add(a.num_kv_heads * a.head_dim)
            rows.setdefault("attn_v", set()).add(a.num_kv_heads * a.v_head_dim)
            total = (a.num_heads + a.num_kv_heads) * a.head_dim + a.num_kv_heads * a.v_head_dim
            rows.setdefault("attn_qkv", set()).add(total)
    for m in matrices:
        if (m.name in inputs and m.k != hidden) or (m.name in outputs and m.n != hidden):
            side = "k" if m.name in inputs else "n"
            raise FormatError(
                f"{file.path}: {m.name}: expected {side} = embedding_length = {hidden}, got n = {m.n}, k = {m.k}"
            )
        wanted = rows.get(m.name)
        if wanted is not None and m.n not in wanted:
            raise FormatError(
                f"{file.path}: {m.name}: expected n = {' or '.join(map(str, sorted(wanted)))}"
                f" (heads times their width), got {m.n}"
            )

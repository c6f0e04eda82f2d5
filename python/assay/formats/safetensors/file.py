"""safetensors files and sharded checkpoints, read from memory maps without trusting a byte of them.

Format: https://github.com/huggingface/safetensors#format. Eight bytes hold the header's length, the header is a JSON
object of tensors (dtype, shape, offsets into the rest of the file), and the tensors fill that rest without a gap. A
sharded checkpoint adds ``model.safetensors.index.json``, which says the shard of every tensor. Everything is checked
against the size of the file before it is used, and nothing is allocated in proportion to a number that has not been.

A file that another process truncates while it is mapped ends this one by SIGBUS, as with every reader that maps files.
"""

import mmap
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError
from .._checks import parse_json, short
from .._files import Closing, map_file, read_small, unmap

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_MAX_TENSORS = 1 << 20
_MAX_SHARDS = 1024  # each holds a file descriptor; the largest public checkpoints have a few hundred
_MAX_DIMS = 32
_MAX_ELEMENTS = (1 << 63) - 1
_INDEX = "model.safetensors.index.json"

#: Bits an element, and the numpy dtype of `SafetensorsFile.array`; None for those that are less than a byte.
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "?"),
    "U8": (8, "u1"),
    "I8": (8, "i1"),
    "F8_E5M2": (8, "u1"),
    "F8_E4M3": (8, "u1"),
    "F8_E8M0": (8, "u1"),
    "F8_E4M3FNUZ": (8, "u1"),
    "F8_E5M2FNUZ": (8, "u1"),
    "U16": (16, "<u2"),
    "I16": (16, "<i2"),
    "F16": (16, "<f2"),
    "BF16": (16, "<u2"),
    "U32": (32, "<u4"),
    "I32": (32, "<i4"),
    "F32": (32, "<f4"),
    "U64": (64, "<u8"),
    "I64": (64, "<i8"),
    "F64": (64, "<f8"),
    "C64": (64, "<c8"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor.

    Attributes
    ----------
    dtype : str
        As the file names it: "F16", "BF16", "I32", ...
    shape : tuple of int
        Row-major.
    nbytes, offset : int
        Where it lies, from the start of its file.
    file : str
        Name of that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    file: str


class SafetensorsFile(Closing):
    """An open checkpoint, one file or many shards; use it as a context manager.

    Attributes
    ----------
    path : Path
        The .safetensors file, or the index of a sharded checkpoint.
    metadata : dict of str to str
        ``__metadata__`` of a single file; empty for shards.
    shard_metadata : dict of str to dict
        ``__metadata__`` of every file by its name.
    tensors : dict of str to SafetensorsTensor
        In the order of the file, or of the index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _locate(Path(path))
        self.metadata: dict[str, str] = {}
        self.shard_metadata: dict[str, dict[str, str]] = {}
        self.tensors: dict[str, SafetensorsTensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._closed = False
        try:
            if self.path.name.endswith(".json"):
                self._open_shards()
            else:
                self.metadata, self.tensors = self._open_one(self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the maps. Arrays that were given out keep the memory until they go too."""
        self._closed = True
        maps, self._maps = self._maps, {}
        for data in maps.values():
            unmap(data)

    def _open_one(self, path: Path) -> tuple[dict[str, str], dict[str, SafetensorsTensor]]:
        data = map_file(path, 10, "safetensors")
        self._maps[path.name] = data
        size = len(data)
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(
                f"{path}: header length: expected 2..{min(size - 8, MAX_HEADER_BYTES)} bytes"
                f" (a file of {size}), got {length}"
            )
        header = parse_json(data[8 : 8 + length], path, "header")
        if len(header) > _MAX_TENSORS:
            raise FormatError(f"{path}: header: expected at most {_MAX_TENSORS} tensors, got {len(header)}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise FormatError(f"{path}: __metadata__: expected strings by name, got {reprlib.repr(metadata)}")
        start = 8 + length
        tensors = {name: _tensor(name, entry, path, start, size) for name, entry in header.items()}
        end, last = start, "the header"
        for t in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            if t.offset != end:
                flaw = "overlap" if t.offset < end else "gap"
                raise FormatError(
                    f"{path}: tensor {short(t.name)}: expected it to begin at {end - start}, where {last} ends,"
                    f" got {t.offset - start} ({flaw})"
                )
            end, last = t.offset + t.nbytes, short(t.name)
        self.shard_metadata[path.name] = metadata
        if end != size:
            raise FormatError(f"{path}: expected the tensors to fill the file's {size} bytes, got an end at {end}")
        return metadata, tensors

    def _open_shards(self) -> None:
        index = parse_json(read_small(self.path, MAX_HEADER_BYTES), self.path, "index")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{self.path}: weight_map: expected file names by tensor, got {reprlib.repr(weight_map)}")
        if len(weight_map) > _MAX_TENSORS:
            raise FormatError(f"{self.path}: weight_map: expected at most {_MAX_TENSORS} tensors")
        for name, shard in weight_map.items():
            _check_shard_name(self.path, name, shard)
        shards = dict.fromkeys(weight_map.values())
        if len(shards) > _MAX_SHARDS:
            raise FormatError(f"{self.path}: weight_map: expected at most {_MAX_SHARDS} files, got {len(shards)}")
        found: dict[str, SafetensorsTensor] = {}
        for shard in shards:
            for name, tensor in self._open_one(self.path.parent / shard)[1].items():
                wanted = weight_map.get(name)
                if name in found:
                    raise FormatError(
                        f"{self.path}: tensor {short(name)}: expected once, got it in {found[name].file} and {shard}"
                    )
                if wanted != shard:
                    raise FormatError(
                        f"{self.path}: tensor {short(name)}: expected in"
                        f" {'no shard' if wanted is None else wanted} by the index, got it in {shard}"
                    )
                found[name] = tensor
        for name, shard in weight_map.items():
            if name not in found:
                raise FormatError(f"{self.path}: tensor {short(name)}: expected in {shard}, got a shard without it")
            self.tensors[name] = found[name]

    def _get(self, name: str) -> SafetensorsTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise FormatError(f"{self.path}: expected a tensor {short(name)}, got {len(self.tensors)} others")
        if self._closed:
            raise ValueError(f"{self.path}: expected an open file, got a closed one")
        return tensor

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as uint8 [nbytes], read-only, without a copy."""
        t = self._get(name)
        return np.frombuffer(self._maps[t.file], np.uint8, t.nbytes, t.offset)

    def array(self, name: str) -> np.ndarray:
        """The tensor, read-only and without a copy: bfloat16 as raw uint16, 8-bit floats as raw uint8.

        FormatError for the dtypes of less than a byte, whose bytes `raw` gives.
        """
        t = self._get(name)
        dtype = DTYPES[t.dtype][1]
        if dtype is None:
            raise FormatError(
                f"{self.path}: tensor {short(name)}: expected elements of whole bytes, got {t.dtype} (see raw)"
            )
        return self.raw(name).view(dtype).reshape(t.shape)


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Maps a checkpoint and checks it.

    Parameters
    ----------
    path
        A .safetensors file, a ``*.index.json``, or a folder with ``model.safetensors.index.json`` or
        ``model.safetensors``. Shards must lie in the folder of their index, under plain names; symbolic links are
        followed, because Hugging Face's cache is made of them.

    Raises
    ------
    FormatError
        Naming the file, the tensor, what was wanted and what came.
    """
    return SafetensorsFile(path)


def _locate(path: Path) -> Path:
    if path.is_dir():
        for name in (_INDEX, "model.safetensors"):
            if (path / name).exists():
                return path / name
        raise FormatError(f"{path}: expected a folder with {_INDEX} or model.safetensors")
    return path


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ELEMENTS


def _tensor(name: str, entry: Any, path: Path, start: int, size: int) -> SafetensorsTensor:
    """One entry of the header, checked by itself; `start` is where the data begins in a file of `size` bytes."""
    where = f"{path}: tensor {short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets, got {reprlib.repr(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, got {reprlib.repr(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise FormatError(f"{where}: shape: expected at most {_MAX_DIMS} sizes, got {reprlib.repr(shape)}")
    count = 1
    for dim in shape:
        count *= dim
        if count > _MAX_ELEMENTS:  # numpy refuses such a shape even where a later size is 0
            raise FormatError(f"{where}: shape: expected at most 2^63-1 elements, got {reprlib.repr(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise FormatError(f"{where}: data_offsets: expected [begin, end], got {reprlib.repr(offsets)}")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise FormatError(
            f"{where}: data_offsets: expected them within the {size - start} bytes of data, got {offsets}"
            " (truncated file?)"
        )
    bits = count * DTYPES[dtype][0]
    if bits % 8 or bits // 8 != end - begin:
        raise FormatError(f"{where}: expected {bits / 8:g} bytes ({dtype} {reprlib.repr(shape)}), got {end - begin}")
    return SafetensorsTensor(name, dtype, tuple(shape), end - begin, start + begin, path.name)


def _check_shard_name(path: Path, name: str, shard: Any) -> None:
    good = (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and not any(c in shard for c in "/\\:\0")
        and not shard.startswith(".")
    )
    if not good:
        raise FormatError(
            f"{path}: weight_map: tensor {short(name)}: expected a plain name of a .safetensors file beside the index,"
            f" got {reprlib.repr(shard)}"
        )

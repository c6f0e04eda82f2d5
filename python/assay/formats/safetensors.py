"""safetensors files and sharded checkpoints, read from memory maps without trusting a byte of them.

Format: https://github.com/huggingface/safetensors#format. Eight bytes hold the header's length, the header is a JSON
object of tensors (dtype, shape, offsets into the rest of the file), and the tensors fill that rest without a gap. A
sharded checkpoint adds ``model.safetensors.index.json``, which says the shard of every tensor. Everything is checked
against the size of the file before it is used, and nothing is allocated in proportion to a number that has not been.

A file that another process truncates while it is mapped ends this one by SIGBUS, as with every reader that maps files.
"""

import json
import mmap
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from ..errors import FormatError
from .int4 import Int4Weights, from_awq, from_compressed_tensors, from_gptq

__all__ = ["SafetensorsFile", "SafetensorsTensor", "open_safetensors", "quantized_linears", "read_linear"]

_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_MAX_TENSORS = 1 << 20
_MAX_SHARDS = 1024  # each holds a file descriptor; the largest public checkpoints have a few hundred
_MAX_DIMS = 32
_MAX_ELEMENTS = (1 << 63) - 1
_INDEX = "model.safetensors.index.json"

#: Bits an element, and the numpy dtype of `SafetensorsFile.array`; None for those that are less than a byte.
_DTYPES: dict[str, tuple[int, str | None]] = {
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


class SafetensorsFile:
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

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the maps. Arrays that were given out keep the memory until they go too."""
        self._closed = True
        maps, self._maps = self._maps, {}
        for data in maps.values():
            try:
                data.close()
            except BufferError:  # exported: freed with the last view
                continue

    # ---- parsing -------------------------------------------------------------------------------------------------

    def _open_one(self, path: Path) -> tuple[dict[str, str], dict[str, SafetensorsTensor]]:
        data = _map(path)
        self._maps[path.name] = data
        size = len(data)
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise FormatError(
                f"{path}: header length: expected 2..{min(size - 8, _MAX_HEADER_BYTES)} bytes"
                f" (a file of {size}), got {length}"
            )
        header = _json(data[8 : 8 + length], path, "header")
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
                    f"{path}: tensor {_short(t.name)}: expected it to begin at {end - start}, where {last} ends,"
                    f" got {t.offset - start} ({flaw})"
                )
            end, last = t.offset + t.nbytes, _short(t.name)
        self.shard_metadata[path.name] = metadata
        if end != size:
            raise FormatError(f"{path}: expected the tensors to fill the file's {size} bytes, got an end at {end}")
        return metadata, tensors

    def _open_shards(self) -> None:
        index = _json(_read_small(self.path), self.path, "index")
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
                        f"{self.path}: tensor {_short(name)}: expected once, got it in {found[name].file} and {shard}"
                    )
                if wanted != shard:
                    raise FormatError(
                        f"{self.path}: tensor {_short(name)}: expected in"
                        f" {'no shard' if wanted is None else wanted} by the index, got it in {shard}"
                    )
                found[name] = tensor
        for name, shard in weight_map.items():
            if name not in found:
                raise FormatError(f"{self.path}: tensor {_short(name)}: expected in {shard}, got a shard without it")
            self.tensors[name] = found[name]

    # ---- data ----------------------------------------------------------------------------------------------------

    def _get(self, name: str) -> SafetensorsTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise FormatError(f"{self.path}: expected a tensor {_short(name)}, got {len(self.tensors)} others")
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
        dtype = _DTYPES[t.dtype][1]
        if dtype is None:
            raise FormatError(
                f"{self.path}: tensor {_short(name)}: expected elements of whole bytes, got {t.dtype} (see raw)"
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


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _regular(path: Path) -> int:
    """Size of a regular file, which is not opened if it is anything else (a pipe would wait for ever)."""
    try:
        info = path.stat()
    except (OSError, ValueError) as exc:
        raise FormatError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    if not stat.S_ISREG(info.st_mode):
        raise FormatError(f"{path}: expected a regular file")
    return info.st_size


def _map(path: Path) -> mmap.mmap:
    size = _regular(path)
    if size < 10:
        raise FormatError(f"{path}: expected a safetensors file, got {size} bytes")
    try:
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:
        raise FormatError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc


def _read_small(path: Path) -> bytes:
    size = _regular(path)
    if size > _MAX_HEADER_BYTES:
        raise FormatError(f"{path}: expected at most {_MAX_HEADER_BYTES} bytes, got {size}")
    try:
        with path.open("rb") as handle:
            return handle.read(_MAX_HEADER_BYTES)
    except OSError as exc:
        raise FormatError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def _json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys at any depth."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise FormatError(f"{path}: {what}: {_short(key)}: expected once, got twice")
                seen.add(key)
        return out

    def refuse(text: str) -> NoReturn:
        raise FormatError(f"{path}: {what}: expected JSON numbers, got {text}")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except FormatError:
        raise
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{path}: {what}: expected JSON, got {reprlib.repr(raw[:64])} ({exc})") from exc
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {what}: expected a JSON object, got {type(value).__name__}")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ELEMENTS


def _tensor(name: str, entry: Any, path: Path, start: int, size: int) -> SafetensorsTensor:
    """One entry of the header, checked by itself; `start` is where the data begins in a file of `size` bytes."""
    where = f"{path}: tensor {_short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets, got {reprlib.repr(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"{where}: dtype: expected one of {', '.join(_DTYPES)}, got {reprlib.repr(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise FormatError(f"{where}: shape: expected at most {_MAX_DIMS} sizes, got {reprlib.repr(shape)}")
    count = 1
    for dim in shape:
        count *= dim
        if count > _MAX_ELEMENTS:
            raise FormatError(f"{where}: shape: expected at most 2^63-1 elements, got {reprlib.repr(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise FormatError(f"{where}: data_offsets: expected [begin, end], got {reprlib.repr(offsets)}")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise FormatError(
            f"{where}: data_offsets: expected them within the {size - start} bytes of data, got {offsets}"
            " (truncated file?)"
        )
    bits = count * _DTYPES[dtype][0]
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
            f"{path}: weight_map: tensor {_short(name)}: expected a plain name of a .safetensors file beside the index,"
            f" got {reprlib.repr(shard)}"
        )


# ---- quantised checkpoints -----------------------------------------------------------------------------------------

_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def quantized_linears(file: SafetensorsFile, config: Mapping[str, Any]) -> Iterator[tuple[str, Int4Weights]]:
    """Every INT4 linear of a GPTQ, AWQ or compressed-tensors checkpoint, one at a time.

    Parameters
    ----------
    file : SafetensorsFile
    config : mapping
        The checkpoint's ``config.json``, or the ``quantization_config`` in it.

    Yields
    ------
    (str, Int4Weights)
        The module's name ("model.layers.0.self_attn.q_proj") and its weights, in the order of the file.

    Raises
    ------
    FormatError
        For a method, bit width or layout other than those of `assay.formats.int4`, at once; and for a module whose
        tensors do not fit the configuration, when it is reached.
    """
    read, modules = _linear_reader(file, config)
    return read(modules)


def read_linear(file: SafetensorsFile, config: Mapping[str, Any], module: str) -> Int4Weights:
    """One INT4 linear of a checkpoint, by its module's name; see `quantized_linears`."""
    read, _ = _linear_reader(file, config)
    return next(read([module]))[1]


def _linear_reader(
    file: SafetensorsFile, config: Mapping[str, Any]
) -> tuple[Callable[[list[str]], Iterator[tuple[str, Int4Weights]]], list[str]]:
    """The reader of the checkpoint's method, and its modules."""
    quant = config.get("quantization_config", config)
    where = f"{file.path}: quantization_config"
    if not isinstance(quant, Mapping):
        raise FormatError(f"{where}: expected an object, got {reprlib.repr(quant)}")
    method = quant.get("quant_method")
    readers = {"gptq": _gptq_linears, "awq": _awq_linears, "compressed-tensors": _compressed_linears}
    if method not in readers:
        raise FormatError(f"{where}: quant_method: expected one of {', '.join(readers)}, got {reprlib.repr(method)}")
    suffix = ".weight_packed" if method == "compressed-tensors" else ".qweight"
    modules = [name[: -len(suffix)] for name in file.tensors if name.endswith(suffix)]
    if not modules:
        raise FormatError(f"{file.path}: expected tensors named *{suffix} ({method}), got none")
    return partial(readers[method], file, quant, where), modules


def _field(quant: Mapping[str, Any], where: str, wanted: tuple[Any, ...], *names: str, default: Any = None) -> Any:
    """The first of the names that is there, if it is one of the wanted values."""
    value = next((quant[name] for name in names if quant.get(name) is not None), default)
    if isinstance(value, str):
        value = value.lower()
    if value not in wanted or isinstance(value, bool):
        raise FormatError(f"{where}: {names[0]}: expected {' or '.join(map(str, wanted))}, got {reprlib.repr(value)}")
    return value


def _group_size(quant: Mapping[str, Any], where: str, *names: str) -> int:
    value = next((quant[name] for name in names if quant.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise FormatError(f"{where}: {names[0]}: expected a positive number or -1, got {reprlib.repr(value)}")
    return value


def _part(file: SafetensorsFile, name: str, *, optional: bool = False) -> Any:
    if optional and name not in file.tensors:
        return None
    return file.array(name)


def _float_dtype(file: SafetensorsFile, name: str) -> str | None:
    """Name of the dtype where the array does not show it."""
    tensor = file.tensors.get(name)
    return "bfloat16" if tensor is not None and tensor.dtype == "BF16" else None


def _is_gptqmodel(quant: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote the checkpoint, whose zero points of 0 borrow from their neighbours in version 1."""
    meta = quant.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = [writers] if isinstance(writers, str) else writers if isinstance(writers, list) else []
    return any(isinstance(name, str) and name.lower().startswith("gptqmodel") for name in names)


def _gptq_linears(
    file: SafetensorsFile, quant: Mapping[str, Any], where: str, modules: list[str]
) -> Iterator[tuple[str, Int4Weights]]:
    _field(quant, where, (4,), "bits")
    group_size = _group_size(quant, where, "group_size")
    layout = _field(quant, where, tuple(_GPTQ_VERSIONS), "checkpoint_format", default="gptq")
    symmetric, act_order = quant.get("sym") is True, quant.get("desc_act") is True
    zero_16 = "carry" if _is_gptqmodel(quant) else "wrap"

    def read() -> Iterator[tuple[str, Int4Weights]]:
        for module in modules:
            if act_order and f"{module}.g_idx" not in file.tensors:
                raise FormatError(f"{file.path}: {module}.g_idx: expected it (desc_act is true), got no such tensor")
            yield (
                module,
                from_gptq(
                    file.array(f"{module}.qweight"),
                    _part(file, f"{module}.qzeros", optional=symmetric),
                    file.array(f"{module}.scales"),
                    _part(file, f"{module}.g_idx", optional=True),
                    group_size=group_size,
                    version=_GPTQ_VERSIONS[layout],
                    zero_16=zero_16,
                    scales_dtype=_float_dtype(file, f"{module}.scales"),
                    name=f"{file.path}: {module}",
                ),
            )

    return read()


def _awq_linears(
    file: SafetensorsFile, quant: Mapping[str, Any], where: str, modules: list[str]
) -> Iterator[tuple[str, Int4Weights]]:
    _field(quant, where, (4,), "bits", "w_bit")
    _field(quant, where, ("gemm",), "version", default="gemm")
    group_size = _group_size(quant, where, "group_size", "q_group_size")

    def read() -> Iterator[tuple[str, Int4Weights]]:
        for module in modules:
            yield (
                module,
                from_awq(
                    file.array(f"{module}.qweight"),
                    _part(file, f"{module}.qzeros", optional=quant.get("zero_point") is False),
                    file.array(f"{module}.scales"),
                    group_size=group_size,
                    scales_dtype=_float_dtype(file, f"{module}.scales"),
                    name=f"{file.path}: {module}",
                ),
            )

    return read()


def _compressed_linears(
    file: SafetensorsFile, quant: Mapping[str, Any], where: str, modules: list[str]
) -> Iterator[tuple[str, Int4Weights]]:
    _field(quant, where, ("pack-quantized",), "format")
    groups = quant.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError(f"{where}: config_groups: expected schemes by name, got {reprlib.repr(groups)}")
    schemes: list[tuple[int, bool, bool]] = []  # group size (-1: a row), symmetric, act-order by group
    for key, group in groups.items():
        at = f"{where}: config_groups.{reprlib.repr(key)}"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise FormatError(f"{at}: weights: expected a scheme, got {reprlib.repr(weights)}")
        _field(weights, at, (4,), "num_bits")
        _field(weights, at, ("int",), "type", default="int")
        strategy = _field(weights, at, ("group", "channel"), "strategy", default="group")
        size = -1 if strategy == "channel" else _group_size(weights, at, "group_size")
        by_group = str(weights.get("actorder") or "").lower() == "group"
        schemes.append((size, weights.get("symmetric", True) is True, by_group))

    def scheme_of(module: str) -> tuple[int, bool, bool]:
        """Targets are patterns of classes and names; sizes tell the schemes apart without them."""
        if len(schemes) == 1:
            return schemes[0]
        shape = file.array(f"{module}.weight_shape").reshape(-1)
        scale = file.tensors[f"{module}.weight_scale"].shape if f"{module}.weight_scale" in file.tensors else ()
        zeros, ordered = f"{module}.weight_zero_point" in file.tensors, f"{module}.weight_g_idx" in file.tensors
        for size, symmetric, by_group in schemes:
            row = 1 if size == -1 else int(shape[-1]) // size if shape.size else 0
            if scale[-1:] == (row,) and zeros != symmetric and ordered == by_group:
                return size, symmetric, by_group
        raise FormatError(
            f"{file.path}: {module}: expected tensors of one of the {len(schemes)} config_groups, got weight_scale"
            f" {list(scale)}, {'a' if zeros else 'no'} weight_zero_point and {'a' if ordered else 'no'} weight_g_idx"
        )

    def read() -> Iterator[tuple[str, Int4Weights]]:
        for module in modules:
            group_size, symmetric, by_group = scheme_of(module)
            yield (
                module,
                from_compressed_tensors(
                    file.array(f"{module}.weight_packed"),
                    file.array(f"{module}.weight_scale"),
                    file.array(f"{module}.weight_shape"),
                    _part(file, f"{module}.weight_zero_point", optional=symmetric),
                    _part(file, f"{module}.weight_g_idx", optional=not by_group),
                    group_size=group_size,
                    scales_dtype=_float_dtype(file, f"{module}.weight_scale"),
                    name=f"{file.path}: {module}",
                ),
            )

    return read()

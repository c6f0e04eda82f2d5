"""A checkpoint written again in another format, one tensor at a time.

A matrix keeps its weights exactly, or the conversion stops before the output has a name. Only where asked are weights that
the target cannot hold rounded to nearest, and the error is told. Output is one file, which appears whole, or a folder of
shards, each of which appears whole and the index last: run again, a conversion into a folder goes on after the last shard.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ._checks import parse_json, short
from ._files import PartFile
from .checkpoint import PLAIN, Checkpoint, StoredTensor, open_checkpoint
from .container import LAYOUT, matrix_entry
from .ggml import to_ggml
from .gguf import GGUFFile, GGUFWriter, tensor_bytes
from .lossy import round_to
from .safetensors import SafetensorsFile, SafetensorsWriter
from .targets import GGUF_TARGETS, SAFETENSORS_TARGETS, Parts, label
from .weights import ConversionError, Weights, conversion_error

__all__ = ["TARGETS", "Options", "Row", "convert"]

TARGETS = (*SAFETENSORS_TARGETS, *GGUF_TARGETS)
_HEADER_PARTS = 7  # the most tensors that a matrix becomes
_ENTRY_BYTES = 400  # of the header, for a tensor and its share of the metadata, names apart


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes
    ----------
    to : str
        One of `TARGETS`.
    lossy : bool
        Round weights that the target cannot hold exactly; otherwise they stop the conversion.
    quantize : tuple of str
        Patterns (fnmatch) of float matrices to round too; others stay as they are.
    group_size : int
        Of what is rounded, where the target leaves it open.
    shard_bytes : int
        A shard of a folder is closed when it is this large.
    """

    to: str = "assay"
    lossy: bool = False
    quantize: tuple[str, ...] = ()
    group_size: int = 128
    shard_bytes: int = 4 << 30


@dataclass
class Row:
    """What became of the tensors of one stored type.

    `runs_as` is the form or target that was written, the stored type itself for what was copied. Errors are the largest
    of any matrix, 0 where weights were kept.
    """

    stored: str
    runs_as: str
    count: int = 0
    params: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    max_error: float = 0.0
    rms_error: float = 0.0
    resumed: int = 0


@dataclass
class _Tally:
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, t: StoredTensor, runs_as: str, nbytes: int, error: ConversionError) -> None:
        row = self.rows.setdefault((t.stored, runs_as), Row(t.stored, runs_as))
        row.count += 1
        row.params += t.num_params
        row.bytes_before += t.nbytes
        row.bytes_after += nbytes
        row.max_error = max(row.max_error, error.max_relative)
        row.rms_error = max(row.rms_error, error.rms_relative)

    def merge(self, other: Row) -> None:
        row = self.rows.setdefault((other.stored, other.runs_as), Row(other.stored, other.runs_as))
        for name in ("count", "params", "bytes_before", "bytes_after"):
            setattr(row, name, getattr(row, name) + getattr(other, name))
        row.resumed += other.count
        row.max_error = max(row.max_error, other.max_error)
        row.rms_error = max(row.rms_error, other.rms_error)


def convert(
    source: str | Path, output: str | Path, options: Options, progress: Callable[[float, str], None] | None = None
) -> list[Row]:
    """Writes the checkpoint `source` to `output`.

    Parameters
    ----------
    output
        A name that ends in .gguf (for GGUF targets) or .safetensors, or a folder for shards.
    progress
        Called with the bytes of every tensor done, and its name.

    Returns
    -------
    list of Row
        One for every stored type and form, most bytes first.

    Raises
    ------
    FormatError
        Naming the tensor, what was wanted and what came. Nothing half-written has the output's name.
    """
    output = Path(output)
    if options.to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, got {options.to!r}")
    for name in ("group_size", "shard_bytes"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    with open_checkpoint(source) as checkpoint:
        _check_readable(checkpoint)
        tally, report = _Tally(), progress or (lambda nbytes, name: None)
        if options.to in GGUF_TARGETS:
            _to_gguf(checkpoint, output, options, tally, report)
        elif output.name.endswith(".safetensors"):
            _to_file(checkpoint, output, options, tally, report)
        elif output.name.endswith(".gguf"):
            raise FormatError(f"{output}: expected a name in .safetensors, or a folder, for {options.to}, got a .gguf")
        else:
            _to_folder(checkpoint, output, options, tally, report)
    return sorted(tally.rows.values(), key=lambda row: -row.bytes_before)


def _check_readable(checkpoint: Checkpoint) -> None:
    """All tensors can be read: before anything is written."""
    for t in checkpoint.tensors.values():
        if t.form is None and t.stored not in PLAIN:
            raise FormatError(f"{checkpoint.path}: tensor {short(t.name)}: {t.stored} cannot be read, only inspected")


def _same_file(checkpoint: Checkpoint, output: Path) -> None:
    opened = checkpoint.path if checkpoint.path.is_file() else checkpoint.file.path
    if output.exists() and output.samefile(opened):
        raise FormatError(f"{output}: expected another file than the one that is read")


# ---- one tensor ------------------------------------------------------------------------------------------------------

_NO_ERROR = ConversionError(0.0, 0.0)


def _floats(checkpoint: Checkpoint, t: StoredTensor) -> np.ndarray:
    """A float matrix as float32, rows of a stack flattened."""
    array = checkpoint.array(t.name)
    if t.stored == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32).reshape(-1, t.shape[-1])


def _is_chosen(t: StoredTensor, options: Options) -> bool:
    floats = t.stored in ("F32", "F16", "BF16") and len(t.shape) >= 2
    return floats and any(fnmatchcase(t.name, pattern) for pattern in options.quantize)


def _adapted(
    checkpoint: Checkpoint, t: StoredTensor, options: Options, write: Callable[[Weights], Any]
) -> tuple[Weights, Any, ConversionError]:
    """The matrix's weights as the target takes them, what `write` made of them, and what that lost."""
    where = f"{checkpoint.path}: tensor {short(t.name)}"
    try:
        if t.form is None:
            before = _floats(checkpoint, t)
        else:
            w = checkpoint.weights(t.name)
            try:
                return w, write(w), _NO_ERROR
            except FormatError as exc:
                if not options.lossy:
                    raise FormatError(f"{exc} (a lossy conversion rounds it to nearest)") from exc
            before = w.dequantize()
            del w
        rounded = round_to(before, options.to, options.group_size)
        return rounded, write(rounded), conversion_error(before, rounded.dequantize())
    except FormatError as exc:
        text = str(exc)
        raise exc if text.startswith(str(checkpoint.path)) else FormatError(f"{where}: {text}") from exc


class _Settings:
    """The checkpoint's one configuration: every matrix must agree with the first."""

    def __init__(self, to: str) -> None:
        self.target = SAFETENSORS_TARGETS[to]
        self.to = to
        self.seen: dict[str, Any] | None = None

    def check(self, w: Weights, where: str) -> None:
        now = self.target.settings(w)
        if self.seen is None:
            self.seen = now
        elif self.seen != now:
            raise FormatError(f"{where}: expected {self.seen} as the matrices before ({self.to}), got {now}")

    def config(self) -> dict[str, Any] | None:
        return None if self.seen is None else self.target.config(self.seen)


@dataclass
class _Shard:
    """What goes into the metadata of one file."""

    matrices: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    tally: _Tally = field(default_factory=_Tally)


def _write_tensor(
    checkpoint: Checkpoint,
    t: StoredTensor,
    options: Options,
    settings: _Settings,
    writer: SafetensorsWriter,
    shard: _Shard,
) -> None:
    before = writer.nbytes
    if t.form is None and not _is_chosen(t, options):
        writer.add(t.name, checkpoint.array(t.name), t.stored)
        shard.tally.add(t, t.stored, writer.nbytes - before, _NO_ERROR)
    else:

        def write(w: Weights) -> Parts:
            settings.check(w, f"{checkpoint.path}: tensor {short(t.name)}")
            return settings.target.parts(t.name, w, t.shape)

        w, parts, error = _adapted(checkpoint, t, options, write)
        if options.to == "assay":
            shard.matrices[t.name] = matrix_entry(w, t.shape, t.stored)
        for name, (array, dtype) in parts.items():
            writer.add(name, array, dtype)
        shard.tally.add(t, label(w, options.to), writer.nbytes - before, error)
    shard.names.append(t.name)


def _header_bytes(tensors: list[StoredTensor], extra: int) -> int:
    """Room that surely suffices: every matrix in its most parts, names escaped to six characters a character."""
    names = sum(len(json.dumps(t.name)) for t in tensors)
    return (len(tensors) + 4) * _HEADER_PARTS * _ENTRY_BYTES // 2 + (_HEADER_PARTS + 4) * names * 2 + extra


def _metadata(checkpoint: Checkpoint, options: Options, settings: _Settings, shard: _Shard) -> dict[str, str]:
    out = {"converted_from": checkpoint.path.name}
    if options.to == "assay":
        out |= {"format": "assay", "assay_layout": LAYOUT, "matrices": json.dumps(shard.matrices)}
        if isinstance(checkpoint.file, GGUFFile):
            out["gguf_metadata"] = _gguf_scalars(checkpoint.file)
    else:
        out["format"] = "pt"
        config = settings.config()
        if config is not None:
            out["quantization_config"] = json.dumps(config)
    return out


def _gguf_scalars(file: GGUFFile) -> str:
    """The file's numbers and short strings; arrays (vocabularies) stay behind, and NaN, which JSON lacks."""
    kept = {
        key: value
        for key, value in file.metadata.items()
        if isinstance(value, (bool, int))
        or (isinstance(value, float) and math.isfinite(value))
        or (isinstance(value, str) and len(value) <= 1024)
    }
    return json.dumps(kept)


# ---- one file --------------------------------------------------------------------------------------------------------


def _to_file(
    checkpoint: Checkpoint, output: Path, options: Options, tally: _Tally, progress: Callable[[float, str], None]
) -> None:
    _same_file(checkpoint, output)
    tensors = list(checkpoint.tensors.values())
    settings, shard = _Settings(options.to), _Shard(tally=tally)
    extra = len(_gguf_scalars(checkpoint.file)) * 2 if isinstance(checkpoint.file, GGUFFile) else 0
    with SafetensorsWriter(output, _header_bytes(tensors, extra + 8192)) as writer:
        for t in tensors:
            _write_tensor(checkpoint, t, options, settings, writer, shard)
            progress(float(t.nbytes), t.name)
        writer.finish(_metadata(checkpoint, options, settings, shard))


# ---- a folder of shards ----------------------------------------------------------------------------------------------

_INDEX = "model.safetensors.index.json"


def _key(checkpoint: Checkpoint, options: Options) -> str:
    """What a shard must have been made from to be kept: the tensors of the source, its time, and the options."""
    files = sorted({checkpoint.file.path, *checkpoint.file.path.parent.glob("*.safetensors")})
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    if isinstance(checkpoint.file, GGUFFile):
        stamps = [s for s in stamps if s[0] == checkpoint.file.path.name]
    return json.dumps([stamps, asdict(options)])


def _shard_path(output: Path, number: int) -> Path:
    return output / f"model-{number:05d}.safetensors"


def _to_folder(
    checkpoint: Checkpoint, output: Path, options: Options, tally: _Tally, progress: Callable[[float, str], None]
) -> None:
    if output.exists() and output.resolve() == checkpoint.file.path.parent.resolve():
        raise FormatError(f"{output}: expected another folder than the one that is read")
    output.mkdir(parents=True, exist_ok=True)
    key, settings = _key(checkpoint, options), _Settings(options.to)
    weight_map: dict[str, str] = {}
    done = _resume(output, key, tally, weight_map, settings)
    for name in done:
        if name in checkpoint.tensors:
            progress(float(checkpoint.tensors[name].nbytes), name)
    tensors = [t for t in checkpoint.tensors.values() if t.name not in done]
    number = len({*weight_map.values()})
    while tensors:
        number += 1
        tensors = _write_shard(checkpoint, _shard_path(output, number), tensors, options, settings, key, tally,
                               weight_map, progress)  # fmt: skip
    _write_json(output / "config.json", _config(checkpoint, settings))
    _write_json(output / _INDEX, {"metadata": {}, "weight_map": weight_map})


def _resume(output: Path, key: str, tally: _Tally, weight_map: dict[str, str], settings: _Settings) -> set[str]:
    """Names of the source's tensors that whole shards hold, which are counted; FormatError for other people's files."""
    done: set[str] = set()
    for part in output.glob("model-*.safetensors.part"):
        part.unlink()
    number = 1
    while (path := _shard_path(output, number)).exists():
        with SafetensorsFile(path) as shard:
            if shard.metadata.get("conversion") != key:
                raise FormatError(f"{output}: expected an empty folder or this very conversion begun, got {path.name}")
            state = parse_json(shard.metadata["state"].encode(), path, "state")
            weight_map |= dict.fromkeys(shard.tensors, path.name)
        done |= set(state["names"])
        for row in state["rows"]:
            tally.merge(Row(**row))
        settings.seen = state["settings"] if settings.seen is None else settings.seen
        number += 1
    if number == 1 and (output / _INDEX).exists():
        raise FormatError(f"{output}: expected an empty folder or this very conversion begun, got {_INDEX}")
    return done


def _write_shard(
    checkpoint: Checkpoint, path: Path, tensors: list[StoredTensor], options: Options, settings: _Settings, key: str,
    tally: _Tally, weight_map: dict[str, str], progress: Callable[[float, str], None],
) -> list[StoredTensor]:  # fmt: skip
    """Writes tensors until the shard is full; the rest."""
    shard = _Shard()
    extra = len(_gguf_scalars(checkpoint.file)) * 2 if isinstance(checkpoint.file, GGUFFile) else 0
    with SafetensorsWriter(path, _header_bytes(tensors, extra + 4 * len(key) + 8192)) as writer:
        for t in tensors:
            if writer.nbytes and writer.nbytes + t.nbytes > options.shard_bytes:
                break
            _write_tensor(checkpoint, t, options, settings, writer, shard)
            progress(float(t.nbytes), t.name)
        if twice := weight_map.keys() & set(writer.names):
            raise FormatError(f"{path}: tensor {short(min(twice))}: expected once, got it in another shard too")
        rows = [asdict(row) for row in shard.tally.rows.values()]
        state = json.dumps({"names": shard.names, "rows": rows, "settings": settings.seen})
        more = {"conversion": key, "state": state}
        writer.finish(_metadata(checkpoint, options, settings, shard) | more)
        weight_map |= dict.fromkeys(writer.names, path.name)
    for row in shard.tally.rows.values():
        tally.merge(row)
        tally.rows[row.stored, row.runs_as].resumed -= row.count
    return tensors[len(shard.names) :]


def _config(checkpoint: Checkpoint, settings: _Settings) -> dict[str, Any]:
    """The source's config.json with the quantisation of the output."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    made = settings.config()
    return config if made is None else config | {"quantization_config": made}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with PartFile(path) as file:
        file.write(json.dumps(value, indent=2).encode())
        file.commit()


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _to_gguf(
    checkpoint: Checkpoint, output: Path, options: Options, tally: _Tally, progress: Callable[[float, str], None]
) -> None:
    file = checkpoint.file
    if not isinstance(file, GGUFFile):
        raise FormatError(
            f"{checkpoint.path}: expected a GGUF file (its metadata is kept) for {options.to}, got another"
        )
    if not output.name.endswith(".gguf"):
        raise FormatError(f"{output}: expected a name in .gguf for {options.to}")
    _same_file(checkpoint, output)
    type_name = GGUF_TARGETS[options.to]

    def planned() -> Iterator[tuple[StoredTensor, str]]:
        for t in checkpoint.tensors.values():
            yield t, type_name if t.form is not None or _is_chosen(t, options) else t.stored

    plan = list(planned())
    infos = [(t.name, file.tensors[t.name].shape, kind) for t, kind in plan]
    for name, shape, kind in infos:
        tensor_bytes(shape, kind, f"{checkpoint.path}: tensor {short(name)}")
    with GGUFWriter(output, file, infos) as writer:
        for t, kind in plan:
            if kind == t.stored:  # the bytes as they are, whatever is in them
                writer.add(file.raw(t.name))
                tally.add(t, kind, t.nbytes, _NO_ERROR)
            else:
                _, rows, error = _adapted(checkpoint, t, options, lambda w: to_ggml(w, type_name))
                writer.add(rows)
                tally.add(t, options.to, rows.nbytes, error)
            progress(float(t.nbytes), t.name)
        writer.finish()

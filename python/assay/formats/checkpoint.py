"""Any checkpoint as a list of matrices and other tensors, read one at a time: GGUF, safetensors of every method, our own.

What a safetensors file holds is told by its configuration (``config.json`` beside it, or ``quantization_config`` in the
file's metadata) for GPTQ, AWQ and compressed-tensors, and by the names and dtypes of tensors for the rest.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ._checks import parse_json, scales_of, short
from ._files import Closing, read_small
from .container import container_matrices, read_matrix
from .ggml import GGML_READABLE, from_ggml
from .gguf import MAGIC, GGUFFile
from .int4 import from_hqq
from .safetensors import DTYPES, MAX_HEADER_BYTES, SafetensorsFile, SafetensorsTensor, read_linear
from .weights import Weights
from .wide import NestedAbsmax, from_bnb4, from_hqq_float, from_mxfp4, from_nvfp4

__all__ = ["PLAIN", "RUNS_AS", "RUN_BITS", "Checkpoint", "StoredTensor", "open_checkpoint"]

#: Form in which a stored type runs, group by group exact unless `formats.md` says otherwise.
RUNS_AS = {
    "Q2_K": "wide4", "Q3_K": "wide8", "Q4_0": "int4", "Q4_1": "wide4", "Q5_0": "int8", "Q5_1": "wide8", "Q8_0": "int8", "Q4_K": "wide4",
    "Q5_K": "wide8", "Q6_K": "wide8", "IQ4_NL": "wide4", "IQ4_XS": "wide4", "MXFP4": "wide4", "NVFP4": "wide4",
    "GPTQ": "int4", "GPTQ v2": "int4", "AWQ": "int4", "compressed-tensors": "int4", "HQQ": "wide4", "NF4": "wide4",
    "FP4": "wide4",
}  # fmt: skip
#: Bits a weight that a product reads, padding apart, of the types whose groups are fixed.
RUN_BITS = {
    "Q2_K": 8.0, "Q3_K": 10.0, "Q4_0": 4.5, "Q4_1": 6.0, "Q5_0": 8.5, "Q5_1": 10.0, "Q8_0": 8.5, "Q4_K": 6.0, "Q5_K": 10.0, "Q6_K": 10.0,
    "IQ4_NL": 5.0, "IQ4_XS": 5.0, "MXFP4": 5.0, "NVFP4": 6.0,
}  # fmt: skip
#: Types that are no codes: kept as they are.
PLAIN = {name for name, (_, dtype) in DTYPES.items() if dtype is not None}
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors"}
_E4M3 = ("F8_E4M3",)


@dataclass(frozen=True)
class StoredTensor:
    """A matrix, a stack of them, or another tensor.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Of the weights, (..., N, K), whatever the shapes of the tensors that hold them.
    stored : str
        "Q4_K", "GPTQ", "BF16", ...
    nbytes : int
        Of all its tensors.
    form : str or None
        What it runs as: "int4", "int8", "wide4", "wide8"; None for what is no codes.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int
    form: str | None
    _read: Callable[[], Any] = field(repr=False, compare=False)

    @property
    def num_params(self) -> int:
        """Weights."""
        return math.prod(self.shape)


class Checkpoint(Closing):
    """An open checkpoint; use it as a context manager. Made by `open_checkpoint`.

    Attributes
    ----------
    path : Path
    kind : str
        "GGUF", "safetensors" or "assay".
    config : dict
        The parsed ``config.json``, {} without one.
    tensors : dict of str to StoredTensor
        In the order of the file.
    """

    def __init__(self, path: Path, kind: str, file: GGUFFile | SafetensorsFile, config: Mapping[str, Any]) -> None:
        self.path, self.kind, self.file, self.config = path, kind, file, dict(config)
        self.tensors: dict[str, StoredTensor] = {}

    def close(self) -> None:
        """Lets go of the files."""
        self.file.close()

    def weights(self, name: str) -> Weights:
        """A matrix in the form in which it runs, rows of a stack flattened; FormatError for other tensors."""
        tensor = self.tensors[name]
        if tensor.form is None:
            raise FormatError(f"{self.path}: {short(name)}: expected quantised weights, got {tensor.stored}")
        read: Weights = tensor._read()
        wanted = (math.prod(tensor.shape[:-1]), tensor.shape[-1])
        if read.q.shape != wanted:
            raise FormatError(f"{self.path}: {short(name)}: expected weights {wanted}, got {read.q.shape}")
        return read

    def array(self, name: str) -> np.ndarray:
        """A tensor that is no codes, read-only; bfloat16 as raw uint16, 8-bit floats as raw uint8."""
        tensor = self.tensors[name]
        if tensor.form is not None:
            raise FormatError(f"{self.path}: {short(name)}: expected a plain tensor, got {tensor.stored}")
        array: np.ndarray = tensor._read()
        return array


def open_checkpoint(path: str | Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens a GGUF file, a .safetensors file, the index of a sharded checkpoint, or a folder with either.

    Parameters
    ----------
    config
        In place of the ``config.json`` beside the file.

    Raises
    ------
    FormatError
        Naming the file, the tensor, what was wanted and what came.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as handle:
            head = handle.read(len(MAGIC))
        if head == MAGIC:
            return _open_gguf(path)
        if not path.name.endswith((".json", ".safetensors")):
            raise FormatError(f"{path}: expected a GGUF or .safetensors file, or an index, got {head!r}")
    file = SafetensorsFile(path)
    try:
        return _open_safetensors(path, file, config)
    except BaseException:
        file.close()
        raise


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    found = Checkpoint(path, "GGUF", file, {})
    dtypes = {
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "F64": "<f8",
        "I8": "i1",
        "I16": "<i2",
        "I32": "<i4",
        "I64": "<i8",
    }

    def reader(name: str, stored: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        if stored in GGML_READABLE:
            return lambda: from_ggml(file.raw(name), stored, name=f"{path}: tensor {short(name)}")
        return lambda: file.raw(name).reshape(-1).view(dtypes[stored]).reshape(shape)

    for t in file.tensors.values():
        form = RUNS_AS[t.type_name] if t.type_name in GGML_READABLE else None
        shape = (1, *t.shape) if form and len(t.shape) == 1 else t.shape
        found.tensors[t.name] = StoredTensor(
            t.name, shape, t.type_name, t.nbytes, form, reader(t.name, t.type_name, shape)
        )
    return found


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path, file: SafetensorsFile, config: Mapping[str, Any] | None) -> Checkpoint:
    matrices = container_matrices(file)
    if config is None:
        config = _config_of(file)
    scan = _Scan(file, config)
    if matrices is not None:
        for name, entry in matrices.items():
            suffixes = ("qweight", "scales", "zeros", "minimum", "codebook", "perm")
            parts = [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in file.tensors]
            read = _partial_matrix(file, name, entry)
            scan.add(name, tuple(entry["shape"]), entry.get("stored", ""), entry["form"], parts, read)
    else:
        scan.by_config()
        scan.by_names()
    found = Checkpoint(path, "safetensors" if matrices is None else "assay", file, config)
    rest = [t for t in file.tensors.values() if t.name not in scan.taken]
    plain = {t.name: StoredTensor(t.name, t.shape, t.dtype, t.nbytes, None, scan.plain(t.name)) for t in rest}
    for name in plain:
        if name in scan.found:
            raise FormatError(f"{file.path}: tensor {short(name)}: expected once, got a matrix of that name too")
    found.tensors = scan.found | plain
    return found


def _partial_matrix(file: SafetensorsFile, name: str, entry: Mapping[str, Any]) -> Callable[[], Weights]:
    return lambda: read_matrix(file, name, entry)


def _config_of(file: SafetensorsFile) -> dict[str, Any]:
    beside = file.path.parent / "config.json"
    if beside.is_file():
        return parse_json(read_small(beside, MAX_HEADER_BYTES), beside, "config.json")
    text = file.metadata.get("quantization_config")
    return {"quantization_config": parse_json(text.encode(), file.path, "quantization_config")} if text else {}


class _Scan:
    """Finds the quantised matrices of a safetensors file, and which tensors belong to them."""

    def __init__(self, file: SafetensorsFile, config: Mapping[str, Any]) -> None:
        self.file, self.config = file, config
        self.found: dict[str, StoredTensor] = {}
        self.taken: set[str] = set()

    def add(
        self, name: str, shape: tuple[int, ...], stored: str, form: str, parts: list[str], read: Callable[[], Weights]
    ) -> None:
        present = [p for p in parts if p in self.file.tensors]
        self.taken |= set(present)
        nbytes = sum(self.file.tensors[p].nbytes for p in present)
        self.found[name] = StoredTensor(name, shape, stored, nbytes, form, read)

    def plain(self, name: str) -> Callable[[], np.ndarray]:
        return lambda: self.file.array(name)

    def need(self, name: str, dtypes: tuple[str, ...], what: str) -> SafetensorsTensor:
        tensor = self.file.tensors.get(name)
        if tensor is None or tensor.dtype not in dtypes:
            got = "no such tensor" if tensor is None else tensor.dtype
            raise FormatError(
                f"{self.file.path}: tensor {short(name)}: expected {' or '.join(dtypes)} ({what}), got {got}"
            )
        return tensor

    # ---- by the configuration ------------------------------------------------------------------------------------

    def by_config(self) -> None:
        quant = self.config.get("quantization_config")
        method = quant.get("quant_method") if isinstance(quant, Mapping) else None
        layout = quant.get("format") if isinstance(quant, Mapping) else None
        if method == "compressed-tensors" and layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            return self._by_suffix(".weight_packed", self._nvfp4 if layout.startswith("nv") else self._mxfp4_packed)
        if method not in _METHODS:
            stray = next((n for n in self.file.tensors if n.endswith((".qweight", ".qzeros"))), None)
            if stray:
                raise FormatError(
                    f"{self.file.path}: tensor {short(stray)}: expected a config.json beside it whose quantization_config"
                    f" says how to read it (quant_method gptq or awq), got {json.dumps(method)}"
                )
            return None
        suffix = ".weight_packed" if method == "compressed-tensors" else ".qweight"
        assert isinstance(quant, Mapping)
        version_2 = method == "gptq" and str(quant.get("checkpoint_format", "")).lower() == "gptq_v2"
        stored = "GPTQ v2" if version_2 else _METHODS[method]
        return self._by_suffix(suffix, lambda module: self._int4(module, str(method), stored))

    def _by_suffix(self, suffix: str, add: Callable[[str], None]) -> None:
        for name in [n for n in self.file.tensors if n.endswith(suffix)]:
            add(name[: -len(suffix)])

    def _int4(self, module: str, method: str, stored: str) -> None:
        if method == "compressed-tensors":
            suffixes = ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"]
            self.need(f"{module}.weight_shape", ("I32", "I64"), "N and K")
            dims = self.file.array(f"{module}.weight_shape").reshape(-1)
            if dims.size != 2:
                raise FormatError(
                    f"{self.file.path}: {short(module)}.weight_shape: expected [2], got {dims.size} numbers"
                )
            shape = (int(dims[0]), int(dims[1]))
            if min(shape) < 1:
                raise FormatError(
                    f"{self.file.path}: {short(module)}.weight_shape: expected N, K >= 1, got {list(shape)}"
                )
        else:
            suffixes = ["qweight", "qzeros", "scales", "g_idx", "bias_scale"]
            t = self.file.tensors[f"{module}.qweight"]
            if len(t.shape) != 2:
                raise FormatError(
                    f"{self.file.path}: tensor {short(t.name)}: expected 2 dimensions, got {list(t.shape)}"
                )
            shape = (t.shape[1], 8 * t.shape[0]) if method == "gptq" else (8 * t.shape[1], t.shape[0])
        parts = [f"{module}.{s}" for s in suffixes]
        self.add(f"{module}.weight", shape, stored, "int4", parts, lambda: read_linear(self.file, self.config, module))

    # ---- by names and dtypes -------------------------------------------------------------------------------------

    def by_names(self) -> None:
        tensors = self.file.tensors
        for name, t in tensors.items():
            if name in self.taken:
                continue
            if (
                name.endswith("_blocks")
                and f"{name[:-7]}_scales" in tensors
                and t.dtype == "U8"
                and len(t.shape) in (3, 4)
            ):
                self._mxfp4(name[:-7])
            elif name.endswith(".weight_scale_2") and f"{name[:-15]}.weight_scale" in tensors:
                self._nvfp4(name[: -len(".weight_scale_2")])
            elif name.endswith(".weight_global_scale") and f"{name[:-20]}.weight_packed" in tensors:
                self._nvfp4(name[: -len(".weight_global_scale")])
            elif ".quant_state.bitsandbytes__" in name:
                self._bnb4(name.split(".quant_state.")[0], name)
            elif name.endswith(".W_q"):
                self._hqq(name[: -len(".W_q")])

    def _mxfp4(self, module: str) -> None:
        blocks, scales = f"{module}_blocks", f"{module}_scales"
        *lead, groups, width = self.file.tensors[blocks].shape
        shape = (*lead, groups * width * 2)
        read = lambda: from_mxfp4(self.file.array(blocks), self.file.array(scales), name=f"{self.file.path}: {module}")  # noqa: E731
        self.add(module, shape, "MXFP4", "wide4", [blocks, scales], read)

    def _mxfp4_packed(self, module: str) -> None:
        packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        rows, half = self._matrix(packed, ("U8",))
        self.need(scale, ("U8", "F8_E8M0"), "E8M0 scales")

        def read() -> Weights:
            where = f"{self.file.path}: {module}.weight"
            if half % 16:
                raise FormatError(f"{where}_packed: expected K a multiple of 32, got K = {2 * half}")
            return from_mxfp4(self.file.array(packed).reshape(rows, -1, 16), self.file.array(scale), name=where)

        self.add(f"{module}.weight", (rows, 2 * half), "MXFP4", "wide4", [packed, scale], read)

    def _matrix(self, name: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        t = self.need(name, dtypes, "a matrix")
        if len(t.shape) != 2:
            raise FormatError(f"{self.file.path}: tensor {short(name)}: expected 2 dimensions, got {list(t.shape)}")
        return t.shape[0], t.shape[1]

    def _nvfp4(self, module: str) -> None:
        divide = f"{module}.weight_packed" in self.file.tensors
        packed = f"{module}.weight_packed" if divide else f"{module}.weight"
        factor = f"{module}.weight_global_scale" if divide else f"{module}.weight_scale_2"
        rows, half = self._matrix(packed, ("U8",))
        self.need(factor, ("F32",), "the global scale")
        self.need(f"{module}.weight_scale", _E4M3, "block scales")

        def read() -> Weights:
            arrays = (self.file.array(n) for n in (packed, f"{module}.weight_scale", factor))
            return from_nvfp4(*arrays, divide=divide, name=f"{self.file.path}: {module}")

        self.add(
            f"{module}.weight", (rows, 2 * half), "NVFP4", "wide4", [packed, f"{module}.weight_scale", factor], read
        )

    def _bnb4(self, weight: str, state_name: str) -> None:
        where = f"{self.file.path}: {weight}.quant_state"
        state = parse_json(self.file.raw(state_name).tobytes(), self.file.path, f"{weight}.quant_state")
        kind, shape, blocksize = state.get("quant_type"), state.get("shape"), state.get("blocksize")
        if kind not in ("nf4", "fp4"):
            raise FormatError(f"{where}: quant_type: expected nf4 or fp4, got {str(kind)[:40]!r}")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(d) is int and d > 0 for d in shape):
            raise FormatError(f"{where}: shape: expected [N, K], got {str(shape)[:80]}")
        if type(blocksize) is not int or blocksize < 16:
            raise FormatError(f"{where}: blocksize: expected a number from 16 up, got {str(blocksize)[:40]}")
        names = [f"{weight}.{s}" for s in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")]
        self.need(weight, ("U8",), "codes")
        for name in names[:2]:
            self.need(name, ("F32", "U8"), "bitsandbytes")
        double = names[2] in self.file.tensors

        def read() -> Weights:
            absmax, quant_map, *second = (self.file.array(n) for n in (names if double else names[:2]))
            nested = None
            if double:
                offset, size = state.get("nested_offset"), state.get("nested_blocksize")
                if not isinstance(offset, float) or type(size) is not int:
                    raise FormatError(f"{where}: expected nested_offset and nested_blocksize, got {offset!r}, {size!r}")
                nested = NestedAbsmax(second[1], second[0], offset, size)
            module = f"{self.file.path}: {weight.removesuffix('.weight')}"
            return from_bnb4(
                self.file.array(weight),
                absmax,
                shape,
                quant_map=quant_map,
                blocksize=blocksize,
                nested=nested,
                name=module,
            )

        self.add(weight, (shape[0], shape[1]), kind.upper(), "wide4", [weight, state_name, *names], read)

    def _hqq(self, module: str) -> None:
        names = {s: f"{module}.{s}" for s in ("W_q", "scale", "zero", "shape", "group_size", "axis", "nbits")}
        for part in ("shape", "group_size"):
            self.need(names[part], ("I32", "I64"), "HQQ")
        numbers = {p: self.file.array(names[p]).reshape(-1) for p in names if p in ("shape", "group_size", "axis", "nbits")
                   and names[p] in self.file.tensors}  # fmt: skip
        if numbers["shape"].size != 2 or any(v.size != 1 for p, v in numbers.items() if p != "shape"):
            raise FormatError(
                f"{self.file.path}: {short(module)}: expected shape [2] and single numbers beside it (HQQ)"
            )
        single = {p: int(v[0]) for p, v in numbers.items() if p != "shape"}
        if single.get("nbits", 4) != 4:
            raise FormatError(f"{self.file.path}: {short(module)}.nbits: expected 4, got {single['nbits']}")
        shape = (int(numbers["shape"][0]), int(numbers["shape"][1]))
        if min(shape) < 1:
            raise FormatError(f"{self.file.path}: {short(module)}.shape: expected N, K >= 1, got {list(shape)}")
        scale = self.need(names["scale"], ("F16", "F32", "BF16"), "HQQ")
        zero = self.need(names["zero"], ("F16", "F32", "BF16"), "HQQ")

        def read() -> Weights:
            s, z = (_widened(self.file.array(t.name), t.dtype, f"{self.file.path}: {t.name}") for t in (scale, zero))
            whole = (z == np.rint(z)).all() and (z >= 0).all() and (z <= 15).all()
            return (from_hqq if whole else from_hqq_float)(
                self.file.array(names["W_q"]), s, z, shape, group_size=single["group_size"], axis=single.get("axis", 1),
                name=f"{self.file.path}: {module}",
            )  # fmt: skip

        self.add(f"{module}.weight", shape, "HQQ", "wide4", list(names.values()), read)


def _widened(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    if dtype != "BF16":
        return array
    return scales_of(array, where, (array.shape[0], 1) if array.ndim == 2 else (-1, 1), "bfloat16", "")

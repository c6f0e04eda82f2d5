"""INT4 linears of GPTQ, AWQ and compressed-tensors checkpoints, found by the checkpoint's configuration."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...errors import FormatError
from ..int4 import from_awq, from_compressed_tensors, from_gptq
from ..weights import Int4Weights
from .file import SafetensorsFile

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
    return ((module, read(module)) for module in modules)


def read_linear(file: SafetensorsFile, config: Mapping[str, Any], module: str) -> Int4Weights:
    """One INT4 linear of a checkpoint, by its module's name; see `quantized_linears`."""
    return _linear_reader(file, config)[0](module)


_Reader = Callable[[str], Int4Weights]  # of a module, by its name


def _linear_reader(file: SafetensorsFile, config: Mapping[str, Any]) -> tuple[_Reader, list[str]]:
    """The reader of the checkpoint's method, and its modules."""
    quant = config.get("quantization_config", config)
    where = f"{file.path}: quantization_config"
    if not isinstance(quant, Mapping):
        raise FormatError(f"{where}: expected an object, got {reprlib.repr(quant)}")
    method = quant.get("quant_method")
    readers = {"gptq": _gptq_reader, "awq": _awq_reader, "compressed-tensors": _compressed_reader}
    if method not in readers:
        raise FormatError(f"{where}: quant_method: expected one of {', '.join(readers)}, got {reprlib.repr(method)}")
    suffix = ".weight_packed" if method == "compressed-tensors" else ".qweight"
    modules = [name[: -len(suffix)] for name in file.tensors if name.endswith(suffix)]
    if not modules:
        raise FormatError(f"{file.path}: expected tensors named *{suffix} ({method}), got none")
    return readers[method](file, quant, where), modules


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


def _gptq_reader(file: SafetensorsFile, quant: Mapping[str, Any], where: str) -> _Reader:
    _field(quant, where, (4,), "bits")
    group_size = _group_size(quant, where, "group_size")
    layout = _field(quant, where, tuple(_GPTQ_VERSIONS), "checkpoint_format", default="gptq")
    symmetric, act_order = quant.get("sym") is True, quant.get("desc_act") is True
    zero_16 = "carry" if _is_gptqmodel(quant) else "wrap"

    def read(module: str) -> Int4Weights:
        if act_order and f"{module}.g_idx" not in file.tensors:
            raise FormatError(f"{file.path}: {module}.g_idx: expected it (desc_act is true), got no such tensor")
        return from_gptq(
            file.array(f"{module}.qweight"),
            _part(file, f"{module}.qzeros", optional=symmetric),
            file.array(f"{module}.scales"),
            _part(file, f"{module}.g_idx", optional=True),
            group_size=group_size,
            version=_GPTQ_VERSIONS[layout],
            zero_16=zero_16,
            scales_dtype=_float_dtype(file, f"{module}.scales"),
            name=f"{file.path}: {module}",
        )

    return read


def _awq_reader(file: SafetensorsFile, quant: Mapping[str, Any], where: str) -> _Reader:
    _field(quant, where, (4,), "bits", "w_bit")
    _field(quant, where, ("gemm",), "version", default="gemm")
    group_size = _group_size(quant, where, "group_size", "q_group_size")

    def read(module: str) -> Int4Weights:
        return from_awq(
            file.array(f"{module}.qweight"),
            _part(file, f"{module}.qzeros", optional=quant.get("zero_point") is False),
            file.array(f"{module}.scales"),
            group_size=group_size,
            scales_dtype=_float_dtype(file, f"{module}.scales"),
            name=f"{file.path}: {module}",
        )

    return read


def _compressed_reader(file: SafetensorsFile, quant: Mapping[str, Any], where: str) -> _Reader:
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

    def read(module: str) -> Int4Weights:
        group_size, symmetric, by_group = scheme_of(module)
        return from_compressed_tensors(
            file.array(f"{module}.weight_packed"),
            file.array(f"{module}.weight_scale"),
            file.array(f"{module}.weight_shape"),
            _part(file, f"{module}.weight_zero_point", optional=symmetric),
            _part(file, f"{module}.weight_g_idx", optional=not by_group),
            group_size=group_size,
            scales_dtype=_float_dtype(file, f"{module}.weight_scale"),
            name=f"{file.path}: {module}",
        )

    return read

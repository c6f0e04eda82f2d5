"""What ``assay convert`` writes: for every target, the tensors of a matrix and the configuration that tells how to read them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FormatError
from .container import form_of, matrix_parts
from .int4 import to_awq, to_compressed_tensors, to_gptq
from .weights import Int4Weights, Weights, as_int4, as_wide
from .wide import to_bnb4, to_hqq_float, to_mxfp4, to_nvfp4

__all__ = ["GGUF_TARGETS", "SAFETENSORS_TARGETS", "Parts", "Target"]

#: name -> (array, safetensors dtype where the array's own does not tell)
Parts = dict[str, tuple[np.ndarray, str | None]]


@dataclass(frozen=True)
class Target:
    """A format of safetensors checkpoints.

    Attributes
    ----------
    parts : callable
        (name of the matrix, weights, shape) to tensors; FormatError where the format cannot hold the weights.
    settings : callable
        Weights to what the whole checkpoint's configuration says of them; equal for all matrices of a checkpoint.
    config : callable
        Those settings to ``quantization_config``.
    """

    parts: Callable[[str, Weights, tuple[int, ...]], Parts]
    settings: Callable[[Weights], dict[str, Any]] = lambda w: {}
    config: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda settings: None


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _flat(shape: tuple[int, ...], what: str) -> None:
    if len(shape) != 2:
        raise FormatError(f"shape: expected [N, K] ({what} holds no stacks of experts), got {list(shape)}")


def _dotted(name: str, tensors: dict[str, np.ndarray]) -> Parts:
    return {f"{_module(name)}.{suffix}": (array, None) for suffix, array in tensors.items()}


def _assay(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
    return {part: (array, None) for part, array in matrix_parts(name, w, shape).items()}


def _gptq(version: int) -> Target:
    def parts(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
        _flat(shape, "GPTQ")
        return _dotted(name, to_gptq(as_int4(w), version=version, zero_16="carry"))

    def settings(w: Weights) -> dict[str, Any]:
        return {"group_size": w.group_size, "desc_act": isinstance(w, Int4Weights) and w.perm is not None}

    layout = "gptq" if version == 1 else "gptq_v2"
    # the name says that zero points of 0 borrow as GPTQModel's do; it reads them back, and so does assay
    meta = {"quantizer": ["gptqmodel:compatible", "assay"]}
    base = {"quant_method": "gptq", "bits": 4, "checkpoint_format": layout, "sym": False, "meta": meta}
    return Target(parts, settings, lambda s: base | s)


def _awq_parts(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
    _flat(shape, "AWQ")
    return _dotted(name, to_awq(as_int4(w)))


def _awq_config(settings: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True} | settings


def _compressed_parts(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
    _flat(shape, "compressed-tensors")
    narrow = as_int4(w)
    if narrow.perm is not None:
        raise FormatError("perm: expected None (this writer gives compressed-tensors no g_idx), got act-order weights")
    zeros = np.full(narrow.scales.shape, 8, np.uint8) if narrow.zeros is None else narrow.zeros
    return _dotted(name, to_compressed_tensors(Int4Weights(narrow.q, narrow.scales, zeros, narrow.group_size)))


def _compressed_config(settings: dict[str, Any]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"} | settings
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _mxfp4_parts(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
    tensors = to_mxfp4(w)
    lead = shape[:-1]
    return {
        f"{_module(name)}_blocks": (tensors["blocks"].reshape(*lead, -1, 16), None),
        f"{_module(name)}_scales": (tensors["scales"].reshape(*lead, -1), None),
    }


def _nvfp4_parts(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
    _flat(shape, "NVFP4")
    tensors = to_nvfp4(w)
    module = _module(name)
    return {
        f"{module}.weight_packed": (tensors["weight_packed"], None),
        f"{module}.weight_scale": (tensors["weight_scale"], "F8_E4M3"),
        f"{module}.weight_global_scale": (tensors["global_scale"], None),
    }


def _nvfp4_config(settings: dict[str, Any]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _nf4_parts(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
    _flat(shape, "bitsandbytes")
    tensors = to_bnb4(w)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(shape)}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        name: (tensors["weight"], None),
        f"{name}.absmax": (tensors["absmax"], None),
        f"{name}.quant_map": (tensors["quant_map"], None),
        f"{name}.quant_state.bitsandbytes__nf4": (text, None),
    }


def _hqq_parts(name: str, w: Weights, shape: tuple[int, ...]) -> Parts:
    _flat(shape, "HQQ")
    tensors = to_hqq_float(as_wide(w, 4), dtype="float32")
    numbers = {"shape": list(shape), "group_size": w.group_size, "axis": 1, "nbits": 4}
    extra = {key: np.array(value, np.int32) for key, value in numbers.items()}
    return _dotted(name, {key: tensors[key] for key in ("W_q", "scale", "zero")} | extra)


def _group_only(w: Weights) -> dict[str, Any]:
    return {"group_size": w.group_size}


SAFETENSORS_TARGETS: dict[str, Target] = {
    "assay": Target(_assay),
    "gptq": _gptq(1),
    "gptq_v2": _gptq(2),
    "awq": Target(_awq_parts, _group_only, _awq_config),
    "compressed-tensors": Target(_compressed_parts, _group_only, _compressed_config),
    "mxfp4": Target(_mxfp4_parts, config=lambda _: {"quant_method": "mxfp4"}),
    "nvfp4": Target(_nvfp4_parts, config=_nvfp4_config),
    "nf4": Target(
        _nf4_parts,
        config=lambda _: {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "hqq": Target(_hqq_parts, config=lambda _: {"quant_method": "hqq"}),
}

#: Types of GGUF that can be written from a GGUF file, by the name of the target.
GGUF_TARGETS = {
    name.lower(): name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
}


def label(w: Weights, target: str) -> str:
    """What the table calls a matrix that was written: the form for our own container, else the target."""
    return form_of(w) if target == "assay" else target

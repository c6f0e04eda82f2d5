"""Kernels for cheap LLM inference, and a calibrated model of what they cost.

Names are loaded at first use, so that ``import assay`` is quick and starts nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "PackedInt4": "assay.ops.int4",
    "pack": "assay.ops.int4",
    "quantize_int4": "assay.ops.quantize",
    "quantization_error": "assay.ops.quantize",
    "QuantizationError": "assay.quantize",
    "PackedInt8": "assay.ops.int8",
    "pack_int8": "assay.ops.int8",
    "quantize_int8": "assay.ops.int8",
    "w8a8_gemm": "assay.ops.int8",
    "PackedWide": "assay.ops.wide",
    "pack_wide": "assay.ops.wide",
    "w8a16_gemm": "assay.ops.wide",
    "w4a8_gemm": "assay.ops.int4",
    "w4a16_gemm": "assay.ops.int4",
    "RouteResult": "assay.ops.moe",
    "moe_route": "assay.ops.moe",
    "moe_align": "assay.ops.moe_dispatch",
    "moe_capacity": "assay.ops.moe_dispatch",
    "moe_expert_choice": "assay.ops.moe_dispatch",
    "moe_permute": "assay.ops.moe_dispatch",
    "moe_unpermute": "assay.ops.moe_dispatch",
    "moe_load": "assay.ops.moe_load",
    "rebalance_experts": "assay.ops.moe_load",
    "ExpertsCost": "assay.ops.moe_experts",
    "ExpertsShape": "assay.ops.moe_experts",
    "PackedExperts": "assay.ops.moe_experts",
    "moe_experts": "assay.ops.moe_experts",
    "pack_experts": "assay.ops.moe_experts",
    "quantize_experts": "assay.ops.moe_experts",
    "Ragged": "assay.ops.speculative",
    "SparseProbs": "assay.ops.speculative",
    "VerifyResult": "assay.ops.speculative",
    "sample": "assay.ops.speculative",
    "verify": "assay.ops.speculative",
    "verify_chain": "assay.ops.speculative",
    "Certificate": "assay.speculation.certify",
    "certify": "assay.speculation.certify",
    "DraftTree": "assay.speculation.tree",
    "optimal_tree": "assay.speculation.tree",
    "transport_bound": "assay.speculation.transport",
    "LoadedTensor": "assay.loading",
    "load": "assay.loading",
    "AssayError": "assay.errors",
    "FormatError": "assay.errors",
    "ProfileError": "assay.errors",
    "RowError": "assay.errors",
    "UnsupportedError": "assay.errors",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("assay")
    elif name == "cuda":
        value = import_module("assay.cuda")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'assay' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

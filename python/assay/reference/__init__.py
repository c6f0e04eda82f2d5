"""Naive numpy of every op: the specification, readable aloud.

Arguments are checked by :mod:`assay.ops`, which also offers these functions as ``backend="reference"``.
"""

from .gemm import (
    dequantize_int4,
    fma,
    lane_sum,
    pack_nibbles,
    quantize_activations,
    quantize_int4,
    quantize_int8,
    unpack_nibbles,
    w4a8_gemm,
    w4a16_gemm,
    w8a8_gemm,
)
from .moe import moe_route
from .moe_experts import activate, moe_experts
from .philox import philox4x32, uniform
from .rows import row_status, softmax
from .tree import TreeLayout, tree_build
from .verification import accepts, resample, sample, verify
from .wide import dequantize_wide, wide_a8_gemm, wide_a16_gemm, wide_values

__all__ = [
    "TreeLayout",
    "accepts",
    "activate",
    "dequantize_int4",
    "dequantize_wide",
    "fma",
    "lane_sum",
    "moe_experts",
    "moe_route",
    "pack_nibbles",
    "philox4x32",
    "quantize_activations",
    "quantize_int4",
    "quantize_int8",
    "resample",
    "row_status",
    "sample",
    "softmax",
    "tree_build",
    "uniform",
    "unpack_nibbles",
    "verify",
    "w4a8_gemm",
    "w4a16_gemm",
    "w8a8_gemm",
    "wide_a8_gemm",
    "wide_a16_gemm",
    "wide_values",
]

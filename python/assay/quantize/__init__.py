"""INT4 weights made from float ones: scales searched for least error, and GPTQ. Pure numpy.

Rounding to nearest without a search is :func:`assay.reference.quantize_int4`. Arguments are checked by
:func:`assay.quantize_int4`, the public door.
"""

from .error import QuantizationError, quantization_error
from .gptq import inverse_factor, quantize_gptq
from .search import best_scales, quantize_mse

__all__ = ["QuantizationError", "best_scales", "inverse_factor", "quantization_error", "quantize_gptq", "quantize_mse"]

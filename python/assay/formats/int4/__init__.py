"""INT4 checkpoints of other projects, repacked both ways without changing a weight: one module a format.

Every converter goes through one form, `Int4Weights`: codes one to a byte, ``w = scale (q - zero)`` in groups along K.
The modules' docstrings give the layouts, with W of N output and K input features and G groups a row. What a format cannot
hold exactly is refused by name, never rounded.
"""

from ..weights import Int4Weights
from .awq import from_awq, to_awq
from .compressed_tensors import from_compressed_tensors, to_compressed_tensors
from .gptq import from_gptq, to_gptq
from .hqq import from_hqq, to_hqq
from .q4 import from_q4_0, from_q4_1, to_q4_0, to_q4_1

__all__ = [
    "Int4Weights",
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "from_hqq",
    "from_q4_0",
    "from_q4_1",
    "to_awq",
    "to_compressed_tensors",
    "to_gptq",
    "to_hqq",
    "to_q4_0",
    "to_q4_1",
]

"""safetensors: files and sharded checkpoints read, files written, and the INT4 linears that a checkpoint holds."""

from .file import DTYPES, MAX_HEADER_BYTES, SafetensorsFile, SafetensorsTensor, open_safetensors
from .linears import quantized_linears, read_linear
from .writer import SafetensorsWriter

__all__ = [
    "DTYPES",
    "MAX_HEADER_BYTES",
    "SafetensorsFile",
    "SafetensorsTensor",
    "SafetensorsWriter",
    "open_safetensors",
    "quantized_linears",
    "read_linear",
]

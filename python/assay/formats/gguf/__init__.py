"""GGUF: files read and written, and the model that one holds."""

from .file import MAGIC, GGUFArray, GGUFFile, GGUFTensor, open_gguf
from .model import TensorRole, model_spec, tensor_role
from .writer import GGUFWriter, tensor_bytes

__all__ = [
    "MAGIC",
    "GGUFArray",
    "GGUFFile",
    "GGUFTensor",
    "GGUFWriter",
    "TensorRole",
    "model_spec",
    "open_gguf",
    "tensor_bytes",
    "tensor_role",
]

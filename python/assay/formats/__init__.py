"""Files of other projects, read and written: GGUF models, Hugging Face configurations, quantised checkpoints.

Names are loaded at first use, so that reading a ``config.json`` does not load numpy.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "GGUFFile": ".gguf",
    "GGUFTensor": ".gguf",
    "model_spec": ".gguf",
    "open_gguf": ".gguf",
    "Int4Weights": ".weights",
    "Int8Weights": ".weights",
    "WideWeights": ".weights",
    "conversion_error": ".weights",
    "from_ggml": ".ggml",
    "to_ggml": ".ggml",
    "Checkpoint": ".checkpoint",
    "StoredTensor": ".checkpoint",
    "open_checkpoint": ".checkpoint",
    "SafetensorsFile": ".safetensors",
    "open_safetensors": ".safetensors",
    "quantized_linears": ".safetensors",
    "dequantize_rows": ".dequant",
    "load_config": ".hf",
    "spec_from_config": ".hf",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

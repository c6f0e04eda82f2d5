"""The other backends of every op: Numba twins and the reference, which compute on float32 arrays."""

from importlib import import_module
from types import ModuleType

import numpy as np

from .._ffi import Tensor
from ..errors import UnsupportedError

BACKENDS = ("c", "numba", "reference")


def twin(backend: str, name: str, isa: str | None) -> ModuleType | None:
    """The Numba module of that name for backend "numba", None for "reference".

    Raises
    ------
    ValueError
        An unknown backend, or an `isa`, which only the C kernels have.
    UnsupportedError
        Numba is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if isa is not None:
        raise ValueError(f"isa: only backend 'c' has variants, got isa={isa!r} with backend={backend!r}")
    if backend == "reference":
        return None
    try:
        return import_module(f"assay.jit.{name}")
    except ImportError as exc:
        raise UnsupportedError(f"backend='numba' needs the numba package: pip install 'assay[numba]' ({exc})") from exc


def widen(x: Tensor) -> np.ndarray:
    """float32 array of a float32, float16 or bfloat16 tensor, exactly."""
    if x.dtype == "bfloat16":
        return (x.array.astype(np.uint32) << 16).view(np.float32)
    return x.array.astype(np.float32, copy=False)


def widen_a16(x: Tensor) -> np.ndarray:
    """`widen` for ops on activations as they are, to which a bfloat16 smaller than 2^-100 in size is zero (csrc/assay.h)."""
    wide = widen(x)
    return np.where(np.abs(wide) < 2.0**-100, np.float32(0), wide) if x.dtype == "bfloat16" else wide

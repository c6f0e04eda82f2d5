"""The Numba-CUDA twins (:mod:`assay.jit`), which stand in where no kernels are compiled for a GPU."""

from importlib import import_module
from typing import Any

from ..errors import UnsupportedError
from ._arrays import DeviceTensor, storage
from ._status import message


class _Exported:
    """A DeviceTensor by the protocol that Numba reads; bfloat16 and float16 as their bits."""

    def __init__(self, tensor: DeviceTensor) -> None:
        kind = storage("uint16" if tensor.dtype == "float16" else tensor.dtype)
        self.__cuda_array_interface__ = {
            "shape": tensor.shape, "typestr": kind.str, "data": (tensor.address, False), "version": 3,
            "strides": tuple(s * kind.itemsize for s in tensor.strides),
        }  # fmt: skip


def twin(name: str, by_name: bool = False) -> Any:
    """The module of that name.

    Raises
    ------
    UnsupportedError
        Numba-CUDA is not installed.
    """
    try:
        return import_module(f"assay.jit.{name}")
    except ImportError as exc:
        why = "backend='numba' on a GPU needs" if by_name else f"{message()}; the Numba twin, which runs on any, needs"
        raise UnsupportedError(f"{why} the numba-cuda package: pip install 'assay[numba-cuda]' ({exc})") from exc


def for_numba(handle: int, *tensors: DeviceTensor | None) -> list[Any]:
    """A stream and arrays as Numba knows them, without a copy."""
    from numba import cuda

    arrays = [None if t is None else cuda.as_cuda_array(_Exported(t), sync=False) for t in tensors]
    return [cuda.external_stream(handle), *arrays]

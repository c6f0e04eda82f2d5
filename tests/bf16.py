"""bfloat16 tensors without torch: numpy has no such type, DLPack has."""

import ctypes
from typing import Any

import numpy as np

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_TYPE_CODE = 20  # offset in DLTensor: after data, device and ndim
_BFLOAT = 4


class BFloat16:
    """The upper halves of float32 values (rounded toward zero), offered as a bfloat16 tensor by DLPack alone."""

    def __init__(self, values: np.ndarray) -> None:
        self.bits = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)

    def widened(self) -> np.ndarray:
        return (self.bits.astype(np.uint32) << 16).view(np.float32)

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self.bits.__dlpack__()
        ctypes.c_uint8.from_address(_pointer(capsule, b"dltensor") + _TYPE_CODE).value = _BFLOAT
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

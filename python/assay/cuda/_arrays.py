"""Arrays on a GPU: anybody's by DLPack or ``__cuda_array_interface__``, without a copy, and assay's own."""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from .._ffi import ffi, lib
from ._device import current, handle_of, own_stream, pointer, synchronize
from ._status import check

_DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 2, 3, 13
_DL_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_DL_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


def storage(dtype: str) -> np.dtype:
    """numpy's type of the bits: bfloat16's, which numpy lacks, are uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


class DeviceTensor:
    """An array on a GPU that somebody else owns.

    Attributes
    ----------
    address : int
        Of the first element.
    dtype : str
    shape, strides : tuple of int
        Strides in elements.
    device : int
    stream : int or None
        CUstream that its owner works on, if the owner says so.
    owner : object
        Keeps the memory alive.
    """

    __slots__ = ("address", "device", "dtype", "owner", "shape", "stream", "strides")

    def __init__(self, address: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], device: int,
                 stream: int | None, owner: object) -> None:  # fmt: skip
        self.address, self.dtype, self.shape, self.strides = address, dtype, shape, strides
        self.device, self.stream, self.owner = device, stream, owner

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def ptr(self) -> Any:
        return pointer(self.address)

    @property
    def contiguous(self) -> bool:
        return self.size == 0 or all(
            n == 1 or got == want for n, got, want in zip(self.shape, self.strides, _c_strides(self.shape), strict=True)
        )

    @property
    def row_stride(self) -> int:
        """Elements from row to row of a matrix; where there is no next row, any legal stride."""
        rows, cols = self.shape
        return self.strides[0] if rows > 1 and cols else cols

    @property
    def extent(self) -> tuple[int, int]:
        """First address and the one after the last."""
        if not self.size:
            return (self.address, self.address)
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (self.address, self.address + (last + 1) * storage(self.dtype).itemsize)


def _c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


# ---- assay's own arrays -------------------------------------------------------------------------------------------


class DeviceArray:
    """A dense array in a GPU's memory, so that no other library is needed to use the GPU's kernels.

    It is what ops return for device inputs. Other libraries read it without a copy (``torch.from_dlpack(x)``,
    ``cupy.asarray(x)``); :meth:`numpy` brings it back.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        "float32", "bfloat16", ...
    device : int
        "cuda:device".
    stream : int
        The stream that its content is made on: whoever reads it elsewhere waits for that.
    """

    __slots__ = ("_keep", "_whole", "address", "device", "dtype", "shape", "stream")

    def __init__(self, shape: tuple[int, ...], dtype: str, device: int, stream: Any = None) -> None:
        self.address = 0
        #: Of a part: the array that it is a part of, and that frees the memory.
        self._whole: DeviceArray | None = None
        self.shape = tuple(int(n) for n in shape)
        self.dtype, self.device = dtype, device
        if any(n < 0 for n in self.shape):
            raise ValueError(f"shape: expected no negative size, got {list(self.shape)}")
        storage(dtype)
        self.stream = handle_of(stream, device)
        #: The stream's owner, which must not destroy it first.
        self._keep = own_stream(device) if stream is None else stream
        made = ffi.new("void **")
        with current(device):
            check(lib.assay_cuda_malloc(self.nbytes, made), f"{self.nbytes} bytes on cuda:{device}")
        self.address = int(ffi.cast("uintptr_t", made[0]))

    def __del__(self) -> None:
        address, self.address = getattr(self, "address", 0), 0
        if address and getattr(self, "_whole", None) is None and not sys.is_finalizing():
            lib.assay_cuda_free(pointer(address))

    def part(self, offset: int, shape: tuple[int, ...], dtype: str) -> "DeviceArray":
        """A dense array in this one's memory, from byte `offset` on."""
        made = DeviceArray.__new__(DeviceArray)
        made.address, made._whole = 0, self
        made.shape, made.dtype, made.device = tuple(int(n) for n in shape), dtype, self.device
        made.stream, made._keep = self.stream, self._keep
        if not 0 <= offset <= self.nbytes - made.nbytes:
            raise ValueError(f"part: expected at most {self.nbytes} bytes in all, got {made.nbytes} from {offset} on")
        made.address = self.address + offset
        return made

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} on cuda:{self.device})"

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * storage(self.dtype).itemsize

    def copy_from(self, array: Any) -> Self:
        """Overwrites the content by a numpy array's of the same shape and type (bfloat16: its bits as uint16)."""
        host = np.ascontiguousarray(array)
        if host.shape != self.shape or host.dtype != storage(self.dtype):
            raise ValueError(
                f"array: expected {storage(self.dtype)} {list(self.shape)}, got {host.dtype} {list(host.shape)}"
            )
        with current(self.device):
            check(lib.assay_cuda_copy(pointer(self.address), ffi.from_buffer(host) if host.size else ffi.NULL, host.nbytes,
                                      lib.ASSAY_CUDA_TO_DEVICE, pointer(self.stream)), "copy_from")  # fmt: skip
        return self

    def numpy(self) -> np.ndarray:
        """A copy on the host, after all that its stream holds; bfloat16 as uint16 bits."""
        host = np.empty(self.shape, storage(self.dtype))
        with current(self.device):
            check(lib.assay_cuda_copy(ffi.from_buffer(host) if host.size else ffi.NULL, pointer(self.address), host.nbytes,
                                      lib.ASSAY_CUDA_TO_HOST, pointer(self.stream)), "numpy")  # fmt: skip
        synchronize(self.device, self.stream)
        return host

    def fill(self, byte: int) -> Self:
        """Sets every byte."""
        with current(self.device):
            check(lib.assay_cuda_memset(pointer(self.address), byte, self.nbytes, pointer(self.stream)), "fill")
        return self

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype == "bfloat16":
            raise AttributeError("__cuda_array_interface__ has no bfloat16: use DLPack")
        # Streams 0 is not allowed there; the legacy stream is 1.
        return {"shape": self.shape, "typestr": storage(self.dtype).str, "data": (self.address, False), "version": 3,
                "strides": None, "stream": self.stream or 1}  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_DL_CUDA, self.device)

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        if stream != -1:
            reader = stream if stream else 1
            with current(self.device):
                check(lib.assay_cuda_stream_wait(pointer(reader), pointer(self.stream)), "__dlpack__")
        return _export(self)


def empty(shape: tuple[int, ...] | int, dtype: str = "float32", device: int = 0, *, stream: Any = None) -> DeviceArray:
    """Memory on a GPU, its content undefined. dtype: numpy's names and "bfloat16"."""
    return DeviceArray((shape,) if isinstance(shape, int) else tuple(shape), dtype, device, stream)


def to_device(array: Any, device: int = 0, *, dtype: str | None = None, stream: Any = None) -> DeviceArray:
    """A copy of a host array on a GPU. dtype "bfloat16" takes its bits as uint16; otherwise the array's own type."""
    host = np.ascontiguousarray(array)
    return empty(host.shape, dtype or host.dtype.name, device, stream=stream).copy_from(host)


# ---- DLPack out ---------------------------------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _DLManaged(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_exported: dict[int, tuple[Any, ...]] = {}  # what a consumer still holds, by the address of its _DLManaged


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _release(managed: int) -> None:
    _exported.pop(managed, None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _drop_capsule(capsule: int) -> None:
    # A consumer renames the capsule and calls the deleter itself; nobody took this one if it still has its name.
    if ctypes.pythonapi.PyCapsule_IsValid(ctypes.c_void_p(capsule), b"dltensor"):
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
        _exported.pop(get(capsule, b"dltensor"), None)
        get.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _export(array: DeviceArray) -> Any:
    kind = storage(array.dtype).kind
    bits = 8 * storage(array.dtype).itemsize
    shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
    tensor = _DLTensor(array.address, _DL_CUDA, array.device, len(array.shape), 4 if array.dtype == "bfloat16" else _DL_CODES[kind],
                       bits, 1, shape, None, 0)  # fmt: skip
    managed = _DLManaged(tensor, None, ctypes.cast(_release, ctypes.c_void_p))
    _exported[ctypes.addressof(managed)] = (array, shape, managed)
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(ctypes.addressof(managed), b"dltensor", ctypes.cast(_drop_capsule, ctypes.c_void_p))


# ---- anybody's arrays in ------------------------------------------------------------------------------------------------


def device_of(x: Any) -> int | None:
    """The GPU that holds an array; None for whatever is on the host or no array."""
    if isinstance(x, np.ndarray):
        return None
    if isinstance(x, DeviceArray):
        return x.device
    if hasattr(x, "__dlpack_device__"):
        kind, ordinal = x.__dlpack_device__()
        return int(ordinal) if int(kind) in {_DL_CUDA, _DL_CUDA_MANAGED} else None
    if hasattr(x, "__cuda_array_interface__"):
        return _device_of_address(x.__cuda_array_interface__["data"][0])
    return None


def any_device(*arrays: Any) -> bool:
    """Whether one of these arrays is on a GPU."""
    return any(device_of(x) is not None for x in arrays)


def _device_of_address(address: int) -> int:
    found = ffi.new("int *")
    check(lib.assay_cuda_open(), "cuda")
    if lib.assay_cuda_pointer_device(pointer(address), found):
        raise ValueError(f"expected device memory behind __cuda_array_interface__, got the address {address:#x}")
    return int(found[0])


def _from_dlpack(x: Any, name: str, stream: int | None) -> DeviceTensor:
    # stream: the consumer's, which the producer makes wait; -1: no waiting.
    capsule = x.__dlpack__(stream=-1 if stream is None else stream or 1)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    t = _DLTensor.from_address(get(capsule, b"dltensor"))
    kind = _DL_KINDS.get(t.code)
    if kind is None or t.lanes != 1:
        raise TypeError(f"{name}: expected a plain number type, got DLPack type code {t.code}, {t.lanes} lanes")
    dtype = "bool" if kind == "bool" else f"{kind}{t.bits}"
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else _c_strides(shape)
    return DeviceTensor((t.data or 0) + t.byte_offset, dtype, shape, strides, t.device_id, None, capsule)


def _from_interface(x: Any, name: str) -> DeviceTensor:
    about = x.__cuda_array_interface__
    dtype = np.dtype(about["typestr"])
    if dtype.kind not in _DL_CODES or not dtype.isnative:
        raise TypeError(f"{name}: expected a plain number type of native byte order, got {about['typestr']}")
    shape = tuple(int(n) for n in about["shape"])
    given = about.get("strides")
    if given is not None and any(s % dtype.itemsize for s in given):
        raise ValueError(f"{name}: expected strides in whole elements, got {list(given)} bytes")
    strides = _c_strides(shape) if given is None else tuple(s // dtype.itemsize for s in given)
    address = int(about["data"][0] or 0)
    ordinal = _device_of_address(address) if address else 0
    return DeviceTensor(address, dtype.name, shape, strides, ordinal, about.get("stream"), x)


def as_device_tensor(x: Any, name: str, dtypes: tuple[str, ...], ndim: int, *, contiguous: bool = False,
                     alignment: int | None = None, stream: int | None = None) -> DeviceTensor:  # fmt: skip
    """Views `x` as an array on a GPU, of one of `dtypes` with `ndim` dimensions, without a copy.

    Parameters
    ----------
    contiguous
        Ask for C order throughout. Otherwise only the last dimension must be dense and no stride negative.
    alignment
        Bytes that the address must be a multiple of; default: an element.
    stream
        CUstream that the producer of a DLPack tensor is to make wait for it.

    Raises
    ------
    TypeError
        `x` is no array, not on a GPU, or of another dtype.
    ValueError
        Wrong number of dimensions, misaligned, or strides that the kernels cannot walk.
    """
    if isinstance(x, DeviceArray):
        tensor = DeviceTensor(x.address, x.dtype, x.shape, _c_strides(x.shape), x.device, x.stream, x)
    elif device_of(x) is None:
        what = "an array on the host" if hasattr(x, "__array__") or hasattr(x, "__dlpack__") else type(x).__name__
        raise TypeError(f"{name}: expected an array on the GPU as the other arguments, got {what}")
    elif hasattr(x, "__dlpack__"):
        tensor = _from_dlpack(x, name, stream)
    else:
        tensor = _from_interface(x, name)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}, got {tensor.dtype}")
    shape, strides = tensor.shape, tensor.strides
    if len(shape) != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got {len(shape)} (shape {list(shape)})")
    alignment = alignment or storage(tensor.dtype).itemsize
    if tensor.size and tensor.address % alignment:
        raise ValueError(f"{name}: expected an address that is a multiple of {alignment}, got {tensor.address:#x}")
    if tensor.contiguous:
        return tensor
    if contiguous:
        raise ValueError(f"{name}: expected C order, got strides {list(strides)} for shape {list(shape)}")
    if (shape[-1] > 1 and strides[-1] != 1) or any(s < 0 for s in strides):
        raise ValueError(f"{name}: expected a dense last dimension, got strides {list(strides)}")
    if ndim == 2 and shape[0] > 1 and strides[0] < shape[1]:
        raise ValueError(f"{name}: expected rows that do not overlap, got strides {list(strides)}")
    return tensor

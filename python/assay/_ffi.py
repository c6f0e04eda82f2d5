"""The only importer of the compiled module: arrays to pointers, statuses to exceptions.

Arrays come in without a copy: numpy arrays, any CPU tensor by DLPack (torch's included, bfloat16 too), and whatever
exports the buffer protocol. bfloat16, which numpy lacks, is carried as its uint16 bits with the dtype's name beside it.
"""

import ctypes
import operator
import os
import threading
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .errors import AssayError, UnsupportedError

try:
    from . import _assay
except ImportError as exc:  # the wheel of another platform, or a source tree that was never built
    raise UnsupportedError(f"assay's compiled module does not load here ({exc}); build it with: pip install .") from exc

ffi, lib = _assay.ffi, _assay.lib
#: Folder of the compiled module and of what was built with it.
PACKAGE = Path(_assay.__file__).parent


def open_calls(binary: str) -> ModuleType:
    """The module of the calls that do without cffi (csrc/python/calls.c), which lies in the same binary."""
    loader = ExtensionFileLoader("assay._calls", binary)
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None  # which is so for every loader of files
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


calls: Any = open_calls(_assay.__file__)

__all__ = [
    "PACKAGE",
    "Tensor",
    "aligned",
    "as_output",
    "as_tensor",
    "calls",
    "check",
    "ffi",
    "held_workspace",
    "lib",
    "open_calls",
    "refresh_isa",
    "thread_count",
    "variant_index",
    "workspace",
]

_DTYPE_NAMES = {np.dtype(t): np.dtype(t).name for t in "?bBhHiIlLqQefd"}

#: Names of assay.h's activation and logit types.
FLOAT_DTYPES = {"float32": lib.ASSAY_F32, "float16": lib.ASSAY_F16, "bfloat16": lib.ASSAY_BF16}
FLOAT_NAMES = tuple(FLOAT_DTYPES)


# ---- arrays ---------------------------------------------------------------------------------------------------


class Tensor:
    """A CPU array that somebody else owns.

    Attributes
    ----------
    array : numpy.ndarray
        View of the memory; bfloat16 as uint16.
    dtype : str
        "float32", "bfloat16", "int32", ...
    owner : object
        Keeps the memory alive.
    """

    __slots__ = ("array", "dtype", "owner")

    def __init__(self, array: np.ndarray, dtype: str, owner: object) -> None:
        self.array, self.dtype, self.owner = array, dtype, owner

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        size = self.array.itemsize
        return tuple(s // size for s in self.array.strides)

    @property
    def ptr(self) -> Any:
        """Address of the first element, as cffi's ``void *`` (or ``char[]``, which passes for one)."""
        if self.array.flags.c_contiguous and self.array.size:
            return ffi.from_buffer(self.array)  # half the time of asking numpy for the address
        return ffi.cast("void *", self.array.__array_interface__["data"][0])

    @property
    def row_stride(self) -> int:
        """Elements from row to row of a matrix; where there is no next row, any legal stride."""
        rows, cols = self.array.shape
        return self.array.strides[0] // self.array.itemsize if rows > 1 and cols else cols


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_DL_CPU = 1
_DL_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


def _from_dlpack(x: Any, name: str) -> Tensor:
    """A CPU tensor's memory by the DLPack protocol, whose capsule is kept and its deleter left to it.

    numpy's own reader is not used because it knows no bfloat16.
    """
    device = x.__dlpack_device__()
    if int(device[0]) != _DL_CPU:
        raise TypeError(f"{name}: expected a CPU tensor, got DLPack device {tuple(int(d) for d in device)}")
    capsule = x.__dlpack__()
    t = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    kind = _DL_KINDS.get(t.code)
    if kind is None or t.lanes != 1:
        raise TypeError(f"{name}: expected a plain number type, got DLPack type code {t.code}, {t.lanes} lanes")
    dtype = "bool" if kind == "bool" else f"{kind}{t.bits}"
    storage = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    shape = tuple(t.shape[i] for i in range(t.ndim))
    if 0 in shape:
        return Tensor(np.empty(shape, storage), dtype, capsule)
    if t.strides:
        strides = tuple(t.strides[i] * storage.itemsize for i in range(t.ndim))
    else:
        strides = np.empty(shape, np.dtype([])).strides if t.ndim == 0 else _c_strides(shape, storage.itemsize)
    extent = storage.itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * extent).from_address(t.data + t.byte_offset)
    return Tensor(np.ndarray(shape, storage, memory, 0, strides), dtype, capsule)


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def as_tensor(x: Any, name: str, dtypes: tuple[str, ...], ndim: int, *, contiguous: bool = False) -> Tensor:
    """Views `x` as an array of one of `dtypes` with `ndim` dimensions, without a copy.

    Parameters
    ----------
    contiguous
        Ask for C order throughout. Otherwise only the last dimension must be dense and no stride negative.

    Raises
    ------
    TypeError
        `x` is no array, not on the CPU, or of another dtype.
    ValueError
        Wrong number of dimensions, or strides that the kernels cannot walk.
    """
    if isinstance(x, np.ndarray):
        dtype = _DTYPE_NAMES.get(x.dtype) or x.dtype.name
        tensor = Tensor(x.view(np.uint16) if dtype == "bfloat16" else x, dtype, x)
    elif hasattr(x, "__dlpack__"):
        tensor = _from_dlpack(x, name)
    else:
        try:
            array = np.asarray(memoryview(x))
        except TypeError:
            raise TypeError(f"{name}: expected an array ({' or '.join(dtypes)}), got {type(x).__name__}") from None
        tensor = Tensor(array, array.dtype.name, x)
    array = tensor.array
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}, got {tensor.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got {array.ndim} (shape {list(array.shape)})")
    if not array.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got {array.dtype.str}")
    if array.flags.c_contiguous:
        return tensor
    if contiguous:
        raise ValueError(f"{name}: expected C order, got strides {list(tensor.strides)} for shape {list(array.shape)}")
    item = array.itemsize
    dense_last = array.shape[-1] == 1 or array.strides[-1] == item
    if not dense_last or any(s < 0 or s % item for s in array.strides):
        raise ValueError(f"{name}: expected a dense last dimension, got strides {list(tensor.strides)}")
    if ndim == 2 and array.shape[0] > 1 and array.strides[0] < array.shape[1] * item:
        raise ValueError(f"{name}: expected rows that do not overlap, got strides {list(tensor.strides)}")
    return tensor


def aligned(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of one whose elements lie across their natural boundaries."""
    return array if array.flags.aligned else array.copy()


def as_output(out: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """`out` as a writable tensor of exactly this dtype and shape, or a new one when it is None."""
    if out is None:
        array = np.empty(shape, dtype)
        return Tensor(array, dtype, array)
    tensor = as_tensor(out, name, (dtype,), len(shape))
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.array.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    return tensor


# ---- variants, threads, statuses --------------------------------------------------------------------------------


def _isa_names() -> tuple[str, ...]:
    names = []
    name, features = ffi.new("char **"), ffi.new("char **")
    supported, allowed = ffi.new("int *"), ffi.new("int *")
    for i in range(lib.assay_isa_count()):
        lib.assay_isa_info(i, name, features, supported, allowed)
        names.append(ffi.string(name[0]).decode())
    return tuple(names)


ISA_NAMES = _isa_names()
_ISA_INDEX = {name: i for i, name in enumerate(ISA_NAMES)}


def variant_index(isa: str | None) -> int:
    """The C API's number of a tier; -1 (the best allowed) for None. An unknown name is a ValueError."""
    if isa is None:
        return -1
    index = _ISA_INDEX.get(isa)
    if index is None:
        raise ValueError(f"isa: expected one of {', '.join(ISA_NAMES)}, got {isa!r}")
    return index


def refresh_isa() -> None:
    """Reads ASSAY_ISA again."""
    lib.assay_isa_refresh()


def thread_count(num_threads: int | None) -> int:
    """The C API's number of threads: 0 (its default) for None."""
    if num_threads is None:
        return 0
    if not 1 <= num_threads <= 256:
        raise ValueError(f"num_threads: expected 1..256 or None, got {num_threads}")
    return operator.index(num_threads)


def check(status: int, what: str, isa: str | None = None) -> None:
    """Raises for a status other than ASSAY_OK; `what` names the call."""
    if status == lib.ASSAY_OK:
        return
    if status == lib.ASSAY_EISA:
        cap = os.environ.get("ASSAY_ISA", "")
        wanted = f"isa={isa!r}" if isa else "a variant"
        limit = f" within ASSAY_ISA={cap!r}" if cap else ""
        raise UnsupportedError(f"{what}: {wanted} is not available on this CPU{limit}; `assay doctor` lists what is")
    if status == lib.ASSAY_EINVAL:
        raise ValueError(f"{what}: the kernel refused its arguments")
    raise AssayError(f"{what}: internal error, status {status}")


# ---- workspace ------------------------------------------------------------------------------------------------------

_local = threading.local()


def workspace(size: int) -> tuple[Any, int]:
    """This thread's scratch memory of at least `size` bytes (kept and reused): pointer and size."""
    held = held_workspace()
    if held is None or held.nbytes < size:
        held = _local.held = np.empty(max(size, 1 << 16), np.uint8)
    return ffi.from_buffer(held), held.nbytes


def held_workspace() -> np.ndarray | None:
    """What :func:`workspace` keeps for this thread; None before its first call."""
    return getattr(_local, "held", None)

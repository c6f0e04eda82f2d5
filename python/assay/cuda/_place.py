"""Where a call on device arrays runs: one GPU, one stream."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._ffi import ffi, lib
from ._arrays import DeviceArray, DeviceTensor, as_device_tensor, device_of
from ._device import current, handle_of, own_stream, pointer
from ._status import CudaError, check


class Place:
    """One call's device and stream, its arguments checked against them; made by :func:`place`.

    Attributes
    ----------
    device : int
    handle : int
        CUstream.
    stream : object
        The same as cffi's ``void *``.
    """

    def __init__(self, device: int, handle: int, keep: Any, capturing: bool, finish: bool) -> None:
        self.device, self.handle, self._keep = device, handle, keep
        self.stream = pointer(handle)
        self._capturing, self._finish = capturing, finish
        self._inputs: list[DeviceTensor] = []

    @property
    def capturing(self) -> bool:
        """Whether the stream records a graph: nothing can be allocated or copied from the host then."""
        return self._capturing

    def upload(self, array: Any) -> DeviceArray:
        """A host array's copy, made on this stream."""
        return DeviceArray(array.shape, array.dtype.name, self.device, self._keep).copy_from(array)

    def tensor(self, x: Any, name: str, dtypes: tuple[str, ...], ndim: int, *, contiguous: bool = False,
               alignment: int | None = None) -> DeviceTensor:  # fmt: skip
        """An argument on this device, ready when this stream comes to it; see :func:`as_device_tensor`."""
        found = as_device_tensor(x, name, dtypes, ndim, contiguous=contiguous, alignment=alignment,
                                 stream=None if self._capturing else self.handle)  # fmt: skip
        if found.size and found.device != self.device:
            raise ValueError(
                f"{name}: expected memory on cuda:{self.device} as the other arguments, got cuda:{found.device}"
            )
        if found.stream is not None and not self._capturing and _number(found.stream) != _number(self.handle):
            check(lib.assay_cuda_stream_wait(self.stream, pointer(found.stream)), name)
        self._inputs.append(found)
        return found

    def output(
        self, out: Any, name: str, dtype: str, shape: tuple[int, ...], *, alignment: int | None = None
    ) -> tuple[DeviceTensor, Any]:
        """`out` as a tensor of exactly this dtype and shape, apart from the inputs, and what to return for it; a new DeviceArray
        when it is None."""
        if out is None and self._capturing:
            raise ValueError(f"{name}: expected an array while a graph is captured, for nothing can be allocated then")
        if out is None:
            fresh = DeviceArray(shape, dtype, self.device, self._keep)
            return as_device_tensor(fresh, name, (dtype,), len(shape)), fresh
        others = list(self._inputs)
        tensor = self.tensor(out, name, (dtype,), len(shape), alignment=alignment)
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        begin, end = tensor.extent
        if any(begin < other.extent[1] and other.extent[0] < end for other in others):
            raise ValueError(f"{name}: expected memory of its own, got memory shared with another argument")
        if isinstance(out, DeviceArray):
            out.stream, out._keep = self.handle, self._keep
        return tensor, out

    def workspace(self, nbytes: int, tag: str = "", zeros: bool = False) -> Any:
        """Scratch memory of this stream, kept and reused: calls of one stream run in order.

        Parameters
        ----------
        tag
            Whose it is: memory of another tag is another.
        zeros
            Zeros when it is new; what the last call with this tag left in it afterwards.
        """
        if not nbytes:
            return ffi.NULL
        key = (self.device, self.handle, tag)
        with _lock:
            held = _workspaces.get(key)
            if held is None or held.nbytes < nbytes:
                if self._capturing:
                    raise CudaError(
                        "workspace: cannot be allocated while a graph is captured: make the call once before, on the same stream"
                    )
                # Freeing the old one waits for the device, so nothing uses it still.
                held = DeviceArray((max(nbytes, 1 << 20),), "uint8", self.device, self._keep)
                if zeros:
                    held.fill(0)
                _workspaces[key] = held
            if self._capturing:
                _captured[held.address] = held
        return pointer(held.address)


_lock = threading.Lock()
_workspaces: dict[tuple[int, int, str], DeviceArray] = {}
_captured: dict[int, DeviceArray] = {}  # graphs hold their addresses, so these are never freed


def forget_workspaces() -> None:
    """Frees the scratch memory of all streams; graphs that were captured with it can no longer be launched."""
    with _lock:
        _workspaces.clear()
        _captured.clear()


def _number(stream: int) -> int:
    return 0 if stream == 1 else stream  # both are the legacy stream


def _stream_of(arrays: tuple[Any, ...], device: int) -> tuple[int, Any, bool]:
    """The stream that arrays mean by themselves, what keeps it, and whether a caller could not know of it."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    for x in arrays:
        if torch is not None and isinstance(x, torch.Tensor) and x.is_cuda:
            stream = torch.cuda.current_stream(device)
            return int(stream.cuda_stream), stream, False
        if cupy is not None and isinstance(x, cupy.ndarray):
            stream = cupy.cuda.get_current_stream()
            return int(stream.ptr), stream, False
    for x in arrays:
        if isinstance(x, DeviceArray) and x.device == device:
            return x.stream, x._keep, False
    for x in arrays:
        if not hasattr(x, "__dlpack__") and hasattr(x, "__cuda_array_interface__"):
            stream = x.__cuda_array_interface__.get("stream")
            if stream is not None:
                return int(stream), int(stream), False
    own = own_stream(device)
    return own.handle, own, True


@contextmanager
def place(arrays: tuple[Any, ...], stream: Any = None, out: Any = None) -> Iterator[Place]:
    """The GPU that holds the first device array, current within; all others must be there.

    The stream: the one named, else the current stream of the library that an array is of (torch, CuPy), else a
    DeviceArray's, else the one that ``__cuda_array_interface__`` names, else the device's own. In this last case, and when
    `out` is somebody else's memory, the call waits until it is done, for nobody else could.
    """
    found = [device_of(x) for x in (*arrays, out)]
    device = next(d for d in found if d is not None)
    with current(device):
        if stream is None:
            handle, keep, unknown = _stream_of((*arrays, out), device)
        else:
            handle, keep, unknown = handle_of(stream, device), stream, False
        capturing = ffi.new("int *")
        check(lib.assay_cuda_stream_capturing(pointer(handle), capturing), "stream")
        here = Place(
            device, handle, keep, bool(capturing[0]), unknown and out is not None and not isinstance(out, DeviceArray)
        )
        yield here
        if here._finish:
            check(lib.assay_cuda_stream_sync(here.stream), "synchronize")

"""Devices, streams, events and graphs, thin over the launcher."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from .._ffi import ffi, lib
from . import _images
from ._status import check


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes
    ----------
    ordinal : int
        "cuda:ordinal".
    capability : (int, int)
        Compute capability.
    sms : int
        Multiprocessors.
    smem_optin, smem_per_sm, l2_bytes, memory_bytes : int
        Bytes of shared memory a block may use and a multiprocessor has, of L2, of memory.
    regs_per_sm, threads_per_sm, blocks_per_sm : int
    clock_hz, memory_clock_hz, memory_bus_bits : int
        As the driver states them.
    """

    ordinal: int
    name: str
    capability: tuple[int, int]
    sms: int
    smem_optin: int
    smem_per_sm: int
    regs_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    l2_bytes: int
    memory_bytes: int
    clock_hz: int
    memory_clock_hz: int
    memory_bus_bits: int
    ecc: bool
    uuid: str


def driver() -> tuple[tuple[int, int], str]:
    """CUDA version that the driver supports, and what was opened. UnsupportedError without a driver."""
    version, path = ffi.new("int *"), ffi.new("char **")
    check(lib.assay_cuda_driver(version, path), "cuda")
    return (version[0] // 1000, version[0] % 1000 // 10), ffi.string(path[0]).decode()


def device_count() -> int:
    """GPUs that this process sees. UnsupportedError without a driver or a GPU."""
    count = ffi.new("int *")
    check(lib.assay_cuda_device_count(count), "cuda")
    return int(count[0])


def device(ordinal: int = 0) -> Device:
    """What the driver tells of a GPU."""
    found = ffi.new("assay_cuda_device **")
    check(lib.assay_cuda_device_info(ordinal, found), f"cuda:{ordinal}")
    d = found[0]
    return Device(
        d.ordinal, ffi.string(d.name).decode(), (d.major, d.minor), d.sms, d.smem_optin, d.smem_per_sm, d.regs_per_sm,
        d.threads_per_sm, d.blocks_per_sm, d.l2_bytes, d.memory_bytes, 1000 * d.clock_khz, 1000 * d.memory_clock_khz,
        d.memory_bus_bits, bool(d.ecc), bytes(d.uuid).hex(),
    )  # fmt: skip


def code_for(gpu: Device) -> str | None:
    """Where this build's kernels for a GPU come from; None when from nowhere."""
    return _images.code_for(gpu.capability)


def is_available() -> bool:
    """Whether a driver and a GPU are here."""
    count = ffi.new("int *")
    return lib.assay_cuda_device_count(count) == lib.ASSAY_OK and count[0] > 0


@contextmanager
def current(ordinal: int) -> Iterator[None]:
    """Makes a context of this GPU current on this thread: the one that is, or else the primary one."""
    pushed = ffi.new("int *")
    check(lib.assay_cuda_push(ordinal, pushed), f"cuda:{ordinal}")
    try:
        yield
    except BaseException:
        lib.assay_cuda_pop(pushed[0])
        raise
    check(lib.assay_cuda_pop(pushed[0]), f"cuda:{ordinal}")


def memory_info(ordinal: int = 0) -> tuple[int, int]:
    """Free and total bytes of a GPU's memory."""
    free, total = ffi.new("size_t *"), ffi.new("size_t *")
    with current(ordinal):
        check(lib.assay_cuda_memory(free, total), f"cuda:{ordinal}")
    return int(free[0]), int(total[0])


def warmup(ordinal: int = 0, prefix: str = "") -> None:
    """Loads the kernels whose names begin with `prefix` on a GPU, so that no later call loads: needed before a call is
    captured into a graph for the first time."""
    with current(ordinal):
        check(lib.assay_cuda_warm(prefix.encode()), "warmup")


# ---- streams ----------------------------------------------------------------------------------------------------


class Stream:
    """A stream of its own, which does not wait for the legacy stream.

    Attributes
    ----------
    handle : int
        CUstream; also by the ``__cuda_stream__`` protocol.
    device : int
    """

    def __init__(self, device: int = 0) -> None:
        made = ffi.new("void **")
        with current(device):
            check(lib.assay_cuda_stream_create(made), "Stream")
        self.handle, self.device = int(ffi.cast("uintptr_t", made[0])), device

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", 0), 0
        if handle and not sys.is_finalizing():
            lib.assay_cuda_stream_destroy(pointer(handle))

    def synchronize(self) -> None:
        """Waits for all that the stream holds; raises what its kernels did wrong."""
        synchronize(self.device, self)

    @contextmanager
    def capture(self) -> Iterator["Graph"]:
        """Records the calls made on this stream instead of running them; afterwards the graph can be launched."""
        graph = Graph(self.device)
        with current(self.device):
            check(lib.assay_cuda_capture_begin(pointer(self.handle)), "capture")
            made = ffi.new("void **")
            try:
                yield graph
            except BaseException:
                lib.assay_cuda_capture_end(pointer(self.handle), made)
                if made[0]:
                    lib.assay_cuda_graph_destroy(made[0])
                raise
            check(lib.assay_cuda_capture_end(pointer(self.handle), made), "capture")
            graph.handle = int(ffi.cast("uintptr_t", made[0]))


class Graph:
    """Captured calls; see :meth:`Stream.capture`. The arrays that it uses must outlive it."""

    def __init__(self, device: int) -> None:
        self.handle, self.device = 0, device

    def launch(self, stream: Any = None) -> None:
        """Runs the captured calls on a stream (default: the device's own)."""
        if not self.handle:
            raise ValueError("Graph: expected a finished capture, got one that failed or is not over")
        with current(self.device):
            check(
                lib.assay_cuda_graph_launch(pointer(self.handle), pointer(handle_of(stream, self.device))),
                "Graph.launch",
            )

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", 0), 0
        if handle and not sys.is_finalizing():
            lib.assay_cuda_graph_destroy(pointer(handle))


class Event:
    """A point in a stream."""

    def __init__(self, device: int = 0) -> None:
        made = ffi.new("void **")
        with current(device):
            check(lib.assay_cuda_event_create(made), "Event")
        self.handle, self.device = int(ffi.cast("uintptr_t", made[0])), device

    def record(self, stream: Any = None) -> Self:
        with current(self.device):
            check(
                lib.assay_cuda_event_record(pointer(self.handle), pointer(handle_of(stream, self.device))),
                "Event.record",
            )
        return self

    def synchronize(self) -> None:
        with current(self.device):
            check(lib.assay_cuda_event_sync(pointer(self.handle)), "Event.synchronize")

    def seconds_since(self, earlier: "Event") -> float:
        """Both must have happened."""
        found = ffi.new("double *")
        with current(self.device):
            check(
                lib.assay_cuda_event_elapsed(pointer(earlier.handle), pointer(self.handle), found),
                "Event.seconds_since",
            )
        return float(found[0])

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", 0), 0
        if handle and not sys.is_finalizing():
            lib.assay_cuda_event_destroy(pointer(handle))


_own: dict[int, Stream] = {}


def own_stream(ordinal: int) -> Stream:
    """The stream of a device that work runs on when nobody names one."""
    found = _own.get(ordinal)
    if found is None:
        found = _own.setdefault(ordinal, Stream(ordinal))
    return found


def pointer(address: int) -> Any:
    """An address or handle as cffi's ``void *``."""
    return ffi.cast("void *", address)


def handle_of(stream: Any, ordinal: int) -> int:
    """The CUstream that `stream` means: an int, anything with ``__cuda_stream__``, a stream of torch, CuPy or Numba;
    None is the device's own stream."""
    if stream is None:
        return own_stream(ordinal).handle
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        value = getattr(stream, attribute, None)
        if value is not None:
            return int(getattr(value, "value", value) or 0)
    raise TypeError(f"stream: expected a CUDA stream or its address, got {type(stream).__name__}")


def synchronize(ordinal: int = 0, stream: Any = None) -> None:
    """Waits for a stream of a device, by default its own one."""
    with current(ordinal):
        check(lib.assay_cuda_stream_sync(pointer(handle_of(stream, ordinal))), "synchronize")


def refresh() -> None:
    """Forgets the driver, what was loaded and the streams (tests)."""
    _own.clear()
    lib.assay_cuda_refresh()

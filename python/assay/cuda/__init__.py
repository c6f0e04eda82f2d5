"""assay on NVIDIA GPUs: devices, streams, graphs, and arrays for those who use no other library.

The ops are the same as on the CPU (``assay.w4a16_gemm``, ...): the arrays' device chooses. Nothing of CUDA is loaded by
importing this; the driver is opened by the first call that needs it.
"""

from ._arrays import DeviceArray, device_of, empty, to_device
from ._device import (
    Device,
    Event,
    Graph,
    Stream,
    code_for,
    current,
    device,
    device_count,
    driver,
    is_available,
    memory_info,
    own_stream,
    refresh,
    synchronize,
    warmup,
)
from ._place import forget_workspaces
from ._status import CudaError, DeviceMemoryError

__all__ = [
    "CudaError",
    "Device",
    "DeviceArray",
    "DeviceMemoryError",
    "Event",
    "Graph",
    "Stream",
    "code_for",
    "current",
    "device",
    "device_count",
    "device_of",
    "driver",
    "empty",
    "forget_workspaces",
    "is_available",
    "memory_info",
    "own_stream",
    "refresh",
    "synchronize",
    "to_device",
    "warmup",
]

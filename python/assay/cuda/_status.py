"""The launcher's statuses as exceptions."""

from .._ffi import ffi, lib
from ..errors import AssayError, UnsupportedError


class CudaError(AssayError, RuntimeError):
    """The driver refused a call, or a kernel failed before; the process and its CPU ops go on."""


class DeviceMemoryError(CudaError, MemoryError):
    """The GPU's memory is full."""


_UNSUPPORTED = {
    lib.ASSAY_CUDA_ENODRIVER, lib.ASSAY_CUDA_EDRIVER, lib.ASSAY_CUDA_ENODEVICE, lib.ASSAY_CUDA_EARCH,
    lib.ASSAY_CUDA_EIMAGE,
}  # fmt: skip


def message() -> str:
    """What this thread's last CUDA call that failed had to say."""
    return str(ffi.string(lib.assay_cuda_message()).decode(errors="replace"))


def check(status: int, what: str) -> None:
    """Raises for a status other than ASSAY_OK; `what` names the call."""
    if status == lib.ASSAY_OK:
        return
    if status in _UNSUPPORTED:
        raise UnsupportedError(f"{what}: {message()}")
    if status == lib.ASSAY_CUDA_ENOMEM:
        raise DeviceMemoryError(f"{what}: {message()}")
    if status == lib.ASSAY_EINVAL:
        raise ValueError(f"{what}: the kernel refused its arguments")
    if status == lib.ASSAY_EWORKSPACE:
        raise AssayError(f"{what}: internal error, the workspace is too small")
    raise CudaError(f"{what}: {message()}")

"""A GPU that is none: the mock driver (csrc/cuda/emu), built once, and what a test may do to it."""

import ctypes
import functools
import os
from pathlib import Path

import emulator

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
_LAUNCH = (ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_void_p, ctypes.c_size_t)
EXECUTES = ctypes.CFUNCTYPE(ctypes.c_int, *_LAUNCH)
LAW = ctypes.CFUNCTYPE(ctypes.c_double, *_LAUNCH)


@functools.cache
def library() -> Path:
    """The mock libcuda."""
    emu = emulator.CUDA / "emu"
    units = [emu / f"mock_{name}.cpp" for name in ("libcuda", "streams", "machine")]
    parts = [emu / "mock.h", emu / "mock_calls.h", emu / "emu.h", *units]
    inputs = [str(unit) for unit in units]
    flags = (*emulator.FLAGS, "-shared", f"-I{emu}", "-ldl", "-pthread")
    return emulator.compile_cached(inputs, "", flags, ".so", emulator.CUDA, emulator.content(parts))


class Mock:
    """Controls of the mock driver; what it plays is set by name (mock_machine.cpp lists the names)."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(str(library()))
        self._lib.mock_get.restype = ctypes.c_double
        self._lib.mock_calls.restype = ctypes.c_uint64
        self._lib.mock_last_error.restype = ctypes.c_char_p
        self._paths: dict[str, ctypes.Array] = {}
        self._find = CALLBACK(self._library_of)
        self._lib.mock_find_kernel(self._find)

    def _library_of(self, kernel: bytes) -> int | None:
        name = kernel.decode()
        if name not in emulator.kernels():
            return None
        if name not in self._paths:
            path = str(emulator.library(emulator.kernels()[name].file)).encode()
            self._paths[name] = ctypes.create_string_buffer(path)
        return ctypes.addressof(self._paths[name])

    def reset(self) -> None:
        self._lib.mock_reset()

    def set(self, **settings: float) -> None:
        """Numbers of the machine: set(devices=1, major=9), or for one device set(**{"memory:1": 1 << 20})."""
        for name, value in settings.items():
            self._lib.mock_set(name.encode(), ctypes.c_double(value))

    def get(self, name: str) -> float:
        return float(self._lib.mock_get(name.encode()))

    def law(self, executes, seconds) -> None:
        """Times kernels by a law of the test's instead of by what they did.

        Both are called with a launch's name, grid (x, y, z) and argument (bytes): `executes` says whether it is emulated at all,
        `seconds` how long it takes, launch or graph node apart.
        """

        def of(function):
            return lambda name, grid, args, size: function(name.decode(), tuple(grid[:3]), ctypes.string_at(args, size))

        self._law = EXECUTES(of(executes)), LAW(of(seconds))
        self._lib.mock_law(*self._law)

    def fail(self, call: str, result: int, passes: int = 0) -> None:
        """The call answers `result`, once, after `passes` calls more."""
        self._lib.mock_fail(call.encode(), result, passes)

    def calls(self, call: str) -> int:
        """How often the driver was asked this."""
        return int(self._lib.mock_calls(call.encode()))

    @property
    def last_error(self) -> str:
        """Why the emulator stopped a kernel, or had none."""
        return self._lib.mock_last_error().decode()

    def counters(self) -> emulator.Counters:
        """What the last kernel did."""
        found = emulator.Counters()
        self._lib.mock_counters(ctypes.byref(found))
        return found

    def create_context(self, device: int = 0) -> int:
        """A context of its own, current on this thread."""
        made = ctypes.c_void_p()
        assert self._lib.cuCtxCreate_v2(ctypes.byref(made), 0, device) == 0
        return made.value

    def destroy_context(self, context: int) -> None:
        assert self._lib.cuCtxDestroy_v2(ctypes.c_void_p(context)) == 0

    def set_context(self, context: int | None) -> None:
        assert self._lib.cuCtxSetCurrent(ctypes.c_void_p(context)) == 0


def real() -> bool:
    """Whether the tests are to run on a real driver."""
    return os.environ.get("ASSAY_CUDA_REAL") == "1"

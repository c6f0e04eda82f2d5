"""Where compiled kernels come from: the wheel, the user's cache, or NVRTC if it is installed.

The launcher asks once for each unit (a file of kernels) and device. A GPU of a wheel's target takes the wheel's code; any
other is compiled for if NVRTC is there, and otherwise given the wheel's PTX, which the driver compiles.
"""

import threading
from pathlib import Path
from typing import Any

from .._ffi import PACKAGE, ffi, lib
from .compile import (
    PTX,
    TARGETS,
    WHEEL,
    CompileError,
    Compiler,
    CompilerMissingError,
    Image,
    compile_cached,
    find_nvrtc,
    read_image,
    targets_of,
)

#: Compiled units of this build, if it was made with NVRTC at hand.
IMAGES = PACKAGE / "cuda" / "images"
_held = threading.local()


def sources() -> Path:
    """csrc: beside the package as installed, or of a source tree."""
    tree = Path(__file__).resolve().parents[3] / "csrc"
    return tree if (tree / "cuda" / "kernels.def").exists() else PACKAGE / "cuda" / "csrc"


def best_target(major: int, minor: int) -> str | None:
    """The target of a wheel that runs on this compute capability; None when there is none."""
    has = 10 * major + minor
    if f"sm_{has}a" in TARGETS:
        return f"sm_{has}a"
    plain = [int(target[3:]) for target in TARGETS if not target.endswith("a")]
    # Code runs on later minor versions, but not from desktop to Jetson (8.7).
    fitting = [t for t in plain if t // 10 == has // 10 and t <= has and has != 87]
    return f"sm_{max(fitting)}" if fitting else None


def code_for(capability: tuple[int, int]) -> str | None:
    """Where this build's kernels for a compute capability come from; None when from nowhere."""
    target = best_target(*capability)
    if target and any(IMAGES.glob(f"*.{target}.xz")):
        return f"compiled for {target}"
    if find_nvrtc() is not None:
        return "compiled at first use, by NVRTC"
    return f"{PTX}, compiled by the driver" if any(IMAGES.glob(f"*.{PTX}.xz")) else None


def find(unit: str, major: int, minor: int) -> Image:
    """The compiled unit for a compute capability. Raises CompilerMissingError or CompileError."""
    target = best_target(major, minor)
    if target is not None:
        image = read_image(IMAGES, f"{unit}.{target}")
        if image is not None:
            return image
    try:
        return compile_cached(sources(), unit, target or f"sm_{10 * major + minor}", Compiler())
    except (CompilerMissingError, CompileError) as exc:
        image = read_image(IMAGES, f"{unit}.{PTX}") if PTX in targets_of(unit) else None
        if image is not None:
            return image
        if isinstance(exc, CompileError):
            raise
        raise CompilerMissingError(
            f"this build carries no code for compute capability {major}.{minor} and cannot make it: pip install '{WHEEL}', "
            "or a wheel built by ASSAY_CUDA=1 pip wheel ."
        ) from exc


def _failed(exc: BaseException, kind: Any, trace: Any) -> int:  # of a defect here: cffi has printed it
    return int(lib.ASSAY_CUDA_EIMAGE)


@ffi.def_extern(name="assay_python_cuda_source", onerror=_failed)
def _source(unit: Any, device: Any, image: Any, size: Any) -> int:
    try:
        found = find(ffi.string(unit).decode(), device.major, device.minor)
    except (CompilerMissingError, CompileError) as exc:
        _held.text = ffi.new("char[]", str(exc).encode())
        image[0] = _held.text
        return int(lib.ASSAY_CUDA_EIMAGE)
    _held.code = found.code
    image[0] = ffi.from_buffer(found.code)
    size[0] = len(found.code)
    return int(lib.ASSAY_OK)


lib.assay_cuda_set_source(lib.assay_python_cuda_source)

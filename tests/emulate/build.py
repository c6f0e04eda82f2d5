"""The whole C library with its AVX-VNNI, AVX-512, AVX-512 BF16 and AMX tiers emulated, so that any x86 CPU with AVX2 can test their kernels.

``load(folder)`` compiles csrc/ with this folder's immintrin.h first on the include path (AVX-512 intrinsics by SIMDe,
AMX's by amx.h) and opens the result with cffi. In it, cpuid reports all x86 tiers where AVX2 is there.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
#: As CMakeLists.txt has them, but -O0: GCC spends minutes on the emulation otherwise.
COMMON = ["-std=c11", "-O0", "-ffp-contract=off", "-fPIC", "-Wno-psabi", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
SHIM = f"-I{HERE}"
PYTHON = ["-DPy_LIMITED_API=0x030b0000", f"-I{CSRC}", f"-I{sysconfig.get_path('include')}", f"-I{numpy.get_include()}"]


def tiers(emulate_avx512: bool) -> dict[str, list[str]]:
    """Each tier's flags. Where the CPU has AVX-512, only what it lacks need be emulated: AMX's tiles, BF16."""
    wide = [*AVX2, SHIM] if emulate_avx512 else AVX512
    bf16 = [*wide, SHIM] if emulate_avx512 or not cpu_has("avx512_bf16") else [*wide, "-mavx512bf16"]
    return {
        "scalar": [],
        "avx2": AVX2,
        "avxvnni": [*AVX2, SHIM],
        "avx512vnni": wide,
        "avx512bf16": bf16,
        "amx": [*wide, SHIM],
    }


class UnavailableError(Exception):
    """Why the emulation cannot be built here."""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def compiler() -> str:
    """The C compiler, or why there is no emulation on this machine."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        raise UnavailableError(f"the emulation of AVX-512 runs on x86-64 only, this is {platform.machine()}")
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not {"avx2", "fma", "f16c"} <= set(cpuinfo.read_text().split()):
        raise UnavailableError("the emulation of AVX-512 needs a CPU with AVX2, FMA and F16C (by /proc/cpuinfo)")
    cc = shutil.which("gcc") or shutil.which("cc")
    if cc is None:
        raise UnavailableError("no C compiler found")
    probe = subprocess.run([cc, *AVX2, "-E", "-x", "c", "-"], input="#include <simde/x86/avx512.h>\n",
                           capture_output=True, text=True, check=False)  # fmt: skip
    if probe.returncode:
        raise UnavailableError("SIMDe's headers are not installed (Debian: libsimde-dev)")
    return cc


def cpu_has(*flags: str) -> bool:
    """Whether /proc/cpuinfo names all these features."""
    return set(flags) <= set(Path("/proc/cpuinfo").read_text().split())


def has_avx512() -> bool:
    """Whether this CPU runs the AVX-512 tier itself."""
    return cpu_has("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")


def build(folder: Path) -> Path:
    """Compiles every kernel file of x86 tiers into folder/libassay_emulated.so.

    AVX-512 is emulated where the CPU lacks it or ASSAY_EMULATE is set, AVX-VNNI and AMX always.
    """
    cc = compiler()
    flags_of = tiers(not has_avx512() or "ASSAY_EMULATE" in os.environ)
    variants = re.findall(r"^VARIANT\((\w+), (\w+)\)", (CSRC / "variants.inc").read_text(), re.M)
    sources = [(path, []) for path in sorted(CSRC.glob("*.c"))]
    sources += [(path, PYTHON) for path in sorted((CSRC / "python").glob("*.c"))]
    sources += [(CSRC / "cpu" / op / f"{isa}.c", flags_of[isa]) for op, isa in variants if isa in flags_of]
    defines = ["-DASSAY_EMULATED_X86", *(f"-DASSAY_COMPILED_{isa}=1" for isa in flags_of)]

    def compile_one(source: tuple[Path, list[str]]) -> str:
        path, flags = source
        target = folder / f"{'_'.join(path.relative_to(CSRC).with_suffix('').parts)}.o"
        done = _run([cc, *COMMON, *defines, *flags, "-c", str(path), "-o", str(target)])
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libassay_emulated.so"
    done = _run([cc, "-shared", "-pthread", "-Wl,-Bsymbolic", "-o", str(library), *objects, "-lm"])
    assert done.returncode == 0, done.stderr
    return library


def load(folder: Path) -> tuple[Any, Any, Any]:
    """``(ffi, lib, calls)`` of the emulated library: with the declarations of assay.h, and its module of calls.

    Raises
    ------
    UnavailableError
        No compiler, no SIMDe, or a CPU that cannot run it.
    """
    from cffi import FFI

    from assay._ffi import open_calls

    header = (CSRC / "assay.h").read_text()
    found = re.search(r"/\* cdef begin \*/(.*)/\* cdef end \*/", header, re.S)
    assert found, "assay.h: no text between 'cdef begin' and 'cdef end'"
    ffi = FFI()
    ffi.cdef(found.group(1))
    library = str(build(folder))
    return ffi, ffi.dlopen(library), open_calls(library)

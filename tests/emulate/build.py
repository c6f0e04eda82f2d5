"""The whole C library with its AVX-VNNI, AVX-512 and AMX tiers emulated, so that any x86 CPU with AVX2 can test their kernels.

``load(folder)`` compiles csrc/ with this folder's immintrin.h first on the include path (AVX-512 intrinsics by SIMDe,
AMX's by amx.h) and opens the result with cffi. In it, cpuid reports all x86 tiers where AVX2 is there.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
#: As CMakeLists.txt has them, but for the emulated tier. -O0: GCC spends minutes on the emulation otherwise.
COMMON = ["-std=c11", "-O0", "-ffp-contract=off", "-fPIC", "-Wno-psabi", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
EMULATED = [*AVX2, f"-I{HERE}"]
TIERS = {"scalar": [], "avx2": AVX2, "avxvnni": EMULATED, "avx512vnni": EMULATED, "amx": EMULATED}


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


def build(folder: Path) -> Path:
    """Compiles every kernel file of x86 tiers into folder/libassay_emulated.so."""
    cc = compiler()
    variants = re.findall(r"^VARIANT\((\w+), (\w+)\)", (CSRC / "variants.inc").read_text(), re.M)
    sources = [(path, []) for path in sorted(CSRC.glob("*.c"))]
    sources += [(CSRC / "cpu" / op / f"{isa}.c", TIERS[isa]) for op, isa in variants if isa in TIERS]
    defines = ["-DASSAY_EMULATED_X86", *(f"-DASSAY_COMPILED_{isa}=1" for isa in TIERS)]

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


def load(folder: Path) -> tuple[Any, Any]:
    """``(ffi, lib)`` of the emulated library, with the declarations of assay.h.

    Raises
    ------
    UnavailableError
        No compiler, no SIMDe, or a CPU that cannot run it.
    """
    from cffi import FFI

    header = (CSRC / "assay.h").read_text()
    found = re.search(r"/\* cdef begin \*/(.*)/\* cdef end \*/", header, re.S)
    assert found, "assay.h: no text between 'cdef begin' and 'cdef end'"
    ffi = FFI()
    ffi.cdef(found.group(1))
    return ffi, ffi.dlopen(str(build(folder)))

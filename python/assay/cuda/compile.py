"""Kernels compiled by NVRTC, NVIDIA's compiler as a library, called through ctypes.

Used when a wheel is built (csrc/cuda/build_cubins.py, which loads this file by its path: standard library only), and at
run time for a GPU that the wheel has no code for. NVRTC comes from ``pip install nvidia-cuda-nvrtc-cu12==12.9.*``: 12.9
makes code for compute capabilities 8.0 to 12.x that drivers for CUDA 12 and 13 both take; neither a GPU nor a driver nor a
toolkit is needed to compile.
"""

import ctypes
import fcntl
import hashlib
import json
import lzma
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: What a wheel carries. An "a" target runs on that compute capability alone, others on it and later minor ones.
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
#: For GPUs younger than the targets: intermediate code that the driver compiles.
PTX = "compute_80"
OPTIONS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space", "--ptxas-options=-v")
#: Standard headers that the sources ask for and NVRTC lacks; ptx.cuh declares what they would.
EMPTY_HEADERS = ("stddef.h", "stdint.h", "math.h", "string.h")
WHEEL = "nvidia-cuda-nvrtc-cu12==12.9.*"


class CompileError(Exception):
    """NVRTC refused; the text is its log."""


class CompilerMissingError(Exception):
    """No NVRTC library is here."""


@dataclass(frozen=True)
class Kernel:
    """A line of kernels.def."""

    name: str
    unit: str
    instance: str
    args_struct: str
    threads: str
    smem_bytes: str
    min_blocks: str


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel: registers a thread; bytes of stack, spills, static shared memory, parameters."""

    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    smem_bytes: int = 0
    barriers: int = 0


@dataclass(frozen=True)
class Image:
    """A compiled unit.

    Attributes
    ----------
    code : bytes
        A cubin; or PTX with its final 0.
    usage : dict
        By kernel; empty for PTX.
    compiler : str
        "NVRTC 12.9".
    """

    unit: str
    target: str
    code: bytes
    compiler: str
    usage: dict[str, Usage] = field(default_factory=dict)


# ---- sources ----------------------------------------------------------------------------------------------------


def read_kernels(root: Path) -> list[Kernel]:
    """The lines of csrc/cuda/kernels.def; root is csrc."""
    lines = (root / "cuda" / "kernels.def").read_text().splitlines()
    found = [re.match(r"KERNEL\((.*)\)\s*$", line) for line in lines]
    return [Kernel(*(part.strip() for part in match[1].split(","))) for match in found if match]


def units(root: Path) -> list[str]:
    """Files of kernels, those of many first: they take longest to compile."""
    return [unit for unit, _ in Counter(kernel.unit for kernel in read_kernels(root)).most_common()]


def targets_of(unit: str) -> tuple[str, ...]:
    """What a unit is compiled for: all targets and PTX, or, for a name that ends in _sm90a, that one alone."""
    only = re.search(r"_(sm)(\d+a)$", unit)
    return (f"sm_{only[2]}",) if only else (*TARGETS, PTX)


def translation_unit(root: Path, unit: str) -> str:
    """The source of a unit: its header, and an exported kernel for each of its lines."""
    kernels = "".join(
        f"ASSAY_KERNEL({k.name}, {k.args_struct}, {k.threads}, {k.min_blocks}) {{ assay::{k.instance}(args); }}\n"
        for k in read_kernels(root) if k.unit == unit
    )  # fmt: skip
    return f'#include "ptx.cuh"\n#include "{unit}.cuh"\n{kernels}'


def _included(path: Path, seen: dict[Path, str]) -> None:
    path = path.resolve()
    if path in seen or not path.exists():
        return
    seen[path] = path.read_text()
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[path], re.M):
        _included(path.parent / name, seen)


def content_key(root: Path, unit: str, target: str, version: str) -> str:
    """A hash of all that a compiled unit depends on."""
    files: dict[Path, str] = {}
    _included(root / "cuda" / f"{unit}.cuh", files)
    digest = hashlib.sha256(repr((unit, target, version, OPTIONS, EMPTY_HEADERS)).encode())
    digest.update(translation_unit(root, unit).encode())
    for path in sorted(files):
        digest.update(repr((path.name, files[path])).encode())
    return digest.hexdigest()[:32]


# ---- the compiler -----------------------------------------------------------------------------------------------


def find_nvrtc() -> Path | None:
    """The library of NVIDIA's wheel for CUDA 12, where Python finds packages; None without it."""
    for folder in sys.path:
        for path in sorted(Path(folder or ".").glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")):
            return path
    return None


class Compiler:
    """NVRTC. Raises CompilerMissingError when `library` (default: the wheel's) does not load."""

    def __init__(self, library: Path | None = None) -> None:
        path = library or find_nvrtc()
        if path is None:
            raise CompilerMissingError(f"NVRTC is not installed: pip install '{WHEEL}'")
        try:
            self._lib = ctypes.CDLL(str(path))
        except OSError as exc:
            raise CompilerMissingError(f"{path} does not load: {exc}") from exc
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        #: (12, 9)
        self.version = (major.value, minor.value)
        self.name = f"NVRTC {major.value}.{minor.value}"

    def _check(self, status: int) -> None:
        if status:
            raise CompileError(f"NVRTC: {self._lib.nvrtcGetErrorString(status).decode()}")

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def compile(self, root: Path, unit: str, target: str) -> Image:
        """Compiles a unit for "sm_80", ... or "compute_80" (PTX). Raises CompileError with the compiler's log."""
        program = ctypes.c_void_p()
        empty = (ctypes.c_char_p * len(EMPTY_HEADERS))(*(b"\n" for _ in EMPTY_HEADERS))
        names = (ctypes.c_char_p * len(EMPTY_HEADERS))(*(name.encode() for name in EMPTY_HEADERS))
        self._check(
            self._lib.nvrtcCreateProgram(ctypes.byref(program), translation_unit(root, unit).encode(),
                                         f"{unit}.cu".encode(), len(EMPTY_HEADERS), empty, names)
        )  # fmt: skip
        try:
            texts = [f"--gpu-architecture={target}", f"--include-path={root / 'cuda'}", *OPTIONS]
            options = (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
            status = self._lib.nvrtcCompileProgram(program, len(texts), options)
            log = self._text(program, "ProgramLog").decode(errors="replace").rstrip("\0")
            if status:
                raise CompileError(f"{unit} for {target}:\n{log}")
            if target.startswith("compute"):
                return Image(unit, target, self._text(program, "PTX"), self.name)
            return Image(unit, target, self._text(program, "CUBIN"), self.name, parse_usage(log))
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))


def parse_usage(log: str) -> dict[str, Usage]:
    """ptxas's report (-v) by kernel."""
    found: dict[str, Usage] = {}
    for entry in re.split(r"(?=ptxas info\s*: Compiling entry function)", log):
        name = re.search(r"Compiling entry function '(\w+)'", entry)
        if name is None:
            continue

        def number(pattern: str, text: str = entry) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        if not re.search(r"Used \d+ registers", entry):
            raise CompileError(f"ptxas reports no registers of {name[1]}:\n{entry}")
        found[name[1]] = Usage(
            number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"), number(r"(\d+) bytes smem"), number(r"used (\d+) barriers"),
        )  # fmt: skip
    return found


# ---- the cache --------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """ASSAY_CACHE, else assay's folder in the user's cache."""
    asked = os.environ.get("ASSAY_CACHE")
    base = Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay"
    return base / "cuda"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, by a crash too
        yield


def write_image(folder: Path, stem: str, image: Image) -> None:
    """Two files, whole at any moment: the code compressed, and what is known of it with its hash."""
    packed = lzma.compress(image.code)
    about = asdict(image)
    about["code"] = hashlib.sha256(packed).hexdigest()
    for suffix, data in ((".xz.json", json.dumps(about, indent=1).encode()), (".xz", packed)):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        Path(file.name).replace(folder / f"{stem}{suffix}")


def read_image(folder: Path, stem: str) -> Image | None:
    """What write_image wrote; None when it is not there or damaged."""
    try:
        packed = (folder / f"{stem}.xz").read_bytes()
        about: dict[str, Any] = json.loads((folder / f"{stem}.xz.json").read_text())
        if about.pop("code") != hashlib.sha256(packed).hexdigest():
            return None
        usage = {name: Usage(**numbers) for name, numbers in about.pop("usage").items()}
        return Image(code=lzma.decompress(packed), usage=usage, **about)
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError):
        return None


def compile_cached(root: Path, unit: str, target: str, compiler: Compiler, folder: Path | None = None) -> Image:
    """Compiles, or takes what an earlier process compiled of the same content; one process compiles, others wait."""
    folder = folder or cache_folder()
    stem = f"{unit}.{target}.{content_key(root, unit, target, compiler.name)}"
    found = read_image(folder, stem)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{unit}.{target}.lock"):
            found = read_image(folder, stem)
            if found is None:
                found = compiler.compile(root, unit, target)
                write_image(folder, stem, found)
            return found
    except OSError:  # nowhere to write: compile for this process alone
        return compiler.compile(root, unit, target)

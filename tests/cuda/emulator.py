"""Kernels on the CPU: builds a .cuh file with the emulator (csrc/cuda/emu) by g++ and launches its kernels on numpy arrays."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cffi import FFI

# ASSAY_EMULATOR_ROOT: another tree's csrc/cuda (mutants.py). ASSAY_EMULATOR_KERNELS: a regular expression; only kernels with a
# match in their name are built, so that a build with a sanitizer takes less.
CUDA = Path(os.environ.get("ASSAY_EMULATOR_ROOT", Path(__file__).resolve().parents[2] / "csrc" / "cuda"))
COMPILER = os.environ.get("CXX", "g++")
# ASSAY_EMULATOR_FLAGS: more flags, for builds with a sanitizer (test_sanitized.py).
FLAGS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    *os.environ.get("ASSAY_EMULATOR_FLAGS", "").split(),
)
RUNTIME = ("emu", "fiber", "meet", "memory", "hopper")  # files of csrc/cuda/emu that every build holds
COPY = {"late": 0, "early": 1, "random": 2}

KERNEL_LINE = re.compile(r"^KERNEL\((.*)\)\s*$")


@dataclass(frozen=True)
class Kernel:
    """A line of kernels.def."""

    name: str
    file: str
    instance: str
    args_struct: str
    threads: int
    smem_bytes: int
    min_blocks: int


@functools.cache
def kernels(root: Path = CUDA) -> dict[str, Kernel]:
    """The table of csrc/cuda/kernels.def by name."""
    found = {}
    wanted = re.compile(os.environ.get("ASSAY_EMULATOR_KERNELS", ""))
    for line in (root / "kernels.def").read_text().splitlines():
        if match := KERNEL_LINE.match(line):
            name, file, instance, args, *numbers = (field.strip() for field in match[1].split(","))
            if wanted.search(name):
                found[name] = Kernel(name, file, instance, args, *(int(n) for n in numbers))
    return found


@functools.cache
def structs(root: Path = CUDA) -> FFI:
    """The argument structs of assay.h and assay_cuda.h."""
    ffi = FFI()
    for header in (root.parent / "assay.h", root / "assay_cuda.h"):
        for part in re.findall(r"/\* cdef begin \*/(.*?)/\* cdef end \*/", header.read_text(), re.S):
            ffi.cdef(part)
    return ffi


def unit(file: str, root: Path = CUDA) -> str:
    """The translation unit that makes file.cuh's kernels known to the emulator."""
    return unit_of(f'#include "{file}.cuh"\n', [k for k in kernels(root).values() if k.file == file])


def unit_of(text: str, mine: list[Kernel]) -> str:
    """The same of kernels that `text` defines."""
    runs = "\n".join(
        f"static void run_{k.name}(const void *args) {{ assay::{k.instance}(*static_cast<const {k.args_struct} *>(args)); }}"
        for k in mine
    )
    rows = "\n".join(
        f'    {{"{k.name}", run_{k.name}, sizeof({k.args_struct}), {k.threads}, {k.smem_bytes}, {k.min_blocks}}},'
        for k in mine
    )
    return (
        f"{text}{runs}\nstatic const assay::emu::Kernel table[] = {{\n{rows}\n}};\n"
        f"static const assay::emu::Registration registration(table, {len(mine)});\n"
    )


def cache() -> Path:
    """Where built libraries live: content-addressed, so that stale ones are never found."""
    path = Path(tempfile.gettempdir()) / f"assay-emulator-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def sources(root: Path) -> list[Path]:
    shared = [p for folder in (root.parent, root.parent / "cpu") for p in folder.glob("*.h")]
    return sorted([*root.rglob("*.cuh"), *root.rglob("*.h"), *shared])


def compile_cached(inputs: list[str], text: str, flags: tuple[str, ...], suffix: str, root: Path, key: str) -> Path:
    """Compiles `text` (a C++ unit) together with `inputs` unless a build of the same content is there."""
    digest = hashlib.sha256("\0".join([COMPILER, *flags, *inputs, text, key]).encode()).hexdigest()[:24]
    out = cache() / f"{digest}{suffix}"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as work:
            unit_file = Path(work) / "unit.cpp"
            unit_file.write_text(text)
            made = Path(work) / f"made{suffix}"
            command = [COMPILER, *flags, f"-I{root}", "-o", str(made), str(unit_file), *inputs]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            made.rename(out)
    return out


def content(paths: list[Path]) -> str:
    return hashlib.sha256(b"\0".join(p.name.encode() + p.read_bytes() for p in paths)).hexdigest()


def runtime(flags: tuple[str, ...], root: Path) -> list[str]:
    """The emulator itself, as objects."""
    parts = sorted((root / "emu").glob("*.h"))
    return [
        str(
            compile_cached(
                [],
                (root / "emu" / f"{name}.cpp").read_text(),
                (*flags, "-c", f"-I{root}/emu"),
                ".o",
                root,
                content(parts),
            )
        )
        for name in RUNTIME
    ]


def library(file: str, flags: tuple[str, ...] = FLAGS, root: Path = CUDA) -> Path:
    """A shared library of file.cuh's kernels and the emulator."""
    return library_of(unit(file, root), flags, root)


def library_of(text: str, flags: tuple[str, ...] = FLAGS, root: Path = CUDA) -> Path:
    """The same of a translation unit."""
    return compile_cached(runtime(flags, root), text, (*flags, "-shared"), ".so", root, content(sources(root)))


class Counters(ctypes.Structure):
    """What a launch did (emu.h)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in re.findall(
            r"\b(\w+)(?=[,;])",
            " ".join(
                re.sub(r"//.*", "", line)
                for line in re.search(r"struct Counters \{(.*?)\};", (CUDA / "emu" / "emu.h").read_text(), re.S)[
                    1
                ].splitlines()
            ).replace("uint64_t", ""),
        )
    ]


class Region(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


class Options(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("copy", ctypes.c_uint32),
        ("resident", ctypes.c_uint32),
        ("spin_limit", ctypes.c_uint64),
        ("regions", ctypes.POINTER(Region)),
        ("region_count", ctypes.c_size_t),
    ]


class EmulationError(RuntimeError):
    """The kernel did what hardware forbids, or waited for ever."""


def have_compiler() -> bool:
    return shutil.which(COMPILER) is not None


class DeviceMemory:
    """Copies of arrays where a device would have them: beginning at a multiple of 256, and, for sanitizers, ending at their end."""

    def __init__(self):
        self.libc = ctypes.CDLL(None)
        self.held: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}

    def take(self, array: np.ndarray) -> int:
        assert array.flags.c_contiguous, "arrays of a launch are contiguous"
        if id(array) not in self.held:
            p = ctypes.c_void_p()
            size = max(array.nbytes, 1)
            if self.libc.posix_memalign(ctypes.byref(p), ctypes.c_size_t(256), ctypes.c_size_t(size)):
                raise MemoryError(size)
            copy = np.frombuffer((ctypes.c_uint8 * array.nbytes).from_address(p.value), array.dtype)
            copy[:] = array.reshape(-1)
            self.held[id(array)] = array, copy, p.value
        return self.held[id(array)][2]

    def regions(self) -> list[Region]:
        return [Region(address, array.nbytes) for array, _, address in self.held.values()]

    def give_back(self, copy_back: bool):
        for array, copy, address in self.held.values():
            if copy_back and array.flags.writeable:
                array.reshape(-1)[:] = copy
            self.libc.free(ctypes.c_void_p(address))
        self.held.clear()


def emulate(name: str, grid: int | tuple[int, ...], fields: dict, *, root: Path = CUDA, **options) -> Counters:
    """Launches a kernel of kernels.def on the emulator and returns what was counted.

    fields: the argument struct's, with numpy arrays for pointers (they are written in place, and a global access outside
    them is an error), None for null, numbers, and dicts for nested structs. options: see `launch`. Raises EmulationError.
    """
    kernel = kernels(root)[name]
    flags = options.pop("flags", FLAGS)
    return launch(library(kernel.file, flags, root), kernel, grid, fields, root=root, **options)


def launch(
    path: Path,
    kernel: Kernel,
    grid: int | tuple[int, ...],
    fields: dict,
    *,
    threads: int | None = None,
    smem: int | None = None,
    seed: int = 0,
    copy: str = "late",
    resident: int = 0,
    spin_limit: int = 0,
    root: Path = CUDA,
) -> Counters:
    """Launches a kernel of a built library.

    threads, smem: as in the kernel's line when None. seed: 0 runs threads and blocks in order, others at random. copy:
    when cp.async lands, "late", "early" or "random". resident: blocks in flight, 0 for up to 64. spin_limit: looks at flags without
    progress before it is a livelock, 0 for 2^22.
    """
    ffi = structs(root)
    memory = DeviceMemory()

    def plain(value):
        if isinstance(value, np.ndarray):
            return ffi.cast("void *", memory.take(value))
        if value is None:
            return ffi.NULL
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return value

    failed = 1
    try:
        args = ffi.new(f"{kernel.args_struct} *", plain(fields))
        regions = memory.regions()
        options = Options(
            seed, COPY[copy], resident, spin_limit, (Region * max(len(regions), 1))(*regions), len(regions)
        )
        counters = Counters()
        error = ctypes.create_string_buffer(1024)
        grid = (grid,) if isinstance(grid, int) else grid
        failed = load(path).assay_emu_launch(
            kernel.name.encode(),
            *(ctypes.c_uint32(n) for n in (*grid, 1, 1)[:3]),
            ctypes.c_uint32(kernel.threads if threads is None else threads),
            ctypes.c_size_t(kernel.smem_bytes if smem is None else smem),
            bytes(ffi.buffer(args)),
            ctypes.c_size_t(ffi.sizeof(kernel.args_struct)),
            ctypes.byref(options),
            ctypes.byref(counters),
            error,
            ctypes.c_size_t(len(error)),
        )
    finally:
        memory.give_back(copy_back=not failed)
    if failed:
        raise EmulationError(error.value.decode())
    return counters


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))

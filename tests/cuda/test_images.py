"""Where a GPU's code comes from: the package's images, then NVRTC, then PTX; and what is said when there is none."""

import numpy as np
import pytest
from test_driver import message, read_probe, words

from assay import cuda
from assay._ffi import lib
from assay.cuda import _images
from assay.cuda import compile as nvrtc


@pytest.fixture
def package(mock, images, tmp_path, monkeypatch):
    """package(target, ...): the build carries the probes for these targets, and NVRTC is not here."""

    def carries(*targets: str) -> None:
        for target in targets:
            nvrtc.write_image(tmp_path, f"probe.{target}", images(target)["probe"])

    def no_compiler(*_):
        raise nvrtc.CompilerMissingError("none here")

    monkeypatch.setattr(_images, "IMAGES", tmp_path)
    monkeypatch.setattr(_images, "Compiler", no_compiler)
    monkeypatch.setattr(_images, "find_nvrtc", lambda: None)
    return carries


def runs() -> bool:
    data = words()
    status, sink = read_probe(cuda, cuda.to_device(data))
    return status == lib.ASSAY_OK and np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(data)


@pytest.mark.parametrize(
    ("capability", "target"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 1), "sm_120")]
)
def test_the_package_s_code_runs_without_a_compiler(mock, package, capability, target):
    package(target)
    mock.set(major=capability[0], minor=capability[1])
    assert _images.code_for(capability) == f"compiled for {target}"
    assert runs()


def test_the_package_s_code_comes_before_the_compiler(mock, package, monkeypatch):
    package("sm_80")
    monkeypatch.setattr(_images, "compile_cached", lambda *_: pytest.fail("compiled though the package has it"))
    monkeypatch.setattr(_images, "Compiler", object)
    assert runs()


def test_a_gpu_without_code_of_its_own_gets_ptx(mock, package):
    package("sm_80", nvrtc.PTX)
    mock.set(major=10, minor=3)
    assert _images.code_for((10, 3)) == "compute_80, compiled by the driver"
    assert runs()


def test_a_driver_too_old_for_the_ptx_is_named(mock, package):
    package(nvrtc.PTX)
    mock.set(major=10, minor=3, ptx_version=8.0)
    assert not runs()
    assert "do not fit this GPU and driver" in message()


def test_a_damaged_image_of_the_package_is_not_loaded(mock, package, tmp_path):
    package("sm_80")
    path = tmp_path / "probe.sm_80.xz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert not runs()


def test_no_code_and_no_compiler_is_named(mock, package):
    mock.set(major=8, minor=6)
    assert _images.code_for((8, 6)) is None
    assert read_probe(cuda, cuda.to_device(words()))[0] == lib.ASSAY_CUDA_EIMAGE
    assert "no code for compute capability 8.6" in message()
    assert nvrtc.WHEEL in message()

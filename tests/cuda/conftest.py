"""GPU tests: `mock` is a driver without a GPU, `gpu` that or, with ASSAY_CUDA_REAL=1, the real one."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import budgets
import emulator
import mock_driver


@pytest.fixture
def mock(monkeypatch, tmp_path_factory):
    """The mock driver as this process's libcuda, as new; `mock.set(...)` first, then the first CUDA call opens it."""
    from assay import cuda
    from assay.cuda import compile as nvrtc

    if not emulator.have_compiler():
        pytest.skip("no C++ compiler to build the mock driver with")
    if nvrtc.find_nvrtc() is None:
        pytest.skip(f"NVRTC is not installed: pip install '{nvrtc.WHEEL}'")
    machine = mock_driver.Mock()
    cuda.forget_workspaces()
    cuda.refresh()
    machine.reset()
    monkeypatch.setenv("ASSAY_CUDA_DRIVER", str(mock_driver.library()))
    yield machine
    cuda.forget_workspaces()
    cuda.refresh()
    machine.reset()


@pytest.fixture
def gpu(request):
    """assay.cuda with a GPU: the mock's, or a real one when ASSAY_CUDA_REAL=1."""
    from assay import cuda

    if mock_driver.real():
        if not cuda.is_available():
            pytest.fail("ASSAY_CUDA_REAL=1, but no driver or no GPU is here")
        return cuda
    request.getfixturevalue("mock")
    return cuda


@pytest.fixture(scope="session")
def images():
    """images(target): the compiled units by name; what the user's cache lacks is compiled, as for a wheel."""
    from assay.cuda import compile as nvrtc

    if nvrtc.find_nvrtc() is None:
        pytest.skip(f"NVRTC is not installed: pip install '{nvrtc.WHEEL}'")
    return functools.cache(lambda target: {unit: image for (unit, _), image in budgets.compile_all((target,)).items()})

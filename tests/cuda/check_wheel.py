"""Checks the GPU kernels of an installed wheel: every unit for every target, under 10 MB, and that they are what runs.

Usage, in an environment that holds the wheel and no NVRTC: python tests/cuda/check_wheel.py

The mock driver plays a GPU of every target, and one that is younger, for which the wheel has intermediate code.
"""

import os

import mock_driver
import numpy as np

import assay
from assay import cuda
from assay.cuda import _images
from assay.cuda import compile as nvrtc

MOST_BYTES = 10e6
GPUS = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
    (12, 1): 101376,
}
YOUNGER = (10, 3), 232448


def check_files() -> None:
    root = _images.sources()
    stems = {f"{unit}.{target}.xz" for unit in nvrtc.units(root) for target in nvrtc.targets_of(unit)}
    found = {path.name for path in _images.IMAGES.iterdir()}
    assert found == stems | {f"{stem}.json" for stem in stems}, found ^ stems
    size = sum(path.stat().st_size for path in _images.IMAGES.iterdir())
    assert size < MOST_BYTES, size
    for unit in nvrtc.units(root):
        for target in nvrtc.targets_of(unit):
            image = nvrtc.read_image(_images.IMAGES, f"{unit}.{target}")
            assert image is not None, f"{unit}.{target} is damaged"
            assert image.code.startswith(b"//" if target == nvrtc.PTX else b"\x7fELF"), (unit, target)
    print(f"{len(stems)} images, {size} bytes")


def check_gpu(machine: mock_driver.Mock, capability: tuple[int, int], smem: int, source: str) -> None:
    cuda.forget_workspaces()
    cuda.refresh()
    machine.reset()
    machine.set(major=capability[0], minor=capability[1], smem_optin=smem, smem_per_sm=smem + 1024)
    assert _images.code_for(capability) == source, _images.code_for(capability)
    rng = np.random.default_rng(0)
    w = assay.pack(*assay.quantize_int4(rng.standard_normal((256, 128)).astype(np.float32), group_size=64)[:3])
    for m in (3, 70):  # tiles of 16 rows, and of 64; on compute capability 9.0 its own kernel
        a = rng.standard_normal((m, 128)).astype(np.float16)
        got = assay.w4a16_gemm(cuda.to_device(a), w.to_device()).numpy()
        np.testing.assert_allclose(got, a.astype(np.float32) @ w.dequantize().T, rtol=0, atol=1e-3)
    print(f"{capability}: {source}, runs")


def main() -> None:
    assert nvrtc.find_nvrtc() is None, "NVRTC is here: what runs could be compiled now"
    check_files()
    os.environ["ASSAY_CUDA_DRIVER"] = str(mock_driver.library())
    machine = mock_driver.Mock()
    for capability, smem in GPUS.items():
        check_gpu(machine, capability, smem, f"compiled for {_images.best_target(*capability)}")
    check_gpu(machine, *YOUNGER, f"{nvrtc.PTX}, compiled by the driver")


if __name__ == "__main__":
    main()

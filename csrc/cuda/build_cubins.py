"""Compiles every kernel for every target by NVRTC, into files that the package carries.

Usage: build_cubins.py OUT [--target sm_80 ...] [--require] [--jobs N]

Without NVRTC it leaves OUT empty and says so (the GPU's kernels are then compiled at run time); with --require that is an
error. Two files a unit and target: the code, compressed, and what ptxas says of its kernels. What was compiled before of
the same content comes from the user's cache, so that tests and a wheel compile each target once.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parents[1]


def compiler_module() -> ModuleType:
    """python/assay/cuda/compile.py by its path, for the package is not there yet."""
    path = CSRC.parent / "python" / "assay" / "cuda" / "compile.py"
    spec = importlib.util.spec_from_file_location("assay_compile", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["assay_compile"] = module
    spec.loader.exec_module(module)
    return module


def build(unit: str, target: str, out: str) -> tuple[str, str, int]:
    """One unit for one target, in a process of its own: NVRTC compiles one thing at a time."""
    nvrtc = compiler_module()
    image = nvrtc.compile_cached(CSRC, unit, target, nvrtc.Compiler())
    nvrtc.write_image(Path(out), f"{unit}.{target}", image)
    return unit, target, (Path(out) / f"{unit}.{target}.xz").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", action="append", help="this one alone; again for more (default: all)")
    parser.add_argument("--require", action="store_true", help="fail without NVRTC")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    nvrtc = compiler_module()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    if nvrtc.find_nvrtc() is None:
        if options.require:
            raise SystemExit(f"NVRTC is not installed: pip install '{nvrtc.WHEEL}'")
        print("NVRTC is not installed: a package without code for GPUs")
        return
    work = [
        (unit, target)
        for unit in nvrtc.units(CSRC)
        for target in nvrtc.targets_of(unit)
        if not options.target or target in options.target
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        done = [pool.submit(build, unit, target, str(options.out)) for unit, target in work]
        total = 0
        for future in done:
            unit, target, size = future.result()
            total += size
            print(f"{unit} {target}: {size} bytes")
    print(f"{len(work)} images, {total} bytes")


if __name__ == "__main__":
    main()

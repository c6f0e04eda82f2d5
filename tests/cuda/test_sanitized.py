"""The emulated kernels under ThreadSanitizer (a fiber of its own for every CUDA thread), AddressSanitizer and UBSan.

The same tests as elsewhere in this directory, a selection of each file, run in a process of its own that has the sanitizer loaded
before Python: a data race between CUDA threads, an access past the end of shared or global memory, or undefined behaviour ends it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import COMPILER

HERE = Path(__file__).parent
SANITIZERS = {
    "thread": (
        "-O1 -fsanitize=thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0"},
    ),
    "address": (
        "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0:exitcode=67", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
    ),
}
# file -> kernels to build, and the tests of it that touch every barrier and every edge at small sizes
SELECTION = {
    "test_gemm_w4a16.py": (
        "_f16_m(16z|32|64z)$",
        "(test_every_instance and (f16-16-False or f16-32-True or f16-64-False) and not bf16) or (test_stripes and 32-3)",
    ),
    "test_gemm_w4a8.py": (
        "a8_quantize|_m(16z|64)$",
        "(test_every_instance and (False-16 or True-64)) or (test_stripes and 3-1280)",
    ),
    "test_gemm_sm90a.py": ("a16_tiles|_f16_m64z$", "test_tiles or (test_shapes and 66-33 and False)"),
    "test_gemv.py": ("_f16_gemvz?$", "test_shapes and (2-33 or 7-96) and not bf16"),
    "test_route.py": ("moe_route_(64|2048)$", "test_every_instance_routes_alike and (64-sigmoid or 2048-softmax)"),
    "test_align.py": (
        "moe_(align|combine)",
        "(test_equals and 33-2-7) or test_the_order or (test_combine and (516 or 129))",
    ),
    "test_experts.py": ("a8_quantize|moe_(combine_1|experts_w4a16_f16_m16|experts_w4a8_m16)$", "test_few_threads"),
    "test_tree.py": ("tree_", "test_faults_say or test_optional"),
    "test_verify.py": ("verify", "test_sanitized_requests"),
    "test_probe.py": ("probe_(read|atomic)", "test_read or test_atomics"),
}


def sanitized_command(sanitizer: str, file: str, selection: str) -> tuple[list[str], dict[str, str]]:
    """How to run tests with a sanitizer, and the environment for it."""
    flags, library, options = SANITIZERS[sanitizer]
    found = subprocess.run(
        [COMPILER, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{COMPILER} has no {library}")
    # -s: what a sanitizer says goes to the standard error as it is.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        str(HERE / file),
        "-k",
        selection,
    ]
    # Address space randomised over more bits than ThreadSanitizer's shadow knows: setarch -R takes it away where it is there.
    if sanitizer == "thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
    more = {"LD_PRELOAD": found, "ASSAY_EMULATOR_FLAGS": flags, "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"}
    return command, more | options


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("file", SELECTION)
def test_clean(sanitizer, file):
    kernels, selection = SELECTION[file]
    command, more = sanitized_command(sanitizer, file, selection)
    env = os.environ | more | {"ASSAY_EMULATOR_KERNELS": kernels}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout

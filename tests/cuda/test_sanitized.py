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
    "thread": ("-fsanitize=thread", "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0"}),
    "address": (
        "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0:exitcode=67", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
    ),
}
# file -> the tests of it that touch every barrier and every edge at small sizes
SELECTION = {
    "test_gemm_w4a16.py": "test_every_instance or (test_shapes and (17-257 or 65-40 or 5-20)) or (test_stripes and 128-3)",
    "test_gemm_w4a8.py": "test_every_instance or (test_shapes and (17-257 or 65-40 or 5-20)) or (test_stripes and 3-1280)",
    "test_gemv.py": "test_shapes and (2-33 or 7-96)",
    "test_probe.py": "test",
}


def sanitized(sanitizer: str, file: str, selection: str, **env: str) -> subprocess.CompletedProcess:
    flags, library, options = SANITIZERS[sanitizer]
    found = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{COMPILER} has no {library}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", selection]
    more = {"LD_PRELOAD": found, "ASSAY_EMULATOR_FLAGS": flags, "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"}
    # Address space randomised over more bits than TSan's shadow knows: setarch -R takes it away where it is there.
    if sanitizer == "thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | more | options | env, timeout=280)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("file", SELECTION)
def test_clean(sanitizer, file):
    done = sanitized(sanitizer, file, SELECTION[file])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout

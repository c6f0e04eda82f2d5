"""The pool: lazily started, respects limits, survives fork, many callers at once."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import assay
from assay._ffi import lib


def python(code: str, **env: str) -> str:
    """Output of `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SMALL_GEMM = """
import numpy as np, assay
rng = np.random.default_rng(0)
w = assay.pack(*assay.quantize_int4(rng.standard_normal((4096, 512)).astype(np.float32))[:2])
a = rng.standard_normal((5, 512)).astype(np.float32)
"""


def gemm_case(m=5):
    rng = np.random.default_rng(0)
    w = assay.pack(*assay.quantize_int4(rng.standard_normal((4096, 512)).astype(np.float32))[:2])
    return rng.standard_normal((m, 512)).astype(np.float32), w


def test_import_starts_no_thread_and_loads_nothing_slow():
    out = python(
        "import sys, os, assay; env = dict(os.environ)\n"
        "slow = [m for m in ('numba', 'scipy', 'torch', 'matplotlib', 'pandas') if m in sys.modules]\n"
        "import assay.ops.int4\n"
        "threads = [l for l in open('/proc/self/status') if l.startswith('Threads')] if os.path.exists('/proc/self/status') else ['1']\n"
        "print(slow, threads[0].split()[-1], env == dict(os.environ))",
        OPENBLAS_NUM_THREADS="1",
    )
    assert out == "[] 1 True"


@pytest.mark.parametrize(("value", "want"), [("1", 1), ("3", 3), ("9999", 256)])
def test_environment_sets_the_number_of_threads(value, want):
    assert python("from assay._ffi import lib; print(lib.assay_num_threads())", ASSAY_NUM_THREADS=value) == str(want)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks on this system")
def test_affinity_mask_is_respected():
    cpu = min(os.sched_getaffinity(0))
    out = python(
        f"import os; os.sched_setaffinity(0, {{{cpu}}}); from assay._ffi import lib; print(lib.assay_num_threads())"
    )
    assert out == "1"


@pytest.mark.parametrize(("quota", "want"), [(100000, "1 1.0"), (150000, "2 1.5"), (-1, None)])
def test_cgroup_quota_is_respected(quota, want):
    """A group of our own below the process's, with a limit: children count it, their children's limit too."""
    hierarchy = Path("/sys/fs/cgroup/cpu")
    group = hierarchy / f"assay-test-{os.getpid()}"
    try:
        (group / "inner").mkdir(parents=True)
    except OSError as exc:
        pytest.skip(f"no control group of version 1 can be made here: {exc}")
    try:
        (group / "cpu.cfs_quota_us").write_text(str(quota))
        code = (
            f"import os; open('{group}/inner/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "from assay.ops import info\nprint(info.num_threads(), info.cgroup_quota())"
        )
        env = {name: value for name, value in os.environ.items() if name != "ASSAY_NUM_THREADS"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
        cpus = len(os.sched_getaffinity(0))
        got = done.stdout.split()
        if want is None:
            assert got == [str(cpus), "None"]
        else:
            threads, granted = want.split()
            assert got == [str(min(cpus, int(threads))), granted]
    finally:
        for folder in (group / "inner", group):
            folder.rmdir()


def test_results_do_not_depend_on_the_number_of_threads():
    a, w = gemm_case()
    want = assay.w4a8_gemm(a, w, num_threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(assay.w4a8_gemm(a, w, num_threads=threads), want)


def test_many_python_threads_call_at_once():
    a, w = gemm_case()
    want = assay.w4a8_gemm(a, w, num_threads=1)
    wrong = []

    def hammer(i):
        for _ in range(30):
            got = assay.w4a8_gemm(a, w, num_threads=1 + i % 3)
            if not np.array_equal(got, want):
                wrong.append(i)

    team = [threading.Thread(target=hammer, args=(i,)) for i in range(8)]
    for t in team:
        t.start()
    for t in team:
        t.join()
    assert not wrong


def test_the_gil_is_released():
    """A second Python thread makes progress while a kernel runs."""
    a, w = gemm_case(512)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)  # hand the GIL back: main gets it again only here

    watcher = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to hand over the GIL: only a release lets the watcher run
    try:
        watcher.start()
        before = ticks[0]
        for _ in range(20):
            assay.w4a8_gemm(a, w, num_threads=1)
        after = ticks[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        watcher.join()
    assert after > before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_the_pool_has_run():
    out = python(
        SMALL_GEMM + "import os\n"
        "want = assay.w4a8_gemm(a, w, num_threads=2)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    same = all(np.array_equal(assay.w4a8_gemm(a, w, num_threads=2), want) for _ in range(50))\n"
        "    os._exit(0 if same else 1)\n"
        "print(os.waitpid(pid, 0)[1], np.array_equal(assay.w4a8_gemm(a, w, num_threads=2), want))"
    )
    assert out == "0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_computes():
    out = python(
        SMALL_GEMM + "import os, threading\n"
        "stop = threading.Event()\n"
        "def hammer():\n"
        "    while not stop.is_set():\n"
        "        assay.w4a8_gemm(a, w, num_threads=2)\n"
        "t = threading.Thread(target=hammer); t.start()\n"
        "codes = []\n"
        "for _ in range(10):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        assay.w4a8_gemm(a, w, num_threads=2)\n"
        "        os._exit(0)\n"
        "    codes.append(os.waitpid(pid, 0)[1])\n"
        "stop.set(); t.join(); print(codes)"
    )
    assert out == str([0] * 10)


def test_beside_torch_in_one_process():
    pytest.importorskip("torch", reason="torch is not installed")
    out = python(
        SMALL_GEMM + "import torch\n"
        "want = assay.w4a8_gemm(a, w, num_threads=1)\n"
        "x = torch.randn(256, 256)\n"
        "for _ in range(50):\n"
        "    x = (x @ x).tanh()\n"
        "    assert np.array_equal(assay.w4a8_gemm(torch.from_numpy(a), w, num_threads=2), want)\n"
        "print('ok')"
    )
    assert out == "ok"


def test_dispatch_latency_is_measured():
    assert 0 < lib.assay_dispatch_latency(2, 11) < 1
    assert lib.assay_dispatch_latency(0, 11) == -1


def test_isa_cap_and_unknown_isa():
    code = "from assay.ops import info\nprint(sorted({v['isa'] for v in info.variants() if v['selected']}))"
    assert python(code, ASSAY_ISA="scalar") == "['scalar']"
    out = python(
        "import numpy as np, assay\n"
        "w = assay.pack(np.zeros((1, 16), np.uint8), np.ones((1, 1), np.float16))\n"
        "try:\n    assay.w4a8_gemm(np.ones((1, 32), np.float32), w)\n"
        "except assay.UnsupportedError as e:\n    print(e)",
        ASSAY_ISA="sse9",
    )
    assert "ASSAY_ISA='sse9'" in out

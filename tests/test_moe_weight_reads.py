"""An expert layer reads the weights of each touched expert once a call, however many tokens chose it: counted, tile by tile.

csrc/ is compiled anew, portable tier, with weight_reads.c between the layer and the GEMM kernels. A tile that a thread multiplies by
again before any other is still in its cache, and counts once.
"""

import re
import shutil
import subprocess
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest

import assay
from assay.ops import moe_experts as ops

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
EXPERTS, HIDDEN, INTERMEDIATE = 6, 64, 304  # 19 and 2 tiles: chunks of several and of one


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """(ffi, lib) of the counting library."""
    cc = shutil.which("gcc") or shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler found")
    cffi = pytest.importorskip("cffi")
    folder = tmp_path_factory.mktemp("counted")
    sources = [p for p in sorted(CSRC.glob("*.c")) if p.name != "moe_experts.c"]
    sources += [*sorted(CSRC.glob("cpu/*/scalar.c")), HERE / "weight_reads.c"]
    common = [cc, "-std=gnu11", "-O1", "-ffp-contract=off", "-fPIC", "-pthread", f"-I{CSRC}"]
    layer = folder / "moe_experts.o"
    for command in (
        [*common, "-Dassay_select=counted_select", "-c", str(CSRC / "moe_experts.c"), "-o", str(layer)],
        [*common, "-shared", "-o", str(folder / "counted.so"), *map(str, sources), str(layer), "-lm"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    text = re.search(r"/\* cdef begin \*/(.*)/\* cdef end \*/", (CSRC / "assay.h").read_text(), re.S)
    ffi = cffi.FFI()
    ffi.cdef(text.group(1) + "int64_t counted_reads(int64_t *out, int64_t room);")
    return ffi, ffi.dlopen(str(folder / "counted.so"))


def intervals(counting):
    """(address, bytes) of what was read, again for every time that a thread came back to it from something else."""
    ffi, lib = counting
    out = np.zeros((1 << 16, 3), np.int64)
    count = lib.counted_reads(ffi.cast("int64_t *", out.ctypes.data), len(out))
    assert count < len(out)
    found = []
    for thread in np.unique(out[:count, 2]):
        own = out[:count][out[:count, 2] == thread]
        found += [key for key, _ in groupby(map(tuple, own[:, :2].tolist()))]
    return sorted(found)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("a16", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 40, 700])  # 700: more rows an expert than a slab of outputs holds
def test_each_touched_expert_s_weights_are_read_once(monkeypatch, counting, tokens, a16, threads):
    ffi, lib = counting
    monkeypatch.setattr(ops, "ffi", ffi)
    monkeypatch.setattr(ops, "lib", lib)
    rng = np.random.default_rng(tokens)
    packed = assay.quantize_experts(
        rng.standard_normal((EXPERTS, 2 * INTERMEDIATE, HIDDEN)).astype(np.float32),
        rng.standard_normal((EXPERTS, HIDDEN, INTERMEDIATE)).astype(np.float32), down_group_size=INTERMEDIATE,
    )  # fmt: skip
    x = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
    ids = np.argsort(rng.random((tokens, EXPERTS - 1)) + [0, 0, 0.5, 0.5, 2], axis=1)[:, :2].astype(np.int32)
    weights = rng.random((tokens, 2)).astype(np.float32)
    intervals(counting)
    _, cost = assay.moe_experts(x, ids, weights, packed, a16=a16, return_cost=True, num_threads=threads)
    read = intervals(counting)
    assert sum(size for _, size in read) == cost.weight_bytes
    for (at, size), (after, _) in pairwise(read):
        assert at + size <= after
    for matrix in (packed.gate_up, packed.down):
        for e in range(EXPERTS):
            start, size = matrix[e].ctypes.data, matrix.shape[1]
            inside = sum(n for at, n in read if start <= at and at + n <= start + size)
            assert inside == (size if (ids == e).any() else 0)

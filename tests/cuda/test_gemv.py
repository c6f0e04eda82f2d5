"""w4a16 for few rows on the emulator."""

import numpy as np
import pytest
from emulator import emulate
from test_gemm_w4a16 import activations, check
from w4 import Weights


def run(w: Weights, a: np.ndarray, aligned=None, **options):
    m, k = a.shape
    c = np.full((m, w.n), np.nan, np.float32)
    aligned = k % 8 == 0 if aligned is None else aligned
    fields = {"w": w.fields(), "a": a.view(np.uint16), "lda": k, "c": c, "ldc": w.n, "m": m, "aligned": int(aligned)}
    name = f"assay_w4a16_{'f16' if a.dtype == np.float16 else 'bf16'}_gemv{'' if w.symmetric else 'z'}"
    return c, emulate(name, -(-w.n // 32), fields, **options)


SHAPES = [(1, 1, 32, 32), (1, 40, 64, 64), (2, 33, 1056, 32), (3, 64, 128, 128), (4, 70, 2048, 128), (5, 31, 900, 900),
          (7, 96, 37, 37), (8, 32, 1, 1), (4, 65, 4096, 4096)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
def test_shapes(m, n, k, group_size, symmetric, dtype):
    w = Weights(n, k, group_size, symmetric)
    a, exact = activations(m, k, dtype)
    c, counted = run(w, a, seed=m % 3)
    check(c, exact, w)
    assert counted.st_bytes == c.nbytes


def test_a_row_has_the_same_bits_in_every_batch():
    w = Weights(64, 1024, 128, False)
    a, _ = activations(8, 1024, "f16")
    whole, _ = run(w, a)
    for m in (1, 3, 4):
        assert np.array_equal(run(w, a[:m], seed=m)[0], whole[:m])


def test_traffic():
    w = Weights(64, 1024, 128, True)
    a, _ = activations(2, 1024, "f16")
    _, counted = run(w, a)
    # Weights once; the scales of a group by every lane (of which the eight that share one are a single sector); rows by every block.
    assert counted.ldg_bytes == 64 * 1024 // 2 + 2 * 8 * 32 * 16 + 2 * a.nbytes
    assert counted.barriers == 2

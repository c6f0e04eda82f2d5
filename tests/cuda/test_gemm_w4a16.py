"""w4a16 on the emulator against float64: every instance, shapes with tails, groups, stripes, schedules."""

import numpy as np
import pytest
from emulator import emulate
from w4 import BLOCK_N, Weights, bf16, from_bf16

BLOCK_K = 64


def run(w: Weights, a: np.ndarray, *, block_m=None, stripe=None, lda=None, workspace=None, **options):
    """C of a launch of the instance for these weights and activations (uint16 is bfloat16), and what was counted."""
    m, k = a.shape
    block_m = block_m or (16 if m <= 16 else 32 if m <= 32 else 64)
    column_blocks, k_tiles, row_blocks = -(-w.n // BLOCK_N), -(-k // BLOCK_K), -(-m // block_m)
    stripe = stripe or k_tiles
    blocks = -(-column_blocks * k_tiles // stripe)
    c = np.full((m, w.n), np.nan, np.float32)
    lda = lda or k
    padded = np.full((m, lda), 0x7E00 if a.dtype == np.float16 else 0x7FFF, np.uint16)
    padded[:, :k] = a.view(np.uint16)
    arrivals = np.zeros(row_blocks * column_blocks, np.uint32)
    fields = {
        "w": w.fields(),
        "a": padded,
        "lda": lda,
        "c": c,
        "ldc": w.n,
        "m": m,
        "aligned": int(k % 8 == 0 and lda % 8 == 0),
        "stripe": stripe,
        "partials": np.full(2 * row_blocks * blocks * block_m * BLOCK_N, np.nan, np.float32),
        "arrivals": arrivals,
    }
    name = f"assay_w4a16_{'f16' if a.dtype == np.float16 else 'bf16'}_m{block_m}{'' if w.symmetric else 'z'}"
    counted = emulate(name, (blocks, row_blocks), fields, **options)
    assert not arrivals.any(), "arrivals are zeros for the next launch"
    return c, counted


def activations(m: int, k: int, dtype: str, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random activations as the kernel takes them, and their values in float64."""
    a = np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)
    if dtype == "f16":
        half = a.astype(np.float16)
        return half, half.astype(np.float64)
    return bf16(a), from_bf16(bf16(a)).astype(np.float64)


def check(c: np.ndarray, a: np.ndarray, w: Weights):
    """Weights are exact, and so are products in float32: what is left is at most K + G float32 additions and a multiplication a
    group, each off by 2^-24 of a sum that is no larger than sum |a| |s (q - zero)|."""
    exact = a @ w.values.astype(np.float64).T
    bound = (w.k + 2 * w.scales.shape[1]) * 2.0**-24 * (np.abs(a) @ np.abs(w.values.astype(np.float64)).T) + 1e-30
    assert np.all(np.abs(c - exact) <= bound)


INSTANCES = [(dtype, m, symmetric) for dtype in ("f16", "bf16") for m in (16, 32, 64) for symmetric in (True, False)]


@pytest.mark.parametrize(("dtype", "block_m", "symmetric"), INSTANCES)
def test_every_instance(dtype, block_m, symmetric):
    w = Weights(320, 256, 128, symmetric)
    a, exact = activations(block_m - 3, 256, dtype)
    c, _ = run(w, a, block_m=block_m)
    check(c, exact, w)


SHAPES = [
    (1, 1, 32, 32), (1, 31, 64, 32), (3, 33, 96, 32), (16, 256, 128, 64), (17, 257, 192, 64), (15, 255, 384, 128),
    (33, 288, 640, 128), (64, 300, 512, 512), (65, 40, 256, 32), (2, 48, 8, 8), (5, 20, 100, 100), (7, 64, 37, 37),
    (9, 513, 320, 320), (1, 64, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
def test_shapes(m, n, k, group_size, symmetric):
    w = Weights(n, k, group_size, symmetric)
    for dtype in ("f16", "bf16"):
        a, exact = activations(m, k, dtype)
        c, _ = run(w, a, lda=k + 24, seed=m)
        check(c, exact, w)


@pytest.mark.parametrize("stripe", [1, 2, 3, 5, 8, 11, 100])
@pytest.mark.parametrize("group_size", [32, 128, 704])
def test_stripes(stripe, group_size):
    k = 640 if group_size == 128 else 704
    w = Weights(600, k, group_size, group_size != 32)
    a, exact = activations(5, k, "f16")
    results = [
        run(w, a, stripe=stripe, seed=seed, copy=copy)[0] for seed, copy in ((0, "late"), (3, "random"), (4, "early"))
    ]
    check(results[0], exact, w)
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    w = Weights(290, 512, 128, False)
    a, _ = activations(130, 512, dtype)
    whole, _ = run(w, a, block_m=64, stripe=3)
    for m, block_m in ((1, 16), (2, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)):
        c, _ = run(w, a[:m], block_m=block_m, stripe=3, seed=m)
        assert np.array_equal(c, whole[:m])
    moved, _ = run(w, a[7:20], stripe=3)
    assert np.array_equal(moved, whole[7:20])


def test_nan_and_infinity_stay_in_their_row():
    w = Weights(64, 128, 64, True)
    a, exact = activations(16, 128, "f16")
    a[3, 5], a[9, 127] = np.nan, np.inf
    c, _ = run(w, a)
    clean = [i for i in range(16) if i not in (3, 9)]
    assert np.isnan(c[3]).all()
    assert not np.isfinite(c[9]).any()
    check(c[clean], exact[clean], w)


def traffic(w: Weights, m: int, block_m: int) -> int:
    """Bytes by cp.async of one pass over the weights by whole columns of blocks: weights once a block of rows, activations once
    a block of columns."""
    tiles, k_tiles, groups = -(-w.n // 32), -(-w.k // BLOCK_K), w.k // w.group_size
    weights = tiles * (k_tiles * BLOCK_K * 32 // 2 + groups * (64 + (0 if w.symmetric else 32)))
    return -(-m // block_m) * weights + -(-w.n // BLOCK_N) * m * w.k * 2


@pytest.mark.parametrize(("m", "n", "k", "group_size"), [(16, 512, 1024, 128), (7, 300, 512, 32), (64, 256, 768, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_traffic_and_conflicts(m, n, k, group_size, symmetric):
    w = Weights(n, k, group_size, symmetric)
    a, _ = activations(m, k, "f16")
    block_m = 16 if m <= 16 else 64
    c, counted = run(w, a)
    column_blocks, k_tiles = -(-n // BLOCK_N), k // BLOCK_K
    assert counted.async_bytes == traffic(w, m, block_m)
    assert counted.st_bytes == c.nbytes
    assert counted.ldg_bytes == 0
    assert counted.mma == column_blocks * 8 * (k // 16) * (block_m // 16) * 4
    assert counted.ldmatrix_wavefronts == 4 * counted.ldmatrix
    assert counted.shared_wavefronts <= 4 * counted.shared_accesses
    assert counted.barriers == column_blocks * (k_tiles + 1)

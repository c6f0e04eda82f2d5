"""w4a8 on the emulator: the quantised activations and, where K is not cut, every bit of the reference's equation."""

import numpy as np
import pytest
from emulator import emulate
from w4 import BLOCK_N, Weights, bf16, from_bf16

from assay.reference.gemm import quantize_activations, w4a8_gemm

BLOCK_K = 128
DTYPES = {"f32": 0, "f16": 1, "bf16": 2}


def order(k_padded: int) -> np.ndarray:
    """k of each byte of a row of codes (a8_quantize.cuh)."""
    byte = np.arange(k_padded)
    h, t, i = byte // 16 % 2, byte // 4 % 4, byte % 4
    return byte // 32 * 32 + 8 * h + 2 * t + 16 * (i % 2) + i // 2


def quantize(a: np.ndarray, group_size: int, dtype: str, **options) -> tuple[np.ndarray, np.ndarray]:
    m, k = a.shape
    k_padded = -(-k // BLOCK_K) * BLOCK_K
    units = 1 if group_size >= k else k_padded // group_size
    codes = np.full((m, k_padded), 77, np.int8)
    groups = np.zeros((m, max(k // group_size, 1)), [("scale", np.float32), ("codes", np.int32)])
    fields = {"a": a, "lda": k, "m": m, "k": k, "group_size": group_size, "a_dtype": DTYPES[dtype]}
    raw = groups.view(np.int32)
    emulate("assay_a8_quantize", m * -(-units // 8), {**fields, "codes": codes, "groups": raw}, **options)
    return codes, groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "group_size"), [(3, 128, 32), (2, 96, 32), (2, 1088, 64), (1, 640, 128), (3, 37, 37),
                                                    (2, 300, 300), (1, 1, 1), (2, 4096, 4096)])  # fmt: skip
def test_quantized_activations(dtype, m, k, group_size):
    x = np.random.default_rng(k).standard_normal((m, k)).astype(np.float32)
    x[0, : k // 2] = 0
    if m > 1:
        x[1, -1] = np.nan
    a = x if dtype == "f32" else x.astype(np.float16) if dtype == "f16" else bf16(x)
    values = from_bf16(a) if dtype == "bf16" else a.astype(np.float32)
    codes, groups = quantize(a, group_size, dtype, seed=k % 3)
    wanted, scale = quantize_activations(values, group_size)
    padded = np.zeros(codes.shape, np.int8)
    padded[:, :k] = wanted
    assert np.array_equal(codes, padded[:, order(codes.shape[1])])
    assert np.array_equal(groups["scale"], scale, equal_nan=True)
    assert np.array_equal(groups["codes"], wanted.reshape(m, -1, group_size).sum(-1, dtype=np.int32))


def run(w: Weights, a: np.ndarray, *, block_m=None, stripe=None, **options):
    """C of the quantisation and a launch of the instance for these weights, and what was counted."""
    m, k = a.shape
    block_m = block_m or (16 if m <= 16 else 32 if m <= 32 else 64)
    column_blocks, k_tiles, row_blocks = -(-w.n // BLOCK_N), -(-k // BLOCK_K), -(-m // block_m)
    stripe = stripe or k_tiles
    blocks = -(-column_blocks * k_tiles // stripe)
    codes, groups = quantize(a, w.group_size, "f32")
    c = np.full((m, w.n), np.nan, np.float32)
    arrivals = np.zeros(row_blocks * column_blocks, np.uint32)
    fields = {
        "w": w.fields(), "a": codes, "a_groups": groups.view(np.int32), "c": c, "ldc": w.n, "m": m, "stripe": stripe,
        "partials": np.full(2 * row_blocks * blocks * block_m * BLOCK_N, np.nan, np.float32), "arrivals": arrivals,
    }  # fmt: skip
    counted = emulate(f"assay_w4a8_m{block_m}{'' if w.symmetric else 'z'}", (blocks, row_blocks), fields, **options)
    assert not arrivals.any()
    return c, counted


def activations(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(m).standard_normal((m, k)).astype(np.float32)


def reference(w: Weights, a: np.ndarray) -> np.ndarray:
    return w4a8_gemm(a, w.qweight, w.scales, w.zeros, w.group_size)


SHAPES = [
    (1, 1, 32, 32), (3, 33, 96, 32), (16, 256, 128, 64), (17, 257, 192, 64), (15, 255, 384, 128), (33, 300, 512, 512),
    (64, 288, 640, 128), (65, 40, 256, 32), (5, 20, 100, 100), (7, 64, 37, 37), (9, 513, 320, 320), (2, 31, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
def test_shapes(m, n, k, group_size, symmetric):
    w, a = Weights(n, k, group_size, symmetric), activations(m, k)
    c, _ = run(w, a, seed=m)
    assert np.array_equal(c, reference(w, a))


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_instance(block_m, symmetric):
    w, a = Weights(270, 384, 128, symmetric), activations(block_m - 1, 384)
    c, _ = run(w, a, block_m=block_m)
    assert np.array_equal(c, reference(w, a))


@pytest.mark.parametrize(("stripe", "k", "group_size", "symmetric"), [(1, 640, 128, True), (3, 1280, 64, False),
                                                                       (2, 900, 900, False), (2, 900, 900, True)])  # fmt: skip
def test_stripes(stripe, k, group_size, symmetric):
    """Pieces of K are rounded apart and then added: each of the sums and products so rounded is below the sum of sizes."""
    w, a = Weights(520, k, group_size, symmetric), activations(6, k)
    results = [
        run(w, a, stripe=stripe, seed=seed, copy=copy)[0] for seed, copy in ((0, "late"), (3, "random"), (4, "early"))
    ]
    assert all(np.array_equal(results[0], other) for other in results[1:])
    groups = k // group_size
    codes, scale = quantize_activations(a, group_size)
    sizes = (
        np.abs(codes * np.repeat(scale, group_size, 1))
        @ (15 * np.abs(np.repeat(w.scales.astype(np.float64), group_size, 1))).T
    )
    assert np.all(np.abs(results[0] - reference(w, a)) <= (2 * groups + 16) * 2.0**-24 * sizes)


def test_a_row_has_the_same_bits_in_every_batch():
    w, a = Weights(290, 1024, 128, False), activations(64, 1024)
    whole, _ = run(w, a, stripe=3)
    for m in (1, 2, 16, 17, 32, 33):
        c, _ = run(w, a[:m], stripe=3, seed=m)
        assert np.array_equal(c, whole[:m])


def test_a_row_with_a_nan_is_nan_and_alone():
    w, a = Weights(64, 256, 128, False), activations(16, 256)
    a[3, 5], a[9, 255] = np.nan, np.inf
    c, _ = run(w, a)
    assert np.isnan(c[[3, 9]]).all()
    clean = [i for i in range(16) if i not in (3, 9)]
    assert np.array_equal(c[clean], reference(w, a)[clean])


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "symmetric"), [(16, 512, 1024, 128, True), (7, 300, 512, 32, False)]
)
def test_traffic_and_conflicts(m, n, k, group_size, symmetric):
    w, a = Weights(n, k, group_size, symmetric), activations(m, k)
    c, counted = run(w, a)
    tiles, column_blocks, groups = -(-n // 32), -(-n // BLOCK_N), k // group_size
    weights = tiles * (k * 16 + groups * (64 + (0 if symmetric else 32)))
    assert counted.async_bytes == weights + column_blocks * m * k
    assert counted.ldg_bytes == column_blocks * 8 * 4 * m * groups * 8  # every warp's lanes read their rows' groups
    assert counted.st_bytes == c.nbytes
    assert counted.mma == column_blocks * 8 * (k // 32) * 4
    assert counted.ldmatrix_wavefronts == 4 * counted.ldmatrix
    assert counted.barriers == column_blocks * (k // BLOCK_K + 1)

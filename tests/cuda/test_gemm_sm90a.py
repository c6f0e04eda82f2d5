"""w4a16 for Hopper on the emulator: warpgroup products, bulk copies, barriers that count bytes."""

import numpy as np
import pytest
from emulator import Kernel, emulate, launch, library_of, unit_of
from test_gemm_w4a16 import activations, check
from test_lanes import positions
from w4 import BLOCK_N, Weights


def tiles(a: np.ndarray, block_m: int, lda: int, aligned: bool, **options) -> np.ndarray:
    m, k = a.shape
    k_padded, row_blocks = -(-k // 128) * 128, -(-m // block_m)
    padded = np.full((m, lda), 0x7E7F, np.uint16)
    padded[:, :k] = a.view(np.uint16)
    out = np.full((row_blocks, k_padded // 64, block_m, 8, 8), 0x7E7F, np.uint16)
    fields = {"a": padded, "lda": lda, "m": m, "k": k, "block_m": block_m, "aligned": int(aligned), "tiles": out}
    emulate("assay_a16_tiles", -(-out.size // 8 // 256), fields, **options)
    return out


@pytest.mark.parametrize(
    ("m", "k", "block_m"), [(65, 128, 64), (3, 72, 128), (130, 200, 128), (64, 37, 64), (1, 1, 64)]
)
def test_tiles(m, k, block_m):
    a, _ = activations(m, k, "f16")
    aligned = k % 8 == 0
    out = tiles(a, block_m, k + (8 if aligned else 3), aligned, seed=k % 2)
    row_blocks, k_tiles = out.shape[:2]
    whole = np.zeros((row_blocks * block_m, k_tiles * 64), np.uint16)
    whole[:m, :k] = a.view(np.uint16)
    wanted = whole.reshape(row_blocks, block_m, k_tiles, 8, 8).transpose(0, 2, 1, 3, 4)
    piece = np.arange(8)[None, :] ^ np.arange(block_m)[:, None] % 8
    assert np.array_equal(np.take_along_axis(out, piece[None, None, :, :, None], 3), wanted)


def run(w: Weights, a: np.ndarray, block_m: int, **options):
    m, k = a.shape
    packed = tiles(a, block_m, k, k % 8 == 0)
    c = np.full((m, w.n), np.nan, np.float32)
    fields = {"w": w.fields(), "a": packed, "c": c, "ldc": w.n, "m": m}
    name = f"assay_w4a16_sm90a_{'f16' if a.dtype == np.float16 else 'bf16'}_m{block_m}{'' if w.symmetric else 'z'}"
    counted = emulate(name, (-(-w.n // BLOCK_N), -(-m // block_m)), fields, **options)
    return c, counted


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_instance(block_m, dtype, symmetric):
    w = Weights(288, 256, 128, symmetric)
    a, exact = activations(block_m - 1, 256, dtype)
    c, _ = run(w, a, block_m)
    check(c, exact, w)


SHAPES = [
    (66, 33, 96, 32),
    (64, 256, 640, 64),
    (129, 40, 1408, 128),
    (5, 300, 100, 100),
    (70, 257, 1000, 1000),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
def test_shapes(m, n, k, group_size, symmetric):
    w = Weights(n, k, group_size, symmetric)
    a, exact = activations(m, k, "f16")
    results = [run(w, a, 64, seed=seed, copy=copy)[0] for seed, copy in ((0, "late"), (5, "random"), (6, "early"))]
    check(results[0], exact, w)
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_a_row_has_the_same_bits_in_every_batch():
    w = Weights(128, 512, 128, False)
    a, _ = activations(140, 512, "bf16")
    whole, _ = run(w, a, 128)
    for m in (1, 70, 128):
        assert np.array_equal(run(w, a[-m:], 128, seed=m)[0], whole[-m:])


def test_traffic():
    """Weights and scales once a block of rows, tiles once a block of columns; a product for 64 columns, a block of rows and 16 k."""
    w = Weights(512, 1024, 128, False)
    a, _ = activations(128, 1024, "f16")
    c, counted = run(w, a, 128)
    assert counted.bulk_bytes == 512 * 1024 // 2 + 512 // 32 * 8 * (64 + 32) + 2 * a.nbytes
    assert counted.wgmma == 512 // 64 * 1024 // 16
    assert counted.ldg_bytes == counted.async_bytes == 0
    assert counted.st_bytes == c.nbytes


# CuTe's layouts of a warpgroup product (include/cute/atom/mma_traits_sm90_gmma.hpp): a in registers, and d, as positions m + 64 n.
A_64X16 = positions(((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)))


def d_64xn(n: int) -> np.ndarray:
    return positions(((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512)))


SOURCE = """
#include "assay_cuda.h"
#include "ptx_sm90a.cuh"
namespace assay {
template <class N>
void one_wgmma(const assay_probe_read_args &args) {
    const uint8_t *const from = static_cast<const uint8_t *>(args.from);
    uint32_t a[4];
    for (int i = 0; i < 4; i++) a[i] = ptx::ldg32(from + 16 * ptx::tid() + 4 * i);
    for (uint32_t i = ptx::tid(); i < N::value * 8; i += 128)
        ptx::sts(ptx::shared() + 16 * i, ptx::ldg128(from + 2048 + 16 * i));
    ptx::sync();
    float d[N::value / 2];
    float *const out = reinterpret_cast<float *>(args.sink) + N::value / 2 * ptx::tid();
    for (uint32_t i = 0; i < N::value / 2; i++) d[i] = out[i];
    ptx::wgmma_fence();
    ptx::wgmma_f16(d, a, ptx::wgmma_descriptor(ptx::shared() + args.repeats), args.bytes != 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (uint32_t i = 0; i < N::value / 2; i++) ptx::st(out + i, d[i]);
}
struct N64 { static constexpr uint32_t value = 64; };
struct N128 { static constexpr uint32_t value = 128; };
}
"""


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize("k16", [0, 3])
def test_wgmma_lanes(n, accumulate, k16):
    """Against CuTe's tables, and B as a 128-byte swizzle (piece p of row r at p ^ r % 8) of rows of 64 k, of which k16 picks 16."""
    rng = np.random.default_rng(n)
    a, b, d = (
        rng.integers(-9, 9, (64, 16)),
        rng.integers(-9, 9, (n, 64)),
        rng.integers(-99, 99, (64, n)).astype(np.float32),
    )
    registers = a.astype(np.float16).T.reshape(-1)[A_64X16]
    pieces = b.astype(np.float16).reshape(n, 8, 8)
    swizzled = np.take_along_axis(pieces, (np.arange(8)[None, :] ^ np.arange(n)[:, None] % 8)[:, :, None], 1)
    source = np.concatenate([np.ascontiguousarray(x).view(np.uint8).reshape(-1) for x in (registers, swizzled)])
    out = np.ascontiguousarray(d.T.reshape(-1)[d_64xn(n)])
    kernel = Kernel(f"n{n}", "", f"one_wgmma<assay::N{n}>", "assay_probe_read_args", 128, n * 128, 1)
    both = [
        Kernel(f"n{size}", "", f"one_wgmma<assay::N{size}>", "assay_probe_read_args", 128, size * 128, 1)
        for size in (64, 128)
    ]
    launch(library_of(unit_of(SOURCE, both)), kernel, 1,
           {"from": source, "sink": out, "repeats": 32 * k16, "bytes": accumulate}, seed=1)  # fmt: skip
    wanted = d * accumulate + a @ b[:, 16 * k16 : 16 * k16 + 16].T
    assert np.array_equal(out, wanted.T.reshape(-1)[d_64xn(n)])

"""Which lane holds what: the emulator's matrix instructions against CuTe's published layouts.

A layout is a shape and strides, nested alike, from (lane, value) to a position. The tables are those of CuTe's MMA_Traits and Copy_Traits
(github.com/NVIDIA/cutlass, include/cute/atom/mma_traits_sm80.hpp, copy_traits_sm75.hpp): positions of A are m + M k, of B n + N k, of
C m + M n, of ldmatrix bits of the 32 rows that the lanes name.
"""

import itertools

import numpy as np
import pytest
from emulator import Kernel, launch, library_of, unit_of
from w4 import bf16


def positions(shape, stride) -> np.ndarray:
    """A layout's values as an array [lanes, values]; the first of nested modes runs fastest."""

    def flat(mode_shape, mode_stride) -> np.ndarray:
        sizes = mode_shape if isinstance(mode_shape, tuple) else (mode_shape,)
        strides = mode_stride if isinstance(mode_stride, tuple) else (mode_stride,)
        return np.array(
            [
                sum(i * s for i, s in zip(reversed(at), strides, strict=True))
                for at in itertools.product(*map(range, reversed(sizes)))
            ]
        )

    return flat(shape[0], stride[0])[:, None] + flat(shape[1], stride[1])[None, :]


C_16X8 = positions(((4, 8), (2, 2)), ((32, 1), (16, 8)))
A_16X16 = positions(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128)))
B_8X16 = positions(((4, 8), (2, 2)), ((16, 1), (8, 64)))
A_16X32 = positions(((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256)))
B_8X32 = positions(((4, 8), (4, 2)), ((32, 1), (8, 128)))
LDMATRIX = positions((32, (32, 4)), (32, (1, 1024)))
LDMATRIX_X2 = positions((32, (32, 2)), (32, (1, 1024)))
LDMATRIX_TRANS = positions(((4, 8), (16, 2, 4)), ((256, 16), (1, 128, 1024)))

SOURCE = """
#include "assay_cuda.h"
#include "ptx.cuh"
namespace assay {
template <class C, void (*mma)(C (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
void one_mma(const assay_probe_read_args &args) {
    const uint32_t *from = static_cast<const uint32_t *>(args.from) + 6 * ptx::lane();
    const uint32_t a[4] = {from[0], from[1], from[2], from[3]}, b[2] = {from[4], from[5]};
    C c[4];
    C *const out = reinterpret_cast<C *>(args.sink) + 4 * ptx::lane();
    for (int i = 0; i < 4; i++) c[i] = out[i];
    mma(c, a, b);
    for (int i = 0; i < 4; i++) ptx::st(out + i, c[i]);
}
template <int N, void (*ldmatrix)(uint32_t (&)[N], const void *)>
void one_ldmatrix(const assay_probe_read_args &args) {
    uint8_t *const mine = ptx::shared() + 16 * ptx::lane();
    ptx::sts(mine, ptx::ldg128(static_cast<const uint8_t *>(args.from) + 16 * ptx::lane()));
    ptx::sync_warp();
    uint32_t r[N];
    ldmatrix(r, mine);
    for (int i = 0; i < N; i++) ptx::st(args.sink + N * ptx::lane() + i, r[i]);
}
}
"""
INSTANCES = {
    "f16": "one_mma<float COMMA assay::ptx::mma_f16>",
    "bf16": "one_mma<float COMMA assay::ptx::mma_bf16>",
    "s8": "one_mma<int32_t COMMA assay::ptx::mma_s8>",
    "x4": "one_ldmatrix<4 COMMA assay::ptx::ldmatrix_x4>",
    "x2": "one_ldmatrix<2 COMMA assay::ptx::ldmatrix_x2>",
    "trans": "one_ldmatrix<4 COMMA assay::ptx::ldmatrix_x4_trans>",
}


def run(which: str, source: np.ndarray, sink: np.ndarray):
    kernels = {
        name: Kernel(name, "", instance.replace(" COMMA", ","), "assay_probe_read_args", 32, 512, 1)
        for name, instance in INSTANCES.items()
    }
    launch(
        library_of(unit_of(SOURCE, list(kernels.values()))), kernels[which], 1, {"from": source, "sink": sink}, seed=1
    )


@pytest.mark.parametrize(
    ("name", "k", "a_layout", "b_layout"),
    [("f16", 16, A_16X16, B_8X16), ("bf16", 16, A_16X16, B_8X16), ("s8", 32, A_16X32, B_8X32)],
)
def test_mma(name, k, a_layout, b_layout):
    """Small integers: every product and sum is exact in any order."""
    rng = np.random.default_rng(k)
    a, b, c = rng.integers(-9, 9, (16, k)), rng.integers(-9, 9, (8, k)), rng.integers(-99, 99, (16, 8))
    store = {"f16": lambda x: x.astype(np.float16), "bf16": bf16, "s8": lambda x: x.astype(np.int8)}[name]
    parts = [store(x).T.reshape(-1)[layout] for x, layout in ((a, a_layout), (b, b_layout))]  # column-major positions
    source = np.concatenate([np.ascontiguousarray(p).view(np.uint32) for p in parts], axis=1)
    out = c.T.reshape(-1)[C_16X8].astype(np.int32 if name == "s8" else np.float32)
    run(name, np.ascontiguousarray(source), out)
    assert np.array_equal(out, (c + a @ b.T).T.reshape(-1)[C_16X8])


@pytest.mark.parametrize(("name", "layout"), [("x4", LDMATRIX), ("x2", LDMATRIX_X2), ("trans", LDMATRIX_TRANS)])
def test_ldmatrix(name, layout):
    rows = np.random.default_rng(1).integers(0, 256, 512, dtype=np.uint8)
    bits = np.unpackbits(rows, bitorder="little")
    registers = layout.shape[1] // 32
    out = np.zeros((32, registers), np.uint32)
    run(name, rows, out)
    assert np.array_equal(np.unpackbits(out.view(np.uint8), axis=1, bitorder="little"), bits[layout])

"""The library on another architecture: cross-compiled, run under an emulator. Portable C has the same bits as here, and the
dot-product kernels those of portable C."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import assay

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

MAIN = r"""
#include "assay.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

int main(void) {
    enum { N = 70, K = 128, M = 5, G = K / 32 };
    uint8_t qweight[N * K / 2], zeros[N * G];
    uint16_t scales[N * G];
    float a[M * K], c[M * N];
    for (int i = 0; i < N * K / 2; i++) qweight[i] = (uint8_t)next();
    for (int i = 0; i < N * G; i++) scales[i] = (uint16_t)(0x2000 + next() % 1024), zeros[i] = next() % 16;
    for (int i = 0; i < M * K; i++) a[i] = ((float)(next() % 20001) - 10000) * 1e-4f;
    void *packed = aligned_alloc(64, (assay_w4_packed_bytes(N, K, 32, 0) + 63) / 64 * 64);
    if (assay_w4_pack(N, K, 32, qweight, scales, zeros, packed, 2)) return 1;
    assay_w4 w = {N, K, 32, 0, packed};
    size_t bytes = assay_w4_gemm_workspace(&w, M, 1);
    void *scratch = malloc(bytes);
    for (int a16 = 0; a16 < 2; a16++) {
        int status = (a16 ? assay_w4a16_gemm : assay_w4a8_gemm)(&w, a, ASSAY_F32, K, M, c, N, -1, 2, scratch, bytes);
        if (status) return 2;
        for (int i = 0; i < M * N; i++) {
            uint32_t bits;
            memcpy(&bits, c + i, 4);
            printf("%08x\n", bits);
        }
    }
    return 0;
}
"""


#: Every GEMM of every shape, kind of weights and row count on both tiers; prints how many outputs it compared.
COMPARE = r"""
#include "assay.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 70, LONGEST = 256, ROWS = 13 };
static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u, state >> 8; }
static int tier_of(const char *wanted) {
    const char *name, *features;
    int supported, allowed;
    for (int i = 0; !assay_isa_info(i, &name, &features, &supported, &allowed); i++)
        if (!strcmp(name, wanted)) return allowed ? i : -2;
    return -2;
}

static uint8_t qweight[N * LONGEST], zeros[N * LONGEST / 16];
static uint16_t halves[N * LONGEST / 16];
static float scales[N * LONGEST / 16], minimum[N * LONGEST / 16], a[ROWS * LONGEST], c[2][ROWS * N];
static _Alignas(64) uint8_t packed[N * LONGEST * 4];
static uint8_t scratch[1 << 20];
static int scalar, dot, compared;

static int same(int m) {
    compared += m * N;
    return !memcmp(c[0], c[1], sizeof(float) * (size_t)(m * N));
}
static int check4(int k, int group, int symmetric, int m) {
    if (assay_w4_pack(N, k, group, qweight, halves, symmetric ? NULL : zeros, packed, 1)) return 0;
    const assay_w4 w = {N, k, group, symmetric, packed};
    for (int a16 = 0; a16 < 2; a16++) {
        for (int i = 0; i < 2; i++)
            if ((a16 ? assay_w4a16_gemm : assay_w4a8_gemm)(&w, a, ASSAY_F32, k, m, c[i], N, i ? dot : scalar, 2, scratch,
                                                           sizeof scratch)) return 0;
        if (!same(m)) return 0;
    }
    return 1;
}
static int check8(int k, int group, int m) {
    if (assay_w8_pack(N, k, group, (const int8_t *)qweight, halves, packed, 1)) return 0;
    const assay_w8 w = {N, k, group, packed};
    for (int i = 0; i < 2; i++)
        if (assay_w8a8_gemm(&w, a, ASSAY_F32, k, m, c[i], N, i ? dot : scalar, 2, scratch, sizeof scratch)) return 0;
    return same(m);
}
static int check_wide(int k, int group, int bits, int codebook, int low, int m) {
    if (assay_wide_pack(N, k, group, bits, qweight, scales, low ? minimum : NULL, packed, 1)) return 0;
    assay_wide w = {N, k, group, bits, low, {0}, packed};
    for (int i = 0; i < 16; i++) w.codebook[i] = codebook ? (float)(i * i - 127) : (float)i;
    for (int a16 = 0; a16 < 2; a16++) {
        for (int i = 0; i < 2; i++)
            if (assay_wide_gemm(&w, a, ASSAY_F32, k, m, c[i], N, a16, i ? dot : scalar, 2, scratch, sizeof scratch)) return 0;
        if (!same(m)) return 0;
    }
    return 1;
}

int main(void) {
    static const int shapes[][2] = {{64, 32}, {128, 64}, {256, 128}, {36, 36}, {99, 99}};
    static const int wide_shapes[][2] = {{48, 16}, {64, 32}, {36, 36}};
    scalar = tier_of("scalar"), dot = tier_of("neondot");
    if (dot < 0) return 3;
    for (size_t i = 0; i < sizeof qweight; i++) qweight[i] = (uint8_t)next();
    for (size_t i = 0; i < sizeof zeros; i++) {
        zeros[i] = next() % 16;
        halves[i] = (uint16_t)(0x2000 + next() % 1024);
        scales[i] = (float)next() * 1e-8f;
        minimum[i] = (float)next() * -1e-8f;
    }
    for (int i = 0; i < ROWS * LONGEST; i++) a[i] = ((float)(next() % 20001) - 10000) * 1e-4f;
    for (int m = 1; m <= ROWS; m += m < 7 ? 1 : 6) {
        for (int s = 0; s < 5; s++)
            if (!check4(shapes[s][0], shapes[s][1], 0, m) || !check4(shapes[s][0], shapes[s][1], 1, m) ||
                !check8(shapes[s][0], shapes[s][1], m)) return 1;
        for (int s = 0; s < 3; s++)
            for (int low = 0; low < 2; low++)
                for (int kind = 0; kind < 3; kind++)
                    if (!check_wide(wide_shapes[s][0], wide_shapes[s][1], kind < 2 ? 4 : 8, kind, low, m)) return 2;
    }
    printf("%d\n", compared);
    return 0;
}
"""


def run_there(folder, main, sources, *flags):
    """Compiles a program with the library for aarch64, runs it under the emulator and returns what it prints."""
    for tool in (COMPILER, EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    (folder / "main.c").write_text(main)
    subprocess.run(
        [COMPILER, "-std=gnu11", "-O1", "-ffp-contract=off", "-static", *flags, "-I", CSRC, "main.c", *CSRC.glob("*.c"),
         *sources, "-lm", "-lpthread", "-o", "check"], cwd=folder, check=True,
    )  # fmt: skip
    done = subprocess.run([EMULATOR, "./check"], cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.split()


def test_dot_product_kernels_equal_portable_c_bit_for_bit(tmp_path):
    sources = [*CSRC.glob("cpu/*/scalar.c"), *CSRC.glob("cpu/*/neondot.c")]
    (compared,) = run_there(tmp_path, COMPARE, sources, "-march=armv8.2-a+dotprod", "-DASSAY_COMPILED_neondot=1")
    rows = sum([1, 2, 3, 4, 5, 6, 7, 13])
    assert int(compared) == 70 * rows * (5 * (2 + 2 + 1) + 3 * 2 * 3 * 2)


def test_portable_c_under_emulation_has_the_same_bits(tmp_path):
    printed = run_there(tmp_path, MAIN, CSRC.glob("cpu/*/scalar.c"))
    got = np.array([int(line, 16) for line in printed], np.uint32).view(np.float32).reshape(2, 5, 70)

    # The same numbers from the same generator, here.
    state = 1

    def draw():
        nonlocal state
        state = (state * 1664525 + 1013904223) % 2**32
        return state >> 8

    qweight = np.array([draw() & 255 for _ in range(70 * 64)], np.uint8).reshape(70, 64)
    pairs = np.array([(0x2000 + draw() % 1024, draw() % 16) for _ in range(70 * 4)])
    scales = pairs[:, 0].astype(np.uint16).view(np.float16).reshape(70, 4)
    zeros = pairs[:, 1].astype(np.uint8).reshape(70, 4)
    a = ((np.array([draw() % 20001 for _ in range(5 * 128)], np.float32) - 10000) * np.float32(1e-4)).reshape(5, 128)
    w = assay.pack(qweight, scales, zeros)
    np.testing.assert_array_equal(got[0], assay.w4a8_gemm(a, w))
    np.testing.assert_array_equal(got[1], assay.w4a16_gemm(a, w))

"""The portable C on another architecture: cross-compiled, run under an emulator, same bits as here."""

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


def test_portable_c_under_emulation_has_the_same_bits(tmp_path):
    for tool in (COMPILER, EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    (tmp_path / "main.c").write_text(MAIN)
    sources = [*CSRC.glob("*.c"), *CSRC.glob("cpu/*/scalar.c")]
    subprocess.run(
        [COMPILER, "-std=gnu11", "-O1", "-ffp-contract=off", "-static", "-I", CSRC, "main.c", *sources, "-lm", "-lpthread",
         "-o", "check"], cwd=tmp_path, check=True,
    )  # fmt: skip
    done = subprocess.run([EMULATOR, "./check"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    got = np.array([int(line, 16) for line in done.stdout.split()], np.uint32).view(np.float32).reshape(2, 5, 70)

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

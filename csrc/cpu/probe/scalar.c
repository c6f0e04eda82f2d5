/* Probes in portable C: what a compiler makes of plain loops. */
#include "../../kernels.h"
#include "../vexp.h"

#include <math.h>
#include <string.h>

static uint64_t read_all(const void *buffer, size_t bytes, size_t ahead) {
    const uint8_t *at = buffer;
    uint64_t sum[4] = {0}, word;
    size_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
        if (ahead) __builtin_prefetch(at + i + ahead);
        for (int j = 0; j < 8; j++) {
            memcpy(&word, at + i + 8 * j, 8);
            sum[j % 4] ^= word;
        }
    }
    for (; i < bytes; i++) sum[0] ^= at[i];
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

/* Sixteen int8 products into sixteen int32 sums an iteration. */
static double int8(int64_t iterations) {
    int8_t w[16], x[16];
    int32_t acc[16] = {0};
    for (int i = 0; i < 16; i++) w[i] = (int8_t)(i - 8), x[i] = (int8_t)(3 * i + 1);
    for (int64_t n = 0; n < iterations; n++) {
        for (int i = 0; i < 16; i++) acc[i] += w[i] * x[i];
        __asm__ volatile("" : : "r"(acc), "r"(w), "r"(x) : "memory");
    }
    return 32.0 * (double)iterations;
}

static double fp32(int64_t iterations) {
    float w[16], acc[16] = {0};
    for (int i = 0; i < 16; i++) w[i] = 1.0f + (float)i;
    for (int64_t n = 0; n < iterations; n++) {
        for (int i = 0; i < 16; i++) acc[i] += w[i] * 0.5f;
        __asm__ volatile("" : : "r"(acc), "r"(w) : "memory");
    }
    return 32.0 * (double)iterations;
}

static double exponentials(int64_t iterations) {
    enum { ELEMENTS = 2048 };
    float x[ELEMENTS], sum[16] = {0};
    for (int i = 0; i < ELEMENTS; i++) x[i] = -0.01f * (float)i;
    for (int64_t n = 0; n < iterations; n++) {
        for (int i = 0; i < ELEMENTS; i++) sum[i % 16] += assay_vexp(x[i] - 0.5f);
        __asm__ volatile("" : : "r"(x), "r"(sum) : "memory");
    }
    return (double)ELEMENTS * (double)iterations;
}

const assay_probe_kernel assay_probe_scalar = {read_all, int8, fp32, exponentials};

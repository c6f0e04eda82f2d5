/* float16 and bfloat16 to float32 in portable C: exact for every finite value, infinities and NaNs kept. */
#ifndef ASSAY_FLOAT16_H
#define ASSAY_FLOAT16_H

#include <stdint.h>
#include <string.h>

static inline float assay_f32_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline float assay_f32_of_bf16(uint16_t h) { return assay_f32_of_bits((uint32_t)h << 16); }

static inline float assay_f32_of_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return assay_f32_of_bits(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    if (exponent) return assay_f32_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    const float f = (float)mantissa * 0x1p-24f; /* zero and subnormals */
    return sign ? -f : f;
}

/* Element i of a row of the given assay dtype. */
static inline float assay_load_f32(const void *row, int dtype, int64_t i) {
    if (dtype == 0) return ((const float *)row)[i];
    const uint16_t h = ((const uint16_t *)row)[i];
    return dtype == 1 ? assay_f32_of_f16(h) : assay_f32_of_bf16(h);
}

/* The same as a16 takes it: a bfloat16 below 2^-100 in size is zero (assay.h). */
static inline float assay_load_a16(const void *row, int dtype, int64_t i) {
    const float x = assay_load_f32(row, dtype, i);
    return dtype == 2 && x > -0x1p-100f && x < 0x1p-100f ? 0 : x;
}

#endif

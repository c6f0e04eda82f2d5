/* exp(x) in float32 for x <= 0, the same bits in every variant.
 *
 *   z = fma(x, log2(e), 1.5 2^23);  n = z - 1.5 2^23      n = x log2(e) rounded to nearest even; its integer is in z's low bits
 *   r = fma(n, -ln2_low, fma(n, -ln2_high, x))            |r| <= ln(2) / 2
 *   p = 1 + c1 r + ... + c5 r^5                           Horner by FMA; coefficients: minimax for p / exp(r) - 1 with p(0) = 1
 *   exp(x) = p 2^n                                        n is added to p's exponent
 *
 * Relative error below 1.7e-7 (tests/test_spec_verify.py measures it). x < -87 gives 0: below it p 2^n could be
 * subnormal, and flushed or not by the mode of the caller's thread. exp(0) = 1 and exp(-infinity) = 0 exactly. */
#ifndef ASSAY_VEXP_H
#define ASSAY_VEXP_H

/* Functions that CUDA kernels take too, from behind ptx.cuh: the same bits there. */
#ifdef __CUDACC__
#define ASSAY_SHARED static __device__ __forceinline__
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#define ASSAY_SHARED static inline
#endif

#define VEXP_LOG2E 0x1.715476p+0f
#define VEXP_MAGIC 0x1.8p+23f
#define VEXP_LN2_HIGH 0x1.62e4p-1f
#define VEXP_LN2_LOW 0x1.7f7d1cp-20f
#define VEXP_C5 0x1.0fa7ep-7f
#define VEXP_C4 0x1.573adp-5f
#define VEXP_C3 0x1.555a6ep-3f
#define VEXP_C2 0x1.fffdc4p-2f
#define VEXP_C1 0x1.fffff6p-1f
#define VEXP_LEAST -87.0f

ASSAY_SHARED float assay_vexp(float x) {
    const float z = fmaf(x, VEXP_LOG2E, VEXP_MAGIC);
    const float n = z - VEXP_MAGIC;
    const float r = fmaf(n, -VEXP_LN2_LOW, fmaf(n, -VEXP_LN2_HIGH, x));
    float p = VEXP_C5;
    p = fmaf(p, r, VEXP_C4);
    p = fmaf(p, r, VEXP_C3);
    p = fmaf(p, r, VEXP_C2);
    p = fmaf(p, r, VEXP_C1);
    p = fmaf(p, r, 1.0f);
    uint32_t bits, exponent;
    memcpy(&bits, &p, 4);
    memcpy(&exponent, &z, 4);
    bits += exponent << 23;
    memcpy(&p, &bits, 4);
    return x < VEXP_LEAST ? 0.0f : p;
}

/* Sums run in 16 lanes, element i in lane i mod 16, which are folded in this order. */
ASSAY_SHARED float assay_fold16(const float lane[16]) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

#endif

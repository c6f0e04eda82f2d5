/* What the AVX-512 kernels share: vexp.h on sixteen lanes, its fold, and loads of 16 logits of any type. */
#ifndef ASSAY_VEXP_AVX512_H
#define ASSAY_VEXP_AVX512_H

#include "vexp_avx2.h"

INLINE __m512 vexp16(__m512 x) {
    const __m512 z = _mm512_fmadd_ps(x, _mm512_set1_ps(VEXP_LOG2E), _mm512_set1_ps(VEXP_MAGIC));
    const __m512 n = _mm512_sub_ps(z, _mm512_set1_ps(VEXP_MAGIC));
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-VEXP_LN2_HIGH), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-VEXP_LN2_LOW), r);
    __m512 p = _mm512_set1_ps(VEXP_C5);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(VEXP_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(VEXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(VEXP_C2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(VEXP_C1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    /* p 2^n in one instruction, exact where x is not below the least, and zero under the same mask: two operations beside
     * the compare fewer than adding to the exponent and moving. A NaN stays one. */
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(VEXP_LEAST), _CMP_NLT_UQ), p, n);
}

INLINE float fold16(__m512 s) {
    return fold8(_mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1)));
}

INLINE float hmax16(__m512 v) {
    return hmax8(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

INLINE __m512 load16(const void *row, int dtype, int64_t i) {
    if (dtype == ASSAY_F32) return _mm512_loadu_ps((const float *)row + i);
    const __m256i h = _mm256_loadu_si256((const __m256i *)((const uint16_t *)row + i));
    if (dtype == ASSAY_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

#endif

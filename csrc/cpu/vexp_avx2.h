/* What the AVX2 kernels share: vexp.h on eight lanes, its fold, and loads of 16 logits of any type. */
#ifndef ASSAY_VEXP_AVX2_H
#define ASSAY_VEXP_AVX2_H

#include "../assay.h"
#include "vexp.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

INLINE __m256 vexp8(__m256 x) {
    const __m256 z = _mm256_fmadd_ps(x, _mm256_set1_ps(VEXP_LOG2E), _mm256_set1_ps(VEXP_MAGIC));
    const __m256 n = _mm256_sub_ps(z, _mm256_set1_ps(VEXP_MAGIC));
    __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-VEXP_LN2_HIGH), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(-VEXP_LN2_LOW), r);
    __m256 p = _mm256_set1_ps(VEXP_C5);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(VEXP_C4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(VEXP_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(VEXP_C2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(VEXP_C1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(z), 23));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(VEXP_LEAST), _CMP_LT_OQ), _mm256_castsi256_ps(bits));
}

INLINE float fold8(__m256 s) {
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

INLINE float hmax8(__m256 v) {
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

/* Elements i .. i + 7 of a row; dtype is a constant wherever this is inlined. */
INLINE __m256 load8(const void *row, int dtype, int64_t i) {
    if (dtype == ASSAY_F32) return _mm256_loadu_ps((const float *)row + i);
    const __m128i h = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (dtype == ASSAY_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

#endif

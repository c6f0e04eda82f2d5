/* Passes over a block of logits with AVX2 and FMA (spec_verify.h states them).
 *
 * largest: per 32 float32 4 loads, 4 vmaxps, 2 vcmpps (one finds a NaN in either of two vectors), 2 vorps: bound by the
 *   loads, 32 bytes a cycle from L2. vmaxps drops a NaN in its first operand, hence the compares.
 * weights: per 8 elements load, sub, mul, and vexp's 8 FMA-class, 1 sub, 2 integer, 2 mask operations, add, store: about 14
 *   on two FMA pipes (Zen 3) or ports 0 and 1 (Intel): 6 to 7 cycles, several times what memory needs. The sum's add is
 *   4 cycles behind the last one, hidden by the other 12. Block and weights (16 KB together) stay in L1. */
#include "spec_verify.h"
#include "../row_tail.h"
#include "../vexp_avx2.h"

#include <float.h>

INLINE __m256 unordered(__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }

INLINE float largest_of(const void *row, int dtype, int64_t n) {
    __m256 m0 = _mm256_set1_ps(-INFINITY), m1 = m0, m2 = m0, m3 = m0, nan = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256 a = load8(row, dtype, i), b = load8(row, dtype, i + 8);
        const __m256 c = load8(row, dtype, i + 16), d = load8(row, dtype, i + 24);
        m0 = _mm256_max_ps(a, m0);
        m1 = _mm256_max_ps(b, m1);
        m2 = _mm256_max_ps(c, m2);
        m3 = _mm256_max_ps(d, m3);
        nan = _mm256_or_ps(nan, _mm256_or_ps(unordered(a, b), unordered(c, d)));
    }
    assay_tail tail;
    for (; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        const __m256 a = load8(at, dtype, whole ? i : 0), b = load8(at, dtype, whole ? i + 8 : 8);
        m0 = _mm256_max_ps(a, m0);
        m1 = _mm256_max_ps(b, m1);
        nan = _mm256_or_ps(nan, unordered(a, b));
    }
    if (_mm256_movemask_ps(nan)) return NAN;
    return hmax8(_mm256_max_ps(_mm256_max_ps(m0, m1), _mm256_max_ps(m2, m3)));
}

INLINE int64_t find_in(const void *row, int dtype, int64_t n, float value) {
    const __m256 wanted = _mm256_set1_ps(value);
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        const __m256 a = load8(at, dtype, whole ? i : 0), b = load8(at, dtype, whole ? i + 8 : 8);
        const unsigned hit = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, wanted, _CMP_EQ_OQ)) |
                             (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(b, wanted, _CMP_EQ_OQ)) << 8;
        if (hit) return i + __builtin_ctz(hit);
    }
    return -1;
}

INLINE float weights_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *out) {
    const __m256 m = _mm256_set1_ps(shift), t = _mm256_set1_ps(inverse_t);
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        const __m256 a = load8(at, dtype, whole ? i : 0), b = load8(at, dtype, whole ? i + 8 : 8);
        const __m256 e0 = vexp8(_mm256_mul_ps(_mm256_sub_ps(a, m), t));
        const __m256 e1 = vexp8(_mm256_mul_ps(_mm256_sub_ps(b, m), t));
        _mm256_storeu_ps(out + i, e0);
        _mm256_storeu_ps(out + i + 8, e1);
        s0 = _mm256_add_ps(s0, e0);
        s1 = _mm256_add_ps(s1, e1);
    }
    return fold8(_mm256_add_ps(s0, s1));
}

/* Eight elements of the residual; collects in *bad where q is no probability. */
INLINE __m256 excess(__m256 x, __m256 q, __m256 shift, __m256 inverse_t, __m256 scale, __m256 c, __m256 *bad) {
    const __m256 p = _mm256_mul_ps(vexp8(_mm256_mul_ps(_mm256_sub_ps(x, shift), inverse_t)), scale);
    *bad = _mm256_or_ps(*bad, _mm256_or_ps(_mm256_cmp_ps(q, _mm256_setzero_ps(), _CMP_NGE_UQ),
                                           _mm256_cmp_ps(q, _mm256_set1_ps(FLT_MAX), _CMP_NLE_UQ)));
    return _mm256_max_ps(_mm256_sub_ps(p, _mm256_mul_ps(q, c)), _mm256_setzero_ps());
}

INLINE float residual_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, float scale, const float *q,
                         float c, float *out) {
    const __m256 m = _mm256_set1_ps(shift), t = _mm256_set1_ps(inverse_t);
    const __m256 a = _mm256_set1_ps(scale), cs = _mm256_set1_ps(c);
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, bad = s0;
    assay_tail tail;
    float q_tail[16] = {0};
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        const float *q_at = whole ? q + i : q_tail;
        if (!whole) memcpy(q_tail, q + i, (size_t)(n - i) * 4);
        const __m256 e0 = excess(load8(at, dtype, whole ? i : 0), _mm256_loadu_ps(q_at), m, t, a, cs, &bad);
        const __m256 e1 = excess(load8(at, dtype, whole ? i + 8 : 8), _mm256_loadu_ps(q_at + 8), m, t, a, cs, &bad);
        _mm256_storeu_ps(out + i, e0);
        _mm256_storeu_ps(out + i + 8, e1);
        s0 = _mm256_add_ps(s0, e0);
        s1 = _mm256_add_ps(s1, e1);
    }
    return _mm256_movemask_ps(bad) ? NAN : fold8(_mm256_add_ps(s0, s1));
}

#include "by_type.h"

const assay_spec_verify_kernel assay_spec_verify_avx2 = {largest, find, weights, residual};

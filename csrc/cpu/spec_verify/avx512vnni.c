/* Passes over a block of logits with AVX-512 (spec_verify.h states them).
 *
 * largest: per 64 float32 4 loads, 4 vmaxps, 2 vcmpps to a mask (one finds a NaN in either of two vectors), 2 korw: bound by
 *   the loads. vmaxps drops a NaN in its first operand, hence the compares.
 * weights: per 16 elements load, sub, mul, and vexp's 8 FMA-class, 1 sub, 2 integer operations, a compare and a masked move,
 *   add, store: about 15 on the two 512-bit pipes, 7 to 8 cycles. The sum's add is hidden behind the rest. Block and
 *   weights (16 KB together) stay in L1. */
#include "spec_verify.h"
#include "../row_tail.h"
#include "../vexp_avx512.h"

#include <float.h>

INLINE unsigned unordered(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }

INLINE float largest_of(const void *row, int dtype, int64_t n) {
    __m512 m0 = _mm512_set1_ps(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
    unsigned nan = 0;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        const __m512 a = load16(row, dtype, i), b = load16(row, dtype, i + 16);
        const __m512 c = load16(row, dtype, i + 32), d = load16(row, dtype, i + 48);
        m0 = _mm512_max_ps(a, m0);
        m1 = _mm512_max_ps(b, m1);
        m2 = _mm512_max_ps(c, m2);
        m3 = _mm512_max_ps(d, m3);
        nan |= unordered(a, b) | unordered(c, d);
    }
    assay_tail tail;
    for (; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 a = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        m0 = _mm512_max_ps(a, m0);
        nan |= unordered(a, a);
    }
    return nan ? NAN : hmax16(_mm512_max_ps(_mm512_max_ps(m0, m1), _mm512_max_ps(m2, m3)));
}

INLINE int64_t find_in(const void *row, int dtype, int64_t n, float value) {
    const __m512 wanted = _mm512_set1_ps(value);
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 a = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        const unsigned hit = _mm512_cmp_ps_mask(a, wanted, _CMP_EQ_OQ);
        if (hit) return i + __builtin_ctz(hit);
    }
    return -1;
}

INLINE float weights_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *out) {
    const __m512 m = _mm512_set1_ps(shift), t = _mm512_set1_ps(inverse_t);
    __m512 sum = _mm512_setzero_ps();
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 a = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        const __m512 e = vexp16(_mm512_mul_ps(_mm512_sub_ps(a, m), t));
        _mm512_storeu_ps(out + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    return fold16(sum);
}

INLINE float residual_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, float scale, const float *q,
                         float c, float *out) {
    const __m512 m = _mm512_set1_ps(shift), t = _mm512_set1_ps(inverse_t);
    const __m512 a = _mm512_set1_ps(scale), cs = _mm512_set1_ps(c);
    const __m512 zero = _mm512_setzero_ps(), most = _mm512_set1_ps(FLT_MAX);
    __m512 sum = zero;
    unsigned bad = 0;
    assay_tail tail;
    float q_tail[16] = {0};
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 x = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        if (!whole) memcpy(q_tail, q + i, (size_t)(n - i) * 4);
        const __m512 qi = _mm512_loadu_ps(whole ? q + i : q_tail);
        const __m512 p = _mm512_mul_ps(vexp16(_mm512_mul_ps(_mm512_sub_ps(x, m), t)), a);
        const __m512 e = _mm512_max_ps(_mm512_sub_ps(p, _mm512_mul_ps(qi, cs)), zero);
        bad |= (unsigned)_mm512_cmp_ps_mask(qi, zero, _CMP_NGE_UQ) | (unsigned)_mm512_cmp_ps_mask(qi, most, _CMP_NLE_UQ);
        _mm512_storeu_ps(out + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    return bad ? NAN : fold16(sum);
}

#include "by_type.h"

const assay_spec_verify_kernel assay_spec_verify_avx512vnni = {largest, find, weights, residual};

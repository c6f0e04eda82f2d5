/* Passes over a block of logits with AVX2 and FMA (spec_verify.h states them).
 *
 * largest: per 32 float32 4 loads, 4 vmaxps, 2 vcmpps (one finds a NaN in either of two vectors), 2 vorps: bound by the
 *   loads, 32 bytes a cycle from L2. vmaxps drops a NaN in its first operand, hence the compares.
 * weights: per 8 elements load, sub, mul, and vexp's 8 FMA-class, 1 sub, 2 integer, 2 mask operations, add, store: about 14
 *   on two FMA pipes (Zen 3) or ports 0 and 1 (Intel): 6 to 7 cycles, several times what memory needs. The sum's add is
 *   4 cycles behind the last one, hidden by the other 12. Block and weights (16 KB together) stay in L1. */
#include "mass.h"
#include "race.h"
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

INLINE float peak_of(const void *row, int dtype, int64_t n) { return largest_of(row, dtype, n); }

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

INLINE int64_t select_in(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where) {
    const __m256 bound = _mm256_set1_ps(least);
    int64_t count = 0;
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        float x[16];
        const __m256 a = load8(at, dtype, whole ? i : 0), b = load8(at, dtype, whole ? i + 8 : 8);
        unsigned hits = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, bound, _CMP_GE_OQ)) |
                        (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(b, bound, _CMP_GE_OQ)) << 8;
        if (!hits) continue;
        _mm256_storeu_ps(x, a);
        _mm256_storeu_ps(x + 8, b);
        for (; hits; hits &= hits - 1) {
            const int j = __builtin_ctz(hits);
            values[count] = x[j];
            if (where) where[count] = (int32_t)i + j;
            count++;
        }
    }
    return count;
}

/* Eight elements as the range leaves them; the first is the row's element i. */
INLINE __m256 kept(__m256 a, const assay_range *range, int64_t i) {
    const __m256 inner = _mm256_and_ps(_mm256_cmp_ps(a, _mm256_set1_ps(range->low), _CMP_GT_OQ),
                                       _mm256_cmp_ps(a, _mm256_set1_ps(range->high), _CMP_LT_OQ));
    const __m256 outer = _mm256_and_ps(_mm256_cmp_ps(a, _mm256_set1_ps(range->least), _CMP_GE_OQ),
                                       _mm256_cmp_ps(a, _mm256_set1_ps(range->most), _CMP_LE_OQ));
    const int64_t left = range->last + 1 - i;
    const __m256i early = _mm256_cmpgt_epi32(_mm256_set1_epi32(left < 0 ? 0 : left > 8 ? 8 : (int)left),
                                             _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    const __m256 in = _mm256_or_ps(inner, _mm256_and_ps(outer, _mm256_castsi256_ps(early)));
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), a, in);
}

INLINE float keep_in(const void *row, int dtype, int64_t n, const assay_range *range, float *out) {
    __m256 m = _mm256_set1_ps(-INFINITY);
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        const __m256 a = kept(load8(at, dtype, whole ? i : 0), range, i);
        const __m256 b = kept(load8(at, dtype, whole ? i + 8 : 8), range, i + 8);
        m = _mm256_max_ps(m, _mm256_max_ps(a, b));
        if (whole) {
            _mm256_storeu_ps(out + i, a);
            _mm256_storeu_ps(out + i + 8, b);
        } else {
            float last[16];
            _mm256_storeu_ps(last, a);
            _mm256_storeu_ps(last + 8, b);
            memcpy(out + i, last, (size_t)(n - i) * 4);
        }
    }
    return hmax8(m);
}

INLINE int64_t sum_of_int32(__m256i v) {
    int32_t lanes[8];
    int64_t sum = 0;
    _mm256_storeu_si256((__m256i *)lanes, v);
    for (int j = 0; j < 8; j++) sum += lanes[j];
    return sum;
}

static void tally(const float *values, const float *weights, int64_t n, float pivot, assay_mass *above, assay_mass *equal) {
    const __m256 p = _mm256_set1_ps(pivot), one = _mm256_set1_ps(1), fine = _mm256_set1_ps(MASS_LOW);
    for (int64_t from = 0; from < n; from += 8 * MASS_STEPS) {
        const int64_t end = assay_min_i64(n, from + 8 * MASS_STEPS);
        __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t i = from; i < end; i += 8) {
            const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)assay_min_i64(end - i, 8)),
                                                     _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
            const __m256 v = _mm256_maskload_ps(values + i, there), w = _mm256_maskload_ps(weights + i, there);
            const __m256 whole = _mm256_add_ps(w, one);
            const __m256 rest = _mm256_add_ps(_mm256_sub_ps(w, _mm256_sub_ps(whole, one)), fine);
            const __m256i h = _mm256_sub_epi32(_mm256_castps_si256(whole), _mm256_castps_si256(one));
            const __m256i l = _mm256_sub_epi32(_mm256_castps_si256(rest), _mm256_castps_si256(fine));
            const __m256i more = _mm256_castps_si256(_mm256_cmp_ps(v, p, _CMP_GT_OQ)); /* weight 0 where nothing is there */
            const __m256i same = _mm256_castps_si256(_mm256_cmp_ps(v, p, _CMP_EQ_OQ));
            sums[0] = _mm256_add_epi32(sums[0], _mm256_and_si256(more, h));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_and_si256(more, l));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_and_si256(same, h));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_and_si256(same, l));
        }
        above->high += sum_of_int32(sums[0]);
        above->low += sum_of_int32(sums[1]);
        equal->high += sum_of_int32(sums[2]);
        equal->low += sum_of_int32(sums[3]);
    }
}

static int64_t between(const float *values, const float *weights, int64_t n, float low, float high, float *values_out,
                       float *weights_out) {
    const __m256 least = _mm256_set1_ps(low), most = _mm256_set1_ps(high);
    int64_t count = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_loadu_ps(values + i);
        unsigned hits = (unsigned)_mm256_movemask_ps(
            _mm256_and_ps(_mm256_cmp_ps(v, least, _CMP_GT_OQ), _mm256_cmp_ps(v, most, _CMP_LT_OQ)));
        for (; hits; hits &= hits - 1) {
            const int64_t at = i + __builtin_ctz(hits);
            values_out[count] = values[at]; /* in place it is at or before what it came from */
            weights_out[count++] = weights[at];
        }
    }
    for (; i < n; i++)
        if (values[i] > low && values[i] < high) {
            values_out[count] = values[i];
            weights_out[count++] = weights[i];
        }
    return count;
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
        const float *q_at = assay_q_from(q, i, n, q_tail);
        const __m256 e0 = excess(load8(at, dtype, whole ? i : 0), _mm256_loadu_ps(q_at), m, t, a, cs, &bad);
        const __m256 e1 = excess(load8(at, dtype, whole ? i + 8 : 8), _mm256_loadu_ps(q_at + 8), m, t, a, cs, &bad);
        _mm256_storeu_ps(out + i, e0);
        _mm256_storeu_ps(out + i + 8, e1);
        s0 = _mm256_add_ps(s0, e0);
        s1 = _mm256_add_ps(s1, e1);
    }
    return _mm256_movemask_ps(bad) ? NAN : fold8(_mm256_add_ps(s0, s1));
}

INLINE void residuals_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, const float *scales,
                         const float *q, float *sums) {
    const __m256 m = _mm256_set1_ps(shift), t = _mm256_set1_ps(inverse_t), zero = _mm256_setzero_ps();
    __m256 sum[ASSAY_SPEC_SHARES][2], bad = zero;
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++) sum[j][0] = sum[j][1] = zero;
    assay_tail tail;
    float q_tail[16] = {0};
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        const float *q_at = assay_q_from(q, i, n, q_tail);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m256 x = load8(at, dtype, (whole ? i : 0) + 8 * half), qi = _mm256_loadu_ps(q_at + 8 * half);
            const __m256 e = vexp8(_mm256_mul_ps(_mm256_sub_ps(x, m), t));
            bad = _mm256_or_ps(bad, _mm256_or_ps(_mm256_cmp_ps(qi, zero, _CMP_NGE_UQ),
                                                 _mm256_cmp_ps(qi, _mm256_set1_ps(FLT_MAX), _CMP_NLE_UQ)));
#pragma GCC unroll 4
            for (int j = 0; j < ASSAY_SPEC_SHARES; j++) {
                const __m256 excess = _mm256_sub_ps(_mm256_mul_ps(e, _mm256_set1_ps(scales[j])), qi);
                sum[j][half] = _mm256_add_ps(sum[j][half], _mm256_max_ps(excess, zero));
            }
        }
    }
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++)
        sums[j] = _mm256_movemask_ps(bad) ? NAN : fold8(_mm256_add_ps(sum[j][0], sum[j][1]));
}

INLINE float sum_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, const void *ahead, int64_t next_n,
                    float *next_peak) {
    const __m256 m = _mm256_set1_ps(shift), t = _mm256_set1_ps(inverse_t);
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        _mm_prefetch((const char *)ahead + i * (dtype == ASSAY_F32 ? 4 : 2), _MM_HINT_T0);
        const __m256 a = load8(at, dtype, whole ? i : 0), b = load8(at, dtype, whole ? i + 8 : 8);
        s0 = _mm256_add_ps(s0, vexp8(_mm256_mul_ps(_mm256_sub_ps(a, m), t)));
        s1 = _mm256_add_ps(s1, vexp8(_mm256_mul_ps(_mm256_sub_ps(b, m), t)));
    }
    if (next_n) *next_peak = peak_of((const uint8_t *)row + n * (dtype == ASSAY_F32 ? 4 : 2), dtype, next_n);
    return fold8(_mm256_add_ps(s0, s1));
}

INLINE float moment_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *total) {
    const __m256 m = _mm256_set1_ps(shift), t = _mm256_set1_ps(inverse_t), zero = _mm256_setzero_ps();
    __m256 s[2] = {zero, zero}, moment[2] = {zero, zero};
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        for (int half = 0; half < 2; half++) {
            const __m256 z = _mm256_mul_ps(_mm256_sub_ps(load8(at, dtype, (whole ? i : 0) + 8 * half), m), t), e = vexp8(z);
            const __m256 counts = _mm256_cmp_ps(e, zero, _CMP_GT_OQ); /* 0 times minus infinity is to count 0 */
            s[half] = _mm256_add_ps(s[half], e);
            moment[half] = _mm256_add_ps(moment[half], _mm256_and_ps(counts, _mm256_mul_ps(e, z)));
        }
    }
    *total = fold8(_mm256_add_ps(s[0], s[1]));
    return fold8(_mm256_add_ps(moment[0], moment[1]));
}

/* Four counters, hence eight elements, at a time: a word in the lower half of each 64-bit lane, what is above it never
 * read, so that a round is two products, two shifts and four xors. */
static void race(const float *weights, int64_t n, int64_t first, assay_race *race) {
    const assay_race_start start = assay_race_begin(race);
    const __m256i m0 = _mm256_set1_epi64x(PHILOX_M0), m1 = _mm256_set1_epi64x(PHILOX_M1);
    const __m256i x0 = _mm256_set1_epi64x(start.x[0]), x1 = _mm256_set1_epi64x(start.x[1]);
    const __m256i x2 = _mm256_set1_epi64x(start.x[2]), x3 = _mm256_set1_epi64x(start.x[3]);
    const __m256i lanes = _mm256_set_epi64x(3, 2, 1, 0);
    const __m256 margin = _mm256_set1_ps(RACE_MARGIN_F32 * 0x1p-32f);
    __m256 best = _mm256_set1_ps((float)race->time);
    for (int64_t i = 0; i < n; i += 8) {
        const __m256 w = _mm256_loadu_ps(weights + i), racing = _mm256_cmp_ps(w, _mm256_setzero_ps(), _CMP_GT_OQ);
        if (!_mm256_movemask_ps(racing)) continue;
        const __m256i index = _mm256_add_epi64(_mm256_set1_epi64x((first + i) / 2), lanes);
        __m256i a = x0, b = x1, c = _mm256_xor_si256(x2, index), d = x3;
        uint32_t key0 = start.key[0], key1 = start.key[1];
        for (int round = 1; round < 10; round++, key0 += PHILOX_W0, key1 += PHILOX_W1) {
            const __m256i p = _mm256_mul_epu32(a, m0), q = _mm256_mul_epu32(c, m1);
            a = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q, 32), b), _mm256_set1_epi64x(key0));
            c = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), d), _mm256_set1_epi64x(key1));
            b = q;
            d = p;
        }
        /* The higher words, in the order of the elements: u is this over 2^32 or more. The conversion is of 31 bits. */
        const __m256i high = _mm256_blend_epi32(b, _mm256_slli_epi64(d, 32), 0xAA);
        const __m256 least = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(high, 1)), _mm256_add_ps(margin, margin));
        const __m256 hopeful = _mm256_cmp_ps(least, _mm256_mul_ps(best, w), _CMP_NGT_UQ);
        unsigned left = (unsigned)_mm256_movemask_ps(_mm256_and_ps(racing, hopeful));
        if (!left) continue;
        uint32_t lows[8], highs[8];
        _mm256_storeu_si256((__m256i *)lows, _mm256_blend_epi32(a, _mm256_slli_epi64(c, 32), 0xAA));
        _mm256_storeu_si256((__m256i *)highs, high);
        for (; left; left &= left - 1) {
            const int j = __builtin_ctz(left);
            assay_race_try(race, lows[j], highs[j], weights[i + j], first + i + j);
        }
        best = _mm256_set1_ps((float)race->time);
    }
}

#include "by_type.h"

const assay_spec_verify_kernel assay_spec_verify_avx2 = {largest, peak,    find, select, keep,     tally,
                                                        between, weights, sum,  moment, residual, residuals, race};

/* Passes over a block of logits with AVX-512 (spec_verify.h states them).
 *
 * largest, float32: per 16 elements a load, a vmaxps, half a vcmpps to a mask (one finds a NaN in either of two vectors) and
 *   half a korw. Eight maxima: vmaxps takes 4 cycles and two start in each. vmaxps drops a NaN in its first operand, hence the
 *   compares. 16 bits: 32 elements at a time as integers, the largest as signed, the largest and the least as unsigned: the
 *   first is the answer, or when all are negative the last; NaNs lie beyond infinity in the first two.
 * peak: the same without compares and prefetches, which in float32 may drop a NaN: the sum that follows shows it.
 * weights: per 16 elements load, sub, mul, and vexp's 9 FMA-class, 1 sub, 1 compare, and add, store: 14 on the two 512-bit
 *   ports of Intel's, 7 cycles; four pipes (Zen 5): 4 to 5. The sum's add is hidden behind the rest. Block and weights (16 KB
 *   together) stay in L1.
 * sum: the same without the store and where T = 1 without the mul, 13 operations, and one for the next block's peak, whose
 *   latency this hides; prefetches of the block behind: memory works while the ports do.
 * residuals: per 16 elements 14 for the weight, 2 to check q, and for each of four sums a mul, a sub, a max and an add: 32, 16 cycles,
 *   where four of residual's would take 10 each.
 * race: per 16 elements 9 rounds of 6 operations and some 8 more: 16 cycles on four pipes. */
#include "mass.h"
#include "race.h"
#include "../row_tail.h"
#include "../vexp_avx512.h"

#include <float.h>

INLINE unsigned unordered(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }

/* The hardware's prefetch ends with the page: a line for every load, from 4 KB ahead. A hint, so it may leave the row. */
INLINE void fetch_ahead(const void *at, int bytes) {
    enum { AHEAD_BYTES = 4096 };
    for (int line = 0; line < bytes; line += 64) _mm_prefetch((const char *)at + AHEAD_BYTES + line, _MM_HINT_T0);
}

/* checked: a NaN is answered by NaN, and what follows the block is fetched. */
INLINE float peak_f32(const float *row, int64_t n, int checked) {
    __m512 m[8];
    unsigned nan = 0;
    for (int j = 0; j < 8; j++) m[j] = _mm512_set1_ps(-INFINITY);
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
        if (checked) fetch_ahead(row + i, 512);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const __m512 a = _mm512_loadu_ps(row + i + 16 * j);
            m[j] = _mm512_max_ps(a, m[j]);
            if (checked && j % 2) nan |= unordered(a, _mm512_loadu_ps(row + i + 16 * j - 16));
        }
    }
    assay_tail tail;
    for (; i < n; i += 16) {
        const __m512 a = _mm512_loadu_ps(i + 16 <= n ? row + i : assay_tail_of(&tail, row, ASSAY_F32, i, n));
        m[0] = _mm512_max_ps(a, m[0]);
        if (checked) nan |= unordered(a, a);
    }
    for (int j = 0; j < 4; j++) m[j] = _mm512_max_ps(m[j], m[j + 4]);
    return nan ? NAN : hmax16(_mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3])));
}

/* The least of 16 unsigned words. */
INLINE unsigned least_word(__m256i v) {
    const __m128i half = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return (unsigned)_mm_extract_epi16(_mm_minpos_epu16(half), 0);
}

INLINE unsigned greatest_word(__m512i v) {
    const __m256i both = _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return least_word(_mm256_xor_si256(both, _mm256_set1_epi16(-1))) ^ 0xffff;
}
INLINE unsigned greatest_signed_word(__m512i v) {
    const __m256i both = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return least_word(_mm256_xor_si256(both, _mm256_set1_epi16(0x7fff))) ^ 0x7fff;
}

/* The largest of words that are float16 or bfloat16, of which the largest as signed and the least as unsigned are known. */
INLINE float peak_of_words(int dtype, __m512i high, __m512i lowest) {
    const __m256i l = _mm256_min_epu16(_mm512_castsi512_si256(lowest), _mm512_extracti64x4_epi64(lowest, 1));
    const unsigned of_signed = greatest_signed_word(high);
    const uint16_t found[8] = {(uint16_t)(of_signed < 0x8000 ? of_signed : least_word(l))};
    return _mm256_cvtss_f32(load8(found, dtype, 0));
}

/* The same for float16 and bfloat16. */
INLINE float peak_16(const uint16_t *row, int dtype, int64_t n, int checked) {
    const uint16_t infinity = dtype == ASSAY_F16 ? 0x7c00 : 0x7f80;
    __m512i high = _mm512_set1_epi16(-0x8000), highest = _mm512_setzero_si512(), lowest = _mm512_set1_epi16(-1);
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
        if (checked) fetch_ahead(row + i, 256);
#pragma GCC unroll 4
        for (int j = 0; j < 128; j += 32) {
            const __m512i a = _mm512_loadu_si512(row + i + j);
            high = _mm512_max_epi16(high, a);
            if (checked) highest = _mm512_max_epu16(highest, a);
            lowest = _mm512_min_epu16(lowest, a);
        }
    }
    assay_tail tail;
    for (; i < n; i += 16) {
        const uint16_t *at = i + 16 <= n ? row + i : assay_tail_of(&tail, row, dtype, i, n);
        const __m512i a = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)at));
        high = _mm512_max_epi16(high, a);
        if (checked) highest = _mm512_max_epu16(highest, a);
        lowest = _mm512_min_epu16(lowest, a);
    }
    if (checked) {
        const unsigned of_signed = greatest_signed_word(high);
        if ((of_signed < 0x8000 && of_signed > infinity) || greatest_word(highest) > (infinity | 0x8000u)) return NAN;
    }
    return peak_of_words(dtype, high, lowest);
}

INLINE float largest_of(const void *row, int dtype, int64_t n) {
    return dtype == ASSAY_F32 ? peak_f32(row, n, 1) : peak_16(row, dtype, n, 1);
}

INLINE float peak_of(const void *row, int dtype, int64_t n) {
    return dtype == ASSAY_F32 ? peak_f32(row, n, 0) : peak_16(row, dtype, n, 0);
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

/* Those of 16 elements, the first of which is element i, at the front of a vector: straight to memory it is microcode (Zen 4). */
INLINE int64_t put(__m512 a, __mmask16 hits, int64_t i, float *values, int32_t *where) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(hits, a));
    if (where)
        _mm512_storeu_si512(where, _mm512_maskz_compress_epi32(hits, _mm512_add_epi32(_mm512_set1_epi32((int)i), lanes)));
    return __builtin_popcount(hits);
}

/* A branch for 64 elements: for each 16 it would often be mispredicted. */
INLINE int64_t select_places(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where) {
    const __m512 bound = _mm512_set1_ps(least);
    int64_t count = 0, i = 0;
    for (; i + 64 <= n; i += 64) {
        __m512 a[4];
        __mmask16 hits[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            a[j] = load16(row, dtype, i + 16 * j);
            hits[j] = _mm512_cmp_ps_mask(a[j], bound, _CMP_GE_OQ);
        }
        if (!(hits[0] | hits[1] | hits[2] | hits[3])) continue;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) count += put(a[j], hits[j], i + 16 * j, values + count, where ? where + count : NULL);
    }
    assay_tail tail;
    for (; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 a = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        count += put(a, _mm512_cmp_ps_mask(a, bound, _CMP_GE_OQ), i, values + count, where ? where + count : NULL);
    }
    return count;
}

INLINE int64_t select_in(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where) {
    return where ? select_places(row, dtype, n, least, values, where) : select_places(row, dtype, n, least, values, NULL);
}

INLINE float keep_in(const void *row, int dtype, int64_t n, const assay_range *range, float *out) {
    const __m512 low = _mm512_set1_ps(range->low), high = _mm512_set1_ps(range->high);
    const __m512 least = _mm512_set1_ps(range->least), most = _mm512_set1_ps(range->most), none = _mm512_set1_ps(-INFINITY);
    __m512 m = none;
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 a = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        const int64_t left = range->last + 1 - i; /* so many of these may be at the end of the range */
        const __mmask16 early = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        const __mmask16 inner = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a, low, _CMP_GT_OQ), a, high, _CMP_LT_OQ);
        const __mmask16 outer = _mm512_mask_cmp_ps_mask(_mm512_mask_cmp_ps_mask(early, a, least, _CMP_GE_OQ), a, most, _CMP_LE_OQ);
        const __m512 x = _mm512_mask_blend_ps((__mmask16)(inner | outer), none, a);
        _mm512_mask_storeu_ps(out + i, whole ? 0xffff : (__mmask16)((1u << (n - i)) - 1), x);
        m = _mm512_max_ps(m, x);
    }
    return hmax16(m);
}

INLINE int64_t sum_of_int32(__m512i v) {
    return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                                                    _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1))));
}

static void tally(const float *values, const float *weights, int64_t n, float pivot, assay_mass *above, assay_mass *equal) {
    const __m512 p = _mm512_set1_ps(pivot), one = _mm512_set1_ps(1), fine = _mm512_set1_ps(MASS_LOW);
    for (int64_t from = 0; from < n; from += 16 * MASS_STEPS) {
        const int64_t end = assay_min_i64(n, from + 16 * MASS_STEPS);
        __m512i high = _mm512_setzero_si512(), low = high, equal_high = high, equal_low = high;
        for (int64_t i = from; i < end; i += 16) {
            const __mmask16 there = end - i >= 16 ? 0xffff : (__mmask16)((1u << (end - i)) - 1);
            const __m512 v = _mm512_maskz_loadu_ps(there, values + i), w = _mm512_maskz_loadu_ps(there, weights + i);
            const __m512 whole = _mm512_add_ps(w, one);
            const __m512 rest = _mm512_add_ps(_mm512_sub_ps(w, _mm512_sub_ps(whole, one)), fine);
            const __m512i h = _mm512_sub_epi32(_mm512_castps_si512(whole), _mm512_castps_si512(one));
            const __m512i l = _mm512_sub_epi32(_mm512_castps_si512(rest), _mm512_castps_si512(fine));
            const __mmask16 more = _mm512_mask_cmp_ps_mask(there, v, p, _CMP_GT_OQ);
            const __mmask16 same = _mm512_mask_cmp_ps_mask(there, v, p, _CMP_EQ_OQ);
            high = _mm512_mask_add_epi32(high, more, high, h);
            low = _mm512_mask_add_epi32(low, more, low, l);
            equal_high = _mm512_mask_add_epi32(equal_high, same, equal_high, h);
            equal_low = _mm512_mask_add_epi32(equal_low, same, equal_low, l);
        }
        above->high += sum_of_int32(high);
        above->low += sum_of_int32(low);
        equal->high += sum_of_int32(equal_high);
        equal->low += sum_of_int32(equal_low);
    }
}

/* In place too: what is stored ends at or before the end of what was loaded. */
static int64_t between(const float *values, const float *weights, int64_t n, float low, float high, float *values_out,
                       float *weights_out) {
    const __m512 least = _mm512_set1_ps(low), most = _mm512_set1_ps(high);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 there = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        const __m512 v = _mm512_maskz_loadu_ps(there, values + i), w = _mm512_maskz_loadu_ps(there, weights + i);
        const __mmask16 hits = _mm512_mask_cmp_ps_mask(_mm512_mask_cmp_ps_mask(there, v, least, _CMP_GT_OQ), v, most, _CMP_LT_OQ);
        _mm512_storeu_ps(values_out + count, _mm512_maskz_compress_ps(hits, v));
        _mm512_storeu_ps(weights_out + count, _mm512_maskz_compress_ps(hits, w));
        count += __builtin_popcount(hits);
    }
    return count;
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
        const __m512 qi = _mm512_loadu_ps(assay_q_from(q, i, n, q_tail));
        const __m512 p = _mm512_mul_ps(vexp16(_mm512_mul_ps(_mm512_sub_ps(x, m), t)), a);
        const __m512 e = _mm512_max_ps(_mm512_sub_ps(p, _mm512_mul_ps(qi, cs)), zero);
        bad |= (unsigned)_mm512_cmp_ps_mask(qi, zero, _CMP_NGE_UQ) | (unsigned)_mm512_cmp_ps_mask(qi, most, _CMP_NLE_UQ);
        _mm512_storeu_ps(out + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    return bad ? NAN : fold16(sum);
}

INLINE void residuals_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, const float *scales,
                         const float *q, float *sums) {
    const __m512 m = _mm512_set1_ps(shift), t = _mm512_set1_ps(inverse_t), zero = _mm512_setzero_ps();
    __m512 sum[ASSAY_SPEC_SHARES], scale[ASSAY_SPEC_SHARES];
#pragma GCC unroll 4
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++) {
        sum[j] = zero;
        scale[j] = _mm512_set1_ps(scales[j]);
    }
    /* As unsigned words, what is no probability lies above FLT_MAX; minus 0, which is one, becomes 0. */
    __m512i most = _mm512_setzero_si512();
    assay_tail tail;
    float q_tail[16] = {0};
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 x = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        const __m512 qi = _mm512_loadu_ps(assay_q_from(q, i, n, q_tail));
        const __m512 e = vexp16(_mm512_mul_ps(_mm512_sub_ps(x, m), t));
        most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_add_ps(qi, zero)));
#pragma GCC unroll 4
        for (int j = 0; j < ASSAY_SPEC_SHARES; j++)
            sum[j] = _mm512_add_ps(sum[j], _mm512_max_ps(_mm512_sub_ps(_mm512_mul_ps(e, scale[j]), qi), zero));
    }
    const int bad = _mm512_cmpgt_epu32_mask(most, _mm512_set1_epi32(0x7f7fffff)) != 0;
#pragma GCC unroll 4
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++) sums[j] = bad ? NAN : fold16(sum[j]);
}

/* Elements i .. i + 31 as two vectors. bfloat16: a word permutation is widening and shift at once. */
INLINE void load32(const void *row, int dtype, int64_t i, __m512 out[2]) {
    if (dtype != ASSAY_BF16) {
        out[0] = load16(row, dtype, i);
        out[1] = load16(row, dtype, i + 16);
        return;
    }
    const __m512i words = _mm512_loadu_si512((const uint16_t *)row + i);
    const __m512i first = _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000, 0x70000,
                                           0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(0x100000));
    out[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, first, words));
    out[1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, second, words));
}

/* The loop over n elements, a multiple of 32. with_next: the peak of as many behind them, a step of which hides between the
 * exponentials, where its latency costs nothing. */
INLINE __m512 sum_whole(const uint8_t *row, int dtype, int64_t n, __m512 m, __m512 t, int scaled, const uint8_t *ahead,
                        int with_next, float *peak) {
    const int64_t size = dtype == ASSAY_F32 ? 4 : 2;
    const uint8_t *next = row + n * size;
    __m512 s = _mm512_setzero_ps(), m0 = _mm512_set1_ps(-INFINITY), m1 = m0;
    __m512i high = _mm512_set1_epi16(-0x8000), lowest = _mm512_set1_epi16(-1);
    for (int64_t i = 0; i < n; i += 32) {
        for (int64_t line = 0; line < 32 * size; line += 64) _mm_prefetch((const char *)ahead + i * size + line, _MM_HINT_T0);
        if (with_next && dtype == ASSAY_F32) {
            m0 = _mm512_max_ps(load16(next, dtype, i), m0);
            m1 = _mm512_max_ps(load16(next, dtype, i + 16), m1);
        } else if (with_next) {
            const __m512i a = _mm512_loadu_si512(next + 2 * i);
            high = _mm512_max_epi16(high, a);
            lowest = _mm512_min_epu16(lowest, a);
        }
        __m512 x[2];
        load32(row, dtype, i, x);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512 d = _mm512_sub_ps(x[j], m);
            s = _mm512_add_ps(s, vexp16(scaled ? _mm512_mul_ps(d, t) : d));
        }
    }
    if (with_next && dtype == ASSAY_F32) *peak = hmax16(_mm512_max_ps(m0, m1));
    else if (with_next) *peak = peak_of_words(dtype, high, lowest);
    return s;
}

INLINE float sum_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, const void *ahead, int64_t next_n,
                    float *next_peak) {
    const __m512 m = _mm512_set1_ps(shift), t = _mm512_set1_ps(inverse_t);
    const int64_t whole = n / 32 * 32;
    const int together = next_n == n && whole == n;
    __m512 s;
    /* Times 1 is left out: the ports bound the loop. */
    if (inverse_t == 1)
        s = together ? sum_whole(row, dtype, whole, m, t, 0, ahead, 1, next_peak)
                     : sum_whole(row, dtype, whole, m, t, 0, ahead, 0, NULL);
    else
        s = together ? sum_whole(row, dtype, whole, m, t, 1, ahead, 1, next_peak)
                     : sum_whole(row, dtype, whole, m, t, 1, ahead, 0, NULL);
    assay_tail tail;
    for (int64_t i = whole; i < n; i += 16) {
        const int all = i + 16 <= n;
        const __m512 a = load16(all ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, all ? i : 0);
        s = _mm512_add_ps(s, vexp16(_mm512_mul_ps(_mm512_sub_ps(a, m), t)));
    }
    if (next_n && !together) *next_peak = peak_of((const uint8_t *)row + n * (dtype == ASSAY_F32 ? 4 : 2), dtype, next_n);
    return fold16(s);
}

INLINE float moment_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *total) {
    const __m512 m = _mm512_set1_ps(shift), t = _mm512_set1_ps(inverse_t), zero = _mm512_setzero_ps();
    __m512 sum = zero, moment = zero;
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 a = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        const __m512 z = _mm512_mul_ps(_mm512_sub_ps(a, m), t), e = vexp16(z);
        sum = _mm512_add_ps(sum, e);
        moment = _mm512_mask_add_ps(moment, _mm512_cmp_ps_mask(e, zero, _CMP_GT_OQ), moment, _mm512_mul_ps(e, z));
    }
    *total = fold16(sum);
    return fold16(moment);
}

/* Eight counters, hence sixteen elements, at a time: a word in the lower half of each 64-bit lane, what is above it never
 * read, so that a round is two products, two shifts and two three-way xors. */
static void race(const float *weights, int64_t n, int64_t first, assay_race *race) {
    enum { XOR3 = 0x96 };
    const assay_race_start start = assay_race_begin(race);
    const __m512i m0 = _mm512_set1_epi64(PHILOX_M0), m1 = _mm512_set1_epi64(PHILOX_M1);
    const __m512i x0 = _mm512_set1_epi64(start.x[0]), x1 = _mm512_set1_epi64(start.x[1]);
    const __m512i x2 = _mm512_set1_epi64(start.x[2]), x3 = _mm512_set1_epi64(start.x[3]);
    const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 margin = _mm512_set1_ps(RACE_MARGIN_F32 * 0x1p-32f);
    __m512 best = _mm512_set1_ps((float)race->time);
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 w = _mm512_loadu_ps(weights + i);
        const __mmask16 racing = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_GT_OQ);
        if (!racing) continue;
        const __m512i index = _mm512_add_epi64(_mm512_set1_epi64((first + i) / 2), lanes);
        __m512i a = x0, b = x1, c = _mm512_xor_si512(x2, index), d = x3;
        uint32_t key0 = start.key[0], key1 = start.key[1];
        for (int round = 1; round < 10; round++, key0 += PHILOX_W0, key1 += PHILOX_W1) {
            const __m512i p = _mm512_mul_epu32(a, m0), q = _mm512_mul_epu32(c, m1);
            a = _mm512_ternarylogic_epi64(_mm512_srli_epi64(q, 32), b, _mm512_set1_epi64(key0), XOR3);
            c = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), d, _mm512_set1_epi64(key1), XOR3);
            b = q;
            d = p;
        }
        /* The higher words, in the order of the elements: u is this over 2^32 or more. */
        const __m512i high = _mm512_mask_blend_epi32(0xAAAA, b, _mm512_slli_epi64(d, 32));
        const __m512 least = _mm512_mul_ps(_mm512_cvtepu32_ps(high), margin);
        unsigned left = racing & _mm512_cmp_ps_mask(least, _mm512_mul_ps(best, w), _CMP_NGT_UQ);
        if (!left) continue;
        uint32_t lows[16], highs[16];
        _mm512_storeu_si512(lows, _mm512_mask_blend_epi32(0xAAAA, a, _mm512_slli_epi64(c, 32)));
        _mm512_storeu_si512(highs, high);
        for (; left; left &= left - 1) {
            const int j = __builtin_ctz(left);
            assay_race_try(race, lows[j], highs[j], weights[i + j], first + i + j);
        }
        best = _mm512_set1_ps((float)race->time);
    }
}

#include "by_type.h"

const assay_spec_verify_kernel assay_spec_verify_avx512vnni = {largest, peak,    find, select, keep,     tally,
                                                              between, weights, sum,  moment, residual, residuals, race};

/* Passes over a block of logits with AVX-512 (spec_verify.h states them).
 *
 * largest: per 64 float32 4 loads, 4 vmaxps, 2 vcmpps to a mask (one finds a NaN in either of two vectors), 2 korw: bound by
 *   the loads. vmaxps drops a NaN in its first operand, hence the compares.
 * weights: per 16 elements load, sub, mul, and vexp's 8 FMA-class, 1 sub, 2 integer operations, a compare and a masked move,
 *   add, store: about 15 on the two 512-bit pipes, 7 to 8 cycles; four pipes (Zen 5): 4 to 5. The sum's add is hidden behind
 *   the rest. Block and weights (16 KB together) stay in L1.
 * sum: the same without the store, and prefetches of the next block: memory works while the pipes do.
 * race: per 16 elements 9 rounds of 6 operations and some 8 more: 16 cycles on four pipes. */
#include "race.h"
#include "../row_tail.h"
#include "../vexp_avx512.h"

#include <float.h>

INLINE unsigned unordered(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }

enum { AHEAD_BYTES = 4096 };

INLINE float largest_of(const void *row, int dtype, int64_t n) {
    __m512 m0 = _mm512_set1_ps(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
    unsigned nan = 0;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        const __m512 a = load16(row, dtype, i), b = load16(row, dtype, i + 16);
        const __m512 c = load16(row, dtype, i + 32), d = load16(row, dtype, i + 48);
        /* The hardware's prefetch ends with the page. A line for every load, for 4 KB ahead; a hint, so it may leave the row. */
        for (int64_t line = 0; line < 64 * (dtype == ASSAY_F32 ? 4 : 2); line += 64)
            _mm_prefetch((const char *)row + i * (dtype == ASSAY_F32 ? 4 : 2) + AHEAD_BYTES + line, _MM_HINT_T0);
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

INLINE int64_t select_in(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where) {
    const __m512 bound = _mm512_set1_ps(least);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int64_t count = 0;
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const __m512 a = load16(whole ? row : assay_tail_of(&tail, row, dtype, i, n), dtype, whole ? i : 0);
        const __mmask16 hits = _mm512_cmp_ps_mask(a, bound, _CMP_GE_OQ);
        if (!hits) continue;
        /* Compressed in a register: straight to memory it is microcode (Zen 4). */
        _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(hits, a));
        _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(hits, _mm512_add_epi32(_mm512_set1_epi32((int)i), lanes)));
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

INLINE float sum_of(const void *row, int dtype, int64_t n, float shift, float inverse_t, const void *ahead) {
    const __m512 m = _mm512_set1_ps(shift), t = _mm512_set1_ps(inverse_t);
    const int64_t whole = n / 16 * 16;
    __m512 s = _mm512_setzero_ps();
    /* Times 1 is left out: the multiplications bound the loop. */
    if (inverse_t == 1)
        for (int64_t i = 0; i < whole; i += 16) {
            if (ahead) _mm_prefetch((const char *)ahead + i * (dtype == ASSAY_F32 ? 4 : 2), _MM_HINT_T0);
            s = _mm512_add_ps(s, vexp16(_mm512_sub_ps(load16(row, dtype, i), m)));
        }
    else
        for (int64_t i = 0; i < whole; i += 16) {
            if (ahead) _mm_prefetch((const char *)ahead + i * (dtype == ASSAY_F32 ? 4 : 2), _MM_HINT_T0);
            s = _mm512_add_ps(s, vexp16(_mm512_mul_ps(_mm512_sub_ps(load16(row, dtype, i), m), t)));
        }
    if (whole < n) {
        assay_tail tail;
        const __m512 a = load16(assay_tail_of(&tail, row, dtype, whole, n), dtype, 0);
        s = _mm512_add_ps(s, vexp16(_mm512_mul_ps(_mm512_sub_ps(a, m), t)));
    }
    return fold16(s);
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

const assay_spec_verify_kernel assay_spec_verify_avx512vnni = {largest, find, select, weights, sum, residual, race};

/* MoE routing of up to 256 experts and top_k up to 8 with AVX-512, no step of it once a choice:
 *
 *   threshold   lane maxima over the row's vectors, sorted: the top_k-th of them is no larger than the top_k-th logit
 *   survivors   logits at or above it, and their ids, compressed into a list; of normal logits 8 to 14, rarely above 16
 *   sort        by keys of 64 bits, no two of which are equal
 *
 * Rows go eight at a time (eight_rows.h), what is left one at a time. Rows with more than MOST_SURVIVORS go the general way (a
 * row of equal logits).
 *
 * A key is a double, because two minima of doubles are done a cycle, and one of int64 (Granite Rapids, in a loop without memory;
 * latencies 4 and 3). High word: the logit's bits plus KEY_STEP, so that no double is a denormal, an infinity or a NaN; low word:
 * ~id, or id where the logit is negative, so that of equal logits the lower id is the larger key. */
#ifndef ASSAY_SURVIVORS_H
#define ASSAY_SURVIVORS_H

enum { SURVIVOR_EXPERTS = 256, SURVIVOR_SLOTS = 8, MOST_SURVIVORS = 32, KEY_STEP = 1 << 20 };

typedef struct {
    _Alignas(64) float x[SURVIVOR_EXPERTS + CHUNK];
    _Alignas(64) int32_t inverse_id[SURVIVOR_EXPERTS + CHUNK];
    int count;
} survivors;

/* One step of a bitonic network: lanes in `maxima` keep the larger of v and its partner. */
INLINE __m512 step16(__m512 v, __m512 partner, unsigned maxima) {
    return _mm512_mask_blend_ps((__mmask16)maxima, _mm512_min_ps(v, partner), _mm512_max_ps(v, partner));
}

/* Sorted, descending. */
INLINE __m512 sort16(__m512 v) {
    v = step16(v, _mm512_permute_ps(v, 0xb1), 0x9999);
    v = step16(v, _mm512_permute_ps(v, 0x4e), 0xc3c3);
    v = step16(v, _mm512_permute_ps(v, 0xb1), 0xa5a5);
    v = step16(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf00f);
    v = step16(v, _mm512_permute_ps(v, 0x4e), 0xcc33);
    v = step16(v, _mm512_permute_ps(v, 0xb1), 0xaa55);
    v = step16(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0x00ff);
    v = step16(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0x0f0f);
    v = step16(v, _mm512_permute_ps(v, 0x4e), 0x3333);
    return step16(v, _mm512_permute_ps(v, 0xb1), 0x5555);
}

INLINE __m512d step8(__m512d v, __m512d partner, unsigned maxima) {
    return _mm512_mask_blend_pd((__mmask8)maxima, _mm512_min_pd(v, partner), _mm512_max_pd(v, partner));
}

/* Each lane's partner at a distance of 1, 2 and 4. */
INLINE __m512d apart1(__m512d v) { return _mm512_permute_pd(v, 0x55); }
INLINE __m512d apart2(__m512d v) { return _mm512_shuffle_f64x2(v, v, 0xb1); }
INLINE __m512d apart4(__m512d v) { return _mm512_shuffle_f64x2(v, v, 0x4e); }

/* A bitonic sequence sorted, descending. */
INLINE __m512d merge8(__m512d v) {
    v = step8(v, apart4(v), 0x0f);
    v = step8(v, apart2(v), 0x33);
    return step8(v, apart1(v), 0x55);
}

/* Sorted, descending, or with flip = 0xff ascending. */
INLINE __m512d sort8(__m512d v, unsigned flip) {
    v = step8(v, apart1(v), 0x99 ^ flip);
    v = step8(v, apart2(v), 0xc3 ^ flip);
    v = step8(v, apart1(v), 0xa5 ^ flip);
    v = step8(v, apart4(v), 0x0f ^ flip);
    v = step8(v, apart2(v), 0x33 ^ flip);
    return step8(v, apart1(v), 0x55 ^ flip);
}

/* The largest logit of each lane; a NaN counts for nothing. */
INLINE __m512 lane_maxima(const void *row, int dtype, int64_t n, int chunks) {
    assay_tail tail;
    __m512 best = _mm512_set1_ps(-INFINITY);
    for (int c = 0; c < chunks; c++) /* the second when one is NaN */
        best = _mm512_max_ps(chunk_of(row, dtype, c * CHUNK, n, &tail), best);
    return best;
}

/* Lists the logits at or above a threshold, and NaNs, but not minus infinity, which is never chosen. */
INLINE void list_survivors(survivors *s, const void *row, int dtype, int64_t n, int chunks, __m512 threshold) {
    assay_tail tail;
    const __m512 least = _mm512_max_ps(threshold, _mm512_set1_ps(-0x1.fffffep+127f));
    __m512i inverse_id = _mm512_sub_epi32(_mm512_set1_epi32(-1), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int count = 0;
    for (int c = 0; c < chunks; c++) {
        const __m512 x = chunk_of(row, dtype, c * CHUNK, n, &tail);
        const __mmask16 kept = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
        _mm512_storeu_ps(s->x + count, _mm512_maskz_compress_ps(kept, x));
        _mm512_storeu_si512(s->inverse_id + count, _mm512_maskz_compress_epi32(kept, inverse_id));
        inverse_id = _mm512_sub_epi32(inverse_id, _mm512_set1_epi32(CHUNK));
        count += __builtin_popcount(kept);
    }
    s->count = count;
}

/* Keys of survivors from .. from + 15, those that are not there smaller than any; whether one is NaN. */
INLINE int keys_of(const survivors *s, int from, __m512d *low, __m512d *high) {
    const int left = s->count - from;
    const __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
    const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), there, s->x + from);
    const __m512i inverse_id = _mm512_maskz_loadu_epi32(there, s->inverse_id + from);
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(x, _mm512_setzero_ps())); /* -0 is 0 */
    const __m512i order = _mm512_add_epi32(bits, _mm512_set1_epi32(KEY_STEP));
    const __m512i place = _mm512_xor_si512(inverse_id, _mm512_srai_epi32(bits, 31));
    *low = _mm512_castsi512_pd(_mm512_unpacklo_epi32(place, order));
    *high = _mm512_castsi512_pd(_mm512_unpackhi_epi32(place, order));
    return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0;
}

/* The 8 largest keys of survivors from .. from + 15, descending. */
INLINE __m512d best_of(const survivors *s, int from, int *nan) {
    __m512d low, high;
    *nan |= keys_of(s, from, &low, &high);
    return merge8(_mm512_max_pd(sort8(low, 0), sort8(high, 0xff)));
}

INLINE void finish_survivors(const assay_route_args *a, int64_t t, const void *row, int dtype, const survivors *s) {
    if (s->count > MOST_SURVIVORS) {
        route_range(a, t, t + 1, a->dtype, 1, 0);
        return;
    }
    int nan = 0;
    __m512d key = best_of(s, 0, &nan);
    if (s->count > 16) {
        const __m512i reversed = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0);
        key = merge8(_mm512_max_pd(key, _mm512_permutexvar_pd(reversed, best_of(s, 16, &nan))));
    }
    const __m512i words = _mm512_castpd_si512(key);
    const __m256i bits = _mm256_sub_epi32(_mm512_cvtepi64_epi32(_mm512_srli_epi64(words, 32)), _mm256_set1_epi32(KEY_STEP));
    const __m256i id = _mm256_xor_si256(_mm512_cvtepi64_epi32(words),
                                        _mm256_xor_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(-1)));
    const __m256 x = _mm256_castsi256_ps(bits);
    const float largest = _mm256_cvtss_f32(x);
    const int32_t status = status_of(nan, largest);
    a->status[t] = status;
    if (status) {
        assay_route_refuse(a, t, status);
        return;
    }
    const __mmask16 in_row = (__mmask16)((1u << a->top_k) - 1);
    const int64_t at = t * assay_route_width(a);
    _mm512_mask_storeu_epi32(a->topk_ids + at, in_row, _mm512_castsi256_si512(id));
    if (a->scoring == ASSAY_SCORE_SOFTMAX) {
        const __m256 chosen = _mm256_castsi256_ps(
            _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)a->top_k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
        const __m256 e = _mm256_and_ps(chosen, vexp8(_mm256_sub_ps(x, _mm256_set1_ps(largest))));
        const float total = a->renormalize ? fold8(e) : sum_of_all(row, dtype, a->num_experts, largest);
        const __m256 w = _mm256_mul_ps(_mm256_div_ps(e, _mm256_set1_ps(total)), _mm256_set1_ps(a->scaling));
        _mm512_mask_storeu_ps(a->topk_weights + at, in_row, _mm512_castps256_ps512(w));
    } else {
        assay_route_weigh(a, t, row, largest, 0);
    }
    assay_route_share(a, t);
}

#include "eight_rows.h"

INLINE void survivor_rows(const assay_route_args *a, int64_t t, int64_t end, int dtype, int chunks) {
    for (; t + ABREAST <= end; t += ABREAST) eight_rows(a, t, dtype, chunks);
    const __m512i kth = _mm512_set1_epi32((int32_t)a->top_k - 1);
    survivors s[ABREAST];
    const void *row[ABREAST];
    /* In turns, so that the waits of one row are another's time. */
    const int rows = (int)(end - t);
    for (int r = 0; r < rows; r++) {
        row[r] = (const uint8_t *)a->logits + (t + r) * a->ld * (dtype == ASSAY_F32 ? 4 : 2);
        const __m512 best = sort16(lane_maxima(row[r], dtype, a->num_experts, chunks));
        list_survivors(&s[r], row[r], dtype, a->num_experts, chunks, _mm512_permutexvar_ps(kth, best));
    }
    for (int r = 0; r < rows; r++) finish_survivors(a, t + r, row[r], dtype, &s[r]);
}

#define SURVIVOR_CASE(name, chunks)                                                                             \
    static __attribute__((noinline)) void survivors_##name(const assay_route_args *a, int64_t t, int64_t end) { \
        if (a->dtype == ASSAY_F32) survivor_rows(a, t, end, ASSAY_F32, chunks);                                 \
        else if (a->dtype == ASSAY_F16) survivor_rows(a, t, end, ASSAY_F16, chunks);                            \
        else survivor_rows(a, t, end, ASSAY_BF16, chunks);                                                      \
    }
SURVIVOR_CASE(64, 4)
SURVIVOR_CASE(128, 8)
SURVIVOR_CASE(256, 16)
SURVIVOR_CASE(some, (int)((a->num_experts + CHUNK - 1) / CHUNK))

/* Whether a row has few enough experts and choices, which are by its logits. */
static int suits_survivors(const assay_route_args *a) {
    return a->num_experts <= SURVIVOR_EXPERTS && a->top_k <= SURVIVOR_SLOTS && !assay_route_keyed(a);
}

static void route_survivors(const assay_route_args *a, int64_t t, int64_t end) {
    if (a->num_experts == 64) survivors_64(a, t, end);
    else if (a->num_experts == 128) survivors_128(a, t, end);
    else if (a->num_experts == 256) survivors_256(a, t, end);
    else survivors_some(a, t, end);
}

#endif

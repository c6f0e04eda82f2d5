/* MoE routing of up to 256 experts and top_k up to 8 with AVX-512, no step of it once a choice:
 *
 *   threshold   lane maxima over the row's vectors, sorted: the top_k-th of them is no larger than the top_k-th logit
 *   survivors   logits at or above it, and their ids, compressed into a list; of normal logits 8 to 14, rarely above 16
 *   sort        keys of 64 bits, (logit as an ordered integer, ~id), so that no two are equal and ties go to the lower id:
 *               two vectors of 8 sorted opposite ways, the larger of each pair, three merge steps
 *
 * Of 128 experts that is about 250 instructions a token, of which the widest chain is the sort's; four tokens go through each
 * part in turn, which also leaves the list's unaligned stores the time to reach L1 before it is loaded across them. Rows with
 * more than MOST_SURVIVORS go the general way (a row of equal logits). */
#ifndef ASSAY_SURVIVORS_H
#define ASSAY_SURVIVORS_H

enum { SURVIVOR_EXPERTS = 256, SURVIVOR_SLOTS = 8, MOST_SURVIVORS = 32 };

typedef struct {
    _Alignas(64) float x[SURVIVOR_EXPERTS + CHUNK];
    _Alignas(64) int32_t inverse_id[SURVIVOR_EXPERTS + CHUNK];
    int count, nan;
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

INLINE __m512i step8(__m512i v, __m512i partner, unsigned maxima) {
    return _mm512_mask_blend_epi64((__mmask8)maxima, _mm512_min_epi64(v, partner), _mm512_max_epi64(v, partner));
}

/* Each lane's partner at a distance of 1, 2 and 4. */
INLINE __m512i apart1(__m512i v) { return _mm512_shuffle_epi32(v, 0x4e); }
INLINE __m512i apart2(__m512i v) {
    const __m512 x = _mm512_castsi512_ps(v);
    return _mm512_castps_si512(_mm512_shuffle_f32x4(x, x, 0xb1));
}
INLINE __m512i apart4(__m512i v) {
    const __m512 x = _mm512_castsi512_ps(v);
    return _mm512_castps_si512(_mm512_shuffle_f32x4(x, x, 0x4e));
}

/* A bitonic sequence sorted, descending. */
INLINE __m512i merge8(__m512i v) {
    v = step8(v, apart4(v), 0x0f);
    v = step8(v, apart2(v), 0x33);
    return step8(v, apart1(v), 0x55);
}

/* Sorted, descending, or with flip = 0xff ascending. */
INLINE __m512i sort8(__m512i v, unsigned flip) {
    v = step8(v, apart1(v), 0x99 ^ flip);
    v = step8(v, apart2(v), 0xc3 ^ flip);
    v = step8(v, apart1(v), 0xa5 ^ flip);
    v = step8(v, apart4(v), 0x0f ^ flip);
    v = step8(v, apart2(v), 0x33 ^ flip);
    return step8(v, apart1(v), 0x55 ^ flip);
}

INLINE void find_survivors(survivors *s, const void *row, int dtype, int64_t n, int chunks, __m512i kth) {
    assay_tail tail;
    __m512 best = _mm512_set1_ps(-INFINITY);
    unsigned nan = 0;
    for (int c = 0; c < chunks; c++) {
        const __m512 x = chunk_of(row, dtype, c * CHUNK, n, &tail);
        nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        best = _mm512_max_ps(x, best); /* the second when one is NaN */
    }
    /* Not minus infinity, which is never chosen. */
    const __m512 least = _mm512_max_ps(_mm512_permutexvar_ps(kth, sort16(best)), _mm512_set1_ps(-0x1.fffffep+127f));
    __m512i inverse_id = _mm512_sub_epi32(_mm512_set1_epi32(-1), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int count = 0;
    for (int c = 0; c < chunks; c++) {
        const __m512 x = chunk_of(row, dtype, c * CHUNK, n, &tail);
        const __mmask16 kept = _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ);
        _mm512_storeu_ps(s->x + count, _mm512_maskz_compress_ps(kept, x));
        _mm512_storeu_si512(s->inverse_id + count, _mm512_maskz_compress_epi32(kept, inverse_id));
        inverse_id = _mm512_sub_epi32(inverse_id, _mm512_set1_epi32(CHUNK));
        count += __builtin_popcount(kept);
    }
    s->count = count;
    s->nan = nan != 0;
}

/* The 8 largest keys of survivors from .. from + 15, descending. */
INLINE __m512i best_of(const survivors *s, int from) {
    const int left = s->count - from;
    const __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
    __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), there, s->x + from);
    const __m512i inverse_id = _mm512_maskz_loadu_epi32(there, s->inverse_id + from);
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(x, _mm512_setzero_ps())); /* -0 is 0 */
    const __m512i order = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
    return merge8(_mm512_max_epi64(sort8(_mm512_unpacklo_epi32(inverse_id, order), 0),
                                   sort8(_mm512_unpackhi_epi32(inverse_id, order), 0xff)));
}

INLINE void finish_survivors(const assay_route_args *a, int64_t t, const void *row, int dtype, const survivors *s) {
    __m512i keys = best_of(s, 0);
    if (s->count > 16) {
        const __m512i reversed = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0);
        keys = merge8(_mm512_max_epi64(keys, _mm512_permutexvar_epi64(reversed, best_of(s, 16))));
    }
    const __m256i order = _mm512_cvtepi64_epi32(_mm512_srli_epi64(keys, 32));
    const __m256i id = _mm256_xor_si256(_mm512_cvtepi64_epi32(keys), _mm256_set1_epi32(-1));
    const __m256 x = _mm256_castsi256_ps(_mm256_xor_si256(order, _mm256_srli_epi32(_mm256_srai_epi32(order, 31), 1)));
    const float largest = _mm256_cvtss_f32(x);
    const int32_t status = status_of(s->nan, largest);
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

INLINE void survivor_rows(const assay_route_args *a, int64_t t, int64_t end, int dtype, int chunks) {
    const __m512i kth = _mm512_set1_epi32((int32_t)a->top_k - 1);
    for (; t < end; t += ROWS) {
        survivors s[ROWS];
        const void *row[ROWS];
        const int rows = (int)assay_min_i64(ROWS, end - t);
        for (int r = 0; r < rows; r++) {
            row[r] = (const uint8_t *)a->logits + (t + r) * a->ld * (dtype == ASSAY_F32 ? 4 : 2);
            find_survivors(&s[r], row[r], dtype, a->num_experts, chunks, kth);
        }
        for (int r = 0; r < rows; r++) {
            if (s[r].count > MOST_SURVIVORS) route_range(a, t + r, t + r + 1, a->dtype, 1, 0);
            else finish_survivors(a, t + r, row[r], dtype, &s[r]);
        }
    }
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

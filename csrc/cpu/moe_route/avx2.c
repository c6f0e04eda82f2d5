/* MoE routing with AVX2 (moe_route.h states it). A row is copied to the stack in chunks of 16 experts, with each
 * chunk's largest logit beside it; then top_k times: the largest of those, its chunk, its place there, minus infinity in
 * its stead, that chunk's largest anew. So the next of 128 experts costs 3 vectors, not 16.
 *
 * Each of these steps waits for the one before (a horizontal maximum is 8 cycles, a compare, movemask and tzcnt 8; about
 * 40 a choice), hence ROWS rows side by side: their chains overlap, and the bound becomes the 35 instructions of a choice.
 * Ties go to the lower id because compares find the first chunk and the first place in it. Few experts go another way:
 * few_experts.h. Zen 3, one thread, top-8 of 128: 82 ns a token, of 256: 120; top-2 of 8: 10. */
#include "few_experts.h"
#include "../row_tail.h"
#include "../vexp_avx2.h"

enum { ROWS = 4, CHUNK = 16, MOST_EXPERTS = SUM_BLOCK, MOST_CHUNKS = MOST_EXPERTS / CHUNK };

typedef struct {
    _Alignas(32) float x[MOST_EXPERTS];
    _Alignas(32) float chunk_largest[MOST_CHUNKS];
} row_copy;

/* Copies a row; returns whether there is a NaN, which the copy turns into minus infinity. */
INLINE int copy_row(row_copy *r, const void *row, int dtype, int64_t n, int64_t groups) {
    const __m256 lowest = _mm256_set1_ps(-INFINITY);
    __m256 nan = _mm256_setzero_ps();
    assay_tail tail;
    int64_t c = 0;
    for (; c * CHUNK < n; c++) {
        const int whole = (c + 1) * CHUNK <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, c * CHUNK, n);
        __m256 a = load8(at, dtype, whole ? c * CHUNK : 0), b = load8(at, dtype, whole ? c * CHUNK + 8 : 8);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
        a = _mm256_max_ps(a, lowest);
        b = _mm256_max_ps(b, lowest);
        _mm256_store_ps(r->x + c * CHUNK, a);
        _mm256_store_ps(r->x + c * CHUNK + 8, b);
        r->chunk_largest[c] = hmax8(_mm256_max_ps(a, b));
    }
    for (; c < 8 * groups; c++) r->chunk_largest[c] = -INFINITY;
    return _mm256_movemask_ps(nan);
}

/* Each chunk's largest anew, after x has changed. */
INLINE void index_row(row_copy *r, int64_t n) {
    for (int64_t c = 0; c * CHUNK < n; c++)
        r->chunk_largest[c] = hmax8(_mm256_max_ps(_mm256_load_ps(r->x + c * CHUNK), _mm256_load_ps(r->x + c * CHUNK + 8)));
}

INLINE int first_equal(__m256 v, __m256 wanted) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, wanted, _CMP_EQ_OQ));
}

/* Takes the row's largest logit out: its id (-1 when all that is left is minus infinity). */
INLINE int32_t take(row_copy *r, int64_t groups, float *value) {
    const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 lowest = _mm256_set1_ps(-INFINITY);
    __m256 best = _mm256_load_ps(r->chunk_largest);
    for (int64_t g = 1; g < groups; g++) best = _mm256_max_ps(best, _mm256_load_ps(r->chunk_largest + 8 * g));
    const float largest = hmax8(best);
    const __m256 wanted = _mm256_set1_ps(largest);
    int64_t g = 0;
    int hit = first_equal(_mm256_load_ps(r->chunk_largest), wanted);
    while (groups > 1 && !hit) hit = first_equal(_mm256_load_ps(r->chunk_largest + 8 * ++g), wanted);
    const int chunk_of_group = __builtin_ctz((unsigned)hit);
    float *at = r->x + (8 * g + chunk_of_group) * CHUNK;
    const __m256 a = _mm256_load_ps(at), b = _mm256_load_ps(at + 8);
    const int place = __builtin_ctz((unsigned)first_equal(a, wanted) | (unsigned)first_equal(b, wanted) << 8);
    const __m256i p = _mm256_set1_epi32(place);
    const __m256 left_a = _mm256_blendv_ps(a, lowest, _mm256_castsi256_ps(_mm256_cmpeq_epi32(p, iota)));
    const __m256 left_b = _mm256_blendv_ps(
        b, lowest, _mm256_castsi256_ps(_mm256_cmpeq_epi32(p, _mm256_add_epi32(iota, _mm256_set1_epi32(8)))));
    _mm256_store_ps(at, left_a);
    _mm256_store_ps(at + 8, left_b);
    /* Whole vectors only are stored where vectors are loaded next: others would not be forwarded. */
    const __m256 other = _mm256_set1_ps(hmax8(_mm256_max_ps(left_a, left_b)));
    const __m256 changed = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_set1_epi32(chunk_of_group), iota));
    _mm256_store_ps(r->chunk_largest + 8 * g,
                    _mm256_blendv_ps(_mm256_load_ps(r->chunk_largest + 8 * g), other, changed));
    *value = largest;
    return largest > -INFINITY ? (int32_t)(at - r->x) + place : -1;
}

INLINE float sum_of_all(const void *row, int dtype, int64_t n, float largest) {
    const __m256 m = _mm256_set1_ps(largest);
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    assay_tail tail;
    for (int64_t i = 0; i < n; i += 16) {
        const int whole = i + 16 <= n;
        const void *at = whole ? row : assay_tail_of(&tail, row, dtype, i, n);
        s0 = _mm256_add_ps(s0, vexp8(_mm256_sub_ps(load8(at, dtype, whole ? i : 0), m)));
        s1 = _mm256_add_ps(s1, vexp8(_mm256_sub_ps(load8(at, dtype, whole ? i + 8 : 8), m)));
    }
    return fold8(_mm256_add_ps(s0, s1));
}

/* Turns the chosen logits (minus infinity behind them, up to a multiple of 16) into weights. */
INLINE void weigh(const assay_route_args *a, int64_t t, int64_t end, const void *row, int dtype, float *chosen) {
    const __m256 m = _mm256_set1_ps(chosen[0]);
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    for (int64_t j = 0; j < a->top_k; j += 16) {
        const __m256 e0 = vexp8(_mm256_sub_ps(_mm256_load_ps(chosen + j), m));
        _mm256_store_ps(chosen + j, e0);
        s0 = _mm256_add_ps(s0, e0);
        if (j + 8 >= a->top_k) break;
        const __m256 e1 = vexp8(_mm256_sub_ps(_mm256_load_ps(chosen + j + 8), m));
        _mm256_store_ps(chosen + j + 8, e1);
        s1 = _mm256_add_ps(s1, e1);
    }
    const float total = a->renormalize ? fold8(_mm256_add_ps(s0, s1)) : sum_of_all(row, dtype, a->num_experts, _mm256_cvtss_f32(m));
    const __m256 divisor = _mm256_set1_ps(total), scaling = _mm256_set1_ps(a->scaling);
    float *out = a->topk_weights + t * assay_route_width(a);
    for (int64_t j = 0; j < a->top_k; j += 8) {
        const __m256 w = _mm256_mul_ps(_mm256_div_ps(_mm256_load_ps(chosen + j), divisor), scaling);
        /* Past the row's end lie rows of this same call that are still to be written, but for the last ones. */
        if ((end - t) * assay_route_width(a) >= j + 8) {
            _mm256_storeu_ps(out + j, w);
        } else {
            _mm256_store_ps(chosen + j, w);
            for (int64_t i = j; i < a->top_k; i++) out[i] = chosen[i];
        }
    }
}

#include "rows.h"

static void route(const assay_route_args *a, int64_t begin, int64_t end) {
    const int64_t groups = (a->num_experts + 8 * CHUNK - 1) / (8 * CHUNK);
    begin = route_few_experts(a, begin, end);
    if (a->num_experts > MOST_EXPERTS) assay_moe_route_scalar.route(a, begin, end);
    else if (assay_route_keyed(a)) route_range(a, begin, end, a->dtype, groups, 1);
    else if (groups > 1) route_range(a, begin, end, a->dtype, groups, 0);
    else if (a->dtype == ASSAY_F32) route_range(a, begin, end, ASSAY_F32, 1, 0);
    else if (a->dtype == ASSAY_F16) route_range(a, begin, end, ASSAY_F16, 1, 0);
    else route_range(a, begin, end, ASSAY_BF16, 1, 0);
}

const assay_moe_route_kernel assay_moe_route_avx2 = {route};

/* MoE routing with AVX-512 (moe_route.h states it). A row is copied to the stack in chunks of 16 experts, one vector each,
 * with each chunk's largest logit beside it; then top_k times: the largest of those, its chunk, its place there, minus
 * infinity in its stead, that chunk's largest anew. Up to 256 experts the chunks' largest are one vector.
 *
 * Each of these steps waits for the one before (a horizontal maximum is 15 cycles, compare, kmov and tzcnt 7), hence ROWS
 * rows side by side: their chains overlap, and the bound becomes the 30 instructions of a choice. Ties go to the lower id
 * because compares find the first chunk and the first place in it. Few experts go another way (few_experts.h), and so do up
 * to 256 with top_k up to 8 (survivors.h). */
#include "few_experts.h"
#include "../row_tail.h"
#include "../vexp_avx512.h"

enum { ROWS = 4, CHUNK = 16, MOST_EXPERTS = SUM_BLOCK, MOST_CHUNKS = MOST_EXPERTS / CHUNK };

typedef struct {
    _Alignas(64) float x[MOST_EXPERTS];
    _Alignas(64) float chunk_largest[MOST_CHUNKS];
} row_copy;

INLINE __m512 chunk_of(const void *row, int dtype, int64_t i, int64_t n, assay_tail *tail) {
    const int whole = i + CHUNK <= n;
    return load16(whole ? row : assay_tail_of(tail, row, dtype, i, n), dtype, whole ? i : 0);
}

/* Copies a row; returns whether there is a NaN, which the copy turns into minus infinity. */
INLINE int copy_row(row_copy *r, const void *row, int dtype, int64_t n, int64_t groups) {
    unsigned nan = 0;
    assay_tail tail;
    int64_t c = 0;
    for (; c * CHUNK < n; c++) {
        const __m512 x = chunk_of(row, dtype, c * CHUNK, n, &tail);
        const __m512 kept = _mm512_max_ps(x, _mm512_set1_ps(-INFINITY));
        nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        _mm512_store_ps(r->x + c * CHUNK, kept);
        r->chunk_largest[c] = hmax16(kept);
    }
    for (; c < 16 * groups; c++) r->chunk_largest[c] = -INFINITY;
    return nan != 0;
}

/* Each chunk's largest anew, after x has changed. */
INLINE void index_row(row_copy *r, int64_t n) {
    for (int64_t c = 0; c * CHUNK < n; c++) r->chunk_largest[c] = hmax16(_mm512_load_ps(r->x + c * CHUNK));
}

INLINE unsigned first_equal(__m512 v, __m512 wanted) { return _mm512_cmp_ps_mask(v, wanted, _CMP_EQ_OQ); }

/* Takes the row's largest logit out: its id (-1 when all that is left is minus infinity). */
INLINE int32_t take(row_copy *r, int64_t groups, float *value) {
    __m512 best = _mm512_load_ps(r->chunk_largest);
    for (int64_t g = 1; g < groups; g++) best = _mm512_max_ps(best, _mm512_load_ps(r->chunk_largest + 16 * g));
    const float largest = hmax16(best);
    const __m512 wanted = _mm512_set1_ps(largest);
    int64_t g = 0;
    unsigned hit = first_equal(_mm512_load_ps(r->chunk_largest), wanted);
    while (groups > 1 && !hit) hit = first_equal(_mm512_load_ps(r->chunk_largest + 16 * ++g), wanted);
    const int chunk_of_group = __builtin_ctz(hit);
    float *at = r->x + (16 * g + chunk_of_group) * CHUNK;
    const __m512 chunk = _mm512_load_ps(at);
    const int place = __builtin_ctz(first_equal(chunk, wanted));
    const __m512 left = _mm512_mask_mov_ps(chunk, (__mmask16)(1u << place), _mm512_set1_ps(-INFINITY));
    _mm512_store_ps(at, left);
    /* Whole vectors only are stored where vectors are loaded next: others would not be forwarded. */
    _mm512_store_ps(r->chunk_largest + 16 * g,
                    _mm512_mask_mov_ps(_mm512_load_ps(r->chunk_largest + 16 * g), (__mmask16)(1u << chunk_of_group),
                                       _mm512_set1_ps(hmax16(left))));
    *value = largest;
    return largest > -INFINITY ? (int32_t)(at - r->x) + place : -1;
}

INLINE float sum_of_all(const void *row, int dtype, int64_t n, float largest) {
    const __m512 m = _mm512_set1_ps(largest);
    __m512 sum = _mm512_setzero_ps();
    assay_tail tail;
    for (int64_t i = 0; i < n; i += CHUNK)
        sum = _mm512_add_ps(sum, vexp16(_mm512_sub_ps(chunk_of(row, dtype, i, n, &tail), m)));
    return fold16(sum);
}

/* Turns the chosen logits (minus infinity behind them, up to a multiple of 16) into weights. */
INLINE void weigh(const assay_route_args *a, int64_t t, int64_t end, const void *row, int dtype, float *chosen) {
    (void)end; /* masked stores write nothing past a row */
    const float largest = chosen[0];
    const __m512 m = _mm512_set1_ps(largest);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < a->top_k; j += 16) {
        const __m512 e = vexp16(_mm512_sub_ps(_mm512_load_ps(chosen + j), m));
        _mm512_store_ps(chosen + j, e);
        sum = _mm512_add_ps(sum, e);
    }
    const __m512 total =
        _mm512_set1_ps(a->renormalize ? fold16(sum) : sum_of_all(row, dtype, a->num_experts, largest));
    const __m512 scaling = _mm512_set1_ps(a->scaling);
    float *out = a->topk_weights + t * assay_route_width(a);
    for (int64_t j = 0; j < a->top_k; j += 16) {
        const int64_t left = a->top_k - j;
        const __mmask16 in_row = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
        _mm512_mask_storeu_ps(out + j, in_row,
                             _mm512_mul_ps(_mm512_div_ps(_mm512_load_ps(chosen + j), total), scaling));
    }
}

#include "rows.h"
#include "survivors.h"

static void route(const assay_route_args *a, int64_t begin, int64_t end) {
    const int64_t groups = (a->num_experts + 16 * CHUNK - 1) / (16 * CHUNK);
    begin = route_few_experts(a, begin, end);
    if (suits_survivors(a)) route_survivors(a, begin, end);
    else if (a->num_experts > MOST_EXPERTS) assay_moe_route_scalar.route(a, begin, end);
    else if (assay_route_keyed(a)) route_range(a, begin, end, a->dtype, groups, 1);
    else if (groups > 1) route_range(a, begin, end, a->dtype, groups, 0);
    else if (a->dtype == ASSAY_F32) route_range(a, begin, end, ASSAY_F32, 1, 0);
    else if (a->dtype == ASSAY_F16) route_range(a, begin, end, ASSAY_F16, 1, 0);
    else route_range(a, begin, end, ASSAY_BF16, 1, 0);
}

const assay_moe_route_kernel assay_moe_route_avx512vnni = {route};

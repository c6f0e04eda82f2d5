/* MoE routing for few experts (a multiple of 8, up to 32) and top_k up to 8, eight tokens at a time, one a lane: both x86
 * variants use it.
 *
 * Each expert's eight logits pass down a sorted list of `slots` vectors: compare, max, min, two blends a slot, no branch and
 * no horizontal step. 8 experts, 2 slots: 80 such instructions for eight tokens, beside 24 shuffles that turn the rows into
 * columns and 48 that turn the results back. Each slot is compared with the new logit, not with what the slot above gave
 * up: an equal one of lower id stays above it, and those below it move down in order. */
#ifndef ASSAY_FEW_EXPERTS_H
#define ASSAY_FEW_EXPERTS_H

#include "moe_route.h"
#include "../vexp_avx2.h"

enum { FEW_EXPERTS = 32, FEW_SLOTS = 8, LANES = 8 };

INLINE void transpose8(__m256 r[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

/* Columns of logits of tokens t .. t + 7, NaN turned to minus infinity; returns the lanes that had one. */
INLINE __m256 few_columns(const assay_route_args *a, int64_t t, int dtype, __m256 *x) {
    const __m256 lowest = _mm256_set1_ps(-INFINITY);
    __m256 nan = _mm256_setzero_ps();
    for (int64_t e = 0; e < a->num_experts; e += 8) {
        for (int i = 0; i < LANES; i++) {
            const uint8_t *row = (const uint8_t *)a->logits + (t + i) * a->ld * (dtype == ASSAY_F32 ? 4 : 2);
            x[e + i] = load8(row, dtype, e);
        }
        transpose8(x + e);
        for (int i = 0; i < 8; i++) {
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(x[e + i], x[e + i], _CMP_UNORD_Q));
            x[e + i] = _mm256_max_ps(x[e + i], lowest);
        }
    }
    return nan;
}

/* The fold of vexp.h, lane i of the sum being vector i. */
INLINE __m256 few_fold(__m256 lane[16]) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = _mm256_add_ps(lane[i], lane[i + width]);
    return lane[0];
}

INLINE void few_tokens(const assay_route_args *a, int64_t t, int64_t end, int dtype, int slots) {
    __m256 x[FEW_EXPERTS], v[FEW_SLOTS], id[FEW_SLOTS], lane[16];
    const __m256 nan = few_columns(a, t, dtype, x);
    for (int j = 0; j < FEW_SLOTS; j++) {
        v[j] = _mm256_set1_ps(-INFINITY);
        id[j] = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    }
    for (int64_t e = 0; e < a->num_experts; e++) {
        __m256 value = x[e], own = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)e));
        for (int j = 0; j < slots; j++) {
            const __m256 above = _mm256_cmp_ps(x[e], v[j], _CMP_GT_OQ), old = id[j];
            const __m256 larger = _mm256_max_ps(value, v[j]);
            value = _mm256_min_ps(value, v[j]);
            v[j] = larger;
            id[j] = _mm256_blendv_ps(old, own, above);
            own = _mm256_blendv_ps(own, old, above);
        }
    }
    const __m256 largest = v[0];
    for (int j = 0; j < FEW_SLOTS; j++)
        v[j] = j < a->top_k && j < slots ? vexp8(_mm256_sub_ps(v[j], largest)) : _mm256_setzero_ps();
    for (int i = 0; i < 16; i++) lane[i] = a->renormalize && i < slots ? v[i] : _mm256_setzero_ps();
    if (!a->renormalize)
        for (int64_t e = 0; e < a->num_experts; e++)
            lane[e % 16] = _mm256_add_ps(lane[e % 16], vexp8(_mm256_sub_ps(x[e], largest)));
    const __m256 total = few_fold(lane), scaling = _mm256_set1_ps(a->scaling);
    for (int j = 0; j < slots; j++) v[j] = _mm256_mul_ps(_mm256_div_ps(v[j], total), scaling);
    transpose8(v);
    transpose8(id);

    const unsigned nans = (unsigned)_mm256_movemask_ps(nan);
    _Alignas(32) float first[LANES], w[FEW_SLOTS];
    int32_t ids[FEW_SLOTS];
    const int64_t width = assay_route_width(a);
    _mm256_store_ps(first, largest);
    for (int i = 0; i < LANES; i++, t++) {
        const int32_t status = nans >> i & 1           ? ASSAY_ROW_NAN
                               : first[i] == INFINITY  ? ASSAY_ROW_INF
                               : first[i] == -INFINITY ? ASSAY_ROW_EMPTY
                                                       : ASSAY_ROW_OK;
        float *weights_at = a->topk_weights + t * width;
        int32_t *ids_at = a->topk_ids + t * width;
        a->status[t] = status;
        if (status) {
            assay_route_refuse(a, t, status);
            continue;
        }
        if ((end - t) * width >= FEW_SLOTS) {
            /* Past the row's end lie rows of this same call that are still to be written. */
            _mm256_storeu_ps(weights_at, v[i]);
            _mm256_storeu_ps((float *)ids_at, id[i]);
        } else {
            _mm256_store_ps(w, v[i]);
            _mm256_storeu_ps((float *)ids, id[i]);
            for (int64_t j = 0; j < a->top_k; j++) {
                weights_at[j] = w[j];
                ids_at[j] = ids[j];
            }
        }
        assay_route_share(a, t);
    }
}

#define FEW_CASE(slots)                                                                     \
    static __attribute__((noinline)) int64_t few_experts_##slots(const assay_route_args *a, int64_t t, int64_t end) { \
        for (; t + LANES <= end; t += LANES) {                                              \
            if (a->dtype == ASSAY_F32) few_tokens(a, t, end, ASSAY_F32, slots);             \
            else if (a->dtype == ASSAY_F16) few_tokens(a, t, end, ASSAY_F16, slots);        \
            else few_tokens(a, t, end, ASSAY_BF16, slots);                                  \
        }                                                                                   \
        return t;                                                                           \
    }
FEW_CASE(2) FEW_CASE(4) FEW_CASE(8)

/* Routes whole eights of tokens when this way suits the shape; returns the first token that is left. */
INLINE int64_t route_few_experts(const assay_route_args *a, int64_t t, int64_t end) {
    if (a->num_experts % 8 || a->num_experts > FEW_EXPERTS || a->top_k > FEW_SLOTS || assay_route_keyed(a) ||
        a->scoring != ASSAY_SCORE_SOFTMAX)
        return t;
    return a->top_k <= 2 ? few_experts_2(a, t, end) : a->top_k <= 4 ? few_experts_4(a, t, end) : few_experts_8(a, t, end);
}

#endif

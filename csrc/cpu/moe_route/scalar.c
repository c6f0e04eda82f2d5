/* MoE routing in portable C (moe_route.h states it): one pass over a row that keeps the best so far, sorted, in the output
 * itself. A logit that does not beat the last of them costs one compare. No limit on E or top_k, no memory of its own but
 * where keys are to be made (keys.h). */
#include "keys.h"

static float sum_of_all(const void *row, int dtype, int64_t n, float largest) {
    double total = 0;
    for (int64_t at = 0; at < n; at += SUM_BLOCK) {
        float lane[16] = {0};
        for (int64_t i = at; i < assay_min_i64(at + SUM_BLOCK, n); i++)
            lane[i % 16] += assay_vexp(assay_load_f32(row, dtype, i) - largest);
        total += (double)assay_fold16(lane);
    }
    return (float)total;
}

/* The largest of `keys` into w and their ids into id, sorted; how many there are, or -1 when a key is NaN. */
static int64_t choose(const void *keys, int dtype, int64_t n, int64_t k, float *w, int32_t *id) {
    int64_t chosen = 0;
    for (int64_t e = 0; e < n; e++) {
        const float x = assay_load_f32(keys, dtype, e);
        if (x != x) return -1;
        if (x == -INFINITY || (chosen == k && !(x > w[chosen - 1]))) continue;
        int64_t j = chosen < k ? chosen++ : chosen - 1;
        for (; j > 0 && w[j - 1] < x; j--) {
            w[j] = w[j - 1];
            id[j] = id[j - 1];
        }
        w[j] = x;
        id[j] = (int32_t)e;
    }
    return chosen;
}

/* As choose, by keys made of the row; also the row's largest logit and the softmax's total. */
static int64_t choose_by_keys(const assay_route_args *a, const void *row, float *w, int32_t *id, float *largest,
                              float *total) {
    float x[ASSAY_ROUTE_KEYS];
    *largest = -INFINITY;
    for (int64_t e = 0; e < a->num_experts; e++) {
        x[e] = assay_load_f32(row, a->dtype, e);
        if (x[e] != x[e]) return -1;
        *largest = x[e] > *largest ? x[e] : *largest;
    }
    if (*largest == -INFINITY || *largest == INFINITY) return 0;
    *total = assay_route_keys(a, x, *largest);
    return choose(x, ASSAY_F32, a->num_experts, a->top_k, w, id);
}

static void route_row(const assay_route_args *a, int64_t t) {
    const void *row = (const uint8_t *)a->logits + t * a->ld * (a->dtype == ASSAY_F32 ? 4 : 2);
    float *w = a->topk_weights + t * assay_route_width(a);
    int32_t *id = a->topk_ids + t * assay_route_width(a);
    const int keyed = assay_route_keyed(a);
    float largest = -INFINITY, total = 0;
    const int64_t chosen = keyed ? choose_by_keys(a, row, w, id, &largest, &total)
                                 : choose(row, a->dtype, a->num_experts, a->top_k, w, id);
    if (!keyed && chosen > 0) largest = w[0];
    if (chosen < 0 || largest == INFINITY || largest == -INFINITY) {
        assay_route_refuse(a, t, chosen < 0 ? ASSAY_ROW_NAN : largest == INFINITY ? ASSAY_ROW_INF : ASSAY_ROW_EMPTY);
        return;
    }
    for (int64_t j = chosen; j < a->top_k; j++) id[j] = -1;
    if (!keyed && a->scoring == ASSAY_SCORE_SOFTMAX && !a->renormalize)
        total = sum_of_all(row, a->dtype, a->num_experts, largest);
    assay_route_weigh(a, t, row, largest, total);
    assay_route_share(a, t);
    a->status[t] = ASSAY_ROW_OK;
}

static void route(const assay_route_args *a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) route_row(a, t);
}

const assay_moe_route_kernel assay_moe_route_scalar = {route};

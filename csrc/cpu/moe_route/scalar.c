/* MoE routing in portable C (moe_route.h states it): one pass over a row that keeps the best so far, sorted, in the output
 * itself. A logit that does not beat the last of them costs one compare. No limit on E or top_k, no memory of its own. */
#include "moe_route.h"
#include "../float16.h"
#include "../vexp.h"

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

static float sum_of_chosen(const float *e, int64_t n) {
    double total = 0;
    for (int64_t at = 0; at < n; at += SUM_BLOCK) {
        float lane[16] = {0};
        for (int64_t i = at; i < assay_min_i64(at + SUM_BLOCK, n); i++) lane[i % 16] += e[i];
        total += (double)assay_fold16(lane);
    }
    return (float)total;
}

static void route_row(const assay_route_args *a, int64_t t) {
    const void *row = (const uint8_t *)a->logits + t * a->ld * (a->dtype == ASSAY_F32 ? 4 : 2);
    float *w = a->topk_weights + t * a->top_k;
    int32_t *id = a->topk_ids + t * a->top_k;
    int64_t chosen = 0;
    for (int64_t e = 0; e < a->num_experts; e++) {
        const float x = assay_load_f32(row, a->dtype, e);
        if (x != x) {
            assay_route_refuse(a, t, ASSAY_ROW_NAN);
            return;
        }
        if (x == -INFINITY || (chosen == a->top_k && !(x > w[chosen - 1]))) continue;
        int64_t j = chosen < a->top_k ? chosen++ : chosen - 1;
        for (; j > 0 && w[j - 1] < x; j--) {
            w[j] = w[j - 1];
            id[j] = id[j - 1];
        }
        w[j] = x;
        id[j] = (int32_t)e;
    }
    if (!chosen || w[0] == INFINITY) {
        assay_route_refuse(a, t, chosen ? ASSAY_ROW_INF : ASSAY_ROW_EMPTY);
        return;
    }
    const float largest = w[0];
    for (int64_t j = 0; j < a->top_k; j++) {
        if (j >= chosen) id[j] = -1;
        w[j] = j < chosen ? assay_vexp(w[j] - largest) : 0;
    }
    const float total =
        a->renormalize ? sum_of_chosen(w, a->top_k) : sum_of_all(row, a->dtype, a->num_experts, largest);
    for (int64_t j = 0; j < a->top_k; j++) w[j] /= total;
    a->status[t] = ASSAY_ROW_OK;
}

static void route(const assay_route_args *a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) route_row(a, t);
}

const assay_moe_route_kernel assay_moe_route_scalar = {route};

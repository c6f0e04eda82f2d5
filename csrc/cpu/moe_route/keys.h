/* Routing by other keys than logits, and weights by other scores than softmax: plain loops that each variant's compiler
 * vectorises for its own width. The same operations, and so the same bits, everywhere. */
#ifndef ASSAY_MOE_ROUTE_KEYS_H
#define ASSAY_MOE_ROUTE_KEYS_H

#include "moe_route.h"
#include "../float16.h"
#include "../scores.h"

static inline float assay_route_sum(const float *e, int64_t n) {
    double total = 0;
    for (int64_t at = 0; at < n; at += SUM_BLOCK) {
        float lane[16] = {0};
        const int64_t end = assay_min_i64(at + SUM_BLOCK, n);
        int64_t i = at;
        for (; i + 16 <= end; i += 16)
            for (int j = 0; j < 16; j++) lane[j] += e[i + j];
        for (int j = 0; i + j < end; j++) lane[j] += e[i + j];
        total += (double)assay_fold16(lane);
    }
    return (float)total;
}

static inline void assay_route_scores(int scoring, float *s, int64_t n) {
    if (scoring == ASSAY_SCORE_SIGMOID)
        for (int64_t i = 0; i < n; i++) s[i] = assay_sigmoid(s[i]);
    else if (scoring == ASSAY_SCORE_SQRTSOFTPLUS)
        for (int64_t i = 0; i < n; i++) s[i] = sqrtf(assay_softplus(s[i]));
}

/* The worth of a group of keys. */
static inline float assay_group_worth(const float *key, int64_t n, int top2) {
    float first[16], second[16];
    for (int j = 0; j < 16; j++) first[j] = second[j] = -INFINITY;
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t left = assay_min_i64(16, n - i);
        for (int j = 0; j < left; j++) {
            const float x = key[i + j], lower = x > first[j] ? first[j] : x;
            first[j] = x > first[j] ? x : first[j];
            second[j] = lower > second[j] ? lower : second[j];
        }
    }
    float best = -INFINITY, next = -INFINITY;
    for (int j = 0; j < 32; j++) {
        const float x = j < 16 ? first[j] : second[j - 16];
        if (x > best) {
            next = best;
            best = x;
        } else if (x > next) {
            next = x;
        }
    }
    return top2 && next > -INFINITY ? best + next : best;
}

/* Minus infinity to every key outside the topk_group best groups. */
static inline void assay_route_mask_groups(const assay_route_args *a, float *key) {
    float worth[ASSAY_ROUTE_KEYS];
    const int64_t size = a->num_experts / a->n_group;
    for (int64_t g = 0; g < a->n_group; g++) worth[g] = assay_group_worth(key + g * size, size, a->group_top2);
    for (int64_t g = 0; g < a->n_group; g++) {
        int64_t better = 0;
        for (int64_t h = 0; h < a->n_group; h++) better += worth[h] > worth[g] || (worth[h] == worth[g] && h < g);
        if (better >= a->topk_group)
            for (int64_t i = 0; i < size; i++) key[g * size + i] = -INFINITY;
    }
}

/* Turns a row's logits, of which `largest` is the largest, into keys, in place; returns the softmax's total. */
static inline float assay_route_keys(const assay_route_args *a, float *x, float largest) {
    float s[ASSAY_ROUTE_KEYS], total = 1;
    const int64_t n = a->num_experts;
    if (a->scoring == ASSAY_SCORE_SOFTMAX) {
        for (int64_t i = 0; i < n; i++) s[i] = assay_vexp(x[i] - largest);
        total = assay_route_sum(s, n);
        for (int64_t i = 0; i < n; i++) s[i] /= total;
    } else {
        for (int64_t i = 0; i < n; i++) s[i] = x[i];
        assay_route_scores(a->scoring, s, n);
    }
    if (a->bias)
        for (int64_t i = 0; i < n; i++) s[i] += a->bias[i];
    for (int64_t i = 0; i < n; i++) x[i] = x[i] == -INFINITY ? -INFINITY : s[i];
    if (a->n_group > 1) assay_route_mask_groups(a, x);
    return total;
}

/* Weights of the chosen of row t, whose ids are written: `total` is the softmax's over all experts, `largest` its largest
 * logit. */
static inline void assay_route_weigh(const assay_route_args *a, int64_t t, const void *row, float largest, float total) {
    const int64_t k = a->top_k, at = t * assay_route_width(a);
    const int32_t *id = a->topk_ids + at;
    float *w = a->topk_weights + at;
    const int softmax = a->scoring == ASSAY_SCORE_SOFTMAX;
    int64_t chosen = 0;
    for (; chosen < k && id[chosen] >= 0; chosen++) w[chosen] = assay_load_f32(row, a->dtype, id[chosen]);
    for (int64_t j = chosen; j < k; j++) w[j] = 0;
    if (softmax) {
        if (a->renormalize) largest = -INFINITY;
        for (int64_t j = 0; a->renormalize && j < chosen; j++) largest = w[j] > largest ? w[j] : largest;
        for (int64_t j = 0; j < chosen; j++) w[j] = assay_vexp(w[j] - largest);
    } else {
        assay_route_scores(a->scoring, w, chosen);
    }
    if (a->renormalize) total = assay_route_sum(w, k) + (softmax ? 0 : 1e-20f);
    else if (!softmax) total = 1;
    if (!chosen) total = 1; /* a bias of minus infinity everywhere: zeros, and not 0 / 0 */
    for (int64_t j = 0; j < k; j++) w[j] = w[j] / total * a->scaling;
}

#endif

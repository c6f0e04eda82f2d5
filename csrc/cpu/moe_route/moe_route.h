/* What the variants of moe_route share (assay.h states the op). Of a row l[0..E):
 *   choice   the top_k largest keys, descending, equal ones by id; minus infinity is never chosen. The key is l, or with a
 *            bias or groups what keys.h makes of it
 *   weight   softmax: e_j / total, e = vexp(l - m), total = sum of the chosen e (renormalize, m = the chosen's largest) or
 *            of all E (m = the row's largest); other scores: keys.h. Then times `scaling`.
 * Sums: 16 float32 lanes, element (slot or expert) i in lane i mod 16, folded as vexp.h says; blocks of SUM_BLOCK
 * elements are then added in double, in order. The same operations in every variant: the same bits. */
#ifndef ASSAY_MOE_ROUTE_H
#define ASSAY_MOE_ROUTE_H

#include "../../kernels.h"

enum { SUM_BLOCK = 2048 };

extern const assay_moe_route_kernel assay_moe_route_scalar;

static inline int64_t assay_route_width(const assay_route_args *a) { return a->top_k + a->num_shared; }

/* Whether experts are chosen by keys other than their logits. */
static inline int assay_route_keyed(const assay_route_args *a) { return a->bias || a->n_group > 1; }

/* A row without a choice. */
static inline void assay_route_refuse(const assay_route_args *a, int64_t t, int32_t status) {
    for (int64_t j = t * assay_route_width(a); j < (t + 1) * assay_route_width(a); j++) {
        a->topk_ids[j] = -1;
        a->topk_weights[j] = 0;
    }
    a->status[t] = status;
}

/* The last slots of a row: written after the others, whose vector stores may run over them. */
static inline void assay_route_share(const assay_route_args *a, int64_t t) {
    const int64_t at = t * assay_route_width(a) + a->top_k;
    for (int64_t s = 0; s < a->num_shared; s++) {
        a->topk_ids[at + s] = (int32_t)(a->num_experts + s);
        a->topk_weights[at + s] = a->shared_weight;
    }
}

#endif

/* What the variants of moe_route share. Of a row l[0..E):
 *   choice   the top_k largest, descending, equal ones by id; minus infinity is never chosen
 *   weight   e_j / total, e = vexp(l - l_chosen[0]); total = sum of the chosen e (renormalize) or of all E
 * Sums: 16 float32 lanes, element (slot or expert) i in lane i mod 16, folded as vexp.h says; blocks of SUM_BLOCK
 * elements are then added in double, in order. The same operations in every variant: the same bits. */
#ifndef ASSAY_MOE_ROUTE_H
#define ASSAY_MOE_ROUTE_H

#include "../../kernels.h"

enum { SUM_BLOCK = 2048 };

extern const assay_moe_route_kernel assay_moe_route_scalar;

/* A row without a choice. */
static inline void assay_route_refuse(const assay_route_args *a, int64_t t, int32_t status) {
    for (int64_t j = t * a->top_k; j < (t + 1) * a->top_k; j++) {
        a->topk_ids[j] = -1;
        a->topk_weights[j] = 0;
    }
    a->status[t] = status;
}

#endif

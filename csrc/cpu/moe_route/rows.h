/* Whole rows, made of a variant's row_copy, copy_row, take and weigh: included behind them. ROWS rows at a time, so that
 * the searches of one row fill the waits of another. */
#ifndef ASSAY_MOE_ROUTE_ROWS_H
#define ASSAY_MOE_ROUTE_ROWS_H

#include "keys.h"

/* Largest logit of a copied row. */
INLINE float row_largest(const row_copy *r, int64_t n) {
    float largest = -INFINITY;
    for (int64_t c = 0; c * CHUNK < n; c++) largest = r->chunk_largest[c] > largest ? r->chunk_largest[c] : largest;
    return largest;
}

INLINE int32_t status_of(int nan, float largest) {
    return nan                     ? ASSAY_ROW_NAN
           : largest == INFINITY   ? ASSAY_ROW_INF
           : largest == -INFINITY  ? ASSAY_ROW_EMPTY
                                   : ASSAY_ROW_OK;
}

INLINE void route_rows(const assay_route_args *a, int64_t t, int64_t end, int dtype, int64_t groups, int rows, int keyed) {
    row_copy copies[ROWS];
    _Alignas(64) float chosen[ROWS][MOST_EXPERTS];
    const int64_t width = assay_route_width(a);
    const void *row[ROWS];
    float largest[ROWS], total[ROWS] = {0};
    int nan[ROWS];
    for (int r = 0; r < rows; r++) {
        row[r] = (const uint8_t *)a->logits + (t + r) * a->ld * (dtype == ASSAY_F32 ? 4 : 2);
        nan[r] = copy_row(&copies[r], row[r], dtype, a->num_experts, groups);
        if (!keyed) continue;
        largest[r] = row_largest(&copies[r], a->num_experts);
        if (status_of(nan[r], largest[r])) continue;
        total[r] = assay_route_keys(a, copies[r].x, largest[r]);
        index_row(&copies[r], a->num_experts);
    }
    for (int64_t j = 0; j < a->top_k; j++)
        for (int r = 0; r < rows; r++)
            a->topk_ids[(t + r) * width + j] = take(&copies[r], groups, &chosen[r][j]);
    for (int r = 0; r < rows; r++) {
        for (int64_t j = a->top_k; j % 16; j++) chosen[r][j] = -INFINITY;
        if (!keyed) largest[r] = chosen[r][0];
        const int32_t status = status_of(nan[r], largest[r]);
        a->status[t + r] = status;
        if (status) {
            assay_route_refuse(a, t + r, status);
            continue;
        }
        if (keyed || a->scoring != ASSAY_SCORE_SOFTMAX) assay_route_weigh(a, t + r, row[r], largest[r], total[r]);
        else weigh(a, t + r, end, row[r], dtype, chosen[r]);
        assay_route_share(a, t + r);
    }
}

INLINE void route_range(const assay_route_args *a, int64_t t, int64_t end, int dtype, int64_t groups, int keyed) {
    for (; t + ROWS <= end; t += ROWS) route_rows(a, t, end, dtype, groups, ROWS, keyed);
    for (; t < end; t++) route_rows(a, t, end, dtype, groups, 1, keyed);
}

#endif

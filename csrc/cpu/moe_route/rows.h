/* Whole rows, made of a variant's row_copy, copy_row, take and weigh: included behind them. ROWS rows at a time, so that
 * the searches of one row fill the waits of another. */
#ifndef ASSAY_MOE_ROUTE_ROWS_H
#define ASSAY_MOE_ROUTE_ROWS_H

#include "moe_route.h"

INLINE void route_rows(const assay_route_args *a, int64_t t, int64_t end, int dtype, int64_t groups, int rows) {
    row_copy copies[ROWS];
    _Alignas(64) float chosen[ROWS][MOST_EXPERTS];
    const void *row[ROWS];
    int nan[ROWS];
    for (int r = 0; r < rows; r++) {
        row[r] = (const uint8_t *)a->logits + (t + r) * a->ld * (dtype == ASSAY_F32 ? 4 : 2);
        nan[r] = copy_row(&copies[r], row[r], dtype, a->num_experts, groups);
    }
    for (int64_t j = 0; j < a->top_k; j++)
        for (int r = 0; r < rows; r++)
            a->topk_ids[(t + r) * a->top_k + j] = take(&copies[r], groups, &chosen[r][j]);
    for (int r = 0; r < rows; r++) {
        for (int64_t j = a->top_k; j % 16; j++) chosen[r][j] = -INFINITY;
        const float largest = chosen[r][0];
        const int32_t status = nan[r]                  ? ASSAY_ROW_NAN
                               : largest == INFINITY   ? ASSAY_ROW_INF
                               : largest == -INFINITY  ? ASSAY_ROW_EMPTY
                                                       : ASSAY_ROW_OK;
        a->status[t + r] = status;
        if (status) assay_route_refuse(a, t + r, status);
        else weigh(a, t + r, end, row[r], dtype, chosen[r]);
    }
}

INLINE void route_range(const assay_route_args *a, int64_t t, int64_t end, int dtype, int64_t groups) {
    for (; t + ROWS <= end; t += ROWS) route_rows(a, t, end, dtype, groups, ROWS);
    for (; t < end; t++) route_rows(a, t, end, dtype, groups, 1);
}

#endif

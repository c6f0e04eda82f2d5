/* The functions of a kernel table, made of a variant's largest_of, peak_of, find_in, select_in, keep_in, weights_of,
 * sum_of, moment_of, residual_of and residuals_of: included behind them. */
#ifndef ASSAY_SPEC_VERIFY_BY_TYPE_H
#define ASSAY_SPEC_VERIFY_BY_TYPE_H

#include "spec_verify.h"

/* One loop a type, chosen outside it. */
#define BY_TYPE(call) \
    return dtype == ASSAY_F32 ? call(ASSAY_F32) : dtype == ASSAY_F16 ? call(ASSAY_F16) : call(ASSAY_BF16)

static float largest(const void *row, int dtype, int64_t n) {
#define CALL(type) largest_of(row, type, n)
    BY_TYPE(CALL);
#undef CALL
}

static float peak(const void *row, int dtype, int64_t n) {
#define CALL(type) peak_of(row, type, n)
    BY_TYPE(CALL);
#undef CALL
}

static int64_t find(const void *row, int dtype, int64_t n, float value) {
#define CALL(type) find_in(row, type, n, value)
    BY_TYPE(CALL);
#undef CALL
}

static int64_t select(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where) {
#define CALL(type) select_in(row, type, n, least, values, where)
    BY_TYPE(CALL);
#undef CALL
}

static float keep(const void *row, int dtype, int64_t n, const assay_range *range, float *out) {
#define CALL(type) keep_in(row, type, n, range, out)
    BY_TYPE(CALL);
#undef CALL
}

static float weights(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *out) {
#define CALL(type) weights_of(row, type, n, shift, inverse_t, out)
    BY_TYPE(CALL);
#undef CALL
}

static float sum(const void *row, int dtype, int64_t n, float shift, float inverse_t, const void *ahead, int64_t next_n,
                 float *next_peak) {
#define CALL(type) sum_of(row, type, n, shift, inverse_t, ahead, next_n, next_peak)
    BY_TYPE(CALL);
#undef CALL
}

static float moment(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *total) {
#define CALL(type) moment_of(row, type, n, shift, inverse_t, total)
    BY_TYPE(CALL);
#undef CALL
}

static float residual(const void *row, int dtype, int64_t n, float shift, float inverse_t, float scale, const float *q,
                      float c, float *out) {
#define CALL(type) residual_of(row, type, n, shift, inverse_t, scale, q, c, out)
    BY_TYPE(CALL);
#undef CALL
}

static void residuals(const void *row, int dtype, int64_t n, float shift, float inverse_t, const float *scales, const float *q,
                      float *sums) {
    if (dtype == ASSAY_F32) residuals_of(row, ASSAY_F32, n, shift, inverse_t, scales, q, sums);
    else if (dtype == ASSAY_F16) residuals_of(row, ASSAY_F16, n, shift, inverse_t, scales, q, sums);
    else residuals_of(row, ASSAY_BF16, n, shift, inverse_t, scales, q, sums);
}

#endif

/* What lies between the GEMMs of an expert layer, in loops that a compiler vectorises: elementwise IEEE operations, so that
 * each tier has the same bits. Activations: ../activations.h. */
#ifndef ASSAY_MOE_EXPERTS_LOOPS_H
#define ASSAY_MOE_EXPERTS_LOOPS_H

#include "../../kernels.h"
#include "../activations.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE void activate_rows(const assay_activation *a, int kind, int gated, const float *c, int64_t ldc, int64_t rows,
                          const float *bias, float *h, int64_t ldh, int64_t width) {
    const float limit = a->limit > 0 ? a->limit : INFINITY, alpha = a->alpha;
    const int units = gated ? 16 : 32;
    for (int64_t r = 0; r < rows; r++, c += ldc, h += ldh) {
        float both[ASSAY_TILE_N], unit[ASSAY_TILE_N];
        for (int i = 0; i < ASSAY_TILE_N; i++) both[i] = bias ? c[i] + bias[i] : c[i];
        for (int i = 0; i < units; i++) {
            unit[i] = gated ? assay_gated_unit(kind, alpha, limit, both[i], both[(16 + i) % ASSAY_TILE_N])
                            : assay_activation_of(kind, alpha, assay_at_most(both[i], limit));
        }
        if (width == units)
            for (int i = 0; i < units; i++) h[i] = unit[i];
        else
            for (int64_t i = 0; i < width; i++) h[i] = unit[i];
    }
}

static void activate(const assay_activation *a, const float *c, int64_t ldc, int64_t rows, const float *bias, float *h,
                     int64_t ldh, int64_t width) {
#define CASE(kind)                                                                \
    case kind:                                                                    \
        if (a->gated) activate_rows(a, kind, 1, c, ldc, rows, bias, h, ldh, width); \
        else activate_rows(a, kind, 0, c, ldc, rows, bias, h, ldh, width);          \
        break;
    switch (a->activation) {
        CASE(ASSAY_ACT_SILU)
        CASE(ASSAY_ACT_GELU)
        CASE(ASSAY_ACT_GELU_TANH)
        CASE(ASSAY_ACT_RELU)
        CASE(ASSAY_ACT_RELU2)
        CASE(ASSAY_ACT_SWIGLU_OAI)
    }
#undef CASE
}

INLINE void gather_rows(const uint32_t *const *rows, int n, int64_t words, uint32_t *dst) {
    for (int64_t i = 0; i < words; i++)
        for (int r = 0; r < n; r++) dst[i * n + r] = rows[r][i];
}

static void gather(const uint32_t *const *rows, int64_t n, int64_t words, int64_t unit, uint32_t *dst) {
    if (unit > 1) {
        for (int64_t i = 0; i < words; i += unit)
            for (int64_t r = 0; r < n; r++, dst += unit) memcpy(dst, rows[r] + i, (size_t)unit * 4);
        return;
    }
    switch (n) {
        case 2: gather_rows(rows, 2, words, dst); break;
        case 3: gather_rows(rows, 3, words, dst); break;
        case 4: gather_rows(rows, 4, words, dst); break;
        case 5: gather_rows(rows, 5, words, dst); break;
        case 6: gather_rows(rows, 6, words, dst); break;
        case 7: gather_rows(rows, 7, words, dst); break;
        case 8: gather_rows(rows, 8, words, dst); break;
        default: gather_rows(rows, (int)n, words, dst);
    }
}

static void combine(float *out, const float *y, const float *bias, float w, int more, int64_t n) {
    if (bias && more)
        for (int64_t i = 0; i < n; i++) out[i] = fmaf(w, y[i] + bias[i], out[i]);
    else if (bias)
        for (int64_t i = 0; i < n; i++) out[i] = w * (y[i] + bias[i]);
    else if (more)
        for (int64_t i = 0; i < n; i++) out[i] = fmaf(w, y[i], out[i]);
    else
        for (int64_t i = 0; i < n; i++) out[i] = w * y[i];
}

#endif

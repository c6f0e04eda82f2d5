/* Scalar functions made of vexp.h, written so that a compiler vectorises a loop over them: elementwise IEEE operations, hence
 * the same bits at any vector width.
 *
 *   sigmoid(x)  = 1 / (1 + e) or e / (1 + e) with e = exp(-|x|): no overflow, small values with their full precision
 *   softplus(x) = max(x, 0) + log1p(e);  log1p(e) = 2 atanh(z), z = e / (2 + e) <= 1/3, by its series to z^17 (error 3e-9) */
#ifndef ASSAY_SCORES_H
#define ASSAY_SCORES_H

#include "vexp.h"

ASSAY_SHARED float assay_sigmoid(float x) {
    const float e = assay_vexp(-fabsf(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

ASSAY_SHARED float assay_softplus(float x) {
    const float e = assay_vexp(-fabsf(x));
    const float z = e / (2.0f + e), z2 = z * z;
    float p = 1.0f / 17;
    p = fmaf(p, z2, 1.0f / 15);
    p = fmaf(p, z2, 1.0f / 13);
    p = fmaf(p, z2, 1.0f / 11);
    p = fmaf(p, z2, 1.0f / 9);
    p = fmaf(p, z2, 1.0f / 7);
    p = fmaf(p, z2, 1.0f / 5);
    p = fmaf(p, z2, 1.0f / 3);
    p = fmaf(p, z2, 1.0f);
    return (x > 0 ? x : 0.0f) + 2.0f * z * p;
}

#endif

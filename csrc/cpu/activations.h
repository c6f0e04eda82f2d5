/* The activations of an expert layer: elementwise IEEE operations, the same bits at any vector width and on a GPU. Behind assay.h.
 *
 *   silu(x) = x sigmoid(x)
 *   gelu(x) = x (1 - q / 2) for x >= 0, x q / 2 below; q = erfc(|x| / sqrt 2) by Abramowitz and Stegun 7.1.26: |error| 1.5e-7
 *   gelu_tanh(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the same as x / 2 (1 + tanh(...))
 *   relu(x), relu(x)^2; NaN stays NaN in all of them */
#ifndef ASSAY_ACTIVATIONS_H
#define ASSAY_ACTIVATIONS_H

#include "scores.h"

#ifdef __GNUC__ /* with a constant kind: what a compiler must see through to vectorise the loop around it */
#define ASSAY_INLINED ASSAY_SHARED __attribute__((always_inline))
#else
#define ASSAY_INLINED ASSAY_SHARED
#endif

ASSAY_INLINED float assay_half_erfc(float x) {
    const float z = fabsf(x) * 0x1.6a09e6p-1f;
    const float t = 1.0f / fmaf(0.3275911f, z, 1.0f);
    float p = 1.061405429f;
    p = fmaf(p, t, -1.453152027f);
    p = fmaf(p, t, 1.421413741f);
    p = fmaf(p, t, -0.284496736f);
    p = fmaf(p, t, 0.254829592f);
    return 0.5f * (p * t * assay_vexp(-(z * z)));
}

ASSAY_INLINED float assay_activation_of(int kind, float alpha, float x) {
    if (kind == ASSAY_ACT_SILU) return x * assay_sigmoid(x);
    if (kind == ASSAY_ACT_SWIGLU_OAI) return x * assay_sigmoid(alpha * x);
    if (kind == ASSAY_ACT_GELU) {
        const float q = assay_half_erfc(x);
        return x * (x >= 0 ? 1.0f - q : q);
    }
    if (kind == ASSAY_ACT_GELU_TANH) return x * assay_sigmoid(0x1.988454p+0f * fmaf(0.044715f * x, x * x, x));
    const float r = x < 0 ? 0.0f : x;
    return kind == ASSAY_ACT_RELU2 ? r * r : r;
}

ASSAY_INLINED float assay_at_most(float x, float limit) { return x > limit ? limit : x; }

/* A gate and its up, clamped where limit is not infinite, to a hidden unit. */
ASSAY_INLINED float assay_gated_unit(int kind, float alpha, float limit, float gate, float up) {
    const float u = assay_at_most(up < -limit ? -limit : up, limit);
    return assay_activation_of(kind, alpha, assay_at_most(gate, limit)) * (kind == ASSAY_ACT_SWIGLU_OAI ? u + 1.0f : u);
}

#endif

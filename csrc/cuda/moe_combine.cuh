// Each token's weighted sum of its experts' rows, slots in order: the arithmetic of assay_moe_combine (csrc/assay.h), so the
// same bits as the CPU for the same rows. A block is a token and some columns, a thread kWidth of them; memory-bound: each row is
// read once, with 16-byte loads where rows are aligned to them.
#ifndef ASSAY_MOE_COMBINE_CUH
#define ASSAY_MOE_COMBINE_CUH

#include "ptx.cuh"

#include "assay_cuda.h"

namespace assay {
namespace combine {

enum { THREADS = 128 };

template <int kWidth>
ASSAY_DEVICE void load(float (&v)[kWidth], const float *p) {
    if constexpr (kWidth == 4) {
        const u32x4 w = ptx::ldg128(p);
        v[0] = ptx::uint_as_float(w.x);
        v[1] = ptx::uint_as_float(w.y);
        v[2] = ptx::uint_as_float(w.z);
        v[3] = ptx::uint_as_float(w.w);
    } else {
        v[0] = ptx::ldg_float(p);
    }
}

template <int kWidth>
ASSAY_DEVICE void moe_combine(const assay_cuda_combine_args &a) {
    const int64_t t = ptx::bid_x(), column = (static_cast<int64_t>(ptx::bid_y()) * THREADS + ptx::tid()) * kWidth;
    if (column >= a.n) return;
    float sum[kWidth] = {};
    bool more = false;
    for (int64_t s = t * a.top_k; s < (t + 1) * a.top_k; s++) {
        const int32_t place = static_cast<int32_t>(ptx::ldg32(a.position + s));
        if (place < 0) continue;
        const float w = a.topk_weights ? ptx::ldg_float(a.topk_weights + s) : 1.0f;
        float y[kWidth];
        load<kWidth>(y, a.y + (a.by_slot ? s : place) * a.ldy + column);
        if (a.bias) {
            const int64_t e = static_cast<int32_t>(ptx::ldg32(a.expert_ids + place / a.block_size));
            float bias[kWidth];
            load<kWidth>(bias, a.bias + e * a.n + column);
            ASSAY_UNROLL
            for (int i = 0; i < kWidth; i++) y[i] = ptx::add_rn(y[i], bias[i]);
        }
        ASSAY_UNROLL
        for (int i = 0; i < kWidth; i++) sum[i] = more ? ptx::fma_rn(w, y[i], sum[i]) : ptx::mul_rn(w, y[i]);
        more = true;
    }
    float *out = a.out + t * a.ldo + column;
    if constexpr (kWidth == 4)
        ptx::st(out, u32x4{ptx::float_as_uint(sum[0]), ptx::float_as_uint(sum[1]), ptx::float_as_uint(sum[2]),
                           ptx::float_as_uint(sum[3])});
    else ptx::st(out, sum[0]);
}

}  // namespace combine

using combine::moe_combine;

}  // namespace assay

#endif

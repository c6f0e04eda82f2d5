// Activations to int8 codes, a row and group at a time, with the equations of assay.h's w4a8: s_a = amax / 127,
// q_a = rint(x (127 / amax)); a group whose amax is below 1e-30 is zeros; one with a NaN or infinity has s_a = NaN and zeros.
//
// Within each 32 codes, byte 16 h + 4 t + i holds k = 8 h + 2 t + 16 (i % 2) + i / 2: the order in which w4a8_tile.cuh meets
// the weights. A warp a group; a lane makes four codes at a time, which is one store.
#ifndef ASSAY_A8_QUANTIZE_CUH
#define ASSAY_A8_QUANTIZE_CUH

#include "assay_cuda.h"
#include "ptx.cuh"
#include "w4_layout.h"

namespace assay {

ASSAY_DEVICE float a8_value(const assay_a8_quantize_args &args, const uint8_t *row, uint32_t k, uint32_t end) {
    if (k >= end) return 0;
    if (args.a_dtype == ASSAY_F32) return ptx::uint_as_float(ptx::ldg32(row + 4 * k));
    const uint16_t bits = static_cast<uint16_t>(ptx::ldg16(row + 2 * k));
    return args.a_dtype == ASSAY_F16 ? ptx::half_to_float(bits) : ptx::bf16_to_float(bits);
}

ASSAY_DEVICE void a8_quantize(const assay_a8_quantize_args &args) {
    const uint32_t k = static_cast<uint32_t>(args.k), padded = ceil_div<uint32_t>(k, ASSAY_CUDA_W4_PAD) * ASSAY_CUDA_W4_PAD;
    const uint32_t size = static_cast<uint32_t>(args.group_size), groups = size >= k ? 1 : k / size;
    // Whole groups, and then what pads K.
    const uint32_t units = size >= k ? 1 : padded / size, warps = ptx::block_threads() / 32;
    const uint32_t blocks_a_row = ceil_div(units, warps);
    const uint32_t row = ptx::bid_x() / blocks_a_row, group = ptx::bid_x() % blocks_a_row * warps + ptx::warp();
    if (group >= units) return;
    const uint32_t first = group * size, last = size >= k ? padded : first + size;
    const uint8_t *const from =
        static_cast<const uint8_t *>(args.a) + static_cast<int64_t>(row) * args.lda * (args.a_dtype == ASSAY_F32 ? 4 : 2);
    // The lane's four values of the 128 from `at`.
    const uint32_t block = ptx::lane() / 8, h = ptx::lane() / 4 % 2, t = ptx::lane() % 4;
    auto k_of = [&](uint32_t at, uint32_t i) { return at + 32 * block + 8 * h + 2 * t + 16 * (i % 2) + i / 2; };

    float amax = 0;
    bool finite = true;
    for (uint32_t at = first; at < last; at += 128)
        ASSAY_UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t here = k_of(at, i);
            const uint32_t size_of = ptx::float_as_uint(a8_value(args, from, here, min_of(last, k))) & 0x7FFFFFFFu;
            finite &= size_of < 0x7F800000u;
            amax = max_of(amax, ptx::uint_as_float(size_of));
        }
    ASSAY_UNROLL
    for (uint32_t m = 16; m; m >>= 1) amax = max_of(amax, ptx::shfl_xor(amax, m));
    finite = ptx::all(finite);
    const bool live = finite && amax >= 1e-30f;
    const float to_code = live ? ptx::div_rn(127.0f, amax) : 0.0f;

    int32_t sum = 0;
    uint8_t *const to = static_cast<uint8_t *>(args.codes) + static_cast<uint64_t>(row) * padded;
    for (uint32_t at = first; at < last; at += 128) {
        uint32_t codes = 0;
        ASSAY_UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            const float x = live ? a8_value(args, from, k_of(at, i), min_of(last, k)) : 0.0f;
            const int32_t code = ptx::float_to_int(ptx::mul_rn(x, to_code));
            sum += code;
            codes |= (static_cast<uint32_t>(code) & 255) << (8 * i);
        }
        const uint32_t place = at + 32 * block + 16 * h + 4 * t;
        if (place < last) ptx::st(to + place, codes);
    }
    ASSAY_UNROLL
    for (uint32_t m = 16; m; m >>= 1) sum += ptx::shfl_xor(sum, m);
    if (ptx::lane() == 0 && group < groups) {
        const uint32_t scale = finite ? ptx::float_as_uint(live ? ptx::div_rn(amax, 127.0f) : 0.0f) : 0x7FC00000u;
        ptx::st(args.groups + static_cast<uint64_t>(row) * groups + group, u32x2{scale, static_cast<uint32_t>(sum)});
    }
}

}  // namespace assay

#endif

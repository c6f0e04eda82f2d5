// Probes of the machine: what it can do at most, for the roofs of the cost model. One effect a kernel.
#ifndef ASSAY_PROBE_CUH
#define ASSAY_PROBE_CUH

#include "assay_cuda.h"
#include "ptx.cuh"

namespace assay {

// Reads memory as fast as it comes: four independent 16-byte loads a thread in flight. From DRAM when `bytes` is far more than
// L2 holds, from L2 when it is less and repeats > 1.
ASSAY_DEVICE void probe_read(const assay_probe_read_args &args) {
    const uint64_t threads = static_cast<uint64_t>(ptx::grid_x()) * ptx::block_threads();
    const uint64_t first = static_cast<uint64_t>(ptx::bid_x()) * ptx::block_threads() + ptx::tid();
    const uint8_t *from = static_cast<const uint8_t *>(args.from);
    const uint64_t pieces = args.bytes / 16;
    uint32_t sum = 0;
    for (uint32_t r = 0; r < args.repeats; r++) {
        for (uint64_t i = first; i < pieces; i += 4 * threads) {
            u32x4 v[4];
            ASSAY_UNROLL
            for (int j = 0; j < 4; j++) {
                const uint64_t at = i + static_cast<uint64_t>(j) * threads;
                v[j] = at < pieces ? ptx::ldcg128(from + 16 * at) : u32x4{0, 0, 0, 0};
            }
            ASSAY_UNROLL
            for (int j = 0; j < 4; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
        }
    }
    ASSAY_UNROLL
    for (uint32_t m = 16; m; m >>= 1) sum ^= ptx::shfl_xor(sum, m);
    uint32_t *sums = reinterpret_cast<uint32_t *>(ptx::shared());
    if (ptx::lane() == 0) ptx::sts(sums + ptx::warp(), sum);
    ptx::sync();
    if (ptx::tid() == 0) {
        for (uint32_t w = 1; w < ptx::block_threads() / 32; w++) sum ^= ptx::lds32(sums + w);
        ptx::st(args.sink + ptx::bid_x(), sum);
    }
}

}  // namespace assay

#endif

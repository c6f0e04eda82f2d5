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

// Nothing: what a launch costs, and a node of a graph.
ASSAY_DEVICE void probe_empty(const assay_probe_empty_args &args) {
    if (args.sink && ptx::tid() == 0) ptx::st(args.sink, args.value);
}

// Writes memory, again and again: args.value everywhere in the end. Other values before, so that no write can be left out.
ASSAY_DEVICE void probe_write(const assay_probe_write_args &args) {
    const uint64_t threads = static_cast<uint64_t>(ptx::grid_x()) * ptx::block_threads();
    uint8_t *const to = static_cast<uint8_t *>(args.to);
    for (uint32_t left = args.repeats; left--;) {
        const uint32_t value = args.value + left;
        for (uint64_t i = static_cast<uint64_t>(ptx::bid_x()) * ptx::block_threads() + ptx::tid(); i < args.bytes / 16;
             i += threads)
            ptx::st(to + 16 * i, u32x4{value, value, value, value});
    }
}

// Tensor cores at their peak: eight independent accumulators a warp, operands in registers. c = repeats a b, which the host can check:
// with all of a and b one, every element of c is repeats times k.
template <class T>
ASSAY_DEVICE void probe_mma(const assay_probe_mma_args &args) {
    typename T::Sum c[8][4] = {};
    const uint32_t a[4] = {args.a, args.a, args.a, args.a}, b[2] = {args.b, args.b};
    ASSAY_NO_UNROLL
    for (uint32_t r = 0; r < args.repeats; r++) {
        ASSAY_UNROLL
        for (int i = 0; i < 8; i++) T::mma(c[i], a, b);
    }
    typename T::Sum sum = 0;
    ASSAY_UNROLL
    for (int i = 0; i < 8; i++)
        ASSAY_UNROLL
        for (int e = 0; e < 4; e++) sum += c[i][e];
    ptx::st(static_cast<typename T::Sum *>(args.sink) + static_cast<uint64_t>(ptx::bid_x()) * ptx::block_threads() + ptx::tid(),
            sum);
}
struct ProbeF16 {
    using Sum = float;
    ASSAY_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_f16(c, a, b); }
};
struct ProbeBF16 {
    using Sum = float;
    ASSAY_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_bf16(c, a, b); }
};
struct ProbeS8 {
    using Sum = int32_t;
    ASSAY_DEVICE static void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_s8(c, a, b); }
};

// Atomics: every thread adds 1 to counters[its number % slots], again and again. One slot: contention; many: throughput.
ASSAY_DEVICE void probe_atomic(const assay_probe_atomic_args &args) {
    const uint32_t slot = (ptx::bid_x() * ptx::block_threads() + ptx::tid()) % args.slots;
    ASSAY_NO_UNROLL
    for (uint32_t r = 0; r < args.repeats; r++) ptx::atomic_add(args.counters + slot, 1u);
}

}  // namespace assay

#endif

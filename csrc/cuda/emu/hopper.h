// The CPU's half of ptx_sm90a.cuh.
#ifndef ASSAY_EMU_HOPPER_H
#define ASSAY_EMU_HOPPER_H

#include "../ptx.cuh"

namespace assay {
namespace emu {

void mbarrier_init(void *barrier, uint32_t arrivals);
void mbarrier_arrive(void *barrier, uint32_t expected_bytes);
void mbarrier_wait(void *barrier, uint32_t parity);
void bulk_load(void *smem, const void *gmem, uint32_t bytes, void *barrier);

// One lane's part of a warpgroup product of 64 by `columns` by 16.
struct WarpgroupProduct {
    float *d;                     // columns / 2 values
    uint32_t a[4];
    uint64_t b;
    uint32_t columns;
    bool accumulate;
    float (*value)(uint16_t);     // of a 16-bit operand
};
void wgmma_issue(const WarpgroupProduct &mine);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(uint32_t newest_under_way);

}  // namespace emu
namespace ptx {

inline void mbarrier_init(uint64_t *barrier, uint32_t arrivals) { emu::mbarrier_init(barrier, arrivals); }
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(uint64_t *barrier) { emu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes) { emu::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t *barrier, uint32_t parity) { emu::mbarrier_wait(barrier, parity); }
inline void bulk_load(void *smem, const void *gmem, uint32_t bytes, uint64_t *barrier) {
    emu::bulk_load(smem, gmem, bytes, barrier);
}
inline void bulk_load_stream(void *smem, const void *gmem, uint32_t bytes, uint64_t *barrier) {
    emu::bulk_load(smem, gmem, bytes, barrier);
}
template <int N>
inline void registers_fewer() {}
template <int N>
inline void registers_more() {}
inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int N>
inline void wgmma_wait() {
    emu::wgmma_wait(N);
}
inline uint64_t wgmma_descriptor(const void *smem) {
    return (shared_address(smem) >> 4 & 0x3FFF) | 1ull << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}
template <int D>
inline void wgmma_f16(float (&d)[D], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emu::wgmma_issue({d, {a[0], a[1], a[2], a[3]}, b, 2 * D, accumulate, emu::half_to_float});
}
template <int D>
inline void wgmma_bf16(float (&d)[D], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emu::wgmma_issue({d, {a[0], a[1], a[2], a[3]}, b, 2 * D, accumulate, emu::bf16_to_float});
}

}  // namespace ptx
}  // namespace assay

#endif

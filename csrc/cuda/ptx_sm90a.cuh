// Hopper's own instructions: barriers in shared memory that count bytes, bulk copies (TMA), and warpgroup matrix products. One
// function an instruction, two back ends, as ptx.cuh; only files whose name ends in _sm90a include it.
#ifndef ASSAY_PTX_SM90A_CUH
#define ASSAY_PTX_SM90A_CUH

#include "ptx.cuh"

#ifndef __CUDACC__
#include "emu/hopper.h"
#else

namespace assay {
namespace ptx {

// ---- barriers in shared memory ------------------------------------------------------------------------
// A phase ends when `arrivals` have come and as many bytes as were expected. Eight bytes at a multiple of 8.
ASSAY_DEVICE void mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine; before the block's first sync().
ASSAY_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
ASSAY_DEVICE void mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and adds to the bytes that the phase waits for.
ASSAY_DEVICE void mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Until the phase of this parity has ended: 0 for the first, 1 for the second and so on. Of a fresh barrier, that of parity 1 has.
ASSAY_DEVICE void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- bulk copies ----------------------------------------------------------------------------------------
// By one thread: `bytes` (a multiple of 16, both ends 16-byte aligned) from global to shared memory, reported to the barrier.
ASSAY_DEVICE void bulk_load(void *smem, const void *gmem, uint32_t bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(smem)),
                 "l"(gmem), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// The same for data read once: the first to leave L2.
ASSAY_DEVICE void bulk_load_stream(void *smem, const void *gmem, uint32_t bytes, uint64_t *barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(smem)),
        "l"(gmem), "r"(bytes), "r"(shared_address(barrier)), "l"(stream_policy())
        : "memory");
}

// ---- warpgroup products -----------------------------------------------------------------------------------
// A whole warpgroup gives back registers, or takes what others gave: N a thread from here on.
template <int N>
ASSAY_DEVICE void registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
ASSAY_DEVICE void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
// Before the first product after registers of a or d were written.
ASSAY_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ASSAY_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups are under way: then the others' d may be read, and their a and b changed.
template <int N>
ASSAY_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// b of a product: rows of 128 bytes, 16-byte pieces swizzled by row (piece ^ row % 8), in tiles of 8 rows that begin at multiples
// of 1024; smem within a row's first 128 bytes selects k.
ASSAY_DEVICE uint64_t wgmma_descriptor(const void *smem) {
    return (shared_address(smem) >> 4 & 0x3FFF) | 1ull << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}
// d (+)= a b: 64 rows of a in registers (16 a warp, as mma's), N rows of b in shared memory, k 16. d[4 i + e]: row as mma's, column 8 i + ...
#define ASSAY_WGMMA_32(TYPE)                                                                                          \
    ASSAY_DEVICE void wgmma_##TYPE(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {             \
        asm volatile(                                                                                                 \
            "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"                                                        \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." #TYPE "." #TYPE " "                                         \
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                 \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                       \
            "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n\t}"                                                             \
            :                                                                                                         \
              "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),         \
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),   \
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])  \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                 \
    }
#define ASSAY_WGMMA_64(TYPE)                                                                                          \
    ASSAY_DEVICE void wgmma_##TYPE(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {             \
        asm volatile(                                                                                                 \
            "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"                                                        \
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." #TYPE "." #TYPE " "                                        \
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                 \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                        \
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                        \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                       \
            "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n\t}"                                                             \
            :                                                                                                         \
              "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),         \
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),   \
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
              "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
              "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
              "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
              "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])  \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                 \
    }
ASSAY_WGMMA_32(f16)
ASSAY_WGMMA_32(bf16)
ASSAY_WGMMA_64(f16)
ASSAY_WGMMA_64(bf16)
#undef ASSAY_WGMMA_32
#undef ASSAY_WGMMA_64

}  // namespace ptx
}  // namespace assay

#endif
#endif

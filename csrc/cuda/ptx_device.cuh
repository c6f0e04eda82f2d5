// The GPU's half of ptx.cuh: one instruction (or one compiler intrinsic) a function. Needs sm_80.
#ifndef ASSAY_PTX_DEVICE_CUH
#define ASSAY_PTX_DEVICE_CUH

namespace assay {
namespace ptx {

// ---- where am I ----------------------------------------------------------------------------------
ASSAY_DEVICE uint32_t tid() { return threadIdx.x; }
ASSAY_DEVICE uint32_t bid_x() { return blockIdx.x; }
ASSAY_DEVICE uint32_t bid_y() { return blockIdx.y; }
ASSAY_DEVICE uint32_t bid_z() { return blockIdx.z; }
ASSAY_DEVICE uint32_t grid_x() { return gridDim.x; }
ASSAY_DEVICE uint32_t grid_y() { return gridDim.y; }
ASSAY_DEVICE uint32_t grid_z() { return gridDim.z; }
ASSAY_DEVICE uint32_t block_threads() { return blockDim.x; }
ASSAY_DEVICE uint32_t lane() { return threadIdx.x & 31; }
ASSAY_DEVICE uint32_t warp() { return threadIdx.x >> 5; }

// Dynamic shared memory of the block.
ASSAY_DEVICE uint8_t *shared() {
    extern __shared__ __align__(1024) uint8_t assay_shared_memory[];
    return assay_shared_memory;
}
ASSAY_DEVICE uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- barriers and fences ---------------------------------------------------------------------------
ASSAY_DEVICE void sync() { __syncthreads(); }
ASSAY_DEVICE void bar_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ASSAY_DEVICE void sync_warp(uint32_t mask = ~0u) { __syncwarp(mask); }
ASSAY_DEVICE void fence_device() { __threadfence(); }

// ---- warp collectives, every lane of the warp together ----------------------------------------------
template <class T>
ASSAY_DEVICE T shfl(T v, uint32_t src) {
    return __shfl_sync(~0u, v, static_cast<int>(src));
}
template <class T>
ASSAY_DEVICE T shfl_xor(T v, uint32_t mask) {
    return __shfl_xor_sync(~0u, v, static_cast<int>(mask));
}
template <class T>
ASSAY_DEVICE T shfl_up(T v, uint32_t delta) {
    return __shfl_up_sync(~0u, v, delta);
}
template <class T>
ASSAY_DEVICE T shfl_down(T v, uint32_t delta) {
    return __shfl_down_sync(~0u, v, delta);
}
ASSAY_DEVICE uint32_t ballot(bool p) { return __ballot_sync(~0u, p); }
ASSAY_DEVICE bool any(bool p) { return __any_sync(~0u, p) != 0; }
ASSAY_DEVICE bool all(bool p) { return __all_sync(~0u, p) != 0; }
ASSAY_DEVICE uint32_t match_any(uint32_t v) { return __match_any_sync(~0u, v); }
ASSAY_DEVICE uint32_t redux_max(uint32_t v) { return __reduce_max_sync(~0u, v); }
ASSAY_DEVICE uint32_t redux_min(uint32_t v) { return __reduce_min_sync(~0u, v); }

// ---- bits ------------------------------------------------------------------------------------------
ASSAY_DEVICE uint32_t popc(uint32_t v) { return static_cast<uint32_t>(__popc(v)); }
ASSAY_DEVICE uint32_t popc(uint64_t v) { return static_cast<uint32_t>(__popcll(v)); }
// Position of the lowest set bit, counted from 1; 0 when none is set.
ASSAY_DEVICE uint32_t ffs(uint32_t v) { return static_cast<uint32_t>(__ffs(static_cast<int>(v))); }
ASSAY_DEVICE uint32_t ffs(uint64_t v) { return static_cast<uint32_t>(__ffsll(static_cast<long long>(v))); }
// Leading and trailing zeros; the width when v is 0.
ASSAY_DEVICE uint32_t clz(uint32_t v) { return static_cast<uint32_t>(__clz(static_cast<int>(v))); }
ASSAY_DEVICE uint32_t clz(uint64_t v) { return static_cast<uint32_t>(__clzll(static_cast<long long>(v))); }
ASSAY_DEVICE uint32_t ctz(uint32_t v) { return v ? ffs(v) - 1 : 32; }
ASSAY_DEVICE uint32_t ctz(uint64_t v) { return v ? ffs(v) - 1 : 64; }
ASSAY_DEVICE uint32_t mulhi32(uint32_t a, uint32_t b) { return __umulhi(a, b); }
template <uint32_t LUT>
ASSAY_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(LUT));
    return d;
}
ASSAY_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
ASSAY_DEVICE uint32_t float_as_uint(float v) { return __float_as_uint(v); }
ASSAY_DEVICE float uint_as_float(uint32_t v) { return __uint_as_float(v); }
ASSAY_DEVICE uint64_t double_as_ulong(double v) { return static_cast<uint64_t>(__double_as_longlong(v)); }
ASSAY_DEVICE double ulong_as_double(uint64_t v) { return __longlong_as_double(static_cast<long long>(v)); }

// ---- float and double, rounded to nearest, never contracted ------------------------------------------
ASSAY_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
ASSAY_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
ASSAY_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
ASSAY_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
ASSAY_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ASSAY_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
ASSAY_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
ASSAY_DEVICE double div_rn(double a, double b) { return __ddiv_rn(a, b); }
ASSAY_DEVICE double sqrt_rn(double a) { return __dsqrt_rn(a); }
ASSAY_DEVICE double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
// Nearest integer, ties to even, saturating; 0 for NaN.
ASSAY_DEVICE int32_t float_to_int(float a) { return __float2int_rn(a); }
ASSAY_DEVICE float rint_even(float a) {
    float d;
    asm("cvt.rni.f32.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// ---- half and bfloat16 as bits ------------------------------------------------------------------------
ASSAY_DEVICE float half_to_float(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
ASSAY_DEVICE uint16_t float_to_half(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
ASSAY_DEVICE float bf16_to_float(uint16_t h) { return __uint_as_float(static_cast<uint32_t>(h) << 16); }
ASSAY_DEVICE uint16_t float_to_bf16(float f) {
    uint16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
ASSAY_DEVICE uint32_t pack_half2(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
ASSAY_DEVICE uint32_t pack_bf162(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
ASSAY_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
ASSAY_DEVICE uint32_t hadd2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
ASSAY_DEVICE uint32_t hsub2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
ASSAY_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
ASSAY_DEVICE uint32_t bfma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// sm_80 has no bf16x2 add or multiply: a b + (-0) and a 1 + b round the same once.
ASSAY_DEVICE uint32_t bmul2(uint32_t a, uint32_t b) { return bfma2(a, b, 0x80008000u); }
ASSAY_DEVICE uint32_t badd2(uint32_t a, uint32_t b) { return bfma2(a, 0x3F803F80u, b); }

// ---- global memory -------------------------------------------------------------------------------------
// Through the read-only path: data that no block writes during the launch.
ASSAY_DEVICE uint32_t ldg8(const void *p) { return __ldg(static_cast<const unsigned char *>(p)); }
ASSAY_DEVICE uint32_t ldg16(const void *p) { return __ldg(static_cast<const unsigned short *>(p)); }
ASSAY_DEVICE uint32_t ldg32(const void *p) { return __ldg(static_cast<const unsigned int *>(p)); }
ASSAY_DEVICE u32x2 ldg64(const void *p) {
    u32x2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
ASSAY_DEVICE u32x4 ldg128(const void *p) {
    u32x4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
ASSAY_DEVICE float ldg_float(const float *p) { return __ldg(p); }
// For data read once: the first to leave L2. Not volatile, so that a loop makes it once.
ASSAY_DEVICE uint64_t stream_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// Read once: no line in L1 either.
ASSAY_DEVICE u32x4 ld128_stream(const void *p) {
    u32x4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(stream_policy()));
    return v;
}
// From L2, past L1: data that other blocks wrote.
template <class T>
ASSAY_DEVICE T ldcg(const T *p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "ldcg: 4 or 8 bytes");
    return __ldcg(p);
}
ASSAY_DEVICE uint64_t ldcg(const uint64_t *p) { return __ldcg(reinterpret_cast<const unsigned long long *>(p)); }
ASSAY_DEVICE u32x4 ldcg128(const void *p) {
    u32x4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
template <class T>
ASSAY_DEVICE void st(void *p, T v) {
    *static_cast<T *>(p) = v;
}

// ---- shared memory ---------------------------------------------------------------------------------------
ASSAY_DEVICE uint32_t lds32(const void *p) { return *static_cast<const uint32_t *>(p); }
ASSAY_DEVICE u32x2 lds64(const void *p) { return *static_cast<const u32x2 *>(p); }
ASSAY_DEVICE u32x4 lds128(const void *p) { return *static_cast<const u32x4 *>(p); }
template <class T>
ASSAY_DEVICE void sts(void *p, T v) {
    *static_cast<T *>(p) = v;
}

// ---- atomics and flags between blocks ------------------------------------------------------------------------
ASSAY_DEVICE int32_t atomic_add(int32_t *p, int32_t v) { return atomicAdd(p, v); }
ASSAY_DEVICE uint32_t atomic_add(uint32_t *p, uint32_t v) { return atomicAdd(p, v); }
ASSAY_DEVICE float atomic_add(float *p, float v) { return atomicAdd(p, v); }
ASSAY_DEVICE uint64_t atomic_add(uint64_t *p, uint64_t v) {
    return atomicAdd(reinterpret_cast<unsigned long long *>(p), static_cast<unsigned long long>(v));
}
ASSAY_DEVICE int32_t atomic_max(int32_t *p, int32_t v) { return atomicMax(p, v); }
ASSAY_DEVICE uint32_t atomic_max(uint32_t *p, uint32_t v) { return atomicMax(p, v); }
ASSAY_DEVICE uint64_t atomic_max(uint64_t *p, uint64_t v) {
    return atomicMax(reinterpret_cast<unsigned long long *>(p), static_cast<unsigned long long>(v));
}
ASSAY_DEVICE int32_t atomic_min(int32_t *p, int32_t v) { return atomicMin(p, v); }
ASSAY_DEVICE uint32_t atomic_min(uint32_t *p, uint32_t v) { return atomicMin(p, v); }
ASSAY_DEVICE uint64_t atomic_min(uint64_t *p, uint64_t v) {
    return atomicMin(reinterpret_cast<unsigned long long *>(p), static_cast<unsigned long long>(v));
}
ASSAY_DEVICE uint32_t atomic_or(uint32_t *p, uint32_t v) { return atomicOr(p, v); }
ASSAY_DEVICE uint32_t atomic_cas(uint32_t *p, uint32_t expected, uint32_t v) { return atomicCAS(p, expected, v); }
ASSAY_DEVICE uint64_t atomic_cas(uint64_t *p, uint64_t expected, uint64_t v) {
    return atomicCAS(reinterpret_cast<unsigned long long *>(p), static_cast<unsigned long long>(expected),
                     static_cast<unsigned long long>(v));
}
ASSAY_DEVICE uint32_t atomic_exch(uint32_t *p, uint32_t v) { return atomicExch(p, v); }
ASSAY_DEVICE uint32_t ld_acquire(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
ASSAY_DEVICE void st_release(uint32_t *p, uint32_t v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
ASSAY_DEVICE void red_add_release(uint32_t *p, uint32_t v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Acquire and release: what this block did before is seen by whoever reads the sum after, and the other way round.
ASSAY_DEVICE uint32_t atomic_add_acq_rel(uint32_t *p, uint32_t v) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------
// 16 bytes from global to shared, past L1; zeros when not valid (gmem is then not read).
ASSAY_DEVICE void cp_async16(void *smem, const void *gmem, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// The same for data read once: the first to leave L2.
ASSAY_DEVICE void cp_async16_stream(void *smem, const void *gmem, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(smem)), "l"(gmem),
                 "r"(valid ? 16 : 0), "l"(stream_policy())
                 : "memory");
}
ASSAY_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
ASSAY_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrices --------------------------------------------------------------------------------------------------------
// Lane i gives the address of row i % 8 of matrix i / 8 (8 rows of 16 bytes each).
ASSAY_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
}
ASSAY_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void *smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem))
                 : "memory");
}
ASSAY_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
}
// c += a b: m16n8k16, a row-major, b column-major.
ASSAY_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ASSAY_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// m16n8k32, signed bytes.
ASSAY_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Nanoseconds of the device's timer.
ASSAY_DEVICE uint64_t timer_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

}  // namespace ptx
}  // namespace assay

#endif

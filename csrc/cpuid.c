/* Which tiers of isa.inc this CPU and its operating system can run. */
#include "kernels.h"

#include <stdatomic.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

static uint64_t xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

static int probe(int isa) {
    if (isa == ASSAY_ISA_scalar) return 1;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return 0;
    /* The OS must save the registers: XCR0 bits 1, 2 for ymm; 5, 6, 7 too for zmm and masks. */
    uint64_t saved = xcr0();
    if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int avx2 = (b >> 5) & 1;
    if (isa == ASSAY_ISA_avx2) return avx2;
    if (isa == ASSAY_ISA_avx512vnni) {
#ifdef ASSAY_EMULATED_AVX512 /* the tests' build, whose AVX-512 intrinsics are emulated */
        return avx2;
#else
        const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
        return avx2 && (saved & 0xe6) == 0xe6 && (b & (f | dq | bw | vl)) == (f | dq | bw | vl) && ((c >> 11) & 1);
#endif
    }
    return 0;
}
#else
static int probe(int isa) {
#if defined(__aarch64__)
    if (isa == ASSAY_ISA_neon) return 1;
#endif
    return isa == ASSAY_ISA_scalar;
}
#endif

int assay_cpu_supports(int isa) {
    /* Asked once: cpuid traps to the hypervisor in a virtual machine and costs microseconds there. 0 not asked, 1 no, 2 yes. */
    static _Atomic int known[ASSAY_ISA_COUNT];
    if (isa < 0 || isa >= ASSAY_ISA_COUNT) return 0;
    int k = atomic_load_explicit(&known[isa], memory_order_relaxed);
    if (!k) atomic_store_explicit(&known[isa], k = 1 + probe(isa), memory_order_relaxed);
    return k == 2;
}

/* Which tiers of isa.inc this CPU and its operating system can run. */
#define _GNU_SOURCE /* syscall */
#include "kernels.h"

#include <stdatomic.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

static uint64_t xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

#ifndef ASSAY_EMULATED_X86
/* Linux hands out the 8 KB of tile registers to a process that asks (arch/x86/include/uapi/asm/prctl.h, since 5.16); the
 * answer holds for all its threads. It says no where a signal stack is too small for them. */
static int may_use_tiles(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}
#endif

static int probe(int isa) {
    if (isa == ASSAY_ISA_scalar) return 1;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return 0;
    /* The OS must save the registers: XCR0 bits 1, 2 for ymm; 5, 6, 7 too for zmm and masks. */
    uint64_t saved = xcr0();
    if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const int avx2 = (b >> 5) & 1;
    if (isa == ASSAY_ISA_avx2) return avx2;
#ifdef ASSAY_EMULATED_X86 /* the tests' build, whose intrinsics beyond AVX2 are emulated */
    return avx2 && (isa == ASSAY_ISA_avxvnni || isa == ASSAY_ISA_avx512vnni || isa == ASSAY_ISA_avx512bf16 ||
                    isa == ASSAY_ISA_amx);
#else
    uint32_t a1 = 0, b1, c1, d1; /* leaf 7 subleaf 1 */
    if (!__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) a1 = 0;
    if (isa == ASSAY_ISA_avxvnni) return avx2 && ((a1 >> 4) & 1);
    const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    const int avx512 =
        avx2 && (saved & 0xe6) == 0xe6 && (b & (f | dq | bw | vl)) == (f | dq | bw | vl) && ((c >> 11) & 1);
    if (isa == ASSAY_ISA_avx512vnni) return avx512;
    if (isa == ASSAY_ISA_avx512bf16) return avx512 && ((a1 >> 5) & 1);
    /* XCR0 bits 17 and 18: tile configuration and tile data. */
    const uint32_t amx_tile = 1u << 24, amx_int8 = 1u << 25, both = amx_tile | amx_int8;
    if (isa == ASSAY_ISA_amx) return avx512 && (saved & 0x60000) == 0x60000 && (d & both) == both && may_use_tiles();
    return 0;
#endif
}
#else
#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
static int has_dot_product(void) { return (getauxval(AT_HWCAP) >> 20) & 1; } /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
static int has_dot_product(void) { return 1; } /* every Apple M1 and later */
#else
static int has_dot_product(void) { return 0; }
#endif
#endif

static int probe(int isa) {
#if defined(__aarch64__)
    if (isa == ASSAY_ISA_neon) return 1;
    if (isa == ASSAY_ISA_neondot) return has_dot_product();
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

/* What arrives in the latency of a load: some 200 ns at 40 GB/s are 8 KiB (Zen 5). Intel's cores with AMX read half as fast, and
 * their own prefetcher follows a stream; asked 8 KiB ahead it is disturbed: a layer of experts took 14% longer than with 2 KiB
 * (Granite Rapids). */
int64_t assay_stream_ahead(void) { return assay_cpu_supports(ASSAY_ISA_amx) ? 2048 : 8192; }

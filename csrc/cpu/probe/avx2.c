/* Probes for AVX2. int8: vpmaddubsw + vpaddw, as in the INT4 GEMM without its unpacking and scaling: 64 operations a pair,
 * at best two pairs a cycle (Zen 3: two multiply ports, four adders). fp32: two FMAs of 8 lanes a cycle.
 * exp: as verification sums it, of what lies in L1. */
#include "../../kernels.h"
#include "../vexp_avx2.h"

static uint64_t read_all(const void *buffer, size_t bytes, size_t ahead) {
    const uint8_t *at = buffer;
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    size_t i = 0;
    for (; i + 128 <= bytes; i += 128) {
        if (ahead)
            for (size_t line = 0; line < 128; line += 64) _mm_prefetch((const char *)at + i + line + ahead, _MM_HINT_T0);
        a = _mm256_xor_si256(a, _mm256_loadu_si256((const __m256i *)(at + i)));
        b = _mm256_xor_si256(b, _mm256_loadu_si256((const __m256i *)(at + i + 32)));
        c = _mm256_xor_si256(c, _mm256_loadu_si256((const __m256i *)(at + i + 64)));
        d = _mm256_xor_si256(d, _mm256_loadu_si256((const __m256i *)(at + i + 96)));
    }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    uint64_t lanes[4], rest = 0;
    _mm256_storeu_si256((__m256i *)lanes, a);
    for (; i < bytes; i++) rest ^= at[i];
    return lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3] ^ rest;
}

/* Twelve independent sums, by name: an array of them would live in memory. */
enum { CHAINS = 12 };
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define START_INT(i) __m256i acc##i = _mm256_setzero_si256();
#define START_FLOAT(i) __m256 acc##i = _mm256_setzero_ps();
#define HOLD(i) __asm__ volatile("" : "+x"(acc##i));

static double int8(int64_t iterations) {
    __m256i w = _mm256_set1_epi8(7), x = _mm256_set1_epi8(-3);
    EACH(START_INT)
    for (int64_t n = 0; n < iterations; n++) {
#define MADD(i)                                                        \
    __asm__ volatile("" : "+x"(w)); /* a new product each time */      \
    acc##i = _mm256_add_epi16(acc##i, _mm256_maddubs_epi16(w, x));
        EACH(MADD)
        EACH(HOLD)
    }
    return 64.0 * CHAINS * (double)iterations;
}

static double fp32(int64_t iterations) {
    const __m256 w = _mm256_set1_ps(1.0f), x = _mm256_set1_ps(1e-9f);
    EACH(START_FLOAT)
    for (int64_t n = 0; n < iterations; n++) {
#define FMA(i) acc##i = _mm256_fmadd_ps(w, x, acc##i);
        EACH(FMA)
        EACH(HOLD)
    }
    return 16.0 * CHAINS * (double)iterations;
}

static double exponentials(int64_t iterations) {
    enum { ELEMENTS = 2048 };
    _Alignas(64) float x[ELEMENTS];
    for (int i = 0; i < ELEMENTS; i++) x[i] = -0.01f * (float)i;
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    const __m256 top = _mm256_set1_ps(0.5f);
    for (int64_t n = 0; n < iterations; n++) {
        for (int i = 0; i < ELEMENTS; i += 16) {
            s0 = _mm256_add_ps(s0, vexp8(_mm256_sub_ps(_mm256_load_ps(x + i), top)));
            s1 = _mm256_add_ps(s1, vexp8(_mm256_sub_ps(_mm256_load_ps(x + i + 8), top)));
        }
        __asm__ volatile("" : : "r"(x) : "memory"); /* the elements anew each time */
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_add_ps(s0, s1));
    __asm__ volatile("" : : "r"(lanes) : "memory");
    return (double)ELEMENTS * (double)iterations;
}

const assay_probe_kernel assay_probe_avx2 = {read_all, int8, fp32, exponentials};

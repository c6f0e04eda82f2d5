/* Probes for AVX-512 with VNNI. int8: vpdpbusd, 128 operations each, with enough independent sums to cover its latency of
 * four to five cycles on two ports. fp32: FMAs of 16 lanes. exp: as verification sums it, of what lies in L1. */
#include "../../kernels.h"
#include "../vexp_avx512.h"

static uint64_t read_all(const void *buffer, size_t bytes, size_t ahead) {
    const uint8_t *at = buffer;
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    size_t i = 0;
    for (; i + 256 <= bytes; i += 256) {
        if (ahead)
            for (size_t line = 0; line < 256; line += 64) _mm_prefetch((const char *)at + i + line + ahead, _MM_HINT_T0);
        a = _mm512_xor_si512(a, _mm512_loadu_si512(at + i));
        b = _mm512_xor_si512(b, _mm512_loadu_si512(at + i + 64));
        c = _mm512_xor_si512(c, _mm512_loadu_si512(at + i + 128));
        d = _mm512_xor_si512(d, _mm512_loadu_si512(at + i + 192));
    }
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    uint64_t lanes[8], rest = 0;
    _mm512_storeu_si512(lanes, a);
    for (; i < bytes; i++) rest ^= at[i];
    for (int j = 0; j < 8; j++) rest ^= lanes[j];
    return rest;
}

/* Twelve independent sums, by name: an array of them would live in memory. */
enum { CHAINS = 12 };
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define START_INT(i) __m512i acc##i = _mm512_setzero_si512();
#define START_FLOAT(i) __m512 acc##i = _mm512_setzero_ps();
#ifdef __AVX512F__ /* not where the intrinsics are emulated */
#define HOLD(i) __asm__ volatile("" : "+v"(acc##i));
#else
#define HOLD(i)
#endif

static double int8(int64_t iterations) {
    const __m512i w = _mm512_set1_epi8(7), x = _mm512_set1_epi8(-3);
    EACH(START_INT)
    for (int64_t n = 0; n < iterations; n++) {
#define DOT(i) acc##i = _mm512_dpbusd_epi32(acc##i, w, x);
        EACH(DOT)
        EACH(HOLD)
    }
#define FOLD_INT(i) acc0 = _mm512_xor_si512(acc0, acc##i);
    EACH(FOLD_INT)
    int32_t lanes[16];
    _mm512_storeu_si512(lanes, acc0);
    __asm__ volatile("" : : "r"(lanes) : "memory");
    return 128.0 * CHAINS * (double)iterations;
}

static double fp32(int64_t iterations) {
    const __m512 w = _mm512_set1_ps(1.0f), x = _mm512_set1_ps(1e-9f);
    EACH(START_FLOAT)
    for (int64_t n = 0; n < iterations; n++) {
#define FMA(i) acc##i = _mm512_fmadd_ps(w, x, acc##i);
        EACH(FMA)
        EACH(HOLD)
    }
#define FOLD_FLOAT(i) acc0 = _mm512_add_ps(acc0, acc##i);
    EACH(FOLD_FLOAT)
    float lanes[16];
    _mm512_storeu_ps(lanes, acc0);
    __asm__ volatile("" : : "r"(lanes) : "memory");
    return 32.0 * CHAINS * (double)iterations;
}

static double exponentials(int64_t iterations) {
    enum { ELEMENTS = 2048 };
    _Alignas(64) float x[ELEMENTS];
    for (int i = 0; i < ELEMENTS; i++) x[i] = -0.01f * (float)i;
    __m512 sum = _mm512_setzero_ps(), top = _mm512_set1_ps(0.5f);
    for (int64_t n = 0; n < iterations; n++) {
        for (int i = 0; i < ELEMENTS; i += 16) sum = _mm512_add_ps(sum, vexp16(_mm512_sub_ps(_mm512_load_ps(x + i), top)));
        __asm__ volatile("" : : "r"(x) : "memory"); /* the elements anew each time */
    }
    float lanes[16];
    _mm512_storeu_ps(lanes, sum);
    __asm__ volatile("" : : "r"(lanes) : "memory");
    return (double)ELEMENTS * (double)iterations;
}

const assay_probe_kernel assay_probe_avx512vnni = {read_all, int8, fp32, exponentials};

/* Probes for AVX-512 with VNNI. int8: vpdpbusd, 128 operations each, with enough independent sums to cover its latency of
 * four to five cycles on two ports. fp32: FMAs of 16 lanes. */
#include "../../kernels.h"

#include <immintrin.h>

static uint64_t read_all(const void *buffer, size_t bytes) {
    const uint8_t *at = buffer;
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    size_t i = 0;
    for (; i + 256 <= bytes; i += 256) {
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

enum { CHAINS = 12 };

static double int8(int64_t iterations) {
    __m512i acc[CHAINS], w = _mm512_set1_epi8(7), x = _mm512_set1_epi8(-3);
    for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_setzero_si512();
    for (int64_t n = 0; n < iterations; n++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            acc[i] = _mm512_dpbusd_epi32(acc[i], w, x);
#ifdef __AVX512F__
            __asm__("" : "+v"(acc[i]));
#endif
        }
    int32_t lanes[16];
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_xor_si512(acc[0], acc[i]);
    _mm512_storeu_si512(lanes, acc[0]);
    __asm__ volatile("" : : "r"(lanes) : "memory");
    return 128.0 * CHAINS * (double)iterations;
}

static double fp32(int64_t iterations) {
    __m512 acc[CHAINS], w = _mm512_set1_ps(1.0f), x = _mm512_set1_ps(1e-9f);
    for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t n = 0; n < iterations; n++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            acc[i] = _mm512_fmadd_ps(w, x, acc[i]);
#ifdef __AVX512F__
            __asm__("" : "+v"(acc[i]));
#endif
        }
    float lanes[16];
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    _mm512_storeu_ps(lanes, acc[0]);
    __asm__ volatile("" : : "r"(lanes) : "memory");
    return 32.0 * CHAINS * (double)iterations;
}

const assay_probe_kernel assay_probe_avx512vnni = {read_all, int8, fp32};

/* AVX-512, its BF16, AVX-VNNI and AMX on a CPU that has only AVX2 and FMA: put this folder first on the include path and compile a
 * kernel file of one of those tiers with the AVX2 flags (AMX's with AVX-512's too, where the CPU has that: then only tiles are
 * emulated). SIMDe's functions take the place of the compiler's 512-bit intrinsics; those
 * that SIMDe 0.7.4 lacks are written here on 256-bit halves. An intrinsic that neither has does not compile: the
 * compiler's own refuses to be inlined without its target flag. For tests only; nothing here is fast. */
#include_next <immintrin.h>

#ifndef ASSAY_EMULATED_IMMINTRIN_H
#define ASSAY_EMULATED_IMMINTRIN_H

#define EMU static inline __attribute__((always_inline, unused))

#ifndef __AVX512F__
#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wpsabi"
#include <simde/x86/avx512.h>
#pragma GCC diagnostic pop

#if !SIMDE_NATURAL_VECTOR_SIZE_LE(256) || !defined(SIMDE_X86_FMA_NATIVE)
#error "compile with -mavx2 -mfma -mf16c: without them SIMDe's FMA rounds twice"
#endif

#include <string.h>

/* The halves of a 512-bit value of any type, as raw memory. */
typedef union {
    __m512 ps;
    __m512i si;
    __m512d pd;
    __m256 hps[2];
    __m256i hsi[2];
    __m256d hpd[2];
    float f[16];
    double d[8];
    int32_t i32[16];
    int64_t i64[8];
} emu512;

#define EMU_PS(a) ((emu512){.ps = (a)})
#define EMU_SI(a) ((emu512){.si = (a)})
#define EMU_PD(a) ((emu512){.pd = (a)})

/* ---- conversions ---- */
EMU __m512 emu_cvtepi32_ps(__m512i a) {
    const emu512 x = EMU_SI(a);
    return ((emu512){.hps = {_mm256_cvtepi32_ps(x.hsi[0]), _mm256_cvtepi32_ps(x.hsi[1])}}).ps;
}
EMU __m512 emu_cvtepu32_ps(__m512i a) {
    emu512 x = EMU_SI(a);
    for (int i = 0; i < 16; i++) x.f[i] = (float)(uint32_t)x.i32[i];
    return x.ps;
}
EMU __m512i emu_cvtps_epi32(__m512 a) {
    const emu512 x = EMU_PS(a);
    return ((emu512){.hsi = {_mm256_cvtps_epi32(x.hps[0]), _mm256_cvtps_epi32(x.hps[1])}}).si;
}
EMU __m512 emu_cvtph_ps(__m256i a) {
    return ((emu512){.hps = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                             _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}}).ps;
}
EMU __m512i emu_cvtepu8_epi32(__m128i a) {
    return ((emu512){.hsi = {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))}}).si;
}
EMU __m512i emu_cvtepi8_epi32(__m128i a) {
    return ((emu512){.hsi = {_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))}}).si;
}
EMU __m512i emu_cvtepu16_epi32(__m256i a) {
    return ((emu512){.hsi = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                             _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))}}).si;
}
EMU __m512i emu_cvtepi16_epi32(__m256i a) {
    return ((emu512){.hsi = {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(a)),
                             _mm256_cvtepi16_epi32(_mm256_extracti128_si256(a, 1))}}).si;
}
EMU __m128i emu_cvtepi32_epi8(__m512i a) {
    const emu512 x = EMU_SI(a);
    int8_t out[16];
    for (int i = 0; i < 16; i++) out[i] = (int8_t)x.i32[i];
    return _mm_loadu_si128((const __m128i *)out);
}
EMU __m256i emu_cvtepi32_epi16(__m512i a) {
    const emu512 x = EMU_SI(a);
    int16_t out[16];
    for (int i = 0; i < 16; i++) out[i] = (int16_t)x.i32[i];
    return _mm256_loadu_si256((const __m256i *)out);
}
EMU __m512d emu_cvtps_pd(__m256 a) {
    return ((emu512){.hpd = {_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))}}).pd;
}
EMU __m256 emu_cvtpd_ps(__m512d a) {
    const emu512 x = EMU_PD(a);
    return _mm256_set_m128(_mm256_cvtpd_ps(x.hpd[1]), _mm256_cvtpd_ps(x.hpd[0]));
}
EMU __m512d emu_cvtepi32_pd(__m256i a) {
    return ((emu512){.hpd = {_mm256_cvtepi32_pd(_mm256_castsi256_si128(a)),
                             _mm256_cvtepi32_pd(_mm256_extracti128_si256(a, 1))}}).pd;
}
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi16_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtps_pd
#undef _mm512_cvtpd_ps
#undef _mm512_cvtepi32_pd
#define _mm512_cvtepi32_ps(a) emu_cvtepi32_ps(a)
#define _mm512_cvtepu32_ps(a) emu_cvtepu32_ps(a)
#define _mm512_cvtps_epi32(a) emu_cvtps_epi32(a)
#define _mm512_cvtph_ps(a) emu_cvtph_ps(a)
#define _mm512_cvtepu8_epi32(a) emu_cvtepu8_epi32(a)
#define _mm512_cvtepi8_epi32(a) emu_cvtepi8_epi32(a)
#define _mm512_cvtepu16_epi32(a) emu_cvtepu16_epi32(a)
#define _mm512_cvtepi16_epi32(a) emu_cvtepi16_epi32(a)
#define _mm512_cvtepi32_epi8(a) emu_cvtepi32_epi8(a)
#define _mm512_cvtepi32_epi16(a) emu_cvtepi32_epi16(a)
#define _mm512_cvtps_pd(a) emu_cvtps_pd(a)
#define _mm512_cvtpd_ps(a) emu_cvtpd_ps(a)
#define _mm512_cvtepi32_pd(a) emu_cvtepi32_pd(a)

/* ---- shifts ---- */
EMU __m512i emu_srai_epi32(__m512i a, unsigned count) {
    const emu512 x = EMU_SI(a);
    const __m128i c = _mm_cvtsi32_si128((int)count);
    return ((emu512){.hsi = {_mm256_sra_epi32(x.hsi[0], c), _mm256_sra_epi32(x.hsi[1], c)}}).si;
}
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(a, count) emu_srai_epi32(a, count)

/* ---- masked loads and stores: lanes outside the mask touch no memory ---- */
EMU __m512i emu_mask_loadu(__m512i src, uint64_t k, const void *at, size_t size) {
    emu512 x = EMU_SI(src);
    for (size_t i = 0; i < 64 / size; i++)
        if (k >> i & 1) memcpy((char *)&x + i * size, (const char *)at + i * size, size);
    return x.si;
}
EMU void emu_mask_storeu(void *at, uint64_t k, __m512i a, size_t size) {
    const emu512 x = EMU_SI(a);
    for (size_t i = 0; i < 64 / size; i++)
        if (k >> i & 1) memcpy((char *)at + i * size, (const char *)&x + i * size, size);
}
EMU __m256i emu_mask_loadu_256(__m256i src, uint64_t k, const void *at, size_t size) {
    for (size_t i = 0; i < 32 / size; i++)
        if (k >> i & 1) memcpy((char *)&src + i * size, (const char *)at + i * size, size);
    return src;
}
EMU __m128i emu_mask_loadu_128(__m128i src, uint64_t k, const void *at, size_t size) {
    for (size_t i = 0; i < 16 / size; i++)
        if (k >> i & 1) memcpy((char *)&src + i * size, (const char *)at + i * size, size);
    return src;
}
#undef _mm512_mask_loadu_ps
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_loadu_epi32
#undef _mm512_maskz_loadu_epi32
#undef _mm512_mask_loadu_epi16
#undef _mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi8
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_epi32
#undef _mm256_mask_loadu_epi16
#undef _mm256_maskz_loadu_epi16
#undef _mm256_maskz_loadu_epi8
#undef _mm_maskz_loadu_epi8
#define _mm512_mask_loadu_ps(src, k, at) _mm512_castsi512_ps(emu_mask_loadu(_mm512_castps_si512(src), (__mmask16)(k), at, 4))
#define _mm512_maskz_loadu_ps(k, at) _mm512_castsi512_ps(emu_mask_loadu(_mm512_setzero_si512(), (__mmask16)(k), at, 4))
#define _mm512_mask_loadu_epi32(src, k, at) emu_mask_loadu(src, (__mmask16)(k), at, 4)
#define _mm512_maskz_loadu_epi32(k, at) emu_mask_loadu(_mm512_setzero_si512(), (__mmask16)(k), at, 4)
#define _mm512_mask_loadu_epi16(src, k, at) emu_mask_loadu(src, (__mmask32)(k), at, 2)
#define _mm512_maskz_loadu_epi16(k, at) emu_mask_loadu(_mm512_setzero_si512(), (__mmask32)(k), at, 2)
#define _mm512_maskz_loadu_epi8(k, at) emu_mask_loadu(_mm512_setzero_si512(), (__mmask64)(k), at, 1)
#define _mm512_mask_storeu_ps(at, k, a) emu_mask_storeu(at, (__mmask16)(k), _mm512_castps_si512(a), 4)
#define _mm512_mask_storeu_epi32(at, k, a) emu_mask_storeu(at, (__mmask16)(k), a, 4)
#define _mm256_mask_loadu_epi16(src, k, at) emu_mask_loadu_256(src, (__mmask16)(k), at, 2)
#define _mm256_maskz_loadu_epi16(k, at) emu_mask_loadu_256(_mm256_setzero_si256(), (__mmask16)(k), at, 2)
#define _mm256_maskz_loadu_epi8(k, at) emu_mask_loadu_256(_mm256_setzero_si256(), (__mmask32)(k), at, 1)
#define _mm_maskz_loadu_epi8(k, at) emu_mask_loadu_128(_mm_setzero_si128(), (__mmask16)(k), at, 1)

/* ---- shuffles and parts ---- */
EMU __m512 emu_permute_ps(__m512 a, const int imm) {
    const emu512 x = EMU_PS(a);
    emu512 r;
    for (int i = 0; i < 16; i++) r.f[i] = x.f[i / 4 * 4 + (imm >> i % 4 * 2 & 3)];
    return r.ps;
}
EMU __m512 emu_shuffle_f32x4(__m512 a, __m512 b, const int imm) {
    const emu512 x = EMU_PS(a), y = EMU_PS(b);
    emu512 r;
    for (int i = 0; i < 16; i++) r.f[i] = (i < 8 ? x : y).f[(imm >> i / 4 * 2 & 3) * 4 + i % 4];
    return r.ps;
}
#undef _mm512_permute_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_extractf32x8_ps
#undef _mm512_extracti32x8_epi32
#define _mm512_permute_ps(a, imm) emu_permute_ps(a, imm)
#define _mm512_shuffle_f32x4(a, b, imm) emu_shuffle_f32x4(a, b, imm)
#define _mm512_extractf32x8_ps(a, i) (EMU_PS(a).hps[(i) & 1])
#define _mm512_extracti32x8_epi32(a, i) (EMU_SI(a).hsi[(i) & 1])

/* ---- reductions, in the order of GCC's and clang's own: halves, quarters, pairs ---- */
#define EMU_REDUCE(name, type, arg, field, op)                                                  \
    EMU type name(arg a) {                                                                      \
        emu512 x;                                                                               \
        memcpy(&x, &a, sizeof x);                                                               \
        for (int n = sizeof x / sizeof(type) / 2; n; n /= 2)                                    \
            for (int i = 0; i < n; i++) {                                                       \
                const type p = x.field[i], q = x.field[i + n];                                  \
                x.field[i] = op;                                                                \
            }                                                                                   \
        return x.field[0];                                                                      \
    }
EMU_REDUCE(emu_reduce_add_ps, float, __m512, f, p + q)
EMU_REDUCE(emu_reduce_max_ps, float, __m512, f, p > q ? p : q)
EMU_REDUCE(emu_reduce_min_ps, float, __m512, f, p < q ? p : q)
EMU_REDUCE(emu_reduce_add_pd, double, __m512d, d, p + q)
EMU_REDUCE(emu_reduce_add_epi32, int32_t, __m512i, i32, (int32_t)((uint32_t)p + (uint32_t)q))
EMU_REDUCE(emu_reduce_max_epi32, int32_t, __m512i, i32, p > q ? p : q)
EMU_REDUCE(emu_reduce_add_epi64, int64_t, __m512i, i64, (int64_t)((uint64_t)p + (uint64_t)q))
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_min_ps
#undef _mm512_reduce_add_pd
#undef _mm512_reduce_max_epi32
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_add_epi64
#define _mm512_reduce_add_ps(a) emu_reduce_add_ps(a)
#define _mm512_reduce_max_ps(a) emu_reduce_max_ps(a)
#define _mm512_reduce_min_ps(a) emu_reduce_min_ps(a)
#define _mm512_reduce_add_pd(a) emu_reduce_add_pd(a)
#define _mm512_reduce_max_epi32(a) emu_reduce_max_epi32(a)
#define _mm512_reduce_add_epi32(a) emu_reduce_add_epi32(a)
#define _mm512_reduce_add_epi64(a) emu_reduce_add_epi64(a)

/* ---- the compiler defines these as macros or with a target of their own ---- */
#undef _mm512_stream_si512
#define _mm512_stream_si512(at, a) emu_mask_storeu(at, ~(uint64_t)0, a, 1)
#undef _kortestz_mask16_u8
#define _kortestz_mask16_u8(a, b) ((unsigned char)(((__mmask16)(a) | (__mmask16)(b)) == 0))

EMU __m512i emu_shuffle_epi32(__m512i a, const int imm) {
    const emu512 x = EMU_SI(a);
    emu512 r;
    for (int i = 0; i < 16; i++) r.i32[i] = x.i32[i / 4 * 4 + (imm >> i % 4 * 2 & 3)];
    return r.si;
}
#undef _mm512_shuffle_epi32
#undef _mm512_maskz_cvtps_epi32
#define _mm512_shuffle_epi32(a, imm) emu_shuffle_epi32(a, imm)
#define _mm512_maskz_cvtps_epi32(k, a) _mm512_maskz_mov_epi32(k, emu_cvtps_epi32(a))

/* ---- comparisons ---- */
#undef _mm512_cmplt_epi32_mask
#define _mm512_cmplt_epi32_mask(a, b) _mm512_cmpgt_epi32_mask(b, a)

#endif

/* ---- AVX-VNNI: four products of unsigned and signed bytes to an int32 lane, wrapping ---- */
EMU __m256i emu_dpbusd_256(__m256i sum, __m256i u, __m256i s) {
    union {
        __m256i si;
        uint32_t u32[8];
        uint8_t u8[32];
        int8_t i8[32];
    } r = {.si = sum}, x = {.si = u}, y = {.si = s};
    for (int i = 0; i < 32; i++) r.u32[i / 4] += (uint32_t)(x.u8[i] * y.i8[i]);
    return r.si;
}
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sum, u, s) emu_dpbusd_256(sum, u, s)

/* ---- AVX512-BF16: two products a float32 lane, the odd word's first, each added with one rounding, subnormals as zero ---- */
#ifndef __AVX512BF16__
EMU float emu_flushed(float x) { return x > -0x1p-126f && x < 0x1p-126f ? 0 : x; }
EMU float emu_f32_of_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return emu_flushed(x);
}
EMU __m512 emu_dpbf16_ps(__m512 sum, __m512i a, __m512i b) {
    float r[16];
    uint16_t x[32], y[32];
    __builtin_memcpy(r, &sum, 64);
    __builtin_memcpy(x, &a, 64);
    __builtin_memcpy(y, &b, 64);
    for (int i = 0; i < 16; i++)
        for (int word = 2 * i + 1; word >= 2 * i; word--)
            r[i] = emu_flushed(__builtin_fmaf(emu_f32_of_bf16(x[word]), emu_f32_of_bf16(y[word]), emu_flushed(r[i])));
    __builtin_memcpy(&sum, r, 64);
    return sum;
}
#undef _mm512_dpbf16_ps
#define __m512bh __m512i
#define _mm512_dpbf16_ps(sum, a, b) emu_dpbf16_ps(sum, a, b)
#endif

#include "amx.h"

#endif

/* What the INT4 and the int8 GEMM share in AVX-512: scales, lines, stores. */
#ifndef ASSAY_GEMM_AVX512_H
#define ASSAY_GEMM_AVX512_H

#include "gemm_tiles.h"

#include <string.h>

/* float32 scales of columns 16 h .. 16 h + 15: half a tile. */
INLINE __m512 scale_of(const uint8_t *block, int h) {
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(block + 32 * h)));
}

/* INT4: int32 zero points of columns 16 h .. 16 h + 15. */
INLINE __m512i zero_of(const uint8_t *zeros, int h) {
    const __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros));
    return h ? _mm512_srli_epi32(z, 4) : _mm512_and_si512(z, _mm512_set1_epi32(15));
}

INLINE __m512i line(const uint8_t *at) { return _mm512_load_si512((const void *)at); }

/* Asks for the lines that a tile's outputs will go to, so that the stores do not wait for them. */
INLINE void expect_rows(const assay_gemm_args *p, int64_t t, int64_t row0, const int rows) {
    const float *c = p->c + row0 * p->ldc + t * ASSAY_TILE_N;
    for (int r = 0; r < rows; r++, c += p->ldc) {
        __builtin_prefetch(c, 1);
        __builtin_prefetch((const char *)c + 64, 1);
    }
}

/* A tile's outputs, f[2 r + h] of row r and columns 16 h..; columns past N stay in the kernel. */
INLINE void store_rows(const assay_gemm_args *p, const __m512 *f, int64_t t, int64_t row0, const int rows) {
    const int64_t n0 = t * ASSAY_TILE_N;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        float *c = p->c + (row0 + r) * p->ldc + n0;
        if (n0 + ASSAY_TILE_N <= p->l.n) {
            _mm512_storeu_ps(c, f[2 * r]);
            _mm512_storeu_ps(c + 16, f[2 * r + 1]);
        } else {
            float row[ASSAY_TILE_N];
            _mm512_storeu_ps(row, f[2 * r]);
            _mm512_storeu_ps(row + 16, f[2 * r + 1]);
            memcpy(c, row, (size_t)(p->l.n - n0) * 4);
        }
    }
}

#endif

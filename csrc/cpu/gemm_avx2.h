/* What the INT4 and the int8 GEMM share in AVX2: scales, stores, and a hold on the compiler. */
#ifndef ASSAY_GEMM_AVX2_H
#define ASSAY_GEMM_AVX2_H

#include "gemm_tiles.h"

#include <string.h>

/* float32 scales of columns 8 v .. 8 v + 7: a quarter of a tile. */
INLINE __m256 scale_of(const uint8_t *block, int v) {
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)(block + 16 * v)));
}

/* INT4: int32 zero points of columns 8 v .. 8 v + 7. */
INLINE __m256i zero_of(const uint8_t *zeros, int v) {
    const __m128i both = _mm_loadl_epi64((const __m128i *)(zeros + v % 2 * 8));
    const __m256i z = _mm256_cvtepu8_epi32(both);
    return v < 2 ? _mm256_and_si256(z, _mm256_set1_epi32(15)) : _mm256_srli_epi32(z, 4);
}

/* A tile's outputs, f[4 r + v] of row r and columns 8 v..; columns past N stay in the kernel. */
INLINE void store_rows(const assay_gemm_args *p, const __m256 *f, int64_t t, int64_t row0, int rows) {
    const int64_t n0 = t * ASSAY_TILE_N;
    for (int r = 0; r < rows; r++) {
        float *c = p->c + (row0 + r) * p->ldc + n0;
        if (n0 + ASSAY_TILE_N <= p->l.n) {
            for (int v = 0; v < 4; v++) _mm256_storeu_ps(c + 8 * v, f[4 * r + v]);
        } else {
            float row[ASSAY_TILE_N];
            for (int v = 0; v < 4; v++) _mm256_storeu_ps(row + 8 * v, f[4 * r + v]);
            memcpy(c, row, (size_t)(p->l.n - n0) * 4);
        }
    }
}

/* Keeps the compiler from reordering sums across this point: it would trade the accumulators' registers for spills. */
#define HOLD(v) __asm__("" : "+x"(v))

#endif

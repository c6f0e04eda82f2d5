/* The order in which the x86 variants walk tiles and row blocks, and what they prefetch on the way. */
#ifndef ASSAY_GEMM_TILES_H
#define ASSAY_GEMM_TILES_H

#include "../kernels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline))

/* The AVX2 file's; activations are a small part of the work, so every x86 tier shares it. */
void assay_int4_prepare_avx2(const assay_gemm_args *p, int64_t begin, int64_t end);

/* The tile `ahead` bytes on is what this thread reads next: ask for each of its lines while the same line of this tile is
 * used. Every line, or none: a prefetch with holes is far worse than none. */
INLINE void prefetch(const uint8_t *at) { _mm_prefetch((const char *)at, _MM_HINT_T1); }

/* The lines of a group that hold no nibbles: scales go with the first half, zero points with the second. */
INLINE void prefetch_terms(const assay_w4_layout *l, const uint8_t *tile, int64_t g, int h, int64_t ahead) {
    if (!h) prefetch(tile + assay_w4_block_offset(l, g) + ahead);
    else if (!l->symmetric && g % 4 == 0) prefetch(tile + assay_w4_zero_offset(l, g) + ahead);
}

/* One function a row count, so that each gets registers of its own. */
#define ROWS(kind, r)                                                                                            \
    KERNEL void kind##_##r(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t ahead, int halves) {              \
        kind(p, t, row0, r, ahead, halves);                                                                     \
    }
typedef void (*block_fn)(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t ahead, int halves);

/* All row blocks of a tile back to back: the tile comes from DRAM once and stays in L2. The last two of them ask for the
 * next tile, each for the lines of one half of the columns, so that neither waits for DRAM alone. */
INLINE void tiles(const assay_gemm_args *p, int64_t begin, int64_t end, const block_fn *blocks) {
    for (int64_t t = begin; t < end; t++) {
        const int64_t next = t + 1 < p->l.tiles ? p->l.tile_bytes : 0;
        for (int64_t b = 0; b < p->row_blocks; b++) {
            const int64_t row0 = assay_block_row(p->m, p->row_blocks, b);
            const int64_t rows = assay_block_row(p->m, p->row_blocks, b + 1) - row0;
            const int64_t after = p->row_blocks - 1 - b;
            blocks[rows - 1](p, t, row0, after < 2 ? next : 0, p->row_blocks == 1 ? 3 : after ? 1 : 2);
        }
    }
}

#endif

/* The order in which the x86 variants walk tiles and row blocks, and what they prefetch on the way. */
#ifndef ASSAY_GEMM_TILES_H
#define ASSAY_GEMM_TILES_H

#include "../kernels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline))

/* The AVX2 file's; activations are a small part of the work, so every x86 tier shares it. */
void assay_int4_prepare_avx2(const assay_gemm_args *p, int64_t begin, int64_t end);

/* Into L1: a prefetch into L2 alone leaves the next load waiting for L2. Every line of the stream is asked for, or none is:
 * a prefetch with holes is far worse than none. */
INLINE void prefetch(const uint8_t *at) { _mm_prefetch((const char *)at, _MM_HINT_T0); }

/* The lines of a group that hold no nibbles: scales go with the first half, zero points with the second. */
INLINE void prefetch_terms(const assay_w4_layout *l, const uint8_t *tile, int64_t g, int h, int64_t ahead) {
    if (!h) prefetch(tile + assay_w4_block_offset(l, g) + ahead);
    else if (!l->symmetric && g % 4 == 0) prefetch(tile + assay_w4_zero_offset(l, g) + ahead);
}

/* How far on to prefetch each of the eight lines of 32 k; 0: not (it asks for the line that is being read). */
typedef struct {
    int64_t line[8];
} reach;

/* One function a row count, so that each gets registers of its own. */
typedef void (*block_fn)(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead);
#define BLOCK(name, body, ...)                                                                                     \
    KERNEL void name(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead) {                      \
        body(p, t, row0, ahead, __VA_ARGS__);                                                                      \
    }
#define ROWS(kind, r) BLOCK(kind##_##r, kind, r)

/* A lone row block asks DRAM p->ahead bytes on, and twice that where the products take as long as the bytes, so that a late
 * line costs nothing. */
enum { FEW_ROWS = 4 };

/* All row blocks of a tile back to back: the tile comes from DRAM once and stays in L2. A lone block asks for its stream a
 * fixed distance ahead. Else the last `passes` blocks (at most `most`, 8 or less) ask for the next tile, each for every
 * passes-th line: no pass waits for DRAM alone, and no line is left out. A lone block of few rows asks `few` bytes on, one of
 * more rows `many`. */
INLINE void tiles_ahead(const assay_gemm_args *p, int64_t begin, int64_t end, const block_fn *blocks, int most, int64_t few,
                        int64_t many) {
    const int count = p->row_blocks;
    const int passes = count < most ? count : most;
    for (int64_t t = begin; t < end; t++) {
        for (int b = 0; b < count; b++) {
            const int64_t row0 = assay_block_row(p->m, p->row_blocks, b);
            const int64_t rows = assay_block_row(p->m, p->row_blocks, b + 1) - row0;
            const int64_t next = count == 1 ? (rows <= FEW_ROWS ? few : many) : t + 1 < p->l.tiles ? p->l.tile_bytes : 0;
            reach ahead = {{0}};
            for (int i = passes - (count - b); i >= 0 && i < 8; i += passes) ahead.line[i] = next;
            blocks[rows - 1](p, t, row0, &ahead);
        }
    }
}

INLINE void tiles(const assay_gemm_args *p, int64_t begin, int64_t end, const block_fn *blocks, int most) {
    tiles_ahead(p, begin, end, blocks, most, p->ahead, 2 * p->ahead);
}

#endif

/* The order in which the portable GEMMs walk tiles, row blocks and columns. */
#ifndef ASSAY_GEMM_SCALAR_H
#define ASSAY_GEMM_SCALAR_H

#include "../kernels.h"
#include "float16.h"

#include <math.h>

enum { MR = 4 };

/* Adds column j of a tile, for `rows` rows from row0, to f[row]. */
typedef void (*column_fn)(const assay_gemm_args *p, const uint8_t *tile, int64_t j, int64_t row0, int64_t rows, float *f);

static inline void walk(const assay_gemm_args *p, int64_t begin, int64_t end, column_fn column) {
    for (int64_t t = begin; t < end; t++) {
        const uint8_t *tile = p->packed + t * p->l.tile_bytes;
        const int64_t n0 = t * ASSAY_TILE_N, cols = assay_min_i64(ASSAY_TILE_N, p->l.n - n0);
        for (int b = p->block_begin; b < p->block_end; b++) {
            const int64_t row0 = assay_block_row(p->m, p->row_blocks, b);
            const int64_t rows = assay_block_row(p->m, p->row_blocks, b + 1) - row0;
            for (int64_t j = 0; j < cols; j++) {
                float f[MR] = {0};
                column(p, tile, j, row0, rows, f);
                for (int64_t r = 0; r < rows; r++) p->c[(row0 + r) * p->ldc + n0 + j] = f[r];
            }
        }
    }
}

#endif

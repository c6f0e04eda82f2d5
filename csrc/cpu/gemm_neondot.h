/* What the GEMMs share on aarch64 with the dot-product instructions (sdot; Neoverse N1, Apple M1 and later). */
#ifndef ASSAY_GEMM_NEONDOT_H
#define ASSAY_GEMM_NEONDOT_H

#include "../kernels.h"

#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* The signed operand: a nibble (0..15) as it lies, a nibble through a table, a byte less 128. */
enum kind { NIBBLE, TABLE, BYTE };
enum { MR8 = 6 };

extern const assay_int4_gemm_kernel assay_int4_gemm_scalar;

/* Adds `k` weights of 16 columns (half a tile) against `rows` rows to acc[4 r + v], columns 4 v...
 * Registers (MR = 6): 24 sums, 4 weights, an activation, the mask. */
INLINE void dot(const uint8_t *lines, const int32_t *a, const int rows, int64_t k, const enum kind kind, int8x16_t table,
                int32x4_t *acc) {
    for (int64_t i = 0; i < k; i += kind == BYTE ? 4 : 8, lines += 128)
        for (int high = 0; high < (kind == BYTE ? 1 : 2); high++, a += rows) {
            int8x16_t w[4];
            for (int v = 0; v < 4; v++) {
                uint8x16_t u = vld1q_u8(lines + 16 * v);
                if (kind == BYTE) u = veorq_u8(u, vdupq_n_u8(0x80));
                else u = high ? vshrq_n_u8(u, 4) : vandq_u8(u, vdupq_n_u8(15));
                w[v] = kind == TABLE ? vqtbl1q_s8(table, u) : vreinterpretq_s8_u8(u);
            }
            for (int r = 0; r < rows; r++) {
                const int8x16_t x = vreinterpretq_s8_s32(vld1q_dup_s32(a + r));
                for (int v = 0; v < 4; v++) acc[4 * r + v] = vdotq_s32(acc[4 * r + v], w[v], x);
            }
            /* Load the line again for its high nibbles rather than keep eight weight registers alive. */
            __asm__ volatile("" ::: "memory");
        }
}

/* A tile's outputs, f[8 r + v] of row r and columns 4 v..; columns past N stay in the kernel. */
INLINE void store_rows(const assay_gemm_args *p, const float32x4_t *f, int64_t t, int64_t row0, const int rows) {
    const int64_t n0 = t * ASSAY_TILE_N;
    for (int r = 0; r < rows; r++) {
        float row[ASSAY_TILE_N];
        for (int v = 0; v < 8; v++) vst1q_f32(row + 4 * v, f[8 * r + v]);
        memcpy(p->c + (row0 + r) * p->ldc + n0, row, (size_t)assay_min_i64(ASSAY_TILE_N, p->l.n - n0) * 4);
    }
}

/* One function a row count, so that each gets registers of its own. */
typedef void (*block_fn)(const assay_gemm_args *p, int64_t t, int64_t row0);
#define ROWS(body, kind, r)                                                                                           \
    static __attribute__((noinline)) void body##_##kind##_##r(const assay_gemm_args *p, int64_t t, int64_t row0) {    \
        body(p, t, row0, r, kind);                                                                                    \
    }
#define ROWS6(body, kind)                                                                                             \
    ROWS(body, kind, 1) ROWS(body, kind, 2) ROWS(body, kind, 3)                                                       \
    ROWS(body, kind, 4) ROWS(body, kind, 5) ROWS(body, kind, 6)
#define LIST6(body, kind)                                                                                             \
    {body##_##kind##_1, body##_##kind##_2, body##_##kind##_3, body##_##kind##_4, body##_##kind##_5, body##_##kind##_6}

/* All row blocks of a tile back to back. */
INLINE void tiles(const assay_gemm_args *p, int64_t begin, int64_t end, const block_fn *blocks) {
    for (int64_t t = begin; t < end; t++)
        for (int b = 0; b < p->row_blocks; b++) {
            const int64_t row0 = assay_block_row(p->m, p->row_blocks, b);
            blocks[assay_block_row(p->m, p->row_blocks, b + 1) - row0 - 1](p, t, row0);
        }
}

#endif

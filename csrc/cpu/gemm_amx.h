/* What the GEMMs share in AMX-INT8: tiles of 16 rows x 64 bytes.
 *
 * tdpbsud adds a tile of activations (16 rows x 64 k, signed) times a tile of weights (16 lines x 16 columns x 4 k,
 * unsigned) to 16 rows x 16 columns of int32. A weight tile is sixteen lines of kernels.h as they lie, or unpacked from
 * nibbles into a small buffer that stays in L1. Eight tile registers: 2 x 2 sums (up to 32 rows x 32 columns),
 * 2 activations, 2 weights. Sums leave for memory after each group, where AVX-512 scales and adds them: K is never split,
 * and the float chain is everybody's.
 * Up to SMALL rows the tiles would be mostly empty: those calls are AVX-512's. */
#ifndef ASSAY_GEMM_AMX_H
#define ASSAY_GEMM_AMX_H

#include "gemm_avx512.h"

enum kind { NIBBLE, TABLE, BYTE };
enum { MR8 = 32, MR16 = 8, TILE_ROWS = 16, SMALL = 6 };

/* Weights along K that one tile takes: the largest power of two up to 64 that divides the padded group. */
INLINE int64_t chunk_of(const assay_w4_layout *l) { return assay_min_i64(64, l->group_padded & -l->group_padded); }

/* Tiles 0..3: sums of rows 16 i.. and columns 16 h.. in 2 i + h; 4, 5: activations; 6, 7: weights. */
INLINE void configure(int64_t rows, int64_t chunk) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 2; i++) {
        const int64_t here = assay_min_i64(TILE_ROWS, rows - TILE_ROWS * i);
        config.bytes[6 + i] = 64;
        config.rows[6 + i] = (uint8_t)(chunk / 4);
        if (here <= 0) continue;
        config.bytes[2 * i] = config.bytes[2 * i + 1] = 64;
        config.rows[2 * i] = config.rows[2 * i + 1] = config.rows[4 + i] = (uint8_t)here;
        config.bytes[4 + i] = (uint16_t)chunk;
    }
    /* GCC's tile intrinsics do not say which memory they read. */
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

/* AVX2's preparation, then each chunk of a row block from [k/4][rows][4] to [rows][chunk]. */
INLINE void prepare_tiles(const assay_gemm_args *p, int64_t begin, int64_t end) {
    assay_int4_prepare_avx2(p, begin, end);
    if (p->a16 || p->m <= SMALL) return;
    const int64_t words = chunk_of(&p->l) / 4;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row0 = assay_block_row(p->m, p->row_blocks, i);
        const int64_t rows = assay_block_row(p->m, p->row_blocks, i + 1) - row0;
        int32_t *at = (int32_t *)((int8_t *)p->values + row0 * p->l.k_padded), copy[MR8 * TILE_ROWS];
        for (int64_t k = 0; k < p->l.k_padded; k += 4 * words, at += words * rows) {
            memcpy(copy, at, (size_t)(words * rows) * 4);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < words; j++) at[r * words + j] = copy[j * rows + r];
        }
    }
}

typedef struct {
    _Alignas(64) uint8_t weights[2][TILE_ROWS][64];
    _Alignas(64) int32_t sum[MR8][ASSAY_TILE_N];
} amx_buffer;

/* `chunk` weights of both halves from nibbles to bytes, through a table where there is one. */
INLINE void unpack(const uint8_t *lines, int64_t chunk, const enum kind kind, __m512i table, amx_buffer *out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < chunk / 4; i += 2, lines += 128)
        for (int h = 0; h < 2; h++) {
            const __m512i both = line(lines + 64 * h);
            __m512i low = _mm512_and_si512(both, nibble), high = _mm512_and_si512(_mm512_srli_epi32(both, 4), nibble);
            if (kind == TABLE) low = _mm512_shuffle_epi8(table, low), high = _mm512_shuffle_epi8(table, high);
            _mm512_store_si512((void *)out->weights[h][i], low);
            _mm512_store_si512((void *)out->weights[h][i + 1], high);
        }
}

/* One group: sums of u q_a, rows x 32 columns, in buffer->sum. */
INLINE void dot_group(const assay_w4_layout *l, const uint8_t *lines, const int8_t *a, int64_t rows, const enum kind kind,
                      __m512i table, amx_buffer *buffer) {
    const int64_t chunk = chunk_of(l);
    _tile_zero(0);
    _tile_zero(1);
    if (rows > TILE_ROWS) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < l->group_padded; k += chunk, a += rows * chunk) {
        if (kind == BYTE) {
            _tile_loadd(6, lines, 128);
            _tile_loadd(7, lines + 64, 128);
            lines += chunk / 4 * 128;
        } else {
            unpack(lines, chunk, kind, table, buffer);
            __asm__ volatile("" ::"r"(buffer) : "memory");
            _tile_loadd(6, buffer->weights[0], 64);
            _tile_loadd(7, buffer->weights[1], 64);
            lines += chunk / 8 * 128;
        }
        _tile_loadd(4, a, chunk);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (rows > TILE_ROWS) {
            _tile_loadd(5, a + TILE_ROWS * chunk, chunk);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, buffer->sum[0], 128);
    _tile_stored(1, buffer->sum[0] + 16, 128);
    if (rows > TILE_ROWS) {
        _tile_stored(2, buffer->sum[TILE_ROWS], 128);
        _tile_stored(3, buffer->sum[TILE_ROWS] + 16, 128);
    }
}

/* One row block against tile t; the tiles are configured for it. */
typedef void (*amx_block_fn)(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t rows);

INLINE void walk_tiles(const assay_gemm_args *p, int64_t begin, int64_t end, amx_block_fn block) {
    int64_t configured = 0;
    for (int64_t t = begin; t < end; t++)
        for (int b = 0; b < p->row_blocks; b++) {
            const int64_t row0 = assay_block_row(p->m, p->row_blocks, b);
            const int64_t rows = assay_block_row(p->m, p->row_blocks, b + 1) - row0;
            if (rows != configured) configure(rows, chunk_of(&p->l));
            configured = rows;
            block(p, t, row0, rows);
        }
    _tile_release();
}

#endif

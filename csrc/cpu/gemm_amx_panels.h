/* What INT4 and int8 share where AMX-INT8 multiplies groups of up to MOST_GROUP: panels of signed bytes.
 *
 * Weights become signed bytes, q - zero, once for up to PANEL rows: the zero point then costs nothing a row. What lies between
 * tdpbssd's sums and the result is, for each 16 outputs of a group, a conversion, a multiplication and an FMA. Measured on
 * Granite Rapids, in cycles:
 *   tdpbssd       16 a tile, however deep (up to 64 k) and however few its rows
 *   tilestored    18; its tile must be complete, for which a product takes 52
 *   vmulps, vfmadd, vcvtdq2ps, vpsrld, vpdpbusd: 1 while products are in flight, else 1/2 (vpsrld 1)
 *   vsubps, vpandd: 1/2 all the time
 * and the clock falls with what the bytes are: products of zeros run half as fast again as products of numbers.
 * So a tile is stored only when the next group's product wants its register: 25 ns a group of 32 rows x 32 k x 32 columns against
 * 40 when stored at once. TOGETHER groups are then scaled with the outputs in registers; more of them, and the sums crowd the
 * activations and weights out of L1. A group of 32 fills half a tile product and still pays a store and 32 multiplications for
 * it, which is why its gain over AVX-512 is less. DEPTH weights along K leave L1 room for the activations and the sums. */
#ifndef ASSAY_GEMM_AMX_PANELS_H
#define ASSAY_GEMM_AMX_PANELS_H

#include "gemm_amx.h"

enum { TOGETHER = 2, EPILOGUE = 8, PANEL = 256, DEPTH = 512, MOST_GROUP = 128, IN_L2 = 1 << 20 };

/* Sums of one group: a row block's rows, 32 columns. */
typedef int32_t sums[MR8][ASSAY_TILE_N];

typedef struct {
    _Alignas(64) int8_t weights[DEPTH * ASSAY_TILE_N]; /* by group: two halves of [k/4][16 columns][4] */
    _Alignas(64) float scale[DEPTH / 32][ASSAY_TILE_N];
    _Alignas(64) sums sum[TOGETHER];
    _Alignas(64) float f[PANEL][ASSAY_TILE_N];
} panel;

/* The zero points of columns 16 h .. 16 h + 15, four bytes a column. */
INLINE __m512i zero_bytes(const uint8_t *zeros, int h) {
    const __m512i column = _mm512_setr_epi32(0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606,
                                             0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d,
                                             0x0e0e0e0e, 0x0f0f0f0f);
    const __m512i both = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)zeros));
    const __m512i here = h ? _mm512_srli_epi32(both, 4) : both;
    return _mm512_shuffle_epi8(_mm512_and_si512(here, _mm512_set1_epi8(15)), column);
}

/* Groups g0 .. g0 + count - 1 of a tile of INT4 to signed bytes, and their scales to float32. */
KERNEL void unpack_nibbles(const assay_w4_layout *l, const uint8_t *tile, int64_t g0, int64_t count, panel *out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < count; g++) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g0 + g), *at = block + ASSAY_SCALE_BYTES;
        for (int h = 0; h < 2; h++) {
            const __m512i zero = l->symmetric ? _mm512_set1_epi8(8) : zero_bytes(tile + assay_w4_zero_offset(l, g0 + g), h);
            int8_t *to = out->weights + (2 * g + h) * 16 * l->group_padded;
            for (int64_t i = 0; i < l->group_padded / 8; i++, to += 128) {
                const __m512i both = line(at + 128 * i + 64 * h);
                _mm512_store_si512((void *)to, _mm512_sub_epi8(_mm512_and_si512(both, nibble), zero));
                const __m512i high = _mm512_and_si512(_mm512_srli_epi32(both, 4), nibble);
                _mm512_store_si512((void *)(to + 64), _mm512_sub_epi8(high, zero));
            }
            _mm512_store_ps(out->scale[g] + 16 * h, scale_of(block, h));
        }
    }
}

/* The same of int8, whose lines hold q + 128. */
KERNEL void unpack_bytes(const assay_w4_layout *l, const uint8_t *tile, int64_t g0, int64_t count, panel *out) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (int64_t g = 0; g < count; g++) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g0 + g), *at = block + ASSAY_SCALE_BYTES;
        for (int h = 0; h < 2; h++) {
            int8_t *to = out->weights + (2 * g + h) * 16 * l->group_padded;
            for (int64_t i = 0; i < l->group_padded / 4; i++)
                _mm512_store_si512((void *)(to + 64 * i), _mm512_xor_si512(line(at + 128 * i + 64 * h), sign));
            _mm512_store_ps(out->scale[g] + 16 * h, scale_of(block, h));
        }
    }
}

/* Intrinsics of tiles want constants. Tile 2 i + h: rows 16 i.., columns 16 h... */
INLINE void store_tile(const int tile, sums to) {
    if (tile == 0) _tile_stored(0, to[0], 128);
    if (tile == 1) _tile_stored(1, to[0] + 16, 128);
    if (tile == 2) _tile_stored(2, to[TILE_ROWS], 128);
    if (tile == 3) _tile_stored(3, to[TILE_ROWS] + 16, 128);
}
INLINE void multiply_tile(const int tile, const int start, sums before) {
    if (start && before) store_tile(tile, before);
    if (start && tile == 0) _tile_zero(0);
    if (start && tile == 1) _tile_zero(1);
    if (start && tile == 2) _tile_zero(2);
    if (start && tile == 3) _tile_zero(3);
    if (tile == 0) _tile_dpbssd(0, 4, 6);
    if (tile == 1) _tile_dpbssd(1, 4, 7);
    if (tile == 2) _tile_dpbssd(2, 5, 6);
    if (tile == 3) _tile_dpbssd(3, 5, 7);
}

/* Chunk k of a group's products; its first, `start`, sends the tiles of the group before, where there is one, on their way. */
INLINE void multiply_chunk(const int8_t *b, const int8_t *a, int64_t group, int64_t chunk, sums before, const int start,
                           const int tiles) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 16 * group, 64);
    _tile_loadd(4, a, chunk);
    if (tiles == 4) _tile_loadd(5, a + TILE_ROWS * chunk, chunk);
#pragma GCC unroll 4
    for (int t = 0; t < tiles; t++) multiply_tile(t, start, before);
}

/* f += scaled sums of `count` groups, for `rows` rows from `row` on. */
INLINE void scale_rows(panel *s, const float (*ws)[ASSAY_TILE_N], const float *as, int64_t stride, int64_t count,
                       float (*f)[ASSAY_TILE_N], int64_t row, const int rows) {
    __m512 acc[2 * EPILOGUE];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * rows; i++) acc[i] = _mm512_load_ps(f[row + i / 2] + i % 2 * 16);
    for (int64_t g = 0; g < count; g++) {
        const __m512 w0 = _mm512_load_ps(ws[g]), w1 = _mm512_load_ps(ws[g] + 16);
#pragma GCC unroll 16
        for (int i = 0; i < 2 * rows; i++) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512((const void *)(s->sum[g][row + i / 2] + i % 2 * 16)));
            acc[i] = _mm512_fmadd_ps(sum, _mm512_mul_ps(i % 2 ? w1 : w0, _mm512_set1_ps(as[g * stride + row + i / 2])), acc[i]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * rows; i++) _mm512_store_ps(f[row + i / 2] + i % 2 * 16, acc[i]);
}

/* The same for a row block: groups of the panel from `g` on. */
INLINE void scale_block(panel *s, int64_t g, const float *as, int64_t rows, int64_t count, float (*f)[ASSAY_TILE_N]) {
    __asm__ volatile("" ::: "memory"); /* GCC's tile intrinsics do not say what they write */
    const float (*ws)[ASSAY_TILE_N] = (const float (*)[ASSAY_TILE_N])s->scale + g;
    int64_t r = 0;
    for (; r + EPILOGUE <= rows; r += EPILOGUE) scale_rows(s, ws, as, rows, count, f, r, EPILOGUE);
    if (rows - r >= 4) scale_rows(s, ws, as, rows, count, f, r, 4), r += 4;
    if (rows - r >= 2) scale_rows(s, ws, as, rows, count, f, r, 2), r += 2;
    if (rows - r >= 1) scale_rows(s, ws, as, rows, count, f, r, 1);
}

/* Groups g0 .. g0 + count - 1 of a row block, whose weights lie in s. Asks for `lines` lines from `next` on, on the way. */
INLINE void block_panel(const assay_gemm_args *p, int64_t row0, int64_t rows, int64_t g0, int64_t count, panel *s,
                        float (*f)[ASSAY_TILE_N], const uint8_t *next, int64_t lines, const int tiles) {
    const assay_w4_layout *l = &p->l;
    const int64_t group = l->group_padded, chunk = chunk_of(l);
    const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded + g0 * group * rows;
    const float *as = p->scale + row0 * l->groups + g0 * rows;
    int64_t asked = 0, waiting = 0;
    for (int64_t g = 0; g <= count; g++) {
        if (g < count) {
            for (const int64_t last = lines * (g + 1) / count; asked < last; asked++)
                _mm_prefetch((const char *)(next + 64 * asked), _MM_HINT_T1);
            const int8_t *b = s->weights + g * group * ASSAY_TILE_N;
            multiply_chunk(b, a, group, chunk, g ? s->sum[waiting] : NULL, 1, tiles);
            a += rows * chunk;
            for (int64_t k = chunk; k < group; k += chunk, a += rows * chunk)
                multiply_chunk(b + 16 * k, a, group, chunk, NULL, 0, tiles);
        } else {
#pragma GCC unroll 4
            for (int t = 0; t < tiles; t++) store_tile(t, s->sum[waiting]);
        }
        waiting += g > 0;
        if (waiting == TOGETHER || (waiting && g == count)) {
            scale_block(s, g - waiting, as + (g - waiting) * rows, rows, waiting, f);
            waiting = 0;
        }
    }
}

KERNEL void block_panel_2(const assay_gemm_args *p, int64_t row0, int64_t rows, int64_t g0, int64_t count, panel *s,
                         float (*f)[ASSAY_TILE_N], const uint8_t *next, int64_t lines) {
    block_panel(p, row0, rows, g0, count, s, f, next, lines, 2);
}
KERNEL void block_panel_4(const assay_gemm_args *p, int64_t row0, int64_t rows, int64_t g0, int64_t count, panel *s,
                         float (*f)[ASSAY_TILE_N], const uint8_t *next, int64_t lines) {
    block_panel(p, row0, rows, g0, count, s, f, next, lines, 4);
}

/* A row block's outputs from f; columns past N stay here. */
INLINE void store_block(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t rows, const float (*f)[ASSAY_TILE_N]) {
    const int64_t n0 = t * ASSAY_TILE_N, n = assay_min_i64(ASSAY_TILE_N, p->l.n - n0);
    float *c = p->c + row0 * p->ldc + n0;
    for (int64_t r = 0; r < rows; r++, c += p->ldc)
        if (n == ASSAY_TILE_N) memcpy(c, f[r], sizeof *f);
        else memcpy(c, f[r], (size_t)n * sizeof **f);
}

/* Tile t for row blocks b0 .. b1 - 1, DEPTH weights along K at a time. */
INLINE void tile_panel(const assay_gemm_args *p, int64_t t, int b0, int b1, panel *s, int64_t *configured, const enum kind kind) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int64_t depth = DEPTH / l->group_padded;
    const int blocks = p->row_blocks;
    const int64_t first = assay_block_row(p->m, blocks, b0), last = assay_block_row(p->m, blocks, b1);
    memset(s->f, 0, (size_t)(last - first) * sizeof *s->f);
    for (int64_t g = 0; g < l->groups; g += depth) {
        const int64_t count = assay_min_i64(depth, l->groups - g);
        (kind == BYTE ? unpack_bytes : unpack_nibbles)(l, tile, g, count, s);
        /* The next tile's bytes of these groups, an equal part for each row block. */
        const int64_t begin = l->tile_bytes * g / l->groups / 64, end = l->tile_bytes * (g + count) / l->groups / 64;
        const int64_t lines = t + 1 < l->tiles ? end - begin : 0;
        const uint8_t *next = tile + l->tile_bytes + 64 * begin;
        for (int b = b0; b < b1; b++) {
            const int64_t row0 = assay_block_row(p->m, blocks, b), rows = assay_block_row(p->m, blocks, b + 1) - row0;
            if (rows != *configured) configure(rows, chunk_of(l));
            *configured = rows;
            const int64_t from = lines * (b - b0) / (b1 - b0), to = lines * (b - b0 + 1) / (b1 - b0);
            float (*f)[ASSAY_TILE_N] = s->f + (row0 - first);
            if (g + count == l->groups) expect_rows(p, t, row0, (int)rows);
            (rows > TILE_ROWS ? block_panel_4 : block_panel_2)(p, row0, rows, g, count, s, f, next + 64 * from, to - from);
            if (g + count == l->groups) store_block(p, t, row0, rows, f);
        }
    }
}

/* Tiles begin .. end - 1 of groups of up to MOST_GROUP: all of them for as many rows as a panel has room for and IN_L2 bytes of
 * activations make, then for the next; the activations stay in L2. */
INLINE void walk_panels(const assay_gemm_args *p, int64_t begin, int64_t end, const enum kind kind) {
    panel s;
    int64_t configured = 0;
    const int64_t fit = IN_L2 / (MR8 * p->l.k_padded), at_once = fit < 2 ? 2 : assay_min_i64(fit, PANEL / MR8);
    for (int b0 = 0; b0 < p->row_blocks; b0 += (int)at_once)
        for (int64_t t = begin; t < end; t++)
            tile_panel(p, t, b0, (int)assay_min_i64(b0 + at_once, p->row_blocks), &s, &configured, kind);
    _tile_release();
}

#endif

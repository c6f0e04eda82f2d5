/* What the GEMMs share in AMX-INT8: tiles of 16 rows x 64 bytes.
 *
 * tdpbsud adds a tile of activations (16 rows x 64 k, signed) times a tile of weights (16 lines x 16 columns x 4 k,
 * unsigned) to 16 rows x 16 columns of int32. A weight tile is sixteen lines of kernels.h as they lie, or unpacked from
 * nibbles into a small buffer that stays in L1. Eight tile registers: 2 x 2 sums (up to 32 rows x 32 columns),
 * 2 activations, 2 weights. Sums leave for memory after each group, where AVX-512 scales and adds them: K is never split,
 * and the float chain is everybody's.
 * Calls of a few rows are AVX-512's, which is faster there: a tile of few rows takes as long as a full one, and a group of 32
 * fills half a tile product and pays for a whole one, its store and its scaling. */
#ifndef ASSAY_GEMM_AMX_H
#define ASSAY_GEMM_AMX_H

#include "gemm_prepare_avx512.h"

enum kind { NIBBLE, TABLE, BYTE };
enum { MR8 = 32, MR16 = 8, TILE_ROWS = 16, FEW = 8, FEW_OF_32 = 12, FEW_WIDE = 16, AVX512_ROWS = 6 };

/* Weights along K that one tile takes: the largest power of two up to 64 that divides the padded group. */
INLINE int64_t chunk_of(const assay_w4_layout *l) { return assay_min_i64(64, l->group_padded & -l->group_padded); }

/* Most rows of INT4 and int8 that are AVX-512's. */
static int64_t few(const assay_w4_layout *l) { return l->group_padded == 32 ? FEW_OF_32 : FEW; }

/* wide_gemm, known by its center, stores its sums at once and gains less: from 17 rows on, at groups of 32 from 33. */
INLINE int few_rows(const assay_gemm_args *p) {
    if (p->center == 1 && p->l.symmetric) return p->m <= (p->l.group_padded == 32 ? MR8 : FEW_WIDE);
    return p->m <= few(&p->l);
}

/* A call of a few rows, in AVX-512's row blocks where it came in AMX's. wide_gemm has no kernels for 7 or 8 rows at once. */
INLINE void split_rows(assay_gemm_args *p) {
    const int alone = p->l.symmetric && p->center == 1 ? AVX512_ROWS : AVX512_ROWS + 2;
    if (p->m > alone) p->row_blocks = (int)((p->m + AVX512_ROWS - 1) / AVX512_ROWS);
}

/* Tiles 0..3: sums of rows 16 i.. and columns 16 h.. in 2 i + h; 4, 5: activations; 6, 7: weights. Up to 16 rows both i are theirs. */
INLINE void configure(int64_t rows, int64_t chunk) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 2; i++) {
        const int64_t here = rows > TILE_ROWS ? assay_min_i64(TILE_ROWS, rows - TILE_ROWS * i) : rows;
        config.bytes[6 + i] = 64;
        config.rows[6 + i] = (uint8_t)(chunk / 4);
        config.bytes[2 * i] = config.bytes[2 * i + 1] = 64;
        config.rows[2 * i] = config.rows[2 * i + 1] = config.rows[4 + i] = (uint8_t)here;
        config.bytes[4 + i] = (uint16_t)chunk;
    }
    /* GCC's tile intrinsics do not say which memory they read. */
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

/* One row's groups g0 .. g0 + count - 1 as rows of tiles: of a row block of `rows` rows, whose values start at `values`. */
INLINE void prepare_row_tiles(const assay_gemm_args *p, const void *row, int8_t *values, float *scales, int32_t *comp, int64_t g0,
                              int64_t count, int64_t rows, const int whole) {
    const assay_w4_layout *l = &p->l;
    const int64_t chunk = chunk_of(l);
    _Alignas(64) float to_code[GROUPS_AT_ONCE], scale[GROUPS_AT_ONCE];
    const __mmask16 live = prepare_scales(l, row, p->a_dtype, g0, count, to_code, scale, whole);
    for (int64_t g = 0; g < count; g++) {
        const int64_t begin = (g0 + g) * l->group, end = begin + l->group;
        const __mmask16 keep = (__mmask16) - (live >> g & 1);
        const __m512 to = _mm512_set1_ps(to_code[g]);
        __m512i sum = _mm512_setzero_si512();
        int8_t *out = values + (g0 + g) * l->group_padded * rows;
        for (int64_t c = 0; c < l->group_padded; c += chunk, out += chunk * rows)
            for (int64_t i = 0; i < chunk; i += 16) {
                const __m512 x = load_some16(row, p->a_dtype, begin + c + i, end, whole);
                const __m512i code = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(keep, x, to));
                sum = _mm512_add_epi32(sum, code);
                _mm_storeu_si128((__m128i *)(out + i), _mm512_cvtepi32_epi8(code));
            }
        scales[(g0 + g) * rows] = scale[g];
        comp[(g0 + g) * rows] = -p->center * _mm512_reduce_add_epi32(sum);
    }
}

/* Row blocks as [k / chunk][rows][chunk], which is how tiles are loaded; calls of a few rows as AVX-512 multiplies them. */
INLINE void prepare_tiles(const assay_gemm_args *p, int64_t begin, int64_t end) {
    if (p->a16 || few_rows(p)) {
        assay_gemm_args few = *p;
        if (!p->a16) split_rows(&few);
        const int64_t blocks = few.row_blocks;
        prepare(&few, blocks * begin / p->row_blocks, blocks * end / p->row_blocks);
        return;
    }
    const assay_w4_layout *l = &p->l;
    const int64_t chunk = chunk_of(l), row_bytes = p->lda * (p->a_dtype == ASSAY_F32 ? 4 : 2);
    for (int64_t i = begin; i < end; i++) {
        const int64_t row0 = assay_block_row(p->m, p->row_blocks, i);
        const int64_t rows = assay_block_row(p->m, p->row_blocks, i + 1) - row0;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *row = (const uint8_t *)p->a + (row0 + r) * row_bytes;
            int8_t *values = (int8_t *)p->values + row0 * l->k_padded + r * chunk;
            float *scales = p->scale + row0 * l->groups + r;
            int32_t *comp = p->comp + row0 * l->groups + r;
            for (int64_t g = 0; g < l->groups; g += GROUPS_AT_ONCE) {
                const int64_t count = assay_min_i64(GROUPS_AT_ONCE, l->groups - g);
                if (l->group % 32) prepare_row_tiles(p, row, values, scales, comp, g, count, rows, 0);
                else prepare_row_tiles(p, row, values, scales, comp, g, count, rows, 1);
            }
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

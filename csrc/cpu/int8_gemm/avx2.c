/* int8 GEMM for AVX2: the equations of assay.h.
 *
 * vpmaddubsw on whole bytes would overflow int16 (2 x 255 x 127), so a weight u = q + 128 is split into its nibbles, each
 * with int16 sums of its own: I = sum(low) + 16 sum(high) - 128 sum(a), exact. Eight products of 15 x 127 x 2 fit int16: 32 k
 * at a time, as in the INT4 GEMM, at twice its work per weight. Registers (MR = 6 rows x 8 columns): 12 sums, 2 weights,
 * a broadcast, a product. At M = 1 the stream is DRAM's: 7 vector operations per 32 bytes. */
#include "../gemm_avx2.h"

enum { MR8 = 6 };

/* 32 k of 8 columns against `rows` rows: int32 sums in `wide`. */
INLINE void dot32(const uint8_t *lines, const int32_t *a, int rows, int64_t ahead, __m256i *wide) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[MR8], high[MR8];
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (const uint8_t *end = lines + ASSAY_BYTE_LINES32; lines < end; lines += 128, a += rows) {
        if (ahead) prefetch(lines + ahead);
        const __m256i u = _mm256_load_si256((const __m256i *)lines);
        const __m256i w0 = _mm256_and_si256(u, nibble), w1 = _mm256_and_si256(_mm256_srli_epi16(u, 4), nibble);
        for (int r = 0; r < rows; r++) {
            const __m256i x = _mm256_set1_epi32(a[r]);
            low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(w0, x));
            high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(w1, x));
            HOLD(low[r]);
            HOLD(high[r]);
        }
    }
    const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    for (int r = 0; r < rows; r++)
        wide[r] = _mm256_add_epi32(_mm256_madd_epi16(low[r], one), _mm256_madd_epi16(high[r], sixteen));
}

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    const int64_t *far = ahead->line; /* one for each half of the columns */
    __m256 f[4 * MR8];
    for (int i = 0; i < 4 * rows; i++) f[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        if (far[0]) prefetch_terms(l, tile, g, 0, far[0]);
        __m256i sum[4][MR8];
        for (int64_t k = 0; k < l->group_padded; k += 32)
            for (int v = 0; v < 4; v++) {
                __m256i more[MR8];
                /* Two quarters share a line: the even one asks for it. */
                dot32(block + ASSAY_SCALE_BYTES + k / 32 * ASSAY_BYTE_LINES32 + 32 * v, a + k / 4 * rows, rows,
                      v % 2 ? 0 : far[v / 2], more);
                for (int r = 0; r < rows; r++) sum[v][r] = k ? _mm256_add_epi32(sum[v][r], more[r]) : more[r];
            }
        for (int v = 0; v < 4; v++) {
            const __m256 ws = scale_of(block, v);
            for (int r = 0; r < rows; r++) {
                const __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(sum[v][r], _mm256_set1_epi32(comp[r])));
                f[4 * r + v] = _mm256_fmadd_ps(dot, _mm256_mul_ps(ws, _mm256_set1_ps(scale[r])), f[4 * r + v]);
            }
        }
        a += l->group_padded / 4 * rows;
    }
    store_rows(p, f, t, row0, rows);
}

ROWS(block8, 1) ROWS(block8, 2) ROWS(block8, 3) ROWS(block8, 4) ROWS(block8, 5) ROWS(block8, 6)

static void w8a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR8] = {block8_1, block8_2, block8_3, block8_4, block8_5, block8_6};
    tiles(p, begin, end, blocks, 2);
}

const assay_int8_gemm_kernel assay_int8_gemm_avx2 = {MR8, MR8, w8a8};

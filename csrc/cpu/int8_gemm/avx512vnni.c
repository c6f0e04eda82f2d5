/* int8 GEMM for AVX-512 with VNNI: the equations of assay.h. A line is vpdpbusd's unsigned operand as it lies (q + 128);
 * sums start at -128 times the sum of the activation codes. 12 int32 and 12 float32 accumulators for 6 rows x 32 columns. */
#include "../gemm_avx512.h"

enum { MR8 = 6 };

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    __m512 f[2 * MR8];
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        const uint8_t *at = block + ASSAY_SCALE_BYTES;
        prefetch(block + ahead->line[0]);
        __m512i acc[2 * MR8];
        for (int r = 0; r < rows; r++) acc[2 * r] = acc[2 * r + 1] = _mm512_set1_epi32(comp[r]);
        for (int64_t step = 0; step < l->group_padded / 4; step++, at += 128, a += rows) {
            prefetch(at + ahead->line[step % 4 * 2]);
            prefetch(at + 64 + ahead->line[step % 4 * 2 + 1]);
            const __m512i w0 = line(at), w1 = line(at + 64);
            for (int r = 0; r < rows; r++) {
                const __m512i x = _mm512_set1_epi32(a[r]);
                acc[2 * r] = _mm512_dpbusd_epi32(acc[2 * r], w0, x);
                acc[2 * r + 1] = _mm512_dpbusd_epi32(acc[2 * r + 1], w1, x);
            }
        }
        for (int h = 0; h < 2; h++) {
            const __m512 ws = scale_of(block, h);
            for (int r = 0; r < rows; r++)
                f[2 * r + h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[2 * r + h]),
                                               _mm512_mul_ps(ws, _mm512_set1_ps(scale[r])), f[2 * r + h]);
        }
    }
    store_rows(p, f, t, row0, rows);
}

ROWS(block8, 1) ROWS(block8, 2) ROWS(block8, 3) ROWS(block8, 4) ROWS(block8, 5) ROWS(block8, 6)

static void w8a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR8] = {block8_1, block8_2, block8_3, block8_4, block8_5, block8_6};
    tiles(p, begin, end, blocks, 8);
}

const assay_int8_gemm_kernel assay_int8_gemm_avx512vnni = {MR8, MR8, w8a8};

/* int8 GEMM for AVX-VNNI: the equations of assay.h. A line is vpdpbusd's unsigned operand as it lies (q + 128); sums start
 * at -128 times the sum of the activation codes. */
#include "../gemm_avxvnni.h"

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows,
                   const enum kind kind) {
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
        for (int h = 0; h < 2; h++) {
            __m256i acc[2 * MR8];
            for (int r = 0; r < rows; r++) acc[2 * r] = acc[2 * r + 1] = _mm256_set1_epi32(comp[r]);
            dot(block + ASSAY_SCALE_BYTES + 64 * h, a, rows, l->group_padded, far[h], kind, _mm256_setzero_si256(), acc);
            for (int v = 0; v < 2; v++) {
                const __m256 ws = scale_of(block, 2 * h + v);
                for (int r = 0; r < rows; r++) {
                    const __m256 s = _mm256_mul_ps(ws, _mm256_set1_ps(scale[r]));
                    f[4 * r + 2 * h + v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[2 * r + v]), s, f[4 * r + 2 * h + v]);
                }
            }
        }
        a += l->group_padded / 4 * rows;
    }
    store_rows(p, f, t, row0, rows);
}

KINDS6(block8, BYTE)

static void w8a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR8] = {LIST6(block8, BYTE)};
    tiles(p, begin, end, blocks, 2);
}

const assay_int8_gemm_kernel assay_int8_gemm_avxvnni = {MR8, MR8, w8a8};

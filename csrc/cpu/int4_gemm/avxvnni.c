/* INT4 GEMM for AVX-VNNI (Alder Lake and its like, without AVX-512): the equations of assay.h. vpdpbusd adds four products
 * to an int32 lane, so nothing is widened; per 32 k x 16 columns and 6 rows 96 of it against 48 broadcasts and 24 unpacking
 * operations. w4a16 is AVX2's. */
#include "../gemm_avxvnni.h"

extern const assay_int4_gemm_kernel assay_int4_gemm_avx2;
enum { MR16 = 4 };

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
        const uint8_t *block = tile + assay_w4_block_offset(l, g), *zeros = tile + assay_w4_zero_offset(l, g);
        for (int h = 0; h < 2; h++) {
            __m256i acc[2 * MR8];
            if (far[h]) prefetch_terms(l, tile, g, h, far[h]);
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < 2; v++) {
                    const __m256i start = _mm256_set1_epi32(comp[r]);
                    acc[2 * r + v] = l->symmetric ? start : _mm256_mullo_epi32(start, zero_of(zeros, 2 * h + v));
                }
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

KINDS6(block8, NIBBLE)

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR8] = {LIST6(block8, NIBBLE)};
    tiles(p, begin, end, blocks, 2);
}

static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) { assay_int4_gemm_avx2.w4a16(p, begin, end); }

const assay_int4_gemm_kernel assay_int4_gemm_avxvnni = {MR8, MR16, MR8, assay_int4_prepare_avx2, w4a8, w4a16, 0, NULL, NULL, NULL};

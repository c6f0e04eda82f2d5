/* int8 GEMM for AMX-INT8: the equations of assay.h. Calls of a few rows are AVX-512's. */
#include "../gemm_amx_panels.h"

extern const assay_int8_gemm_kernel assay_int8_gemm_avx512vnni;

/* A group longer than the panel's, whose weight tiles are loaded from the packed lines as they lie (q + 128). */
KERNEL void block8(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded;
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    amx_buffer buffer;
    __m512 f[2 * MR8];
    for (int64_t i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows, a += l->group_padded * rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        dot_group(l, block + ASSAY_SCALE_BYTES, a, rows, BYTE, _mm512_setzero_si512(), &buffer);
        for (int h = 0; h < 2; h++) {
            const __m512 ws = scale_of(block, h);
            for (int64_t r = 0; r < rows; r++) {
                const __m512i sum = _mm512_add_epi32(_mm512_load_si512((const void *)(buffer.sum[r] + 16 * h)),
                                                     _mm512_set1_epi32(comp[r]));
                f[2 * r + h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(ws, _mm512_set1_ps(scale[r])),
                                               f[2 * r + h]);
            }
        }
    }
    store_rows(p, f, t, row0, (int)rows);
}

static void w8a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    if (few_rows(p)) {
        assay_gemm_args few = *p;
        split_rows(&few);
        assay_int8_gemm_avx512vnni.w8a8(&few, begin, end);
    } else if (p->l.group_padded > MOST_GROUP) {
        walk_tiles(p, begin, end, block8);
    } else {
        walk_panels(p, begin, end, BYTE);
    }
}

const assay_int8_gemm_kernel assay_int8_gemm_amx = {MR8, MR8, w8a8};

/* Wide GEMM for AMX-INT8: the equations of assay.h. a16 and calls of a few rows are AVX-512's. */
#include "../gemm_amx.h"

extern const assay_wide_gemm_kernel assay_wide_gemm_avx512vnni;

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t rows, const enum kind kind) {
    const assay_wide_args *w = (const assay_wide_args *)p;
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded;
    const float *scale = p->scale + row0 * l->groups, *terms = w->terms + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_xor_si128(_mm_loadu_si128((const __m128i *)w->whole), _mm_set1_epi8((char)0x80)));
    amx_buffer buffer;
    __m512 f[2 * MR8];
    for (int64_t i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows, terms += rows, a += l->group_padded * rows) {
        const uint8_t *block = assay_wide_block(w, tile, g);
        dot_group(l, assay_wide_lines(w, block), a, rows, kind, table, &buffer);
        for (int h = 0; h < 2; h++) {
            const __m512 ws = _mm512_load_ps((const float *)block + 16 * h);
            for (int64_t r = 0; r < rows; r++) {
                const __m512i sum = _mm512_add_epi32(_mm512_load_si512((const void *)(buffer.sum[r] + 16 * h)),
                                                     _mm512_set1_epi32(comp[r]));
                f[2 * r + h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(ws, _mm512_set1_ps(scale[r])),
                                               f[2 * r + h]);
            }
            if (!w->minimum) continue;
            const __m512 minimum = _mm512_load_ps((const float *)(block + ASSAY_TERM_BYTES) + 16 * h);
            for (int64_t r = 0; r < rows; r++)
                f[2 * r + h] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(terms[r]), f[2 * r + h]);
        }
    }
    store_rows(p, f, t, row0, (int)rows);
}

#define BLOCK8(kind)                                                                              \
    KERNEL void block8_##kind(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t rows) {  \
        block8(p, t, row0, rows, kind);                                                           \
    }
BLOCK8(NIBBLE) BLOCK8(TABLE) BLOCK8(BYTE)

static void a8(const assay_wide_args *w, int64_t begin, int64_t end) {
    static const amx_block_fn blocks[3] = {block8_NIBBLE, block8_TABLE, block8_BYTE};
    if (!few_rows(&w->gemm)) {
        walk_tiles(&w->gemm, begin, end, blocks[w->bits == 8 ? BYTE : w->plain ? NIBBLE : TABLE]);
        return;
    }
    assay_wide_args few = *w;
    split_rows(&few.gemm);
    assay_wide_gemm_avx512vnni.a8(&few, begin, end);
}

static void a16(const assay_wide_args *w, int64_t begin, int64_t end) { assay_wide_gemm_avx512vnni.a16(w, begin, end); }

const assay_wide_gemm_kernel assay_wide_gemm_amx = {MR8, MR16, a8, a16};

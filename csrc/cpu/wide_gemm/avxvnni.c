/* Wide GEMM for AVX-VNNI: the equations of assay.h. vpshufb turns nibbles into v + 128, vpdpbusd's unsigned operand; codes
 * that are their own values and bytes need no table. a16 is AVX2's. */
#include "../gemm_avxvnni.h"

extern const assay_wide_gemm_kernel assay_wide_gemm_avx2;
enum { MR16 = 4 };

INLINE __m256 term(const uint8_t *at, int v) { return _mm256_load_ps((const float *)at + 8 * v); }

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows,
                   const enum kind kind) {
    const assay_wide_args *w = (const assay_wide_args *)p;
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups, *terms = w->terms + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    const int64_t *far = ahead->line; /* one for each half of the columns */
    const __m256i table = _mm256_xor_si256(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)w->whole)),
                                           _mm256_set1_epi8((char)0x80));
    __m256 f[4 * MR8];
    for (int i = 0; i < 4 * rows; i++) f[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows, terms += rows) {
        const uint8_t *block = assay_wide_block(w, tile, g), *lines = assay_wide_lines(w, block);
        for (int h = 0; h < 2; h++) {
            __m256i acc[2 * MR8];
            if (far[h])
                for (const uint8_t *at = block + 64 * h; at < lines; at += ASSAY_TERM_BYTES) prefetch(at + far[h]);
            for (int r = 0; r < rows; r++) acc[2 * r] = acc[2 * r + 1] = _mm256_set1_epi32(comp[r]);
            dot(lines + 64 * h, a, rows, l->group_padded, far[h], kind, table, acc);
            for (int v = 0; v < 2; v++) {
                const __m256 ws = term(block, 2 * h + v);
                for (int r = 0; r < rows; r++) {
                    __m256 *sum = &f[4 * r + 2 * h + v];
                    const __m256 s = _mm256_mul_ps(ws, _mm256_set1_ps(scale[r]));
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[2 * r + v]), s, *sum);
                    if (w->minimum)
                        *sum = _mm256_fmadd_ps(term(block + ASSAY_TERM_BYTES, 2 * h + v), _mm256_set1_ps(terms[r]), *sum);
                }
            }
        }
        a += l->group_padded / 4 * rows;
    }
    store_rows(p, f, t, row0, rows);
}

KINDS6(block8, NIBBLE) KINDS6(block8, TABLE) KINDS6(block8, BYTE)

static void a8(const assay_wide_args *w, int64_t begin, int64_t end) {
    static const block_fn blocks[3][MR8] = {{LIST6(block8, NIBBLE)}, {LIST6(block8, TABLE)}, {LIST6(block8, BYTE)}};
    tiles(&w->gemm, begin, end, blocks[w->bits == 8 ? BYTE : w->plain ? NIBBLE : TABLE], 2);
}

static void a16(const assay_wide_args *w, int64_t begin, int64_t end) { assay_wide_gemm_avx2.a16(w, begin, end); }

const assay_wide_gemm_kernel assay_wide_gemm_avxvnni = {MR8, MR16, a8, a16};

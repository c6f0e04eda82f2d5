/* Wide GEMM for aarch64 with sdot: the equations of assay.h. tbl turns nibbles into their values, signed, so sums start at 0.
 * a16 is portable C's. */
#include "../gemm_neondot.h"

extern const assay_wide_gemm_kernel assay_wide_gemm_scalar;
enum { MR16 = 4 };

INLINE float32x4_t term(const uint8_t *at, int v) { return vld1q_f32((const float *)at + 4 * v); }

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const int rows, const enum kind kind) {
    const assay_wide_args *w = (const assay_wide_args *)p;
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups, *terms = w->terms + row0 * l->groups;
    const int8x16_t table = vld1q_s8(w->whole);
    float32x4_t f[8 * MR8];
    for (int i = 0; i < 8 * rows; i++) f[i] = vdupq_n_f32(0);
    for (int64_t g = 0; g < l->groups; g++, scale += rows, terms += rows) {
        const uint8_t *block = assay_wide_block(w, tile, g);
        for (int h = 0; h < 2; h++) {
            int32x4_t acc[4 * MR8];
            for (int i = 0; i < 4 * rows; i++) acc[i] = vdupq_n_s32(0);
            dot(assay_wide_lines(w, block) + 64 * h, a, rows, l->group_padded, kind, table, acc);
            for (int v = 0; v < 4; v++) {
                const float32x4_t ws = term(block, 4 * h + v);
                for (int r = 0; r < rows; r++) {
                    float32x4_t *sum = &f[8 * r + 4 * h + v];
                    *sum = vfmaq_f32(*sum, vcvtq_f32_s32(acc[4 * r + v]), vmulq_n_f32(ws, scale[r]));
                    if (w->minimum) *sum = vfmaq_n_f32(*sum, term(block + ASSAY_TERM_BYTES, 4 * h + v), terms[r]);
                }
            }
        }
        a += l->group_padded / 4 * rows;
    }
    store_rows(p, f, t, row0, rows);
}

ROWS6(block8, NIBBLE) ROWS6(block8, TABLE) ROWS6(block8, BYTE)

static void a8(const assay_wide_args *w, int64_t begin, int64_t end) {
    static const block_fn blocks[3][MR8] = {LIST6(block8, NIBBLE), LIST6(block8, TABLE), LIST6(block8, BYTE)};
    tiles(&w->gemm, begin, end, blocks[w->bits == 8 ? BYTE : w->plain ? NIBBLE : TABLE]);
}

static void a16(const assay_wide_args *w, int64_t begin, int64_t end) { assay_wide_gemm_scalar.a16(w, begin, end); }

const assay_wide_gemm_kernel assay_wide_gemm_neondot = {MR8, MR16, a8, a16};

/* int8 GEMM for aarch64 with sdot: the equations of assay.h. The stream's q + 128 becomes q by one exclusive or, so sums start
 * at 0. */
#include "../gemm_neondot.h"

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const int rows, const enum kind kind) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups;
    float32x4_t f[8 * MR8];
    for (int i = 0; i < 8 * rows; i++) f[i] = vdupq_n_f32(0);
    for (int64_t g = 0; g < l->groups; g++, scale += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        for (int h = 0; h < 2; h++) {
            int32x4_t acc[4 * MR8];
            for (int i = 0; i < 4 * rows; i++) acc[i] = vdupq_n_s32(0);
            dot(block + ASSAY_SCALE_BYTES + 64 * h, a, rows, l->group_padded, kind, vdupq_n_s8(0), acc);
            for (int v = 0; v < 4; v++) {
                const float32x4_t ws = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(block + 8 * (4 * h + v))));
                for (int r = 0; r < rows; r++) {
                    float32x4_t *sum = &f[8 * r + 4 * h + v];
                    *sum = vfmaq_f32(*sum, vcvtq_f32_s32(acc[4 * r + v]), vmulq_n_f32(ws, scale[r]));
                }
            }
        }
        a += l->group_padded / 4 * rows;
    }
    store_rows(p, f, t, row0, rows);
}

ROWS6(block8, BYTE)

static void w8a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR8] = LIST6(block8, BYTE);
    tiles(p, begin, end, blocks);
}

const assay_int8_gemm_kernel assay_int8_gemm_neondot = {MR8, MR8, w8a8};

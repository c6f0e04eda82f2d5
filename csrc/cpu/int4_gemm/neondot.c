/* INT4 GEMM for aarch64 with sdot: the equations of assay.h. Nibbles are valid signed bytes, so sdot takes them as they are;
 * sums start at the zero point's correction. Activations and w4a16 are portable C's. */
#include "../gemm_neondot.h"

enum { MR16 = 4 };

/* float32 scales of columns 4 v .. 4 v + 3. */
INLINE float32x4_t scale_of(const uint8_t *block, int v) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(block + 8 * v)));
}

/* int32 zero points of columns 4 v .. 4 v + 3. */
INLINE int32x4_t zero_of(const uint8_t *zeros, int v) {
    int32_t z[4];
    for (int j = 0; j < 4; j++) z[j] = v < 4 ? zeros[4 * v + j] & 15 : zeros[4 * v - 16 + j] >> 4;
    return vld1q_s32(z);
}

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const int rows, const enum kind kind) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    float32x4_t f[8 * MR8];
    for (int i = 0; i < 8 * rows; i++) f[i] = vdupq_n_f32(0);
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g), *zeros = tile + assay_w4_zero_offset(l, g);
        for (int h = 0; h < 2; h++) {
            int32x4_t acc[4 * MR8];
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < 4; v++)
                    acc[4 * r + v] = l->symmetric ? vdupq_n_s32(comp[r]) : vmulq_n_s32(zero_of(zeros, 4 * h + v), comp[r]);
            dot(block + ASSAY_SCALE_BYTES + 64 * h, a, rows, l->group_padded, kind, vdupq_n_s8(0), acc);
            for (int v = 0; v < 4; v++) {
                const float32x4_t ws = scale_of(block, 4 * h + v);
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

ROWS6(block8, NIBBLE)

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR8] = LIST6(block8, NIBBLE);
    tiles(p, begin, end, blocks);
}

static void prepare(const assay_gemm_args *p, int64_t begin, int64_t end) { assay_int4_gemm_scalar.prepare(p, begin, end); }
static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) { assay_int4_gemm_scalar.w4a16(p, begin, end); }

const assay_int4_gemm_kernel assay_int4_gemm_neondot = {MR8, MR16, MR8, prepare, w4a8, w4a16, 0, NULL, NULL, NULL};

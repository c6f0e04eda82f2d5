/* int8 GEMM in portable C: the equations of assay.h, one output at a time. */
#include "../gemm_scalar.h"

static void column(const assay_gemm_args *p, const uint8_t *tile, int64_t j, int64_t row0, int64_t rows, float *f) {
    const assay_w4_layout *l = &p->l;
    for (int64_t g = 0; g < l->groups; g++) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        const uint8_t *lane = block + ASSAY_SCALE_BYTES + j / 16 * 64 + j % 16 * 4;
        const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded + g * l->group_padded * rows;
        uint16_t half;
        memcpy(&half, block + 2 * j, 2);
        const float scale = assay_f32_of_f16(half);
        int32_t acc[MR] = {0};
        for (int64_t step = 0; step < l->group_padded / 4; step++, a += 4 * rows)
            for (int64_t r = 0; r < rows; r++)
                for (int b = 0; b < 4; b++) acc[r] += ((int32_t)lane[step * 128 + b] - 128) * a[4 * r + b];
        for (int64_t r = 0; r < rows; r++)
            f[r] = fmaf((float)acc[r], scale * p->scale[row0 * l->groups + g * rows + r], f[r]);
    }
}

static void w8a8(const assay_gemm_args *p, int64_t begin, int64_t end) { walk(p, begin, end, column); }

const assay_int8_gemm_kernel assay_int8_gemm_scalar = {MR, MR, w8a8};

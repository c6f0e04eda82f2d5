/* INT4 GEMM in portable C: the equations of assay.h, one output at a time. What the other variants must equal bit
 * for bit; fast enough to be usable where nothing else is. */
#include "../gemm_scalar.h"

static void prepare8(const assay_gemm_args *p, int64_t row0, int64_t rows) {
    const assay_w4_layout *l = &p->l;
    int8_t *values = (int8_t *)p->values + row0 * l->k_padded;
    float *scale = p->scale + row0 * l->groups;
    int32_t *comp = p->comp + row0 * l->groups;
    const int64_t element = p->a_dtype == ASSAY_F32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = (const uint8_t *)p->a + (row0 + r) * p->lda * element;
        for (int64_t g = 0; g < l->groups; g++) {
            float amax = 0;
            int finite = 1;
            for (int64_t i = 0; i < l->group; i++) {
                float x = fabsf(assay_load_f32(row, p->a_dtype, g * l->group + i));
                finite &= x < INFINITY;
                if (x > amax) amax = x;
            }
            const int live = finite && amax >= 1e-30f;
            const float to_code = live ? 127.0f / amax : 0;
            int32_t sum = 0;
            for (int64_t i = 0; i < l->group_padded; i++) {
                int32_t q = 0;
                if (live && i < l->group)
                    q = (int32_t)rintf(assay_load_f32(row, p->a_dtype, g * l->group + i) * to_code);
                const int64_t k = g * l->group_padded + i;
                values[(k / 4 * rows + r) * 4 + k % 4] = (int8_t)q;
                sum += q;
            }
            scale[g * rows + r] = live ? amax / 127.0f : finite ? 0 : NAN;
            comp[g * rows + r] = -p->center * sum;
        }
    }
}

static void prepare16(const assay_gemm_args *p, int64_t row0, int64_t rows) {
    const assay_w4_layout *l = &p->l;
    float *values = (float *)p->values + row0 * l->k_padded;
    float *xsum = p->scale + row0 * l->groups;
    const int64_t element = p->a_dtype == ASSAY_F32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = (const uint8_t *)p->a + (row0 + r) * p->lda * element;
        for (int64_t g = 0; g < l->groups; g++) {
            float lane[8] = {0};
            for (int64_t i = 0; i < l->group_padded; i++) {
                float x = i < l->group ? assay_load_a16(row, p->a_dtype, g * l->group + i) : 0;
                values[(g * l->group_padded + i) * rows + r] = x;
                lane[i % 8] += x;
            }
            xsum[g * rows + r] =
                ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
        }
    }
}

static void prepare(const assay_gemm_args *p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        const int64_t row0 = assay_block_row(p->m, p->row_blocks, i);
        const int64_t rows = assay_block_row(p->m, p->row_blocks, i + 1) - row0;
        (p->a16 ? prepare16 : prepare8)(p, row0, rows);
    }
}

/* The eight weights of one lane of one step, in k order. */
static void unpack(const uint8_t *lane, int32_t q[8]) {
    for (int b = 0; b < 4; b++) {
        q[b] = lane[b] & 15;
        q[4 + b] = lane[b] >> 4;
    }
}

typedef struct {
    float scale;
    int32_t zero;
    const uint8_t *lanes; /* of this column; the next step is 128 bytes on */
} column;

static column column_of(const assay_w4_layout *l, const uint8_t *tile, int64_t g, int64_t j) {
    const uint8_t *block = tile + assay_w4_block_offset(l, g);
    const uint8_t z = l->symmetric ? 0x88 : tile[assay_w4_zero_offset(l, g) + j % 16];
    uint16_t scale;
    memcpy(&scale, block + 2 * j, 2);
    return (column){assay_f32_of_f16(scale), j < 16 ? z & 15 : z >> 4,
                    block + ASSAY_SCALE_BYTES + j / 16 * 64 + j % 16 * 4};
}

static void column8(const assay_gemm_args *p, const uint8_t *tile, int64_t j, int64_t row0, int64_t rows, float *f) {
    const assay_w4_layout *l = &p->l;
    for (int64_t g = 0; g < l->groups; g++) {
        const column w = column_of(l, tile, g, j);
        const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded + g * l->group_padded * rows;
        int32_t acc[MR] = {0};
        for (int64_t step = 0; step < l->group_padded / 8; step++, a += 8 * rows) {
            int32_t q[8];
            unpack(w.lanes + step * 128, q);
            for (int64_t r = 0; r < rows; r++)
                for (int i = 0; i < 8; i++) acc[r] += q[i] * a[(i / 4 * rows + r) * 4 + i % 4];
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = row0 * l->groups + g * rows + r;
            acc[r] += l->symmetric ? p->comp[at] : w.zero * p->comp[at];
            f[r] = fmaf((float)acc[r], w.scale * p->scale[at], f[r]);
        }
    }
}

static void column16(const assay_gemm_args *p, const uint8_t *tile, int64_t j, int64_t row0, int64_t rows, float *f) {
    const assay_w4_layout *l = &p->l;
    for (int64_t g = 0; g < l->groups; g++) {
        const column w = column_of(l, tile, g, j);
        const float *x = (const float *)p->values + row0 * l->k_padded + g * l->group_padded * rows;
        float part[MR];
        for (int64_t r = 0; r < rows; r++) part[r] = -(float)w.zero * p->scale[row0 * l->groups + g * rows + r];
        for (int64_t step = 0; step < l->group_padded / 8; step++, x += 8 * rows) {
            int32_t q[8];
            unpack(w.lanes + step * 128, q);
            for (int64_t r = 0; r < rows; r++)
                for (int i = 0; i < 8; i++) part[r] = fmaf(x[i * rows + r], (float)q[i], part[r]);
        }
        for (int64_t r = 0; r < rows; r++) f[r] = fmaf(part[r], w.scale, f[r]);
    }
}

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) { walk(p, begin, end, column8); }
static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) { walk(p, begin, end, column16); }

const assay_int4_gemm_kernel assay_int4_gemm_scalar = {MR, MR, MR, prepare, w4a8, w4a16, 0, NULL, NULL, NULL};

/* Wide GEMM in portable C: the equations of assay.h, one output at a time. */
#include "../gemm_scalar.h"

static const assay_wide_args *wide(const assay_gemm_args *p) { return (const assay_wide_args *)p; }

typedef struct {
    float scale, minimum;
    const uint8_t *lanes; /* of this column; the next line is 128 bytes on */
} column;

static column column_of(const assay_wide_args *w, const uint8_t *tile, int64_t g, int64_t j) {
    const uint8_t *block = assay_wide_block(w, tile, g);
    column c = {.lanes = assay_wide_lines(w, block) + j / 16 * 64 + j % 16 * 4};
    memcpy(&c.scale, block + 4 * j, 4);
    if (w->minimum) memcpy(&c.minimum, block + ASSAY_TERM_BYTES + 4 * j, 4);
    return c;
}

/* The codes of weights i .. i + 7 of a group: 4 bits as they are, 8 bits less 128. */
static void codes_of(const assay_wide_args *w, const uint8_t *lanes, int64_t i, int32_t code[8]) {
    for (int b = 0; b < 4; b++) {
        if (w->bits == 8) {
            code[b] = lanes[i / 4 * 128 + b] - 128;
            code[4 + b] = lanes[i / 4 * 128 + 128 + b] - 128;
        } else {
            code[b] = lanes[i / 8 * 128 + b] & 15;
            code[4 + b] = lanes[i / 8 * 128 + b] >> 4;
        }
    }
}

static void column8(const assay_gemm_args *p, const uint8_t *tile, int64_t j, int64_t row0, int64_t rows, float *f) {
    const assay_wide_args *w = wide(p);
    const assay_w4_layout *l = &p->l;
    for (int64_t g = 0; g < l->groups; g++) {
        const column col = column_of(w, tile, g, j);
        const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded + g * l->group_padded * rows;
        int32_t acc[MR] = {0};
        for (int64_t i = 0; i < l->group_padded; i += 8, a += 8 * rows) {
            int32_t v[8];
            codes_of(w, col.lanes, i, v);
            if (w->bits == 4)
                for (int b = 0; b < 8; b++) v[b] = w->whole[v[b]];
            for (int64_t r = 0; r < rows; r++)
                for (int b = 0; b < 8; b++) acc[r] += v[b] * a[(b / 4 * rows + r) * 4 + b % 4];
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = row0 * l->groups + g * rows + r;
            f[r] = fmaf((float)acc[r], col.scale * p->scale[at], f[r]);
            if (w->minimum) f[r] = fmaf(col.minimum, w->terms[at], f[r]);
        }
    }
}

static void column16(const assay_gemm_args *p, const uint8_t *tile, int64_t j, int64_t row0, int64_t rows, float *f) {
    const assay_wide_args *w = wide(p);
    const assay_w4_layout *l = &p->l;
    for (int64_t g = 0; g < l->groups; g++) {
        const column col = column_of(w, tile, g, j);
        const float *x = (const float *)p->values + row0 * l->k_padded + g * l->group_padded * rows;
        float part[MR] = {0};
        for (int64_t i = 0; i < l->group_padded; i += 8, x += 8 * rows) {
            int32_t code[8];
            codes_of(w, col.lanes, i, code);
            for (int b = 0; b < 8; b++) {
                const float v = w->bits == 4 ? w->codebook[code[b]] : (float)code[b];
                for (int64_t r = 0; r < rows; r++) part[r] = fmaf(x[b * rows + r], v, part[r]);
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            f[r] = fmaf(part[r], col.scale, f[r]);
            if (w->minimum) f[r] = fmaf(col.minimum, w->terms[row0 * l->groups + g * rows + r], f[r]);
        }
    }
}

static void a8(const assay_wide_args *w, int64_t begin, int64_t end) { walk(&w->gemm, begin, end, column8); }
static void a16(const assay_wide_args *w, int64_t begin, int64_t end) { walk(&w->gemm, begin, end, column16); }

const assay_wide_gemm_kernel assay_wide_gemm_scalar = {MR, MR, a8, a16};

/* Wide GEMM: the packed layout, packing, and the call. The activations are prepared as the INT4 GEMM prepares its own. */
#include "kernels.h"
#include "lanes.h"

#include <math.h>

/* ---- layout and packing -------------------------------------------------------------------------------- */

/* K at most 2^17: a row's integer dot product stays below 2^31, the sum of its activation codes below 2^24. */
static int layout_of(int64_t n, int64_t k, int64_t group_size, int bits, int minimum, assay_w4_layout *l) {
    if (n < 1 || k < 1 || n > (int64_t)1 << 28 || k > (int64_t)1 << 17 || (bits != 4 && bits != 8)) return ASSAY_EINVAL;
    const int fixed = group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128;
    if (!(fixed && k % group_size == 0) && group_size != k) return ASSAY_EINVAL;
    *l = (assay_w4_layout){.n = n, .k = k, .group = group_size, .groups = k / group_size, .symmetric = 1};
    l->group_padded = assay_round_up(group_size, 16);
    l->k_padded = l->groups * l->group_padded;
    l->tiles = (n + ASSAY_TILE_N - 1) / ASSAY_TILE_N;
    l->block_bytes = (minimum ? 2 : 1) * ASSAY_TERM_BYTES + l->group_padded * ASSAY_TILE_N * bits / 8;
    l->tile_bytes = l->groups * l->block_bytes;
    return ASSAY_OK;
}

size_t assay_wide_packed_bytes(int64_t n, int64_t k, int64_t group_size, int bits, int has_minimum) {
    assay_w4_layout l;
    return layout_of(n, k, group_size, bits, has_minimum, &l) ? 0 : (size_t)(l.tiles * l.tile_bytes);
}

typedef struct {
    assay_w4_layout l;
    int bits;
    const void *qweight;
    const float *scales, *minimum;
    uint8_t *packed;
} pack_args;

/* The lane of column n and of its group's weights from i on; zeros where there are none. */
static uint32_t lane_of(const pack_args *p, int64_t n, int64_t g, int64_t i) {
    const assay_w4_layout *l = &p->l;
    const int64_t at = g * l->group + i, left = n < l->n ? l->group - i : 0;
    if (left <= 0) return p->bits == 4 ? 0 : 0x80808080;
    if (p->bits == 4) return assay_lane_of_nibbles((const uint8_t *)p->qweight + n * ((l->k + 1) / 2) + at / 2, left);
    return assay_lane_of_bytes((const int8_t *)p->qweight + n * l->k + at, left);
}

static void pack_tiles(void *arg, int64_t begin, int64_t end) {
    const pack_args *p = arg;
    const assay_w4_layout *l = &p->l;
    const int64_t step = 32 / p->bits; /* weights of a lane */
    for (int64_t t = begin; t < end; t++)
        for (int64_t g = 0; g < l->groups; g++) {
            uint8_t *block = p->packed + t * l->tile_bytes + g * l->block_bytes;
            uint8_t *lines = block + (p->minimum ? 2 : 1) * ASSAY_TERM_BYTES;
            for (int64_t j = 0; j < ASSAY_TILE_N; j++) {
                const int64_t n = t * ASSAY_TILE_N + j;
                const float scale = n < l->n ? p->scales[n * l->groups + g] : 0;
                memcpy(block + 4 * j, &scale, 4);
                if (p->minimum) {
                    const float minimum = n < l->n ? p->minimum[n * l->groups + g] : 0;
                    memcpy(block + ASSAY_TERM_BYTES + 4 * j, &minimum, 4);
                }
                uint8_t *dst = lines + j / 16 * 64 + j % 16 * 4;
                for (int64_t i = 0; i < l->group_padded; i += step, dst += 128) {
                    const uint32_t word = lane_of(p, n, g, i);
                    memcpy(dst, &word, 4);
                }
            }
        }
}

int assay_wide_pack(int64_t n, int64_t k, int64_t group_size, int bits, const void *qweight, const float *scales,
                    const float *minimum, void *packed, int num_threads) {
    pack_args p = {.bits = bits, .qweight = qweight, .scales = scales, .minimum = minimum, .packed = packed};
    if (!qweight || !scales || !packed || layout_of(n, k, group_size, bits, minimum != NULL, &p.l)) return ASSAY_EINVAL;
    return assay_parallel_for(pack_tiles, &p, p.l.tiles, num_threads, 1);
}

int assay_wide_unpack(const assay_wide *w, void *qweight, float *scales, float *minimum) {
    assay_w4_layout l;
    if (!w || !w->data || !qweight || !scales || (w->has_minimum && !minimum) ||
        layout_of(w->n, w->k, w->group_size, w->bits, w->has_minimum, &l))
        return ASSAY_EINVAL;
    const int64_t row_bytes = w->bits == 4 ? (l.k + 1) / 2 : l.k;
    uint8_t *out = qweight;
    memset(out, 0, (size_t)(l.n * row_bytes));
    for (int64_t n = 0; n < l.n; n++, out += row_bytes)
        for (int64_t g = 0; g < l.groups; g++) {
            const int64_t j = n % ASSAY_TILE_N;
            const uint8_t *block = (const uint8_t *)w->data + n / ASSAY_TILE_N * l.tile_bytes + g * l.block_bytes;
            const uint8_t *lane = block + (w->has_minimum ? 2 : 1) * ASSAY_TERM_BYTES + j / 16 * 64 + j % 16 * 4;
            memcpy(&scales[n * l.groups + g], block + 4 * j, 4);
            if (w->has_minimum) memcpy(&minimum[n * l.groups + g], block + ASSAY_TERM_BYTES + 4 * j, 4);
            for (int64_t i = 0; i < l.group; i++) {
                const int64_t at = g * l.group + i;
                if (w->bits == 8) {
                    out[at] = lane[i / 4 * 128 + i % 4] ^ 0x80;
                } else {
                    const uint8_t byte = lane[i / 8 * 128 + i % 4], q = i % 8 < 4 ? byte & 15 : byte >> 4;
                    out[at / 2] |= (uint8_t)(at % 2 ? q << 4 : q);
                }
            }
        }
    return ASSAY_OK;
}

/* ---- the call --------------------------------------------------------------------------------------------- */

static int valid(const assay_wide *w, int64_t m, assay_w4_layout *l) {
    return w && w->data && m >= 0 && m <= (int64_t)1 << 24 &&
           !layout_of(w->n, w->k, w->group_size, w->bits, w->has_minimum, l);
}

static size_t workspace_bytes_of(const assay_w4_layout *l, int64_t m, int a16) {
    const size_t values = (size_t)assay_round_up(m * l->k_padded * (a16 ? 4 : 1), 64);
    return values + (size_t)(a16 ? 1 : 3) * (size_t)assay_round_up(m * l->groups * 4, 64) + 64;
}

size_t assay_wide_gemm_workspace(const assay_wide *w, int64_t m, int a16) {
    assay_w4_layout l;
    return valid(w, m, &l) ? workspace_bytes_of(&l, m, a16) : 0;
}

/* The codebook as a8 and as a16 use it. */
static int take_codebook(assay_wide_args *out, const float *codebook, int a16) {
    out->plain = 1;
    for (int i = 0; i < 16; i++) {
        const float v = codebook[i];
        if (!isfinite(v) || (!a16 && (fabsf(v) > 127 || rintf(v) != v))) return ASSAY_EINVAL;
        out->codebook[i] = v;
        out->whole[i] = a16 ? 0 : (int8_t)v;
        out->plain &= v == (float)i;
    }
    return ASSAY_OK;
}

typedef struct {
    assay_wide_args args;
    void (*prepare)(const assay_gemm_args *args, int64_t begin, int64_t end);
    void (*multiply)(const assay_wide_args *args, int64_t begin, int64_t end);
} plan;

static void prepare_range(void *arg, int64_t begin, int64_t end) {
    const plan *p = arg;
    const assay_gemm_args *g = &p->args.gemm;
    p->prepare(g, begin, end);
    if (g->a16) return;
    const int64_t first = assay_block_row(g->m, g->row_blocks, begin) * g->l.groups;
    const int64_t last = assay_block_row(g->m, g->row_blocks, end) * g->l.groups;
    for (int64_t i = first; i < last; i++) {
        p->args.terms[i] = (float)-g->comp[i] * g->scale[i];
        g->comp[i] *= p->args.base;
    }
}

static void multiply_range(void *arg, int64_t begin, int64_t end) {
    const plan *p = arg;
    p->multiply(&p->args, begin, end);
}

static int arrange(plan *p, const assay_wide *w, int64_t m, int a16, int variant, void *workspace, size_t bytes) {
    assay_wide_args *out = &p->args;
    assay_gemm_args *g = &out->gemm;
    memset(p, 0, sizeof *p);
    if (!valid(w, m, &g->l) || (w->bits == 4 && take_codebook(out, w->codebook, a16))) return ASSAY_EINVAL;
    const assay_int4_gemm_kernel *preparing = assay_select(ASSAY_OP_int4_gemm, variant);
    const assay_wide_gemm_kernel *kernel = assay_select(ASSAY_OP_wide_gemm, variant);
    if (!preparing || !kernel) return ASSAY_EISA;
    if (!workspace || bytes < workspace_bytes_of(&g->l, m, a16)) return ASSAY_EWORKSPACE;
    p->prepare = preparing->prepare;
    p->multiply = a16 ? kernel->a16 : kernel->a8;
    const int mr = a16 ? kernel->mr16 : kernel->mr8;
    out->bits = w->bits;
    out->minimum = w->has_minimum != 0;
    out->base = out->plain ? 0 : 128;
    g->packed = w->data;
    g->m = m;
    g->ahead = assay_stream_ahead();
    g->a16 = a16;
    g->center = 1;
    g->row_blocks = (int)((m + mr - 1) / mr);
    uint8_t *at = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    const int64_t terms = assay_round_up(m * g->l.groups * 4, 64);
    g->values = at;
    at += assay_round_up(m * g->l.k_padded * (a16 ? 4 : 1), 64);
    g->scale = (float *)at;
    out->terms = a16 ? g->scale : (float *)(at + 2 * terms);
    g->comp = a16 ? NULL : (int32_t *)(at + terms);
    return ASSAY_OK;
}

/* As in gemm.c: work too small to share, work too small to wake a sleeping thread for. */
enum { PREPARE_ALONE = 65536, WAKE_BYTES = 512 << 10 };

int assay_wide_gemm(const assay_wide *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                    int a16, int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    plan p;
    const int status = arrange(&p, w, m, a16 != 0, variant, workspace, workspace_bytes);
    if (status || !m) return status;
    assay_gemm_args *g = &p.args.gemm;
    const assay_w4_layout *l = &g->l;
    if (!a || a_dtype < ASSAY_F32 || a_dtype > ASSAY_BF16 || lda < l->k || !c || ldc < l->n || num_threads < 0)
        return ASSAY_EINVAL;
    g->a = a;
    g->a_dtype = a_dtype;
    g->lda = lda;
    g->c = c;
    g->ldc = ldc;
    const int wake = l->tiles * l->tile_bytes * ((m + 7) / 8) >= WAKE_BYTES;
    if (num_threads == 1 || m * l->k <= PREPARE_ALONE)
        prepare_range(&p, 0, g->row_blocks);
    else
        assay_parallel_for(prepare_range, &p, g->row_blocks, num_threads, wake);
    return assay_parallel_for(multiply_range, &p, l->tiles, num_threads, wake);
}

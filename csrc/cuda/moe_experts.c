/* The expert layer on a GPU: checks, what lies where in the workspace, and the launches.
 *
 *   align      slots by expert, in blocks of the GEMMs' rows; clears their arrival counters
 *   weigh      weights on the input: a row a slot
 *   quantise   a8: the rows
 *   gate_up    to hidden units, a row a slot
 *   quantise   a8: those
 *   down       to outputs, a row a slot
 *   combine    a token's slots, in order */
#include <math.h>
#include <stdio.h>

#include "assay_cuda.h"

enum { BLOCK_N = 256, QUANTISED_GROUPS = 8, LEAST_CUT = 8, MOST_CUTS = 8, WEIGH_COLUMNS = 1024 };

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

typedef struct {
    assay_cuda_w4 w;
    int64_t expert_bytes, column_blocks, cuts;
} matrix;

typedef struct {
    const assay_experts_args *a;
    int64_t slots, block_m, most, sources, ldh, ldy;
    matrix up, down;
    assay_cuda_align_args align;
    size_t align_bytes;
    /* in the workspace */
    void *cells, *rows, *codes, *code_groups;
    float *y, *partials;
    uint8_t *hidden;
} layer;

static int describe(matrix *m, const void *data, int64_t n, int64_t k, int64_t group, int symmetric) {
    const size_t bytes = assay_cuda_w4_packed_bytes(n, k, group, symmetric);
    if (!bytes) return ASSAY_EINVAL;
    m->w = (assay_cuda_w4){data, (int32_t)n, (int32_t)k, (int32_t)group, symmetric != 0};
    m->expert_bytes = round_up((int64_t)bytes, 16);
    m->column_blocks = ceil_div(n, BLOCK_N);
    return ASSAY_OK;
}

/* How often K is cut: so that the experts of one token fill the device, and by nothing that depends on the batch. */
static int64_t cuts_of(const matrix *m, const assay_experts_args *a, int sms) {
    const int64_t tiles = ceil_div(m->w.k, a->a16 ? 64 : 128), blocks = a->top_k * m->column_blocks;
    int64_t cuts = a->tokens <= ASSAY_CUDA_SPLIT_TOKENS ? 2 * (int64_t)sms / blocks : 1;
    if (cuts > tiles / LEAST_CUT) cuts = tiles / LEAST_CUT;
    if (cuts > MOST_CUTS) cuts = MOST_CUTS;
    return cuts < 1 ? 1 : ceil_div(tiles, ceil_div(tiles, cuts));
}

static int make_plan(layer *p, const assay_experts_args *a) {
    const assay_experts *e = a ? a->experts : NULL;
    if (!e || e->num_experts < 1 || e->num_experts > 1 << 20 || e->hidden < 1 || e->hidden > 1 << 20 || e->intermediate < 1 ||
        e->intermediate > 1 << 20 || e->activation < ASSAY_ACT_SILU || e->activation > ASSAY_ACT_SWIGLU_OAI || a->tokens < 0 ||
        a->top_k < 1 || a->tokens > (1 << 24) / a->top_k || a->map_size < 0 || a->map_size > INT32_MAX)
        return ASSAY_EINVAL;
    p->a = a;
    const int64_t columns = e->gated ? round_up(e->intermediate, 16) * 2 : e->intermediate;
    if (describe(&p->up, e->gate_up, columns, e->hidden, e->gate_up_group, e->gate_up_symmetric) ||
        describe(&p->down, e->down, e->hidden, e->intermediate, e->down_group, e->down_symmetric))
        return ASSAY_EINVAL;
    const assay_cuda_device *device;
    const int status = assay_cuda_here(&device);
    if (status) return status;
    p->up.cuts = cuts_of(&p->up, a, device->sms);
    p->down.cuts = cuts_of(&p->down, a, device->sms);
    p->slots = a->tokens * a->top_k;
    const int64_t rows = p->slots / e->num_experts; /* an expert has, were they even */
    p->block_m = rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
    p->most = assay_cuda_moe_align_most(p->slots, e->num_experts, p->block_m);
    p->sources = a->input_weights ? p->slots : a->tokens;
    p->ldh = round_up(e->intermediate, 8);
    p->ldy = round_up(e->hidden, 4);
    p->align = (assay_cuda_align_args){
        .topk_ids = a->topk_ids,
        .expert_map = a->expert_map,
        .slots = (int32_t)p->slots,
        .num_experts = (int32_t)(a->expert_map ? a->map_size : e->num_experts),
        .num_local = (int32_t)e->num_experts,
        .block_size = (int32_t)p->block_m,
        .num_zeros = p->most / p->block_m * (p->up.column_blocks + p->down.column_blocks),
    };
    p->align_bytes = p->most < 0 ? 0 : assay_cuda_moe_align_workspace(&p->align);
    return p->align_bytes ? ASSAY_OK : ASSAY_EINVAL;
}

static void *cut(uint8_t *base, size_t *used, int64_t bytes) {
    uint8_t *at = base ? base + *used : NULL;
    *used += (size_t)round_up(bytes, 256);
    return at;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Lays the workspace out from `base`; returns its size. What is read once is where what comes after is written. */
static size_t arrange(layer *p, uint8_t *base) {
    const assay_experts_args *a = p->a;
    const assay_experts *e = a->experts;
    size_t used = 0;
    p->align.counts = a->tokens_per_expert;
    int64_t *counts = cut(base, &used, e->num_experts * 8);
    if (!p->align.counts) p->align.counts = counts;
    p->align.offsets = cut(base, &used, (e->num_experts + 1) * 4);
    p->align.sorted_token_ids = cut(base, &used, p->most * 4);
    p->align.expert_ids = cut(base, &used, p->most / p->block_m * 4);
    p->align.position = cut(base, &used, p->slots * 4);
    p->align.num_tokens_post_padded = cut(base, &used, 4);
    p->align.zeros = cut(base, &used, p->align.num_zeros * 4);
    p->cells = cut(base, &used, (int64_t)p->align_bytes);
    p->rows = cut(base, &used, a->input_weights ? p->slots * round_up(e->hidden, 8) * (a->a16 ? 2 : 4) : 0);
    const int64_t up_groups = e->hidden / e->gate_up_group, down_groups = e->intermediate / e->down_group;
    p->codes = cut(base, &used, a->a16 ? 0 : larger(p->sources * round_up(e->hidden, 128), p->slots * round_up(e->intermediate, 128)));
    p->code_groups = cut(base, &used, a->a16 ? 0 : 8 * larger(p->sources * up_groups, p->slots * down_groups));
    p->hidden = cut(base, &used, p->slots * p->ldh * (a->a16 ? 2 : 4));
    p->y = cut(base, &used, p->slots * p->ldy * 4);
    const int64_t up = p->up.cuts > 1 ? p->up.cuts * round_up(p->up.w.n, 32) : 0;
    const int64_t down = p->down.cuts > 1 ? p->down.cuts * round_up(p->down.w.n, 32) : 0;
    p->partials = cut(base, &used, p->slots * larger(up, down) * 4);
    return used;
}

size_t assay_cuda_moe_experts_workspace(const assay_experts_args *args) {
    layer p = {0};
    return make_plan(&p, args) ? 0 : arrange(&p, NULL) + 256;
}

static int quantise(const layer *p, const assay_cuda_w4 *w, const void *rows, int dtype, int64_t ld, int64_t m, void *stream) {
    const assay_a8_quantize_args args = {
        .a = rows,
        .lda = ld,
        .m = (int32_t)m,
        .k = w->k,
        .group_size = w->group_size,
        .a_dtype = dtype,
        .codes = p->codes,
        .groups = p->code_groups,
    };
    const int64_t units = w->group_size >= w->k ? 1 : round_up(w->k, 128) / w->group_size;
    return assay_cuda_launch("assay_a8_quantize", (unsigned)(m * ceil_div(units, QUANTISED_GROUPS)), 1, 1, 0, stream, &args,
                             sizeof args);
}

/* Dynamic shared memory of the tiles of w4_tile.cuh and w4a8_tile.cuh. */
static size_t tile_bytes(const layer *p, int symmetric) {
    const size_t rows = (size_t)p->block_m, zeros = symmetric ? 0 : 32;
    return p->a->a16 ? 4 * (rows * 128 + 8 * 2 * (512 + 64 + zeros)) : 3 * (rows * 128 + 8 * 4 * (512 + 64 + zeros));
}

/* One of the GEMMs: m's weights times rows a. */
static int multiply(const layer *p, const matrix *m, const void *a, int64_t lda, int64_t slots_a_row, int down, void *stream) {
    const assay_experts *e = p->a->experts;
    assay_cuda_experts_args args = {
        .w = m->w,
        .expert_bytes = m->expert_bytes,
        .a = p->a->a16 ? a : p->codes,
        .a_groups = p->code_groups,
        .lda = lda,
        .aligned = m->w.k % 8 == 0 && lda % 8 == 0 && (uintptr_t)a % 16 == 0,
        .slots = (int32_t)p->slots,
        .slots_a_row = (int32_t)slots_a_row,
        .down = down,
        .sorted_token_ids = p->align.sorted_token_ids,
        .expert_ids = p->align.expert_ids,
        .num_tokens_post_padded = p->align.num_tokens_post_padded,
        .bias = down ? NULL : e->gate_up_bias,
        .intermediate = (int32_t)e->intermediate,
        .gated = e->gated,
        .activation = e->activation,
        .alpha = e->alpha,
        .limit = e->limit > 0 ? e->limit : INFINITY,
        .out = down ? (void *)p->y : (void *)p->hidden,
        .ldo = down ? p->ldy : p->ldh,
        .partials = p->partials,
        .arrivals = p->align.zeros + (down ? p->most / p->block_m * p->up.column_blocks : 0),
    };
    char name[64];
    snprintf(name, sizeof name, "assay_moe_experts_%s_m%d%s",
             !p->a->a16 ? "w4a8" : p->a->dtype == ASSAY_F16 ? "w4a16_f16" : "w4a16_bf16", (int)p->block_m,
             m->w.symmetric ? "" : "z");
    return assay_cuda_launch(name, (unsigned)(p->most / p->block_m), (unsigned)m->column_blocks, (unsigned)m->cuts,
                             tile_bytes(p, m->w.symmetric), stream, &args, sizeof args);
}

static int combine(const layer *p, void *stream) {
    const assay_experts_args *a = p->a;
    const assay_cuda_combine_args args = {
        .y = p->y,
        .ldy = p->ldy,
        .n = a->experts->hidden,
        .position = p->align.position,
        .by_slot = 1,
        .topk_weights = a->input_weights ? NULL : a->topk_weights,
        .bias = a->experts->down_bias,
        .expert_ids = p->align.expert_ids,
        .block_size = p->block_m,
        .tokens = a->tokens,
        .top_k = a->top_k,
        .out = a->out,
        .ldo = a->ldo,
    };
    return assay_cuda_moe_combine(&args, stream);
}

static int valid(const assay_experts_args *a) {
    const assay_experts *e = a->experts;
    return e->gate_up && e->down && (uintptr_t)e->gate_up % 16 == 0 && (uintptr_t)e->down % 16 == 0 && !a->row_blocks &&
           a->dtype >= ASSAY_F32 && a->dtype <= ASSAY_BF16 && !(a->a16 && a->dtype == ASSAY_F32) && a->ldx >= e->hidden &&
           a->ldo >= e->hidden && (!a->tokens || (a->x && a->out && a->topk_ids && a->topk_weights));
}

int assay_cuda_moe_experts(const assay_experts_args *args, void *workspace, size_t workspace_bytes, void *stream) {
    layer p = {0};
    int status = make_plan(&p, args);
    if (status) return status;
    if (!valid(args)) return ASSAY_EINVAL;
    if (!workspace || workspace_bytes < arrange(&p, NULL) + 256) return ASSAY_EWORKSPACE;
    arrange(&p, (uint8_t *)(((uintptr_t)workspace + 255) & ~(uintptr_t)255));
    status = assay_cuda_moe_align(&p.align, p.cells, p.align_bytes, stream);
    if (status || !args->tokens) return status;

    const assay_experts *e = args->experts;
    const void *rows = args->x;
    int64_t ld = args->ldx;
    int dtype = args->dtype;
    if (args->input_weights) {
        dtype = args->a16 ? dtype : ASSAY_F32;
        ld = round_up(e->hidden, 8);
        const assay_cuda_weigh_args weigh = {args->x, args->ldx, e->hidden, args->top_k, args->topk_weights, p.rows, ld,
                                             args->dtype, dtype};
        status = assay_cuda_launch("assay_moe_weigh", (unsigned)p.slots, (unsigned)ceil_div(e->hidden, WEIGH_COLUMNS), 1, 0,
                                   stream, &weigh, sizeof weigh);
        rows = p.rows;
    }
    if (!status && !args->a16) status = quantise(&p, &p.up.w, rows, dtype, ld, p.sources, stream);
    if (!status) status = multiply(&p, &p.up, rows, ld, args->input_weights ? 1 : args->top_k, 0, stream);
    if (!status && !args->a16) status = quantise(&p, &p.down.w, p.hidden, ASSAY_F32, p.ldh, p.slots, stream);
    if (!status) status = multiply(&p, &p.down, p.hidden, p.ldh, 1, 1, stream);
    return status ? status : combine(&p, stream);
}

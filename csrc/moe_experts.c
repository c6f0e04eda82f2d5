/* The expert layer, the call: slots sorted by expert, activations quantised once a token, both GEMMs over (expert, tile) units,
 * and the sum. The arithmetic is the INT4 GEMM's (int4_gemm) and moe_experts'.
 *
 *   sort      slots by expert, counting sort
 *   prepare   each token's row, as a block of one row
 *   gather    experts of several rows: their rows, interleaved into the GEMM's blocks
 *   gate_up   units (expert, tile): a tile's gates and ups for all of the expert's rows, SLAB rows at a time so that they
 *             stay in L1 until they are activated; the tile comes from DRAM once
 *   prepare   each expert's hidden rows, in blocks
 *   down      units (expert, tile), into a row of its own a slot
 *   combine   a token's slots, in order: no bit depends on which thread did what, nor on the other tokens */
#include "kernels.h"
#include "cpu/float16.h"

#include <string.h>

/* Rows whose tile of outputs lies on a thread's stack: 32 KiB. */
enum { SLAB = 256 };
/* Tiles of an expert that a thread takes at a time. */
enum { CHUNK = 4 };
/* Floats below which one thread does a pass alone, as in gemm.c. */
enum { ALONE = 65536 };
/* Most rows of a GEMM's block, whichever the variant. */
enum { MOST_MR = 32 };

/* Activations of one GEMM, prepared, of `rows` rows in all. */
typedef struct {
    uint8_t *values;
    float *scale;
    int32_t *comp;
} prepared;

typedef struct {
    const assay_experts_args *a;
    const assay_int4_gemm_kernel *gemm, *few_gemm; /* of experts with many rows, and with up to `few` */
    const assay_moe_experts_kernel *kernel;
    assay_gemm_args up, down;          /* what every expert shares */
    size_t up_bytes, down_bytes;       /* of one expert's packed matrix */
    int64_t few;
    int64_t slots, active, blocks, sources;
    int64_t *offsets, *counts, *cursor;/* by expert */
    int32_t *sorted, *position;        /* by sorted row; by slot */
    int32_t *expert_of;                /* by active expert */
    int32_t *block_expert, *block_of;  /* by block: active expert, and which of its blocks */
    prepared tokens, gathered, hidden;
    float *h, *y;                      /* [slots, I], [slots, H] */
} layer;

/* ---- memory ------------------------------------------------------------------------------------------ */

static int layout_of(int64_t n, int64_t k, int64_t group, int symmetric, assay_w4_layout *l) {
    const size_t bytes = assay_w4_packed_bytes(n, k, group, symmetric);
    if (!bytes) return ASSAY_EINVAL;
    l->n = n;
    l->k = k;
    l->group = group;
    l->groups = k / group;
    l->group_padded = assay_round_up(group, 32);
    l->k_padded = l->groups * l->group_padded;
    l->tiles = (n + ASSAY_TILE_N - 1) / ASSAY_TILE_N;
    l->block_bytes = ASSAY_SCALE_BYTES + l->group_padded / 32 * ASSAY_LINES32;
    l->tile_bytes = (int64_t)(bytes / (size_t)l->tiles);
    l->symmetric = symmetric != 0;
    return ASSAY_OK;
}

static int layouts(const assay_experts_args *a, assay_w4_layout *up, assay_w4_layout *down) {
    const assay_experts *e = a->experts;
    if (!e || e->num_experts < 1 || e->num_experts > 1 << 20 || e->hidden < 1 || e->intermediate < 1 ||
        e->activation < ASSAY_ACT_SILU || e->activation > ASSAY_ACT_SWIGLU_OAI || a->tokens < 0 || a->top_k < 1 ||
        a->tokens > (1 << 24) / a->top_k || a->map_size < 0 || a->map_size > INT32_MAX)
        return ASSAY_EINVAL;
    const int64_t n = e->gated ? assay_round_up(e->intermediate, 16) * 2 : e->intermediate;
    if (layout_of(n, e->hidden, e->gate_up_group, e->gate_up_symmetric, up)) return ASSAY_EINVAL;
    return layout_of(e->hidden, e->intermediate, e->down_group, e->down_symmetric, down);
}

/* Cuts `bytes` off the workspace, whose address may be unknown yet. */
static uint8_t *cut(uint8_t *base, size_t *used, int64_t bytes) {
    uint8_t *at = base ? base + *used : NULL;
    *used += (size_t)assay_round_up(bytes, 64);
    return at;
}

static prepared cut_prepared(uint8_t *base, size_t *used, const assay_w4_layout *l, int64_t rows, int a16) {
    prepared p;
    p.values = cut(base, used, rows * l->k_padded * (a16 ? 4 : 1));
    p.scale = (float *)(void *)cut(base, used, rows * l->groups * 4);
    p.comp = (int32_t *)(void *)cut(base, used, a16 ? 0 : rows * l->groups * 4);
    return p;
}

/* Lays the layer's memory out from `base`; returns its size. */
static size_t arrange(layer *p, const assay_experts_args *a, uint8_t *base) {
    const int64_t experts = a->experts->num_experts, slots = a->tokens * a->top_k;
    size_t used = 0;
    p->slots = slots;
    p->sources = a->input_weights ? slots : a->tokens;
    p->offsets = (int64_t *)(void *)cut(base, &used, (experts + 1) * 8);
    p->counts = (int64_t *)(void *)cut(base, &used, experts * 8);
    p->cursor = (int64_t *)(void *)cut(base, &used, experts * 8);
    p->sorted = (int32_t *)(void *)cut(base, &used, slots * 4);
    p->position = (int32_t *)(void *)cut(base, &used, slots * 4);
    p->expert_of = (int32_t *)(void *)cut(base, &used, experts * 4);
    p->block_expert = (int32_t *)(void *)cut(base, &used, slots * 4);
    p->block_of = (int32_t *)(void *)cut(base, &used, slots * 4);
    p->tokens = cut_prepared(base, &used, &p->up.l, p->sources, a->a16);
    p->gathered = cut_prepared(base, &used, &p->up.l, slots, a->a16);
    p->hidden = cut_prepared(base, &used, &p->down.l, slots, a->a16);
    p->h = (float *)(void *)cut(base, &used, slots * p->down.l.k * 4);
    p->y = (float *)(void *)cut(base, &used, slots * p->down.l.n * 4);
    return used + 64;
}

size_t assay_moe_experts_workspace(const assay_experts_args *args) {
    layer p = {0};
    if (!args || layouts(args, &p.up.l, &p.down.l)) return 0;
    return arrange(&p, args, NULL);
}

/* ---- passes -------------------------------------------------------------------------------------------- */

/* g's activations at row `row` of p, which has `rows` rows in `blocks` blocks from there. */
static void aim(assay_gemm_args *g, const prepared *p, int64_t row, int64_t rows, int64_t blocks) {
    g->values = p->values + row * g->l.k_padded * (g->a16 ? 4 : 1);
    g->scale = p->scale + row * g->l.groups;
    g->comp = g->a16 ? NULL : p->comp + row * g->l.groups;
    g->m = rows;
    g->row_blocks = (int)blocks;
}

/* The kernel that multiplies an expert's rows. */
static const assay_int4_gemm_kernel *gemm_of(const layer *p, int64_t rows) { return rows <= p->few ? p->few_gemm : p->gemm; }

/* Most rows of one of its blocks. */
static int64_t most_rows(const layer *p, int64_t rows) {
    const assay_int4_gemm_kernel *gemm = gemm_of(p, rows);
    return p->a->a16 ? gemm->mr16 : rows <= gemm->alone8 ? gemm->alone8 : gemm->mr8;
}

static int64_t blocks_of(const layer *p, int64_t rows) { return (rows + most_rows(p, rows) - 1) / most_rows(p, rows); }

/* Row of the prepared tokens that sorted row i multiplies. */
static int64_t source_of(const layer *p, int64_t i) {
    return p->a->input_weights ? p->sorted[i] : p->sorted[i] / p->a->top_k;
}

/* Inputs times their weights, a row a slot, into y, which is not in use yet. */
static void weigh_inputs(void *arg, int64_t begin, int64_t end) {
    const layer *p = arg;
    const assay_experts_args *a = p->a;
    const int64_t n = p->up.l.k;
    for (int64_t s = begin; s < end; s++) {
        const uint8_t *x = (const uint8_t *)a->x + s / a->top_k * a->ldx * (a->dtype == ASSAY_F32 ? 4 : 2);
        for (int64_t i = 0; i < n; i++) p->y[s * n + i] = assay_load_f32(x, a->dtype, i) * a->topk_weights[s];
    }
}

static void prepare_tokens(void *arg, int64_t begin, int64_t end) {
    const layer *p = arg;
    const assay_experts_args *a = p->a;
    assay_gemm_args g = p->up;
    aim(&g, &p->tokens, 0, p->sources, p->sources);
    g.a = a->input_weights ? p->y : a->x;
    g.a_dtype = a->input_weights ? ASSAY_F32 : a->dtype;
    g.lda = a->input_weights ? g.l.k : a->ldx;
    p->few_gemm->prepare(&g, begin, end); /* blocks of one row lie alike in all tiers */
}

static void gather_blocks(void *arg, int64_t begin, int64_t end) {
    const layer *p = arg;
    const assay_w4_layout *l = &p->up.l;
    for (int64_t b = begin; b < end; b++) {
        const int32_t e = p->expert_of[p->block_expert[b]];
        const int64_t rows = p->counts[e];
        if (rows == 1) continue;
        const int64_t from = assay_block_row(rows, blocks_of(p, rows), p->block_of[b]);
        const int64_t n = assay_block_row(rows, blocks_of(p, rows), p->block_of[b] + 1) - from;
        const int64_t row = p->offsets[e] + from, words = p->a->a16 ? l->k_padded : l->k_padded / 4;
        const uint32_t *values[MOST_MR], *scale[MOST_MR], *comp[MOST_MR];
        for (int64_t r = 0; r < n; r++) {
            const int64_t source = source_of(p, row + r);
            values[r] = (const uint32_t *)(const void *)p->tokens.values + source * words;
            scale[r] = (const uint32_t *)(const void *)p->tokens.scale + source * l->groups;
            comp[r] = (const uint32_t *)(const void *)p->tokens.comp + source * l->groups;
        }
        const assay_int4_gemm_kernel *gemm = gemm_of(p, rows);
        const int64_t unit = gemm->unit ? gemm->unit(l) / 4 : 1;
        p->kernel->gather(values, n, words, unit, (uint32_t *)(void *)p->gathered.values + row * words);
        p->kernel->gather(scale, n, l->groups, 1, (uint32_t *)(void *)p->gathered.scale + row * l->groups);
        if (!p->a->a16) p->kernel->gather(comp, n, l->groups, 1, (uint32_t *)(void *)p->gathered.comp + row * l->groups);
    }
}

/* Tiles of an expert that has `rows` rows, of which g may hold a part. */
static void multiply(const layer *p, int64_t rows, const assay_gemm_args *g, int64_t begin, int64_t end) {
    const assay_int4_gemm_kernel *gemm = gemm_of(p, rows);
    (p->a->a16 ? gemm->w4a16 : gemm->w4a8)(g, begin, end);
}

/* Activates a tile of outputs c of `rows` rows, of which row `first` of h is the first. */
static void activate_tile(const layer *p, int32_t e, int64_t tile, const float *c, int64_t ldc, int64_t rows, int64_t first) {
    const assay_experts *x = p->a->experts;
    const assay_activation act = {x->activation, x->gated, x->alpha, x->limit};
    const int64_t units = x->gated ? 16 : 32, width = assay_min_i64(units, x->intermediate - tile * units);
    float last[ASSAY_TILE_N] = {0};
    const float *bias = x->gate_up_bias ? x->gate_up_bias + e * p->up.l.n + tile * ASSAY_TILE_N : NULL;
    if (bias && !x->gated && width < units) {
        memcpy(last, bias, (size_t)width * 4);
        bias = last;
    }
    p->kernel->activate(&act, c, ldc, rows, bias, p->h + first * x->intermediate + tile * units, x->intermediate, width);
}

/* Tiles begin .. end - 1 of an expert's gates and ups, activated, for all its rows. */
static void gate_up_tiles(const layer *p, int32_t e, int64_t begin, int64_t end) {
    const int64_t tiles = p->up.l.tiles, rows = p->counts[e], first = p->offsets[e];
    const int64_t blocks = blocks_of(p, rows), slab = SLAB / most_rows(p, rows);
    /* As many tiles at once as the outputs' place has room for. */
    const int64_t most = assay_min_i64(end - begin, rows < SLAB ? SLAB / rows : 1);
    _Alignas(64) float c[SLAB * ASSAY_TILE_N];
    memset(c, 0, sizeof *c * (size_t)(assay_min_i64(rows, SLAB) * most * ASSAY_TILE_N)); /* columns past N are not written */
    assay_gemm_args g = p->up;
    g.c = c;
    for (int64_t tile = begin; tile < end; tile += most) {
        const int64_t n = assay_min_i64(most, end - tile);
        g.packed = (const uint8_t *)p->a->experts->gate_up + (size_t)e * p->up_bytes + tile * p->up.l.tile_bytes;
        g.l.n = p->up.l.n - tile * ASSAY_TILE_N;
        g.ldc = n * ASSAY_TILE_N;
        if (g.l.n > g.ldc) g.l.n = g.ldc;
        for (int64_t b = 0; b < blocks; b += slab) {
            const int64_t last = assay_min_i64(b + slab, blocks);
            const int64_t from = assay_block_row(rows, blocks, b), to = assay_block_row(rows, blocks, last);
            if (rows == 1) aim(&g, &p->tokens, source_of(p, first), 1, 1);
            else aim(&g, &p->gathered, first + from, to - from, last - b);
            /* The kernel asks for the tile behind the last one: once, with the last of its rows. */
            g.l.tiles = last == blocks ? tiles - tile : n;
            multiply(p, rows, &g, 0, n);
            for (int64_t t = 0; t < n; t++)
                activate_tile(p, e, tile + t, c + t * ASSAY_TILE_N, g.ldc, to - from, first + from);
        }
    }
}

static int64_t chunks_of(int64_t tiles) { return (tiles + CHUNK - 1) / CHUNK; }

/* Unit u of an expert's tiles in chunks: its expert, and its tiles. */
static int32_t chunk_of(const layer *p, int64_t tiles, int64_t u, int64_t *begin, int64_t *end) {
    const int64_t chunks = chunks_of(tiles);
    *begin = u % chunks * CHUNK;
    *end = assay_min_i64(*begin + CHUNK, tiles);
    return p->expert_of[u / chunks];
}

static void gate_up_units(void *arg, int64_t begin, int64_t end) {
    const layer *p = arg;
    for (int64_t u = begin; u < end; u++) {
        int64_t from, to;
        const int32_t e = chunk_of(p, p->up.l.tiles, u, &from, &to);
        gate_up_tiles(p, e, from, to);
    }
}

/* Prepares hidden rows, a block of an expert's a unit. */
static void prepare_hidden(void *arg, int64_t begin, int64_t end) {
    const layer *p = arg;
    for (int64_t b = begin; b < end; b++) {
        const int32_t e = p->expert_of[p->block_expert[b]];
        assay_gemm_args g = p->down;
        aim(&g, &p->hidden, p->offsets[e], p->counts[e], blocks_of(p, p->counts[e]));
        g.a = p->h + p->offsets[e] * g.l.k;
        g.a_dtype = ASSAY_F32;
        g.lda = g.l.k;
        gemm_of(p, p->counts[e])->prepare(&g, p->block_of[b], p->block_of[b] + 1);
    }
}

static void down_units(void *arg, int64_t begin, int64_t end) {
    const layer *p = arg;
    for (int64_t u = begin; u < end; u++) {
        int64_t from, to;
        const int32_t e = chunk_of(p, p->down.l.tiles, u, &from, &to);
        assay_gemm_args g = p->down;
        aim(&g, &p->hidden, p->offsets[e], p->counts[e], blocks_of(p, p->counts[e]));
        g.packed = (const uint8_t *)p->a->experts->down + (size_t)e * p->down_bytes;
        g.c = p->y + p->offsets[e] * g.l.n;
        g.ldc = g.l.n;
        multiply(p, p->counts[e], &g, from, to);
    }
}

static int64_t expert_of_row(const layer *p, int64_t slot) {
    const int32_t id = p->a->topk_ids[slot];
    return p->a->expert_map ? p->a->expert_map[id] : id;
}

static void combine_tokens(void *arg, int64_t begin, int64_t end) {
    const layer *p = arg;
    const assay_experts_args *a = p->a;
    const int64_t n = p->down.l.n;
    const float *bias = a->experts->down_bias;
    for (int64_t t = begin; t < end; t++) {
        float *out = a->out + t * a->ldo;
        int more = 0;
        for (int64_t s = t * a->top_k; s < (t + 1) * a->top_k; s++) {
            if (p->position[s] < 0) continue;
            p->kernel->combine(out, p->y + p->position[s] * n, bias ? bias + expert_of_row(p, s) * n : NULL,
                               a->input_weights ? 1.0f : a->topk_weights[s], more, n);
            more = 1;
        }
        if (!more) memset(out, 0, (size_t)n * sizeof *out);
    }
}

/* ---- the call ------------------------------------------------------------------------------------------ */

static int sort_slots(layer *p) {
    const assay_experts_args *a = p->a;
    const int64_t experts = a->experts->num_experts;
    const int64_t ids = a->expert_map ? a->map_size : experts;
    int64_t room = 0;
    if (!ids) return ASSAY_EINVAL;
    int status = assay_moe_offsets(a->topk_ids, p->slots, ids, a->expert_map, experts, 1, p->offsets, p->counts);
    if (!status)
        status = assay_moe_sort(a->topk_ids, p->slots, ids, a->expert_map, experts, 1, p->offsets, p->cursor, p->sorted,
                                NULL, p->position);
    if (status) return status;
    for (int64_t e = 0; e < experts; e++) {
        if (!p->counts[e]) continue;
        room += blocks_of(p, p->counts[e]) * most_rows(p, p->counts[e]);
        for (int64_t b = 0; b < blocks_of(p, p->counts[e]); b++, p->blocks++) {
            p->block_expert[p->blocks] = (int32_t)p->active;
            p->block_of[p->blocks] = (int32_t)b;
        }
        p->expert_of[p->active++] = (int32_t)e;
    }
    if (a->tokens_per_expert) memcpy(a->tokens_per_expert, p->counts, (size_t)experts * 8);
    if (a->row_blocks) {
        a->row_blocks[0] = p->blocks;
        a->row_blocks[1] = room;
    }
    return ASSAY_OK;
}

/* Runs a pass whose work is some `floats`: alone when that is little. */
static void pass(assay_range_fn fn, layer *p, int64_t units, int64_t floats, int num_threads) {
    assay_parallel_for(fn, p, units, floats <= ALONE ? 1 : num_threads, 1);
}

/* The GEMM of the same tier as moe_experts'. Both of an expert's matrices go by the kernel of many rows or neither. */
static int select_kernels(layer *p, int variant) {
    p->kernel = assay_select(ASSAY_OP_moe_experts, variant);
    for (int isa = 0; p->kernel && isa < ASSAY_ISA_COUNT; isa++)
        if (assay_select(ASSAY_OP_moe_experts, isa) == p->kernel) p->gemm = assay_select(ASSAY_OP_int4_gemm, isa);
    if (!p->gemm) return ASSAY_EISA;
    p->few_gemm = p->gemm->fewer ? p->gemm->fewer : p->gemm;
    if (p->a->a16) p->gemm = p->few_gemm;
    if (p->gemm != p->few_gemm) {
        const int64_t up = p->gemm->few(&p->up.l), down = p->gemm->few(&p->down.l);
        p->few = up > down ? up : down;
    }
    return ASSAY_OK;
}

int assay_moe_experts(const assay_experts_args *args, int variant, int num_threads, void *workspace,
                      size_t workspace_bytes) {
    layer p = {.a = args};
    if (!args || num_threads < 0 || layouts(args, &p.up.l, &p.down.l)) return ASSAY_EINVAL;
    const assay_experts *e = args->experts;
    if (select_kernels(&p, variant)) return ASSAY_EISA;
    if (!e->gate_up || !e->down || args->dtype < ASSAY_F32 || args->dtype > ASSAY_BF16 || args->ldx < e->hidden ||
        args->ldo < e->hidden || (args->tokens && (!args->x || !args->out || !args->topk_ids || !args->topk_weights)))
        return ASSAY_EINVAL;
    if (!workspace || workspace_bytes < arrange(&p, args, NULL)) return ASSAY_EWORKSPACE;
    arrange(&p, args, (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63));
    p.up_bytes = (size_t)(p.up.l.tiles * p.up.l.tile_bytes);
    p.down_bytes = (size_t)(p.down.l.tiles * p.down.l.tile_bytes);
    p.up.a16 = p.down.a16 = args->a16;
    p.up.ahead = p.down.ahead = assay_stream_ahead();
    p.up.center = p.up.l.symmetric ? 8 : 1;
    p.down.center = p.down.l.symmetric ? 8 : 1;
    const int status = sort_slots(&p);
    if (status || !args->tokens) return status;

    const int64_t hidden = e->hidden, rows = p.slots;
    if (p.active) {
        if (args->input_weights) pass(weigh_inputs, &p, p.slots, rows * hidden, num_threads);
        pass(prepare_tokens, &p, p.sources, p.sources * hidden, num_threads);
        if (p.offsets[e->num_experts] > p.active) pass(gather_blocks, &p, p.blocks, rows * hidden, num_threads);
        assay_parallel_for(gate_up_units, &p, p.active * chunks_of(p.up.l.tiles), num_threads, 1);
        pass(prepare_hidden, &p, p.blocks, rows * e->intermediate, num_threads);
        assay_parallel_for(down_units, &p, p.active * chunks_of(p.down.l.tiles), num_threads, 1);
    }
    pass(combine_tokens, &p, args->tokens, rows * hidden, num_threads);
    return ASSAY_OK;
}

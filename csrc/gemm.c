/* INT4 and int8 GEMM: the packed layouts, packing, and the calls. Which rows go together, which thread takes which tile,
 * and when the activations are prepared is decided here; the arithmetic is the variants'. */
#include "kernels.h"
#include "lanes.h"

#include <string.h>

/* ---- layout ---------------------------------------------------------------------------------------- */

/* `lines32` is the size of 32 k of a tile: it tells INT4 from int8. The bounds keep every product below 2^63 and a row's
 * integer dot product below 2^31. */
static int layout_of(int64_t n, int64_t k, int64_t group_size, int symmetric, int64_t lines32, assay_w4_layout *l) {
    const int64_t longest = lines32 == ASSAY_LINES32 ? (int64_t)1 << 20 : (int64_t)1 << 17;
    if (n < 1 || k < 1 || n > (int64_t)1 << 28 || k > longest) return ASSAY_EINVAL;
    int fixed = group_size == 32 || group_size == 64 || group_size == 128;
    if (!(fixed && k % group_size == 0) && group_size != k) return ASSAY_EINVAL;
    l->n = n;
    l->k = k;
    l->group = group_size;
    l->groups = k / group_size;
    l->group_padded = assay_round_up(group_size, 32);
    l->k_padded = l->groups * l->group_padded;
    l->tiles = (n + ASSAY_TILE_N - 1) / ASSAY_TILE_N;
    l->block_bytes = ASSAY_SCALE_BYTES + l->group_padded / 32 * lines32;
    l->tile_bytes = l->groups * l->block_bytes + (symmetric ? 0 : (l->groups + 3) / 4 * ASSAY_ZERO_BYTES);
    l->symmetric = symmetric != 0;
    return ASSAY_OK;
}

static int layout4(int64_t n, int64_t k, int64_t group_size, int symmetric, assay_w4_layout *l) {
    return layout_of(n, k, group_size, symmetric, ASSAY_LINES32, l);
}

static int layout8(int64_t n, int64_t k, int64_t group_size, assay_w4_layout *l) {
    return layout_of(n, k, group_size, 1, ASSAY_BYTE_LINES32, l);
}

size_t assay_w4_packed_bytes(int64_t n, int64_t k, int64_t group_size, int symmetric) {
    assay_w4_layout l;
    return layout4(n, k, group_size, symmetric, &l) ? 0 : (size_t)(l.tiles * l.tile_bytes);
}

size_t assay_w8_packed_bytes(int64_t n, int64_t k, int64_t group_size) {
    assay_w4_layout l;
    return layout8(n, k, group_size, &l) ? 0 : (size_t)(l.tiles * l.tile_bytes);
}

/* ---- packing --------------------------------------------------------------------------------------- */

typedef struct {
    assay_w4_layout l;
    const uint8_t *qweight, *zeros;
    const uint16_t *scales;
    uint8_t *packed;
} pack_args;

static void pack_tiles(void *arg, int64_t begin, int64_t end) {
    const pack_args *p = arg;
    const assay_w4_layout *l = &p->l;
    const int64_t row_bytes = (l->k + 1) / 2;
    for (int64_t t = begin; t < end; t++) {
        uint8_t *tile = p->packed + t * l->tile_bytes;
        const int64_t n0 = t * ASSAY_TILE_N, cols = assay_min_i64(ASSAY_TILE_N, l->n - n0);
        if (!l->symmetric)
            for (int64_t sb = 0; sb < (l->groups + 3) / 4; sb++)
                memset(tile + assay_w4_zero_offset(l, sb * 4), 0, ASSAY_ZERO_BYTES);
        for (int64_t g = 0; g < l->groups; g++) {
            uint8_t *block = tile + assay_w4_block_offset(l, g);
            uint8_t *lines = block + ASSAY_SCALE_BYTES;
            for (int64_t j = 0; j < ASSAY_TILE_N; j++) {
                uint16_t s = j < cols ? p->scales[(n0 + j) * l->groups + g] : 0;
                memcpy(block + 2 * j, &s, 2);
                if (!l->symmetric && j < cols) {
                    uint8_t z = p->zeros[(n0 + j) * l->groups + g];
                    tile[assay_w4_zero_offset(l, g) + j % 16] |= (uint8_t)(j < 16 ? z : z << 4);
                }
            }
            for (int64_t j = 0; j < ASSAY_TILE_N; j++) {
                uint8_t *dst = lines + j / 16 * 64 + j % 16 * 4;
                const uint8_t *src = j < cols ? p->qweight + (n0 + j) * row_bytes + g * l->group / 2 : NULL;
                for (int64_t step = 0; step < l->group_padded / 8; step++, dst += 128) {
                    const uint32_t word = src ? assay_lane_of_nibbles(src + step * 4, l->group - step * 8) : 0;
                    memcpy(dst, &word, 4);
                }
            }
        }
    }
}

int assay_w4_pack(int64_t n, int64_t k, int64_t group_size, const uint8_t *qweight, const uint16_t *scales,
                  const uint8_t *zeros, void *packed, int num_threads) {
    pack_args p = {.qweight = qweight, .zeros = zeros, .scales = scales, .packed = packed};
    if (!qweight || !scales || !packed || layout4(n, k, group_size, !zeros, &p.l)) return ASSAY_EINVAL;
    if (zeros)
        for (int64_t i = 0; i < n * p.l.groups; i++)
            if (zeros[i] > 15) return ASSAY_EINVAL;
    return assay_parallel_for(pack_tiles, &p, p.l.tiles, num_threads, 1);
}

int assay_w4_unpack(const assay_w4 *w, uint8_t *qweight, uint16_t *scales, uint8_t *zeros) {
    assay_w4_layout l;
    if (!w || !w->data || layout4(w->n, w->k, w->group_size, w->symmetric, &l) || (!l.symmetric && !zeros))
        return ASSAY_EINVAL;
    const int64_t row_bytes = (l.k + 1) / 2;
    memset(qweight, 0, (size_t)(l.n * row_bytes));
    for (int64_t n = 0; n < l.n; n++) {
        const uint8_t *tile = (const uint8_t *)w->data + n / ASSAY_TILE_N * l.tile_bytes;
        const int64_t j = n % ASSAY_TILE_N;
        for (int64_t g = 0; g < l.groups; g++) {
            const uint8_t *block = tile + assay_w4_block_offset(&l, g);
            memcpy(&scales[n * l.groups + g], block + 2 * j, 2);
            if (!l.symmetric) {
                uint8_t z = tile[assay_w4_zero_offset(&l, g) + j % 16];
                zeros[n * l.groups + g] = j < 16 ? z & 15 : z >> 4;
            }
            for (int64_t i = 0; i < l.group; i++) {
                uint8_t byte = block[ASSAY_SCALE_BYTES + i / 8 * 128 + j / 16 * 64 + j % 16 * 4 + i % 4];
                uint8_t q = i % 8 < 4 ? byte & 15 : byte >> 4;
                const int64_t at = g * l.group + i;
                qweight[n * row_bytes + at / 2] |= (uint8_t)(at % 2 ? q << 4 : q);
            }
        }
    }
    return ASSAY_OK;
}

typedef struct {
    assay_w4_layout l;
    const int8_t *qweight;
    const uint16_t *scales;
    uint8_t *packed;
} pack8_args;

static void pack8_tiles(void *arg, int64_t begin, int64_t end) {
    const pack8_args *p = arg;
    const assay_w4_layout *l = &p->l;
    for (int64_t t = begin; t < end; t++) {
        const int64_t n0 = t * ASSAY_TILE_N, cols = assay_min_i64(ASSAY_TILE_N, l->n - n0);
        for (int64_t g = 0; g < l->groups; g++) {
            uint8_t *block = p->packed + t * l->tile_bytes + assay_w4_block_offset(l, g);
            for (int64_t j = 0; j < ASSAY_TILE_N; j++) {
                const uint16_t s = j < cols ? p->scales[(n0 + j) * l->groups + g] : 0;
                memcpy(block + 2 * j, &s, 2);
                uint8_t *dst = block + ASSAY_SCALE_BYTES + j / 16 * 64 + j % 16 * 4;
                const int8_t *src = j < cols ? p->qweight + (n0 + j) * l->k + g * l->group : NULL;
                int64_t i = 0;
                for (; src && i + 8 <= l->group; i += 8, dst += 256) {
                    uint64_t eight;
                    memcpy(&eight, src + i, 8);
                    eight ^= 0x8080808080808080; /* q + 128, two lanes' worth */
                    memcpy(dst, &eight, 4);
                    memcpy(dst + 128, (const uint8_t *)&eight + 4, 4);
                }
                for (; i < l->group_padded; i += 4, dst += 128) {
                    const uint32_t four = src ? assay_lane_of_bytes(src + i, l->group - i) : 0x80808080;
                    memcpy(dst, &four, 4);
                }
            }
        }
    }
}

int assay_w8_pack(int64_t n, int64_t k, int64_t group_size, const int8_t *qweight, const uint16_t *scales, void *packed,
                  int num_threads) {
    pack8_args p = {.qweight = qweight, .scales = scales, .packed = packed};
    if (!qweight || !scales || !packed || layout8(n, k, group_size, &p.l)) return ASSAY_EINVAL;
    return assay_parallel_for(pack8_tiles, &p, p.l.tiles, num_threads, 1);
}

int assay_w8_unpack(const assay_w8 *w, int8_t *qweight, uint16_t *scales) {
    assay_w4_layout l;
    if (!w || !w->data || layout8(w->n, w->k, w->group_size, &l)) return ASSAY_EINVAL;
    for (int64_t n = 0; n < l.n; n++) {
        const int64_t j = n % ASSAY_TILE_N;
        for (int64_t g = 0; g < l.groups; g++) {
            const uint8_t *block =
                (const uint8_t *)w->data + n / ASSAY_TILE_N * l.tile_bytes + assay_w4_block_offset(&l, g);
            memcpy(&scales[n * l.groups + g], block + 2 * j, 2);
            const uint8_t *lane = block + ASSAY_SCALE_BYTES + j / 16 * 64 + j % 16 * 4;
            for (int64_t i = 0; i < l.group; i++)
                qweight[n * l.k + g * l.group + i] = (int8_t)(lane[i / 4 * 128 + i % 4] - 128);
        }
    }
    return ASSAY_OK;
}

/* ---- the calls ----------------------------------------------------------------------------------------- */

/* What is multiplied: int8 activations by INT4, activations as they are by INT4, int8 by int8. */
enum kind { W4A8, W4A16, W8A8 };

typedef struct {
    enum kind kind;
    int64_t n, k, group_size;
    int symmetric;
    const void *data;
} weights;

static weights of4(const assay_w4 *w, int a16) {
    if (!w) return (weights){0};
    return (weights){a16 ? W4A16 : W4A8, w->n, w->k, w->group_size, w->symmetric, w->data};
}

static weights of8(const assay_w8 *w) {
    if (!w) return (weights){0};
    return (weights){W8A8, w->n, w->k, w->group_size, 1, w->data};
}

static size_t workspace_bytes_of(const assay_w4_layout *l, int64_t m, int a16) {
    size_t values = (size_t)assay_round_up(m * l->k_padded * (a16 ? 4 : 1), 64);
    size_t terms = (size_t)assay_round_up(m * l->groups * 4, 64);
    return values + (a16 ? terms : 2 * terms) + 64;
}

static int valid(const weights *w, int64_t m, assay_w4_layout *l) {
    return w->data && m >= 0 && m <= (int64_t)1 << 24 &&
           !layout_of(w->n, w->k, w->group_size, w->symmetric, w->kind == W8A8 ? ASSAY_BYTE_LINES32 : ASSAY_LINES32, l);
}

static size_t workspace_of(weights w, int64_t m) {
    assay_w4_layout l;
    return valid(&w, m, &l) ? workspace_bytes_of(&l, m, w.kind == W4A16) : 0;
}

size_t assay_w4_gemm_workspace(const assay_w4 *w, int64_t m, int a16) { return workspace_of(of4(w, a16), m); }
size_t assay_w8_gemm_workspace(const assay_w8 *w, int64_t m) { return workspace_of(of8(w), m); }

typedef void (*range_fn)(const assay_gemm_args *, int64_t, int64_t);

typedef struct {
    assay_gemm_args args;
    range_fn prepare, multiply;
    int64_t together;  /* tiles that a thread takes at a time */
} plan;

/* Fills the arguments that both phases share; the workspace is cut the same way each time. */
static int arrange(plan *out, weights w, int64_t m, int a_dtype, int variant, void *workspace, size_t bytes) {
    assay_gemm_args *g = &out->args;
    const int a16 = w.kind == W4A16;
    memset(out, 0, sizeof *out);
    if (!valid(&w, m, &g->l)) return ASSAY_EINVAL;
    const assay_int4_gemm_kernel *kernel = assay_select(ASSAY_OP_int4_gemm, variant);
    const assay_int8_gemm_kernel *kernel8 = assay_select(ASSAY_OP_int8_gemm, variant);
    if (!kernel || (w.kind == W8A8 && !kernel8)) return ASSAY_EISA;
    if (!workspace || bytes < workspace_bytes_of(&g->l, m, a16)) return ASSAY_EWORKSPACE;
    out->prepare = kernel->prepare;
    out->multiply = w.kind == W8A8 ? kernel8->w8a8 : a16 ? kernel->w4a16 : kernel->w4a8;
    g->pairs = a16 && a_dtype == ASSAY_BF16 && kernel->mr_pairs;
    const int mr16 = g->pairs ? kernel->mr_pairs : kernel->mr16;
    const int mr = w.kind == W8A8 ? kernel8->mr8 : a16 ? mr16 : kernel->mr8;
    const int alone = w.kind == W8A8 ? kernel8->alone8 : a16 ? mr : kernel->alone8;
    uint8_t *at = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    g->packed = w.data;
    g->m = m;
    g->ahead = assay_stream_ahead();
    g->a16 = a16;
    g->center = w.kind == W8A8 ? 128 : w.symmetric ? 8 : 1;
    g->row_blocks = m <= alone ? 1 : (int)((m + mr - 1) / mr);
    g->values = at;
    at += assay_round_up(m * g->l.k_padded * (a16 ? 4 : 1), 64);
    g->scale = (float *)at;
    at += assay_round_up(m * g->l.groups * 4, 64);
    g->comp = a16 ? NULL : (int32_t *)at;
    return ASSAY_OK;
}

static int take_input(plan *p, const void *a, int a_dtype, int64_t lda) {
    if (!a || a_dtype < ASSAY_F32 || a_dtype > ASSAY_BF16 || lda < p->args.l.k) return ASSAY_EINVAL;
    p->args.a = a;
    p->args.a_dtype = a_dtype;
    p->args.lda = lda;
    return ASSAY_OK;
}

static int take_output(plan *p, float *c, int64_t ldc) {
    if (!c || ldc < p->args.l.n) return ASSAY_EINVAL;
    p->args.c = c;
    p->args.ldc = ldc;
    return ASSAY_OK;
}

static void prepare_range(void *arg, int64_t begin, int64_t end) {
    const plan *p = arg;
    p->prepare(&p->args, begin, end);
}

static void multiply_range(void *arg, int64_t begin, int64_t end) {
    const plan *p = arg;
    p->multiply(&p->args, begin * p->together, assay_min_i64(end * p->together, p->args.l.tiles));
}

/* Below this many activations one thread prepares them all: it takes a few microseconds, and a dispatch more. */
enum { PREPARE_ALONE = 65536 };
/* Below this much work a sleeping worker is left asleep: waking it takes longer. */
enum { WAKE_BYTES = 512 << 10 };
/* From so many rows on, a thread takes up to eight tiles at a time, where that leaves it eight times to take some: kernels read
 * activations that L2 does not hold once for all of them. */
enum { MANY_ROWS = 257, MOST_TOGETHER = 8, TIMES = 8 };

static int64_t tiles_together(const plan *p, int num_threads) {
    if (p->args.m < MANY_ROWS) return 1;
    const int64_t most = p->args.l.tiles / (TIMES * (num_threads ? num_threads : assay_num_threads()));
    return most < 1 ? 1 : assay_min_i64(most, MOST_TOGETHER);
}

static int gemm(weights w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc, int variant,
                int num_threads, void *workspace, size_t workspace_bytes) {
    plan p;
    int status = arrange(&p, w, m, a_dtype, variant, workspace, workspace_bytes);
    if (status || !m) return status;
    if (take_input(&p, a, a_dtype, lda) || take_output(&p, c, ldc) || num_threads < 0) return ASSAY_EINVAL;
    const assay_w4_layout *l = &p.args.l;
    const int wake = l->tiles * l->tile_bytes * ((m + 7) / 8) >= WAKE_BYTES;
    if (num_threads == 1 || m * l->k <= PREPARE_ALONE)
        prepare_range(&p, 0, p.args.row_blocks);
    else
        assay_parallel_for(prepare_range, &p, p.args.row_blocks, num_threads, wake);
    p.together = tiles_together(&p, num_threads);
    return assay_parallel_for(multiply_range, &p, (l->tiles + p.together - 1) / p.together, num_threads, wake);
}

int assay_w4a8_gemm(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                    int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    return gemm(of4(w, 0), a, a_dtype, lda, m, c, ldc, variant, num_threads, workspace, workspace_bytes);
}

int assay_w4a16_gemm(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                     int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    return gemm(of4(w, 1), a, a_dtype, lda, m, c, ldc, variant, num_threads, workspace, workspace_bytes);
}

int assay_w8a8_gemm(const assay_w8 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                    int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    return gemm(of8(w), a, a_dtype, lda, m, c, ldc, variant, num_threads, workspace, workspace_bytes);
}

int assay_w4_gemm_prepare(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, int a16, int variant,
                          int ith, int nth, void *workspace, size_t workspace_bytes) {
    plan p;
    if (nth < 1 || ith < 0 || ith >= nth) return ASSAY_EINVAL;
    int status = arrange(&p, of4(w, a16), m, a_dtype, variant, workspace, workspace_bytes);
    if (status || !m) return status;
    if (take_input(&p, a, a_dtype, lda)) return ASSAY_EINVAL;
    prepare_range(&p, (int64_t)p.args.row_blocks * ith / nth, (int64_t)p.args.row_blocks * (ith + 1) / nth);
    return ASSAY_OK;
}

int assay_w4_gemm_run(const assay_w4 *w, int a_dtype, int64_t m, float *c, int64_t ldc, int a16, int variant, int ith,
                      int nth, void *workspace, size_t workspace_bytes) {
    plan p;
    if (nth < 1 || ith < 0 || ith >= nth || a_dtype < ASSAY_F32 || a_dtype > ASSAY_BF16) return ASSAY_EINVAL;
    int status = arrange(&p, of4(w, a16), m, a_dtype, variant, workspace, workspace_bytes);
    if (status || !m) return status;
    if (take_output(&p, c, ldc)) return ASSAY_EINVAL;
    p.multiply(&p.args, p.args.l.tiles * ith / nth, p.args.l.tiles * (ith + 1) / nth);
    return ASSAY_OK;
}

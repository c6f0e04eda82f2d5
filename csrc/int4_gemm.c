/* INT4 GEMM: the packed layout, packing, and the two calls. Which rows go together, which thread takes which tile,
 * and when the activations are prepared is decided here; the arithmetic is the variants'. */
#include "kernels.h"

#include <string.h>

/* ---- layout ---------------------------------------------------------------------------------------- */

int assay_w4_layout_of(int64_t n, int64_t k, int64_t group_size, int symmetric, assay_w4_layout *l) {
    /* The bound keeps every product below 2^63 and a row's integer dot product below 2^31. */
    if (n < 1 || k < 1 || n > (int64_t)1 << 28 || k > (int64_t)1 << 20) return ASSAY_EINVAL;
    int fixed = group_size == 32 || group_size == 64 || group_size == 128;
    if (!(fixed && k % group_size == 0) && group_size != k) return ASSAY_EINVAL;
    l->n = n;
    l->k = k;
    l->group = group_size;
    l->groups = k / group_size;
    l->group_padded = assay_round_up(group_size, 32);
    l->k_padded = l->groups * l->group_padded;
    l->tiles = (n + ASSAY_TILE_N - 1) / ASSAY_TILE_N;
    l->block_bytes = ASSAY_SCALE_BYTES + l->group_padded / 32 * ASSAY_LINES32;
    l->tile_bytes = l->groups * l->block_bytes + (symmetric ? 0 : (l->groups + 3) / 4 * ASSAY_ZERO_BYTES);
    l->symmetric = symmetric != 0;
    return ASSAY_OK;
}

size_t assay_w4_packed_bytes(int64_t n, int64_t k, int64_t group_size, int symmetric) {
    assay_w4_layout l;
    return assay_w4_layout_of(n, k, group_size, symmetric, &l) ? 0 : (size_t)(l.tiles * l.tile_bytes);
}

/* ---- packing --------------------------------------------------------------------------------------- */

typedef struct {
    assay_w4_layout l;
    const uint8_t *qweight, *zeros;
    const uint16_t *scales;
    uint8_t *packed;
} pack_args;

/* One column's 8 weights (4 bytes of the source, even k low) as the 4 bytes of its lane: k+b low, k+4+b high. */
static inline uint32_t lane_of(uint32_t source) {
    uint32_t even = source & 0x0f0f0f0f, odd = source >> 4 & 0x0f0f0f0f; /* q0 q2 q4 q6, q1 q3 q5 q7 */
    uint32_t low = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
    uint32_t high = (even >> 16 & 0xff) | (odd >> 16 & 0xff) << 8 | (even >> 24) << 16 | (odd >> 24) << 24;
    return low | high << 4;
}

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
                    uint32_t word = 0;
                    if (src) {
                        int64_t left = l->group - step * 8;
                        if (left >= 8) {
                            memcpy(&word, src + step * 4, 4);
                        } else if (left > 0) {
                            memcpy(&word, src + step * 4, (size_t)((left + 1) / 2));
                            word &= ((uint32_t)1 << 4 * left) - 1; /* an odd K leaves a nibble that is nobody's */
                        }
                    }
                    word = lane_of(word);
                    memcpy(dst, &word, 4);
                }
            }
        }
    }
}

int assay_w4_pack(int64_t n, int64_t k, int64_t group_size, const uint8_t *qweight, const uint16_t *scales,
                  const uint8_t *zeros, void *packed, int num_threads) {
    pack_args p = {.qweight = qweight, .zeros = zeros, .scales = scales, .packed = packed};
    if (!qweight || !scales || !packed || assay_w4_layout_of(n, k, group_size, !zeros, &p.l)) return ASSAY_EINVAL;
    if (zeros)
        for (int64_t i = 0; i < n * p.l.groups; i++)
            if (zeros[i] > 15) return ASSAY_EINVAL;
    return assay_parallel_for(pack_tiles, &p, p.l.tiles, num_threads, 1);
}

int assay_w4_unpack(const assay_w4 *w, uint8_t *qweight, uint16_t *scales, uint8_t *zeros) {
    assay_w4_layout l;
    if (!w || !w->data || assay_w4_layout_of(w->n, w->k, w->group_size, w->symmetric, &l) || (!l.symmetric && !zeros))
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

/* ---- the calls ----------------------------------------------------------------------------------------- */

static size_t workspace_bytes_of(const assay_w4_layout *l, int64_t m, int a16) {
    size_t values = (size_t)assay_round_up(m * l->k_padded * (a16 ? 4 : 1), 64);
    size_t terms = (size_t)assay_round_up(m * l->groups * 4, 64);
    return values + (a16 ? terms : 2 * terms) + 64;
}

static int valid(const assay_w4 *w, int64_t m, assay_w4_layout *l) {
    return w && w->data && m >= 0 && m <= (int64_t)1 << 24 &&
           !assay_w4_layout_of(w->n, w->k, w->group_size, w->symmetric, l);
}

size_t assay_w4_gemm_workspace(const assay_w4 *w, int64_t m, int a16) {
    assay_w4_layout l;
    return valid(w, m, &l) ? workspace_bytes_of(&l, m, a16) : 0;
}

/* Fills the arguments that both phases share; the workspace is cut the same way each time. */
static int arrange(assay_gemm_args *g, const assay_int4_gemm_kernel **kernel, const assay_w4 *w, int64_t m, int a16,
                   int variant, void *workspace, size_t bytes) {
    memset(g, 0, sizeof *g);
    if (!valid(w, m, &g->l)) return ASSAY_EINVAL;
    *kernel = assay_select(ASSAY_OP_int4_gemm, variant);
    if (!*kernel) return ASSAY_EISA;
    if (!workspace || bytes < workspace_bytes_of(&g->l, m, a16)) return ASSAY_EWORKSPACE;
    const int mr = a16 ? (*kernel)->mr16 : (*kernel)->mr8;
    uint8_t *at = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    g->packed = w->data;
    g->m = m;
    g->a16 = a16;
    g->row_blocks = (int)((m + mr - 1) / mr);
    g->values = at;
    at += assay_round_up(m * g->l.k_padded * (a16 ? 4 : 1), 64);
    g->scale = (float *)at;
    at += assay_round_up(m * g->l.groups * 4, 64);
    g->comp = a16 ? NULL : (int32_t *)at;
    return ASSAY_OK;
}

typedef struct {
    const assay_gemm_args *args;
    void (*fn)(const assay_gemm_args *, int64_t, int64_t);
} job;

static void run_range(void *arg, int64_t begin, int64_t end) {
    const job *j = arg;
    j->fn(j->args, begin, end);
}

/* Below this many activations one thread prepares them all: it takes a few microseconds, and a dispatch more. */
enum { PREPARE_ALONE = 65536 };
/* Below this much work a sleeping worker is left asleep: waking it takes longer. */
enum { WAKE_BYTES = 512 << 10 };

static int gemm(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc, int a16,
                int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    assay_gemm_args g;
    const assay_int4_gemm_kernel *kernel;
    int status = arrange(&g, &kernel, w, m, a16, variant, workspace, workspace_bytes);
    if (status) return status;
    if (!m) return ASSAY_OK;
    if (!a || !c || a_dtype < ASSAY_F32 || a_dtype > ASSAY_BF16 || lda < g.l.k || ldc < g.l.n || num_threads < 0)
        return ASSAY_EINVAL;
    g.a = a;
    g.a_dtype = a_dtype;
    g.lda = lda;
    g.c = c;
    g.ldc = ldc;
    const int wake = g.l.tiles * g.l.tile_bytes * ((m + 7) / 8) >= WAKE_BYTES;
    if (num_threads == 1 || m * g.l.k <= PREPARE_ALONE) {
        kernel->prepare(&g, 0, g.row_blocks);
    } else {
        job prepare = {&g, kernel->prepare};
        assay_parallel_for(run_range, &prepare, g.row_blocks, num_threads, wake);
    }
    job multiply = {&g, a16 ? kernel->w4a16 : kernel->w4a8};
    return assay_parallel_for(run_range, &multiply, g.l.tiles, num_threads, wake);
}

int assay_w4a8_gemm(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                    int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    return gemm(w, a, a_dtype, lda, m, c, ldc, 0, variant, num_threads, workspace, workspace_bytes);
}

int assay_w4a16_gemm(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                     int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    return gemm(w, a, a_dtype, lda, m, c, ldc, 1, variant, num_threads, workspace, workspace_bytes);
}

int assay_w4_gemm_prepare(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, int a16, int variant,
                          int ith, int nth, void *workspace, size_t workspace_bytes) {
    assay_gemm_args g;
    const assay_int4_gemm_kernel *kernel;
    if (nth < 1 || ith < 0 || ith >= nth) return ASSAY_EINVAL;
    int status = arrange(&g, &kernel, w, m, a16, variant, workspace, workspace_bytes);
    if (status || !m) return status;
    if (!a || a_dtype < ASSAY_F32 || a_dtype > ASSAY_BF16 || lda < g.l.k) return ASSAY_EINVAL;
    g.a = a;
    g.a_dtype = a_dtype;
    g.lda = lda;
    kernel->prepare(&g, (int64_t)g.row_blocks * ith / nth, (int64_t)g.row_blocks * (ith + 1) / nth);
    return ASSAY_OK;
}

int assay_w4_gemm_run(const assay_w4 *w, int64_t m, float *c, int64_t ldc, int a16, int variant, int ith, int nth,
                      void *workspace, size_t workspace_bytes) {
    assay_gemm_args g;
    const assay_int4_gemm_kernel *kernel;
    if (nth < 1 || ith < 0 || ith >= nth) return ASSAY_EINVAL;
    int status = arrange(&g, &kernel, w, m, a16, variant, workspace, workspace_bytes);
    if (status || !m) return status;
    if (!c || ldc < g.l.n) return ASSAY_EINVAL;
    g.c = c;
    g.ldc = ldc;
    (a16 ? kernel->w4a16 : kernel->w4a8)(&g, g.l.tiles * ith / nth, g.l.tiles * (ith + 1) / nth);
    return ASSAY_OK;
}

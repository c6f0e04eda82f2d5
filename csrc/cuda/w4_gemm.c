/* The host side of the INT4 GEMMs: checks, which kernel, which grid, where in the workspace. */
#include <stdio.h>

#include "assay_cuda.h"
#include "w4_layout.h"

enum {
    BLOCK_N = 256,
    BLOCK_K_A16 = 64,
    BLOCK_K_A8 = 128,
    LEAST_STRIPE_K = 512,
    STRIPED_ROWS = 64,
    GEMV_ROWS = 8,
    WARPS = 8
};

typedef struct {
    int64_t block_m, row_blocks, column_blocks, k_tiles, stripe, blocks;
    int hopper;                /* by warpgroup products, from tiles of A */
} plan;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

static int supported(const assay_cuda_w4 *w) {
    return w && w->n > 0 && w->k > 0 && assay_cuda_w4_packed_bytes(w->n, w->k, w->group_size, w->symmetric) > 0;
}

/* More than STRIPED_ROWS rows of a16 on compute capability 9.0: blocks of 128 rows unless those of 64 are needed to have enough. */
static void plan_hopper(plan *p, int64_t m, const assay_cuda_device *device) {
    p->hopper = device->major == 9 && device->minor == 0 && m > STRIPED_ROWS;
    if (!p->hopper) return;
    p->block_m = p->column_blocks * ceil_div(m, 128) >= device->sms ? 128 : 64;
    p->row_blocks = ceil_div(m, p->block_m);
}

/* K is cut so that two blocks a multiprocessor share the weights evenly; pieces of less than LEAST_STRIPE_K would cost more in
 * partial sums than they gain. Nothing here but block_m and row_blocks depends on M, up to STRIPED_ROWS. */
static int make_plan(plan *p, const assay_cuda_w4 *w, int64_t m, int a16, const assay_cuda_device *device) {
    const int64_t block_k = a16 ? BLOCK_K_A16 : BLOCK_K_A8;
    p->block_m = m <= 16 ? 16 : m <= 32 ? 32 : 64;
    p->row_blocks = ceil_div(m, p->block_m);
    p->column_blocks = ceil_div(w->n, BLOCK_N);
    p->k_tiles = ceil_div(w->k, block_k);
    const int64_t total = p->column_blocks * p->k_tiles;
    p->stripe = m <= STRIPED_ROWS ? largest(ceil_div(total, 2 * (int64_t)device->sms), LEAST_STRIPE_K / block_k) : p->k_tiles;
    if (p->stripe >= p->k_tiles) p->stripe = ceil_div(p->stripe, p->k_tiles) * p->k_tiles;
    p->blocks = ceil_div(total, p->stripe);
    p->hopper = 0;
    if (a16) plan_hopper(p, m, device);
    return p->row_blocks <= 65535 ? ASSAY_OK : ASSAY_EINVAL;
}

static size_t partial_bytes(const plan *p) {
    return p->stripe % p->k_tiles ? (size_t)(2 * p->row_blocks * p->blocks * p->block_m * BLOCK_N) * sizeof(float) : 0;
}

static size_t round_up(size_t v, size_t to) { return (v + to - 1) / to * to; }
static size_t code_bytes(const assay_cuda_w4 *w, int64_t m) {
    return round_up((size_t)m * round_up((size_t)w->k, ASSAY_CUDA_W4_PAD), 16);
}
static size_t group_bytes(const assay_cuda_w4 *w, int64_t m) {
    return (size_t)(m * (w->k / w->group_size)) * sizeof(assay_cuda_a8_group);
}

static size_t tile_bytes(const plan *p, const assay_cuda_w4 *w) {
    return (size_t)(p->row_blocks * p->block_m) * round_up((size_t)w->k, ASSAY_CUDA_W4_PAD) * 2;
}

/* Zeros, then partial sums, then codes and their groups (a8); or zeros, then tiles of A (Hopper). */
static size_t workspace_of(const plan *p, const assay_cuda_w4 *w, int64_t m, int a16) {
    if (p->hopper) return ASSAY_CUDA_GEMM_ZEROS + tile_bytes(p, w);
    return ASSAY_CUDA_GEMM_ZEROS + partial_bytes(p) + (a16 ? 0 : code_bytes(w, m) + group_bytes(w, m));
}

size_t assay_cuda_w4_gemm_workspace(const assay_cuda_w4 *w, int64_t m, int a16) {
    const assay_cuda_device *device;
    plan p;
    if (!supported(w) || m < 0 || assay_cuda_here(&device) != ASSAY_OK) return 0;
    if (make_plan(&p, w, largest(m, 1), a16, device) != ASSAY_OK) return 0;
    return workspace_of(&p, w, m, a16);
}

static int misaligned(const void *p, uintptr_t to) { return (uintptr_t)p % to != 0; }

static int refuses(const assay_cuda_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, const float *c, int64_t ldc) {
    return !supported(w) || m < 0 || m > INT32_MAX || lda < w->k || ldc < w->n || misaligned(w->data, 16) ||
           misaligned(a, a_dtype == ASSAY_F32 ? 4 : 2) || misaligned(c, 4);
}

static int aligned_rows(const assay_cuda_w4 *w, const void *a, int64_t lda) {
    return w->k % 8 == 0 && lda % 8 == 0 && !misaligned(a, 16);
}

static size_t shared_bytes(const plan *p, const assay_cuda_w4 *w, int a16) {
    const int64_t steps = a16 ? 2 : 4, stages = a16 ? 4 : 3;
    const int64_t warp = steps * (ASSAY_CUDA_W4_STEP_BYTES + ASSAY_CUDA_W4_SCALES_BYTES +
                                  (w->symmetric ? 0 : ASSAY_CUDA_W4_ZEROS_BYTES));
    return (size_t)(stages * (p->block_m * 128 + 8 * warp));
}

/* A to tiles in the workspace, then the products. */
static int hopper_gemm(const plan *p, const assay_w4_gemm_args *of, const char *dtype, void *tiles, void *stream) {
    const assay_cuda_w4 *const w = &of->w;
    const assay_a16_tiles_args tile_args = {
        .a = of->a,
        .lda = of->lda,
        .m = of->m,
        .k = w->k,
        .block_m = (int32_t)p->block_m,
        .aligned = of->aligned,
        .tiles = tiles,
    };
    const int64_t blocks = ceil_div((int64_t)(tile_bytes(p, w) / 16), 256);
    if (blocks > INT32_MAX) return ASSAY_EINVAL;
    const int status = assay_cuda_launch("assay_a16_tiles", (unsigned)blocks, 1, 1, 0, stream, &tile_args, sizeof tile_args);
    if (status != ASSAY_OK) return status;
    assay_w4_gemm_args args = *of;
    args.a = tiles;
    char name[48];
    snprintf(name, sizeof name, "assay_w4a16_sm90a_%s_m%d%s", dtype, (int)p->block_m, w->symmetric ? "" : "z");
    const int64_t columns = ASSAY_CUDA_W4_SCALES_BYTES + (w->symmetric ? 0 : ASSAY_CUDA_W4_ZEROS_BYTES);
    const int64_t stage = p->block_m * 256 + 8 * 4 * (ASSAY_CUDA_W4_STEP_BYTES + columns);
    return assay_cuda_launch(name, (unsigned)p->column_blocks, (unsigned)p->row_blocks, 1, (size_t)(4 * stage + 64), stream,
                             &args, sizeof args);
}

int assay_cuda_w4a16_gemm(const assay_cuda_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                          void *workspace, size_t workspace_bytes, void *stream) {
    const assay_cuda_device *device;
    plan p;
    if ((a_dtype != ASSAY_F16 && a_dtype != ASSAY_BF16) || refuses(w, a, a_dtype, lda, m, c, ldc)) return ASSAY_EINVAL;
    if (m == 0) return ASSAY_OK;
    int status = assay_cuda_here(&device);
    if (status != ASSAY_OK) return status;
    if (make_plan(&p, w, m, 1, device) != ASSAY_OK || misaligned(workspace, 16)) return ASSAY_EINVAL;
    if (!workspace || workspace_bytes < workspace_of(&p, w, m, 1)) return ASSAY_EWORKSPACE;
    const assay_w4_gemm_args args = {
        .w = *w,
        .a = a,
        .lda = lda,
        .c = c,
        .ldc = ldc,
        .m = (int32_t)m,
        .aligned = aligned_rows(w, a, lda),
        .stripe = (int32_t)p.stripe,
        .partials = (float *)((char *)workspace + ASSAY_CUDA_GEMM_ZEROS),
        .arrivals = workspace,
    };
    const char *const dtype = a_dtype == ASSAY_F16 ? "f16" : "bf16";
    if (p.hopper) return hopper_gemm(&p, &args, dtype, (char *)workspace + ASSAY_CUDA_GEMM_ZEROS, stream);
    char name[48];
    snprintf(name, sizeof name, "assay_w4a16_%s_m%d%s", dtype, (int)p.block_m,
             w->symmetric ? "" : "z");
    return assay_cuda_launch(name, (unsigned)p.blocks, (unsigned)p.row_blocks, 1, shared_bytes(&p, w, 1), stream, &args,
                             sizeof args);
}

int assay_cuda_w4a8_gemm(const assay_cuda_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                         void *workspace, size_t workspace_bytes, void *stream) {
    const assay_cuda_device *device;
    plan p;
    if ((a_dtype != ASSAY_F32 && a_dtype != ASSAY_F16 && a_dtype != ASSAY_BF16) || refuses(w, a, a_dtype, lda, m, c, ldc) ||
        w->k > 1 << 19)
        return ASSAY_EINVAL;
    if (m == 0) return ASSAY_OK;
    int status = assay_cuda_here(&device);
    if (status != ASSAY_OK) return status;
    if (make_plan(&p, w, m, 0, device) != ASSAY_OK || misaligned(workspace, 16)) return ASSAY_EINVAL;
    if (!workspace || workspace_bytes < workspace_of(&p, w, m, 0)) return ASSAY_EWORKSPACE;
    char *const partials = (char *)workspace + ASSAY_CUDA_GEMM_ZEROS;
    char *const codes = partials + partial_bytes(&p);
    char *const groups = codes + code_bytes(w, m);
    const assay_a8_quantize_args quantize = {
        .a = a,
        .lda = lda,
        .m = (int32_t)m,
        .k = w->k,
        .group_size = w->group_size,
        .a_dtype = a_dtype,
        .codes = codes,
        .groups = (assay_cuda_a8_group *)groups,
    };
    const int64_t units = w->group_size >= w->k ? 1 : (int64_t)round_up((size_t)w->k, ASSAY_CUDA_W4_PAD) / w->group_size;
    const int64_t blocks = m * ceil_div(units, WARPS);
    if (blocks > INT32_MAX) return ASSAY_EINVAL;
    status = assay_cuda_launch("assay_a8_quantize", (unsigned)blocks, 1, 1, 0, stream, &quantize, sizeof quantize);
    if (status != ASSAY_OK) return status;
    const assay_w4_gemm_args args = {
        .w = *w,
        .a = codes,
        .a_groups = groups,
        .c = c,
        .ldc = ldc,
        .m = (int32_t)m,
        .stripe = (int32_t)p.stripe,
        .partials = (float *)partials,
        .arrivals = workspace,
    };
    char name[48];
    snprintf(name, sizeof name, "assay_w4a8_m%d%s", (int)p.block_m, w->symmetric ? "" : "z");
    return assay_cuda_launch(name, (unsigned)p.blocks, (unsigned)p.row_blocks, 1, shared_bytes(&p, w, 0), stream, &args,
                             sizeof args);
}

int assay_cuda_w4a16_gemv(const assay_cuda_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                          void *stream) {
    if ((a_dtype != ASSAY_F16 && a_dtype != ASSAY_BF16) || refuses(w, a, a_dtype, lda, m, c, ldc) || m > GEMV_ROWS)
        return ASSAY_EINVAL;
    if (m == 0) return ASSAY_OK;
    const assay_w4_gemm_args args = {
        .w = *w,
        .a = a,
        .lda = lda,
        .c = c,
        .ldc = ldc,
        .m = (int32_t)m,
        .aligned = aligned_rows(w, a, lda),
    };
    char name[48];
    snprintf(name, sizeof name, "assay_w4a16_%s_gemv%s", a_dtype == ASSAY_F16 ? "f16" : "bf16", w->symmetric ? "" : "z");
    return assay_cuda_launch(name, (unsigned)ceil_div(w->n, ASSAY_CUDA_W4_TILE), 1, 1,
                             WARPS * GEMV_ROWS * ASSAY_CUDA_W4_TILE * sizeof(float), stream, &args, sizeof args);
}

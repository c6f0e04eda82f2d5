/* What each op's variant exports, and how an op finds the variant to run. Inside the library only. */
#ifndef ASSAY_KERNELS_H
#define ASSAY_KERNELS_H

#include "assay.h"

#define ISA(name, features) ASSAY_ISA_##name,
enum {
#include "isa.inc"
    ASSAY_ISA_COUNT
};
#undef ISA

enum { ASSAY_OP_int4_gemm, ASSAY_OP_int8_gemm, ASSAY_OP_wide_gemm, ASSAY_OP_moe_route, ASSAY_OP_moe_experts,
       ASSAY_OP_spec_verify, ASSAY_OP_probe, ASSAY_OP_COUNT };

int assay_cpu_supports(int isa);                 /* cpuid.c */
int64_t assay_stream_ahead(void);                /* cpuid.c */
/* The kernel table of an op for a variant (-1: best allowed), or NULL when there is none. */
const void *assay_select(int op, int variant);

static inline int64_t assay_min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t assay_round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* ---- int4_gemm: the packed layout -----------------------------------------------------------------
 * tile        = 32 output columns x all of K; tiles contiguous; columns past N hold q = 0, scale = 0
 * group block = [32 x float16 scale][group_padded/32 x 512 B of nibble lines]
 * nibble lines of 32 k = 4 steps of 8 k x 2 halves of 16 columns x 64 B:
 *               line(step, half): byte 4*lane + b: low nibble  q[col = 16*half + lane][k = 8*step + b]
 *                                                  high nibble q[same col]            [k = 8*step + 4 + b]
 * asymmetric  = before every four group blocks 64 B: 4 x 16 B, byte j = z[col j] | z[col j+16] << 4
 * One linear stream a thread: scales and zero points lie where they are used.
 *
 * int8_gemm: the same tiles and blocks; 32 k = 8 steps of 4 k x 2 halves x 64 B:
 *               line(step, half): byte 4*lane + b: q[col = 16*half + lane][k = 4*step + b] + 128 */
enum { ASSAY_TILE_N = 32, ASSAY_LINES32 = 512, ASSAY_BYTE_LINES32 = 1024, ASSAY_SCALE_BYTES = 64, ASSAY_ZERO_BYTES = 64 };

typedef struct {
    int64_t n, k, k_padded, group, groups, group_padded, tiles;
    int64_t block_bytes, tile_bytes;
    int symmetric;     /* int8_gemm: always */
} assay_w4_layout;

static inline int64_t assay_w4_block_offset(const assay_w4_layout *l, int64_t g) {
    return g * l->block_bytes + (l->symmetric ? 0 : (g / 4 + 1) * ASSAY_ZERO_BYTES);
}
static inline int64_t assay_w4_zero_offset(const assay_w4_layout *l, int64_t g) {
    return g / 4 * (4 * l->block_bytes + ASSAY_ZERO_BYTES) + g % 4 * 16;
}

/* Activations, prepared once a call. Rows go in blocks of `mr` (the last ones balanced); block starting at row0
 * with r rows lies at element row0 * k_padded:
 *   w4a8:  int8  [k/4][r][4];  scale float [groups][r] and comp int32 [groups][r] at row0 * groups,
 *          comp = -sum(q_a) times `center`
 *   w4a16: float [k][r];       xsum float [groups][r] at row0 * groups
 *          or, `pairs`: [k/2][r] words of two bfloat16, k in the high half and k + 1 in the low one; half the bytes */
typedef struct {
    assay_w4_layout l;
    const uint8_t *packed;
    int64_t m;
    int row_blocks;
    int a16, pairs;
    int32_t center;    /* the zero point of symmetric weights: 8, or 128 for int8; 1 when they have their own */
    void *values;
    float *scale;      /* w4a16: xsum */
    int32_t *comp;
    float *c;
    int64_t ldc;
    const void *a;
    int a_dtype;
    int64_t lda;
    int64_t ahead;     /* bytes that a stream of weights is asked for before it is read: assay_stream_ahead() */
} assay_gemm_args;

/* Rows of block i when m rows make `blocks` balanced blocks: the first m % blocks have one more. */
static inline int64_t assay_block_row(int64_t m, int64_t blocks, int64_t i) {
    return m / blocks * i + assay_min_i64(i, m % blocks);
}

typedef struct assay_int4_gemm_kernel {
    int mr8, mr16;                                                          /* most rows a block can have... */
    int alone8;                                                             /* ...and when it is the only one */
    void (*prepare)(const assay_gemm_args *args, int64_t begin, int64_t end); /* row blocks */
    void (*w4a8)(const assay_gemm_args *args, int64_t begin, int64_t end);    /* tiles */
    void (*w4a16)(const assay_gemm_args *args, int64_t begin, int64_t end);   /* tiles */
    int mr_pairs;                                   /* most rows a block of pairs can have; 0: takes no pairs */
    /* Where w4a8 of few rows is another tier's, whose kernel that is (NULL: none), up to how many rows, and how many bytes of a
     * row this kernel's own row blocks keep together: [k/unit][r][unit]. All w4a16 is that tier's too. */
    const struct assay_int4_gemm_kernel *fewer;
    int64_t (*few)(const assay_w4_layout *l);
    int64_t (*unit)(const assay_w4_layout *l);
} assay_int4_gemm_kernel;

/* ---- int8_gemm: prepares with int4_gemm's ------------------------------------------------------------- */
typedef struct {
    int mr8, alone8;
    void (*w8a8)(const assay_gemm_args *args, int64_t begin, int64_t end);    /* tiles */
} assay_int8_gemm_kernel;

/* ---- wide_gemm: the tiles and lines of int4_gemm or int8_gemm, a group in steps of 16 k ---------------------
 * group block = [32 x float scale][32 x float minimum, where there is one][group_padded/16 x 256 B or 512 B of lines]
 * Prepares with int4_gemm's, center 1; then comp becomes `base` times it, and `terms` the activations' sums. */
enum { ASSAY_TERM_BYTES = 128 };

typedef struct {
    assay_gemm_args gemm;  /* first, so that what walks tiles hands it over; no zero points in its layout */
    int bits, minimum;
    int plain;             /* 4 bits, the codebook is 0..15: a code is its own value */
    int32_t base;          /* what the unsigned operand of a dot product exceeds a value by: 0 when plain, else 128 */
    float codebook[16];
    int8_t whole[16];      /* the codebook of a8 */
    float *terms;          /* X_g, as `gemm.scale` lies */
} assay_wide_args;

static inline const uint8_t *assay_wide_block(const assay_wide_args *w, const uint8_t *tile, int64_t g) {
    return tile + g * w->gemm.l.block_bytes;
}
static inline const uint8_t *assay_wide_lines(const assay_wide_args *w, const uint8_t *block) {
    return block + (w->minimum ? 2 : 1) * ASSAY_TERM_BYTES;
}

typedef struct {
    int mr8, mr16;
    void (*a8)(const assay_wide_args *args, int64_t begin, int64_t end);      /* tiles */
    void (*a16)(const assay_wide_args *args, int64_t begin, int64_t end);     /* tiles */
} assay_wide_gemm_kernel;

/* ---- moe_route ---------------------------------------------------------------------------------- */
enum { ASSAY_ROUTE_KEYS = 2048 }; /* most experts that can have a bias or groups */
typedef struct {
    void (*route)(const assay_route_args *args, int64_t begin, int64_t end); /* tokens */
} assay_moe_route_kernel;

/* ---- moe_experts: what lies between the GEMMs ----------------------------------------------------------- */
typedef struct {
    int activation, gated;
    float alpha, limit;
} assay_activation;
typedef struct {
    /* dst[i][r] = rows[r][i] for `words` words of four bytes, `unit` of which stay together. */
    void (*gather)(const uint32_t *const *rows, int64_t n, int64_t words, int64_t unit, uint32_t *dst);
    /* c[rows, 32] (gated: 16 gates, 16 ups), row stride ldc, to h[rows, width], row stride ldh; bias[32] or NULL. */
    void (*activate)(const assay_activation *act, const float *c, int64_t ldc, int64_t rows, const float *bias, float *h,
                     int64_t ldh, int64_t width);
    /* out[n] = w (y + bias), or with `more` out[n] = fma(w, y + bias, out). bias may be NULL. */
    void (*combine)(float *out, const float *y, const float *bias, float w, int more, int64_t n);
} assay_moe_experts_kernel;

/* ---- spec_verify: passes over one row of logits, in blocks of ASSAY_VOCAB_BLOCK -------------------- */
enum { ASSAY_VOCAB_BLOCK = 2048 };
/* spec_verify's table is in cpu/spec_verify/spec_verify.h, beside the rules that use it. */

/* ---- probe ---------------------------------------------------------------------------------------- */
typedef struct {
    /* Returns a value that depends on every line; each is asked for `ahead` bytes before it is read, unless 0. */
    uint64_t (*read)(const void *buffer, size_t bytes, size_t ahead);
    double (*int8)(int64_t iterations);                      /* returns ops done */
    double (*fp32)(int64_t iterations);
    double (*exponentials)(int64_t iterations);              /* returns elements */
} assay_probe_kernel;

#endif

/* assay: the whole C API on one page.
 *
 * Kernels do no I/O, no allocation, start no threads, never print or abort. They take raw pointers,
 * sizes and strides and return a status; workspace is the caller's, its size a function. Every call
 * is safe from many threads at once. Results do not depend on the number of threads, on the batch
 * around a row, or (for the ops below, where the mathematics allows it) on the variant.
 *
 * The text between the two cdef markers is also what Python's cffi reads: plain C declarations only. */
#ifndef ASSAY_H
#define ASSAY_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */

/* Status of a call. */
enum {
    ASSAY_OK = 0,
    ASSAY_EINVAL = 1,      /* an argument is out of its documented range */
    ASSAY_EISA = 2,        /* no such variant, or this CPU lacks it, or ASSAY_ISA names none */
    ASSAY_EWORKSPACE = 3   /* workspace smaller than the size function says */
};

/* Status of a row, where data can be bad: never a silent token. */
enum {
    ASSAY_ROW_OK = 0,
    ASSAY_ROW_NAN = 1,     /* a NaN among the row's values */
    ASSAY_ROW_EMPTY = 2,   /* nothing to choose from: all minus infinity */
    ASSAY_ROW_INF = 3,     /* a plus infinity: no distribution */
    ASSAY_ROW_BAD_ID = 4   /* a token id outside the vocabulary */
};

/* Element types of activations and logits. */
enum { ASSAY_F32 = 0, ASSAY_F16 = 1, ASSAY_BF16 = 2 };

/* ---- what is here -------------------------------------------------------------------------- */

const char *assay_version(void);
const char *assay_compiler(void);

/* Instruction-set tiers in rising order, as in isa.inc. compiled: kernels of this tier are in this
 * build. supported: this CPU and OS can run it. allowed: supported and within ASSAY_ISA. */
int assay_isa_count(void);
int assay_isa_info(int i, const char **name, const char **features, int *supported, int *allowed);

/* Kernel variants, as in variants.inc (best first within an op). */
int assay_variant_count(void);
int assay_variant_info(int i, const char **op, const char **isa, int *compiled, int *supported, int *selected);

/* Reads ASSAY_ISA again (tests). ASSAY_EISA when it names no tier, or one that this CPU lacks. */
int assay_isa_refresh(void);

/* ---- threads --------------------------------------------------------------------------------
 * One pool a process, started at the first call that wants it, rebuilt after fork. Work is a range of
 * units; each thread starts on its own contiguous share and then steals from the others' ends.
 * A call that finds the pool busy runs on its own thread alone. */
typedef void (*assay_range_fn)(void *arg, int64_t begin, int64_t end);

/* Threads used when a call asks for 0: ASSAY_NUM_THREADS, else the affinity mask capped by the cgroup quota. */
int assay_num_threads(void);
/* CPUs' worth of time that the control groups grant, the tightest from this process's group to the root; 0: no limit. */
double assay_cgroup_quota(void);
/* Runs fn over [0, units) on up to num_threads threads. wake: 1 to wake sleeping workers (work over
 * some tens of microseconds), 0 to use only those that are awake. */
int assay_parallel_for(assay_range_fn fn, void *arg, int64_t units, int num_threads, int wake);
/* Median seconds of one empty dispatch over `repeats` back-to-back calls. */
double assay_dispatch_latency(int num_threads, int repeats);

/* ---- INT4 GEMM: C[M,N] = A[M,K] @ W[N,K].T -------------------------------------------------------
 * W in groups of group_size along K: w = scale * (q - zero), q in 0..15; symmetric means zero = 8.
 * group_size is 32, 64, 128 (K a multiple of it) or K itself (any K).
 *
 * w4a8: activations are quantised per row and group: s_a = amax / 127, q_a = rint(x * (127 / amax));
 * a group whose amax is below 1e-30 counts as zero; a group with a NaN or infinity gets s_a = NaN, so
 * that its whole row comes out NaN and other rows do not notice. Per output, g ascending:
 *     I_g = sum_k (q - zero) q_a  (exact int32),   f = fma(I_g, s_w * s_a, f)   (float32)
 * w4a16: activations enter as they are (float16 and bfloat16 are widened exactly). Per group
 *     p = -zero * X_g;  p = fma(x_k, q_k, p) for k ascending;  f = fma(p, s_w, f)
 * where X_g is the float32 sum of the group's x in eight lanes (k mod 8), folded
 * ((0+4)+(2+6)) + ((1+5)+(3+7)). Both chains are the same in every variant: same bits for any M, any
 * number of threads, any position in the batch, and any variant. */
typedef struct {
    int64_t n, k;
    int64_t group_size;
    int32_t symmetric;
    const void *data;          /* assay_w4_pack's output, 64-byte aligned */
} assay_w4;

/* Bytes of the packed form; 0 when the shape is not supported. */
size_t assay_w4_packed_bytes(int64_t n, int64_t k, int64_t group_size, int symmetric);
/* qweight[N, ceil(K/2)]: low nibble = even k. scales[N, G] float16 bits. zeros[N, G] in 0..15, or NULL (symmetric). */
int assay_w4_pack(int64_t n, int64_t k, int64_t group_size, const uint8_t *qweight, const uint16_t *scales,
                  const uint8_t *zeros, void *packed, int num_threads);
int assay_w4_unpack(const assay_w4 *w, uint8_t *qweight, uint16_t *scales, uint8_t *zeros);

size_t assay_w4_gemm_workspace(const assay_w4 *w, int64_t m, int a16);
/* a[M, K] of a_dtype, row stride lda elements; c[M, N] float32, row stride ldc. variant: -1 best, or an ISA
 * index. num_threads: 0 default, 1 the caller's thread alone. */
int assay_w4a8_gemm(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                    int variant, int num_threads, void *workspace, size_t workspace_bytes);
int assay_w4a16_gemm(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                     int variant, int num_threads, void *workspace, size_t workspace_bytes);
/* The same on threads that the caller owns: each of nth threads calls prepare(ith, nth); after a barrier of the
 * caller's, each calls run(ith, nth). One workspace, shared. a16: 0 for w4a8, 1 for w4a16. */
int assay_w4_gemm_prepare(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, int a16, int variant,
                          int ith, int nth, void *workspace, size_t workspace_bytes);
int assay_w4_gemm_run(const assay_w4 *w, int64_t m, float *c, int64_t ldc, int a16, int variant, int ith, int nth,
                      void *workspace, size_t workspace_bytes);

/* ---- int8 GEMM: the same with weights of eight bits, w = scale * q, q in -128..127 ----------------------------
 * w8a8: activations as in w4a8. group_size 32, 64, 128 (K a multiple of it) or K (at most 2^17). GGUF's Q8_0 is group 32. */
typedef struct {
    int64_t n, k;
    int64_t group_size;
    const void *data;          /* assay_w8_pack's output, 64-byte aligned */
} assay_w8;

size_t assay_w8_packed_bytes(int64_t n, int64_t k, int64_t group_size);
/* qweight[N, K], scales[N, G] float16 bits. */
int assay_w8_pack(int64_t n, int64_t k, int64_t group_size, const int8_t *qweight, const uint16_t *scales, void *packed,
                  int num_threads);
int assay_w8_unpack(const assay_w8 *w, int8_t *qweight, uint16_t *scales);
size_t assay_w8_gemm_workspace(const assay_w8 *w, int64_t m);
int assay_w8a8_gemm(const assay_w8 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                    int variant, int num_threads, void *workspace, size_t workspace_bytes);

/* ---- MoE routing: softmax over experts, then top-k ---------------------------------------------
 * logits[T, E] of dtype, row stride ld. Writes topk_weights[T, k], topk_ids[T, k] (weight descending, ties to
 * the lower id) and status[T]. renormalize: weights of a row sum to one. Minus infinity masks an expert; slots
 * that cannot be filled hold id -1 and weight 0, as does every slot of a row whose status is not ROW_OK. */
int assay_moe_route(const void *logits, int dtype, int64_t ld, int64_t tokens, int64_t num_experts, int64_t top_k,
                    int renormalize, float *topk_weights, int32_t *topk_ids, int32_t *status, int variant,
                    int num_threads);

/* ---- chain verification --------------------------------------------------------------------------
 * Request b drafted K_b = cu[b+1] - cu[b] tokens; it owns K_b + 1 rows of target_logits, starting at row
 * cu[b] + b. rule 0 greedy: accept while the draft is the argmax (first of equals). rule 1 rejection (Leviathan
 * et al. 2023, Algorithm 1): accept when u q(x) < p(x), strictly, u in (0, 1); else sample (p - q)+, or p where that is
 * all zero. p = softmax(logits / temperature). temperature 0 makes a request greedy in the same launch. draft_probs[sum K_b,
 * V] float32, or NULL for one-hot drafts.
 * A row is read once, and once more only where it must be resampled; rows after the first rejection never. A request has a
 * status other than ROW_OK when one of its draft ids is outside [-1, V), a row that was reached holds a NaN, a plus
 * infinity or nothing but minus infinity, or a draft probability that was read is negative or not finite (ROW_NAN). Then
 * its output is all -1 and num_accepted 0: nothing of a poisoned step is used. */
typedef struct {
    const void *target_logits;
    int32_t dtype;
    int64_t ld;                        /* row stride of target_logits, elements */
    int64_t batch, vocab;
    const int32_t *draft_token_ids;    /* [sum K_b]; -1 ends a request's draft */
    const int32_t *cu_num_draft_tokens;/* [batch + 1], starts at 0, not decreasing */
    const float *draft_probs;          /* [sum K_b, V] or NULL */
    int32_t rule;
    const float *temperature;          /* [batch] */
    const uint64_t *seed;              /* [batch] */
    const int64_t *position;           /* [batch]: absolute position of the request's first new token */
    const double *uniforms;            /* NULL, or [sum K_b + 2 batch] in (0, 1): request b's at cu[b] + 2 b are K_b
                                          for acceptance, one for the residual, one for the bonus token */
    int32_t *output_token_ids;         /* [batch, max_out], -1 pads */
    int64_t max_out;                   /* >= max K_b + 1 */
    int32_t *num_accepted;             /* [batch] */
    int32_t *status;                   /* [batch] */
} assay_chain_args;
size_t assay_chain_verify_workspace(int64_t batch, int64_t vocab); /* 0 when either is out of range */
int assay_chain_verify(const assay_chain_args *args, int variant, int num_threads, void *workspace,
                       size_t workspace_bytes);
/* Philox4x32-10 keyed by seed, counter (position, domain, node): ((x >> 12) + 1/2) 2^-52 of its first 64 bits x, in (0, 1).
 * Draft i of a request uses position + i and node 0; domains: 1 acceptance, 2 residual, 3 bonus token. */
double assay_uniform(uint64_t seed, int64_t position, uint32_t domain, uint32_t node);

/* ---- draft trees -----------------------------------------------------------------------------------
 * parents[n]: a node's parent by index, which comes before it; -1: a child of the root, the last emitted token. Row 0 of
 * every output is the root and row i + 1 is node i, as the target model is fed. Statuses of a tree: */
enum {
    ASSAY_TREE_OK = 0,
    ASSAY_TREE_BAD_PARENT = 1, /* outside [-1, own index): missing, later, itself, a cycle */
    ASSAY_TREE_DUPLICATE = 2,  /* two siblings hold the same token */
    ASSAY_TREE_TOO_DEEP = 3    /* deeper than max_depth */
};
enum { ASSAY_TREE_MOST_NODES = 4096 };
typedef struct {
    int64_t nodes;             /* 0 .. ASSAY_TREE_MOST_NODES */
    const int32_t *parents;    /* [n] */
    const int32_t *tokens;     /* [n], or NULL: siblings are not compared */
    int64_t max_depth;
    int64_t position;          /* of the root in its sequence */
    int32_t *depth;            /* [n + 1]; the root's is 0 */
    int32_t *first_child;      /* [n + 1] rows, -1: none; siblings in the order of their indices */
    int32_t *next_sibling;     /* [n + 1] */
    int64_t *positions;        /* [n + 1], position + depth; this and what follows may be NULL */
    uint8_t *mask;             /* [n + 1, n + 1]: 1 where a row (query) sees a column: itself and its ancestors */
    uint64_t *mask_words;      /* [n + 1, ceil((n + 1) / 64)]: the same, column j is bit j % 64 of word j / 64 */
    int32_t *retrieve;         /* [leaves, greatest depth + 1] rows from the root to each leaf, leaves ascending, -1 pads; room
                                  for max(n, 1) (max_depth + 1) */
    int32_t *info;             /* [4]: status, the node at fault or -1, leaves, greatest depth */
} assay_tree_args;
/* Writes all that is not NULL; nothing but info is meaningful where the status is not ASSAY_TREE_OK. */
int assay_tree_build(const assay_tree_args *args);

/* ---- probes: the roofs that kernels are measured against ---------------------------------------
 * Each runs on num_threads threads and returns seconds (negative on error). */
double assay_probe_read(const void *buffer, size_t bytes, int64_t repeats, int variant, int num_threads);
/* iterations of the tier's densest int8 dot-product loop; *ops gets multiply-adds times two done in all. */
double assay_probe_int8(int64_t iterations, int variant, int num_threads, double *ops);
double assay_probe_fp32(int64_t iterations, int variant, int num_threads, double *ops);

/* cdef end */

#endif

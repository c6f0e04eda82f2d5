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

#ifndef __CUDACC_RTC__ /* which has the types from csrc/cuda/ptx.cuh */
#include <stddef.h>
#include <stdint.h>
#endif

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
    ASSAY_ROW_BAD_ID = 4,  /* a token id that is none */
    ASSAY_ROW_BAD_TREE = 5 /* parents that make no tree */
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
 * w4a16: activations enter as they are (float16 and bfloat16 are widened exactly), except that a bfloat16
 * smaller than 2^-100 in size counts as zero: then no product or sum of a group is subnormal, and hardware that flushes
 * those has the same bits. Per group
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
 * caller's, each calls run(ith, nth). One workspace, shared, and one a_dtype. a16: 0 for w4a8, 1 for w4a16. */
int assay_w4_gemm_prepare(const assay_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, int a16, int variant,
                          int ith, int nth, void *workspace, size_t workspace_bytes);
int assay_w4_gemm_run(const assay_w4 *w, int a_dtype, int64_t m, float *c, int64_t ldc, int a16, int variant, int ith,
                      int nth, void *workspace, size_t workspace_bytes);

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

/* ---- MoE routing: a score of every expert, then the top k ------------------------------------------
 * Of a row l[0..E) of logits: score s = softmax(l), sigmoid(l), sqrt(log(1 + exp(l))) or l itself.
 * Choice: the top_k largest s + bias (without a bias and without groups: the largest l, which is the same order but for
 * scores that round to one value), descending, ties to the lower id. Minus infinity masks an expert. n_group > 1: experts lie
 * in n_group equal groups, of which only the topk_group best are chosen from (ties to the lower group); a group is as good as
 * its largest s + bias, or with group_top2 as its two largest together.
 * Weight: s recomputed from the logit, never s + bias. renormalize: divided by the sum of the chosen (softmax: the softmax
 * over the chosen alone; else that sum + 1e-20). Then times `scaling`.
 * num_shared: each row ends in that many slots for experts E, E + 1, ... of weight shared_weight.
 * A slot that cannot be filled holds id -1 and weight 0, as does every slot of a row whose status is not ROW_OK. */
enum { ASSAY_SCORE_SOFTMAX = 0, ASSAY_SCORE_SIGMOID = 1, ASSAY_SCORE_SQRTSOFTPLUS = 2, ASSAY_SCORE_NONE = 3 };
typedef struct {
    const void *logits;        /* [T, E], row stride ld elements */
    int32_t dtype;
    int32_t scoring;
    int64_t ld, tokens, num_experts, top_k;
    const float *bias;         /* [E], or NULL. E is at most 2048 with a bias or with groups */
    int64_t n_group, topk_group; /* n_group divides E; 1 and 1: no groups */
    int32_t group_top2;
    int32_t renormalize;
    float scaling;
    float shared_weight;
    int64_t num_shared;
    float *topk_weights;       /* [T, top_k + num_shared] */
    int32_t *topk_ids;         /* [T, top_k + num_shared] */
    int32_t *status;           /* [T] */
} assay_route_args;
int assay_moe_route(const assay_route_args *args, int variant, int num_threads);

/* ---- MoE: which tokens go to which expert ----------------------------------------------------------
 * A slot is one of a token's top_k choices: slot t * top_k + j of topk_ids[T, top_k]. An id outside [0, num_experts) is an
 * empty slot. expert_map[num_experts], or NULL: the local number of each expert, in [0, num_local) or -1 for one that lives
 * elsewhere, whose slots then count as empty; without a map num_local is num_experts. */

/* Where each local expert's slots begin when every expert's are padded to a multiple of block_size: offsets[num_local + 1],
 * and how many there are: counts[num_local]. */
int assay_moe_offsets(const int32_t *topk_ids, int64_t slots, int64_t num_experts, const int32_t *expert_map,
                      int64_t num_local, int64_t block_size, int64_t *offsets, int64_t *counts);
/* A stable counting sort by expert: sorted_token_ids[offsets[num_local]] are slots in rising order within each expert, then
 * `slots` as padding; expert_ids[offsets[num_local] / block_size] the local expert of each block; position[slots] where each
 * slot went, -1 for an empty one. cursor[num_local] is workspace. */
int assay_moe_sort(const int32_t *topk_ids, int64_t slots, int64_t num_experts, const int32_t *expert_map,
                   int64_t num_local, int64_t block_size, const int64_t *offsets, int64_t *cursor,
                   int32_t *sorted_token_ids, int32_t *expert_ids, int32_t *position);
/* Drops what is beyond an expert's capacity, in place: id -1, weight 0. All first choices are served before all second ones
 * (GShard); among equals tokens in `order`[T] (NULL: rising). counts[num_experts]: what was kept. */
int assay_moe_capacity(int32_t *topk_ids, float *topk_weights, int64_t tokens, int64_t top_k, int64_t num_experts,
                       int64_t capacity, const int64_t *order, int64_t *counts);
/* out[T, n] = sum over a token's slots j, in order, of weight * y[position]: float32, the first product rounded, then one FMA
 * a slot; zero for a token without any. position[T, top_k], -1 for an empty slot; y[.., n] with row stride ldy. */
int assay_moe_combine(const float *y, int64_t ldy, int64_t n, const int32_t *position, const float *topk_weights,
                      int64_t tokens, int64_t top_k, float *out, int64_t ldo, int variant, int num_threads);

/* ---- MoE: the expert layer ---------------------------------------------------------------------------
 * For every slot of a token x with expert e and weight w:
 *     [g, u] = x gate_up_e^T + gate_up_bias_e,  h = act(g) u,  y = h down_e^T + down_bias_e,  out = sum over slots of w y
 * with the arithmetic of w4a8 (x and h quantised per row and group) or w4a16 throughout, and the sum as assay_moe_combine's.
 * Not gated: h = act(g). input_weights: x is multiplied by w (float32) on its way in, and y not at all. A limit above 0 clamps
 * g to at most it, u to within it, before the activation.
 * gate_up is one packed INT4 matrix an expert (assay_w4_pack), end to end: [32 ceil(I / 16), H], whose tile t has the gates of
 * hidden units 16 t .. 16 t + 15, then their ups, and zeros past I; not gated: [I, H]. down: [H, I]. */
enum { ASSAY_ACT_SILU = 0, ASSAY_ACT_GELU = 1, ASSAY_ACT_GELU_TANH = 2, ASSAY_ACT_RELU = 3, ASSAY_ACT_RELU2 = 4,
       ASSAY_ACT_SWIGLU_OAI = 5 /* g sigmoid(alpha g) (u + 1) */ };
typedef struct {
    int64_t num_experts, hidden, intermediate;
    int64_t gate_up_group, down_group;
    int32_t gate_up_symmetric, down_symmetric, gated, activation;
    float alpha, limit;
    const void *gate_up, *down;       /* 64-byte aligned */
    const float *gate_up_bias;        /* [E, N] in the packed order of columns, N = 32 ceil(I / 16) or I, or NULL */
    const float *down_bias;           /* [E, H], or NULL */
} assay_experts;
typedef struct {
    const assay_experts *experts;
    const void *x;                    /* [T, H] of dtype, row stride ldx */
    int32_t dtype, a16;
    int64_t ldx, tokens, top_k;
    const int32_t *topk_ids;          /* [T, top_k] */
    const float *topk_weights;        /* [T, top_k] */
    const int32_t *expert_map;        /* [map_size]: ids to this layer's experts, -1 for none; or NULL */
    int64_t map_size;
    int32_t input_weights;
    float *out;                       /* [T, H], row stride ldo */
    int64_t ldo;
    int64_t *tokens_per_expert;       /* [E], or NULL */
    int64_t *row_blocks;              /* NULL, or how often a tile was multiplied by a block of rows, summed over experts,
                                         and how many rows those blocks have room for: [2] */
} assay_experts_args;
size_t assay_moe_experts_workspace(const assay_experts_args *args); /* 0 when an argument is out of range */
int assay_moe_experts(const assay_experts_args *args, int variant, int num_threads, void *workspace,
                      size_t workspace_bytes);

/* ---- wide GEMM: weights that float16 scales and integer zero points cannot hold -------------------------------
 * w[n, k] = scale[n, g] v + minimum[n, g], scale and minimum float32, minimum optional. bits 8: v = q in -128..127.
 * bits 4: v = codebook[q], q in 0..15. group_size 16, 32, 64, 128 (K a multiple of it) or K; K at most 2^17.
 * Per output, g ascending:
 *   a8:  activations as in w4a8.  I_g = sum_k v q_a (exact int32),  f = fma(I_g, s_w * s_a, f);
 *        with a minimum then  f = fma(minimum, float(sum_k q_a) * s_a, f).
 *        The codebook must be integers in -127..127.
 *   a16: p = fma(x_k, v, p) from 0 for k ascending,  f = fma(p, s_w, f);
 *        with a minimum then  f = fma(minimum, X_g, f), X_g as in w4a16. The codebook must be finite. */
typedef struct {
    int64_t n, k;
    int64_t group_size;
    int32_t bits;
    int32_t has_minimum;
    float codebook[16];        /* bits 4 */
    const void *data;          /* assay_wide_pack's output, 64-byte aligned */
} assay_wide;

size_t assay_wide_packed_bytes(int64_t n, int64_t k, int64_t group_size, int bits, int has_minimum);
/* qweight: bits 4 uint8[N, ceil(K/2)], low nibble = even k; bits 8 int8[N, K]. scales[N, G]; minimum[N, G] or NULL. */
int assay_wide_pack(int64_t n, int64_t k, int64_t group_size, int bits, const void *qweight, const float *scales,
                    const float *minimum, void *packed, int num_threads);
int assay_wide_unpack(const assay_wide *w, void *qweight, float *scales, float *minimum);
size_t assay_wide_gemm_workspace(const assay_wide *w, int64_t m, int a16);
/* Arguments as for w4a8_gemm; a16: 0 for int8 activations, 1 for activations as they are. */
int assay_wide_gemm(const assay_wide *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                    int a16, int variant, int num_threads, void *workspace, size_t workspace_bytes);

/* ---- speculative verification ----------------------------------------------------------------------
 * Request b drafted K_b = cu[b+1] - cu[b] tokens, the nodes of a tree: parents[j] in [-1, j) is the index of node j's parent
 * among the request's own nodes, -1 hangs it from the last committed token; without parents node j follows node j - 1. The
 * request owns K_b + 1 rows of target_logits from row cu[b] + b on: the row after the committed tokens, then the row
 * after each node. Siblings are in draw order. A node of id -1 is absent, and what descends from it.
 *
 * p is a row's distribution: softmax of its logits after, in this order, penalties, bias, mask, temperature, top_k, top_p,
 * min_p, typical_p; q the distribution that a draft was drawn from (siblings have the same; the first sibling's is read).
 * R(A, C) = max(0, A p - C q), |R| its sum. Rules, from the root on; u is a uniform in (0, 1); comparisons are strict:
 *
 * GREEDY       descend to the child that is the argmax (first of equals); else emit the argmax.
 * SAMPLED      draw t from p; descend to the child that is t, else emit t.
 * GUMBEL       the same, t = argmin of -log(1 - u_v) / p(v) over tokens v: the exponential race, the Gumbel-max trick.
 * REJECTION    (chains) accept when u q(x) < p(x); else draw from R(1, 1). Leviathan et al. 2023, Algorithm 1.
 * BLOCK        (chains) Sun et al. 2024: TRAVERSAL on a chain. Without q: REJECTION, which it then equals.
 * SPECINFER    siblings in turn: accept when u c q(x) < (A p(x) - C q(x))+, at first A = 1, C = 0, c = 1; after a rejection
 *              C += c, then A and C are divided by |R(A, C)|. None left: draw from R(A, C). Miao et al. 2023.
 *              WITHOUT_REPLACEMENT: c = 1 / (1 - sum of q over the rejected), and an id that an older sibling has is passed
 *              over. Without q each sibling's q is one-hot.
 * TARGET_ONLY  one u a level: accept the first child (of distinct ids) at which u < (sum of p over children so far) /
 *              threshold_acc, or p(x) >= threshold_single; else draw from p without the children. SGLang.
 * TYPICAL      a node stands when its parent does and p(x) > min(posterior_threshold, posterior_alpha exp(-H(p))); the
 *              longest path, ties to the greatest sum of log p; then draw from p. Lossy. Medusa (Cai et al. 2024).
 * KSEQ         (needs q) K siblings: accept when u rho q(x) < p(x); rho, in [1, K], is the upper end after 16 bisections of
 *              1 - (1 - beta)^K = rho beta, beta = sum min(q, p / rho); else draw from p - gamma min(q, p / rho),
 *              gamma = (1 - (1 - beta)^K) / beta. Sun et al. 2023 (SpecTr).
 * TRAVERSAL    (Weng et al. 2025) leaf to root. A node's P is 1 at the root, else min(1, (A p(x) - C q(x))+ / (c q(x))) with
 *              its parent's A, C, c; its own A = P, C = 0. A node without children left is accepted when u < P; else it is
 *              removed: its parent's C += c, Z = |R(A, C)|, D = Z + 1 - P, then A and C are divided by D and P = Z / D.
 *              The accepted node draws from R(A, C), from p when no child was removed. Without q: SPECINFER.
 * All but TYPICAL, and TARGET_ONLY with a threshold below 1, are lossless. temperature 0 makes a request greedy in the same
 * launch. Where a residual is empty, p takes its place. p(x) = 0 is never accepted; q(x) = 0 < p(x) is; id >= vocab has
 * p = 0.
 *
 * Rows are read once, and once more only where they must be resampled (traversal: for every |R|; K-SEQ finds rho in three
 * or so passes, and counts the bisections), and only those that the walk reaches. A request has a status other than ROW_OK when a present draft id is below -1, parents is no tree
 * as above (ROW_BAD_TREE), a row that was reached holds a NaN, a plus infinity or nothing but minus infinity, or a draft
 * probability that was read is negative or not finite (ROW_NAN). Then its output is all -1 and its counts are 0. */
enum {
    ASSAY_GREEDY = 0, ASSAY_SAMPLED = 1, ASSAY_GUMBEL = 2, ASSAY_REJECTION = 3, ASSAY_BLOCK = 4, ASSAY_SPECINFER = 5,
    ASSAY_SPECINFER_WITHOUT_REPLACEMENT = 6, ASSAY_TARGET_ONLY = 7, ASSAY_TYPICAL = 8, ASSAY_KSEQ = 9,
    ASSAY_TRAVERSAL = 10, ASSAY_TRAVERSAL_WITHOUT_REPLACEMENT = 11
};
/* Purposes of random numbers (DRAFT is the drafter's), and the slots of a request's counters. */
enum { ASSAY_DRAFT = 0, ASSAY_ACCEPT = 1, ASSAY_RESIDUAL = 2, ASSAY_BONUS = 3, ASSAY_NOISE = 4 };
enum { ASSAY_ROWS_READ = 0, ASSAY_ROWS_RESAMPLED = 1, ASSAY_ZERO_DRAFTS = 2, ASSAY_EMPTY_RESIDUALS = 3, ASSAY_COUNTERS = 4 };
typedef struct {
    const void *target_logits;         /* [sum K_b + batch, vocab] */
    int32_t dtype;
    int64_t ld;                        /* row stride of target_logits, elements */
    int64_t batch, vocab;
    const int32_t *draft_token_ids;    /* [sum K_b] */
    const int32_t *cu_num_draft_tokens;/* [batch + 1], starts at 0, not decreasing */
    const int32_t *parents;            /* [sum K_b], or NULL: chains */
    const float *draft_probs;          /* dense [sum K_b, vocab], or NULL */
    const int32_t *draft_prob_ids;     /* sparse [sum K_b, width], ascending in a row; ids outside the vocabulary are padding, */
    const float *draft_prob_values;    /* repeated ones add up; or NULL. Neither: one-hot */
    int64_t draft_prob_width;
    int32_t rule;
    const float *temperature;          /* [batch]; from here on each NULL where it is off for all */
    const int32_t *top_k;              /* [batch]; 0: off; ties to the lower id */
    const float *top_p, *min_p;        /* [batch]; the fewest tokens whose mass reaches top_p; weights >= min_p of the largest */
    const float *typical_p;            /* [batch]; the same by |-log p - H|, ascending */
    const float *repetition_penalty, *frequency_penalty, *presence_penalty; /* [batch], all or none */
    const int32_t *cu_edits;           /* [batch + 1]: tokens that penalties or a bias touch, ids ascending in a request: */
    const int32_t *edit_token_ids;
    const float *edit_bias;            /* minus infinity bans */
    const int32_t *edit_in_prompt, *edit_count; /* 0 or 1; occurrences among the generated tokens */
    const uint32_t *bitmask;           /* [batch or rows, bitmask_ld words]; bit v % 32 of word v / 32 allows token v */
    int64_t bitmask_ld;
    int32_t bitmask_per_row;
    const uint64_t *seed;              /* [batch] */
    const int64_t *position;           /* [batch]: absolute position of the request's first new token */
    const double *uniforms;            /* NULL, or [sum K_b + 2 batch] in (0, 1), request b's at cu[b] + 2 b: K_b for acceptance
                                          (of node j; target_only: of a level's first child), one for the residual, one for
                                          a token of p. SAMPLED: slot d draws the token at depth d. GUMBEL:
                                          [sum K_b + batch, vocab] instead, u_v of every row */
    double posterior_threshold, posterior_alpha; /* of TYPICAL */
    double threshold_single, threshold_acc;      /* of TARGET_ONLY */
    const int32_t *stop_token_ids;     /* output ends with the first of these */
    const int32_t *cu_stop;            /* [batch + 1], or NULL: all num_stop are every request's */
    int64_t num_stop;
    const int32_t *max_emit;           /* [batch], >= 0 (0: nothing is read), or NULL */
    int32_t *output_token_ids;         /* [batch, max_out], -1 pads */
    int64_t max_out;                   /* >= max K_b + 1 */
    int32_t *num_accepted;             /* [batch]: drafts that stand, before stop ids and max_emit */
    int32_t *num_emitted;              /* [batch]: tokens in output_token_ids */
    int32_t *status;                   /* [batch] */
    int32_t *accept_index;             /* [batch, max_out - 1]: the accepted nodes, -1 pads */
    float *logprobs;                   /* [batch, max_out] log p of what is emitted (temperature 0: of temperature 1, without
                                          top_k and the like), NaN pads; or NULL */
    int32_t *counters;                 /* [batch, ASSAY_COUNTERS] */
} assay_verify_args;
size_t assay_verify_workspace(const assay_verify_args *args); /* 0 when the arguments are out of range */
int assay_verify(const assay_verify_args *args, int variant, int num_threads, void *workspace, size_t workspace_bytes);
/* Philox4x32-10 keyed by seed, counter (position, domain, node): ((x >> 12) + 1/2) 2^-52 of its first 64 bits x, in (0, 1).
 * A draw uses the position of the token it decides. ACCEPT: node is the draft's rank among its present siblings, for
 * traversal the draft's index; TARGET_ONLY, RESIDUAL and BONUS: 0. SAMPLED draws from BONUS. NOISE of token v: node
 * v / 2, the first 64 bits for even v, the last for odd. */
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
/* Lines are asked for `ahead` bytes before they are read; 0: not, which leaves them to the processor's own prefetcher. */
double assay_probe_read(const void *buffer, size_t bytes, int64_t repeats, int64_t ahead, int variant, int num_threads);
/* iterations of the tier's densest int8 dot-product loop; *ops gets multiply-adds times two done in all. */
double assay_probe_int8(int64_t iterations, int variant, int num_threads, double *ops);
double assay_probe_fp32(int64_t iterations, int variant, int num_threads, double *ops);
/* iterations over 2048 float32 in L1 of what a normaliser is: sum exp(x - m), vexp.h's exp; *elements gets how many in all. */
double assay_probe_exp(int64_t iterations, int variant, int num_threads, double *elements);

/* cdef end */

#endif

/* assay on NVIDIA GPUs: the argument of every kernel, and the host side of every op.
 *
 * A kernel takes one argument, a struct by value, declared here and read by the kernels (C++), by the launcher (C) and, between
 * the cdef markers, by Python's cffi: plain C with fixed-width fields. Pointers are the device's. Equations, layouts and
 * statuses are those of assay.h unless said otherwise. */
#ifndef ASSAY_CUDA_H
#define ASSAY_CUDA_H

#include "../assay.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

/* ---- driver, devices, launches --------------------------------------------------------------------------
 * libcuda is opened at the first call that needs it: nothing of CUDA is needed to build or to load this library. Calls
 * use the calling thread's current CUDA context and the caller's stream (NULL: the legacy stream), and can be captured
 * into a graph: once a kernel was launched, or warmed, in a context, a launch of it neither loads, allocates nor waits. */

/* Statuses beside assay.h's. assay_cuda_message() says more: what was found, what was wanted, what to do. */
enum {
    ASSAY_CUDA_ENODRIVER = 16, /* libcuda does not load */
    ASSAY_CUDA_EDRIVER = 17,   /* the driver is older than CUDA 12.0 */
    ASSAY_CUDA_ENODEVICE = 18, /* no GPU, or none of that number */
    ASSAY_CUDA_EARCH = 19,     /* the GPU is older than compute capability 8.0, or lacks what this kernel uses */
    ASSAY_CUDA_EIMAGE = 20,    /* no kernels compiled for this GPU */
    ASSAY_CUDA_ENOMEM = 21,
    ASSAY_CUDA_ESTICKY = 22,   /* a kernel failed before: the context is lost */
    ASSAY_CUDA_ECAPTURE = 23,  /* not while a graph is captured */
    ASSAY_CUDA_ECONTEXT = 24,  /* no context is current on this thread, or it was destroyed */
    ASSAY_CUDA_EFORK = 25,     /* CUDA was started before fork */
    ASSAY_CUDA_ECALL = 26      /* any other refusal by the driver */
};
/* Of this thread's last CUDA call that failed. */
const char *assay_cuda_message(void);

/* Opens ASSAY_CUDA_DRIVER, else libcuda.so.1, once; later calls return what the first did. */
int assay_cuda_open(void);
/* Forgets the driver and all that was loaded (tests). */
void assay_cuda_refresh(void);
/* After assay_cuda_open: the CUDA version that the driver supports, 1000 major + 10 minor, and what was opened. */
int assay_cuda_driver(int *version, const char **path);

typedef struct {
    int32_t ordinal, major, minor;   /* compute capability */
    int32_t sms;
    int32_t smem_optin;              /* bytes a block may use */
    int32_t smem_per_sm, regs_per_sm, threads_per_sm, blocks_per_sm;
    int32_t l2_bytes;
    int32_t clock_khz, memory_clock_khz, memory_bus_bits;
    int32_t ecc, integrated;
    int64_t memory_bytes;
    char name[128];
    uint8_t uuid[16];
} assay_cuda_device;
int assay_cuda_device_count(int *count);
int assay_cuda_device_info(int ordinal, const assay_cuda_device **device);
/* Of the current context: how a plan picks its grid. */
int assay_cuda_here(const assay_cuda_device **device);

/* Kernels, as in kernels.def. unit: the file that holds it; compiled code comes by unit. */
int assay_cuda_kernel_count(void);
int assay_cuda_kernel_info(int i, const char **name, const char **unit, size_t *args_bytes, unsigned *threads,
                           size_t *smem_bytes, unsigned *min_blocks);
/* Where compiled code comes from: called, at most once a unit and device, by the launch or warm-up that needs it. The image
 * (a cubin, or PTX with its final 0) must stay until the next call from the same thread. Returns a status; ASSAY_CUDA_EIMAGE when there
 * is none, with *image a text that says why, or NULL. */
typedef int (*assay_cuda_source)(const char *unit, const assay_cuda_device *device, const void **image, size_t *bytes);
void assay_cuda_set_source(assay_cuda_source source);
/* Loads what the current context lacks of the kernels whose names begin with `prefix` (NULL or "": all that this GPU has). */
int assay_cuda_warm(const char *prefix);
/* ASSAY_OK when the current context's GPU has this kernel; loads it when needed. */
int assay_cuda_ready(const char *kernel);
/* Blocks of this kernel that one multiprocessor holds at a time. */
int assay_cuda_occupancy(const char *kernel, size_t smem, int *blocks);
/* How every plan launches: blocks of the kernel's own size, args by value. A grid with a 0 launches nothing. */
int assay_cuda_launch(const char *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, size_t smem, void *stream,
                      const void *args, size_t args_bytes);
/* dst[0, bytes) = byte, on the stream. */
int assay_cuda_memset(void *dst, int byte, size_t bytes, void *stream);

/* ---- memory, streams, events, graphs: for those who have no other library for it -----------------------------------
 * Thin: a status for the driver's result. push retains the device's primary context and makes it current (on this thread)
 * unless a context of that device already is; *pushed says whether pop must undo it. */
int assay_cuda_push(int ordinal, int *pushed);
int assay_cuda_pop(int pushed);
int assay_cuda_malloc(size_t bytes, void **p);
int assay_cuda_free(void *p);
/* The device of the current driver's pointer; ASSAY_EINVAL when it is none of the device's. */
int assay_cuda_pointer_device(const void *p, int *ordinal);
int assay_cuda_memory(size_t *free_bytes, size_t *total_bytes);
enum { ASSAY_CUDA_TO_DEVICE = 0, ASSAY_CUDA_TO_HOST = 1, ASSAY_CUDA_ON_DEVICE = 2 };
/* Ordered on the stream; to or from pageable host memory it may return late. */
int assay_cuda_copy(void *dst, const void *src, size_t bytes, int kind, void *stream);
int assay_cuda_stream_create(void **stream); /* does not wait for the legacy stream */
int assay_cuda_stream_destroy(void *stream);
int assay_cuda_stream_sync(void *stream);
int assay_cuda_stream_capturing(void *stream, int *capturing);
/* Later work on `stream` waits for what `other` holds now. */
int assay_cuda_stream_wait(void *stream, void *other);
int assay_cuda_event_create(void **event);
int assay_cuda_event_destroy(void *event);
int assay_cuda_event_record(void *event, void *stream);
int assay_cuda_event_sync(void *event);
int assay_cuda_event_elapsed(void *begin, void *end, double *seconds);
int assay_cuda_capture_begin(void *stream);
/* The graph is instantiated: ready to launch many times. */
int assay_cuda_capture_end(void *stream, void **graph);
int assay_cuda_graph_launch(void *graph, void *stream);
int assay_cuda_graph_destroy(void *graph);

/* ---- probes (probe.cuh) ---- */

/* All blocks together read `bytes` from `from`, `repeats` times. */
typedef struct {
    const void *from;
    uint64_t bytes;            /* a multiple of 16 */
    uint32_t repeats, unused;
    uint32_t *sink;            /* [blocks]: the exclusive or of what the block read */
} assay_probe_read_args;
/* sink, unless null, gets the value. */
typedef struct {
    uint32_t *sink;
    uint32_t value, unused;
} assay_probe_empty_args;
typedef struct {
    void *to;
    uint64_t bytes;            /* a multiple of 16 */
    uint32_t value, repeats;
} assay_probe_write_args;
/* Each warp does 8 repeats mma instructions (m16n8k16, or m16n8k32 of bytes) with every register of A and B the same. */
typedef struct {
    uint32_t a, b, repeats, unused;
    void *sink;                /* [threads of all blocks], float32 or int32: the sum of the thread's accumulators */
} assay_probe_mma_args;
/* Thread i adds 1 to counters[i % slots], repeats times. */
typedef struct {
    uint32_t *counters;
    uint32_t slots, repeats;
} assay_probe_atomic_args;

/* ---- INT4 GEMM (w4a16_gemm.cuh, w4a8_gemm.cuh, w4_gemv.cuh; host side w4_gemm.c) ------------------------------
 * C[M,N] = A[M,K] @ W[N,K].T as in assay.h; weights packed by assay_cuda_w4_pack (w4_layout.h). K and N below 2^24. */
typedef struct {
    const void *data;          /* 16-byte aligned */
    int32_t n, k;
    int32_t group_size;        /* 32, 64, 128 or k */
    int32_t symmetric;
} assay_cuda_w4;

/* A row's group of int8 activations: the scale, and the sum of the codes. */
typedef struct {
    float scale;
    int32_t codes;
} assay_cuda_a8_group;

/* One block of 256 threads for 8 groups of a row (of K padded to a multiple of 128): x = m ceil(units / 8). */
typedef struct {
    const void *a;             /* [M, K] of a_dtype, row stride lda elements */
    int64_t lda;
    int32_t m, k, group_size, a_dtype;
    void *codes;               /* int8 [M, k padded to a multiple of 128], in the order of a8_quantize.cuh */
    assay_cuda_a8_group *groups;   /* [M, G] */
} assay_a8_quantize_args;

/* Blocks share the work by stripes: block x takes `stripe` tiles of K (of 64 values for a16, of 128 for a8), counted through all
 * blocks of 256 columns in turn; y is the block of rows. Columns cut among blocks are summed in the order of K by the block that
 * is last to finish them. */
typedef struct {
    assay_cuda_w4 w;
    const void *a;             /* a16: [M, K] float16 or bfloat16; a8: [M, k_padded] codes in the kernel's order */
    const void *a_groups;      /* a8: [M, G] of assay_cuda_a8_group; a16: unused */
    int64_t lda;               /* elements */
    float *c;
    int64_t ldc;
    int32_t m;
    int32_t aligned;           /* a16: rows of A are 16-byte aligned and k a multiple of 8 */
    int32_t stripe, unused;
    float *partials;           /* [y blocks][2 x blocks][BLOCK_M 256] */
    uint32_t *arrivals;        /* [y blocks][blocks of columns]: zeros before, zeros after */
} assay_w4_gemm_args;

/* A thread for each 16 bytes of [row block][k padded to a multiple of 128 / 64][block_m][128]. */
typedef struct {
    const void *a;
    int64_t lda;
    int32_t m, k, block_m, aligned;
    void *tiles;
} assay_a16_tiles_args;

/* Bytes of the packed form; 0 when the shape is not supported. Arguments of pack as assay_w4_pack's, all on the host. */
size_t assay_cuda_w4_packed_bytes(int64_t n, int64_t k, int64_t group_size, int symmetric);
int assay_cuda_w4_pack(int64_t n, int64_t k, int64_t group_size, const uint8_t *qweight, const uint16_t *scales,
                       const uint8_t *zeros, void *packed);
/* w->data and everything else on the device. The first ASSAY_CUDA_GEMM_ZEROS bytes of a workspace are zeros before its first use, and
 * again after every call. A row's bits do not depend on M or on its place, for M = 1 .. 64 and for M > 64 each, on one
 * kind of device: K is cut among blocks by the shape of W alone up to 64 rows, and not at all beyond. */
enum { ASSAY_CUDA_GEMM_ZEROS = 262144 };
size_t assay_cuda_w4_gemm_workspace(const assay_cuda_w4 *w, int64_t m, int a16);
int assay_cuda_w4a16_gemm(const assay_cuda_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                          void *workspace, size_t workspace_bytes, void *stream);
/* Activations of any dtype, float32 too. group_size k: k at most 2^19. */
int assay_cuda_w4a8_gemm(const assay_cuda_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                         void *workspace, size_t workspace_bytes, void *stream);
/* w4a16 for m <= 8 without a workspace, by a kernel of its own: other bits than the tiles', the same for m = 1 .. 8. */
int assay_cuda_w4a16_gemv(const assay_cuda_w4 *w, const void *a, int a_dtype, int64_t lda, int64_t m, float *c, int64_t ldc,
                          void *stream);

/* ---- draft trees -----------------------------------------------------------------------------------
 * assay_tree_build (assay.h) for `trees` trees of the same number of nodes: every array of that struct has one more, leading
 * dimension [trees], and `retrieve` has room for max(n, 1) (max_depth + 1) values a tree. */
typedef struct {
    int64_t trees, nodes;      /* nodes: 0 .. ASSAY_TREE_MOST_NODES */
    const int32_t *parents, *tokens;
    int64_t max_depth;
    const int64_t *position;   /* [trees], or NULL: 0 */
    int32_t *depth, *first_child, *next_sibling;
    int64_t *positions;        /* this and what follows may be NULL */
    uint8_t *mask;
    uint64_t *mask_words;
    int32_t *retrieve;
    int32_t *info;             /* [trees, 4] */
} assay_cuda_tree_args;
int assay_cuda_tree_build(const assay_cuda_tree_args *args, void *stream);

/* ---- speculative verification ------------------------------------------------------------------------
 * assay_verify (assay.h) with the same rules, tokens, statuses and counters. All rows of a request with present drafts are
 * read, though `counters` tell those that the walk reached. Arrays are read on the device: what assay_verify refuses by their
 * values makes a request's status ASSAY_ROW_BAD_REQUEST. */
enum { ASSAY_ROW_BAD_REQUEST = 6 };
enum { ASSAY_CUDA_VOCAB_BLOCK = 2048 };
typedef struct {
    float largest, sum;        /* sum of exp((l - largest) / T) over the block */
    int32_t first, unused;     /* the first id whose logit is the largest */
} assay_cuda_block;
typedef struct {
    float shift, scale, top, center;
    uint32_t logit_key, distance_key;
    int32_t logit_last, distance_last, cuts, status, token, unused;
    double total, log_total;
} assay_cuda_row;
typedef struct {
    int32_t parent, first_child, last_child, next_sibling, rank, depth, cursor, read;
    double a, c, p, drawn;
    float score;
    int32_t children;
} assay_cuda_node;
/* What the leader of a request's team asks of the other warps. */
typedef struct {
    uint32_t epoch, arrived;
    int32_t kind;
    float scale, c;
    int32_t unused;
    int64_t node, q_row;
} assay_cuda_order;
typedef struct {
    assay_verify_args call;
    int64_t drafts, edits, stops; /* sum K_b, lengths of edit_token_ids and stop_token_ids: bounds for what the arrays say */
    int64_t block_count;
    int64_t team;                 /* blocks of threads that share a request */
    assay_cuda_block *blocks;     /* [rows, block_count]; here begins the workspace */
    assay_cuda_row *rows;         /* [rows] */
    assay_cuda_node *nodes;       /* [rows] */
    int32_t *excluded;            /* [rows] */
    double *masses;               /* [rows, block_count]: the race's times, the entropy's sums; then of the residual at hand */
    double *totals;               /* [rows, block_count] */
    int32_t *tokens;              /* [rows, block_count] */
    assay_cuda_order *orders;     /* [batch] */
    uint32_t *ticket;
} assay_cuda_verify_args;
/* args->call, drafts, edits and stops are the caller's to fill in, the rest is this call's. 0: out of range. */
size_t assay_cuda_verify_workspace(const assay_cuda_verify_args *args);
int assay_cuda_verify(const assay_cuda_verify_args *args, void *workspace, size_t workspace_bytes, void *stream);

/* ---- MoE routing, sorting, combining (moe_route.cuh, moe_align.cuh, moe_combine.cuh) ----------------------------
 * args as assay_moe_route's, in device memory; the kernel's own argument. num_experts is at most ASSAY_CUDA_ROUTE_EXPERTS. A
 * bias that assay_moe_route refuses cannot be seen from the host: a NaN gives every row the status ROW_NAN, plus
 * infinity ROW_INF. */
enum { ASSAY_CUDA_ROUTE_EXPERTS = 2048 };
int assay_cuda_moe_route(const assay_route_args *args, void *stream);

/* assay_moe_offsets and assay_moe_sort in one call, whose sizes stay on the device: arrays have room for the most that the
 * padded counts can add up to, and what is beyond their sum is padding (slot `slots`, expert -1). */
typedef struct {
    const int32_t *topk_ids;           /* [slots] */
    const int32_t *expert_map;         /* [num_experts], or NULL */
    int32_t slots, num_experts, num_local, block_size;
    int32_t most;                      /* assay_cuda_moe_align_most */
    int32_t chunks, chunk_slots;       /* the plan's: runs of slots, a warp each */
    uint32_t *cells;                   /* workspace [num_local, chunks] */
    int64_t *counts;                   /* [num_local] */
    int32_t *offsets;                  /* [num_local + 1] */
    int32_t *sorted_token_ids;         /* [most] */
    int32_t *expert_ids;               /* [most / block_size] */
    int32_t *position;                 /* [slots] */
    int32_t *num_tokens_post_padded;   /* [1]: offsets[num_local] */
    uint32_t *zeros;                   /* [num_zeros]: cleared on the way, for what comes after; or NULL */
    int64_t num_zeros;
} assay_cuda_align_args;
/* The largest sum of padded counts, a multiple of block_size; -1 where an argument is out of range. */
int64_t assay_cuda_moe_align_most(int64_t slots, int64_t num_local, int64_t block_size);
/* most, chunks, chunk_slots and cells are this call's to fill in. */
size_t assay_cuda_moe_align_workspace(const assay_cuda_align_args *args);
int assay_cuda_moe_align(const assay_cuda_align_args *args, void *workspace, size_t workspace_bytes, void *stream);

/* assay_moe_combine, with what an expert layer adds: a bias of each row's expert, which its block of rows names. */
typedef struct {
    const float *y;                    /* [rows, n], row stride ldy */
    int64_t ldy, n;
    const int32_t *position;           /* [tokens, top_k] rows of y, -1 for an empty slot */
    int32_t by_slot, unused;           /* rows of y are slots, and position only says which are empty and whose bias */
    const float *topk_weights;         /* [tokens, top_k], or NULL: all 1 */
    const float *bias;                 /* [experts, n], or NULL; needs: */
    const int32_t *expert_ids;         /* [rows / block_size] */
    int64_t block_size, tokens, top_k;
    float *out;                        /* [tokens, n], row stride ldo */
    int64_t ldo;
} assay_cuda_combine_args;
int assay_cuda_moe_combine(const assay_cuda_combine_args *args, void *stream);

/* ---- MoE: the expert layer (moe_experts.cuh) -----------------------------------------------------------------------
 * One of its two GEMMs, over slots that assay_cuda_moe_align sorted with the kernel's block of rows. */
typedef struct {
    assay_cuda_w4 w;                   /* of the first expert */
    int64_t expert_bytes;              /* from an expert's weights to the next's */
    const void *a;                     /* a16: [rows, K] of 16 bits; a8: codes as assay_a8_quantize_args has them */
    const void *a_groups;              /* a8: assay_cuda_a8_group [rows, G] */
    int64_t lda;
    int32_t aligned;                   /* as assay_w4_gemm_args' */
    int32_t slots, slots_a_row;        /* slot s multiplies row s / slots_a_row of a */
    int32_t down;                      /* 0: gate_up; 1: down */
    const int32_t *sorted_token_ids, *expert_ids, *num_tokens_post_padded;
    const float *bias;                 /* gate_up: [E, N], or NULL */
    int32_t intermediate, gated, activation;
    float alpha, limit;                /* limit: infinity for none */
    int32_t unused;
    void *out;                         /* gate_up: hidden units [slots, I], of a's type or, a8, float32; down: float32 [slots, N] */
    int64_t ldo;                       /* even */
    float *partials;                   /* [z blocks, slots, N up to a multiple of 32], where there is more than one z */
    uint32_t *arrivals;                /* [x blocks, y blocks], zeros */
} assay_cuda_experts_args;

/* out[slot] = x[slot / top_k] * topk_weights[slot], rounded to out_dtype. */
typedef struct {
    const void *x;
    int64_t ldx, n, top_k;
    const float *topk_weights;
    void *out;
    int64_t ldo;
    int32_t dtype, out_dtype;
} assay_cuda_weigh_args;

/* assay_moe_experts with everything in device memory: matrices packed by assay_cuda_w4_pack, end to end; row_blocks NULL.
 * a16: x is float16 or bfloat16, and hidden units (and weighed inputs) are rounded to its type. a8: hidden units are float32, as on
 * the CPU, whose bits a call of more than ASSAY_CUDA_SPLIT_TOKENS tokens has; up to so many K is cut among blocks by the
 * layer's shape and top_k. So a token's bits do not depend on the batch, up to that many and beyond it. */
enum { ASSAY_CUDA_SPLIT_TOKENS = 64 };
size_t assay_cuda_moe_experts_workspace(const assay_experts_args *args);
int assay_cuda_moe_experts(const assay_experts_args *args, void *workspace, size_t workspace_bytes, void *stream);

/* cdef end */

#ifdef __cplusplus
}
#endif

#endif

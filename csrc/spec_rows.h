/* Rows of logits as verification sees them: read once in blocks, processed on the way, drawn from. spec_rules.c decides by
 * them what stands. Inside the library only. */
#ifndef ASSAY_SPEC_ROWS_H
#define ASSAY_SPEC_ROWS_H

#include "kernels.h"

#include "cpu/spec_verify/spec_verify.h"

/* What is known of one block of the row at hand. */
typedef struct {
    float largest, sum; /* s_b relative to its own largest element */
    double factor;      /* the largest element's weight relative to the row's largest: s_b times it is the block's weight */
    union {
        struct {
            double mass, total; /* of the draw at hand; of mean_exponent */
        };
        float masses[ASSAY_SPEC_SHARES]; /* of assay_spec_residuals */
    };
    int64_t token;      /* of the race */
} assay_spec_block;

/* A token that penalties or a bias touch, for the row at hand. */
typedef struct {
    int32_t token, count, seen;
    float bias;
} assay_spec_edit;

enum { CUT_LOGITS = 1, CUT_MIN_P = 2, CUT_TYPICAL = 4 };

/* What a row's first reading leaves behind: enough for its probabilities without reading it again. */
typedef struct {
    float shift, scale;  /* p(x) = vexp((l_x - shift) * inverse_t) * scale */
    double total;        /* sum of exp((l - shift) / T) */
    int cuts;            /* which of the following apply */
    float top;           /* the largest element before the cuts */
    float center;        /* mean of (l - top) / T: typical_p goes by the distance from it */
    assay_range by_logit, by_distance; /* what top_k and top_p leave, and typical_p */
    float least;         /* nothing below it is kept */
    double log_total;    /* for log-probabilities: of the uncut row, temperature 1 where the request is greedy */
} assay_spec_row_state;

/* Node 0 is the root, node j + 1 is draft j. Links are node numbers, 0: none. */
typedef struct {
    int32_t parent, first_child, last_child, next_sibling, rank, depth;
    int32_t cursor;        /* traversal: the next child to try */
    int read;
    double a, c, p, drawn; /* traversal; drawn: draft mass of the rejected children */
    float score;
    assay_spec_row_state row;
} assay_spec_node;

/* Elements of the row at hand among which a cut is looked for: their place in the order, which falls, and their weights. Beside
 * them a sample of all. */
enum { ASSAY_SPEC_CANDIDATES = 16384, ASSAY_SPEC_SAMPLE = 4096, ASSAY_SPEC_HEAVY = 1024 };
typedef struct {
    float values[ASSAY_SPEC_CANDIDATES + ASSAY_VOCAB_BLOCK + 16], weights[ASSAY_SPEC_CANDIDATES + ASSAY_VOCAB_BLOCK + 16];
    float sampled[ASSAY_SPEC_SAMPLE + ASSAY_SPEC_HEAVY + 2 * ASSAY_VOCAB_BLOCK + 16];
    float sampled_weights[ASSAY_SPEC_SAMPLE + ASSAY_SPEC_HEAVY + 2 * ASSAY_VOCAB_BLOCK + 16];
} assay_spec_candidates;

/* Where the workspace of a call begins: of each kind one piece for each request. */
typedef struct {
    const assay_verify_args *a;
    const assay_spec_verify_kernel *kernel;
    assay_spec_block *blocks;
    assay_spec_node *nodes;            /* K_b + 1 each */
    assay_spec_edit *edits;            /* its edits and K_b each */
    int32_t *excluded;                 /* K_b each */
    assay_spec_candidates *candidates; /* NULL where nothing is filtered */
    int64_t block_count;
    int threads;                       /* that share a row; 1 when requests are shared out instead */
} assay_spec_call;

/* One request and its row at hand. */
typedef struct {
    const assay_spec_call *call;
    int64_t b, first, drafts;
    assay_spec_block *blocks;
    assay_spec_node *nodes;
    int32_t *excluded;                 /* ids, excluded_count of them */
    int64_t excluded_count;
    int32_t *counters;
    const double *given;               /* the caller's uniforms */
    int greedy;
    float inverse_t;

    int64_t node;                      /* whose row is at hand; -1: none */
    int whole;                         /* its blocks are filled in, not only its state */
    int uncut;                         /* its blocks are as they were before the cuts */
    const uint8_t *logits;
    int sums, processed;
    int64_t unit;                      /* blocks that a thread takes at a time */
    assay_spec_edit *edits;
    int64_t edit_count;
    const uint32_t *mask;
    assay_spec_row_state s;

    int64_t q_row;                     /* of draft_probs; -1: none */
    double a, c;                       /* of the residual in blocks[].mass */
    float scales[ASSAY_SPEC_SHARES];   /* of those in blocks[].masses */
} assay_spec_request;

double assay_spec_uniform(const assay_spec_request *r, uint32_t domain, int64_t node, int64_t depth, uint32_t key_node);
/* Makes node's row the one at hand; whole: its blocks too. Returns a row status. */
int assay_spec_open(assay_spec_request *r, int64_t node, int whole);
int32_t assay_spec_argmax(const assay_spec_request *r);
float assay_spec_probability(const assay_spec_request *r, int32_t token); /* 0 outside the vocabulary */
double assay_spec_q(const assay_spec_request *r, int32_t token);
double assay_spec_log_probability(const assay_spec_request *r, int32_t token);
/* The mean under p of z = (l - shift) / T; *total gets the sum of exp(z), so that the entropy is its logarithm minus the mean. */
double assay_spec_mean_exponent(assay_spec_request *r, double *total);
/* |R(a, c)| of q_row; NaN when q holds what is no probability. */
double assay_spec_residual(assay_spec_request *r, double a, double c);
/* |R(a, 1)| for several a at once, the same numbers: all NaN where q holds what is no probability. Not counted. */
void assay_spec_residuals(assay_spec_request *r, const double a[ASSAY_SPEC_SHARES], double totals[ASSAY_SPEC_SHARES]);
/* The first token whose cumulated weight exceeds the target, in the residual of the last assay_spec_residual. */
int32_t assay_spec_draw_residual(assay_spec_request *r, double target);
/* A token of p. */
int32_t assay_spec_draw(assay_spec_request *r, double u);
/* Weight of the row without the excluded ids (of s.total), and a token of it; -1 when nothing is left. */
double assay_spec_mass_without(assay_spec_request *r);
int32_t assay_spec_draw_without(assay_spec_request *r, double u);
/* The winner of the exponential race. */
int32_t assay_spec_race(assay_spec_request *r);

/* spec_process.c: processors and filters. */
float assay_spec_edited(const assay_spec_request *r, const assay_spec_edit *edit, float logit);
void assay_spec_path_edits(assay_spec_request *r, int64_t node);
/* Element `token` as the filters leave it: minus infinity where they drop it. */
float assay_spec_element(const assay_spec_request *r, int64_t token);
/* Block b of the row as processors and filters leave it: the logits themselves, or float32 in `buffer`. */
const void *assay_spec_view(const assay_spec_request *r, int64_t b, float *buffer, int *dtype);
static inline int assay_spec_inside(const assay_range *range, float x, int64_t id) {
    return (x > range->low && x < range->high) || (x >= range->least && x <= range->most && id <= range->last);
}

/* An order and how much of it to keep. Values fall: the logit, or minus the distance of -log p from the entropy. */
typedef struct {
    int by_distance;
    int64_t elements;      /* so many, where not 0 */
    double target, total;  /* so much weight, of so much there is */
    float center;
    float least;           /* of all logits that can matter: it may be wrong, which costs a pass */
} assay_spec_order;

static inline double assay_mass_value(assay_mass m) {
    const int64_t carry = m.low >> 23; /* rounds down */
    return (double)(m.high + carry) * 0x1p-23 + (double)(m.low - carry * (1 << 23)) * 0x1p-46;
}
static inline assay_mass assay_mass_sum(assay_mass a, assay_mass b) { return (assay_mass){a.high + b.high, a.low + b.low}; }

/* spec_select.c. The logit z T from the top, or a little less. */
float assay_spec_logit_at(const assay_spec_request *r, double z);
/* Of n logits: places in the order, over them, and weights. */
void assay_spec_arrange(const assay_spec_request *r, const assay_spec_order *o, float *values, float *weights, int64_t n);
/* What lies above `high` and what equals it; returns how many lie strictly between low and high. The first of them, up to
 * ASSAY_SPEC_CANDIDATES, are left among the candidates. */
int64_t assay_spec_gather(const assay_spec_request *r, const assay_spec_order *o, float low, float high, assay_mass *above,
                          assay_mass *equal);
/* The value of the class of equals with which there is enough, what lies before it, and whether it has one element. Returns 0
 * when all is not enough. */
int assay_spec_find_class(const assay_spec_request *r, assay_spec_order *o, float *value, assay_mass *before, int *alone);

/* spec_filter.c: finds the cuts of the row at hand. */
int assay_spec_has_filters(const assay_spec_request *r);
void assay_spec_find_cuts(assay_spec_request *r);

/* spec_kseq.c: rho of the row at hand and `count` siblings drawn from q_row; NaN when q holds what is no probability. */
double assay_spec_kseq_rho(assay_spec_request *r, int64_t count);
/* 1 - (1 - beta)^count. */
double assay_spec_any_of(double beta, int64_t count);

/* spec_rules.c: one request, by its rule; returns a row status. */
int assay_spec_walk(assay_spec_request *r, int32_t *out, int32_t *path, float *logprobs, int32_t *accepted);

static inline int64_t assay_spec_block_length(const assay_spec_request *r, int64_t b) {
    return assay_min_i64(ASSAY_VOCAB_BLOCK, r->call->a->vocab - b * ASSAY_VOCAB_BLOCK);
}
static inline const void *assay_spec_raw(const assay_spec_request *r, int64_t b) {
    return r->logits + b * ASSAY_VOCAB_BLOCK * (r->call->a->dtype == ASSAY_F32 ? 4 : 2);
}

/* Runs fn over units of r->unit blocks, threads sharing them where that pays. */
void assay_spec_for_blocks(assay_spec_request *r, assay_range_fn fn, int with_exp);
static inline int64_t assay_spec_end_of(const assay_spec_request *r, int64_t end) {
    return assay_min_i64(end * r->unit, r->call->block_count);
}
static inline double assay_spec_block_weight(const assay_spec_block *block) {
    return block->sum > 0 ? (double)block->sum * block->factor : 0;
}

#endif

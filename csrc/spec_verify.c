/* Chain verification: which draft tokens stand, and which token follows them. The rules, the random numbers, and the
 * order of every sum over blocks are here, once; the passes over a block are the variants' (cpu/spec_verify/).
 *
 * A row of logits becomes, per block of ASSAY_VOCAB_BLOCK, its largest element m_b and s_b = sum exp((l - m_b) / T): one
 * pass. With M = max m_b and c_b = exp((m_b - M) / T), the normaliser is S = sum s_b c_b (double, b ascending), and
 * p(x) = vexp((l_x - M) / T) * (float)(1 / S).
 * Sampling from p needs one block again: the first with cumulated s_b c_b > u S. The residual (p - q)+ needs one pass
 * more over p and q, for its block sums, and then one block. */
#include "kernels.h"
#include "philox.h"

#include "cpu/float16.h"
#include "cpu/spec_verify/spec_verify.h"
#include "cpu/vexp.h"

#include <float.h>

enum { GREEDY = 0, REJECTION = 1 };
enum { DOMAIN_ACCEPT = 1, DOMAIN_RESIDUAL = 2, DOMAIN_BONUS = 3 };
/* Blocks that a thread takes at a time when threads share a row; work (in elements read once) below which they do not
 * share: a dispatch costs what one thread does with that much. */
enum { BLOCKS_A_UNIT = 4, SHARE_ELEMENTS = 1 << 16 };

double assay_uniform(uint64_t seed, int64_t position, uint32_t domain, uint32_t node) {
    uint32_t x[4] = {(uint32_t)(uint64_t)position, (uint32_t)((uint64_t)position >> 32), domain, node};
    assay_philox4x32(x, (uint32_t)seed, (uint32_t)(seed >> 32));
    const uint64_t bits = (uint64_t)x[1] << 32 | x[0];
    /* 52 bits, so that adding a half is exact: never 0, never 1. */
    return ((double)(bits >> 12) + 0.5) * 0x1p-52;
}

/* What is known of one block of the row at hand. */
typedef struct {
    float largest, sum, residual;
} block_part;

typedef struct {
    const assay_chain_args *a;
    const assay_spec_verify_kernel *kernel;
    block_part *parts;      /* of each request: blocks of them */
    int64_t blocks;
    int threads;            /* that share a row; 1 when requests are shared out instead */
} verification;

/* One row of logits of one request. */
typedef struct {
    const verification *v;
    block_part *parts;
    const uint8_t *logits;
    int64_t element;
    int greedy;
    float inverse_t;
    float shift, scale;     /* p(x) = vexp((l_x - shift) * inverse_t) * scale */
    double total;           /* sum of exp((l - shift) / T) */
    const float *q;
} target_row;

static int64_t block_length(const target_row *r, int64_t b) {
    return assay_min_i64(ASSAY_VOCAB_BLOCK, r->v->a->vocab - b * ASSAY_VOCAB_BLOCK);
}
static const void *block_at(const target_row *r, int64_t b) {
    return r->logits + b * ASSAY_VOCAB_BLOCK * r->element;
}

static void scan_blocks(void *arg, int64_t begin, int64_t end) {
    target_row *r = arg;
    const assay_spec_verify_kernel *k = r->v->kernel;
    _Alignas(64) float scratch[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * BLOCKS_A_UNIT; b < assay_min_i64(end * BLOCKS_A_UNIT, r->v->blocks); b++) {
        block_part *part = &r->parts[b];
        const int64_t n = block_length(r, b);
        part->sum = 0;
        part->largest = k->largest(block_at(r, b), r->v->a->dtype, n);
        if (!r->greedy && isfinite(part->largest))
            part->sum = k->weights(block_at(r, b), r->v->a->dtype, n, part->largest, r->inverse_t, scratch);
    }
}

static void residual_blocks(void *arg, int64_t begin, int64_t end) {
    target_row *r = arg;
    _Alignas(64) float scratch[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * BLOCKS_A_UNIT; b < assay_min_i64(end * BLOCKS_A_UNIT, r->v->blocks); b++)
        r->parts[b].residual =
            r->v->kernel->residual(block_at(r, b), r->v->a->dtype, block_length(r, b), r->shift, r->inverse_t, r->scale,
                                   r->q + b * ASSAY_VOCAB_BLOCK, scratch);
}

static void for_blocks(target_row *r, assay_range_fn fn) {
    const int64_t units = (r->v->blocks + BLOCKS_A_UNIT - 1) / BLOCKS_A_UNIT;
    /* A pass with exp takes some four times as long as one without. */
    if (r->v->threads > 1 && r->v->a->vocab * (r->greedy ? 1 : 4) >= SHARE_ELEMENTS)
        assay_parallel_for(fn, r, units, r->v->threads, 1);
    else
        fn(r, 0, units);
}

static double weight_of_block(const target_row *r, int64_t b) {
    const float m = r->parts[b].largest;
    if (!(r->parts[b].sum > 0)) return 0;
    return (double)r->parts[b].sum * (double)assay_vexp((m - r->shift) * r->inverse_t);
}

static double weight_of_row(const target_row *r) {
    double total = 0;
    for (int64_t b = 0; b < r->v->blocks; b++) total += weight_of_block(r, b);
    return total;
}

/* Reads the row: shift, and unless greedy its normaliser. Returns the row's status. */
static int read_row(target_row *r) {
    for_blocks(r, scan_blocks);
    r->shift = -INFINITY;
    for (int64_t b = 0; b < r->v->blocks; b++) {
        const float m = r->parts[b].largest;
        if (isnan(m)) return ASSAY_ROW_NAN;
        if (m > r->shift) r->shift = m;
    }
    if (r->shift == INFINITY) return ASSAY_ROW_INF;
    if (r->shift == -INFINITY) return ASSAY_ROW_EMPTY;
    if (r->greedy) return ASSAY_ROW_OK;
    r->total = weight_of_row(r);
    r->scale = (float)(1.0 / r->total);
    return ASSAY_ROW_OK;
}

static int32_t argmax_of_row(const target_row *r) {
    int64_t b = 0;
    while (r->parts[b].largest != r->shift) b++;
    return (int32_t)(b * ASSAY_VOCAB_BLOCK +
                     r->v->kernel->find(block_at(r, b), r->v->a->dtype, block_length(r, b), r->shift));
}

static float probability(const target_row *r, int32_t token) {
    const float l = assay_load_f32(r->logits, r->v->a->dtype, token);
    return assay_vexp((l - r->shift) * r->inverse_t) * r->scale;
}

/* The first element of a block whose cumulated weight exceeds the target, `before` being what lies before the block.
 * Groups of 16 are summed (folded as in vexp.h) and passed over first. When rounding leaves the target beyond the end:
 * the last element of positive weight. */
static int64_t pick_in_block(const float *weights, int64_t n, double factor, double before, double target) {
    double at = before;
    int64_t group = -1, last = 0;
    double last_at = before;
    for (int64_t g = 0; g < (n + 15) / 16; g++) {
        const double w = (double)assay_fold16(weights + 16 * g) * factor;
        if (at + w > target) {
            group = g;
            break;
        }
        if (w > 0) {
            last = g;
            last_at = at;
        }
        at += w;
    }
    if (group < 0) {
        group = last;
        at = last_at;
        target = INFINITY;
    }
    int64_t found = 16 * group;
    for (int64_t i = 16 * group; i < 16 * group + 16; i++) {
        const double w = (double)weights[i] * factor;
        if (w > 0) found = i;
        if (at + w > target) break;
        at += w;
    }
    return found;
}

/* The block that holds the target of cumulated weights, and what lies before it; the last positive one on overrun. */
typedef struct {
    int64_t block;
    double before, target;
} place;

static place place_of(const target_row *r, double target, int of_residual) {
    place found = {0, 0, INFINITY};
    double at = 0;
    for (int64_t b = 0; b < r->v->blocks; b++) {
        const double w = of_residual ? (double)r->parts[b].residual : weight_of_block(r, b);
        if (at + w > target) return (place){b, at, target};
        if (w > 0) found = (place){b, at, INFINITY};
        at += w;
    }
    return found;
}

/* A token from p, or from p without `excluded` (-1: none). -1 when nothing is left to choose from. */
static int32_t sample_target(target_row *r, double u, int32_t excluded) {
    _Alignas(64) float w[ASSAY_VOCAB_BLOCK];
    const assay_spec_verify_kernel *k = r->v->kernel;
    const int64_t excluded_block = excluded < 0 ? -1 : excluded / ASSAY_VOCAB_BLOCK;
    double total = r->total;
    float kept = 0;
    if (excluded_block >= 0 && r->parts[excluded_block].sum > 0) {
        block_part *part = &r->parts[excluded_block];
        const int64_t n = block_length(r, excluded_block);
        float lane[16] = {0};
        kept = part->sum;
        k->weights(block_at(r, excluded_block), r->v->a->dtype, n, part->largest, r->inverse_t, w);
        w[excluded % ASSAY_VOCAB_BLOCK] = 0;
        for (int64_t i = 0; i < assay_round_up(n, 16); i++) lane[i % 16] += w[i];
        part->sum = assay_fold16(lane);
        total = weight_of_row(r);
    }
    int64_t token = -1;
    if (total > 0) {
        const place at = place_of(r, u * total, 0);
        const block_part *part = &r->parts[at.block];
        const int64_t n = block_length(r, at.block);
        k->weights(block_at(r, at.block), r->v->a->dtype, n, part->largest, r->inverse_t, w);
        if (at.block == excluded_block) w[excluded % ASSAY_VOCAB_BLOCK] = 0;
        const double factor = (double)assay_vexp((part->largest - r->shift) * r->inverse_t);
        token = at.block * ASSAY_VOCAB_BLOCK + pick_in_block(w, n, factor, at.before, at.target);
    }
    if (kept > 0) r->parts[excluded_block].sum = kept;
    return (int32_t)token;
}

/* A token from the normalised (p - q)+, after x was rejected. Where nothing is left of it (p = q but for rounding), from p.
 * Returns a status; the draft's row must hold probabilities. */
static int sample_residual(target_row *r, int32_t x, double u, int32_t *token) {
    if (!r->q) {
        *token = sample_target(r, u, x);
    } else {
        double total = 0;
        for_blocks(r, residual_blocks);
        for (int64_t b = 0; b < r->v->blocks; b++) total += (double)r->parts[b].residual;
        if (isnan(total)) return ASSAY_ROW_NAN;
        *token = -1;
        if (total > 0) {
            _Alignas(64) float w[ASSAY_VOCAB_BLOCK];
            const place at = place_of(r, u * total, 1);
            const int64_t n = block_length(r, at.block);
            r->v->kernel->residual(block_at(r, at.block), r->v->a->dtype, n, r->shift, r->inverse_t, r->scale,
                                   r->q + at.block * ASSAY_VOCAB_BLOCK, w);
            *token = (int32_t)(at.block * ASSAY_VOCAB_BLOCK + pick_in_block(w, n, 1, at.before, at.target));
        }
    }
    if (*token < 0) *token = sample_target(r, u, -1);
    return ASSAY_ROW_OK;
}

/* Request b. Writes its output row up to and with the token after the accepted ones; returns its status. */
static int verify_request(const verification *v, int64_t b, int32_t *out, int32_t *accepted) {
    const assay_chain_args *a = v->a;
    const int64_t first = a->cu_num_draft_tokens[b], drafts = a->cu_num_draft_tokens[b + 1] - first;
    const int32_t *draft = a->draft_token_ids + first;
    int64_t length = 0;
    for (; length < drafts && draft[length] != -1; length++)
        if (draft[length] < 0 || draft[length] >= a->vocab) return ASSAY_ROW_BAD_ID;

    const float t = a->temperature[b];
    target_row r = {.v = v, .parts = v->parts + b * v->blocks, .element = a->dtype == ASSAY_F32 ? 4 : 2};
    r.greedy = a->rule == GREEDY || t == 0;
    /* Kept from overflow and underflow, where 0 * infinity would make a NaN. */
    r.inverse_t = r.greedy ? 1 : fminf(fmaxf(1.0f / t, FLT_MIN), FLT_MAX);
    const double *given = a->uniforms ? a->uniforms + first + 2 * b : NULL;
    for (int64_t i = 0; i <= length; i++) {
        r.logits = (const uint8_t *)a->target_logits + (first + b + i) * a->ld * r.element;
        const int status = read_row(&r);
        if (status) return status;
        const int64_t position = (int64_t)((uint64_t)a->position[b] + (uint64_t)i);
        const int bonus = i == length;
        *accepted = (int32_t)i;
        if (r.greedy) {
            out[i] = argmax_of_row(&r);
            if (bonus || out[i] != draft[i]) return ASSAY_ROW_OK;
            continue;
        }
        if (bonus) {
            const double u = given ? given[drafts + 1] : assay_uniform(a->seed[b], position, DOMAIN_BONUS, 0);
            out[i] = sample_target(&r, u, -1);
            return ASSAY_ROW_OK;
        }
        const int32_t x = draft[i];
        const double u = given ? given[i] : assay_uniform(a->seed[b], position, DOMAIN_ACCEPT, 0);
        r.q = a->draft_probs ? a->draft_probs + (first + i) * a->vocab : NULL;
        const double q = r.q ? (double)r.q[x] : 1;
        if (!(q >= 0 && q <= FLT_MAX)) return ASSAY_ROW_NAN;
        if (u * q < (double)probability(&r, x)) {
            out[i] = x;
            continue;
        }
        const double again = given ? given[drafts] : assay_uniform(a->seed[b], position, DOMAIN_RESIDUAL, 0);
        return sample_residual(&r, x, again, &out[i]);
    }
    return ASSAY_ROW_OK;
}

static void verify_requests(void *arg, int64_t begin, int64_t end) {
    const verification *v = arg;
    const assay_chain_args *a = v->a;
    for (int64_t b = begin; b < end; b++) {
        int32_t *out = a->output_token_ids + b * a->max_out;
        int32_t accepted = 0;
        const int status = verify_request(v, b, out, &accepted);
        /* Nothing of a request with a poisoned row is emitted, not even what preceded it. */
        if (status) accepted = -1;
        for (int64_t i = accepted + 1; i < a->max_out; i++) out[i] = -1;
        a->num_accepted[b] = accepted < 0 ? 0 : accepted;
        a->status[b] = status;
    }
}

size_t assay_chain_verify_workspace(int64_t batch, int64_t vocab) {
    if (batch < 0 || batch > INT32_MAX || vocab < 1 || vocab > INT32_MAX) return 0;
    const int64_t blocks = (vocab + ASSAY_VOCAB_BLOCK - 1) / ASSAY_VOCAB_BLOCK;
    return (size_t)(batch * blocks) * sizeof(block_part) + 64;
}

int assay_chain_verify(const assay_chain_args *a, int variant, int num_threads, void *workspace,
                       size_t workspace_bytes) {
    if (!a || a->dtype < ASSAY_F32 || a->dtype > ASSAY_BF16 || num_threads < 0) return ASSAY_EINVAL;
    const size_t needed = assay_chain_verify_workspace(a->batch, a->vocab);
    if (!needed || a->ld < a->vocab || (a->rule != GREEDY && a->rule != REJECTION)) return ASSAY_EINVAL;
    const assay_spec_verify_kernel *kernel = assay_select(ASSAY_OP_spec_verify, variant);
    if (!kernel) return ASSAY_EISA;
    if (!a->batch) return ASSAY_OK;
    const int32_t *cu = a->cu_num_draft_tokens;
    if (!a->target_logits || !cu || !a->temperature || !a->output_token_ids || !a->num_accepted || !a->status ||
        cu[0] != 0)
        return ASSAY_EINVAL;
    int sampled = 0;
    for (int64_t b = 0; b < a->batch; b++) {
        if (cu[b + 1] < cu[b] || (int64_t)cu[b + 1] - cu[b] + 1 > a->max_out) return ASSAY_EINVAL;
        if (!(a->temperature[b] >= 0 && a->temperature[b] <= FLT_MAX)) return ASSAY_EINVAL;
        sampled |= a->rule == REJECTION && a->temperature[b] > 0;
    }
    if ((cu[a->batch] && !a->draft_token_ids) || (sampled && !a->uniforms && (!a->seed || !a->position)))
        return ASSAY_EINVAL;
    if (!workspace || workspace_bytes < needed) return ASSAY_EWORKSPACE;

    verification v = {.a = a, .kernel = kernel, .blocks = (a->vocab + ASSAY_VOCAB_BLOCK - 1) / ASSAY_VOCAB_BLOCK};
    v.parts = (block_part *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    const int threads = num_threads ? num_threads : assay_num_threads();
    /* Enough requests: one a thread at a time. Few: threads share each row. */
    if (threads == 1 || a->batch < threads) {
        v.threads = threads;
        verify_requests(&v, 0, a->batch);
        return ASSAY_OK;
    }
    v.threads = 1;
    const int wake = a->batch * a->vocab * (sampled ? 4 : 1) >= SHARE_ELEMENTS;
    return assay_parallel_for(verify_requests, &v, a->batch, threads, wake);
}

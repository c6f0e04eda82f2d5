/* What is drawn from a row that was read (spec_rows.c): q beside it, residuals, tokens, the race, the mean exponent. */
#include "spec_rows.h"

#include "cpu/spec_verify/race.h"
#include "cpu/vexp.h"

/* ---- q ----------------------------------------------------------------------------------------------- */

/* The first of row q_row's sparse entries with this id or a greater one. */
static int64_t first_entry(const assay_spec_request *r, int64_t id) {
    const assay_verify_args *a = r->call->a;
    const int32_t *ids = a->draft_prob_ids + r->q_row * a->draft_prob_width;
    int64_t low = 0, high = a->draft_prob_width;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (ids[middle] < id) low = middle + 1;
        else high = middle;
    }
    return low;
}

double assay_spec_q(const assay_spec_request *r, int32_t token) {
    const assay_verify_args *a = r->call->a;
    if (token < 0 || token >= a->vocab) return 0;
    if (a->draft_probs) return (double)a->draft_probs[r->q_row * a->vocab + token];
    float q = 0;
    const int64_t start = r->q_row * a->draft_prob_width;
    for (int64_t i = first_entry(r, token); i < a->draft_prob_width && a->draft_prob_ids[start + i] == token; i++)
        q += a->draft_prob_values[start + i];
    return (double)q;
}

/* q over block b. */
static const float *q_view(const assay_spec_request *r, int64_t b, float *buffer) {
    const assay_verify_args *a = r->call->a;
    const int64_t from = b * ASSAY_VOCAB_BLOCK, n = assay_spec_block_length(r, b);
    if (a->draft_probs) return a->draft_probs + r->q_row * a->vocab + from;
    const int64_t start = r->q_row * a->draft_prob_width;
    for (int64_t i = 0; i < n; i++) buffer[i] = 0;
    for (int64_t i = first_entry(r, from); i < a->draft_prob_width && a->draft_prob_ids[start + i] < from + n; i++)
        buffer[a->draft_prob_ids[start + i] - from] += a->draft_prob_values[start + i];
    return buffer;
}

/* ---- residuals ---------------------------------------------------------------------------------------- */

static float residual_of_block(const assay_spec_request *r, int64_t b, float *out) {
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK], q[ASSAY_VOCAB_BLOCK];
    int dtype;
    const void *view = assay_spec_view(r, b, buffer, &dtype);
    return r->call->kernel->residual(view, dtype, assay_spec_block_length(r, b), r->s.shift, r->inverse_t,
                                     (float)((double)r->s.scale * r->a), q_view(r, b, q), (float)r->c, out);
}

static void residual_blocks(void *arg, int64_t begin, int64_t end) {
    assay_spec_request *r = arg;
    _Alignas(64) float out[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < assay_spec_end_of(r, end); b++)
        r->blocks[b].mass = (double)residual_of_block(r, b, out);
}

static double mass_of_row(const assay_spec_request *r) {
    double total = 0;
    for (int64_t b = 0; b < r->call->block_count; b++) total += r->blocks[b].mass;
    return total;
}

double assay_spec_residual(assay_spec_request *r, double a, double c) {
    r->counters[ASSAY_ROWS_RESAMPLED]++;
    r->a = a;
    r->c = c;
    assay_spec_for_blocks(r, residual_blocks, 1);
    return mass_of_row(r);
}

static void residuals_blocks(void *arg, int64_t begin, int64_t end) {
    assay_spec_request *r = arg;
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK], q[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < assay_spec_end_of(r, end); b++) {
        int dtype;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        r->call->kernel->residuals(view, dtype, assay_spec_block_length(r, b), r->s.shift, r->inverse_t, r->scales,
                                   q_view(r, b, q), r->blocks[b].masses);
    }
}

void assay_spec_residuals(assay_spec_request *r, const double a[ASSAY_SPEC_SHARES], double totals[ASSAY_SPEC_SHARES]) {
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++) {
        r->scales[j] = (float)((double)r->s.scale * a[j]);
        totals[j] = 0;
    }
    assay_spec_for_blocks(r, residuals_blocks, 1);
    for (int64_t b = 0; b < r->call->block_count; b++)
        for (int j = 0; j < ASSAY_SPEC_SHARES; j++) totals[j] += (double)r->blocks[b].masses[j];
}

/* ---- draws -------------------------------------------------------------------------------------------- */

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

/* The block that holds the target of cumulated masses, and what lies before it; the last positive one on overrun. */
typedef struct {
    int64_t block;
    double before, target;
} place;

static place place_of(const assay_spec_request *r, double target) {
    place found = {0, 0, INFINITY};
    double at = 0;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        const double w = r->blocks[b].mass;
        if (at + w > target) return (place){b, at, target};
        if (w > 0) found = (place){b, at, INFINITY};
        at += w;
    }
    return found;
}

int32_t assay_spec_draw_residual(assay_spec_request *r, double target) {
    _Alignas(64) float w[ASSAY_VOCAB_BLOCK];
    const place at = place_of(r, target);
    residual_of_block(r, at.block, w);
    return (int32_t)(at.block * ASSAY_VOCAB_BLOCK +
                     pick_in_block(w, assay_spec_block_length(r, at.block), 1, at.before, at.target));
}

/* Weights of block b relative to its largest element, without the excluded ids; *touched: whether there were any. */
static void weights_without(const assay_spec_request *r, int64_t b, float *w, int *touched) {
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    int dtype;
    const void *view = assay_spec_view(r, b, buffer, &dtype);
    r->call->kernel->weights(view, dtype, assay_spec_block_length(r, b), r->blocks[b].largest, r->inverse_t, w);
    for (int64_t i = 0; i < r->excluded_count; i++)
        if (r->excluded[i] / ASSAY_VOCAB_BLOCK == b) {
            w[r->excluded[i] % ASSAY_VOCAB_BLOCK] = 0;
            *touched = 1;
        }
}

double assay_spec_mass_without(assay_spec_request *r) {
    for (int64_t b = 0; b < r->call->block_count; b++) r->blocks[b].mass = assay_spec_block_weight(&r->blocks[b]);
    for (int64_t i = 0; i < r->excluded_count; i++) {
        const int64_t b = r->excluded[i] / ASSAY_VOCAB_BLOCK;
        if (!(r->blocks[b].sum > 0)) continue;
        _Alignas(64) float w[ASSAY_VOCAB_BLOCK];
        int touched = 0;
        weights_without(r, b, w, &touched);
        float lane[16] = {0};
        const int64_t padded = assay_round_up(assay_spec_block_length(r, b), 16);
        for (int64_t j = 0; j < padded; j++) lane[j % 16] += w[j];
        r->blocks[b].mass = (double)assay_fold16(lane) * r->blocks[b].factor;
    }
    return mass_of_row(r);
}

int32_t assay_spec_draw_without(assay_spec_request *r, double u) {
    const double total = assay_spec_mass_without(r);
    if (!(total > 0)) return -1;
    _Alignas(64) float w[ASSAY_VOCAB_BLOCK];
    const place at = place_of(r, u * total);
    int touched = 0;
    weights_without(r, at.block, w, &touched);
    return (int32_t)(at.block * ASSAY_VOCAB_BLOCK +
                     pick_in_block(w, assay_spec_block_length(r, at.block), r->blocks[at.block].factor, at.before, at.target));
}

int32_t assay_spec_draw(assay_spec_request *r, double u) {
    const int64_t excluded = r->excluded_count;
    r->excluded_count = 0;
    const int32_t token = assay_spec_draw_without(r, u);
    r->excluded_count = excluded;
    return token;
}

static void race_blocks(void *arg, int64_t begin, int64_t end) {
    assay_spec_request *r = arg;
    const assay_verify_args *a = r->call->a;
    const double *given = a->uniforms ? a->uniforms + (r->first + r->b + r->node) * a->vocab : NULL;
    /* The best of the blocks before bounds those that follow: of equal times the first is the winner anyway. */
    assay_race race = {0, 0, INFINITY, 0};
    if (!given) {
        race.seed = a->seed[r->b];
        race.position = (uint64_t)a->position[r->b] + (uint64_t)r->nodes[r->node].depth;
    }
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK], w[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < assay_spec_end_of(r, end); b++) {
        assay_spec_block *block = &r->blocks[b];
        block->mass = INFINITY;
        block->token = b * ASSAY_VOCAB_BLOCK;
        if (!isfinite(block->largest)) continue;
        const int64_t n = assay_spec_block_length(r, b);
        const double before = race.time;
        int dtype;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        r->call->kernel->weights(view, dtype, n, r->s.shift, r->inverse_t, w);
        if (given) {
            for (int64_t i = 0; i < n; i++)
                if (w[i] > 0) assay_race_at(&race, given[block->token + i], w[i], block->token + i);
        } else {
            r->call->kernel->race(w, assay_round_up(n, 16), block->token, &race);
        }
        if (race.time < before) {
            block->mass = race.time;
            block->token = race.token;
        }
    }
}

int32_t assay_spec_race(assay_spec_request *r) {
    r->counters[ASSAY_ROWS_RESAMPLED]++;
    assay_spec_for_blocks(r, race_blocks, 1);
    int64_t best = 0;
    for (int64_t b = 1; b < r->call->block_count; b++)
        if (r->blocks[b].mass < r->blocks[best].mass) best = b;
    return (int32_t)r->blocks[best].token;
}

static void exponent_blocks(void *arg, int64_t begin, int64_t end) {
    assay_spec_request *r = arg;
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < assay_spec_end_of(r, end); b++) {
        const int64_t n = assay_spec_block_length(r, b);
        r->blocks[b].mass = r->blocks[b].total = 0;
        if (!isfinite(r->blocks[b].largest)) continue;
        int dtype;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        float total;
        r->blocks[b].mass = (double)r->call->kernel->moment(view, dtype, n, r->s.shift, r->inverse_t, &total);
        r->blocks[b].total = (double)total;
    }
}

double assay_spec_mean_exponent(assay_spec_request *r, double *total) {
    assay_spec_for_blocks(r, exponent_blocks, 1);
    *total = 0;
    for (int64_t b = 0; b < r->call->block_count; b++) *total += r->blocks[b].total;
    return mass_of_row(r) / *total;
}

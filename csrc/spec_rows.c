/* Rows of logits: reading, probabilities, residuals, draws. The order of every sum over blocks is here, once; the passes
 * over a block are the variants' (cpu/spec_verify/).
 *
 * A row becomes, per block of ASSAY_VOCAB_BLOCK, its largest element m_b and s_b = sum exp((l - m_b) / T): one pass. With
 * M = max m_b and c_b = exp((m_b - M) / T), the normaliser is S = sum s_b c_b (double, b ascending), and p(x) =
 * vexp((l_x - M) / T) * (float)(1 / S). Sampling from p needs one block again: the first with cumulated s_b c_b > u S. The
 * residual (A p - C q)+ needs one pass more over p and q, for its block sums, and then one block. */
#include "spec_rows.h"
#include "philox.h"

#include "cpu/float16.h"
#include "cpu/logarithm.h"
#include "cpu/vexp.h"

/* Blocks that a thread takes at a time when threads share a row: the last ones wait for each other for as long as one takes,
 * and with exp each starts with a reading more. Work (in elements read once) below which they do not share: a dispatch costs
 * what one thread does with that much. */
enum { BLOCKS_A_UNIT = 1, BLOCKS_A_UNIT_WITH_EXP = 4, SHARE_ELEMENTS = 1 << 16 };
/* How far behind the next block a sum fetches: of 1 to 24 KB the one that lost least, from caches and from DRAM. */
enum { AHEAD_BYTES = 2048 };

double assay_uniform(uint64_t seed, int64_t position, uint32_t domain, uint32_t node) {
    uint32_t x[4] = {(uint32_t)(uint64_t)position, (uint32_t)((uint64_t)position >> 32), domain, node};
    assay_philox4x32(x, (uint32_t)seed, (uint32_t)(seed >> 32));
    return assay_unit_interval(x[0], x[1]);
}

double assay_spec_uniform(const assay_spec_request *r, uint32_t domain, int64_t node, int64_t depth, uint32_t key_node) {
    const assay_verify_args *a = r->call->a;
    if (r->given) {
        if (a->rule == ASSAY_SAMPLED) return r->given[depth];
        return r->given[domain == ASSAY_ACCEPT ? node - 1 : domain == ASSAY_RESIDUAL ? r->drafts : r->drafts + 1];
    }
    return assay_uniform(a->seed[r->b], (int64_t)((uint64_t)a->position[r->b] + (uint64_t)depth), domain, key_node);
}

static void for_blocks(assay_spec_request *r, assay_range_fn fn, int with_exp) {
    r->unit = with_exp ? BLOCKS_A_UNIT_WITH_EXP : BLOCKS_A_UNIT;
    const int64_t units = (r->call->block_count + r->unit - 1) / r->unit;
    /* A pass with exp takes some four times as long as one without. */
    if (r->call->threads > 1 && r->call->a->vocab * (with_exp ? 4 : 1) >= SHARE_ELEMENTS)
        assay_parallel_for(fn, r, units, r->call->threads, 1);
    else
        fn(r, 0, units);
}

static int64_t end_of(const assay_spec_request *r, int64_t end) {
    return assay_min_i64(end * r->unit, r->call->block_count);
}

/* ---- the first reading ------------------------------------------------------------------------------ */

/* Largest elements and sums of blocks [begin, end) as they are in memory; each sum finds the next block's peak on its way. */
static void scan_raw(assay_spec_request *r, int64_t begin, int64_t end) {
    const assay_spec_verify_kernel *k = r->call->kernel;
    const int dtype = r->call->a->dtype;
    float peak = r->sums ? k->peak(assay_spec_raw(r, begin), dtype, assay_spec_block_length(r, begin)) : NAN;
    for (int64_t b = begin; b < end; b++) {
        assay_spec_block *block = &r->blocks[b];
        const void *raw = assay_spec_raw(r, b);
        const int64_t n = assay_spec_block_length(r, b), next_n = b + 1 < end ? assay_spec_block_length(r, b + 1) : 0;
        *block = (assay_spec_block){.largest = peak};
        float next = NAN;
        if (isfinite(peak)) {
            const uint8_t *ahead = (const uint8_t *)assay_spec_raw(r, b + 1) + AHEAD_BYTES;
            block->sum = k->sum(raw, dtype, n, peak, r->inverse_t, ahead, next_n, &next);
            if (isnan(block->sum)) block->largest = NAN;
        } else {
            block->largest = k->largest(raw, dtype, n);
            if (r->sums && next_n) next = k->peak(assay_spec_raw(r, b + 1), dtype, next_n);
        }
        peak = next;
    }
}

/* A block of which the cuts leave few elements or none. Returns 0 where that is not so. */
static int scan_few(assay_spec_request *r, int64_t b) {
    enum { FEW = ASSAY_VOCAB_BLOCK / 4 };
    const assay_spec_verify_kernel *k = r->call->kernel;
    assay_spec_block *block = &r->blocks[b];
    _Alignas(64) float values[ASSAY_VOCAB_BLOCK + 16], weights[ASSAY_VOCAB_BLOCK];
    int32_t where[ASSAY_VOCAB_BLOCK + 16];
    if (r->processed) return 0;
    int64_t found = 0;
    if (!r->uncut || block->largest >= r->s.least)
        found = k->select(assay_spec_raw(r, b), r->call->a->dtype, assay_spec_block_length(r, b), r->s.least, values, where);
    if (found > FEW) return 0;
    if (r->s.cuts & CUT_MIN_P && found) {
        k->weights(values, ASSAY_F32, found, r->s.top, r->inverse_t, weights);
        for (int64_t i = 0; i < found; i++) values[i] = weights[i] >= r->call->a->min_p[r->b] ? values[i] : -INFINITY;
    }
    float largest = -INFINITY;
    for (int64_t i = 0; i < found; i++) {
        const int64_t id = b * ASSAY_VOCAB_BLOCK + where[i];
        if ((r->s.cuts & CUT_LOGITS && !assay_spec_inside(&r->s.by_logit, values[i], id)) ||
            (r->s.cuts & CUT_TYPICAL && !assay_spec_inside(&r->s.by_distance, values[i], id)))
            values[i] = -INFINITY;
        largest = values[i] > largest ? values[i] : largest;
    }
    block->largest = largest;
    block->sum = 0;
    if (!(largest > -INFINITY) || !r->sums) return 1;
    /* As if over the block, whose other elements would add 0. */
    float lane[16] = {0};
    k->weights(values, ASSAY_F32, found, largest, r->inverse_t, weights);
    for (int64_t i = 0; i < found; i++) lane[where[i] % 16] += weights[i];
    block->sum = assay_fold16(lane);
    return 1;
}

static void scan_blocks(void *arg, int64_t begin, int64_t end) {
    assay_spec_request *r = arg;
    const assay_spec_verify_kernel *k = r->call->kernel;
    if (!r->processed && !r->s.cuts) {
        scan_raw(r, begin * r->unit, end_of(r, end));
        return;
    }
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < end_of(r, end); b++) {
        assay_spec_block *block = &r->blocks[b];
        const int64_t n = assay_spec_block_length(r, b);
        if (r->s.cuts && scan_few(r, b)) continue;
        block->sum = 0;
        block->largest = k->largest(assay_spec_raw(r, b), r->call->a->dtype, n);
        /* A mask must not hide what poisons the row. */
        if (!(block->largest < INFINITY)) continue;
        int dtype;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        block->largest = k->largest(view, dtype, n);
        if (r->sums && isfinite(block->largest))
            block->sum = k->sum(view, dtype, n, block->largest, r->inverse_t, assay_spec_raw(r, b + 1), 0, NULL);
    }
}

static double weight_of_block(const assay_spec_block *block) {
    return block->sum > 0 ? (double)block->sum * block->factor : 0;
}

/* The blocks' weights relative to the row's largest element, and their sum. */
static double weigh_blocks(assay_spec_request *r) {
    _Alignas(64) float largest[ASSAY_VOCAB_BLOCK], factor[ASSAY_VOCAB_BLOCK];
    double total = 0;
    for (int64_t from = 0; from < r->call->block_count; from += ASSAY_VOCAB_BLOCK) {
        const int64_t n = assay_min_i64(ASSAY_VOCAB_BLOCK, r->call->block_count - from);
        assay_spec_block *blocks = r->blocks + from;
        for (int64_t b = 0; b < n; b++) largest[b] = blocks[b].largest;
        r->call->kernel->weights(largest, ASSAY_F32, n, r->s.shift, r->inverse_t, factor);
        for (int64_t b = 0; b < n; b++) {
            blocks[b].factor = (double)factor[b];
            total += weight_of_block(&blocks[b]);
        }
    }
    return total;
}

/* Scans the row's blocks: shift and normaliser. Returns the row's status. */
static int scan(assay_spec_request *r) {
    for_blocks(r, scan_blocks, r->sums);
    r->s.shift = -INFINITY;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        const float m = r->blocks[b].largest;
        if (isnan(m)) return ASSAY_ROW_NAN;
        if (m > r->s.shift) r->s.shift = m;
    }
    if (r->s.shift == INFINITY) return ASSAY_ROW_INF;
    if (r->s.shift == -INFINITY) return ASSAY_ROW_EMPTY;
    r->s.total = r->sums ? weigh_blocks(r) : 0;
    r->s.scale = r->sums ? (float)(1.0 / r->s.total) : 0;
    return ASSAY_ROW_OK;
}

int assay_spec_open(assay_spec_request *r, int64_t node, int whole) {
    const assay_verify_args *a = r->call->a;
    assay_spec_node *known = &r->nodes[node];
    if (r->node == node && (r->whole || !whole)) return ASSAY_ROW_OK;
    if (r->node != node) {
        r->node = node;
        const int64_t row = r->first + r->b + node;
        r->logits = (const uint8_t *)a->target_logits + row * a->ld * (a->dtype == ASSAY_F32 ? 4 : 2);
        r->mask = a->bitmask ? a->bitmask + (a->bitmask_per_row ? row : r->b) * a->bitmask_ld : NULL;
        if (a->cu_edits) assay_spec_path_edits(r, node);
        r->processed = r->edit_count > 0 || r->mask;
        r->whole = 0;
    }
    if (known->read) {
        r->s = known->row;
        if (!whole) return ASSAY_ROW_OK;
        r->whole = 1;
        return scan(r);
    }
    r->counters[ASSAY_ROWS_READ]++;
    r->s = (assay_spec_row_state){0};
    int status = scan(r);
    if (status) return status;
    r->s.top = r->s.shift;
    r->s.log_total = r->s.total > 0 ? assay_log(r->s.total) : 0;
    if (!r->greedy && assay_spec_has_filters(r)) {
        assay_spec_find_cuts(r);
        r->uncut = 1;
        if (r->s.cuts) status = scan(r);
        r->uncut = 0;
        if (status) return status;
        r->s.log_total = r->s.total > 0 ? assay_log(r->s.total) : 0;
    }
    known->read = 1;
    known->row = r->s;
    r->whole = 1;
    return ASSAY_ROW_OK;
}

/* ---- single elements ------------------------------------------------------------------------------- */

int32_t assay_spec_argmax(const assay_spec_request *r) {
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    int64_t b = 0;
    while (r->blocks[b].largest != r->s.shift) b++;
    int dtype;
    const void *view = assay_spec_view(r, b, buffer, &dtype);
    return (int32_t)(b * ASSAY_VOCAB_BLOCK + r->call->kernel->find(view, dtype, assay_spec_block_length(r, b), r->s.shift));
}

float assay_spec_probability(const assay_spec_request *r, int32_t token) {
    if (token < 0 || token >= r->call->a->vocab) return 0;
    return assay_vexp((assay_spec_element(r, token) - r->s.shift) * r->inverse_t) * r->s.scale;
}

double assay_spec_log_probability(const assay_spec_request *r, int32_t token) {
    return (double)((assay_spec_element(r, token) - r->s.shift) * r->inverse_t) - r->s.log_total;
}

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
    for (int64_t b = begin * r->unit; b < end_of(r, end); b++)
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
    for_blocks(r, residual_blocks, 1);
    return mass_of_row(r);
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
    for (int64_t b = 0; b < r->call->block_count; b++) r->blocks[b].mass = weight_of_block(&r->blocks[b]);
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
    const uint64_t position = (uint64_t)a->position[r->b] + (uint64_t)r->nodes[r->node].depth;
    /* The best of the blocks before bounds those that follow: of equal times the first is the winner anyway. */
    assay_race race = {a->seed[r->b], position, INFINITY, 0};
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK], w[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < end_of(r, end); b++) {
        assay_spec_block *block = &r->blocks[b];
        block->mass = INFINITY;
        block->token = b * ASSAY_VOCAB_BLOCK;
        if (!isfinite(block->largest)) continue;
        const int64_t n = assay_spec_block_length(r, b);
        const double before = race.time;
        int dtype;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        r->call->kernel->weights(view, dtype, n, r->s.shift, r->inverse_t, w);
        r->call->kernel->race(w, assay_round_up(n, 16), block->token, &race);
        if (race.time < before) {
            block->mass = race.time;
            block->token = race.token;
        }
    }
}

int32_t assay_spec_race(assay_spec_request *r) {
    r->counters[ASSAY_ROWS_RESAMPLED]++;
    for_blocks(r, race_blocks, 1);
    int64_t best = 0;
    for (int64_t b = 1; b < r->call->block_count; b++)
        if (r->blocks[b].mass < r->blocks[best].mass) best = b;
    return (int32_t)r->blocks[best].token;
}

static void exponent_blocks(void *arg, int64_t begin, int64_t end) {
    assay_spec_request *r = arg;
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < end_of(r, end); b++) {
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
    for_blocks(r, exponent_blocks, 1);
    *total = 0;
    for (int64_t b = 0; b < r->call->block_count; b++) *total += r->blocks[b].total;
    return mass_of_row(r) / *total;
}

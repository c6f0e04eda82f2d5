/* Rows of logits: reading them, and probabilities of single tokens. The order of every sum over blocks is here and in
 * spec_draws.c, once; the passes over a block are the variants' (cpu/spec_verify/).
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

void assay_spec_for_blocks(assay_spec_request *r, assay_range_fn fn, int with_exp) {
    r->unit = with_exp ? BLOCKS_A_UNIT_WITH_EXP : BLOCKS_A_UNIT;
    const int64_t units = (r->call->block_count + r->unit - 1) / r->unit;
    /* A pass with exp takes some four times as long as one without. */
    if (r->call->threads > 1 && r->call->a->vocab * (with_exp ? 4 : 1) >= SHARE_ELEMENTS)
        assay_parallel_for(fn, r, units, r->call->threads, 1);
    else
        fn(r, 0, units);
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
        scan_raw(r, begin * r->unit, assay_spec_end_of(r, end));
        return;
    }
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    for (int64_t b = begin * r->unit; b < assay_spec_end_of(r, end); b++) {
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
            total += assay_spec_block_weight(&blocks[b]);
        }
    }
    return total;
}

/* Scans the row's blocks: shift and normaliser. Returns the row's status. */
static int scan(assay_spec_request *r) {
    assay_spec_for_blocks(r, scan_blocks, r->sums);
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

/* Processors and filters: what a row's logits become before their softmax.
 *
 * Penalties, bias and bans touch few tokens: a sorted list of them (edits), which the draft's own path extends, lies over a
 * block when it is loaded; a bitmask is applied to the whole block. top_k, top_p and typical_p keep the first elements of an
 * order, so each is a cut: a key and, among its equals, the last id that is kept. A cut is found by three passes over the
 * row, 11, 11 and 10 bits of the key at a time, counting (top_k) or adding up weights (top_p, typical_p) in a histogram, and
 * one over the elements whose key is the cut's. Nothing as wide as the vocabulary is stored. */
#include "spec_rows.h"

#include "cpu/float16.h"
#include "cpu/vexp.h"

#include <float.h>

#define KEY_OF_INFINITY 0xff800000u /* logit_key's */

static float repetition(const assay_spec_request *r) {
    const assay_verify_args *a = r->call->a;
    return a->repetition_penalty ? a->repetition_penalty[r->b] : 1;
}

float assay_spec_edited(const assay_spec_request *r, const assay_spec_edit *edit, float logit) {
    const assay_verify_args *a = r->call->a;
    if (a->repetition_penalty) {
        const float penalty = a->repetition_penalty[r->b];
        if (edit->seen && penalty != 1) logit = logit > 0 ? logit / penalty : logit * penalty;
        if (edit->count) {
            logit -= a->frequency_penalty[r->b] * (float)edit->count;
            logit -= a->presence_penalty[r->b];
        }
    }
    return logit + edit->bias;
}

/* The first edit of this token or a greater one. */
static int64_t first_edit(const assay_spec_request *r, int64_t token) {
    int64_t low = 0, high = r->edit_count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (r->edits[middle].token < token) low = middle + 1;
        else high = middle;
    }
    return low;
}

void assay_spec_path_edits(assay_spec_request *r, int64_t node) {
    const assay_verify_args *a = r->call->a;
    const int64_t begin = a->cu_edits[r->b], count = a->cu_edits[r->b + 1] - begin;
    for (int64_t i = 0; i < count; i++)
        r->edits[i] = (assay_spec_edit){a->edit_token_ids[begin + i], a->edit_count[begin + i],
                                        a->edit_in_prompt[begin + i] || a->edit_count[begin + i], a->edit_bias[begin + i]};
    r->edit_count = count;
    if (!a->repetition_penalty || (repetition(r) == 1 && a->frequency_penalty[r->b] == 0 && a->presence_penalty[r->b] == 0))
        return;
    for (; node > 0; node = r->nodes[node].parent) {
        const int32_t token = a->draft_token_ids[r->first + node - 1];
        const int64_t at = first_edit(r, token);
        if (at == r->edit_count || r->edits[at].token != token) {
            for (int64_t i = r->edit_count; i > at; i--) r->edits[i] = r->edits[i - 1];
            r->edits[at] = (assay_spec_edit){token, 0, 0, 0};
            r->edit_count++;
        }
        r->edits[at].count++;
        r->edits[at].seen = 1;
    }
}

/* ---- filters ------------------------------------------------------------------------------------------- */

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* Rises with the logit. Adding 0 makes both zeros one. */
static uint32_t logit_key(float logit) {
    const uint32_t bits = bits_of(logit + 0.0f);
    return bits ^ ((0u - (bits >> 31)) | 0x80000000u); /* without a branch, for vectors */
}

/* The logit of a key, which is that of no NaN. */
static float logit_of(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float exponent(const assay_spec_request *r, float logit) { return (logit - r->s.top) * r->inverse_t; }

/* Falls with the distance of -log p from the entropy. */
static uint32_t distance_key(const assay_spec_request *r, float logit) {
    return ~bits_of(fabsf(exponent(r, logit) - r->s.center));
}

static int kept(assay_spec_cut cut, uint32_t key, int64_t id) { return key > cut.key || (key == cut.key && id <= cut.last); }

static float cut_element(const assay_spec_request *r, float logit, int64_t id) {
    const int cuts = r->s.cuts;
    if (cuts & CUT_LOGITS && !kept(r->s.by_logit, logit_key(logit), id)) return -INFINITY;
    if (cuts & CUT_MIN_P && !(assay_vexp(exponent(r, logit)) >= r->call->a->min_p[r->b])) return -INFINITY;
    if (cuts & CUT_TYPICAL && !kept(r->s.by_distance, distance_key(r, logit), id)) return -INFINITY;
    return logit;
}

float assay_spec_element(const assay_spec_request *r, int64_t token) {
    float logit = assay_load_f32(r->logits, r->call->a->dtype, token);
    if (r->edit_count) {
        const int64_t at = first_edit(r, token);
        if (at < r->edit_count && r->edits[at].token == token) logit = assay_spec_edited(r, &r->edits[at], logit);
    }
    if (r->mask && !(r->mask[token >> 5] >> (token & 31) & 1)) logit = -INFINITY;
    return r->s.cuts ? cut_element(r, logit, token) : logit;
}

const void *assay_spec_view(const assay_spec_request *r, int64_t b, float *buffer, int *dtype) {
    const int64_t from = b * ASSAY_VOCAB_BLOCK, n = assay_spec_block_length(r, b);
    const void *raw = assay_spec_raw(r, b);
    *dtype = r->call->a->dtype;
    if (!r->processed && !r->s.cuts) return raw;
    if (*dtype == ASSAY_F32) {
        memcpy(buffer, raw, (size_t)n * 4);
    } else {
        for (int64_t i = 0; i < n; i++) buffer[i] = assay_load_f32(raw, *dtype, i);
    }
    *dtype = ASSAY_F32;
    for (int64_t at = first_edit(r, from); at < r->edit_count && r->edits[at].token < from + n; at++)
        buffer[r->edits[at].token - from] = assay_spec_edited(r, &r->edits[at], buffer[r->edits[at].token - from]);
    if (r->mask) {
        const uint32_t *mask = r->mask + from / 32;
        for (int64_t i = 0; i < n; i++) buffer[i] = mask[i >> 5] >> (i & 31) & 1 ? buffer[i] : -INFINITY;
    }
    if (r->s.cuts == CUT_LOGITS) {
        const float least = logit_of(r->s.by_logit.key);
        const int64_t behind = r->s.by_logit.last - from;
        const int32_t last = behind < -1 ? -1 : behind > n ? (int32_t)n : (int32_t)behind;
        for (int32_t i = 0; i < n; i++)
            buffer[i] = (buffer[i] > least) | ((buffer[i] == least) & (i <= last)) ? buffer[i] : -INFINITY;
    } else if (r->s.cuts == CUT_MIN_P) {
        _Alignas(64) float weights[ASSAY_VOCAB_BLOCK];
        const float least = r->call->a->min_p[r->b];
        r->call->kernel->weights(buffer, ASSAY_F32, n, r->s.top, r->inverse_t, weights);
        for (int64_t i = 0; i < n; i++) buffer[i] = weights[i] >= least ? buffer[i] : -INFINITY;
    } else if (r->s.cuts) {
        for (int64_t i = 0; i < n; i++)
            if (buffer[i] > -INFINITY) buffer[i] = cut_element(r, buffer[i], from + i);
    }
    return buffer;
}

static int uses_top_k(const assay_spec_request *r) {
    const assay_verify_args *a = r->call->a;
    return a->top_k && a->top_k[r->b] > 0 && a->top_k[r->b] < a->vocab;
}
static int uses_top_p(const assay_spec_request *r) { return r->call->a->top_p && r->call->a->top_p[r->b] < 1; }
static int uses_min_p(const assay_spec_request *r) { return r->call->a->min_p && r->call->a->min_p[r->b] > 0; }
static int uses_typical_p(const assay_spec_request *r) { return r->call->a->typical_p && r->call->a->typical_p[r->b] < 1; }

int assay_spec_has_filters(const assay_spec_request *r) {
    return uses_top_k(r) || uses_top_p(r) || uses_min_p(r) || uses_typical_p(r);
}

/* An order and how much of it to keep: so many elements, or where that is 0 so large a share of the weight. */
typedef struct {
    int by_distance;
    int64_t elements;
    double share;
} selection;

/* Elements of one block in order of ids: where they stand, their keys, and their weights if asked. */
typedef struct {
    int64_t count;
    int32_t where[ASSAY_VOCAB_BLOCK + 16];
    uint32_t keys[ASSAY_VOCAB_BLOCK];
    _Alignas(64) float logits[ASSAY_VOCAB_BLOCK + 16], weights[ASSAY_VOCAB_BLOCK];
} chosen;

/* Those of block b whose logit is `least` or more, which is finite: what is left out has a logit of minus infinity. */
static void choose(const assay_spec_request *r, const selection *s, int64_t b, float least, chosen *c) {
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    int dtype;
    const void *view = assay_spec_view(r, b, buffer, &dtype);
    c->count = r->call->kernel->select(view, dtype, assay_spec_block_length(r, b), least, c->logits, c->where);
    if (s->by_distance) {
        const float top = r->s.top, inverse_t = r->inverse_t, center = r->s.center;
        for (int64_t i = 0; i < c->count; i++) c->keys[i] = ~bits_of(fabsf((c->logits[i] - top) * inverse_t - center));
    } else {
        for (int64_t i = 0; i < c->count; i++) c->keys[i] = logit_key(c->logits[i]);
    }
    if (!s->elements && c->count)
        r->call->kernel->weights(c->logits, ASSAY_F32, c->count, r->s.top, r->inverse_t, c->weights);
}

/* The least logit that is no minus infinity and, where the order is of logits, has this key or a greater one. */
static float least_of_key(const selection *s, uint32_t key, float least) {
    if (!s->by_distance && key > logit_key(-FLT_MAX)) least = fmaxf(least, key >= KEY_OF_INFINITY ? FLT_MAX : logit_of(key));
    return fmaxf(least, -FLT_MAX);
}

/* Whether block b can hold a key whose bits from `shift` up are these: its largest logit tells, not the distance. */
static int may_hold(const assay_spec_request *r, const selection *s, int64_t b, uint32_t prefix, int shift) {
    if (!(r->blocks[b].largest > -INFINITY)) return 0;
    return s->by_distance || logit_key(r->blocks[b].largest) >> shift >= prefix;
}

/* A logit that at least so many elements reach: that of as many blocks' largest. Minus infinity where there are too few. */
static float least_needed(const assay_spec_request *r, const selection *s) {
    enum { MOST = 256 };
    float largest[MOST];
    int64_t n = 0;
    if (s->by_distance || !s->elements || r->s.cuts || s->elements > r->call->block_count || r->call->block_count > MOST)
        return -INFINITY;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        int64_t at = n++;
        for (; at > 0 && largest[at - 1] < r->blocks[b].largest; at--) largest[at] = largest[at - 1];
        largest[at] = r->blocks[b].largest;
    }
    return largest[s->elements - 1];
}

static void fill_histogram(const assay_spec_request *r, const selection *s, uint32_t prefix, int shift, int bits,
                           float least, assay_spec_histogram *h) {
    chosen c;
    const int below = shift + bits < 32; /* the first level has no prefix */
    const float bound = least_of_key(s, below ? prefix << (shift + bits) : 0, least);
    memset(h, 0, sizeof *h);
    for (int64_t b = 0; b < r->call->block_count; b++) {
        if (below && !may_hold(r, s, b, prefix, shift + bits)) continue;
        choose(r, s, b, bound, &c);
        for (int64_t i = 0; i < c.count; i++) {
            if (below && c.keys[i] >> (shift + bits) != prefix) continue;
            const uint32_t bucket = c.keys[i] >> shift & ((1u << bits) - 1);
            h->count[bucket]++;
            if (!s->elements) h->mass[bucket] += (double)c.weights[i];
        }
    }
}

/* The id at which the elements of this key have reached what is wanted beyond `count` and `mass`. */
static int64_t last_of_key(const assay_spec_request *r, const selection *s, uint32_t key, int64_t count, double mass,
                           double target) {
    chosen c;
    int64_t last = -1;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        if (!may_hold(r, s, b, key, 0)) continue;
        choose(r, s, b, least_of_key(s, key, -FLT_MAX), &c);
        for (int64_t i = 0; i < c.count; i++) {
            if (c.keys[i] != key) continue;
            last = b * ASSAY_VOCAB_BLOCK + c.where[i];
            if (s->elements ? ++count >= s->elements : (mass += (double)c.weights[i]) >= target) return last;
        }
    }
    return last;
}

/* The cut that keeps the fewest elements that are enough. Returns 0 when all are needed. */
static int select_first(const assay_spec_request *r, const selection *s, assay_spec_cut *cut) {
    static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
    assay_spec_histogram *h = &r->call->histograms[r->b];
    const float least = least_needed(r, s);
    uint32_t prefix = 0;
    int64_t count = 0;
    double mass = 0, target = 0;
    for (int level = 0; level < 3; level++) {
        fill_histogram(r, s, prefix, shifts[level], widths[level], least, h);
        int32_t found = -1, lowest = -1;
        const int32_t buckets = 1 << widths[level];
        if (!level && !s->elements) {
            for (int32_t i = buckets - 1; i >= 0; i--) target += h->mass[i];
            target *= s->share;
        }
        int64_t count_lowest = count;
        double mass_lowest = mass;
        for (int32_t i = buckets - 1; i >= 0 && found < 0; i--) {
            if (!h->count[i]) continue;
            lowest = i;
            count_lowest = count;
            mass_lowest = mass;
            if (s->elements ? count + h->count[i] >= s->elements : mass + h->mass[i] >= target) {
                found = i;
                break;
            }
            count += h->count[i];
            mass += h->mass[i];
        }
        if (found < 0) {
            /* At the first level there are not enough; below it only rounding can lead here. */
            if (!level || lowest < 0) return 0;
            found = lowest;
            count = count_lowest;
            mass = mass_lowest;
        }
        prefix = prefix << widths[level] | (uint32_t)found;
    }
    *cut = (assay_spec_cut){prefix, last_of_key(r, s, prefix, count, mass, target)};
    return 1;
}

void assay_spec_find_cuts(assay_spec_request *r) {
    const assay_verify_args *a = r->call->a;
    assay_spec_cut cut;
    if (uses_top_k(r) && select_first(r, &(selection){0, a->top_k[r->b], 0}, &cut)) {
        r->s.by_logit = cut;
        r->s.cuts |= CUT_LOGITS;
    }
    /* A prefix of a prefix of the same order. */
    if (uses_top_p(r) && select_first(r, &(selection){0, 0, (double)a->top_p[r->b]}, &cut)) {
        r->s.by_logit = cut;
        r->s.cuts |= CUT_LOGITS;
    }
    if (uses_min_p(r)) r->s.cuts |= CUT_MIN_P;
    if (uses_typical_p(r)) {
        double total;
        r->s.center = (float)assay_spec_mean_exponent(r, &total);
        if (select_first(r, &(selection){1, 0, (double)a->typical_p[r->b]}, &cut)) {
            r->s.by_distance = cut;
            r->s.cuts |= CUT_TYPICAL;
        }
    }
}

float assay_spec_least_kept(const assay_spec_request *r) {
    return r->s.cuts & CUT_LOGITS ? logit_of(r->s.by_logit.key) : -INFINITY;
}

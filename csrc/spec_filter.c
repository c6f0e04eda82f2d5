/* top_k, top_p, min_p and typical_p: the cuts of a row.
 *
 * Each keeps the first elements of an order until there is enough: so many of them (top_k: of weight 1), or a share of the
 * row's weight. Weights are added up as integers (assay_mass), so that the same is enough in whatever order they come.
 * spec_select.c finds the class of equals with which there is; one more pass where not all of it is needed: the lower ids first. */
#include "spec_rows.h"

#include "cpu/vexp.h"

#include <float.h>
#include <math.h>

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

/* The id at which the class of equals has reached what is wanted beyond `before`. */
static int64_t last_of_class(const assay_spec_request *r, const assay_spec_order *o, float value, assay_mass before) {
    const assay_spec_verify_kernel *k = r->call->kernel;
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK], values[ASSAY_VOCAB_BLOCK + 16], weights[ASSAY_VOCAB_BLOCK];
    int32_t where[ASSAY_VOCAB_BLOCK + 16];
    const float least = o->by_distance ? -FLT_MAX : value;
    int64_t last = -1;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        if (!(r->blocks[b].largest >= least)) continue;
        int dtype;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        const int64_t n = k->select(view, dtype, assay_spec_block_length(r, b), least, values, where);
        if (!n) continue;
        assay_spec_arrange(r, o, values, weights, n);
        for (int64_t i = 0; i < n; i++) {
            if (values[i] != value) continue;
            assay_mass none = {0, 0};
            last = b * ASSAY_VOCAB_BLOCK + where[i];
            k->tally(values + i, weights + i, 1, -INFINITY, &before, &none);
            if (assay_mass_value(before) >= o->target) return last;
        }
    }
    return last;
}

/* ---- an order's elements as a range of logits ------------------------------------------------------------ */

/* Rises with the logit. Adding 0 makes both zeros one. */
static uint32_t key_of(float logit) {
    uint32_t bits;
    logit += 0.0f;
    memcpy(&bits, &logit, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float logit_of(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The first logit from below whose distance on that side is no more than (closed) or less than `distance`, by bisection: the
 * distance falls to the center and rises from it. upper: the first whose distance is too much again. */
static float end_of_range(const assay_spec_request *r, const assay_spec_order *o, float distance, int closed, int upper) {
    uint32_t low = key_of(-FLT_MAX) - 1, high = key_of(FLT_MAX) + 1; /* the infinities */
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const float from_center = (logit_of(middle) - r->s.top) * r->inverse_t - o->center;
        const int near = closed ? fabsf(from_center) <= distance : fabsf(from_center) < distance;
        if (upper ? near || from_center < 0 : !near && from_center < 0) low = middle;
        else high = middle;
    }
    return logit_of(upper == closed ? low : high);
}

/* ---- the filters ------------------------------------------------------------------------------------------- */

/* Finds the range that keeps the fewest elements that are enough. Returns 0 when all are needed. */
static int select_first(const assay_spec_request *r, assay_spec_order *o, assay_range *range) {
    float value;
    assay_mass before;
    int alone;
    const float least = o->least;
    if (!assay_spec_find_class(r, o, &value, &before, &alone)) return 0;
    o->least = least;
    if (o->by_distance) {
        *range = (assay_range){end_of_range(r, o, -value, 0, 0), end_of_range(r, o, -value, 0, 1),
                               end_of_range(r, o, -value, 1, 0), end_of_range(r, o, -value, 1, 1), 0};
    } else {
        *range = (assay_range){value, INFINITY, value, INFINITY, 0};
    }
    /* An order's only element with that value may have equals that an earlier cut has taken: its id tells them apart. */
    range->last = alone && !r->s.cuts ? r->call->a->vocab : last_of_class(r, o, value, before);
    return 1;
}

/* A logit that at least so many elements reach: that of as many blocks' largest. Least of all where there are too few. */
static float least_of_so_many(const assay_spec_request *r, int64_t elements) {
    enum { MOST = 256 };
    float largest[MOST];
    int64_t n = 0;
    if (elements > r->call->block_count || r->call->block_count > MOST) return -FLT_MAX;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        int64_t at = n++;
        for (; at > 0 && largest[at - 1] < r->blocks[b].largest; at--) largest[at] = largest[at - 1];
        largest[at] = r->blocks[b].largest;
    }
    return fmaxf(largest[elements - 1], -FLT_MAX);
}

/* A share of the total weight. All elements of weight (total - target) / V or less together are no more than the rest. */
static assay_spec_order of_share(const assay_spec_request *r, float share, double total) {
    assay_spec_order o = {.target = (double)share * total, .total = total};
    const double rest = (total - o.target) / (double)r->call->a->vocab;
    o.least = rest > 0 ? assay_spec_logit_at(r, log(rest)) : -FLT_MAX;
    return o;
}

static void raise_least(assay_spec_request *r, float least) { r->s.least = fmaxf(r->s.least, least); }

void assay_spec_find_cuts(assay_spec_request *r) {
    const assay_verify_args *a = r->call->a;
    assay_range range;
    r->s.least = -FLT_MAX;
    if (uses_top_k(r)) {
        const int64_t elements = a->top_k[r->b];
        assay_spec_order o = {.elements = elements, .target = (double)elements, .least = least_of_so_many(r, elements)};
        if (select_first(r, &o, &range)) {
            r->s.by_logit = range;
            r->s.cuts |= CUT_LOGITS;
            raise_least(r, range.least);
        }
    }
    if (uses_top_p(r)) {
        /* A prefix of a prefix of the same order, of what is left. */
        double total = r->s.total;
        if (r->s.cuts) {
            assay_spec_order all = {.least = r->s.least};
            assay_mass above, equal;
            assay_spec_gather(r, &all, -INFINITY, -FLT_MAX, &above, &equal);
            total = assay_mass_value(assay_mass_sum(above, equal));
        }
        assay_spec_order o = of_share(r, a->top_p[r->b], total);
        if (r->s.cuts) o.least = fmaxf(o.least, r->s.least);
        if (select_first(r, &o, &range)) {
            r->s.by_logit = range;
            r->s.cuts |= CUT_LOGITS;
            raise_least(r, range.least);
        }
    }
    if (uses_min_p(r)) {
        r->s.cuts |= CUT_MIN_P;
        raise_least(r, assay_spec_logit_at(r, log((double)a->min_p[r->b])));
    }
    if (uses_typical_p(r)) {
        double total;
        const float center = (float)assay_spec_mean_exponent(r, &total);
        assay_spec_order o = of_share(r, a->typical_p[r->b], total);
        o.by_distance = 1;
        o.center = center;
        /* Below twice the mean exponent lies what is farther from it than the top. */
        o.least = fmaxf(fminf(o.least, assay_spec_logit_at(r, 2 * (double)center)), r->s.least);
        if (select_first(r, &o, &range)) {
            r->s.by_distance = range;
            r->s.cuts |= CUT_TYPICAL;
            raise_least(r, range.least);
        }
    }
}

/* top_k, top_p, min_p and typical_p: the cuts of a row.
 *
 * Each keeps the first elements of an order until there is enough: so many of them (top_k: of weight 1), or a share of the
 * row's weight. Weights are added up as integers (assay_mass), so that the same is enough in whatever order they come.
 *
 *   a guess      one element in sixteen tells between which two values of the order the cut lies, with a margin of four or so
 *                standard deviations; where few elements can matter at all, those are taken and nothing need be guessed
 *   one pass     adds up what lies before the two, and stores what lies between: some thousands of elements
 *   bisection    of what was stored, by an element of it (a pivot), until the class of equals with which there is enough is found
 *   the class    one more pass where not all of it is needed: the lower ids first
 *
 * A guess that fails costs a second pass over everything; what does not fit is bisected by passes over the row. */
#include "spec_rows.h"

#include "cpu/vexp.h"

#include <float.h>
#include <math.h>

enum { SAMPLE_EACH = 512, SAMPLE_RUN = 32, FEW = 4096 };

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

/* An order and how much of it to keep. Values fall: the logit, or minus the distance of -log p from the entropy. */
typedef struct {
    int by_distance;
    int64_t elements;      /* so many, where not 0 */
    double target, total;  /* so much weight, of so much there is */
    float center;
    float least;           /* of all logits that can matter: it may be wrong, which costs a pass */
} order;

static double value_of(assay_mass m) {
    const int64_t carry = m.low >> 23; /* rounds down */
    return (double)(m.high + carry) * 0x1p-23 + (double)(m.low - carry * (1 << 23)) * 0x1p-46;
}

static assay_mass plus(assay_mass a, assay_mass b) { return (assay_mass){a.high + b.high, a.low + b.low}; }

/* Of n logits: places in the order, over them, and weights. */
static void arrange(const assay_spec_request *r, const order *o, float *values, float *weights, int64_t n) {
    if (o->elements)
        for (int64_t i = 0; i < n; i++) weights[i] = 1;
    else
        r->call->kernel->weights(values, ASSAY_F32, n, r->s.top, r->inverse_t, weights);
    if (!o->by_distance) return;
    const float top = r->s.top, inverse_t = r->inverse_t, center = o->center;
    for (int64_t i = 0; i < n; i++) values[i] = -fabsf((values[i] - top) * inverse_t - center);
}

/* What lies above `high` and what equals it; returns how many lie strictly between low and high. The first of them, up to
 * ASSAY_SPEC_CANDIDATES, are left among the candidates. */
static int64_t gather(const assay_spec_request *r, const order *o, float low, float high, assay_mass *above, assay_mass *equal) {
    const assay_spec_verify_kernel *k = r->call->kernel;
    assay_spec_candidates *c = &r->call->candidates[r->b];
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK], values[ASSAY_VOCAB_BLOCK + 16], weights[ASSAY_VOCAB_BLOCK];
    const float least = o->by_distance ? o->least : fmaxf(o->least, fmaxf(low, -FLT_MAX));
    int64_t count = 0;
    *above = *equal = (assay_mass){0, 0};
    for (int64_t b = 0; b < r->call->block_count; b++) {
        if (!(r->blocks[b].largest >= least)) continue;
        int dtype;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        const int64_t n = k->select(view, dtype, assay_spec_block_length(r, b), least, values, NULL);
        if (!n) continue;
        arrange(r, o, values, weights, n);
        if (high < INFINITY) k->tally(values, weights, n, high, above, equal);
        const int64_t at = assay_min_i64(count, ASSAY_SPEC_CANDIDATES);
        count += k->between(values, weights, n, low, high, c->values + at, c->weights + at);
    }
    return count;
}

/* One element in SAMPLE_EACH / SAMPLE_RUN among the candidates; returns how many, *share: of how many there are one came. */
static int64_t sample(const assay_spec_request *r, const order *o, double *share) {
    assay_spec_candidates *c = &r->call->candidates[r->b];
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    const int64_t stride = SAMPLE_EACH * (1 + r->call->a->vocab / (SAMPLE_EACH / SAMPLE_RUN * ASSAY_SPEC_CANDIDATES));
    int64_t count = 0, seen = 0;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        const int64_t n = assay_spec_block_length(r, b), from = b * ASSAY_VOCAB_BLOCK;
        int64_t i = (stride - from % stride) % stride;
        if (i + SAMPLE_RUN > n) continue;
        int dtype;
        const uint8_t *view = assay_spec_view(r, b, buffer, &dtype);
        for (; i + SAMPLE_RUN <= n; i += stride) {
            count += r->call->kernel->select(view + i * (dtype == ASSAY_F32 ? 4 : 2), dtype, SAMPLE_RUN, -FLT_MAX,
                                             c->values + count, NULL);
            seen += SAMPLE_RUN;
        }
    }
    for (int64_t i = 0; i < count; i += ASSAY_VOCAB_BLOCK)
        arrange(r, o, c->values + i, c->weights + i, assay_min_i64(ASSAY_VOCAB_BLOCK, count - i));
    *share = (double)seen / (double)r->call->a->vocab;
    return count;
}

/* An element of n: the median of three medians of three. */
static float median3(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }
static float pivot_of(const float *values, int64_t n) {
    float m[3];
    for (int64_t i = 0; i < 3; i++)
        m[i] = median3(values[n * (3 * i) / 9], values[n * (3 * i + 1) / 9], values[n * (3 * i + 2) / 9]);
    return median3(m[0], m[1], m[2]);
}

/* Among n candidates, which with `before` are enough: the value of the class with which there is; *before grows to what lies
 * above it. *alone: whether it has one element. */
static float bisect(const assay_spec_request *r, int64_t n, double target, assay_mass *before, int *alone) {
    const assay_spec_verify_kernel *k = r->call->kernel;
    assay_spec_candidates *c = &r->call->candidates[r->b];
    for (;;) {
        const float pivot = pivot_of(c->values, n);
        assay_mass above = *before, equal = {0, 0};
        k->tally(c->values, c->weights, n, pivot, &above, &equal);
        if (value_of(above) >= target) {
            n = k->between(c->values, c->weights, n, pivot, INFINITY, c->values, c->weights);
        } else if (value_of(plus(above, equal)) >= target) {
            int64_t equals = 0;
            for (int64_t i = 0; i < n; i++) equals += c->values[i] == pivot;
            *alone = equals == 1;
            *before = above;
            return pivot;
        } else {
            *before = plus(above, equal);
            n = k->between(c->values, c->weights, n, -INFINITY, pivot, c->values, c->weights);
        }
    }
}

static assay_mass mass_of(const assay_spec_request *r, int64_t n) {
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    assay_mass all = {0, 0}, none = {0, 0};
    r->call->kernel->tally(c->values, c->weights, n, -INFINITY, &all, &none);
    return all;
}

/* A value of the order that so much of the sample of n lies above. The sample stays. */
static float quantile(const assay_spec_request *r, const order *o, double above) {
    double share;
    int alone;
    assay_mass before = {0, 0};
    const int64_t n = sample(r, o, &share);
    return bisect(r, n, above, &before, &alone);
}

/* Between which values the cut is likely to lie. */
static void guess(const assay_spec_request *r, const order *o, float *low, float *high) {
    double share;
    if (r->call->a->vocab <= ASSAY_SPEC_CANDIDATES) return;
    if (o->elements && o->least > -FLT_MAX) return; /* few: least is that of as many blocks */
    const int64_t n = sample(r, o, &share);
    const double all = value_of(mass_of(r, n));
    double upper, lower;
    if (o->elements) {
        const double wanted = (double)o->elements * share, spread = 4 * sqrt(wanted) + 4;
        lower = wanted + spread;
        upper = wanted - spread;
    } else {
        int64_t matter = 0;
        if (!o->by_distance)
            for (int64_t i = 0; i < n; i++) matter += r->call->candidates[r->b].values[i] >= o->least;
        if (!o->by_distance && (double)matter < FEW * share) return;
        /* The tail, of many small weights, is known better than what comes before it. */
        const double tail = (o->total - o->target) * share;
        lower = all - 0.8 * tail;
        upper = all - 1.25 * tail;
    }
    if (lower > 0 && lower < all) *low = quantile(r, o, lower);
    if (upper > 0 && upper < all) *high = quantile(r, o, upper);
}

/* The class of equals with which there is enough; *before: what lies above it. 0 when all is not enough. */
static int find_class(const assay_spec_request *r, order *o, float *value, assay_mass *before, int *alone) {
    assay_mass above, equal;
    float low = -INFINITY, high = INFINITY;
    guess(r, o, &low, &high);
    int64_t n = gather(r, o, low, high, &above, &equal);
    above = plus(above, equal);
    if (n <= ASSAY_SPEC_CANDIDATES && value_of(above) < o->target && value_of(plus(above, mass_of(r, n))) >= o->target) {
        *before = above;
        *value = bisect(r, n, o->target, before, alone);
        return 1;
    }
    low = -INFINITY;
    high = INFINITY;
    o->least = -FLT_MAX;
    *before = (assay_mass){0, 0};
    for (;;) {
        n = gather(r, o, low, high, &above, &equal);
        if (n <= ASSAY_SPEC_CANDIDATES) break;
        const float pivot = pivot_of(r->call->candidates[r->b].values, ASSAY_SPEC_CANDIDATES);
        gather(r, o, low, pivot, &above, &equal);
        if (value_of(above) >= o->target) {
            low = pivot;
        } else if (value_of(plus(above, equal)) >= o->target) {
            *before = above;
            *value = pivot;
            *alone = 0;
            return 1;
        } else {
            high = pivot;
            *before = plus(above, equal);
        }
    }
    if (value_of(plus(*before, mass_of(r, n))) < o->target) return 0;
    *value = bisect(r, n, o->target, before, alone);
    return 1;
}

/* The id at which the class of equals has reached what is wanted beyond `before`. */
static int64_t last_of_class(const assay_spec_request *r, const order *o, float value, assay_mass before) {
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
        arrange(r, o, values, weights, n);
        for (int64_t i = 0; i < n; i++) {
            if (values[i] != value) continue;
            assay_mass none = {0, 0};
            last = b * ASSAY_VOCAB_BLOCK + where[i];
            k->tally(values + i, weights + i, 1, -INFINITY, &before, &none);
            if (value_of(before) >= o->target) return last;
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
static float end_of_range(const assay_spec_request *r, const order *o, float distance, int closed, int upper) {
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
static int select_first(const assay_spec_request *r, order *o, assay_range *range) {
    float value;
    assay_mass before;
    int alone;
    const float least = o->least;
    if (!find_class(r, o, &value, &before, &alone)) return 0;
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

/* The logit z T from the top, or a little less. */
static float logit_at(const assay_spec_request *r, double z) {
    return (float)fmax((double)r->s.top + (z - 1e-3) / (double)r->inverse_t, -FLT_MAX);
}

/* A share of the total weight. All elements of weight (total - target) / V or less together are no more than the rest. */
static order of_share(const assay_spec_request *r, float share, double total) {
    order o = {.target = (double)share * total, .total = total};
    const double rest = (total - o.target) / (double)r->call->a->vocab;
    o.least = rest > 0 ? logit_at(r, log(rest)) : -FLT_MAX;
    return o;
}

static void raise_least(assay_spec_request *r, float least) { r->s.least = fmaxf(r->s.least, least); }

void assay_spec_find_cuts(assay_spec_request *r) {
    const assay_verify_args *a = r->call->a;
    assay_range range;
    r->s.least = -FLT_MAX;
    if (uses_top_k(r)) {
        const int64_t elements = a->top_k[r->b];
        order o = {.elements = elements, .target = (double)elements, .least = least_of_so_many(r, elements)};
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
            order all = {.least = r->s.least};
            assay_mass above, equal;
            gather(r, &all, -INFINITY, -FLT_MAX, &above, &equal);
            total = value_of(plus(above, equal));
        }
        order o = of_share(r, a->top_p[r->b], total);
        if (r->s.cuts) o.least = fmaxf(o.least, r->s.least);
        if (select_first(r, &o, &range)) {
            r->s.by_logit = range;
            r->s.cuts |= CUT_LOGITS;
            raise_least(r, range.least);
        }
    }
    if (uses_min_p(r)) {
        r->s.cuts |= CUT_MIN_P;
        raise_least(r, logit_at(r, log((double)a->min_p[r->b])));
    }
    if (uses_typical_p(r)) {
        double total;
        const float center = (float)assay_spec_mean_exponent(r, &total);
        order o = of_share(r, a->typical_p[r->b], total);
        o.by_distance = 1;
        o.center = center;
        /* Below twice the mean exponent lies what is farther from it than the top. */
        o.least = fmaxf(fminf(o.least, logit_at(r, 2 * (double)center)), r->s.least);
        if (select_first(r, &o, &range)) {
            r->s.by_distance = range;
            r->s.cuts |= CUT_TYPICAL;
            raise_least(r, range.least);
        }
    }
}

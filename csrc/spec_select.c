/* Where an order of a row's elements has enough, for the filters (spec_filter.c).
 *
 *   a guess      one element in thirty-two tells between which two values of the order the cut lies, with a margin of five
 *                standard deviations; where few elements can matter at all, those are taken and nothing need be guessed
 *   one pass     adds up what lies before the two, and stores what lies between: some thousands of elements
 *   bisection    of what was stored, by an element of it (a pivot), until the class of equals with which there is enough is found
 *
 * A guess that fails costs a pass, and the next starts from what it found; at last the row is bisected by passes over it. */
#include "spec_rows.h"

#include <float.h>
#include <math.h>

enum { SAMPLE_EACH = 1024, SAMPLE_RUN = 32, FEW = 4096 };

void assay_spec_arrange(const assay_spec_request *r, const assay_spec_order *o, float *values, float *weights, int64_t n) {
    if (o->elements)
        for (int64_t i = 0; i < n; i++) weights[i] = 1;
    else
        r->call->kernel->weights(values, ASSAY_F32, n, r->s.top, r->inverse_t, weights);
    if (!o->by_distance) return;
    const float top = r->s.top, inverse_t = r->inverse_t, center = o->center;
    for (int64_t i = 0; i < n; i++) values[i] = -fabsf((values[i] - top) * inverse_t - center);
}

int64_t assay_spec_gather(const assay_spec_request *r, const assay_spec_order *o, float low, float high, assay_mass *above,
                          assay_mass *equal) {
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
        assay_spec_arrange(r, o, values, weights, n);
        if (high < INFINITY) k->tally(values, weights, n, high, above, equal);
        const int64_t at = assay_min_i64(count, ASSAY_SPEC_CANDIDATES);
        count += k->between(values, weights, n, low, high, c->values + at, c->weights + at);
    }
    return count;
}

/* The sample of an order, and what is known from it: so many elements (0: there is none), of which the first were taken one of so
 * many, and what they weigh. */
typedef struct {
    int64_t count, light;
    double share, all;
} survey;

float assay_spec_logit_at(const assay_spec_request *r, double z) {
    return (float)fmax((double)r->s.top + (z - 1e-3) / (double)r->inverse_t, -FLT_MAX);
}

/* Takes one element in SAMPLE_EACH / SAMPLE_RUN, or fewer. Those that weigh the most may lie anywhere in an order by distance, and
 * one of them more or less in a sample would move everything: they are taken all, with so much less weight. */
static survey sample(const assay_spec_request *r, const assay_spec_order *o) {
    const assay_spec_verify_kernel *k = r->call->kernel;
    assay_spec_candidates *c = &r->call->candidates[r->b];
    _Alignas(64) float buffer[ASSAY_VOCAB_BLOCK];
    const int64_t most = SAMPLE_EACH / SAMPLE_RUN * ASSAY_SPEC_SAMPLE;
    const int64_t stride = SAMPLE_EACH * ((r->call->a->vocab + most - 1) / most);
    const int few_weigh = o->by_distance && o->total < ASSAY_SPEC_HEAVY;
    const float heavy = few_weigh ? assay_spec_logit_at(r, log(o->total / ASSAY_SPEC_HEAVY)) : INFINITY;
    int dtype;
    int64_t seen = 0;
    survey s = {0};
    for (int64_t b = 0; b < r->call->block_count; b++) {
        const int64_t n = assay_spec_block_length(r, b), from = b * ASSAY_VOCAB_BLOCK;
        int64_t i = (stride - from % stride) % stride;
        if (i + SAMPLE_RUN > n) continue;
        const uint8_t *view = assay_spec_view(r, b, buffer, &dtype);
        for (; i + SAMPLE_RUN <= n; i += stride) {
            s.count += k->select(view + i * (dtype == ASSAY_F32 ? 4 : 2), dtype, SAMPLE_RUN, -FLT_MAX, c->sampled + s.count, NULL);
            seen += SAMPLE_RUN;
        }
    }
    s.share = (double)seen / (double)r->call->a->vocab;
    if (heavy < INFINITY) s.count = k->between(c->sampled, c->sampled, s.count, -INFINITY, heavy, c->sampled, c->sampled);
    for (int64_t i = 0; i < s.count; i += ASSAY_VOCAB_BLOCK)
        assay_spec_arrange(r, o, c->sampled + i, c->sampled_weights + i, assay_min_i64(ASSAY_VOCAB_BLOCK, s.count - i));
    s.light = s.count;
    for (int64_t b = 0; b < r->call->block_count; b++) {
        if (!(r->blocks[b].largest >= heavy) || s.count > s.light + ASSAY_SPEC_HEAVY) continue;
        const void *view = assay_spec_view(r, b, buffer, &dtype);
        const int64_t n = k->select(view, dtype, assay_spec_block_length(r, b), heavy, c->sampled + s.count, NULL);
        if (!n) continue;
        assay_spec_arrange(r, o, c->sampled + s.count, c->sampled_weights + s.count, n);
        for (int64_t i = 0; i < n; i++) c->sampled_weights[s.count + i] *= (float)s.share;
        s.count += n;
    }
    return s;
}

/* An element of n: the median of three medians of three. */
static float median3(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }
static float pivot_of(const float *values, int64_t n) {
    float m[3];
    for (int64_t i = 0; i < 3; i++)
        m[i] = median3(values[n * (3 * i) / 9], values[n * (3 * i + 1) / 9], values[n * (3 * i + 2) / 9]);
    return median3(m[0], m[1], m[2]);
}

/* Among n elements, which with `before` are enough: the value of the class with which there is; *before grows to what lies
 * above it. *alone: whether it has one element. What is left of them after each step lies among the candidates. */
static float bisect(const assay_spec_request *r, const float *values, const float *weights, int64_t n, double target,
                    assay_mass *before, int *alone) {
    const assay_spec_verify_kernel *k = r->call->kernel;
    assay_spec_candidates *c = &r->call->candidates[r->b];
    for (;;) {
        const float pivot = pivot_of(values, n);
        assay_mass above = *before, equal = {0, 0};
        k->tally(values, weights, n, pivot, &above, &equal);
        if (assay_mass_value(above) >= target) {
            n = k->between(values, weights, n, pivot, INFINITY, c->values, c->weights);
        } else if (assay_mass_value(assay_mass_sum(above, equal)) >= target) {
            int64_t equals = 0;
            for (int64_t i = 0; i < n; i++) equals += values[i] == pivot;
            *alone = equals == 1;
            *before = above;
            return pivot;
        } else {
            *before = assay_mass_sum(above, equal);
            n = k->between(values, weights, n, -INFINITY, pivot, c->values, c->weights);
        }
        values = c->values;
        weights = c->weights;
    }
}

static assay_mass mass_of(const assay_spec_request *r, const float *values, const float *weights, int64_t n) {
    assay_mass all = {0, 0}, none = {0, 0};
    r->call->kernel->tally(values, weights, n, -INFINITY, &all, &none);
    return all;
}

/* A place in the order, and how much lies above it: of all, and of the sample. */
typedef struct {
    float value;
    double above, sampled;
} anchor;

/* A value of the order that so much of the sample lies above. */
static float quantile(const assay_spec_request *r, const survey *s, double above) {
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    int alone;
    assay_mass before = {0, 0};
    return bisect(r, c->sampled, c->sampled_weights, s->count, above, &before, &alone);
}

static double sampled_above(const assay_spec_request *r, const survey *s, float value) {
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    assay_mass above = {0, 0}, equal = {0, 0};
    r->call->kernel->tally(c->sampled, c->sampled_weights, s->count, value, &above, &equal);
    return assay_mass_value(above);
}

/* Samples the order where that pays, and begins at the end of it that is known: the first elements where so many are wanted, the
 * tail of a share, for its many small weights are known better than what comes before them. */
static survey begin_survey(const assay_spec_request *r, const assay_spec_order *o, anchor *a) {
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    survey s = {0};
    if (r->call->a->vocab <= ASSAY_SPEC_CANDIDATES) return s;
    if (o->elements && o->least > -FLT_MAX) return s; /* few: least is that of as many blocks */
    s = sample(r, o);
    s.all = assay_mass_value(mass_of(r, c->sampled, c->sampled_weights, s.count));
    if (o->elements) {
        *a = (anchor){INFINITY, 0, 0};
        return s;
    }
    *a = (anchor){-INFINITY, o->total, s.all};
    int64_t matter = 0;
    if (!o->by_distance)
        for (int64_t i = 0; i < s.light; i++) matter += c->sampled[i] >= o->least;
    if (!o->by_distance && (double)matter < FEW * s.share) s.count = 0;
    return s;
}

static int fits(const assay_spec_request *r, const survey *s, float low, float high) {
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    int64_t inside = 0;
    for (int64_t i = 0; i < s->light; i++) inside += c->sampled[i] > low && c->sampled[i] < high;
    return (double)inside < 0.9 * ASSAY_SPEC_CANDIDATES * s->share;
}

/* Narrows the values between which the cut is known to lie to where it is likely to: where the sample has what is missing from
 * the anchor on, give or take five standard deviations of what it has on the way there; half of it where that is too many. */
static void guess(const assay_spec_request *r, const assay_spec_order *o, const survey *s, const anchor *a, float *low,
                  float *high) {
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    const float least = *low, most = *high;
    if (!s->count || (least > -INFINITY && most < INFINITY && fits(r, s, least, most))) return;
    const double middle = a->sampled + (o->target - a->above) * s->share;
    if (!(middle > 0 && middle < s->all)) return;
    const float value = quantile(r, s, middle), from = fminf(value, a->value), to = fmaxf(value, a->value);
    /* In lanes, that a compiler may take together; of what is behind the last sixteen nothing. */
    float square[16] = {0}, largest[16] = {0};
    for (int64_t i = 0; i + 16 <= s->light; i += 16)
        for (int j = 0; j < 16; j++) {
            const float v = c->sampled[i + j], w = (v >= from) & (v <= to) ? c->sampled_weights[i + j] : 0;
            square[j] += w * w;
            largest[j] = w > largest[j] ? w : largest[j];
        }
    double squares = 0, most_of_one = 0;
    for (int j = 0; j < 16; j++) {
        squares += (double)square[j];
        most_of_one = (double)largest[j] > most_of_one ? (double)largest[j] : most_of_one;
    }
    double spread = 5 * sqrt(squares) + most_of_one;
    for (int i = 0; i < 2; i++, spread /= 2) {
        /* Between them and no nearer, lest both be one value. */
        *low = middle + spread < s->all ? fmaxf(least, nextafterf(quantile(r, s, middle + spread), -INFINITY)) : least;
        *high = middle - spread > 0 ? fminf(most, nextafterf(quantile(r, s, middle - spread), INFINITY)) : most;
        if (fits(r, s, *low, *high)) return;
    }
}

/* The class of equals with which there is enough, by passes over the row that halve what may hold it. 0 when all is not enough. */
static int search_class(const assay_spec_request *r, const assay_spec_order *o, float *value, assay_mass *before, int *alone) {
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    assay_mass above, equal;
    float low = -INFINITY, high = INFINITY;
    int64_t n;
    *before = (assay_mass){0, 0};
    for (;;) {
        n = assay_spec_gather(r, o, low, high, &above, &equal);
        if (n <= ASSAY_SPEC_CANDIDATES) break;
        const float pivot = pivot_of(c->values, ASSAY_SPEC_CANDIDATES);
        assay_spec_gather(r, o, low, pivot, &above, &equal);
        if (assay_mass_value(above) >= o->target) {
            low = pivot;
        } else if (assay_mass_value(assay_mass_sum(above, equal)) >= o->target) {
            *before = above;
            *value = pivot;
            *alone = 0;
            return 1;
        } else {
            high = pivot;
            *before = assay_mass_sum(above, equal);
        }
    }
    if (assay_mass_value(assay_mass_sum(*before, mass_of(r, c->values, c->weights, n))) < o->target) return 0;
    *value = bisect(r, c->values, c->weights, n, o->target, before, alone);
    return 1;
}

/* The same, mostly by one pass; *before: what lies above the class. A guess that fails tells exactly how much lies above a value
 * near the cut: the next one is between it and what else is known, and starts from there. */
int assay_spec_find_class(const assay_spec_request *r, assay_spec_order *o, float *value, assay_mass *before, int *alone) {
    enum { GUESSES = 6 };
    const assay_spec_candidates *c = &r->call->candidates[r->b];
    anchor from = {-INFINITY, 0, 0};
    const survey s = begin_survey(r, o, &from);
    float least = -INFINITY, most = INFINITY, last_low = NAN, last_high = NAN; /* the cut lies between the first two */
    for (int i = 0; i < GUESSES; i++) {
        assay_mass above, equal;
        float low = least, high = most;
        guess(r, o, &s, &from, &low, &high);
        if (!(low < high) || (i && low == last_low && high == last_high)) break;
        last_low = low;
        last_high = high;
        const int64_t n = assay_spec_gather(r, o, low, high, &above, &equal);
        if (assay_mass_value(above) >= o->target) {
            from = (anchor){high, assay_mass_value(above), sampled_above(r, &s, high)};
            least = high;
            continue;
        }
        *before = above = assay_mass_sum(above, equal);
        if (assay_mass_value(above) >= o->target || (n > ASSAY_SPEC_CANDIDATES && !s.count)) break;
        from = (anchor){high, assay_mass_value(above), sampled_above(r, &s, high)};
        most = high;
        if (n > ASSAY_SPEC_CANDIDATES) continue;
        const assay_mass all = assay_mass_sum(above, mass_of(r, c->values, c->weights, n));
        if (assay_mass_value(all) >= o->target) {
            *value = bisect(r, c->values, c->weights, n, o->target, before, alone);
            return 1;
        }
        if (low == -INFINITY) break;
        /* The class of `low` itself may be the one: the next guess is from a value below it. */
        from = (anchor){low, assay_mass_value(all), sampled_above(r, &s, low)};
        most = nextafterf(low, INFINITY);
    }
    o->least = -FLT_MAX;
    return search_class(r, o, value, before, alone);
}

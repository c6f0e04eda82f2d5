/* K-SEQ's rho: the upper end after 16 bisections of [1, K], as assay.h defines it, mostly without a pass for each.
 *
 * What a bisection compares is g(m) = 1 - (1 - beta)^K - m beta at its middle m, with beta = 1/m - R(1/m) and R(s) = sum
 * max(0, p s - q). R is convex in s, rises no faster than sum p, and R(0) = 0. So from R at some places follow bounds at all
 * others: a chord above, the chords of the neighbours on either side below. Where the bounds of beta give one decision, that
 * is the decision; where they do not, a pass finds R at the middle, by the very additions that a bisection would have made, and
 * at three more places near where g is expected to change sign. So rho is the same number, after three or so passes.
 *
 * The bounds hold for what float32 makes of R. The scale of p, the product and the difference are rounded by 2^-24 each,
 * a block's sum adds up to 128 elements a lane and folds four times, the blocks' sum is of doubles: the error is at most
 * 2^-24 (R (127 + 4 + 1 + 1) + 2 s sum p). bound() takes 2^-24 (144 R + 4 s). */
#include "spec_rows.h"

#include <math.h>

/* Middles are 1 + (K - 1) i / 2^16 exactly. */
enum { STEPS = 16, CELLS = 1 << STEPS, MOST_KNOWN = ASSAY_SPEC_SHARES * STEPS + 1 };
/* Sum p is 1 up to the rounding of its weights and sums. */
static const double SUM_P = 1 + 0x1p-10;

/* A place where R is known: i, s = 1 / m, R(s), and g(m) / beta, which falls more evenly than g. */
typedef struct {
    int64_t i;
    double s, rest, slack;
} place;

/* Places by rising i; behind them s = 0, m infinite. */
typedef struct {
    int64_t count; /* siblings */
    int known;
    place at[MOST_KNOWN];
} search;

double assay_spec_any_of(double beta, int64_t count) {
    double none = 1;
    for (int64_t i = 0; i < count; i++) none *= 1 - beta;
    return 1 - none;
}

static double middle_of(const search *f, int64_t i) { return 1 + (double)(f->count - 1) * (double)i / CELLS; }

static int rises(const search *f, double m, double beta) { return assay_spec_any_of(beta, f->count) > m * beta; }

static double error_of(double rest, double s) { return 0x1p-24 * (144 * rest + 4 * s); }

/* The first place at i or behind it. */
static int first_from(const search *f, int64_t i) {
    int k = 0;
    while (f->at[k].i < i) k++;
    return k;
}

/* The line through two places, at s, outside what lies between them; the places' errors make it lower by as much as they can. */
static double beyond(const place *near, const place *far, double s) {
    const double run = (s - near->s) / (near->s - far->s); /* positive */
    const double error = error_of(fmax(near->rest, far->rest), fmax(near->s, far->s));
    return near->rest + (near->rest - far->rest) * run - error * (1 + 2 * run);
}

/* What R computed at s can be, before place k. */
static void bound(const search *f, int k, double s, double *least, double *most) {
    const place *right = &f->at[k], *left = k ? right - 1 : NULL;
    double error;
    if (left) {
        error = error_of(left->rest, left->s);
        const double share = (s - right->s) / (left->s - right->s);
        *most = fmin(left->rest, right->rest + (left->rest - right->rest) * share + error);
    } else {
        *most = right->rest + (s - right->s) * SUM_P + error_of(right->rest, right->s);
        error = error_of(*most, s);
    }
    *least = fmax(0, right->rest - error);
    if (k + 1 < f->known) *least = fmax(*least, beyond(right, right + 1, s));
    if (left) *least = fmax(*least, left->rest - (left->s - s) * SUM_P - error);
    if (k > 1) *least = fmax(*least, beyond(left, left - 1, s));
    *least -= error + 0x1p-40; /* this R's own, and that of the doubles */
    *most += error + 0x1p-40;
}

/* Whether the bisection at i goes up (1) or down (0), or -1 where that is not known. */
static int decision_at(const search *f, int64_t i) {
    const int k = first_from(f, i);
    const double m = middle_of(f, i), s = 1 / m;
    if (f->at[k].i == i) return rises(f, m, s - f->at[k].rest);
    double least, most;
    bound(f, k, s, &least, &most);
    /* g is concave in beta and 0 at 0: positive between two places where it is, negative behind one where it is. */
    const double low = s - most, high = s - least, margin = (double)(f->count + 4) * 0x1p-51;
    const double g_low = assay_spec_any_of(low, f->count) - m * low, g_high = assay_spec_any_of(high, f->count) - m * high;
    if (g_low > margin && g_high > margin) return 1;
    if (low > 0 && g_low < -margin) return 0;
    return -1;
}

static void add_place(search *f, int64_t i, double rest) {
    const int k = first_from(f, i);
    if (f->at[k].i == i) return;
    for (int j = f->known++; j > k; j--) f->at[j] = f->at[j - 1];
    const double m = middle_of(f, i), s = 1 / m, beta = s - rest;
    f->at[k] = (place){i, s, rest, (beta > 0 ? assay_spec_any_of(beta, f->count) / beta : (double)f->count) - m};
}

/* Where the slack is likely to be 0, between low and high, and how far from there it may well be. */
static double guess(const search *f, int64_t low, int64_t high, double *spread) {
    int k = first_from(f, low);
    while (k + 1 < f->known && f->at[k].i < high && f->at[k + 1].i < CELLS && f->at[k].slack > 0) k++;
    /* i as a polynomial in the slack, through the last place before the change of sign and up to three around it (Neville). */
    const int from = k > 2 ? k - 2 : 0, n = f->known - 1 - from < 4 ? f->known - 1 - from : 4;
    double x[4], line = NAN;
    for (int j = 0; j < n; j++) x[j] = (double)f->at[from + j].i;
    for (int width = 1; width < n; width++)
        for (int j = 0; j + width < n; j++) {
            const double a = f->at[from + j].slack, b = f->at[from + j + width].slack;
            x[j] = (a * x[j + 1] - b * x[j]) / (a - b);
            if (width == 1 && from + j + 1 == k) line = x[j];
        }
    const double first = (double)low, last = (double)high;
    if (!(x[0] > first && x[0] < last)) {
        *spread = (last - first) / 8;
        return (first + last) / 2;
    }
    *spread = line > first && line < last ? fabs(line - x[0]) / 8 : (last - first) / 16;
    return x[0];
}

/* A pass over the row, at these places and those known not again. Returns 0 when q is no distribution. */
static int measure(assay_spec_request *r, search *f, const int64_t where[ASSAY_SPEC_SHARES]) {
    double shares[ASSAY_SPEC_SHARES], rests[ASSAY_SPEC_SHARES];
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++) shares[j] = 1 / middle_of(f, where[j]);
    assay_spec_residuals(r, shares, rests);
    if (isnan(rests[0])) return 0;
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++) add_place(f, where[j], rests[j]);
    return 1;
}

static int64_t inside(double i) { return (int64_t)fmin(fmax(i, 0), CELLS); }

double assay_spec_kseq_rho(assay_spec_request *r, int64_t count) {
    if (count == 1) return 1;
    search f = {.count = count, .known = 1, .at = {{INT64_MAX, 0, 0, 0}}};
    /* Drafts that are any good put rho into the lower half. */
    const int is_law = measure(r, &f, (int64_t[]){0, CELLS / 8, CELLS / 4, CELLS / 2});
    r->counters[ASSAY_ROWS_RESAMPLED] += is_law ? STEPS : 1; /* as the bisection has it, whatever was done instead */
    if (!is_law) return NAN;
    int64_t low = 0, high = CELLS;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        int up = decision_at(&f, middle);
        if (up < 0) {
            double spread;
            const double root = guess(&f, low, high, &spread);
            const double other = root > (double)middle ? root + 4 * spread + 16 : root - 4 * spread - 16;
            const int64_t where[] = {middle, inside(floor(root - spread)), inside(ceil(root + spread)), inside(other)};
            measure(r, &f, where);
            up = decision_at(&f, middle);
        }
        if (up) low = middle;
        else high = middle;
    }
    return middle_of(&f, high);
}

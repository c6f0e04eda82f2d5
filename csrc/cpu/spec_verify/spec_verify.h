/* spec_verify's kernels: passes over one block of one row of logits. Which blocks, in which order, and what becomes of the
 * results is spec_rows.c's business, the same for every variant; so are the bits.
 *
 * `row` points at the block's first element; 1 <= n <= ASSAY_VOCAB_BLOCK; `out` holds a whole block, and gets zeros up to
 * the next multiple of 16. Sums: 16 float32 lanes, element i in lane i mod 16, folded as vexp.h says. */
#ifndef ASSAY_SPEC_VERIFY_H
#define ASSAY_SPEC_VERIFY_H

#include "../../kernels.h"

/* The least -log(1 - u) / weight so far, and whose it is; u is keyed by seed, position and token. */
typedef struct {
    uint64_t seed, position;
    double time;
    int64_t token;
} assay_race;

/* A sum of weights of at most 1, each rounded to a multiple of 2^-46: high times 2^-23 and low, of either sign, times 2^-46.
 * Exact, hence the same in any order. */
typedef struct {
    int64_t high, low;
} assay_mass;

/* What a filter leaves: elements strictly between `low` and `high`, and of the others those from `least` to `most` whose place
 * is `last` or one before. */
typedef struct {
    float low, high, least, most;
    int64_t last;
} assay_range;

enum { ASSAY_SPEC_SHARES = 4 };

typedef struct {
    /* The largest element; NaN when any is. */
    float (*largest)(const void *row, int dtype, int64_t n);
    /* The same; where an element is NaN, NaN or the largest of the others. */
    float (*peak)(const void *row, int dtype, int64_t n);
    /* The first element equal to value; -1 when there is none. */
    int64_t (*find)(const void *row, int dtype, int64_t n, float value);
    /* The elements that are `least` or more, in order, and where they stand (or NULL); returns how many. Both arrays hold 16
     * more than a block, which may be overwritten. least is finite, no element is NaN. */
    int64_t (*select)(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where);
    /* out[i] = row[i] as float32 where the range has it, else minus infinity; returns the largest. out may be row. */
    float (*keep)(const void *row, int dtype, int64_t n, const assay_range *range, float *out);
    /* Adds up the weights of the elements above the pivot, and of those that equal it. n <= 2^31 / 2048 blocks' worth. */
    void (*tally)(const float *values, const float *weights, int64_t n, float pivot, assay_mass *above, assay_mass *equal);
    /* The pairs whose value lies strictly between low and high, in order; returns how many. out holds 16 more than n pairs, or
     * is where they stand. */
    int64_t (*between)(const float *values, const float *weights, int64_t n, float low, float high, float *values_out,
                       float *weights_out);
    /* out[i] = vexp((row[i] - shift) * inverse_t); returns their sum. shift is finite and the largest element or more. */
    float (*weights)(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *out);
    /* The sum alone, NaN when an element is; and where next_n > 0, the peak of so many elements behind these. Meanwhile n
     * elements from `ahead` on are fetched into the caches: a hint, which need not be memory at all. */
    float (*sum)(const void *row, int dtype, int64_t n, float shift, float inverse_t, const void *ahead, int64_t next_n,
                 float *next_peak);
    /* Of z[i] = (row[i] - shift) * inverse_t, weighted by vexp(z[i]), where that is not 0: the sum; *total gets the weights'. */
    float (*moment)(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *total);
    /* out[i] = max(0, vexp((row[i] - shift) * inverse_t) * scale - q[i] * c); returns their sum, or NaN when a q[i] is
     * NaN, infinite or negative. */
    float (*residual)(const void *row, int dtype, int64_t n, float shift, float inverse_t, float scale, const float *q,
                      float c, float *out);
    /* What residual returns for each of ASSAY_SPEC_SHARES scales with c = 1, and nothing else of it: sums[j] for scales[j]. */
    void (*residuals)(const void *row, int dtype, int64_t n, float shift, float inverse_t, const float *scales, const float *q,
                      float *sums);
    /* Lets n weights, of the tokens from `first` on, into the race: n a multiple of 16, first even, weight 0 stays out. */
    void (*race)(const float *weights, int64_t n, int64_t first, assay_race *race);
} assay_spec_verify_kernel;

#endif

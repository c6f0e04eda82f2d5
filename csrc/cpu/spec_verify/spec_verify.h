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

typedef struct {
    /* The largest element; NaN when any is. */
    float (*largest)(const void *row, int dtype, int64_t n);
    /* The same; where an element is NaN, NaN or the largest of the others. */
    float (*peak)(const void *row, int dtype, int64_t n);
    /* The first element equal to value; -1 when there is none. */
    int64_t (*find)(const void *row, int dtype, int64_t n, float value);
    /* The elements that are `least` or more, in order, and where they stand; returns how many. Both arrays hold 16 more than
     * a block, which may be overwritten. least is finite, no element is NaN. */
    int64_t (*select)(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where);
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
    /* Lets n weights, of the tokens from `first` on, into the race: n a multiple of 16, first even, weight 0 stays out. */
    void (*race)(const float *weights, int64_t n, int64_t first, assay_race *race);
} assay_spec_verify_kernel;

#endif

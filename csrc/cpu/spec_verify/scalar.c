/* Passes over a block of logits in portable C (spec_verify.h states them): what the other variants must equal bit for bit. */
#include "spec_verify.h"
#include "mass.h"
#include "race.h"
#include "../float16.h"
#include "../vexp.h"

#include <float.h>

static float largest(const void *row, int dtype, int64_t n) {
    float m = -INFINITY;
    int nan = 0;
    for (int64_t i = 0; i < n; i++) {
        const float x = assay_load_f32(row, dtype, i);
        nan |= x != x;
        m = x > m ? x : m;
    }
    return nan ? NAN : m;
}

static int64_t find(const void *row, int dtype, int64_t n, float value) {
    for (int64_t i = 0; i < n; i++)
        if (assay_load_f32(row, dtype, i) == value) return i;
    return -1;
}

static int64_t select(const void *row, int dtype, int64_t n, float least, float *values, int32_t *where) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        const float x = assay_load_f32(row, dtype, i);
        values[count] = x;
        if (where) where[count] = (int32_t)i;
        count += x >= least;
    }
    return count;
}

static float keep(const void *row, int dtype, int64_t n, const assay_range *range, float *out) {
    float m = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        const float x = assay_load_f32(row, dtype, i);
        const int inner = x > range->low && x < range->high, outer = x >= range->least && x <= range->most;
        out[i] = inner || (outer && i <= range->last) ? x : -INFINITY;
        m = out[i] > m ? out[i] : m;
    }
    return m;
}

static void tally(const float *values, const float *weights, int64_t n, float pivot, assay_mass *above, assay_mass *equal) {
    for (int64_t i = 0; i < n; i++) {
        const float whole = weights[i] + 1.0f, rest = (weights[i] - (whole - 1.0f)) + MASS_LOW;
        if (values[i] < pivot) continue;
        assay_mass *of = values[i] > pivot ? above : equal;
        of->high += assay_bits_of(whole) - assay_bits_of(1.0f);
        of->low += assay_bits_of(rest) - assay_bits_of(MASS_LOW);
    }
}

static int64_t between(const float *values, const float *weights, int64_t n, float low, float high, float *values_out,
                       float *weights_out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        const float x = values[i];
        values_out[count] = x;
        weights_out[count] = weights[i];
        count += x > low && x < high;
    }
    return count;
}

static float weights(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *out) {
    float lane[16] = {0};
    for (int64_t i = 0; i < assay_round_up(n, 16); i++) {
        out[i] = i < n ? assay_vexp((assay_load_f32(row, dtype, i) - shift) * inverse_t) : 0;
        lane[i % 16] += out[i];
    }
    return assay_fold16(lane);
}

static float residual(const void *row, int dtype, int64_t n, float shift, float inverse_t, float scale, const float *q,
                      float c, float *out) {
    float lane[16] = {0};
    int bad = 0;
    for (int64_t i = 0; i < assay_round_up(n, 16); i++) {
        out[i] = 0;
        if (i < n) {
            const float p = assay_vexp((assay_load_f32(row, dtype, i) - shift) * inverse_t) * scale;
            const float excess = p - q[i] * c;
            bad |= !(q[i] >= 0 && q[i] <= FLT_MAX);
            if (excess > 0) out[i] = excess;
        }
        lane[i % 16] += out[i];
    }
    return bad ? NAN : assay_fold16(lane);
}

static void residuals(const void *row, int dtype, int64_t n, float shift, float inverse_t, const float *scales, const float *q,
                      float *sums) {
    float lanes[ASSAY_SPEC_SHARES][16] = {{0}};
    int bad = 0;
    for (int64_t i = 0; i < n; i++) {
        const float e = assay_vexp((assay_load_f32(row, dtype, i) - shift) * inverse_t);
        bad |= !(q[i] >= 0 && q[i] <= FLT_MAX);
        for (int j = 0; j < ASSAY_SPEC_SHARES; j++) {
            const float excess = e * scales[j] - q[i];
            lanes[j][i % 16] += excess > 0 ? excess : 0;
        }
    }
    for (int j = 0; j < ASSAY_SPEC_SHARES; j++) sums[j] = bad ? NAN : assay_fold16(lanes[j]);
}

static float sum(const void *row, int dtype, int64_t n, float shift, float inverse_t, const void *ahead, int64_t next_n,
                 float *next_peak) {
    (void)ahead;
    if (next_n) *next_peak = largest((const uint8_t *)row + n * (dtype == ASSAY_F32 ? 4 : 2), dtype, next_n);
    float lane[16] = {0};
    for (int64_t i = 0; i < n; i++) lane[i % 16] += assay_vexp((assay_load_f32(row, dtype, i) - shift) * inverse_t);
    return assay_fold16(lane);
}

static float moment(const void *row, int dtype, int64_t n, float shift, float inverse_t, float *total) {
    float lane[16] = {0}, weight[16] = {0};
    for (int64_t i = 0; i < n; i++) {
        const float z = (assay_load_f32(row, dtype, i) - shift) * inverse_t, e = assay_vexp(z);
        weight[i % 16] += e;
        if (e > 0) lane[i % 16] += e * z;
    }
    *total = assay_fold16(weight);
    return assay_fold16(lane);
}

static void race(const float *weights, int64_t n, int64_t first, assay_race *race) {
    for (int64_t i = 0; i < n; i += 2) {
        if (!(weights[i] > 0) && !(weights[i + 1] > 0)) continue;
        uint32_t x[4] = {(uint32_t)race->position, (uint32_t)(race->position >> 32), ASSAY_NOISE, (uint32_t)((first + i) / 2)};
        assay_philox4x32(x, (uint32_t)race->seed, (uint32_t)(race->seed >> 32));
        for (int64_t j = 0; j < 2; j++)
            if (weights[i + j] > 0) assay_race_try(race, x[2 * j], x[2 * j + 1], weights[i + j], first + i + j);
    }
}

const assay_spec_verify_kernel assay_spec_verify_scalar = {largest, largest, find, select, keep, tally, between, weights, sum, moment, residual,
                                                           residuals, race};

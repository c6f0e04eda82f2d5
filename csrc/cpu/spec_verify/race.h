/* The exponential race, element by element: what the variants' passes leave to decide once most are ruled out. */
#ifndef ASSAY_SPEC_VERIFY_RACE_H
#define ASSAY_SPEC_VERIFY_RACE_H

#include "spec_verify.h"
#include "../logarithm.h"
#include "../../philox.h"

/* -log(1 - u) > u: u / weight above the best time is beaten without a logarithm. The margins are for roundings, the
 * second one for float32. */
#define RACE_MARGIN 0.999999
#define RACE_MARGIN_F32 0.99999f

static inline void assay_race_at(assay_race *race, double u, float weight, int64_t token) {
    if (u * RACE_MARGIN > race->time * (double)weight) return;
    const double time = -assay_log(1.0 - u) / (double)weight;
    if (time < race->time) {
        race->time = time;
        race->token = token;
    }
}

static inline void assay_race_try(assay_race *race, uint32_t low, uint32_t high, float weight, int64_t token) {
    assay_race_at(race, assay_unit_interval(low, high), weight, token);
}

/* Philox's first round, in which only the last of the counter's words differs between the elements of a row: the state
 * before it is taken in, and the key of the second round. */
typedef struct {
    uint32_t x[4], key[2];
} assay_race_start;

static inline assay_race_start assay_race_begin(const assay_race *race) {
    const uint64_t a = (uint64_t)PHILOX_M0 * (uint32_t)race->position, b = (uint64_t)PHILOX_M1 * ASSAY_NOISE;
    const uint32_t key0 = (uint32_t)race->seed, key1 = (uint32_t)(race->seed >> 32);
    return (assay_race_start){{(uint32_t)(b >> 32) ^ (uint32_t)(race->position >> 32) ^ key0, (uint32_t)b,
                               (uint32_t)(a >> 32) ^ key1, (uint32_t)a},
                              {key0 + PHILOX_W0, key1 + PHILOX_W1}};
}

#endif

/* Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Random123), the counter-based
 * generator of every random decision: the same number for the same key and counter, whatever was drawn before. */
#ifndef ASSAY_PHILOX_H
#define ASSAY_PHILOX_H

#include "cpu/vexp.h" /* ASSAY_SHARED */

#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u

ASSAY_SHARED void assay_philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)PHILOX_M0 * counter[0], b = (uint64_t)PHILOX_M1 * counter[2];
        counter[0] = (uint32_t)(b >> 32) ^ counter[1] ^ key0;
        counter[1] = (uint32_t)b;
        counter[2] = (uint32_t)(a >> 32) ^ counter[3] ^ key1;
        counter[3] = (uint32_t)a;
        key0 += PHILOX_W0;
        key1 += PHILOX_W1;
    }
}

/* A number in (0, 1) of two of the words. */
ASSAY_SHARED double assay_unit_interval(uint32_t low, uint32_t high) {
    /* 52 bits, so that adding a half is exact: never 0, never 1. */
    return ((double)(((uint64_t)high << 32 | low) >> 12) + 0.5) * 0x1p-52;
}

#endif

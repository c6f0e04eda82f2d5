/* From a weight to its mass (assay_mass) by two additions whose rounding does it: 1 + w is the multiple of 2^-23 nearest to w,
 * in the low bits of a float; what w differs from it by, at most 2^-24, plus MASS_LOW is the nearest of 2^-46. */
#ifndef ASSAY_SPEC_VERIFY_MASS_H
#define ASSAY_SPEC_VERIFY_MASS_H

#include "spec_verify.h"

#include <string.h>

#define MASS_LOW 0x1.8p-23f
/* So many weights' parts fit an int32: a sum's lanes are emptied at the latest after this many additions. */
enum { MASS_STEPS = 128 };

static inline int32_t assay_bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

#endif

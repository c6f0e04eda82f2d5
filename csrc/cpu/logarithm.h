/* log(y) in float64 for finite y > 0, the same bits in every variant and twin: IEEE operations alone, none fused.
 *
 *   y = m 2^e, m in [3/4, 3/2);  s = (m - 1) / (m + 1);  log(y) = e ln(2) + 2 s (1 + z/3 + z^2/5 + ... + z^8/17), z = s^2
 *
 * |s| <= 1/5, so that what is cut off is below z^9 / 19 < 2e-14 of the result; near y = 1 the relative error stays that small,
 * since m - 1 is exact. */
#ifndef ASSAY_LOGARITHM_H
#define ASSAY_LOGARITHM_H

#include "vexp.h" /* ASSAY_SHARED */

ASSAY_SHARED double assay_log(double y) {
    uint64_t bits;
    memcpy(&bits, &y, 8);
    int64_t e = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFFu) | 0x3FF0000000000000u;
    double m;
    memcpy(&m, &bits, 8);
    if (m >= 1.5) {
        m *= 0.5;
        e += 1;
    }
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double sum = 1.0 / 17.0;
    sum = sum * z + 1.0 / 15.0;
    sum = sum * z + 1.0 / 13.0;
    sum = sum * z + 1.0 / 11.0;
    sum = sum * z + 1.0 / 9.0;
    sum = sum * z + 1.0 / 7.0;
    sum = sum * z + 1.0 / 5.0;
    sum = sum * z + 1.0 / 3.0;
    sum = sum * z + 1.0;
    return (double)e * 0x1.62e42fefa39efp-1 + 2.0 * s * sum;
}

#endif

/* From a row of weights to the four bytes of one lane of a line: what packing the layouts of kernels.h comes down to. */
#ifndef ASSAY_LANES_H
#define ASSAY_LANES_H

#include <stdint.h>
#include <string.h>

/* Up to eight 4-bit weights (even k low in its byte; `left` of them are there) as a lane: k + b low, k + 4 + b high. */
static inline uint32_t assay_lane_of_nibbles(const uint8_t *source, int64_t left) {
    uint32_t word = 0;
    if (left >= 8) {
        memcpy(&word, source, 4);
    } else if (left > 0) {
        memcpy(&word, source, (size_t)((left + 1) / 2));
        word &= ((uint32_t)1 << 4 * left) - 1; /* an odd K leaves a nibble that is nobody's */
    }
    const uint32_t even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f; /* q0 q2 q4 q6, q1 q3 q5 q7 */
    const uint32_t low = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
    const uint32_t high = (even >> 16 & 0xff) | (odd >> 16 & 0xff) << 8 | (even >> 24) << 16 | (odd >> 24) << 24;
    return low | high << 4;
}

/* Up to four 8-bit weights as a lane: q + 128. */
static inline uint32_t assay_lane_of_bytes(const int8_t *source, int64_t left) {
    uint32_t word = 0;
    if (left > 0) memcpy(&word, source, left >= 4 ? 4 : (size_t)left);
    return word ^ 0x80808080;
}

#endif

/* The last, incomplete 16 elements of a row, made whole: copied behind them comes minus infinity, which is no maximum,
 * has weight 0, and lets vector code end without masks and without touching memory that is not the row's. */
#ifndef ASSAY_ROW_TAIL_H
#define ASSAY_ROW_TAIL_H

#include "../assay.h"

#include <string.h>

typedef struct {
    _Alignas(64) uint32_t words[16];
} assay_tail;

static inline const void *assay_tail_of(assay_tail *tail, const void *row, int dtype, int64_t from, int64_t n) {
    if (dtype == ASSAY_F32) {
        for (int i = 0; i < 16; i++) tail->words[i] = 0xff800000;
        memcpy(tail->words, (const float *)row + from, (size_t)(n - from) * 4);
    } else {
        const uint32_t lowest = dtype == ASSAY_F16 ? 0xfc00 : 0xff80;
        for (int i = 0; i < 8; i++) tail->words[i] = lowest << 16 | lowest;
        memcpy(tail->words, (const uint16_t *)row + from, (size_t)(n - from) * 2);
    }
    return tail->words;
}

/* 16 elements of q from i on; of the last ones a copy in `tail`, which holds zeros before. */
static inline const float *assay_q_from(const float *q, int64_t i, int64_t n, float *tail) {
    return i + 16 <= n ? q + i : memcpy(tail, q + i, (size_t)(n - i) * 4);
}

#endif

/* What the GEMMs share in AVX-VNNI: vpdpbusd on 256 bits, without the EVEX broadcast or AVX-512's registers. */
#ifndef ASSAY_GEMM_AVXVNNI_H
#define ASSAY_GEMM_AVXVNNI_H

#include "gemm_avx2.h"
#include "gemm_blocks.h"

/* The unsigned operand: a nibble as it lies, a nibble through a table, a byte as it lies. */
enum kind { NIBBLE, TABLE, BYTE };
enum { MR8 = 6 };

/* Adds `k` weights of 16 columns (half a tile) against `rows` rows to acc[2 r + v], columns 8 v...
 * Registers (MR = 6): 12 sums, 2 weights, a broadcast; the mask and the table come from memory. */
INLINE void dot(const uint8_t *lines, const int32_t *a, const int rows, int64_t k, int64_t ahead, const enum kind kind,
                __m256i table, __m256i *acc) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t i = 0; i < k; i += kind == BYTE ? 4 : 8, lines += 128) {
        if (ahead) prefetch(lines + ahead);
        for (int high = 0; high < (kind == BYTE ? 1 : 2); high++, a += rows) {
            __m256i w0 = _mm256_load_si256((const __m256i *)lines);
            __m256i w1 = _mm256_load_si256((const __m256i *)(lines + 32));
            if (high) w0 = _mm256_srli_epi16(w0, 4), w1 = _mm256_srli_epi16(w1, 4);
            if (kind != BYTE) w0 = _mm256_and_si256(w0, nibble), w1 = _mm256_and_si256(w1, nibble);
            if (kind == TABLE) w0 = _mm256_shuffle_epi8(table, w0), w1 = _mm256_shuffle_epi8(table, w1);
            for (int r = 0; r < rows; r++) {
                const __m256i x = _mm256_set1_epi32(a[r]);
                acc[2 * r] = _mm256_dpbusd_avx_epi32(acc[2 * r], w0, x);
                acc[2 * r + 1] = _mm256_dpbusd_avx_epi32(acc[2 * r + 1], w1, x);
            }
            /* Load the line again for its high nibbles rather than keep four weight registers alive. */
            __asm__ volatile("" ::: "memory");
        }
    }
}

#endif

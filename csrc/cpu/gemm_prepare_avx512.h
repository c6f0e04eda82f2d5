/* int8 activations in AVX-512. A row block's codes go out as the multiplication reads them, [k/4][row][4]: sixteen k of every
 * row are packed to bytes and put in that order by one permutation of double words. */
#ifndef ASSAY_GEMM_PREPARE_AVX512_H
#define ASSAY_GEMM_PREPARE_AVX512_H

#include "gemm_avx512.h"

#include <math.h>

enum { MOST_ROWS = 8, GROUPS_AT_ONCE = 16 };

/* x[i .. i + 15]; unless `whole`, zeros from `end` on. */
INLINE __m512 load_some16(const void *row, int dtype, int64_t i, int64_t end, const int whole) {
    const __mmask16 mask = whole || i + 16 <= end ? 0xffff : i < end ? (__mmask16)((1u << (end - i)) - 1) : 0;
    if (dtype == ASSAY_F32)
        return whole ? _mm512_loadu_ps((const float *)row + i) : _mm512_maskz_loadu_ps(mask, (const float *)row + i);
    const void *at = (const uint16_t *)row + i;
    const __m256i half = whole ? _mm256_loadu_si256(at) : _mm256_maskz_loadu_epi16(mask, at);
    if (dtype == ASSAY_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* What a row's groups g0 .. g0 + count - 1 are multiplied by to become codes, and by to come back. Returns the groups that
 * have any code but 0. Sizes compare as integers, NaN and infinity above all numbers. */
INLINE __mmask16 prepare_scales(const assay_w4_layout *l, const void *row, int dtype, int64_t g0, int64_t count, float *to_code,
                                float *scale, const int whole) {
    _Alignas(64) int32_t widest[GROUPS_AT_ONCE] = {0};
    for (int64_t g = 0; g < count; g++) {
        const int64_t begin = (g0 + g) * l->group, end = begin + l->group;
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = begin; i < end; i += 16) {
            const __m512i x = _mm512_castps_si512(load_some16(row, dtype, i, end, whole));
            most = _mm512_max_epi32(most, _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)));
        }
        widest[g] = _mm512_reduce_max_epi32(most);
    }
    const __m512i size = _mm512_load_si512(widest);
    const __m512 amax = _mm512_castsi512_ps(size), most_code = _mm512_set1_ps(127);
    const __mmask16 finite = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(0x7f800000), size);
    const __mmask16 live = finite & _mm512_cmp_ps_mask(amax, _mm512_set1_ps(1e-30f), _CMP_GE_OQ);
    const __m512 back = _mm512_maskz_div_ps(live, amax, most_code);
    _mm512_store_ps(to_code, _mm512_maskz_div_ps(live, most_code, amax));
    _mm512_store_ps(scale, _mm512_mask_blend_ps(finite, _mm512_set1_ps(NAN), back));
    return live;
}

/* Codes and corrections of one group of all rows. */
INLINE void prepare_codes(const assay_gemm_args *p, const uint8_t *a, int64_t row_bytes, int64_t g, const float *to_code,
                          const __mmask16 *keep, int32_t *out, int32_t *comp, __m512i order0, __m512i order1, const int rows,
                          const int whole) {
    const assay_w4_layout *l = &p->l;
    const int64_t begin = g * l->group, end = begin + l->group;
    const __mmask16 store0 = rows < 4 ? (__mmask16)((1u << 4 * rows) - 1) : 0xffff;
    const __mmask16 store1 = rows > 4 ? (__mmask16)((1u << 4 * (rows - 4)) - 1) : 0;
    const __m512i one = _mm512_set1_epi8(1);
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
    for (int64_t i = begin; i < begin + l->group_padded; i += 16, out += 4 * rows) {
        __m128i codes[MOST_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < MOST_ROWS; r++) {
            codes[r] = _mm_setzero_si128();
            if (r >= rows) continue;
            const __m512 x = load_some16(a + r * row_bytes, p->a_dtype, i, end, whole);
            const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(to_code[r * GROUPS_AT_ONCE]));
            codes[r] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(keep ? _mm512_maskz_mov_ps(keep[r], scaled) : scaled));
        }
        const __m256i low0 = _mm256_set_m128i(codes[1], codes[0]), low1 = _mm256_set_m128i(codes[3], codes[2]);
        const __m256i high0 = _mm256_set_m128i(codes[5], codes[4]), high1 = _mm256_set_m128i(codes[7], codes[6]);
        const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(low0), low1, 1);
        const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(high0), high1, 1);
        sum0 = _mm512_dpbusd_epi32(sum0, one, low);
        _mm512_mask_storeu_epi32(out, store0, _mm512_permutex2var_epi32(low, order0, high));
        if (rows > 4) {
            sum1 = _mm512_dpbusd_epi32(sum1, one, high);
            _mm512_mask_storeu_epi32(out + 16, store1, _mm512_permutex2var_epi32(low, order1, high));
        }
    }
    /* Row r's four sums lie in double words 4 r .. 4 r + 3. */
    const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i total = _mm512_permutex2var_epi32(sum0, from, sum1);
    for (int i = 1; i < 4; i++)
        total = _mm512_add_epi32(
            total, _mm512_permutex2var_epi32(sum0, _mm512_add_epi32(from, _mm512_set1_epi32(i)), sum1));
    _mm512_mask_storeu_epi32(comp, (__mmask16)((1u << rows) - 1), _mm512_mullo_epi32(total, _mm512_set1_epi32(-p->center)));
}

INLINE void prepare_block(const assay_gemm_args *p, int64_t row0, const int rows, const int whole) {
    const assay_w4_layout *l = &p->l;
    const int64_t row_bytes = p->lda * (p->a_dtype == ASSAY_F32 ? 4 : 2);
    const uint8_t *a = (const uint8_t *)p->a + row0 * row_bytes;
    float *scales = p->scale + row0 * l->groups;
    int32_t *comp = p->comp + row0 * l->groups, *out = (int32_t *)((int8_t *)p->values + row0 * l->k_padded);
    /* Double word d of 16 k goes out as row d % rows, k/4 = d / rows; it lies at 4 row + k/4. */
    _Alignas(64) int32_t order[2 * 16];
    for (int d = 0; d < 2 * 16; d++) order[d] = d < 4 * rows ? 4 * (d % rows) + d / rows : 0;
    const __m512i order0 = _mm512_load_si512(order), order1 = _mm512_load_si512(order + 16);
    _Alignas(64) float to_code[MOST_ROWS * GROUPS_AT_ONCE], scale[GROUPS_AT_ONCE];
    __mmask16 live[MOST_ROWS];
    for (int64_t g0 = 0; g0 < l->groups; g0 += GROUPS_AT_ONCE) {
        const int64_t count = assay_min_i64(GROUPS_AT_ONCE, l->groups - g0);
        __mmask16 all = 0xffff;
        for (int r = 0; r < rows; r++) {
            live[r] = prepare_scales(l, a + r * row_bytes, p->a_dtype, g0, count, to_code + r * GROUPS_AT_ONCE, scale, whole);
            all &= live[r];
            for (int64_t g = 0; g < count; g++) scales[(g0 + g) * rows + r] = scale[g];
        }
        for (int64_t g = 0; g < count; g++, comp += rows, out += l->group_padded / 4 * rows) {
            __mmask16 keep[MOST_ROWS];
            if (all >> g & 1) {
                prepare_codes(p, a, row_bytes, g0 + g, to_code + g, NULL, out, comp, order0, order1, rows, whole);
                continue;
            }
            for (int r = 0; r < rows; r++) keep[r] = (__mmask16) - (live[r] >> g & 1);
            prepare_codes(p, a, row_bytes, g0 + g, to_code + g, keep, out, comp, order0, order1, rows, whole);
        }
    }
}

#define PREPARE(r)                                                                                                      \
    KERNEL void prepare_##r(const assay_gemm_args *p, int64_t row0) {                                                   \
        if (p->l.group % 32) prepare_block(p, row0, r, 0);                                                              \
        else prepare_block(p, row0, r, 1);                                                                              \
    }
PREPARE(1) PREPARE(2) PREPARE(3) PREPARE(4) PREPARE(5) PREPARE(6) PREPARE(7) PREPARE(8)

static void prepare(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static void (*const blocks[MOST_ROWS])(const assay_gemm_args *, int64_t) = {
        prepare_1, prepare_2, prepare_3, prepare_4, prepare_5, prepare_6, prepare_7, prepare_8};
    if (p->a16) {
        assay_int4_prepare_avx2(p, begin, end);
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        const int64_t row0 = assay_block_row(p->m, p->row_blocks, i);
        blocks[assay_block_row(p->m, p->row_blocks, i + 1) - row0 - 1](p, row0);
    }
}

#endif

/* INT4 GEMM for AVX-512 with BF16 (Zen 4, Cooper Lake and later): w4a16 of bfloat16 activations; all else is AVX-512's.
 *
 * vdpbf16ps adds two products to a float32 lane, the odd word's first, each addition rounded once, subnormals as zero. A
 * nibble has at most 4 significant bits and a bfloat16 8, so products are exact; activations below 2^-100 are zero (assay.h),
 * so all terms of a group are multiples of 2^-107 and none is subnormal. With k in the odd word and k + 1 in the even one it
 * is therefore the chain p = fma(x_k, q_k, p), two links an instruction, at the rate of one vfmadd.
 *   per 8 k x 16 columns: 2 vpshufb, 2 vpsrlw, 4 vpermw make pairs of bfloat16 weights, then 4 vdpbf16ps a row.
 * vpshufb brings bytes 1, 0 and 3, 2 of a lane to its words; vpermw looks the word's low five bits up, in a table that does
 * not mind the fifth. Bound: two vdpbf16ps a cycle from three or four rows on, DRAM below.
 *   registers (MR = 8): 16 sums of a group, 2 weights, 2 words, table, activation; the sums of the row lie in L1. Up to five rows,
 *   groups run side by side, since a chain waits for its own latency. */
#include "../gemm_avx512.h"

enum { MR_PAIRS = 8, MOST_TOGETHER = 4, MOST_PARTS = 20 };

extern const assay_int4_gemm_kernel assay_int4_gemm_avx512vnni;

/* ---- activations ----------------------------------------------------------------------------------- */

/* a[i .. i + 7], zeros from `end` on, and for what is below 2^-100 in size. */
INLINE __m128i load8(const uint16_t *a, int64_t i, int64_t end) {
    uint16_t last[8] = {0};
    if (i + 8 > end && i < end) memcpy(last, a + i, (size_t)(end - i) * sizeof *a);
    const __m128i x = _mm_loadu_si128((const __m128i *)(const void *)(i + 8 <= end ? a + i : last));
    const __m128i size = _mm_and_si128(x, _mm_set1_epi16(0x7fff));
    const __m128i tiny = _mm_cmpgt_epi16(_mm_set1_epi16((127 - 100) << 7), size);
    return _mm_andnot_si128(tiny, x);
}

INLINE void prepare_row(const assay_gemm_args *p, const uint16_t *a, uint32_t *out, float *xsum, const int64_t rows) {
    const assay_w4_layout *l = &p->l;
    for (int64_t g = 0; g < l->groups; g++, xsum += rows) {
        const int64_t begin = g * l->group, end = begin + l->group;
        __m256 sum = _mm256_setzero_ps();
        for (int64_t i = begin; i < begin + l->group_padded; i += 8, out += 4 * rows) {
            const __m128i x = load8(a, i, end);
            sum = _mm256_add_ps(sum, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)));
            const __m128i pairs = _mm_or_si128(_mm_slli_epi32(x, 16), _mm_srli_epi32(x, 16));
            if (rows == 1) {
                _mm_storeu_si128((__m128i *)(void *)out, pairs);
                continue;
            }
            uint32_t pair[4];
            _mm_storeu_si128((__m128i *)(void *)pair, pairs);
            for (int j = 0; j < 4; j++) out[j * rows] = pair[j];
        }
        /* ((0+4)+(2+6)) + ((1+5)+(3+7)) */
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        *xsum = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
}

static void prepare(const assay_gemm_args *p, int64_t begin, int64_t end) {
    if (!p->pairs) {
        assay_int4_gemm_avx512vnni.prepare(p, begin, end);
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        const int64_t row0 = assay_block_row(p->m, p->row_blocks, i);
        const int64_t rows = assay_block_row(p->m, p->row_blocks, i + 1) - row0;
        const uint16_t *a = (const uint16_t *)p->a + row0 * p->lda;
        uint32_t *out = (uint32_t *)p->values + row0 * (p->l.k_padded / 2);
        float *xsum = p->scale + row0 * p->l.groups;
        if (rows == 1) prepare_row(p, a, out, xsum, 1);
        else
            for (int64_t r = 0; r < rows; r++) prepare_row(p, a + r * p->lda, out + r, xsum + r, rows);
    }
}

/* ---- one row block against one tile ------------------------------------------------------------------ */

/* Words 1, 0 of each lane from its bytes `high`, `low`; the words' upper bytes are whatever. */
INLINE __m512i bytes_of(int high, int low) {
    const __m128i lanes = _mm_setr_epi32(0, 4, 8, 12);
    const __m128i one = _mm_set1_epi32(low | low << 8 | high << 16 | high << 24);
    return _mm512_broadcast_i32x4(_mm_add_epi8(one, _mm_mullo_epi32(lanes, _mm_set1_epi32(0x01010101))));
}

INLINE __m512i weights_table(void) {
    /* bfloat16 0 .. 15, twice. */
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
}

INLINE __m512 dot(__m512 sum, __m512i x, __m512i q) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)q); }

/* `together` groups from g on, each with sums of its own: with few rows a single group's chain would wait for its own
 * latency. */
INLINE void groups16(const assay_gemm_args *p, const uint8_t *tile, const int32_t *x, const float *xsum, __m512 *f, int64_t g,
                     const reach *ahead, const int rows, const int together) {
    const assay_w4_layout *l = &p->l;
    const __m512i table = weights_table(), bytes01 = bytes_of(0, 1), bytes23 = bytes_of(2, 3);
    const int64_t pairs = l->group_padded / 2 * rows;
    const uint8_t *at[MOST_TOGETHER];
    __m512 part[MOST_PARTS];
#pragma GCC unroll 4
    for (int i = 0; i < together; i++) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g + i);
        at[i] = block + ASSAY_SCALE_BYTES;
        prefetch(block + ahead->line[0]);
        if (!l->symmetric && (g + i) % 4 == 0) prefetch(tile + assay_w4_zero_offset(l, g + i) + ahead->line[1]);
#pragma GCC unroll 16
        for (int j = 0; j < 2 * rows; j++) {
            const __m512 z = l->symmetric ? _mm512_set1_ps(8)
                                          : _mm512_cvtepi32_ps(zero_of(tile + assay_w4_zero_offset(l, g + i), j % 2));
            part[2 * rows * i + j] = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), z), _mm512_set1_ps(xsum[i * rows + j / 2]));
        }
    }
    for (int64_t k = 0; k < l->group_padded; k += 32)
#pragma GCC unroll 1
        for (int step = 0; step < 4; step++, x += 4 * rows) {
#pragma GCC unroll 4
            for (int i = 0; i < together; i++) {
                prefetch(at[i] + ahead->line[2 * step]);
                prefetch(at[i] + 64 + ahead->line[2 * step + 1]);
            }
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; pair++)
#pragma GCC unroll 4
                for (int i = 0; i < together; i++) {
                    const __m512i bytes = pair % 2 ? bytes23 : bytes01;
                    __m512i w0 = _mm512_shuffle_epi8(line(at[i]), bytes), w1 = _mm512_shuffle_epi8(line(at[i] + 64), bytes);
                    if (pair >= 2) w0 = _mm512_srli_epi16(w0, 4), w1 = _mm512_srli_epi16(w1, 4);
                    const __m512i q0 = _mm512_permutexvar_epi16(w0, table), q1 = _mm512_permutexvar_epi16(w1, table);
                    __m512 *own = part + 2 * rows * i;
#pragma GCC unroll 8
                    for (int r = 0; r < rows; r++) {
                        const __m512i xr = _mm512_set1_epi32(x[i * pairs + pair * rows + r]);
                        own[2 * r] = dot(own[2 * r], xr, q0);
                        own[2 * r + 1] = dot(own[2 * r + 1], xr, q1);
                    }
                }
#pragma GCC unroll 4
            for (int i = 0; i < together; i++) at[i] += 128;
        }
#pragma GCC unroll 4
    for (int i = 0; i < together; i++) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g + i);
#pragma GCC unroll 16
        for (int j = 0; j < 2 * rows; j++) f[j] = _mm512_fmadd_ps(part[2 * rows * i + j], scale_of(block, j % 2), f[j]);
    }
}

INLINE void pairs16(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *x = (const int32_t *)p->values + row0 * (l->k_padded / 2);
    const float *xsum = p->scale + row0 * l->groups;
    const int64_t group = l->group_padded / 2 * rows;
    const int together = rows <= 2 ? 4 : rows <= 5 ? 2 : 1;
    __m512 f[2 * MR_PAIRS];
    expect_rows(p, t, row0, rows);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    int64_t g = 0;
    for (; g + together <= l->groups; g += together)
        groups16(p, tile, x + g * group, xsum + g * rows, f, g, ahead, rows, together);
    for (; together > 1 && g < l->groups; g++) groups16(p, tile, x + g * group, xsum + g * rows, f, g, ahead, rows, 1);
    store_rows(p, f, t, row0, rows);
}

ROWS(pairs16, 1) ROWS(pairs16, 2) ROWS(pairs16, 3) ROWS(pairs16, 4) 
ROWS(pairs16, 5) ROWS(pairs16, 6) ROWS(pairs16, 7) ROWS(pairs16, 8)

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) { assay_int4_gemm_avx512vnni.w4a8(p, begin, end); }

static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR_PAIRS] = {pairs16_1, pairs16_2, pairs16_3, pairs16_4,
                                              pairs16_5, pairs16_6, pairs16_7, pairs16_8};
    if (p->pairs) tiles(p, begin, end, blocks, 8);
    else assay_int4_gemm_avx512vnni.w4a16(p, begin, end);
}

/* As avx512vnni's, whose functions these rows go to. */
enum { MR8 = 6, MR16 = 8, ALONE8 = 8 };
const assay_int4_gemm_kernel assay_int4_gemm_avx512bf16 = {MR8, MR16, ALONE8, prepare, w4a8, w4a16, MR_PAIRS, NULL, NULL, NULL};

/* INT4 GEMM for AVX2 (Haswell, Zen and later; no dot-product instruction): the equations of assay.h.
 *
 * w4a8. vpmaddubsw multiplies unsigned weights (0..15) by signed activations (+-127) and adds pairs into int16:
 * at most 3810 in size, so eight of them (32 k) add up in int16 with vpaddw (30480 < 32768) before one vpmaddwd
 * widens. Per 4 k x 8 columns x row that is vpmaddubsw + vpaddw; Zen 3 issues two vpmaddubsw and four vector ops a
 * cycle, so the ceiling is 64 multiply-adds a cycle with nothing else in the way. What is in the way, per 32 k x 16
 * columns and MR rows: 24 ops to unpack, and 5 MR x 2 to widen, correct, scale and add.
 *   registers (MR = 6): 12 int16 accumulators, 2 weights, 1 broadcast, 1 product: all sixteen.
 * At M = 1 the stream is DRAM's: 7 vector ops per 32 bytes leave it idle two thirds of the time.
 * w4a16. One vpshufb widens a nibble's byte to its lane, vcvtdq2ps makes it float, then an FMA a row: bound by the two
 * FMA pipes.
 *
 * float32 accumulators of a tile live in memory (L1): one load-op and one store per group, hidden behind the products. */
#include "../gemm_avx2.h"

#include <math.h>
#include <string.h>

enum { MR8 = 6, MR16 = 4 };

/* ---- activations ----------------------------------------------------------------------------------- */

INLINE __m256 load8(const void *row, int dtype, int64_t i) {
    if (dtype == ASSAY_F32) return _mm256_loadu_ps((const float *)row + i);
    const __m128i h = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (dtype == ASSAY_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* The last elements of a row that is not a multiple of eight, zeros behind them. */
INLINE __m256 load_tail(const void *row, int dtype, int64_t i, int64_t count) {
    uint8_t buffer[32] = {0};
    const int64_t element = dtype == ASSAY_F32 ? 4 : 2;
    if (count > 0) memcpy(buffer, (const uint8_t *)row + i * element, (size_t)(count * element));
    return load8(buffer, dtype, 0);
}

INLINE __m256 load_some(const void *row, int dtype, int64_t i, int64_t end) {
    return i + 8 <= end ? load8(row, dtype, i) : load_tail(row, dtype, i, end - i);
}

INLINE float max_of(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE int32_t sum_of(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE void prepare8(const assay_gemm_args *p, int64_t row0, int64_t rows, int dtype) {
    const assay_w4_layout *l = &p->l;
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m256 infinity = _mm256_set1_ps(INFINITY);
    for (int64_t g = 0; g < l->groups; g++) {
        const int64_t i0 = g * l->group, i1 = i0 + l->group;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *row = (const uint8_t *)p->a + (row0 + r) * p->lda * (dtype == ASSAY_F32 ? 4 : 2);
            int32_t *out = (int32_t *)((int8_t *)p->values + (row0 * l->k_padded + g * l->group_padded * rows)) + r;
            __m256 most = _mm256_setzero_ps(), wild = _mm256_setzero_ps();
            for (int64_t i = i0; i < i1; i += 8) {
                const __m256 x = _mm256_and_ps(load_some(row, dtype, i, i1), magnitude);
                most = _mm256_max_ps(x, most);
                wild = _mm256_or_ps(wild, _mm256_cmp_ps(x, infinity, _CMP_NLT_UQ));
            }
            const int finite = !_mm256_movemask_ps(wild);
            const float amax = max_of(most);
            const int live = finite && amax >= 1e-30f;
            const __m256 to_code = _mm256_set1_ps(live ? 127.0f / amax : 0);
            __m256i sum = _mm256_setzero_si256();
            for (int64_t i = i0; i < i0 + l->group_padded; i += 8, out += 2 * rows) {
                __m256i q = _mm256_setzero_si256();
                if (live) q = _mm256_cvtps_epi32(_mm256_mul_ps(load_some(row, dtype, i, i1), to_code));
                sum = _mm256_add_epi32(sum, q);
                const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
                const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
                out[0] = (int32_t)bytes;
                out[rows] = (int32_t)(bytes >> 32);
            }
            const int64_t at = row0 * l->groups + g * rows + r;
            p->scale[at] = live ? amax / 127.0f : finite ? 0 : NAN;
            p->comp[at] = -p->center * sum_of(sum);
        }
    }
}

INLINE void prepare16(const assay_gemm_args *p, int64_t row0, int64_t rows, int dtype) {
    const assay_w4_layout *l = &p->l;
    for (int64_t g = 0; g < l->groups; g++) {
        const int64_t i0 = g * l->group, i1 = i0 + l->group;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *row = (const uint8_t *)p->a + (row0 + r) * p->lda * (dtype == ASSAY_F32 ? 4 : 2);
            float *out = (float *)p->values + row0 * l->k_padded + g * l->group_padded * rows + r;
            __m256 sum = _mm256_setzero_ps();
            for (int64_t i = i0; i < i0 + l->group_padded; i += 8, out += 8 * rows) {
                __m256 x = load_some(row, dtype, i, i1);
                if (dtype == ASSAY_BF16) { /* below 2^-100 in size: zero; a NaN stays */
                    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
                    x = _mm256_and_ps(x, _mm256_cmp_ps(size, _mm256_set1_ps(0x1p-100f), _CMP_NLT_UQ));
                }
                sum = _mm256_add_ps(sum, x);
                float lanes[8];
                _mm256_storeu_ps(lanes, x);
                for (int b = 0; b < 8; b++) out[b * rows] = lanes[b];
            }
            /* ((0+4)+(2+6)) + ((1+5)+(3+7)) */
            __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            s = _mm_add_ps(s, _mm_movehl_ps(s, s));
            p->scale[row0 * l->groups + g * rows + r] = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
        }
    }
}

void assay_int4_prepare_avx2(const assay_gemm_args *p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        const int64_t row0 = assay_block_row(p->m, p->row_blocks, i);
        const int64_t rows = assay_block_row(p->m, p->row_blocks, i + 1) - row0;
        switch (p->a_dtype + 3 * p->a16) {
        case 0: prepare8(p, row0, rows, ASSAY_F32); break;
        case 1: prepare8(p, row0, rows, ASSAY_F16); break;
        case 2: prepare8(p, row0, rows, ASSAY_BF16); break;
        case 3: prepare16(p, row0, rows, ASSAY_F32); break;
        case 4: prepare16(p, row0, rows, ASSAY_F16); break;
        default: prepare16(p, row0, rows, ASSAY_BF16); break;
        }
    }
}

/* ---- one row block against one tile ------------------------------------------------------------------ */

/* 32 k of 16 columns (one half) against `rows` rows: int32 sums, in `wide`, of columns 8 v.. in wide[2 r + v]. */
INLINE void dot32(const uint8_t *lines, const int32_t *a, int rows, int64_t ahead, __m256i *wide) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i acc[2 * MR8];
    for (int i = 0; i < 2 * rows; i++) acc[i] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (const uint8_t *end = lines + ASSAY_LINES32; lines < end; lines += 128, a += 2 * rows) {
        if (ahead) prefetch(lines + ahead);
        __m256i w0 = _mm256_and_si256(_mm256_load_si256((const __m256i *)lines), nibble);
        __m256i w1 = _mm256_and_si256(_mm256_load_si256((const __m256i *)(lines + 32)), nibble);
        for (int r = 0; r < rows; r++) {
            const __m256i x = _mm256_set1_epi32(a[r]);
            acc[2 * r] = _mm256_add_epi16(acc[2 * r], _mm256_maddubs_epi16(w0, x));
            acc[2 * r + 1] = _mm256_add_epi16(acc[2 * r + 1], _mm256_maddubs_epi16(w1, x));
            HOLD(acc[2 * r]);
            HOLD(acc[2 * r + 1]);
        }
        /* Load the line again for its high nibbles rather than keep four weight registers alive. */
        __asm__ volatile("" ::: "memory");
        w0 = _mm256_and_si256(_mm256_srli_epi16(_mm256_load_si256((const __m256i *)lines), 4), nibble);
        w1 = _mm256_and_si256(_mm256_srli_epi16(_mm256_load_si256((const __m256i *)(lines + 32)), 4), nibble);
        for (int r = 0; r < rows; r++) {
            const __m256i x = _mm256_set1_epi32(a[rows + r]);
            acc[2 * r] = _mm256_add_epi16(acc[2 * r], _mm256_maddubs_epi16(w0, x));
            acc[2 * r + 1] = _mm256_add_epi16(acc[2 * r + 1], _mm256_maddubs_epi16(w1, x));
            HOLD(acc[2 * r]);
            HOLD(acc[2 * r + 1]);
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2 * rows; i++) wide[i] = _mm256_madd_epi16(acc[i], ones);
}

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    const int64_t *far = ahead->line; /* one for each half of the columns */
    __m256 f[4 * MR8];
    for (int i = 0; i < 4 * rows; i++) f[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        /* Both halves of 32 k before the next 32 k: the stream is read in order. */
        __m256i sum[2][2 * MR8];
        for (int h = 0; h < 2; h++) {
            if (far[h]) prefetch_terms(l, tile, g, h, far[h]);
            dot32(block + ASSAY_SCALE_BYTES + 64 * h, a, rows, far[h], sum[h]);
        }
        for (int64_t k = 32; k < l->group_padded; k += 32)
            for (int h = 0; h < 2; h++) {
                __m256i more[2 * MR8];
                dot32(block + ASSAY_SCALE_BYTES + 64 * h + k / 32 * ASSAY_LINES32, a + k / 4 * rows, rows, far[h], more);
                for (int i = 0; i < 2 * rows; i++) sum[h][i] = _mm256_add_epi32(sum[h][i], more[i]);
            }
        for (int v = 0; v < 4; v++) {
            const __m256 ws = scale_of(block, v);
            for (int r = 0; r < rows; r++) {
                __m256i fix = _mm256_set1_epi32(comp[r]);
                if (!l->symmetric) fix = _mm256_mullo_epi32(fix, zero_of(tile + assay_w4_zero_offset(l, g), v));
                const __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(sum[v / 2][2 * r + v % 2], fix));
                const __m256 s = _mm256_mul_ps(ws, _mm256_set1_ps(scale[r]));
                f[4 * r + v] = _mm256_fmadd_ps(dot, s, f[4 * r + v]);
            }
        }
        a += l->group_padded / 4 * rows;
    }
    store_rows(p, f, t, row0, rows);
}

INLINE void block16(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const float *x = (const float *)p->values + row0 * l->k_padded;
    const float *xsum = p->scale + row0 * l->groups;
    const __m256i nibble = _mm256_set1_epi8(15);
    /* Byte 0 of each lane to the lane's low byte, zeros above; adding b picks byte b. */
    const int32_t z3 = (int32_t)0x80808000;
    const __m256i pick = _mm256_setr_epi32(z3, z3 + 4, z3 + 8, z3 + 12, z3, z3 + 4, z3 + 8, z3 + 12);
    __m256 f[4 * MR16];
    for (int i = 0; i < 4 * rows; i++) f[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, xsum += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        for (int h = 0; h < 2; h++) {
            const uint8_t *lines = block + ASSAY_SCALE_BYTES + 64 * h;
            const int64_t far = ahead->line[h];
            if (far) prefetch_terms(l, tile, g, h, far);
            __m256 part[2 * MR16];
            for (int v = 0; v < 2; v++) {
                const __m256 z = l->symmetric ? _mm256_set1_ps(8)
                                              : _mm256_cvtepi32_ps(zero_of(tile + assay_w4_zero_offset(l, g), 2 * h + v));
                for (int r = 0; r < rows; r++)
                    part[2 * r + v] = _mm256_mul_ps(_mm256_xor_ps(z, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(xsum[r]));
            }
            const float *xk = x;
            for (int64_t step = 0; step < l->group_padded / 8; step++, lines += 128) {
                if (far) prefetch(lines + far);
                for (int high = 0; high < 2; high++) {
                    __m256i w0 = _mm256_load_si256((const __m256i *)lines);
                    __m256i w1 = _mm256_load_si256((const __m256i *)(lines + 32));
                    if (high) w0 = _mm256_srli_epi16(w0, 4), w1 = _mm256_srli_epi16(w1, 4);
                    w0 = _mm256_and_si256(w0, nibble);
                    w1 = _mm256_and_si256(w1, nibble);
                    for (int b = 0; b < 4; b++, xk += rows) {
                        const __m256i byte = _mm256_add_epi32(pick, _mm256_set1_epi32(b));
                        const __m256 q0 = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(w0, byte));
                        const __m256 q1 = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(w1, byte));
                        for (int r = 0; r < rows; r++) {
                            const __m256 xr = _mm256_broadcast_ss(xk + r);
                            part[2 * r] = _mm256_fmadd_ps(xr, q0, part[2 * r]);
                            part[2 * r + 1] = _mm256_fmadd_ps(xr, q1, part[2 * r + 1]);
                        }
                    }
                }
            }
            for (int v = 0; v < 2; v++) {
                const __m256 ws = scale_of(block, 2 * h + v);
                for (int r = 0; r < rows; r++)
                    f[4 * r + 2 * h + v] = _mm256_fmadd_ps(part[2 * r + v], ws, f[4 * r + 2 * h + v]);
            }
        }
        x += l->group_padded * rows;
    }
    store_rows(p, f, t, row0, rows);
}

ROWS(block8, 1) ROWS(block8, 2) ROWS(block8, 3) ROWS(block8, 4) ROWS(block8, 5) ROWS(block8, 6)
ROWS(block16, 1) ROWS(block16, 2) ROWS(block16, 3) ROWS(block16, 4)

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR8] = {block8_1, block8_2, block8_3, block8_4, block8_5, block8_6};
    tiles(p, begin, end, blocks, 2);
}

static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR16] = {block16_1, block16_2, block16_3, block16_4};
    tiles(p, begin, end, blocks, 2);
}

const assay_int4_gemm_kernel assay_int4_gemm_avx2 = {MR8, MR16, MR8, assay_int4_prepare_avx2, w4a8, w4a16, 0, NULL, NULL, NULL};

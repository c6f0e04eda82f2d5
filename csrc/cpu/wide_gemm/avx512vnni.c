/* Wide GEMM for AVX-512 with VNNI: the equations of assay.h.
 *
 * a8. vpshufb turns nibbles into v + 128, vpdpbusd's unsigned operand; sums start at -128 times the sum of the activation
 * codes. Where the codebook is 0..15 a nibble is its own operand and sums start at 0; 8-bit lines hold q + 128 as they lie.
 *   registers (MR = 6, 32 columns): 12 int32 + 12 float32 accumulators, 2 weights, table, mask.
 * a16. 4 bits: a right shift and vpermps over the codebook; 8 bits: two shifts and a conversion; then an FMA a row.
 * A minimum costs one FMA more a group, row and half. */
#include "../gemm_avx512.h"
#include "../gemm_blocks.h"

enum { MR8 = 6, MR16 = 8 };
enum kind { PLAIN4, TABLE4, BYTE8 };

INLINE const assay_wide_args *wide(const assay_gemm_args *p) { return (const assay_wide_args *)p; }

INLINE __m512 term(const uint8_t *at, int h) { return _mm512_load_ps((const float *)at + 16 * h); }

INLINE void prefetch_header(const assay_wide_args *w, const uint8_t *block, const int64_t *far) {
    for (int h = 0; h < 2; h++)
        if (far[h])
            for (int i = 0; i <= w->minimum; i++) prefetch(block + i * ASSAY_TERM_BYTES + 64 * h + far[h]);
}

/* Adds a group's scale and minimum terms: sum holds I_g or p, s_w's factor is `by` (a8: s_a). */
INLINE void add_group(const assay_wide_args *w, const uint8_t *block, int rows, const float *terms, const __m512 *sum,
                      const float *by, __m512 *f) {
    for (int h = 0; h < 2; h++) {
        const __m512 ws = term(block, h);
        for (int r = 0; r < rows; r++) {
            const __m512 s = by ? _mm512_mul_ps(ws, _mm512_set1_ps(by[r])) : ws;
            f[2 * r + h] = _mm512_fmadd_ps(sum[2 * r + h], s, f[2 * r + h]);
        }
    }
    if (w->minimum)
        for (int h = 0; h < 2; h++) {
            const __m512 minimum = term(block + ASSAY_TERM_BYTES, h);
            for (int r = 0; r < rows; r++)
                f[2 * r + h] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(terms[r]), f[2 * r + h]);
        }
}

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows,
                   const enum kind kind) {
    const assay_wide_args *w = wide(p);
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups, *terms = w->terms + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    const int64_t *far = ahead->line; /* one for each half of the columns */
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_xor_si128(_mm_loadu_si128((const __m128i *)w->whole), _mm_set1_epi8((char)0x80)));
    __m512 f[2 * MR8];
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows, terms += rows) {
        const uint8_t *block = assay_wide_block(w, tile, g), *at = assay_wide_lines(w, block);
        prefetch_header(w, block, far);
        __m512i acc[2 * MR8];
        for (int r = 0; r < rows; r++) acc[2 * r] = acc[2 * r + 1] = _mm512_set1_epi32(comp[r]);
        for (int64_t i = 0; i < l->group_padded; i += kind == BYTE8 ? 4 : 8, at += 128) {
            if (far[0]) prefetch(at + far[0]);
            if (far[1]) prefetch(at + 64 + far[1]);
            for (int high = 0; high < (kind == BYTE8 ? 1 : 2); high++, a += rows) {
                __m512i w0 = line(at), w1 = line(at + 64);
                if (high) w0 = _mm512_srli_epi32(w0, 4), w1 = _mm512_srli_epi32(w1, 4);
                if (kind != BYTE8) w0 = _mm512_and_si512(w0, nibble), w1 = _mm512_and_si512(w1, nibble);
                if (kind == TABLE4) w0 = _mm512_shuffle_epi8(table, w0), w1 = _mm512_shuffle_epi8(table, w1);
                for (int r = 0; r < rows; r++) {
                    const __m512i x = _mm512_set1_epi32(a[r]);
                    acc[2 * r] = _mm512_dpbusd_epi32(acc[2 * r], w0, x);
                    acc[2 * r + 1] = _mm512_dpbusd_epi32(acc[2 * r + 1], w1, x);
                }
                /* Load the line again for its high nibbles rather than keep four weight registers alive. */
                __asm__ volatile("" ::: "memory");
            }
        }
        __m512 sum[2 * MR8];
        for (int i = 0; i < 2 * rows; i++) sum[i] = _mm512_cvtepi32_ps(acc[i]);
        add_group(w, block, rows, terms, sum, scale, f);
    }
    store_rows(p, f, t, row0, rows);
}

INLINE void block16(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows,
                    const enum kind kind) {
    const assay_wide_args *w = wide(p);
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const float *x = (const float *)p->values + row0 * l->k_padded, *terms = w->terms + row0 * l->groups;
    const int64_t *far = ahead->line; /* one for each half of the columns */
    const __m512 table = _mm512_loadu_ps(w->codebook);
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512 f[2 * MR16];
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, terms += rows) {
        const uint8_t *block = assay_wide_block(w, tile, g), *at = assay_wide_lines(w, block);
        prefetch_header(w, block, far);
        __m512 part[2 * MR16];
        for (int i = 0; i < 2 * rows; i++) part[i] = _mm512_setzero_ps();
        for (int64_t i = 0; i < l->group_padded; i += kind == BYTE8 ? 4 : 8, at += 128) {
            if (far[0]) prefetch(at + far[0]);
            if (far[1]) prefetch(at + 64 + far[1]);
            for (int b = 0; b < (kind == BYTE8 ? 4 : 8); b++, x += rows) {
                __m512 v[2];
                for (int h = 0; h < 2; h++) {
                    if (kind == BYTE8) {
                        const __m512i top = _mm512_slli_epi32(_mm512_xor_si512(line(at + 64 * h), flip),
                                                              (unsigned)(24 - 8 * b));
                        v[h] = _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
                    } else {
                        /* vpermps reads only the low four bits of an index. */
                        const unsigned shift = (unsigned)(b % 4 * 8 + b / 4 * 4);
                        v[h] = _mm512_permutexvar_ps(_mm512_srli_epi32(line(at + 64 * h), shift), table);
                    }
                }
                for (int r = 0; r < rows; r++) {
                    const __m512 xr = _mm512_set1_ps(x[r]);
                    part[2 * r] = _mm512_fmadd_ps(xr, v[0], part[2 * r]);
                    part[2 * r + 1] = _mm512_fmadd_ps(xr, v[1], part[2 * r + 1]);
                }
            }
        }
        add_group(w, block, rows, terms, part, NULL, f);
    }
    store_rows(p, f, t, row0, rows);
}

KINDS6(block8, PLAIN4) KINDS6(block8, TABLE4) KINDS6(block8, BYTE8)
KINDS8(block16, TABLE4) KINDS8(block16, BYTE8)

static void a8(const assay_wide_args *w, int64_t begin, int64_t end) {
    static const block_fn blocks[3][MR8] = {{LIST6(block8, PLAIN4)}, {LIST6(block8, TABLE4)}, {LIST6(block8, BYTE8)}};
    tiles(&w->gemm, begin, end, blocks[w->bits == 8 ? BYTE8 : w->plain ? PLAIN4 : TABLE4], 2);
}

static void a16(const assay_wide_args *w, int64_t begin, int64_t end) {
    static const block_fn blocks[2][MR16] = {{LIST8(block16, TABLE4)}, {LIST8(block16, BYTE8)}};
    tiles(&w->gemm, begin, end, blocks[w->bits == 8], 2);
}

const assay_wide_gemm_kernel assay_wide_gemm_avx512vnni = {MR8, MR16, a8, a16};

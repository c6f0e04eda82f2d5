/* Wide GEMM for AVX2: the equations of assay.h.
 *
 * a8. vpmaddubsw on whole bytes v + 128 would overflow int16, so the byte is split into its nibbles, each with int16 sums
 * of its own (as in the int8 GEMM): 8-bit lines by mask and shift, 4-bit codes by two vpshufb tables, of the low and of the
 * high nibble of v + 128. Where the codebook is 0..15 the code is all there is. Eight products of 15 x 127 x 2 fit int16.
 * a16. 4 bits: vpermps over each half of the codebook and a blend by bit 3; 8 bits: two shifts and a conversion. */
#include "../gemm_avx2.h"
#include "../gemm_blocks.h"

enum { MR8 = 6, MR16 = 4 };
enum kind { PLAIN4, TABLE4, BYTE8 };

INLINE const assay_wide_args *wide(const assay_gemm_args *p) { return (const assay_wide_args *)p; }

INLINE __m256 term(const uint8_t *at, int v) { return _mm256_load_ps((const float *)at + 8 * v); }

INLINE void prefetch_header(const assay_wide_args *w, const uint8_t *block, const int64_t *far) {
    for (int h = 0; h < 2; h++)
        if (far[h])
            for (int i = 0; i <= w->minimum; i++) prefetch(block + i * ASSAY_TERM_BYTES + 64 * h + far[h]);
}

INLINE void add_minimum(const assay_wide_args *w, const uint8_t *block, int rows, const float *terms, __m256 *f) {
    if (w->minimum)
        for (int v = 0; v < 4; v++) {
            const __m256 minimum = term(block + ASSAY_TERM_BYTES, v);
            for (int r = 0; r < rows; r++)
                f[4 * r + v] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(terms[r]), f[4 * r + v]);
        }
}

typedef struct {
    __m256i low, high; /* nibbles of v + 128 by code */
} tables;

/* `k` (at most 32) weights of 8 columns against `rows` rows: int32 sums in `sum`. */
INLINE void dot(const uint8_t *lines, const int32_t *a, int rows, int64_t k, int64_t ahead, enum kind kind, tables tab,
                __m256i *sum) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[MR8], high[MR8];
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += kind == BYTE8 ? 4 : 8, lines += 128) {
        if (ahead) prefetch(lines + ahead);
        for (int half = 0; half < (kind == BYTE8 ? 1 : 2); half++, a += rows) {
            const __m256i u = _mm256_load_si256((const __m256i *)lines);
            const __m256i q = _mm256_and_si256(half ? _mm256_srli_epi16(u, 4) : u, nibble);
            const __m256i w0 = kind == TABLE4 ? _mm256_shuffle_epi8(tab.low, q) : q;
            const __m256i w1 = kind == TABLE4 ? _mm256_shuffle_epi8(tab.high, q)
                                              : _mm256_and_si256(_mm256_srli_epi16(u, 4), nibble);
            for (int r = 0; r < rows; r++) {
                const __m256i x = _mm256_set1_epi32(a[r]);
                low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(w0, x));
                HOLD(low[r]);
                if (kind == PLAIN4) continue;
                high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(w1, x));
                HOLD(high[r]);
            }
        }
    }
    const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    for (int r = 0; r < rows; r++) {
        sum[r] = _mm256_madd_epi16(low[r], one);
        if (kind != PLAIN4) sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(high[r], sixteen));
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
    const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)w->whole), _mm_set1_epi8((char)0x80));
    const __m128i nibble = _mm_set1_epi8(15);
    const tables tab = {_mm256_broadcastsi128_si256(_mm_and_si128(bytes, nibble)),
                        _mm256_broadcastsi128_si256(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble))};
    const int64_t lines32 = ASSAY_TILE_N * (kind == BYTE8 ? 32 : 16);
    __m256 f[4 * MR8];
    for (int i = 0; i < 4 * rows; i++) f[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows, terms += rows) {
        const uint8_t *block = assay_wide_block(w, tile, g), *lines = assay_wide_lines(w, block);
        prefetch_header(w, block, far);
        __m256i sum[4][MR8];
        for (int v = 0; v < 4; v++)
            for (int r = 0; r < rows; r++) sum[v][r] = _mm256_set1_epi32(comp[r]);
        for (int64_t k = 0; k < l->group_padded; k += 32)
            for (int v = 0; v < 4; v++) {
                __m256i more[MR8];
                /* Two quarters share a line: the even one asks for it. */
                dot(lines + k / 32 * lines32 + 32 * v, a + k / 4 * rows, rows, assay_min_i64(32, l->group_padded - k),
                    v % 2 ? 0 : far[v / 2], kind, tab, more);
                for (int r = 0; r < rows; r++) sum[v][r] = _mm256_add_epi32(sum[v][r], more[r]);
            }
        for (int v = 0; v < 4; v++) {
            const __m256 ws = term(block, v);
            for (int r = 0; r < rows; r++)
                f[4 * r + v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[v][r]), _mm256_mul_ps(ws, _mm256_set1_ps(scale[r])),
                                               f[4 * r + v]);
        }
        add_minimum(w, block, rows, terms, f);
        a += l->group_padded / 4 * rows;
    }
    store_rows(p, f, t, row0, rows);
}

/* Weight b of each lane as a float. */
INLINE __m256 value(__m256i u, int b, enum kind kind, __m256 below, __m256 above) {
    if (kind == BYTE8) {
        const __m256i top = _mm256_slli_epi32(_mm256_xor_si256(u, _mm256_set1_epi8((char)0x80)), 24 - 8 * b);
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
    }
    /* vpermps reads only the low three bits of an index; bit 3 goes to the sign, where vblendvps looks. */
    const int shift = b % 4 * 8 + b / 4 * 4;
    const __m256i code = _mm256_srli_epi32(u, shift);
    const __m256 chooser = _mm256_castsi256_ps(_mm256_slli_epi32(u, 28 - shift));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, code), _mm256_permutevar8x32_ps(above, code), chooser);
}

INLINE void block16(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows,
                    const enum kind kind) {
    const assay_wide_args *w = wide(p);
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const float *x = (const float *)p->values + row0 * l->k_padded, *terms = w->terms + row0 * l->groups;
    const int64_t *far = ahead->line; /* one for each half of the columns */
    const __m256 below = _mm256_loadu_ps(w->codebook), above = _mm256_loadu_ps(w->codebook + 8);
    __m256 f[4 * MR16];
    for (int i = 0; i < 4 * rows; i++) f[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, terms += rows) {
        const uint8_t *block = assay_wide_block(w, tile, g);
        prefetch_header(w, block, far);
        for (int h = 0; h < 2; h++) {
            const uint8_t *at = assay_wide_lines(w, block) + 64 * h;
            const float *xk = x;
            __m256 part[2 * MR16];
            for (int i = 0; i < 2 * rows; i++) part[i] = _mm256_setzero_ps();
            for (int64_t i = 0; i < l->group_padded; i += kind == BYTE8 ? 4 : 8, at += 128) {
                if (far[h]) prefetch(at + far[h]);
                const __m256i u0 = _mm256_load_si256((const __m256i *)at);
                const __m256i u1 = _mm256_load_si256((const __m256i *)(at + 32));
                for (int b = 0; b < (kind == BYTE8 ? 4 : 8); b++, xk += rows) {
                    const __m256 v0 = value(u0, b, kind, below, above), v1 = value(u1, b, kind, below, above);
                    for (int r = 0; r < rows; r++) {
                        const __m256 xr = _mm256_broadcast_ss(xk + r);
                        part[2 * r] = _mm256_fmadd_ps(xr, v0, part[2 * r]);
                        part[2 * r + 1] = _mm256_fmadd_ps(xr, v1, part[2 * r + 1]);
                    }
                }
            }
            for (int v = 0; v < 2; v++) {
                const __m256 ws = term(block, 2 * h + v);
                for (int r = 0; r < rows; r++)
                    f[4 * r + 2 * h + v] = _mm256_fmadd_ps(part[2 * r + v], ws, f[4 * r + 2 * h + v]);
            }
        }
        add_minimum(w, block, rows, terms, f);
        x += l->group_padded * rows;
    }
    store_rows(p, f, t, row0, rows);
}

KINDS6(block8, PLAIN4) KINDS6(block8, TABLE4) KINDS6(block8, BYTE8)
KINDS4(block16, TABLE4) KINDS4(block16, BYTE8)

static void a8(const assay_wide_args *w, int64_t begin, int64_t end) {
    static const block_fn blocks[3][MR8] = {{LIST6(block8, PLAIN4)}, {LIST6(block8, TABLE4)}, {LIST6(block8, BYTE8)}};
    tiles(&w->gemm, begin, end, blocks[w->bits == 8 ? BYTE8 : w->plain ? PLAIN4 : TABLE4], 2);
}

static void a16(const assay_wide_args *w, int64_t begin, int64_t end) {
    static const block_fn blocks[2][MR16] = {{LIST4(block16, TABLE4)}, {LIST4(block16, BYTE8)}};
    tiles(&w->gemm, begin, end, blocks[w->bits == 8], 2);
}

const assay_wide_gemm_kernel assay_wide_gemm_avx2 = {MR8, MR16, a8, a16};

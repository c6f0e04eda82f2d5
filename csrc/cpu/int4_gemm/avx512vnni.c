/* INT4 GEMM for AVX-512 with VNNI (Ice Lake, Zen 4 and later): the equations of assay.h.
 *
 * w4a8. A nibble line, masked, is the unsigned operand of vpdpbusd as it lies: 16 columns x 4 k, no permute. The signed
 * activations come by the instruction's {1to16} memory broadcast. Accumulators start at the zero-point correction
 * instead of 0, so symmetric weights pay nothing for it; asymmetric ones one vpdpwssd per row, half and group
 * (|sum| <= 128 * 127 fits int16).
 *   registers (MR = 6, 32 columns): 12 int32 + 12 float32 accumulators, 2 weights, mask, spare.
 *   per 32 k: 96 vpdpbusd; 12 vcvtdq2ps, 12 vmulps, 12 vfmadd; 24 unpacking; vpdpbusd, mul and FMA share two pipes, so
 *   group 32 can reach 8/(8+2) = 80% of the vpdpbusd peak, group 128 94%.
 * M = 1 and 2 stream from DRAM: the shift is dropped, high nibbles (16 q) get accumulators of their own that are shifted
 * once a group: four vector ops per 64 bytes.
 * w4a16. A right shift and vpermps over the table 0..15 turn a nibble into a float (vpermps reads only the low four bits
 * of an index), then an FMA a row. */
#include "../gemm_avx512.h"

enum { MR8 = 6, MR16 = 8 };

/* int32 zero points of columns 16 h .. 16 h + 15. */
INLINE __m512i zero_of(const uint8_t *zeros, int h) {
    const __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros));
    return h ? _mm512_srli_epi32(z, 4) : _mm512_and_si512(z, _mm512_set1_epi32(15));
}

/* Where a group's integer sums start: at the zero point's correction. */
INLINE __m512i start_of(const assay_w4_layout *l, const uint8_t *zeros, int h, int32_t comp) {
    if (l->symmetric) return _mm512_set1_epi32(comp);
    if (l->group_padded <= 256)
        return _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero_of(zeros, h), _mm512_set1_epi32(comp & 0xffff));
    return _mm512_mullo_epi32(zero_of(zeros, h), _mm512_set1_epi32(comp));
}

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, int rows, int64_t ahead, int halves) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 f[2 * MR8];
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        const uint8_t *zeros = tile + assay_w4_zero_offset(l, g);
        const uint8_t *at = block + ASSAY_SCALE_BYTES;
        const int64_t reach[2] = {halves & 1 ? ahead : 0, halves & 2 ? ahead : 0};
        for (int h = 0; h < 2; h++)
            if (reach[h]) prefetch_terms(l, tile, g, h, reach[h]);
        __m512i acc[2 * MR8];
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) acc[2 * r + h] = start_of(l, zeros, h, comp[r]);
        for (int64_t step = 0; step < l->group_padded / 8; step++, at += 128, a += 2 * rows) {
            if (reach[0]) prefetch(at + reach[0]);
            if (reach[1]) prefetch(at + 64 + reach[1]);
            __m512i w0 = _mm512_and_si512(line(at), nibble), w1 = _mm512_and_si512(line(at + 64), nibble);
            for (int r = 0; r < rows; r++) {
                const __m512i x = _mm512_set1_epi32(a[r]);
                acc[2 * r] = _mm512_dpbusd_epi32(acc[2 * r], w0, x);
                acc[2 * r + 1] = _mm512_dpbusd_epi32(acc[2 * r + 1], w1, x);
            }
            /* Load the line again for its high nibbles rather than keep four weight registers alive. */
            __asm__ volatile("" ::: "memory");
            w0 = _mm512_and_si512(_mm512_srli_epi32(line(at), 4), nibble);
            w1 = _mm512_and_si512(_mm512_srli_epi32(line(at + 64), 4), nibble);
            for (int r = 0; r < rows; r++) {
                const __m512i x = _mm512_set1_epi32(a[rows + r]);
                acc[2 * r] = _mm512_dpbusd_epi32(acc[2 * r], w0, x);
                acc[2 * r + 1] = _mm512_dpbusd_epi32(acc[2 * r + 1], w1, x);
            }
        }
        for (int h = 0; h < 2; h++) {
            const __m512 ws = scale_of(block, h);
            for (int r = 0; r < rows; r++)
                f[2 * r + h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[2 * r + h]),
                                               _mm512_mul_ps(ws, _mm512_set1_ps(scale[r])), f[2 * r + h]);
        }
    }
    store_rows(p, f, t, row0, rows);
}

/* For one or two rows, and groups short enough (65536) that sums of 16 q stay inside int32. */
enum { STREAM_GROUP = 65536 };

INLINE void stream8(const assay_gemm_args *p, int64_t t, int64_t row0, int rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0);
    __m512 f[4];
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        const uint8_t *zeros = tile + assay_w4_zero_offset(l, g);
        const uint8_t *at = block + ASSAY_SCALE_BYTES;
        __m512i acc[4], acc16[4];
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) {
                acc[2 * r + h] = start_of(l, zeros, h, comp[r]);
                acc16[2 * r + h] = _mm512_setzero_si512();
            }
        for (int64_t step = 0; step < l->group_padded / 8; step++, at += 128, a += 2 * rows)
            for (int h = 0; h < 2; h++) {
                const __m512i w = line(at + 64 * h);
                const __m512i w_low = _mm512_and_si512(w, low), w_high = _mm512_and_si512(w, high);
                for (int r = 0; r < rows; r++) {
                    acc[2 * r + h] = _mm512_dpbusd_epi32(acc[2 * r + h], w_low, _mm512_set1_epi32(a[r]));
                    acc16[2 * r + h] = _mm512_dpbusd_epi32(acc16[2 * r + h], w_high, _mm512_set1_epi32(a[rows + r]));
                }
            }
        for (int h = 0; h < 2; h++) {
            const __m512 ws = scale_of(block, h);
            for (int r = 0; r < rows; r++) {
                const __m512i sum = _mm512_add_epi32(acc[2 * r + h], _mm512_srai_epi32(acc16[2 * r + h], 4));
                f[2 * r + h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum),
                                               _mm512_mul_ps(ws, _mm512_set1_ps(scale[r])), f[2 * r + h]);
            }
        }
    }
    store_rows(p, f, t, row0, rows);
}

INLINE void block16(const assay_gemm_args *p, int64_t t, int64_t row0, int rows, int64_t ahead, int halves) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const float *x = (const float *)p->values + row0 * l->k_padded;
    const float *xsum = p->scale + row0 * l->groups;
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 f[2 * MR16];
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, xsum += rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        const uint8_t *at = block + ASSAY_SCALE_BYTES;
        const int64_t reach[2] = {halves & 1 ? ahead : 0, halves & 2 ? ahead : 0};
        for (int h = 0; h < 2; h++)
            if (reach[h]) prefetch_terms(l, tile, g, h, reach[h]);
        __m512 part[2 * MR16];
        for (int h = 0; h < 2; h++) {
            const __m512 z = l->symmetric ? _mm512_set1_ps(8)
                                          : _mm512_cvtepi32_ps(zero_of(tile + assay_w4_zero_offset(l, g), h));
            const __m512 minus_z = _mm512_castsi512_ps(
                _mm512_xor_si512(_mm512_castps_si512(z), _mm512_set1_epi32((int32_t)0x80000000)));
            for (int r = 0; r < rows; r++) part[2 * r + h] = _mm512_mul_ps(minus_z, _mm512_set1_ps(xsum[r]));
        }
        for (int64_t step = 0; step < l->group_padded / 8; step++, at += 128) {
            if (reach[0]) prefetch(at + reach[0]);
            if (reach[1]) prefetch(at + 64 + reach[1]);
            for (int i = 0; i < 8; i++, x += rows) {
                const unsigned shift = (unsigned)(i % 4 * 8 + i / 4 * 4);
                const __m512 q0 = _mm512_permutexvar_ps(_mm512_srli_epi32(line(at), shift), table);
                const __m512 q1 = _mm512_permutexvar_ps(_mm512_srli_epi32(line(at + 64), shift), table);
                for (int r = 0; r < rows; r++) {
                    const __m512 xr = _mm512_set1_ps(x[r]);
                    part[2 * r] = _mm512_fmadd_ps(xr, q0, part[2 * r]);
                    part[2 * r + 1] = _mm512_fmadd_ps(xr, q1, part[2 * r + 1]);
                }
            }
        }
        for (int h = 0; h < 2; h++) {
            const __m512 ws = scale_of(block, h);
            for (int r = 0; r < rows; r++) f[2 * r + h] = _mm512_fmadd_ps(part[2 * r + h], ws, f[2 * r + h]);
        }
    }
    store_rows(p, f, t, row0, rows);
}

ROWS(block8, 1) ROWS(block8, 2) ROWS(block8, 3) ROWS(block8, 4) ROWS(block8, 5) ROWS(block8, 6)
ROWS(block16, 1) ROWS(block16, 2) ROWS(block16, 3) ROWS(block16, 4)
ROWS(block16, 5) ROWS(block16, 6) ROWS(block16, 7) ROWS(block16, 8)

#define STREAM(r)                                                                                                    \
    KERNEL void stream8_##r(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t ahead, int halves) { \
        (void)ahead, (void)halves;                                                                                  \
        stream8(p, t, row0, r);                                                                                      \
    }
STREAM(1) STREAM(2)

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn streams[2] = {stream8_1, stream8_2};
    static const block_fn blocks[MR8] = {block8_1, block8_2, block8_3, block8_4, block8_5, block8_6};
    tiles(p, begin, end, p->m <= 2 && p->l.group_padded <= STREAM_GROUP ? streams : blocks);
}

static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR16] = {block16_1, block16_2, block16_3, block16_4,
                                          block16_5, block16_6, block16_7, block16_8};
    tiles(p, begin, end, blocks);
}

const assay_int4_gemm_kernel assay_int4_gemm_avx512vnni = {MR8, MR16, assay_int4_prepare_avx2, w4a8, w4a16};

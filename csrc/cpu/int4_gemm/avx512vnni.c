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
#include "../gemm_prepare_avx512.h"

enum { MR8 = 6, ALONE8 = 8, MR16 = 8, MOST_TOGETHER = 4 };

/* Where a group's integer sums start: at the zero point's correction. */
INLINE __m512i start_of(const assay_w4_layout *l, int symmetric, const uint8_t *zeros, int h, int32_t comp) {
    if (symmetric) return _mm512_set1_epi32(comp);
    if (l->group_padded <= 256)
        return _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero_of(zeros, h), _mm512_set1_epi32(comp & 0xffff));
    return _mm512_mullo_epi32(zero_of(zeros, h), _mm512_set1_epi32(comp));
}

/* A line of the stream on its way: far ahead (a lone block: at least FAR bytes) from DRAM into L2, then from there into L1. Asked
 * for into L1 alone it holds one of the core's few fill buffers for all of DRAM's latency, and a whole tile ahead it pushes out of
 * L1 the tile that is being read. On Granite Rapids 7 to 12% of an expert layer's time, at 1 to 12 rows an expert. */
enum { NEAR = 1024, FAR = 4096 };
INLINE void ask(const uint8_t *at, int64_t far) {
    _mm_prefetch((const char *)at + far, _MM_HINT_T1);
    _mm_prefetch((const char *)at + NEAR, _MM_HINT_T0);
}

INLINE void step8(__m512i *acc, const uint8_t *at, const int32_t *a, const int rows, const int64_t *ahead, const int reload) {
    const __m512i nibble = _mm512_set1_epi8(15);
    ask(at, ahead[0]);
    ask(at + 64, ahead[1]);
    __m512i w0 = _mm512_and_si512(line(at), nibble), w1 = _mm512_and_si512(line(at + 64), nibble);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const __m512i x = _mm512_set1_epi32(a[r]);
        acc[2 * r] = _mm512_dpbusd_epi32(acc[2 * r], w0, x);
        acc[2 * r + 1] = _mm512_dpbusd_epi32(acc[2 * r + 1], w1, x);
    }
    if (reload) __asm__ volatile("" ::: "memory");
    w0 = _mm512_and_si512(_mm512_srli_epi32(line(at), 4), nibble);
    w1 = _mm512_and_si512(_mm512_srli_epi32(line(at + 64), 4), nibble);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const __m512i x = _mm512_set1_epi32(a[rows + r]);
        acc[2 * r] = _mm512_dpbusd_epi32(acc[2 * r], w0, x);
        acc[2 * r + 1] = _mm512_dpbusd_epi32(acc[2 * r + 1], w1, x);
    }
}

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows,
                   const int group, const int symmetric) {
    const assay_w4_layout *l = &p->l;
    const int64_t count = group ? group / 32 : l->group_padded / 32, groups = l->groups;
    const uint8_t *at = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * groups;
    const int32_t *comp = p->comp + row0 * groups;
    const uint8_t *zeros = at;
    __m512 f[2 * ALONE8];
    expect_rows(p, t, row0, rows);
#pragma GCC unroll 32
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, scale += rows, comp += rows) {
        if (!symmetric && g % 4 == 0) {
            ask(at, ahead->line[1]);
            zeros = at;
            at += ASSAY_ZERO_BYTES;
        }
        ask(at, ahead->line[0]);
        const uint8_t *block = at;
        at += ASSAY_SCALE_BYTES;
        __m512i acc[2 * ALONE8];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            acc[2 * r] = start_of(l, symmetric, zeros, 0, comp[r]);
            acc[2 * r + 1] = start_of(l, symmetric, zeros, 1, comp[r]);
        }
        if (!symmetric) zeros += 16;
#pragma GCC unroll 1
        for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int step = 0; step < 4; step++, at += 128, a += 2 * rows)
                step8(acc, at, a, rows, ahead->line + 2 * step, group != 32);
        const __m512 ws0 = scale_of(block, 0), ws1 = scale_of(block, 1);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const __m512 s = _mm512_set1_ps(scale[r]);
            f[2 * r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[2 * r]), _mm512_mul_ps(ws0, s), f[2 * r]);
            f[2 * r + 1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[2 * r + 1]), _mm512_mul_ps(ws1, s), f[2 * r + 1]);
        }
    }
    store_rows(p, f, t, row0, rows);
}

/* For one or two rows, and groups short enough (65536) that sums of 16 q stay inside int32. */
enum { STREAM_GROUP = 65536 };

INLINE void stream8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows,
                    const int group, const int symmetric) {
    const assay_w4_layout *l = &p->l;
    const int64_t count = group ? group / 32 : l->group_padded / 32, groups = l->groups;
    const uint8_t *at = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * groups;
    const int32_t *comp = p->comp + row0 * groups;
    const uint8_t *zeros = at;
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0);
    __m512 f[4];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, scale += rows, comp += rows) {
        if (!symmetric && g % 4 == 0) {
            ask(at, ahead->line[1]);
            zeros = at;
            at += ASSAY_ZERO_BYTES;
        }
        ask(at, ahead->line[0]);
        const uint8_t *block = at;
        at += ASSAY_SCALE_BYTES;
        __m512i acc[4], acc16[4];
#pragma GCC unroll 4
        for (int i = 0; i < 2 * rows; i++) {
            acc[i] = start_of(l, symmetric, zeros, i % 2, comp[i / 2]);
            acc16[i] = _mm512_setzero_si512();
        }
        if (!symmetric) zeros += 16;
#pragma GCC unroll 4
        for (int64_t step = 0; step < 4 * count; step++, at += 128, a += 2 * rows) {
            ask(at, ahead->line[0]);
            ask(at + 64, ahead->line[1]);
#pragma GCC unroll 4
            for (int i = 0; i < 2 * rows; i++) {
                const __m512i w = line(at + i % 2 * 64);
                acc[i] = _mm512_dpbusd_epi32(acc[i], _mm512_and_si512(w, low), _mm512_set1_epi32(a[i / 2]));
                acc16[i] = _mm512_dpbusd_epi32(acc16[i], _mm512_and_si512(w, high), _mm512_set1_epi32(a[rows + i / 2]));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 2 * rows; i++) {
            const __m512i sum = _mm512_add_epi32(acc[i], _mm512_srai_epi32(acc16[i], 4));
            const __m512 s = _mm512_mul_ps(scale_of(block, i % 2), _mm512_set1_ps(scale[i / 2]));
            f[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, f[i]);
        }
    }
    store_rows(p, f, t, row0, rows);
}

/* `together` groups from g on, each with sums of its own: at one or two rows a single group's chain of FMAs would wait for its
 * own latency. */
INLINE void groups16(const assay_gemm_args *p, const uint8_t *tile, const float *x, const float *xsum, __m512 *f, int64_t g,
                     const reach *ahead, const int rows, const int together) {
    const assay_w4_layout *l = &p->l;
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const uint8_t *at[MOST_TOGETHER];
    __m512 part[2 * MR16];
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
        for (int step = 0; step < 4; step++) {
#pragma GCC unroll 4
            for (int i = 0; i < together; i++) {
                prefetch(at[i] + ahead->line[2 * step]);
                prefetch(at[i] + 64 + ahead->line[2 * step + 1]);
            }
#pragma GCC unroll 8
            for (int b = 0; b < 8; b++) {
                const unsigned shift = (unsigned)(b % 4 * 8 + b / 4 * 4);
#pragma GCC unroll 4
                for (int i = 0; i < together; i++) {
                    const __m512 q0 = _mm512_permutexvar_ps(_mm512_srli_epi32(line(at[i]), shift), table);
                    const __m512 q1 = _mm512_permutexvar_ps(_mm512_srli_epi32(line(at[i] + 64), shift), table);
                    __m512 *own = part + 2 * rows * i;
#pragma GCC unroll 8
                    for (int r = 0; r < rows; r++) {
                        const __m512 xr = _mm512_set1_ps(x[(i * l->group_padded + k + 8 * step + b) * rows + r]);
                        own[2 * r] = _mm512_fmadd_ps(xr, q0, own[2 * r]);
                        own[2 * r + 1] = _mm512_fmadd_ps(xr, q1, own[2 * r + 1]);
                    }
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

INLINE void block16(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const float *x = (const float *)p->values + row0 * l->k_padded;
    const float *xsum = p->scale + row0 * l->groups;
    const int together = rows <= 2 ? 4 : rows == 3 ? 2 : 1;
    __m512 f[2 * MR16];
    expect_rows(p, t, row0, rows);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    int64_t g = 0;
    for (; g + together <= l->groups; g += together)
        groups16(p, tile, x + g * l->group_padded * rows, xsum + g * rows, f, g, ahead, rows, together);
    for (; together > 1 && g < l->groups; g++)
        groups16(p, tile, x + g * l->group_padded * rows, xsum + g * rows, f, g, ahead, rows, 1);
    store_rows(p, f, t, row0, rows);
}

/* One function for each row count, common group and kind of zero point: each gets registers of its own. */
#define KIND(name, body, r)                                                                                             \
    BLOCK(name##_##r##_32s, body, r, 32, 1)                                                                              \
    BLOCK(name##_##r##_32, body, r, 32, 0)                                                                               \
    BLOCK(name##_##r##_128s, body, r, 128, 1)                                                                            \
    BLOCK(name##_##r##_128, body, r, 128, 0)                                                                             \
    BLOCK(name##_##r##_s, body, r, 0, 1)                                                                                \
    BLOCK(name##_##r##_, body, r, 0, 0)
KIND(stream8, stream8, 1) KIND(stream8, stream8, 2)
KIND(block8, block8, 1) KIND(block8, block8, 2) KIND(block8, block8, 3) KIND(block8, block8, 4)
KIND(block8, block8, 5) KIND(block8, block8, 6) KIND(block8, block8, 7) KIND(block8, block8, 8)

ROWS(block16, 1) ROWS(block16, 2) ROWS(block16, 3) ROWS(block16, 4)
ROWS(block16, 5) ROWS(block16, 6) ROWS(block16, 7) ROWS(block16, 8)

#define TABLE(first, second, kind)                                                                                      \
    {first##_1##kind,   second##_2##kind, block8_3##kind, block8_4##kind,                                               \
     block8_5##kind, block8_6##kind, block8_7##kind, block8_8##kind}

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[2][3][2][ALONE8] = {
        {{TABLE(block8, block8, _32), TABLE(block8, block8, _32s)},
         {TABLE(block8, block8, _128), TABLE(block8, block8, _128s)},
         {TABLE(block8, block8, _), TABLE(block8, block8, _s)}},
        {{TABLE(stream8, stream8, _32), TABLE(stream8, stream8, _32s)},
         {TABLE(stream8, stream8, _128), TABLE(stream8, stream8, _128s)},
         {TABLE(stream8, stream8, _), TABLE(stream8, stream8, _s)}}};
    const int64_t group = p->l.group_padded;
    tiles_ahead(p, begin, end, blocks[group <= STREAM_GROUP][group == 32 ? 0 : group == 128 ? 1 : 2][p->l.symmetric], 8,
                p->ahead > FAR ? p->ahead : FAR, 2 * p->ahead);
}

static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[MR16] = {block16_1, block16_2, block16_3, block16_4,
                                          block16_5, block16_6, block16_7, block16_8};
    tiles(p, begin, end, blocks, 8);
}

const assay_int4_gemm_kernel assay_int4_gemm_avx512vnni = {MR8, MR16, ALONE8, prepare, w4a8, w4a16, 0, NULL, NULL, NULL};

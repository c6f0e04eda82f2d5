/* int8 GEMM for AVX-512 with VNNI: the equations of assay.h. A line is vpdpbusd's unsigned operand as it lies (q + 128);
 * sums start at -128 times the sum of the activation codes.
 *   registers (MR = 6, 32 columns): 12 int32 + 12 float32 accumulators, 2 weights, 1 activation.
 *   per 32 k: 96 vpdpbusd; 12 vmulps, 12 vfmadd on the same two pipes: group 32 can reach 80% of the vpdpbusd peak.
 * Up to eight rows go in one pass when they are all there are; their float32 accumulators then live in memory (L1). */
#include "../gemm_avx512.h"

enum { MR8 = 6, ALONE8 = 8 };

INLINE void block8(const assay_gemm_args *p, int64_t t, int64_t row0, const reach *ahead, const int rows, const int group) {
    const assay_w4_layout *l = &p->l;
    const int64_t count = group ? group / 16 : l->group_padded / 16, groups = l->groups;
    const uint8_t *at = p->packed + t * l->tile_bytes;
    const int32_t *a = (const int32_t *)((const int8_t *)p->values + row0 * l->k_padded);
    const float *scale = p->scale + row0 * groups;
    const int32_t *comp = p->comp + row0 * groups;
    __m512 f[2 * ALONE8];
    expect_rows(p, t, row0, rows);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, scale += rows, comp += rows) {
        const uint8_t *block = at;
        prefetch(at + ahead->line[0]);
        at += ASSAY_SCALE_BYTES;
        __m512i acc[2 * ALONE8];
#pragma GCC unroll 16
        for (int i = 0; i < 2 * rows; i++) acc[i] = _mm512_set1_epi32(comp[i / 2]);
#pragma GCC unroll 1
        for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int step = 0; step < 4; step++, at += 128, a += rows) {
                prefetch(at + ahead->line[2 * step]);
                prefetch(at + 64 + ahead->line[2 * step + 1]);
                const __m512i w0 = line(at), w1 = line(at + 64);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const __m512i x = _mm512_set1_epi32(a[r]);
                    acc[2 * r] = _mm512_dpbusd_epi32(acc[2 * r], w0, x);
                    acc[2 * r + 1] = _mm512_dpbusd_epi32(acc[2 * r + 1], w1, x);
                }
            }
        const __m512 ws[2] = {scale_of(block, 0), scale_of(block, 1)};
#pragma GCC unroll 16
        for (int i = 0; i < 2 * rows; i++)
            f[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i]), _mm512_mul_ps(ws[i % 2], _mm512_set1_ps(scale[i / 2])), f[i]);
    }
    store_rows(p, f, t, row0, rows);
}

/* One function for each row count and common group: each gets registers of its own. */
#define KIND(r) BLOCK(block8_##r##_32, block8, r, 32) BLOCK(block8_##r##_, block8, r, 0)
KIND(1) KIND(2) KIND(3) KIND(4) KIND(5) KIND(6) KIND(7) KIND(8)
#define TABLE(kind)                                                                                                    \
    {block8_1##kind, block8_2##kind, block8_3##kind, block8_4##kind, block8_5##kind, block8_6##kind, block8_7##kind,   \
     block8_8##kind}

static void w8a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    static const block_fn blocks[2][ALONE8] = {TABLE(_), TABLE(_32)};
    tiles(p, begin, end, blocks[p->l.group_padded == 32], 8);
}

const assay_int8_gemm_kernel assay_int8_gemm_avx512vnni = {MR8, ALONE8, w8a8};

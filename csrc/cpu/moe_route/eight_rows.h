/* Eight rows of survivors.h at once: rows become lanes, so that a comparator of a sorting network is one minimum and one
 * maximum for all of them, and no step of it a shuffle.
 *
 *   threshold   lane maxima of eight rows as columns: two lanes a row, of eight each, sorted; the larger of opposite ones
 *   survivors   row by row (list_survivors)
 *   sort        16 keys a row as columns: two times eight, sorted; the larger of opposite ones, merged
 *   weights     slots j and j + 4 of all rows in one vector; columns become rows again on their way out
 *
 * Rows with more than 16 survivors, or a status, are done again by themselves. */
#ifndef ASSAY_EIGHT_ROWS_H
#define ASSAY_EIGHT_ROWS_H

enum { ABREAST = 8 };

#define NETWORK(type, suffix, name)                                                              \
    INLINE void order_##name(type *v, int i, int j) { /* the larger into v[i] */                 \
        const type larger = _mm512_max_##suffix(v[i], v[j]);                                     \
        v[j] = _mm512_min_##suffix(v[i], v[j]);                                                  \
        v[i] = larger;                                                                           \
    }                                                                                            \
    /* Lanes of v[0..8), descending: 19 comparators. */                                          \
    INLINE void sort_##name(type *v) {                                                           \
        for (int i = 0; i < 2; i++) order_##name(v, i, i + 2), order_##name(v, i + 4, i + 6);    \
        for (int i = 0; i < 4; i++) order_##name(v, i, i + 4);                                   \
        for (int i = 0; i < 8; i += 2) order_##name(v, i, i + 1);                                \
        order_##name(v, 2, 4), order_##name(v, 3, 5);                                            \
        order_##name(v, 1, 4), order_##name(v, 3, 6);                                            \
        for (int i = 1; i < 7; i += 2) order_##name(v, i, i + 1);                                \
    }                                                                                            \
    /* The same of lanes that rise and then fall: 12. */                                         \
    INLINE void merge_##name(type *v) {                                                          \
        for (int i = 0; i < 4; i++) order_##name(v, i, i + 4);                                   \
        for (int i = 0; i < 8; i += 4) order_##name(v, i, i + 2), order_##name(v, i + 1, i + 3); \
        for (int i = 0; i < 8; i += 2) order_##name(v, i, i + 1);                                \
    }
NETWORK(__m512, ps, floats)
NETWORK(__m512d, pd, doubles)

/* Of four rows of 16 floats: c[i] has in each 128-bit part p elements 4 p + i of rows 0 to 3. */
INLINE void columns4(const __m512 *r, __m512 *c) {
    const __m512 t0 = _mm512_unpacklo_ps(r[0], r[1]), t1 = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 t2 = _mm512_unpacklo_ps(r[2], r[3]), t3 = _mm512_unpackhi_ps(r[2], r[3]);
    c[0] = _mm512_shuffle_ps(t0, t2, 0x44);
    c[1] = _mm512_shuffle_ps(t0, t2, 0xee);
    c[2] = _mm512_shuffle_ps(t1, t3, 0x44);
    c[3] = _mm512_shuffle_ps(t1, t3, 0xee);
}

/* Eight rows of doubles as columns, in any order: lane t is of row t. */
INLINE void columns8(const __m512d *r, __m512d *c) {
    __m512d t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        u[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
        u[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
        u[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
        u[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        c[i] = _mm512_shuffle_f64x2(u[i], u[i + 4], 0x88);
        c[i + 4] = _mm512_shuffle_f64x2(u[i], u[i + 4], 0xdd);
    }
}

/* The top_k-th largest of each row's 16 lane maxima, in threshold[0..8). */
INLINE void thresholds8(const __m512 *best, int64_t top_k, float *threshold) {
    __m512 c[8], v[8];
    columns4(best, c);
    columns4(best + 4, c + 4);
    for (int i = 0; i < 4; i++) { /* 128-bit parts: rows 0..3 twice, rows 4..7 twice */
        v[i] = _mm512_shuffle_f32x4(c[i], c[i + 4], 0x44);
        v[i + 4] = _mm512_shuffle_f32x4(c[i], c[i + 4], 0xee);
    }
    sort_floats(v);
    for (int i = 0; i < 8; i++) c[i] = _mm512_max_ps(v[i], _mm512_shuffle_f32x4(v[7 - i], v[7 - i], 0xb1));
    merge_floats(c);
    _Alignas(64) float kth[16];
    _mm512_store_ps(kth, c[top_k - 1]);
    memcpy(threshold, kth, 16);
    memcpy(threshold + 4, kth + 8, 16);
}

/* Logits (low half) and ids (high half), or with `swapped` the other way round, of eight rows' keys. */
INLINE __m512i decoded(__m512d key, int swapped) {
    const __m512i split = swapped ? _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
                                  : _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i bits = _mm512_sub_epi64(_mm512_castpd_si512(key), _mm512_set1_epi64((int64_t)KEY_STEP << 32));
    const __m512i positive = _mm512_andnot_si512(_mm512_srai_epi64(bits, 63), _mm512_set1_epi64(0xffffffff));
    return _mm512_permutexvar_epi32(split, _mm512_xor_si512(bits, positive));
}

/* Writes eight rows from their keys, best first; returns the rows (a bit each) that are to be done again. */
INLINE unsigned write_eight(const assay_route_args *a, int64_t t, const void *const *row, int dtype, const __m512d *key) {
    __m512i part[8];
    __m512 x[4], column[8], c[8];
    for (int j = 0; j < 8; j++) part[j] = decoded(key[j], j >= 4);
    for (int j = 0; j < 4; j++)
        x[j] = _mm512_castsi512_ps(_mm512_mask_blend_epi32(0xff00, part[j], part[j + 4]));
    const __m256 largest = _mm512_castps512_ps256(x[0]);
    const __m256 good = _mm256_and_ps(_mm256_cmp_ps(largest, _mm256_set1_ps(INFINITY), _CMP_LT_OQ),
                                      _mm256_cmp_ps(largest, _mm256_set1_ps(-INFINITY), _CMP_GT_OQ));
    const __m512 m = _mm512_insertf32x8(_mm512_castps256_ps512(largest), largest, 1);
    if (a->scoring == ASSAY_SCORE_SOFTMAX) {
        for (int j = 0; j < 4; j++) {
            const unsigned in_row = (j < a->top_k ? 0xff : 0) | (j + 4 < a->top_k ? 0xff00 : 0);
            x[j] = _mm512_maskz_mov_ps((__mmask16)in_row, vexp16(_mm512_sub_ps(x[j], m)));
        }
        /* The fold of vexp.h, slot j in lane j. */
        __m256 e[4], total;
        for (int j = 0; j < 4; j++)
            e[j] = _mm256_add_ps(_mm512_castps512_ps256(x[j]), _mm512_extractf32x8_ps(x[j], 1));
        total = _mm256_add_ps(_mm256_add_ps(e[0], e[2]), _mm256_add_ps(e[1], e[3]));
        if (!a->renormalize) {
            _Alignas(32) float of_all[ABREAST], first[ABREAST];
            _mm256_store_ps(first, largest);
            for (int r = 0; r < ABREAST; r++) of_all[r] = sum_of_all(row[r], dtype, a->num_experts, first[r]);
            total = _mm256_load_ps(of_all);
        }
        const __m512 divisor = _mm512_insertf32x8(_mm512_castps256_ps512(total), total, 1);
        const __m512 scaling = _mm512_set1_ps(a->scaling);
        for (int j = 0; j < 4; j++) x[j] = _mm512_mul_ps(_mm512_div_ps(x[j], divisor), scaling);
    }
    for (int j = 0; j < 4; j++) {
        column[j] = _mm512_mask_blend_ps(0xff00, x[j], _mm512_castsi512_ps(part[j]));
        column[j + 4] = _mm512_mask_blend_ps(0xff00, _mm512_castsi512_ps(part[j + 4]), x[j]);
    }
    columns4(column, c);         /* parts: weights of row i, of row 4 + i, ids of row i, of row 4 + i; slots 0..3 */
    columns4(column + 4, c + 4); /* ids first; slots 4..7 */
    const __mmask16 in_row = (__mmask16)((1u << a->top_k) - 1);
    const int64_t width = assay_route_width(a);
    for (int r = 0; r < ABREAST; r++) {
        const int64_t h = r < 4 ? 0 : 2;
        const __m512i join = _mm512_setr_epi64(h, h + 1, 12 + h, 13 + h, 4 + h, 5 + h, 8 + h, 9 + h);
        const __m512 both = _mm512_castsi512_ps(_mm512_permutex2var_epi64(
            _mm512_castps_si512(c[r % 4]), join, _mm512_castps_si512(c[r % 4 + 4])));
        _mm512_mask_storeu_ps(a->topk_weights + (t + r) * width, in_row, both);
        _mm512_mask_storeu_ps(a->topk_ids + (t + r) * width, in_row,
                              _mm512_castps256_ps512(_mm512_extractf32x8_ps(both, 1)));
    }
    _mm256_storeu_si256((__m256i *)(a->status + t), _mm256_setzero_si256());
    return ~(unsigned)_mm256_movemask_ps(good) & 0xff;
}

INLINE void eight_rows(const assay_route_args *a, int64_t t, int dtype, int chunks) {
    survivors s[ABREAST];
    const void *row[ABREAST];
    __m512 best[ABREAST];
    float threshold[ABREAST];
    __m512d low[ABREAST], high[ABREAST], key[8];
    unsigned again = 0;
    for (int r = 0; r < ABREAST; r++) {
        row[r] = (const uint8_t *)a->logits + (t + r) * a->ld * (dtype == ASSAY_F32 ? 4 : 2);
        best[r] = lane_maxima(row[r], dtype, a->num_experts, chunks);
    }
    thresholds8(best, a->top_k, threshold);
    for (int r = 0; r < ABREAST; r++)
        list_survivors(&s[r], row[r], dtype, a->num_experts, chunks, _mm512_set1_ps(threshold[r]));
    for (int r = 0; r < ABREAST; r++) {
        again |= (unsigned)(s[r].count > 16) << r;
        again |= (unsigned)keys_of(&s[r], 0, &low[r], &high[r]) << r;
    }
    __m512d c[2 * ABREAST];
    columns8(low, c);
    columns8(high, c + 8);
    sort_doubles(c);
    sort_doubles(c + 8);
    for (int i = 0; i < 8; i++) key[i] = _mm512_max_pd(c[i], c[15 - i]);
    merge_doubles(key);
    again |= write_eight(a, t, row, dtype, key);
    for (int r = 0; r < ABREAST; r++) {
        if (again >> r & 1) {
            finish_survivors(a, t + r, row[r], dtype, &s[r]);
        } else {
            if (a->scoring != ASSAY_SCORE_SOFTMAX) assay_route_weigh(a, t + r, row[r], 0, 0);
            assay_route_share(a, t + r);
        }
    }
}

#endif

/* INT4 GEMM for AMX-INT8 (Sapphire Rapids and later): the equations of assay.h. w4a16, and calls whose rows are few for their
 * group, are AVX-512's.
 *
 * Nibbles become signed bytes, q - zero, once for up to PANEL rows: the zero point then costs nothing a row. What lies between
 * tdpbssd's sums and the result is, for each 16 outputs of a group, a conversion, a multiplication and an FMA. Measured on
 * Granite Rapids, in cycles:
 *   tdpbssd       16 a tile of 16 rows, however deep (up to 64 k)
 *   tilestored    18, in which no other instruction is issued; tileloadd 4
 *   vmulps, vfmadd, vcvtdq2ps: 1 while tiles are in use, else 1/2; vaddps and integers 1/2 always
 * and the clock falls with what the bytes are: products of zeros run half as fast again as products of numbers.
 * So sums are never set back: tiles start at the integer 0x4b400000, which read as float32 is 1.5 2^23, and run on over the
 * groups; the float32 difference of two groups' tiles is the group's integer sum, converted and exact, while they stay within
 * 2^22 of the start (DEPTH). A group of 32 fills half a tile product and still pays a store and 32 multiplications for it,
 * which is why its gain over AVX-512 is small and starts at many rows; groups of 128 pay a quarter of that.
 * To overlap all these, the sums of TOGETHER groups are scaled while the next ones' are made: after every tile's product comes
 * a part of EPILOGUE rows of the groups before, and the tile before is stored. */
#include "../gemm_amx.h"

extern const assay_int4_gemm_kernel assay_int4_gemm_avx512vnni;

enum { TOGETHER = 2, RING = 8, EPILOGUE = 4, PANEL = 256, DEPTH = 2048, MOST_GROUP = 128 };
_Static_assert(DEPTH * 15 * 127 < 1 << 22, "sums leave the floats whose unit in the last place is 1");
_Static_assert(RING >= 3 * TOGETHER + 1 && (RING & (RING - 1)) == 0, "sums are overwritten before they are scaled");

static const int32_t START[16] __attribute__((aligned(64))) = {
    0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000,
    0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};

/* Tiles of a row block after a group: START and the sums so far. */
typedef int32_t sums[MR8][ASSAY_TILE_N];

/* What has been multiplied and waits to be scaled: groups `at`, at + 1.. of the ring, from row `done` on. */
typedef struct {
    const float (*ws)[ASSAY_TILE_N], *as;
    float (*f)[ASSAY_TILE_N];
    int64_t at, rows, groups, done;
} waiting;

typedef struct {
    _Alignas(64) int8_t weights[DEPTH * ASSAY_TILE_N]; /* by group: two halves of [k/4][16 columns][4] */
    _Alignas(64) float scale[DEPTH / 32][ASSAY_TILE_N];
    _Alignas(64) sums ring[RING];
    _Alignas(64) float f[PANEL][ASSAY_TILE_N];
    int64_t at; /* of the ring: the next group's place */
    waiting w;
} panel;

/* The zero points of columns 16 h .. 16 h + 15, four bytes a column. */
INLINE __m512i zero_bytes(const uint8_t *zeros, int h) {
    const __m512i column = _mm512_setr_epi32(0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606,
                                             0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d,
                                             0x0e0e0e0e, 0x0f0f0f0f);
    const __m512i both = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)zeros));
    const __m512i here = h ? _mm512_srli_epi32(both, 4) : both;
    return _mm512_shuffle_epi8(_mm512_and_si512(here, _mm512_set1_epi8(15)), column);
}

/* Groups g0 .. g0 + count - 1 of a tile to signed bytes, and their scales to float32. */
KERNEL void unpack_groups(const assay_w4_layout *l, const uint8_t *tile, int64_t g0, int64_t count, panel *out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < count; g++) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g0 + g), *at = block + ASSAY_SCALE_BYTES;
        for (int h = 0; h < 2; h++) {
            const __m512i zero = l->symmetric ? _mm512_set1_epi8(8) : zero_bytes(tile + assay_w4_zero_offset(l, g0 + g), h);
            int8_t *to = out->weights + (2 * g + h) * 16 * l->group_padded;
            for (int64_t i = 0; i < l->group_padded / 8; i++, to += 128) {
                const __m512i both = line(at + 128 * i + 64 * h);
                _mm512_store_si512((void *)to, _mm512_sub_epi8(_mm512_and_si512(both, nibble), zero));
                const __m512i high = _mm512_and_si512(_mm512_srli_epi32(both, 4), nibble);
                _mm512_store_si512((void *)(to + 64), _mm512_sub_epi8(high, zero));
            }
            _mm512_store_ps(out->scale[g] + 16 * h, scale_of(block, h));
        }
    }
}

/* Intrinsics of tiles want constants. Tile 2 i + h: rows 16 i.., columns 16 h... */
INLINE void start_tile(const int tile) {
    if (tile == 0) _tile_loadd(0, START, 0);
    if (tile == 1) _tile_loadd(1, START, 0);
    if (tile == 2) _tile_loadd(2, START, 0);
    if (tile == 3) _tile_loadd(3, START, 0);
}
INLINE void multiply_tile(const int tile) {
    if (tile == 0) _tile_dpbssd(0, 4, 6);
    if (tile == 1) _tile_dpbssd(1, 4, 7);
    if (tile == 2) _tile_dpbssd(2, 5, 6);
    if (tile == 3) _tile_dpbssd(3, 5, 7);
}
INLINE void store_tile(const int tile, sums to) {
    if (tile == 0) _tile_stored(0, to[0], 128);
    if (tile == 1) _tile_stored(1, to[0] + 16, 128);
    if (tile == 2) _tile_stored(2, to[TILE_ROWS], 128);
    if (tile == 3) _tile_stored(3, to[TILE_ROWS] + 16, 128);
}

/* f += scaled sums of the groups that wait, of `rows` rows. */
INLINE void scale_rows(panel *s, const int rows) {
    waiting *w = &s->w;
    float (*const to)[ASSAY_TILE_N] = w->f + w->done;
    const float *as = w->as + w->done;
    __m512 f[2 * EPILOGUE], before[2 * EPILOGUE];
    const int32_t (*first)[ASSAY_TILE_N] = (const int32_t (*)[ASSAY_TILE_N])s->ring[(w->at - 1) & (RING - 1)] + w->done;
#pragma GCC unroll 8
    for (int i = 0; i < 2 * rows; i++) {
        f[i] = _mm512_load_ps(to[i / 2] + i % 2 * 16);
        before[i] = _mm512_load_ps((const void *)(first[i / 2] + i % 2 * 16));
    }
    for (int64_t g = 0; g < w->groups; g++, as += w->rows) {
        const int32_t (*sum)[ASSAY_TILE_N] = (const int32_t (*)[ASSAY_TILE_N])s->ring[(w->at + g) & (RING - 1)] + w->done;
#pragma GCC unroll 8
        for (int i = 0; i < 2 * rows; i++) {
            const __m512 now = _mm512_load_ps((const void *)(sum[i / 2] + i % 2 * 16));
            const __m512 ws = _mm512_load_ps(w->ws[g] + i % 2 * 16);
            f[i] = _mm512_fmadd_ps(_mm512_sub_ps(now, before[i]), _mm512_mul_ps(ws, _mm512_set1_ps(as[i / 2])), f[i]);
            before[i] = now;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * rows; i++) _mm512_store_ps(to[i / 2] + i % 2 * 16, f[i]);
    w->done += rows;
}

/* EPILOGUE rows, or the last ones one by one. */
INLINE void scale_part(panel *s) {
    const int64_t left = s->w.rows - s->w.done;
    if (left >= EPILOGUE) scale_rows(s, EPILOGUE);
    else if (left >= 2) scale_rows(s, 2);
    else if (left == 1) scale_rows(s, 1);
}

INLINE void scale_all(panel *s) {
    while (s->w.done < s->w.rows) scale_part(s);
}

/* Groups g0 .. g0 + count - 1 of a row block, whose weights lie in s; the last ones are left waiting. Asks for `lines` lines
 * from `next` on, on the way. */
INLINE void block_panel(const assay_gemm_args *p, int64_t row0, int64_t rows, int64_t g0, int64_t count, panel *s,
                        float (*f)[ASSAY_TILE_N], const uint8_t *next, int64_t lines, const int tiles) {
    const assay_w4_layout *l = &p->l;
    const int64_t group = l->group_padded, chunk = chunk_of(l), steps = group / chunk;
    const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded + g0 * group * rows;
    const float *as = p->scale + row0 * l->groups + g0 * rows;
#pragma GCC unroll 4
    for (int t = 0; t < tiles; t++) {
        start_tile(t);
        store_tile(t, s->ring[s->at & (RING - 1)]);
    }
    s->at++;
    int64_t turn = 0;
    for (int64_t g = 0; g < count; g++, s->at++) {
        int32_t (*const sum)[ASSAY_TILE_N] = s->ring[s->at & (RING - 1)];
        int32_t (*const late)[ASSAY_TILE_N] = s->ring[(s->at - 1) & (RING - 1)];
        for (int64_t i = lines * g / count; i < lines * (g + 1) / count; i++) _mm_prefetch((const char *)(next + 64 * i), _MM_HINT_T1);
        for (int64_t k = 0; k < steps; k++, a += rows * chunk) {
            const int8_t *b = s->weights + g * group * ASSAY_TILE_N + 16 * k * chunk;
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + 16 * group, 64);
            _tile_loadd(4, a, chunk);
            if (tiles == 4) _tile_loadd(5, a + TILE_ROWS * chunk, chunk);
#pragma GCC unroll 4
            for (int t = 0; t < tiles; t++) {
                multiply_tile(t);
                if (t == 0 && k == 0 && g) store_tile(tiles - 1, late);
                if (t && k == steps - 1) store_tile(t - 1, sum);
                if (turn++ % steps == 0) scale_part(s);
            }
        }
        if (g % TOGETHER != TOGETHER - 1 && g + 1 < count) continue;
        scale_all(s);
        const int64_t n = g % TOGETHER + 1;
        s->w = (waiting){s->scale + g + 1 - n, as + (g + 1 - n) * rows, f, s->at + 1 - n, rows, n, 0};
    }
    store_tile(tiles - 1, s->ring[(s->at - 1) & (RING - 1)]);
}

KERNEL void block_panel_2(const assay_gemm_args *p, int64_t row0, int64_t rows, int64_t g0, int64_t count, panel *s,
                         float (*f)[ASSAY_TILE_N], const uint8_t *next, int64_t lines) {
    block_panel(p, row0, rows, g0, count, s, f, next, lines, 2);
}
KERNEL void block_panel_4(const assay_gemm_args *p, int64_t row0, int64_t rows, int64_t g0, int64_t count, panel *s,
                         float (*f)[ASSAY_TILE_N], const uint8_t *next, int64_t lines) {
    block_panel(p, row0, rows, g0, count, s, f, next, lines, 4);
}

/* Rows of C from s->f; columns past N stay here. */
INLINE void store_panel(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t rows, const panel *s) {
    const int64_t n0 = t * ASSAY_TILE_N, n = assay_min_i64(ASSAY_TILE_N, p->l.n - n0);
    for (int64_t r = 0; r < rows; r++) memcpy(p->c + (row0 + r) * p->ldc + n0, s->f[r], (size_t)n * 4);
}

/* A tile for all rows, PANEL rows at a time, DEPTH weights along K at a time. */
INLINE void tile_panels(const assay_gemm_args *p, int64_t t, panel *s, int64_t *configured) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int64_t depth = DEPTH / l->group_padded;
    const int blocks = p->row_blocks, at_once = PANEL / MR8;
    for (int b0 = 0; b0 < blocks; b0 += at_once) {
        const int b1 = (int)assay_min_i64(b0 + at_once, blocks);
        const int64_t first = assay_block_row(p->m, blocks, b0), last = assay_block_row(p->m, blocks, b1);
        memset(s->f, 0, (size_t)(last - first) * sizeof *s->f);
        for (int64_t g = 0; g < l->groups; g += depth) {
            const int64_t count = assay_min_i64(depth, l->groups - g);
            scale_all(s);
            unpack_groups(l, tile, g, count, s);
            /* The next tile's bytes of these groups, an equal part for each row block of the last panel. */
            const uint8_t *next = tile + l->tile_bytes + l->tile_bytes * g / l->groups / 64 * 64;
            const int64_t lines = b1 == blocks && t + 1 < l->tiles ? (l->tile_bytes * (g + count) / l->groups / 64 - l->tile_bytes * g / l->groups / 64) : 0;
            for (int b = b0; b < b1; b++) {
                const int64_t row0 = assay_block_row(p->m, blocks, b), rows = assay_block_row(p->m, blocks, b + 1) - row0;
                if (rows != *configured) configure(rows, chunk_of(l));
                *configured = rows;
                const int64_t from = lines * (b - b0) / (b1 - b0), to = lines * (b - b0 + 1) / (b1 - b0);
                (rows > TILE_ROWS ? block_panel_4 : block_panel_2)(p, row0, rows, g, count, s, s->f + (row0 - first),
                                                                 next + 64 * from, to - from);
            }
        }
        scale_all(s);
        store_panel(p, t, first, last - first, s);
    }
}

/* A group longer than the panel's: one row block after the other, unpacking for each. */
KERNEL void block8(const assay_gemm_args *p, int64_t t, int64_t row0, int64_t rows) {
    const assay_w4_layout *l = &p->l;
    const uint8_t *tile = p->packed + t * l->tile_bytes;
    const int8_t *a = (const int8_t *)p->values + row0 * l->k_padded;
    const float *scale = p->scale + row0 * l->groups;
    const int32_t *comp = p->comp + row0 * l->groups;
    amx_buffer buffer;
    __m512 f[2 * MR8];
    for (int64_t i = 0; i < 2 * rows; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l->groups; g++, scale += rows, comp += rows, a += l->group_padded * rows) {
        const uint8_t *block = tile + assay_w4_block_offset(l, g);
        dot_group(l, block + ASSAY_SCALE_BYTES, a, rows, NIBBLE, _mm512_setzero_si512(), &buffer);
        for (int h = 0; h < 2; h++) {
            const __m512 ws = scale_of(block, h);
            const __m512i z = l->symmetric ? _mm512_set1_epi32(1) : zero_of(tile + assay_w4_zero_offset(l, g), h);
            for (int64_t r = 0; r < rows; r++) {
                const __m512i sum = _mm512_add_epi32(_mm512_load_si512((const void *)(buffer.sum[r] + 16 * h)),
                                                     _mm512_mullo_epi32(z, _mm512_set1_epi32(comp[r])));
                f[2 * r + h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(ws, _mm512_set1_ps(scale[r])),
                                               f[2 * r + h]);
            }
        }
    }
    store_rows(p, f, t, row0, (int)rows);
}

static void prepare8(const assay_gemm_args *p, int64_t begin, int64_t end) { prepare_tiles(p, begin, end); }

static void w4a8(const assay_gemm_args *p, int64_t begin, int64_t end) {
    if (few_rows(p)) {
        assay_gemm_args few = *p;
        split_rows(&few);
        assay_int4_gemm_avx512vnni.w4a8(&few, begin, end);
    } else if (p->l.group_padded > MOST_GROUP) {
        walk_tiles(p, begin, end, block8);
    } else {
        panel s;
        int64_t configured = 0;
        s.at = 0;
        s.w.rows = s.w.done = 0;
        for (int64_t t = begin; t < end; t++) tile_panels(p, t, &s, &configured);
        _tile_release();
    }
}

static void w4a16(const assay_gemm_args *p, int64_t begin, int64_t end) {
    assay_int4_gemm_avx512vnni.w4a16(p, begin, end);
}

const assay_int4_gemm_kernel assay_int4_gemm_amx = {MR8, MR16, MR8, prepare8, w4a8, w4a16, 0};

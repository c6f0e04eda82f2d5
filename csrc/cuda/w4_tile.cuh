// One block's share of C = A W^T for INT4 weights and 16-bit activations: kBlockM rows by 256 columns over a range of K.
//
// Eight warps, each for 32 columns of its own and all rows. A lane copies its own 16 bytes of weights to shared memory and reads
// them back itself: they are B fragments already (w4_layout.h). A's tile is shared by the warps: rows of 128 bytes, 16-byte pieces
// swizzled by row, so that ldmatrix meets no bank conflict. Four stages of 64 k by cp.async.
//
// Numbers: weights enter the tensor core as the integers q - zero, exact in float16 and in bfloat16; a group's sum p is
// scaled in float32: f = fma(p, scale, f), groups ascending, as on the CPU. So a weight is never rounded, and dequantising costs
// no multiplication by a scale a weight, but four a group and accumulator tile.
#ifndef ASSAY_W4_TILE_CUH
#define ASSAY_W4_TILE_CUH

#include "assay_cuda.h"
#include "ptx.cuh"
#include "w4_layout.h"

namespace assay {

// Where one weight matrix's sections are, for one 32-column tile.
struct W4Columns {
    const uint8_t *weights, *scales, *zeros;

    ASSAY_DEVICE W4Columns(const void *data, uint32_t n, uint32_t k, uint32_t groups, uint32_t tile) {
        const uint64_t tiles = ceil_div<uint32_t>(n, ASSAY_CUDA_W4_TILE);
        const uint64_t tile_bytes =
            static_cast<uint64_t>(ceil_div<uint32_t>(k, ASSAY_CUDA_W4_PAD)) * (ASSAY_CUDA_W4_PAD / ASSAY_CUDA_W4_STEP) *
            ASSAY_CUDA_W4_STEP_BYTES;
        const uint8_t *base = static_cast<const uint8_t *>(data);
        weights = base + tile * tile_bytes;
        scales = base + tiles * tile_bytes + static_cast<uint64_t>(tile) * groups * ASSAY_CUDA_W4_SCALES_BYTES;
        zeros = base + tiles * (tile_bytes + static_cast<uint64_t>(groups) * ASSAY_CUDA_W4_SCALES_BYTES) +
                static_cast<uint64_t>(tile) * groups * ASSAY_CUDA_W4_ZEROS_BYTES;
    }
};

constexpr uint32_t kNoRow = ~0u;

// How groups lie among tiles of K of TILE (64 or 128) values: 32, 64, 128 or all of K. Masks and shifts, no division.
template <uint32_t TILE>
struct W4Groups {
    uint32_t count;      // of the matrix
    uint32_t per_tile;   // 1 when a group has a tile or more
    uint32_t mask;       // tiles a group - 1; kOne when K is one group
    static constexpr uint32_t kOne = 0x7FFFFFFF;

    ASSAY_DEVICE W4Groups(uint32_t k, uint32_t group_size) {
        const bool one = group_size >= k;
        count = one ? 1 : k / group_size;
        per_tile = one || group_size >= TILE ? 1 : TILE / group_size;
        mask = one ? kOne : group_size > TILE ? group_size / TILE - 1 : 0;
    }
    // A group begins with tile t, or ends with it.
    ASSAY_DEVICE bool begins(uint32_t t) const { return (t & mask) == 0; }
    ASSAY_DEVICE bool ends(uint32_t t) const { return ((t + 1) & mask) == 0; }
    ASSAY_DEVICE uint32_t first_of(uint32_t t) const { return (t >> ptx::popc(mask)) * per_tile; }
};

template <class T, int M_TILES>
ASSAY_DEVICE void w4_clear(T (&v)[M_TILES][4][4]) {
    ASSAY_UNROLL
    for (int m = 0; m < M_TILES; m++)
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++)
            ASSAY_UNROLL
            for (int e = 0; e < 4; e++) v[m][j][e] = 0;
}

// A warp copies to shared memory what tile t's groups have in a section of BYTES a group.
template <uint32_t BYTES, uint32_t TILE>
ASSAY_DEVICE void w4_copy_groups(uint8_t *to, const uint8_t *from, const W4Groups<TILE> &groups, uint32_t t) {
    const uint32_t slot = ptx::lane() / (BYTES / 16), group = groups.first_of(t);
    if (slot >= groups.per_tile) return;
    const bool valid = group + slot < groups.count;   // the last tile may have fewer groups
    ptx::cp_async16(to + ptx::lane() * 16, valid ? from + static_cast<uint64_t>(group) * BYTES + ptx::lane() * 16 : from, valid);
}

// Word j of a lane's 16 bytes to B registers of two k16 steps: b[0..1] of the first, b[2..3] of the second.
struct Float16 {
    // lo, hi: what takes the zero point off fields at bits 0..3 and 4..7 of a half.
    uint32_t lo, hi;
    ASSAY_DEVICE void set_zero(uint32_t zero) {
        lo = 0x64006400u + zero * 0x00010001u;   // 1024 + zero
        hi = 0xD400D400u + zero * 0x00100010u;   // -(64 + zero)
    }
    ASSAY_DEVICE void expand(uint32_t (&b)[4], uint32_t word) const {
        ASSAY_UNROLL
        for (int s = 0; s < 2; s++) {
            const uint32_t v = s ? word >> 8 : word;
            // The fraction of 1024 has unit 1: or-ing q into it gives 1024 + q, or 1024 + 16 q.
            const uint32_t low = ptx::lop3<0xEA>(v, 0x000F000Fu, 0x64006400u);
            const uint32_t high = ptx::lop3<0xEA>(v, 0x00F000F0u, 0x64006400u);
            b[2 * s] = ptx::hsub2(low, lo);
            b[2 * s + 1] = ptx::hfma2(high, 0x2C002C00u, hi);   // / 16 - (64 + zero)
        }
    }
    ASSAY_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_f16(c, a, b); }
};

struct Bfloat16 {
    uint32_t lo;
    ASSAY_DEVICE void set_zero(uint32_t zero) { lo = 0xC300C300u + zero * 0x00010001u; }   // -(128 + zero)
    ASSAY_DEVICE void expand(uint32_t (&b)[4], uint32_t word) const {
        ASSAY_UNROLL
        for (int i = 0; i < 4; i++)   // seven bits of fraction: only the lowest field fits in 128's
            b[i] = ptx::badd2(ptx::lop3<0xEA>(word >> (4 * i), 0x000F000Fu, 0x43004300u), lo);
    }
    ASSAY_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_bf16(c, a, b); }
};

// The main loop of a product whose operands pass through shared memory: load(t, stage) is STAGES - 1 tiles ahead of
// multiply(t, stage), for tiles [first, last). All threads of the block call this together.
template <uint32_t STAGES, class Load, class Multiply>
ASSAY_DEVICE void w4_pipelined(uint32_t first, uint32_t last, const Load &load, const Multiply &multiply) {
    ASSAY_UNROLL
    for (uint32_t s = 0; s < STAGES - 1; s++) {
        if (first + s < last) load(first + s, s);
        ptx::cp_async_commit();
    }
    uint32_t stage = 0;
    ASSAY_NO_UNROLL
    for (uint32_t t = first; t < last; t++) {
        ptx::cp_async_wait<STAGES - 2>();
        ptx::sync();   // stage t has landed for all, and all are done with stage t - 1
        const uint32_t free_stage = stage == 0 ? STAGES - 1 : stage - 1;
        if (t + STAGES - 1 < last) load(t + STAGES - 1, free_stage);
        ptx::cp_async_commit();
        multiply(t, stage);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
    ptx::sync();       // shared memory is free again
}

// Format: Float16 or Bfloat16. M_TILES: rows / 16. ZEROS: zero points, else 8 everywhere.
template <class Format, int M_TILES, bool ZEROS>
struct W4A16Tile {
    static constexpr uint32_t kWarps = 8, kThreads = 32 * kWarps, kStages = 4;
    static constexpr uint32_t kBlockM = 16 * M_TILES, kBlockN = ASSAY_CUDA_W4_TILE * kWarps, kBlockK = 64;
    static constexpr uint32_t kSteps = kBlockK / ASSAY_CUDA_W4_STEP;
    static constexpr uint32_t kABytes = kBlockM * kBlockK * 2;
    // Of one warp: weights, then scales and zeros of up to two groups.
    static constexpr uint32_t kScalesAt = kSteps * ASSAY_CUDA_W4_STEP_BYTES;
    static constexpr uint32_t kZerosAt = kScalesAt + 2 * ASSAY_CUDA_W4_SCALES_BYTES;
    static constexpr uint32_t kWarpBytes = kZerosAt + (ZEROS ? 2 * ASSAY_CUDA_W4_ZEROS_BYTES : 0);
    static constexpr uint32_t kStageBytes = kABytes + kWarps * kWarpBytes;
    static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
    static constexpr uint32_t kPieces = ceil_div_const(kBlockM * 8, kThreads);   // of A, a thread and stage

    // f[m][j]: rows 16 m + lane / 4 (elements 0, 1) and + 8 (2, 3), columns 8 j + 2 (lane % 4) + {0, 1} of the warp's 32.
    float f[M_TILES][4][4];

    // a: rows of `lda` 16-bit values; aligned: each at a multiple of 16 bytes, and k a multiple of 8. rows(i): which row of a is
    // the block's i-th, or kNoRow for one that counts as zeros. w: the warp's 32 columns; when `inside` is false there are
    // none, and the warp only helps. [first, last): of K in units of kBlockK. All threads of the block call this together.
    template <class Rows>
    ASSAY_DEVICE void run(const void *a, int64_t lda, bool aligned, const Rows &rows, uint32_t k, uint32_t group_size,
                          const W4Columns &w, bool inside, uint32_t first, uint32_t last) {
        Source source = {w, {}, W4Groups<kBlockK>(k, group_size), k, first, last, aligned, inside};
        ASSAY_UNROLL
        for (uint32_t i = 0; i < kPieces; i++) {
            const uint32_t piece = (ptx::tid() + i * kThreads) / 8, row = piece < kBlockM ? rows(piece) : kNoRow;
            source.rows[i] = row != kNoRow ? static_cast<const uint8_t *>(a) + 2 * row * lda : nullptr;
        }
        w4_clear(f);
        w4_clear(p);
        w4_pipelined<kStages>(
            first, last, [&](uint32_t t, uint32_t stage) { load(source, t, stage); },
            [&](uint32_t t, uint32_t stage) { multiply(source, t, stage); });
    }

private:
    float p[M_TILES][4][4];   // of the group so far
    Format format[4];         // zero points of the lane's B columns

    struct Source {
        W4Columns w;
        const uint8_t *rows[kPieces];
        W4Groups<kBlockK> groups;
        uint32_t k, first, last;
        bool aligned, inside;
    };

    // A group ends within k-tile t or is cut there; one begins there or is entered in its middle.
    ASSAY_DEVICE static bool folds(const Source &s, uint32_t t) {
        return t + 1 == s.last || s.groups.ends(t);
    }
    ASSAY_DEVICE static bool enters(const Source &s, uint32_t t) { return t == s.first || s.groups.begins(t); }

    ASSAY_DEVICE void load(const Source &s, uint32_t t, uint32_t stage) {
        uint8_t *const a = ptx::shared() + stage * kStageBytes;
        ASSAY_UNROLL
        for (uint32_t i = 0; i < kPieces; i++) {
            const uint32_t piece = ptx::tid() + i * kThreads, row = piece / 8, column = piece % 8;
            if (row >= kBlockM) break;
            uint8_t *const to = a + row * 128 + ((column ^ (row & 7)) * 16);
            const uint32_t at = t * kBlockK + column * 8;
            if (s.aligned) {
                const bool valid = s.rows[i] != nullptr && at < s.k;
                ptx::cp_async16(to, valid ? s.rows[i] + 2 * at : s.w.weights, valid);
            } else {
                load_piece(to, s.rows[i], at, s.k);
            }
        }
        if (!s.inside) return;
        uint8_t *const mine = a + kABytes + ptx::warp() * kWarpBytes;
        const uint8_t *from = s.w.weights + t * (kSteps * ASSAY_CUDA_W4_STEP_BYTES) + ptx::lane() * 16;
        ASSAY_UNROLL
        for (uint32_t step = 0; step < kSteps; step++)
            ptx::cp_async16_stream(mine + step * ASSAY_CUDA_W4_STEP_BYTES + ptx::lane() * 16,
                                   from + step * ASSAY_CUDA_W4_STEP_BYTES);
        if (folds(s, t)) w4_copy_groups<ASSAY_CUDA_W4_SCALES_BYTES>(mine + kScalesAt, s.w.scales, s.groups, t);
        if (ZEROS && enters(s, t)) w4_copy_groups<ASSAY_CUDA_W4_ZEROS_BYTES>(mine + kZerosAt, s.w.zeros, s.groups, t);
    }

    ASSAY_DEVICE static void load_piece(uint8_t *to, const uint8_t *row, uint32_t at, uint32_t k) {
        uint32_t v[4];
        ASSAY_UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t low = row && at + 2 * i < k ? ptx::ldg16(row + 2 * (at + 2 * i)) : 0;
            const uint32_t high = row && at + 2 * i + 1 < k ? ptx::ldg16(row + 2 * (at + 2 * i + 1)) : 0;
            v[i] = low | high << 16;
        }
        ptx::sts(to, u32x4{v[0], v[1], v[2], v[3]});
    }

    ASSAY_DEVICE void multiply(const Source &s, uint32_t t, uint32_t stage) {
        const uint8_t *const a = ptx::shared() + stage * kStageBytes;
        const uint8_t *const mine = a + kABytes + ptx::warp() * kWarpBytes;
        const uint32_t row = ptx::lane() % 16, half = ptx::lane() / 16;
        const bool small = s.groups.per_tile > 1;   // a group a step
        ASSAY_UNROLL
        for (uint32_t step = 0; step < kSteps; step++) {
            if (step == 0 ? enters(s, t) : small) set_zeros(mine, small ? step : 0);
            u32x4 word = {0, 0, 0, 0};
            if (s.inside) word = ptx::lds128(mine + step * ASSAY_CUDA_W4_STEP_BYTES + ptx::lane() * 16);
            uint32_t b[4][4];
            format[0].expand(b[0], word.x);
            format[1].expand(b[1], word.y);
            format[2].expand(b[2], word.z);
            format[3].expand(b[3], word.w);
            ASSAY_UNROLL
            for (uint32_t i = 0; i < 2; i++) {
                ASSAY_UNROLL
                for (int m = 0; m < M_TILES; m++) {
                    uint32_t left[4];
                    ptx::ldmatrix_x4(left, a + (16 * m + row) * 128 + (((4 * step + 2 * i + half) ^ (row & 7)) * 16));
                    ASSAY_UNROLL
                    for (int j = 0; j < 4; j++) {
                        const uint32_t right[2] = {b[j][2 * i], b[j][2 * i + 1]};
                        Format::mma(p[m][j], left, right);
                    }
                }
            }
            if (step == kSteps - 1 ? folds(s, t) : small)
                fold(mine + kScalesAt + (small ? step * ASSAY_CUDA_W4_SCALES_BYTES : 0), s.inside);
        }
    }

    ASSAY_DEVICE void set_zeros(const uint8_t *mine, uint32_t slot) {
        uint32_t zeros = 0x08080808u;
        if (ZEROS) zeros = ptx::lds32(mine + kZerosAt + slot * ASSAY_CUDA_W4_ZEROS_BYTES + ptx::lane() / 4 * 4);
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++) format[j].set_zero(ZEROS ? zeros >> (8 * j) & 15 : 8);
    }

    ASSAY_DEVICE void fold(const uint8_t *scales, bool inside) {
        u32x4 words = {0, 0, 0, 0};
        if (inside) words = ptx::lds128(scales + ptx::lane() % 4 * 16);
        const uint32_t pair[4] = {words.x, words.y, words.z, words.w};
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++) {
            const float even = ptx::half_to_float(static_cast<uint16_t>(pair[j]));
            const float odd = ptx::half_to_float(static_cast<uint16_t>(pair[j] >> 16));
            ASSAY_UNROLL
            for (int m = 0; m < M_TILES; m++)
                ASSAY_UNROLL
                for (int e = 0; e < 4; e++) f[m][j][e] = ptx::fma_rn(p[m][j][e], e & 1 ? odd : even, f[m][j][e]);
        }
        w4_clear(p);
    }
};

}  // namespace assay

#endif

// One block's share of C = A W^T for INT4 weights and int8 activations: kBlockM rows by 256 columns over a range of K.
//
// As w4_tile.cuh, with the int8 tensor core: 128 k a stage, three stages. A word of weights becomes two B registers by two masks and a
// shift, as q in 0..15; zero points are taken off a group's exact sum: I = sum q q_a - zero sum q_a. The order of the
// k that one word holds is that of the 16-bit kernels; A's codes were written in the order that undoes it (a8_quantize.cuh).
// Then f = fma(I, s_w s_a, f), groups ascending: without a cut in K the very bits of the CPU's w4a8.
#ifndef ASSAY_W4A8_TILE_CUH
#define ASSAY_W4A8_TILE_CUH

#include "w4_tile.cuh"

namespace assay {

template <int M_TILES, bool ZEROS>
struct W4A8Tile {
    static constexpr uint32_t kWarps = 8, kThreads = 32 * kWarps, kStages = 3;
    static constexpr uint32_t kBlockM = 16 * M_TILES, kBlockN = ASSAY_CUDA_W4_TILE * kWarps, kBlockK = 128;
    static constexpr uint32_t kSteps = kBlockK / ASSAY_CUDA_W4_STEP;
    static constexpr uint32_t kABytes = kBlockM * kBlockK;
    static constexpr uint32_t kScalesAt = kSteps * ASSAY_CUDA_W4_STEP_BYTES;
    static constexpr uint32_t kZerosAt = kScalesAt + kSteps * ASSAY_CUDA_W4_SCALES_BYTES;
    static constexpr uint32_t kWarpBytes = kZerosAt + (ZEROS ? kSteps * ASSAY_CUDA_W4_ZEROS_BYTES : 0);
    static constexpr uint32_t kStageBytes = kABytes + kWarps * kWarpBytes;
    static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
    static constexpr uint32_t kPieces = ceil_div_const(kBlockM * 8, kThreads);

    float f[M_TILES][4][4];   // as W4A16Tile's

    // codes: rows of k padded to a multiple of 128; groups: [rows of codes, G]. The rest as W4A16Tile::run.
    template <class Rows>
    ASSAY_DEVICE void run(const void *codes, const assay_cuda_a8_group *groups, const Rows &rows, uint32_t k,
                          uint32_t group_size, const W4Columns &w, bool inside, uint32_t first, uint32_t last) {
        Source source = {w, {}, {}, groups, W4Groups<kBlockK>(k, group_size), first, last, inside};
        const uint64_t row_bytes = ceil_div<uint32_t>(k, ASSAY_CUDA_W4_PAD) * ASSAY_CUDA_W4_PAD;
        ASSAY_UNROLL
        for (uint32_t i = 0; i < kPieces; i++) {
            const uint32_t piece = (ptx::tid() + i * kThreads) / 8, row = piece < kBlockM ? rows(piece) : kNoRow;
            source.rows[i] = row != kNoRow ? static_cast<const uint8_t *>(codes) + row * row_bytes : nullptr;
        }
        ASSAY_UNROLL
        for (uint32_t i = 0; i < 2 * M_TILES; i++) source.mine[i] = rows(8 * i + ptx::lane() / 4);
        w4_clear(f);
        w4_clear(sum);
        w4_pipelined<kStages>(
            first, last, [&](uint32_t t, uint32_t stage) { load(source, t, stage); },
            [&](uint32_t t, uint32_t stage) { multiply(source, t, stage); });
    }

private:
    int32_t sum[M_TILES][4][4];   // of the group so far

    struct Source {
        W4Columns w;
        const uint8_t *rows[kPieces];
        uint32_t mine[2 * M_TILES];   // rows of the lane's accumulators
        const assay_cuda_a8_group *a_groups;
        W4Groups<kBlockK> groups;
        uint32_t first, last;
        bool inside;
    };

    ASSAY_DEVICE static bool folds(const Source &s, uint32_t t) { return t + 1 == s.last || s.groups.ends(t); }

    ASSAY_DEVICE void load(const Source &s, uint32_t t, uint32_t stage) {
        uint8_t *const a = ptx::shared() + stage * kStageBytes;
        ASSAY_UNROLL
        for (uint32_t i = 0; i < kPieces; i++) {
            const uint32_t piece = ptx::tid() + i * kThreads, row = piece / 8, column = piece % 8;
            if (row >= kBlockM) break;
            const bool valid = s.rows[i] != nullptr;
            ptx::cp_async16(a + row * 128 + ((column ^ (row & 7)) * 16),
                            valid ? s.rows[i] + t * kBlockK + column * 16 : s.w.weights, valid);
        }
        if (!s.inside) return;
        uint8_t *const mine = a + kABytes + ptx::warp() * kWarpBytes;
        const uint8_t *from =
            s.w.weights + static_cast<uint64_t>(t) * (kSteps * ASSAY_CUDA_W4_STEP_BYTES) + ptx::lane() * 16;
        ASSAY_UNROLL
        for (uint32_t step = 0; step < kSteps; step++)
            ptx::cp_async16_stream(mine + step * ASSAY_CUDA_W4_STEP_BYTES + ptx::lane() * 16,
                                   from + step * ASSAY_CUDA_W4_STEP_BYTES);
        if (folds(s, t)) {
            w4_copy_groups<ASSAY_CUDA_W4_SCALES_BYTES>(mine + kScalesAt, s.w.scales, s.groups, t);
            if (ZEROS) w4_copy_groups<ASSAY_CUDA_W4_ZEROS_BYTES>(mine + kZerosAt, s.w.zeros, s.groups, t);
        }
    }

    ASSAY_DEVICE void multiply(const Source &s, uint32_t t, uint32_t stage) {
        const uint8_t *const a = ptx::shared() + stage * kStageBytes;
        const uint8_t *const mine = a + kABytes + ptx::warp() * kWarpBytes;
        const uint32_t row = ptx::lane() % 16, half = ptx::lane() / 16;
        const uint32_t steps_a_group = kSteps >> ptx::popc(s.groups.per_tile - 1), group = s.groups.first_of(t);
        const bool whole = folds(s, t);
        ASSAY_UNROLL
        for (uint32_t step = 0; step < kSteps; step++) {
            u32x4 words = {0, 0, 0, 0};
            if (s.inside) words = ptx::lds128(mine + step * ASSAY_CUDA_W4_STEP_BYTES + ptx::lane() * 16);
            const uint32_t word[4] = {words.x, words.y, words.z, words.w};
            ASSAY_UNROLL
            for (int m = 0; m < M_TILES; m++) {
                uint32_t left[4];
                ptx::ldmatrix_x4(left, a + (16 * m + row) * 128 + (((2 * step + half) ^ (row & 7)) * 16));
                ASSAY_UNROLL
                for (int j = 0; j < 4; j++) {
                    const uint32_t right[2] = {word[j] & 0x0F0F0F0Fu, word[j] >> 4 & 0x0F0F0F0Fu};
                    ptx::mma_s8(sum[m][j], left, right);
                }
            }
            if (((step + 1) & (steps_a_group - 1)) == 0 && (s.groups.per_tile > 1 || whole)) {
                const uint32_t slot = (step + 1) * s.groups.per_tile / kSteps - 1;
                if (group + slot < s.groups.count) fold(s, mine, group + slot, slot);
            }
        }
    }

    ASSAY_DEVICE void fold(const Source &s, const uint8_t *mine, uint32_t group, uint32_t slot) {
        u32x4 words = {0, 0, 0, 0};
        u32x2 zeros = {0x08080808u, 0x08080808u};   // of even columns, of odd ones; a byte a j
        if (s.inside) {
            words = ptx::lds128(mine + kScalesAt + slot * ASSAY_CUDA_W4_SCALES_BYTES + ptx::lane() % 4 * 16);
            if (ZEROS) zeros = ptx::lds64(mine + kZerosAt + slot * ASSAY_CUDA_W4_ZEROS_BYTES + ptx::lane() % 4 * 8);
        }
        const uint32_t pair[4] = {words.x, words.y, words.z, words.w};
        ASSAY_UNROLL
        for (int i = 0; i < 2 * M_TILES; i++) {
            u32x2 of_row = {0, 0};
            if (s.mine[i] != kNoRow)
                of_row = ptx::ldg64(s.a_groups + static_cast<uint64_t>(s.mine[i]) * s.groups.count + group);
            const float s_a = ptx::uint_as_float(of_row.x);
            // When K is one group and cut, its zero point is taken off once, from the first piece.
            const bool later = s.groups.mask == W4Groups<kBlockK>::kOne && s.first > 0;
            const int32_t codes = later ? 0 : static_cast<int32_t>(of_row.y);
            ASSAY_UNROLL
            for (int j = 0; j < 4; j++)
                ASSAY_UNROLL
                for (int e = 0; e < 2; e++) {
                    const float s_w = ptx::half_to_float(static_cast<uint16_t>(e ? pair[j] >> 16 : pair[j]));
                    const int32_t zero = static_cast<int32_t>((e ? zeros.y : zeros.x) >> (8 * j) & 15);
                    const int element = 2 * (i % 2) + e;
                    const float exact = static_cast<float>(sum[i / 2][j][element] - zero * codes);
                    f[i / 2][j][element] = ptx::fma_rn(exact, ptx::mul_rn(s_w, s_a), f[i / 2][j][element]);
                }
        }
        w4_clear(sum);
    }
};

}  // namespace assay

#endif

// w4a16 on Hopper for many rows: C[M,N] = A[M,K] W[N,K]^T by warpgroup products, W in registers, A in shared memory.
//
// The product computes C^T: 64 columns of W are the rows of a warpgroup product, kBlockM rows of A its columns. So the weights, which
// must pass through registers to become 16-bit numbers, are the operand that registers may hold; and the order in which they are
// packed for mma.sync (w4_layout.h) is the one needed here, a lane's words 2h and 2h + 1 being rows l / 4 and l / 4 + 8 of
// product h. Two warpgroups of 128 columns each; while one expands weights, the other's products run. A third brings stages of
// 128 k by bulk copies. A was brought into tiles of 64 k, swizzled as products want them, by a16_tiles before.
//
// Numbers as in w4_tile.cuh: integers in the product, f = fma(p, scale, f) a group (or 128 k of a larger one), in order.
#ifndef ASSAY_W4A16_SM90A_CUH
#define ASSAY_W4A16_SM90A_CUH

#include "ptx_sm90a.cuh"
#include "w4_split.cuh"
#include "w4_tile.cuh"

namespace assay {

// A to [row block][k / 64][kBlockM rows][128 bytes]: 16-byte piece p of row r at p ^ r % 8; zeros past M and K. A thread a piece.
ASSAY_DEVICE void a16_tiles(const assay_a16_tiles_args &args) {
    const uint32_t k = static_cast<uint32_t>(args.k), block_m = static_cast<uint32_t>(args.block_m);
    const uint32_t k_tiles = ceil_div<uint32_t>(k, ASSAY_CUDA_W4_PAD) * (ASSAY_CUDA_W4_PAD / 64);
    const uint32_t row_blocks = ceil_div(static_cast<uint32_t>(args.m), block_m);
    const uint64_t piece = static_cast<uint64_t>(ptx::bid_x()) * ptx::block_threads() + ptx::tid();
    if (piece >= static_cast<uint64_t>(row_blocks) * k_tiles * block_m * 8) return;
    const uint32_t column = static_cast<uint32_t>(piece % 8), r = static_cast<uint32_t>(piece / 8 % block_m);
    const uint64_t tile = piece / 8 / block_m;
    const uint32_t t = static_cast<uint32_t>(tile % k_tiles), row = static_cast<uint32_t>(tile / k_tiles) * block_m + r;
    const uint32_t at = 64 * t + 8 * column;
    uint32_t v[4] = {0, 0, 0, 0};
    if (row < static_cast<uint32_t>(args.m)) {
        const uint8_t *const from = static_cast<const uint8_t *>(args.a) + 2 * (static_cast<int64_t>(row) * args.lda + at);
        if (args.aligned) {
            if (at < k) {
                const u32x4 words = ptx::ldg128(from);
                v[0] = words.x, v[1] = words.y, v[2] = words.z, v[3] = words.w;
            }
        } else {
            ASSAY_UNROLL
            for (uint32_t i = 0; i < 8; i++)
                if (at + i < k) v[i / 2] |= ptx::ldg16(from + 2 * i) << (16 * (i % 2));
        }
    }
    ptx::st(static_cast<uint8_t *>(args.tiles) + tile * block_m * 128 + r * 128 + (column ^ (r % 8)) * 16,
            u32x4{v[0], v[1], v[2], v[3]});
}

template <class Format, int BLOCK_M>
struct Wgmma;
template <int BLOCK_M>
struct Wgmma<Float16, BLOCK_M> {
    ASSAY_DEVICE static void run(float (&d)[BLOCK_M / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
        ptx::wgmma_f16(d, a, b, accumulate);
    }
};
template <int BLOCK_M>
struct Wgmma<Bfloat16, BLOCK_M> {
    ASSAY_DEVICE static void run(float (&d)[BLOCK_M / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
        ptx::wgmma_bf16(d, a, b, accumulate);
    }
};

template <class Format, int BLOCK_M, bool ZEROS>
struct W4A16Hopper {
    static constexpr uint32_t kStages = 4, kConsumers = 256, kThreads = kConsumers + 128;
    static constexpr uint32_t kBlockM = BLOCK_M, kBlockN = 256, kBlockK = 128, kTiles = kBlockN / ASSAY_CUDA_W4_TILE;
    static constexpr uint32_t kSteps = kBlockK / ASSAY_CUDA_W4_STEP;
    // A stage: A's two tiles of 64 k, then of each 32 columns weights, scales, zeros.
    static constexpr uint32_t kHalfBytes = kBlockM * 128, kABytes = 2 * kHalfBytes;
    static constexpr uint32_t kWeightBytes = kSteps * ASSAY_CUDA_W4_STEP_BYTES;
    static constexpr uint32_t kScalesAt = kABytes + kTiles * kWeightBytes;
    static constexpr uint32_t kTileScales = kSteps * ASSAY_CUDA_W4_SCALES_BYTES, kTileZeros = kSteps * ASSAY_CUDA_W4_ZEROS_BYTES;
    static constexpr uint32_t kZerosAt = kScalesAt + kTiles * kTileScales;
    static constexpr uint32_t kStageBytes = kZerosAt + (ZEROS ? kTiles * kTileZeros : 0);
    static constexpr uint32_t kSharedBytes = kStages * kStageBytes + 2 * kStages * 8;
    static_assert(kStageBytes % 1024 == 0, "swizzled tiles begin at multiples of 1024");

    const assay_w4_gemm_args &args;
    const uint32_t n, k, k_tiles;
    const W4Groups<kBlockK> groups;

    ASSAY_DEVICE explicit W4A16Hopper(const assay_w4_gemm_args &of)
        : args(of), n(static_cast<uint32_t>(of.w.n)), k(static_cast<uint32_t>(of.w.k)), k_tiles(ceil_div(k, kBlockK)),
          groups(k, static_cast<uint32_t>(of.w.group_size)) {}

    ASSAY_DEVICE void run() {
        if (ptx::tid() == 0) {
            for (uint32_t s = 0; s < kStages; s++) {
                ptx::mbarrier_init(full(s), 1);
                ptx::mbarrier_init(empty(s), kConsumers / 32);
            }
            ptx::mbarrier_fence_init();
        }
        ptx::sync();
        // 384 threads may have 168 registers each; the one that copies needs few, those that compute need more.
        if (ptx::tid() >= kConsumers) {
            ptx::registers_fewer<24>();
            if (ptx::tid() == kConsumers) produce();
        } else {
            ptx::registers_more<240>();
            consume();
        }
    }

private:
    ASSAY_DEVICE static uint64_t *full(uint32_t stage) {
        return reinterpret_cast<uint64_t *>(ptx::shared() + kStages * kStageBytes) + stage;
    }
    ASSAY_DEVICE static uint64_t *empty(uint32_t stage) { return full(stage) + kStages; }
    ASSAY_DEVICE uint32_t groups_in(uint32_t t) const { return min_of(groups.per_tile, groups.count - groups.first_of(t)); }

    ASSAY_DEVICE void produce() const {
        const uint32_t first_tile = ptx::bid_x() * kTiles;
        const uint32_t tiles = min_of(kTiles, ceil_div<uint32_t>(n, ASSAY_CUDA_W4_TILE) - first_tile);
        const uint8_t *const a =
            static_cast<const uint8_t *>(args.a) + static_cast<uint64_t>(ptx::bid_y()) * k_tiles * kABytes;
        uint32_t stage = 0, parity = 0;
        for (uint32_t t = 0; t < k_tiles; t++) {
            ptx::mbarrier_wait(empty(stage), parity ^ 1);
            uint8_t *const to = ptx::shared() + stage * kStageBytes;
            const uint32_t scale_bytes = groups_in(t) * ASSAY_CUDA_W4_SCALES_BYTES;
            const uint32_t zero_bytes = ZEROS ? groups_in(t) * ASSAY_CUDA_W4_ZEROS_BYTES : 0;
            ptx::mbarrier_arrive_expect(full(stage), kABytes + tiles * (kWeightBytes + scale_bytes + zero_bytes));
            ptx::bulk_load(to, a + static_cast<uint64_t>(t) * kABytes, kABytes, full(stage));
            for (uint32_t i = 0; i < tiles; i++) {
                const W4Columns w(args.w.data, n, k, groups.count, first_tile + i);
                const uint64_t group = groups.first_of(t);
                ptx::bulk_load_stream(to + kABytes + i * kWeightBytes, w.weights + static_cast<uint64_t>(t) * kWeightBytes,
                                      kWeightBytes, full(stage));
                ptx::bulk_load(to + kScalesAt + i * kTileScales, w.scales + group * ASSAY_CUDA_W4_SCALES_BYTES, scale_bytes,
                               full(stage));
                if (ZEROS)
                    ptx::bulk_load(to + kZerosAt + i * kTileZeros, w.zeros + group * ASSAY_CUDA_W4_ZEROS_BYTES, zero_bytes,
                                   full(stage));
            }
            advance(stage, parity);
        }
    }

    ASSAY_DEVICE static void advance(uint32_t &stage, uint32_t &parity) {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }

    ASSAY_DEVICE void consume() {
        float f[2][kBlockM / 2];   // f[h][4 i + 2 r + e]: column 16 h + 8 r + lane / 4 of the warp's 32, row 8 i + 2 (lane % 4) + e
        ASSAY_UNROLL
        for (int h = 0; h < 2; h++)
            ASSAY_UNROLL
            for (uint32_t i = 0; i < kBlockM / 2; i++) f[h][i] = 0;
        uint32_t stage = 0, parity = 0;
        ASSAY_NO_UNROLL
        for (uint32_t t = 0; t < k_tiles; t++) {
            ptx::mbarrier_wait(full(stage), parity);
            if (groups.per_tile == 1) {
                multiply<kSteps>(f, stage, 0, 0);
            } else if (groups.per_tile == 2) {
                for (uint32_t g = 0; g < groups_in(t); g++) multiply<2>(f, stage, 2 * g, g);
            } else {
                for (uint32_t g = 0; g < groups_in(t); g++) multiply<1>(f, stage, g, g);
            }
            ptx::sync_warp();
            if (ptx::lane() == 0) ptx::mbarrier_arrive(empty(stage));
            advance(stage, parity);
        }
        store(f);
    }

    // STEPS of 32 k from `first` within the stage, all of one group.
    template <uint32_t STEPS>
    ASSAY_DEVICE void multiply(float (&f)[2][kBlockM / 2], uint32_t stage, uint32_t first, uint32_t slot) const {
        const uint8_t *const a = ptx::shared() + stage * kStageBytes;
        const uint8_t *const weights = a + kABytes + ptx::warp() * kWeightBytes + ptx::lane() * 16;
        const uint32_t g = ptx::lane() / 4;
        uint32_t zeros = 0x08080808u;
        if (ZEROS) zeros = ptx::lds32(a + kZerosAt + ptx::warp() * kTileZeros + slot * ASSAY_CUDA_W4_ZEROS_BYTES + 4 * g);
        const u32x4 scales =
            ptx::lds128(a + kScalesAt + ptx::warp() * kTileScales + slot * ASSAY_CUDA_W4_SCALES_BYTES + g / 2 * 16);
        const uint32_t pair[4] = {scales.x, scales.y, scales.z, scales.w};
        ASSAY_UNROLL
        for (uint32_t h = 0; h < 2; h++) {
            float p[kBlockM / 2];
            Format upper, lower;   // of rows lane / 4 and + 8 of the product
            upper.set_zero(ZEROS ? zeros >> (16 * h) & 15 : 8);
            lower.set_zero(ZEROS ? zeros >> (16 * h + 8) & 15 : 8);
            // 64 k at a time: their weights fill sixteen registers, which are free again once the products are done.
            constexpr uint32_t kAtOnce = STEPS < 2 ? STEPS : 2;
            ASSAY_UNROLL
            for (uint32_t from = 0; from < STEPS; from += kAtOnce) {
                uint32_t left[2 * kAtOnce][4];
                ASSAY_UNROLL
                for (uint32_t s = 0; s < kAtOnce; s++) {
                    const u32x4 words = ptx::lds128(weights + (first + from + s) * ASSAY_CUDA_W4_STEP_BYTES);
                    uint32_t up[4], low[4];
                    upper.expand(up, h ? words.z : words.x);
                    lower.expand(low, h ? words.w : words.y);
                    ASSAY_UNROLL
                    for (uint32_t i = 0; i < 2; i++) {
                        left[2 * s + i][0] = up[2 * i];
                        left[2 * s + i][1] = low[2 * i];
                        left[2 * s + i][2] = up[2 * i + 1];
                        left[2 * s + i][3] = low[2 * i + 1];
                    }
                }
                ptx::wgmma_fence();
                ASSAY_UNROLL
                for (uint32_t i = 0; i < 2 * kAtOnce; i++) {
                    const uint32_t at = 2 * (first + from) + i;   // of the stage's eight k16
                    Wgmma<Format, kBlockM>::run(p, left[i], ptx::wgmma_descriptor(a + at / 4 * kHalfBytes + at % 4 * 32),
                                                from + i > 0);
                }
                ptx::wgmma_commit();
                ptx::wgmma_wait<0>();
            }
            const float above = ptx::half_to_float(static_cast<uint16_t>(pair[2 * h] >> (16 * (g & 1))));
            const float below = ptx::half_to_float(static_cast<uint16_t>(pair[2 * h + 1] >> (16 * (g & 1))));
            ASSAY_UNROLL
            for (uint32_t i = 0; i < kBlockM / 2; i++) f[h][i] = ptx::fma_rn(p[i], i & 2 ? below : above, f[h][i]);
        }
    }

    ASSAY_DEVICE void store(const float (&f)[2][kBlockM / 2]) const {
        const uint32_t first = ptx::bid_x() * kBlockN + ptx::warp() * ASSAY_CUDA_W4_TILE + ptx::lane() / 4;
        ASSAY_UNROLL
        for (uint32_t h = 0; h < 2; h++)
            ASSAY_UNROLL
            for (uint32_t i = 0; i < kBlockM / 2; i++) {
                const uint32_t row = ptx::bid_y() * kBlockM + i / 4 * 8 + 2 * (ptx::lane() % 4) + i % 2;
                const uint32_t column = first + 16 * h + 8 * (i / 2 % 2);
                if (row < static_cast<uint32_t>(args.m) && column < n)
                    ptx::st(args.c + static_cast<int64_t>(row) * args.ldc + column, f[h][i]);
            }
    }
};

template <class Tile>
ASSAY_DEVICE void w4a16_sm90a(const assay_w4_gemm_args &args) {
    Tile(args).run();
}

using HopperF16M64 = W4A16Hopper<Float16, 64, false>;
using HopperF16M128 = W4A16Hopper<Float16, 128, false>;
using HopperF16M64Z = W4A16Hopper<Float16, 64, true>;
using HopperF16M128Z = W4A16Hopper<Float16, 128, true>;
using HopperBF16M64 = W4A16Hopper<Bfloat16, 64, false>;
using HopperBF16M128 = W4A16Hopper<Bfloat16, 128, false>;
using HopperBF16M64Z = W4A16Hopper<Bfloat16, 64, true>;
using HopperBF16M128Z = W4A16Hopper<Bfloat16, 128, true>;

}  // namespace assay

#endif

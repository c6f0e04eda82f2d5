// w4a16 for at most 8 rows, by shape of its own: a block has 32 columns and cuts K among its eight warps.
//
// No shared memory for operands and no barrier until the end: weights go from memory to registers (16 bytes a lane are a step's B
// fragments, four steps ahead), A's few rows are read through L1. Sums as in w4_tile.cuh within a warp's share of K, which begins and
// ends at groups; the shares are added in the order of K. Fewer bytes and no workspace, so that small matrices cost less than
// by tiles; a result's bits differ from theirs, hence no call mixes the two.
#ifndef ASSAY_W4A16_GEMV_CUH
#define ASSAY_W4A16_GEMV_CUH

#include "w4_split.cuh"
#include "w4_tile.cuh"

namespace assay {

template <class Format, bool ZEROS>
struct W4A16Gemv {
    static constexpr uint32_t kWarps = 8, kRows = 8, kAhead = 4;
    static constexpr uint32_t kSharedBytes = kWarps * kRows * ASSAY_CUDA_W4_TILE * 4;

    const assay_w4_gemm_args &args;
    const uint32_t k;
    const W4Groups<ASSAY_CUDA_W4_STEP> groups;
    const W4Columns w;
    float f[1][4][4], p[1][4][4];   // rows lane / 4 and + 8, of which the latter are none
    Format format[4];

    ASSAY_DEVICE explicit W4A16Gemv(const assay_w4_gemm_args &of)
        : args(of), k(static_cast<uint32_t>(of.w.k)), groups(k, static_cast<uint32_t>(of.w.group_size)),
          w(of.w.data, static_cast<uint32_t>(of.w.n), k, groups.count, ptx::bid_x()) {}

    ASSAY_DEVICE void run() {
        // Shares of whole groups; of whole steps when there is one group.
        const uint32_t steps = ceil_div<uint32_t>(k, ASSAY_CUDA_W4_STEP);
        const uint32_t unit = groups.count == 1 ? 1 : groups.mask + 1;
        const uint32_t share = ceil_div(ceil_div(steps, unit), kWarps) * unit;
        const uint32_t first = min_of(ptx::warp() * share, steps), last = min_of(first + share, steps);
        const uint8_t *const from = w.weights + ptx::lane() * 16;
        w4_clear(f);
        w4_clear(p);
        u32x4 ahead[kAhead];
        ASSAY_UNROLL
        for (uint32_t i = 0; i < kAhead; i++) {
            ahead[i] = u32x4{0, 0, 0, 0};
            if (first + i < last) ahead[i] = ptx::ld128_stream(from + (first + i) * ASSAY_CUDA_W4_STEP_BYTES);
        }
        ASSAY_NO_UNROLL
        for (uint32_t step = first; step < last; step += kAhead) {
            ASSAY_UNROLL
            for (uint32_t i = 0; i < kAhead; i++) {
                if (step + i >= last) break;
                if (step + i == first || groups.begins(step + i)) enter(step + i);
                multiply(ahead[i], step + i);
                if (step + i + kAhead < last)
                    ahead[i] = ptx::ld128_stream(from + (step + i + kAhead) * ASSAY_CUDA_W4_STEP_BYTES);
                if (step + i + 1 == last || groups.ends(step + i)) fold(step + i);
            }
        }
        sum_shares();
    }

private:
    ASSAY_DEVICE void enter(uint32_t step) {
        uint32_t zeros = 0x08080808u;
        if (ZEROS)
            zeros = ptx::ldg32(w.zeros + static_cast<uint64_t>(groups.first_of(step)) * ASSAY_CUDA_W4_ZEROS_BYTES +
                               ptx::lane() / 4 * 4);
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++) format[j].set_zero(ZEROS ? zeros >> (8 * j) & 15 : 8);
    }

    // Two neighbouring values of the lane's row.
    ASSAY_DEVICE uint32_t pair(uint32_t at) const {
        const uint32_t row = ptx::lane() / 4;
        if (row >= static_cast<uint32_t>(args.m) || at >= k) return 0;
        const uint8_t *const from = static_cast<const uint8_t *>(args.a) + 2 * (row * args.lda + at);
        if (args.aligned) return ptx::ldg32(from);
        return ptx::ldg16(from) | (at + 1 < k ? ptx::ldg16(from + 2) << 16 : 0);
    }

    ASSAY_DEVICE void multiply(const u32x4 &words, uint32_t step) {
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
        const uint32_t at = step * ASSAY_CUDA_W4_STEP + 2 * (ptx::lane() % 4);
        const uint32_t left[2][4] = {{pair(at), 0, pair(at + 8), 0}, {pair(at + 16), 0, pair(at + 24), 0}};
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++) {
            uint32_t b[4];
            format[j].expand(b, word[j]);
            ASSAY_UNROLL
            for (int i = 0; i < 2; i++) {
                const uint32_t right[2] = {b[2 * i], b[2 * i + 1]};
                Format::mma(p[0][j], left[i], right);
            }
        }
    }

    ASSAY_DEVICE void fold(uint32_t step) {
        const u32x4 words = ptx::ldg128(w.scales + static_cast<uint64_t>(groups.first_of(step)) * ASSAY_CUDA_W4_SCALES_BYTES +
                                        ptx::lane() % 4 * 16);
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++)
            ASSAY_UNROLL
            for (int e = 0; e < 2; e++) {
                const float scale = ptx::half_to_float(static_cast<uint16_t>(e ? pairs[j] >> 16 : pairs[j]));
                f[0][j][e] = ptx::fma_rn(p[0][j][e], scale, f[0][j][e]);
            }
        w4_clear(p);
    }

    ASSAY_DEVICE void sum_shares() {
        float *const sums = reinterpret_cast<float *>(ptx::shared());   // [warp][row][column]
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++) {
            const uint32_t at = (ptx::warp() * kRows + ptx::lane() / 4) * ASSAY_CUDA_W4_TILE + 8 * j + 2 * (ptx::lane() % 4);
            ptx::sts(sums + at, u32x2{ptx::float_as_uint(f[0][j][0]), ptx::float_as_uint(f[0][j][1])});
        }
        ptx::sync();
        float sum = 0;
        ASSAY_UNROLL
        for (uint32_t i = 0; i < kWarps; i++)
            sum = ptx::add_rn(sum, ptx::uint_as_float(ptx::lds32(sums + i * kRows * ASSAY_CUDA_W4_TILE + ptx::tid())));
        const uint32_t row = ptx::tid() / ASSAY_CUDA_W4_TILE;
        const uint32_t column = ptx::bid_x() * ASSAY_CUDA_W4_TILE + ptx::tid() % ASSAY_CUDA_W4_TILE;
        if (row < static_cast<uint32_t>(args.m) && column < static_cast<uint32_t>(args.w.n))
            ptx::st(args.c + row * args.ldc + column, sum);
    }
};

template <class Gemv>
ASSAY_DEVICE void w4a16_gemv(const assay_w4_gemm_args &args) {
    Gemv(args).run();
}

using W4A16F16Gemv = W4A16Gemv<Float16, false>;
using W4A16F16GemvZ = W4A16Gemv<Float16, true>;
using W4A16BF16Gemv = W4A16Gemv<Bfloat16, false>;
using W4A16BF16GemvZ = W4A16Gemv<Bfloat16, true>;

}  // namespace assay

#endif

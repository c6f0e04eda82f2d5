// w4a16: C[M,N] = A[M,K] W[N,K]^T, A float16 or bfloat16, W INT4, sums float32.
#ifndef ASSAY_W4A16_GEMM_CUH
#define ASSAY_W4A16_GEMM_CUH

#include "w4_split.cuh"
#include "w4_tile.cuh"

namespace assay {

template <class Tile>
ASSAY_DEVICE void w4a16_gemm(const assay_w4_gemm_args &args) {
    const uint32_t n = static_cast<uint32_t>(args.w.n), k = static_cast<uint32_t>(args.w.k);
    const uint32_t group_size = static_cast<uint32_t>(args.w.group_size);
    const uint32_t column_blocks = ceil_div(n, Tile::kBlockN), k_tiles = ceil_div(k, Tile::kBlockK);
    const uint32_t first_row = ptx::bid_y() * Tile::kBlockM;
    auto rows = [&](uint32_t i) { return first_row + i < static_cast<uint32_t>(args.m) ? first_row + i : kNoRow; };
    Tile tile;
    W4Stripe stripe(column_blocks, k_tiles, static_cast<uint32_t>(args.stripe));
    W4Run run;
    while (stripe.next(run)) {
        const uint32_t column = run.column * Tile::kBlockN + ptx::warp() * ASSAY_CUDA_W4_TILE;
        const bool inside = column < n;
        const W4Columns w(args.w.data, n, k, W4Groups<Tile::kBlockK>(k, group_size).count,
                          inside ? column / ASSAY_CUDA_W4_TILE : 0);
        tile.run(args.a, args.lda, args.aligned != 0, rows, k, group_size, w, inside, run.first, run.last);
        if (w4_reduce(tile.f, args, run, column_blocks, k_tiles)) w4_store_tile(args, tile.f, first_row, column);
    }
}

using W4A16F16M16 = W4A16Tile<Float16, 1, false>;
using W4A16F16M32 = W4A16Tile<Float16, 2, false>;
using W4A16F16M64 = W4A16Tile<Float16, 4, false>;
using W4A16F16M16Z = W4A16Tile<Float16, 1, true>;
using W4A16F16M32Z = W4A16Tile<Float16, 2, true>;
using W4A16F16M64Z = W4A16Tile<Float16, 4, true>;
using W4A16BF16M16 = W4A16Tile<Bfloat16, 1, false>;
using W4A16BF16M32 = W4A16Tile<Bfloat16, 2, false>;
using W4A16BF16M64 = W4A16Tile<Bfloat16, 4, false>;
using W4A16BF16M16Z = W4A16Tile<Bfloat16, 1, true>;
using W4A16BF16M32Z = W4A16Tile<Bfloat16, 2, true>;
using W4A16BF16M64Z = W4A16Tile<Bfloat16, 4, true>;

}  // namespace assay

#endif

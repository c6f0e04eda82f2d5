// w4a8: C[M,N] = A[M,K] W[N,K]^T with A's int8 codes and W INT4, sums of groups exact, sums over groups float32.
#ifndef ASSAY_W4A8_GEMM_CUH
#define ASSAY_W4A8_GEMM_CUH

#include "a8_quantize.cuh"
#include "w4_split.cuh"
#include "w4a8_tile.cuh"

namespace assay {

template <class Tile>
ASSAY_DEVICE void w4a8_gemm(const assay_w4_gemm_args &args) {
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
        tile.run(args.a, static_cast<const assay_cuda_a8_group *>(args.a_groups), rows, k, group_size, w, inside, run.first,
                 run.last);
        if (w4_reduce(tile.f, args, run, column_blocks, k_tiles)) w4_store_tile(args, tile.f, first_row, column);
    }
}

using W4A8M16 = W4A8Tile<1, false>;
using W4A8M32 = W4A8Tile<2, false>;
using W4A8M64 = W4A8Tile<4, false>;
using W4A8M16Z = W4A8Tile<1, true>;
using W4A8M32Z = W4A8Tile<2, true>;
using W4A8M64Z = W4A8Tile<4, true>;

}  // namespace assay

#endif

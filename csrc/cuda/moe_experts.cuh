// The two GEMMs of an expert layer over slots sorted by expert (moe_align.cuh): a block is some rows of one expert by 256 columns,
// by the tiles of the dense INT4 GEMMs. Which blocks have work is read on the device: the grid is for the most there can be, its
// rows fastest, so that the row blocks of an expert share its weights in L2.
//
//   gate_up  rows are tokens, found through the slots; a 32-column tile holds 16 gates and their ups 16 columns on, which one
//            warp has both of: bias, clamp and activation follow at once. Hidden units go to row `slot` of the output
//   down     rows are slots; outputs go to row `slot`, to be weighed and summed by moe_combine.cuh
//
// Rows by slot and not by place: nothing is stored for padding. splits > 1 cuts K: each cut leaves its float32 sums by slot,
// and the last of a tile to arrive adds them in the order of K, so that the result does not depend on who was last.
#ifndef ASSAY_MOE_EXPERTS_CUH
#define ASSAY_MOE_EXPERTS_CUH

#include "assay_cuda.h"
#include "ptx.cuh"

#include "../cpu/activations.h"
#include "w4a16_gemm.cuh"
#include "w4a8_gemm.cuh"

namespace assay {
namespace experts {

// What differs between activations of 16 bits and int8 codes: how a tile runs, and the type of hidden units.
template <class Tile>
struct Kind;

template <class Format>
struct Kind16 {
    enum { HIDDEN_BYTES = 2 };
    template <class Tile, class Rows>
    ASSAY_DEVICE static void run(Tile &tile, const assay_cuda_experts_args &a, const Rows &rows, const W4Columns &w, bool inside,
                                 uint32_t first, uint32_t last) {
        tile.run(a.a, a.lda, a.aligned != 0, rows, static_cast<uint32_t>(a.w.k), static_cast<uint32_t>(a.w.group_size), w, inside,
                 first, last);
    }
};
template <int M_TILES, bool ZEROS>
struct Kind<W4A16Tile<Float16, M_TILES, ZEROS>> : Kind16<Float16> {
    ASSAY_DEVICE static void store(uint8_t *to, float v) { ptx::st(to, ptx::float_to_half(v)); }
    ASSAY_DEVICE static void store_pair(uint8_t *to, float v0, float v1) { ptx::st(to, ptx::pack_half2(v0, v1)); }
};
template <int M_TILES, bool ZEROS>
struct Kind<W4A16Tile<Bfloat16, M_TILES, ZEROS>> : Kind16<Bfloat16> {
    ASSAY_DEVICE static void store(uint8_t *to, float v) { ptx::st(to, ptx::float_to_bf16(v)); }
    ASSAY_DEVICE static void store_pair(uint8_t *to, float v0, float v1) { ptx::st(to, ptx::pack_bf162(v0, v1)); }
};

ASSAY_DEVICE u32x2 pair_of(float v0, float v1) { return {ptx::float_as_uint(v0), ptx::float_as_uint(v1)}; }

// Float32 hidden units, to be quantised.
template <int M_TILES, bool ZEROS>
struct Kind<W4A8Tile<M_TILES, ZEROS>> {
    enum { HIDDEN_BYTES = 4 };
    template <class Tile, class Rows>
    ASSAY_DEVICE static void run(Tile &tile, const assay_cuda_experts_args &a, const Rows &rows, const W4Columns &w, bool inside,
                                 uint32_t first, uint32_t last) {
        tile.run(a.a, static_cast<const assay_cuda_a8_group *>(a.a_groups), rows, static_cast<uint32_t>(a.w.k),
                 static_cast<uint32_t>(a.w.group_size), w, inside, first, last);
    }
    ASSAY_DEVICE static void store(uint8_t *to, float v) { ptx::st(to, v); }
    ASSAY_DEVICE static void store_pair(uint8_t *to, float v0, float v1) { ptx::st(to, pair_of(v0, v1)); }
};

// The slot at a place of the sort, or kNoRow for padding.
ASSAY_DEVICE uint32_t slot_at(const assay_cuda_experts_args &a, uint32_t place) {
    const uint32_t slot = ptx::ldg32(a.sorted_token_ids + place);
    return slot < static_cast<uint32_t>(a.slots) ? slot : kNoRow;
}

// Calls use(m, half, slot) for the lane's rows 16 m + 8 half + lane / 4 that are slots.
template <int M_TILES, class Use>
ASSAY_DEVICE void each_row(const assay_cuda_experts_args &a, uint32_t first_row, Use use) {
    ASSAY_UNROLL
    for (int i = 0; i < 2 * M_TILES; i++) {
        const uint32_t slot = slot_at(a, first_row + 8 * i + ptx::lane() / 4);
        if (slot != kNoRow) use(i / 2, i % 2, slot);
    }
}

// Sums of all cuts of K into f; false for the block that is not the last.
template <int M_TILES>
ASSAY_DEVICE bool sum_cuts(const assay_cuda_experts_args &a, uint32_t first_row, uint32_t column, bool inside,
                           float (&f)[M_TILES][4][4]) {
    const uint32_t splits = ptx::grid_z();
    if (splits == 1) return true;
    const uint64_t width = ceil_div<uint32_t>(static_cast<uint32_t>(a.w.n), ASSAY_CUDA_W4_TILE) * ASSAY_CUDA_W4_TILE;
    const auto part = [&](uint32_t z, uint32_t slot, int j) {
        return a.partials + (static_cast<uint64_t>(z) * a.slots + slot) * width + column + 8 * j + 2 * (ptx::lane() % 4);
    };
    if (inside)
        each_row<M_TILES>(a, first_row, [&](int m, int half, uint32_t slot) {
            ASSAY_UNROLL
            for (int j = 0; j < 4; j++) ptx::st(part(ptx::bid_z(), slot, j), pair_of(f[m][j][2 * half], f[m][j][2 * half + 1]));
        });
    ptx::fence_device();
    ptx::sync();
    uint32_t *const told = reinterpret_cast<uint32_t *>(ptx::shared());
    if (!ptx::tid()) {
        const uint32_t before = ptx::atomic_add_acq_rel(a.arrivals + ptx::bid_x() * ptx::grid_y() + ptx::bid_y(), 1);
        ptx::sts(told, before == splits - 1 ? 1u : 0u);
    }
    ptx::sync();
    const bool last = ptx::lds32(told) != 0;
    ptx::sync();                       // shared memory is free again
    if (!last) return false;
    ptx::fence_device();
    if (inside)
        each_row<M_TILES>(a, first_row, [&](int m, int half, uint32_t slot) {
            ASSAY_UNROLL
            for (int j = 0; j < 4; j++) {
                float v0 = 0, v1 = 0;
                for (uint32_t z = 0; z < splits; z++) {
                    const uint64_t both = ptx::ldcg(reinterpret_cast<const uint64_t *>(part(z, slot, j)));
                    v0 = ptx::add_rn(v0, ptx::uint_as_float(static_cast<uint32_t>(both)));
                    v1 = ptx::add_rn(v1, ptx::uint_as_float(static_cast<uint32_t>(both >> 32)));
                }
                f[m][j][2 * half] = v0;
                f[m][j][2 * half + 1] = v1;
            }
        });
    return true;
}

// The warp's 32 columns to hidden units. By way of shared memory, 8-column pieces swizzled by row: then a lane takes two
// neighbouring units of a row at a time, in a loop short enough not to be unrolled, and stores are of whole sectors.
template <class K, int M_TILES>
ASSAY_DEVICE void activate_tile(const assay_cuda_experts_args &a, uint32_t first_row, uint32_t column, int64_t expert,
                                const float (&f)[M_TILES][4][4]) {
    constexpr uint32_t kRows = 16 * M_TILES;
    float *const mine = reinterpret_cast<float *>(ptx::shared()) + ptx::warp() * (kRows * ASSAY_CUDA_W4_TILE);
    const auto at = [&](uint32_t row, uint32_t c) { return mine + row * ASSAY_CUDA_W4_TILE + (c ^ 8 * (row & 3)); };
    ASSAY_UNROLL
    for (int i = 0; i < 2 * M_TILES; i++)
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++)
            ptx::sts(at(8 * i + ptx::lane() / 4, 8 * j + 2 * (ptx::lane() % 4)),
                     pair_of(f[i / 2][j][2 * (i % 2)], f[i / 2][j][2 * (i % 2) + 1]));
    ptx::sync_warp();

    const uint32_t lanes_a_row = a.gated ? 8 : 16, c = 2 * (ptx::lane() % lanes_a_row), n = static_cast<uint32_t>(a.w.n);
    const uint32_t unit = (a.gated ? column / 2 : column) + c, units = static_cast<uint32_t>(a.intermediate);
    const auto bias_of = [&](uint32_t c) { return a.bias && c < n ? ptx::ldg_float(a.bias + expert * n + c) : 0.0f; };
    const float bias[4] = {bias_of(column + c), bias_of(column + c + 1), a.gated ? bias_of(column + c + 16) : 0,
                           a.gated ? bias_of(column + c + 17) : 0};
    ASSAY_NO_UNROLL
    for (uint32_t row = ptx::lane() / lanes_a_row; row < kRows; row += 32 / lanes_a_row) {
        const uint32_t slot = slot_at(a, first_row + row);
        if (slot == kNoRow || unit >= units) continue;
        const u32x2 first = ptx::lds64(at(row, c)), second = ptx::lds64(at(row, c ^ 16));
        float v[4] = {ptx::uint_as_float(first.x), ptx::uint_as_float(first.y), ptx::uint_as_float(second.x),
                      ptx::uint_as_float(second.y)};
        if (a.bias)
            ASSAY_UNROLL
            for (int i = 0; i < 4; i++) v[i] = ptx::add_rn(v[i], bias[i]);
        float h[2];
        ASSAY_UNROLL
        for (int e = 0; e < 2; e++)
            h[e] = a.gated ? assay_gated_unit(a.activation, a.alpha, a.limit, v[e], v[2 + e])
                           : assay_activation_of(a.activation, a.alpha, assay_at_most(v[e], a.limit));
        uint8_t *to = static_cast<uint8_t *>(a.out) + (slot * a.ldo + unit) * K::HIDDEN_BYTES;
        if (unit + 1 < units) K::store_pair(to, h[0], h[1]);   // ldo is even
        else K::store(to, h[0]);
    }
}

template <int M_TILES>
ASSAY_DEVICE void store_down(const assay_cuda_experts_args &a, uint32_t first_row, uint32_t column, const float (&f)[M_TILES][4][4]) {
    const uint32_t n = static_cast<uint32_t>(a.w.n);
    each_row<M_TILES>(a, first_row, [&](int m, int half, uint32_t slot) {
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++) {
            const uint32_t c = column + 8 * j + 2 * (ptx::lane() % 4);
            float *to = static_cast<float *>(a.out) + slot * a.ldo + c;
            if (c + 1 < n) ptx::st(to, pair_of(f[m][j][2 * half], f[m][j][2 * half + 1]));   // ldo is even
            else if (c < n) ptx::st(to, f[m][j][2 * half]);
        }
    });
}

template <class Tile>
ASSAY_DEVICE void moe_experts(const assay_cuda_experts_args &a) {
    const uint32_t first_row = ptx::bid_x() * Tile::kBlockM;
    if (first_row >= ptx::ldg32(a.num_tokens_post_padded)) return;
    const int64_t expert = static_cast<int32_t>(ptx::ldg32(a.expert_ids + ptx::bid_x()));
    const uint32_t n = static_cast<uint32_t>(a.w.n), k = static_cast<uint32_t>(a.w.k);
    const uint32_t k_tiles = ceil_div(k, Tile::kBlockK), cut = ceil_div(k_tiles, ptx::grid_z());
    const uint32_t first = min_of(ptx::bid_z() * cut, k_tiles), last = min_of(first + cut, k_tiles);
    const uint32_t column = ptx::bid_y() * Tile::kBlockN + ptx::warp() * ASSAY_CUDA_W4_TILE;
    const bool inside = column < n;
    const W4Columns w(static_cast<const uint8_t *>(a.w.data) + expert * a.expert_bytes, n, k,
                      W4Groups<Tile::kBlockK>(k, static_cast<uint32_t>(a.w.group_size)).count,
                      inside ? column / ASSAY_CUDA_W4_TILE : 0);
    const auto rows = [&](uint32_t i) {
        const uint32_t slot = slot_at(a, first_row + i);
        return slot == kNoRow ? kNoRow : slot / static_cast<uint32_t>(a.slots_a_row);
    };
    Tile tile;
    Kind<Tile>::run(tile, a, rows, w, inside, first, last);
    if (!sum_cuts(a, first_row, column, inside, tile.f) || !inside) return;
    if (a.down) store_down(a, first_row, column, tile.f);
    else activate_tile<Kind<Tile>>(a, first_row, column, expert, tile.f);
}

// Tokens times the weights of their slots, a row a slot: what a layer with weights on its input multiplies.
ASSAY_DEVICE void moe_weigh(const assay_cuda_weigh_args &a) {
    const int64_t slot = ptx::bid_x(), token = slot / a.top_k;
    const float w = ptx::ldg_float(a.topk_weights + slot);
    for (int64_t i = ptx::bid_y() * ptx::block_threads() + ptx::tid(); i < a.n; i += ptx::grid_y() * ptx::block_threads()) {
        float x;
        if (a.dtype == ASSAY_F32) {
            x = ptx::ldg_float(static_cast<const float *>(a.x) + token * a.ldx + i);
        } else {
            const uint16_t half = static_cast<uint16_t>(ptx::ldg16(static_cast<const uint16_t *>(a.x) + token * a.ldx + i));
            x = a.dtype == ASSAY_F16 ? ptx::half_to_float(half) : ptx::bf16_to_float(half);
        }
        const float v = ptx::mul_rn(x, w);
        const int64_t at = slot * a.ldo + i;
        if (a.out_dtype == ASSAY_F32) ptx::st(static_cast<float *>(a.out) + at, v);
        else ptx::st(static_cast<uint16_t *>(a.out) + at, a.out_dtype == ASSAY_F16 ? ptx::float_to_half(v) : ptx::float_to_bf16(v));
    }
}

}  // namespace experts

using experts::moe_experts;
using experts::moe_weigh;

}  // namespace assay

#endif

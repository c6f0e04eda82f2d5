// How blocks share a GEMM of INT4 weights, and how what they share is summed: the same for every row and every M.
//
// Block x takes a stripe of consecutive K tiles, counted through all column blocks. A column block that lies in one stripe is
// stored at once. Of one that is cut, every contributor leaves its float32 sums in the workspace; the last to arrive adds them
// in the order of K. No block waits for another, so that any grid and any order of blocks finishes, and the result depends on
// the stripe alone: not on who was last.
#ifndef ASSAY_W4_SPLIT_CUH
#define ASSAY_W4_SPLIT_CUH

#include "assay_cuda.h"
#include "ptx.cuh"

namespace assay {

// A run of K tiles of one block of columns.
struct W4Run {
    uint32_t column, first, last;   // column block; K tiles
};

struct W4Stripe {
    uint32_t at, end, tiles;        // tiles: of K

    ASSAY_DEVICE W4Stripe(uint32_t column_blocks, uint32_t k_tiles, uint32_t stripe) : tiles(k_tiles) {
        at = min_of(ptx::bid_x() * stripe, column_blocks * k_tiles);
        end = min_of(at + stripe, column_blocks * k_tiles);
    }
    ASSAY_DEVICE bool next(W4Run &run) {
        if (at >= end) return false;
        run.column = at / tiles;
        run.first = at - run.column * tiles;
        run.last = min_of(tiles, run.first + end - at);
        at += run.last - run.first;
        return true;
    }
};

// Adds what other blocks have of this run's columns to f (of 4 M_TILES 4 values a thread). False: another block will
// store them. Ends with all threads together.
template <int M_TILES>
ASSAY_DEVICE bool w4_reduce(float (&f)[M_TILES][4][4], const assay_w4_gemm_args &args, const W4Run &run,
                            uint32_t column_blocks, uint32_t k_tiles) {
    if (run.first == 0 && run.last == k_tiles) return true;
    const uint32_t stripe = static_cast<uint32_t>(args.stripe), threads = ptx::block_threads();
    const uint32_t begin = run.column * k_tiles, end = begin + k_tiles;
    const uint32_t first_block = begin / stripe, last_block = (end - 1) / stripe;
    // Of a block's two places, 1 is for columns that it begins, 0 for those that it enters further down.
    auto place = [&](uint32_t block) {
        const uint64_t slot = 2 * (static_cast<uint64_t>(ptx::bid_y()) * ptx::grid_x() + block) + (block * stripe <= begin);
        return reinterpret_cast<uint8_t *>(args.partials) + (slot * (4 * M_TILES) * threads + ptx::tid()) * 16;
    };
    // Rows past the end are left out, whole 16-byte pieces at a time.
    const uint32_t row = ptx::bid_y() * (16 * M_TILES) + ptx::lane() / 4, m_rows = static_cast<uint32_t>(args.m);
    uint8_t *const mine = place(ptx::bid_x());
    ASSAY_UNROLL
    for (int i = 0; i < 4 * M_TILES; i++) {
        if (row + 16 * (i / 4) >= m_rows) break;
        const float(&v)[4] = f[i / 4][i % 4];
        ptx::st(mine + static_cast<uint64_t>(i) * threads * 16,
                u32x4{ptx::float_as_uint(v[0]), ptx::float_as_uint(v[1]), ptx::float_as_uint(v[2]), ptx::float_as_uint(v[3])});
    }
    ptx::fence_device();
    ptx::sync();
    uint32_t *const arrivals = args.arrivals + ptx::bid_y() * column_blocks + run.column;
    uint32_t *const told = reinterpret_cast<uint32_t *>(ptx::shared());
    if (ptx::tid() == 0) {
        const uint32_t before = ptx::atomic_add_acq_rel(arrivals, 1);
        const bool last = before == last_block - first_block;
        if (last) ptx::st(arrivals, 0u);   // as the next launch wants it
        ptx::sts(told, last ? 1u : 0u);
    }
    ptx::sync();
    const bool last = ptx::lds32(told) != 0;
    ptx::sync();                           // shared memory is free again
    if (!last) return false;
    ptx::fence_device();
    ASSAY_UNROLL
    for (int i = 0; i < 4 * M_TILES; i++) {
        if (row + 16 * (i / 4) >= m_rows) break;
        float(&v)[4] = f[i / 4][i % 4];
        float sum[4] = {0, 0, 0, 0};
        for (uint32_t block = first_block; block <= last_block; block++) {
            const u32x4 part = ptx::ldcg128(place(block) + static_cast<uint64_t>(i) * threads * 16);
            sum[0] = ptx::add_rn(sum[0], ptx::uint_as_float(part.x));
            sum[1] = ptx::add_rn(sum[1], ptx::uint_as_float(part.y));
            sum[2] = ptx::add_rn(sum[2], ptx::uint_as_float(part.z));
            sum[3] = ptx::add_rn(sum[3], ptx::uint_as_float(part.w));
        }
        ASSAY_UNROLL
        for (int e = 0; e < 4; e++) v[e] = sum[e];
    }
    return true;
}

// Two neighbouring columns of a row of C.
ASSAY_DEVICE void w4_store(const assay_w4_gemm_args &args, uint32_t row, uint32_t column, float v0, float v1) {
    if (row >= static_cast<uint32_t>(args.m) || column >= static_cast<uint32_t>(args.w.n)) return;
    float *const to = args.c + static_cast<int64_t>(row) * args.ldc + column;
    if (column + 1 < static_cast<uint32_t>(args.w.n)) {
        if (reinterpret_cast<uintptr_t>(to) % 8 == 0) {
            ptx::st(to, u32x2{ptx::float_as_uint(v0), ptx::float_as_uint(v1)});
            return;
        }
        ptx::st(to + 1, v1);
    }
    ptx::st(to, v0);
}

// f[m][j] as W4A16Tile and W4A8Tile have it.
template <int M_TILES>
ASSAY_DEVICE void w4_store_tile(const assay_w4_gemm_args &args, const float (&f)[M_TILES][4][4], uint32_t first_row,
                                uint32_t first_column) {
    ASSAY_UNROLL
    for (int m = 0; m < M_TILES; m++)
        ASSAY_UNROLL
        for (int j = 0; j < 4; j++) {
            const uint32_t row = first_row + 16 * m + ptx::lane() / 4, column = first_column + 8 * j + 2 * (ptx::lane() % 4);
            w4_store(args, row, column, f[m][j][0], f[m][j][1]);
            w4_store(args, row + 8, column, f[m][j][2], f[m][j][3]);
        }
}

}  // namespace assay

#endif

// Slots of a routing by expert: a counting sort (csrc/assay.h: assay_moe_sort) that is stable and has no atomics, so its order
// is the CPU's whatever the schedule. A warp owns a run of slots, a chunk, and a cell for each expert:
//
//   count    cells: how many of the run's slots each expert has. 32 slots at a time: match.any finds the lanes of one expert,
//            whose first adds their number
//   scan     a warp an expert: cells become sums over earlier chunks
//   scatter  every block: where each expert begins, a scan over experts; cells become places. Then the run again, a slot's
//            place being its cell plus the lanes before it that match
//
// Few slots: one block does all three in one launch, its 32 warps' cells in shared memory. More: three launches, cells in
// shared memory while a run is counted or scattered, where the experts fit, and in the workspace [num_local, chunks] between.
// What lies beyond the sum of padded counts, up to `most`, is padding: `slots`, and expert -1.
#ifndef ASSAY_MOE_ALIGN_CUH
#define ASSAY_MOE_ALIGN_CUH

#include "ptx.cuh"

#include "assay_cuda.h"

namespace assay {
namespace align {

// The cells of one warp.
template <bool kShared>
struct Cells {
    uint32_t *first;
    uint32_t stride;
    ASSAY_DEVICE uint32_t get(uint32_t e) const {
        return kShared ? ptx::lds32(first + e * stride) : ptx::ldcg(first + static_cast<size_t>(e) * stride);
    }
    ASSAY_DEVICE void put(uint32_t e, uint32_t v) const {
        if (kShared) ptx::sts(first + e * stride, v);
        else ptx::st(first + static_cast<size_t>(e) * stride, v);
    }
};

// Warp w's cells in shared memory: an odd number of words apart, so that lanes that take a warp each meet 32 banks.
ASSAY_DEVICE Cells<true> shared_cells(const assay_cuda_align_args &a, uint32_t w) {
    const uint32_t width = static_cast<uint32_t>(a.num_local) | 1;
    return {reinterpret_cast<uint32_t *>(ptx::shared()) + w * width, 1};
}
ASSAY_DEVICE Cells<false> stored_cells(const assay_cuda_align_args &a, uint32_t chunk) {
    return {a.cells + chunk, static_cast<uint32_t>(a.chunks)};
}
template <bool kShared>
ASSAY_DEVICE Cells<kShared> cells_of(const assay_cuda_align_args &a, uint32_t warp, uint32_t chunk) {
    if constexpr (kShared) return shared_cells(a, warp);
    else return stored_cells(a, chunk);
}

// The local expert of a slot, or -1.
ASSAY_DEVICE int32_t local_of(const assay_cuda_align_args &a, int64_t slot) {
    if (slot >= a.slots) return -1;
    const int32_t id = static_cast<int32_t>(ptx::ldg32(a.topk_ids + slot));
    if (id < 0 || id >= a.num_experts) return -1;
    const int32_t e = a.expert_map ? static_cast<int32_t>(ptx::ldg32(a.expert_map + id)) : id;
    return e < a.num_local ? e : -1;
}

template <bool kShared>
ASSAY_DEVICE void count_chunk(const assay_cuda_align_args &a, uint32_t chunk, Cells<kShared> cells) {
    for (uint32_t e = ptx::lane(); e < static_cast<uint32_t>(a.num_local); e += 32) cells.put(e, 0);
    ptx::sync_warp();
    const int64_t from = static_cast<int64_t>(chunk) * a.chunk_slots, end = min_of<int64_t>(from + a.chunk_slots, a.slots);
    for (int64_t s = from; s < end; s += 32) {
        const int32_t e = local_of(a, s + ptx::lane());
        const uint32_t same = ptx::match_any(static_cast<uint32_t>(e));
        if (e >= 0 && ptx::ctz(same) == ptx::lane()) cells.put(e, cells.get(e) + ptx::popc(same));
        ptx::sync_warp();
    }
}

template <bool kShared>
ASSAY_DEVICE void scatter_chunk(const assay_cuda_align_args &a, uint32_t chunk, Cells<kShared> cells) {
    const int64_t from = static_cast<int64_t>(chunk) * a.chunk_slots, end = min_of<int64_t>(from + a.chunk_slots, a.slots);
    const uint32_t below = (1u << ptx::lane()) - 1;
    for (int64_t s = from; s < end; s += 32) {
        const int64_t slot = s + ptx::lane();
        const int32_t e = local_of(a, slot);
        const uint32_t same = ptx::match_any(static_cast<uint32_t>(e));
        const uint32_t first = e < 0 ? 0 : cells.get(e);
        ptx::sync_warp();
        if (e >= 0 && !(same & below)) cells.put(e, first + ptx::popc(same));
        ptx::sync_warp();
        if (slot >= a.slots) continue;
        const uint32_t place = first + ptx::popc(same & below);
        ptx::st(a.position + slot, e < 0 ? -1 : static_cast<int32_t>(place));
        if (e < 0) continue;
        ptx::st(a.sorted_token_ids + place, static_cast<int32_t>(slot));
        // Every block begins with a slot, since an expert is padded by less than a block.
        const uint32_t size = static_cast<uint32_t>(a.block_size);
        if (place % size == 0) ptx::st(a.expert_ids + place / size, e);
    }
}

// A warp's exclusive prefix sum; `total` of all.
ASSAY_DEVICE uint32_t scan_warp(uint32_t v, uint32_t &total) {
    uint32_t sum = v;
    ASSAY_UNROLL
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t before = ptx::shfl_up(sum, step);
        sum += ptx::lane() >= step ? before : 0;
    }
    total = ptx::shfl(sum, 31);
    return sum - v;
}

// Where the experts begin: calls place(e, offset, count) for every expert, by a thread each; returns the sum of padded
// counts. count(e) is its count. words: kWarps of shared memory.
template <int kWarps, class Count, class Place>
ASSAY_DEVICE uint32_t scan_experts(const assay_cuda_align_args &a, uint32_t *words, Count count, Place place) {
    const uint32_t experts = static_cast<uint32_t>(a.num_local), size = static_cast<uint32_t>(a.block_size);
    uint32_t before = 0;
    for (uint32_t from = 0; from < experts; from += 32 * kWarps) {
        const uint32_t e = from + ptx::tid();
        const uint32_t n = e < experts ? count(e) : 0;
        uint32_t sum, offset = scan_warp(ceil_div(n, size) * size, sum);
        if (!ptx::lane()) ptx::sts(words + ptx::warp(), sum);
        ptx::sync();
        for (uint32_t w = 0; w < kWarps; w++) {
            const uint32_t other = ptx::lds32(words + w);
            offset += w < ptx::warp() ? other : 0;
            sum = w ? sum + other : other;
        }
        ptx::sync();
        if (e < experts) place(e, before + offset, n);
        before += sum;
    }
    return before;
}

// What one block of the grid, its `first`, tells of the sort, and its share of the padding.
ASSAY_DEVICE void publish(const assay_cuda_align_args &a, uint32_t e, uint32_t offset, uint32_t n, uint32_t block, uint32_t blocks) {
    if (!block) ptx::st(a.offsets + e, static_cast<int32_t>(offset));
    if (e % blocks != block) return;
    const uint32_t size = static_cast<uint32_t>(a.block_size), end = offset + ceil_div(n, size) * size;
    for (uint32_t i = offset + n; i < end; i++) ptx::st(a.sorted_token_ids + i, a.slots);
}
ASSAY_DEVICE void publish_total(const assay_cuda_align_args &a, uint32_t total, uint32_t block, uint32_t blocks) {
    if (!block && !ptx::tid()) {
        ptx::st(a.offsets + a.num_local, static_cast<int32_t>(total));
        ptx::st(a.num_tokens_post_padded, static_cast<int32_t>(total));
    }
    const uint32_t most = static_cast<uint32_t>(a.most), size = static_cast<uint32_t>(a.block_size);
    const int64_t zeros = a.zeros ? a.num_zeros : 0;
    const uint32_t step = blocks * ptx::block_threads(), at = block * ptx::block_threads() + ptx::tid();
    for (uint32_t i = total + at; i < most; i += step) ptx::st(a.sorted_token_ids + i, a.slots);
    for (uint32_t b = total / size + at; b < most / size; b += step) ptx::st(a.expert_ids + b, -1);
    for (int64_t i = at; i < zeros; i += step) ptx::st(a.zeros + i, 0u);
}

enum { WARPS = 8, ONE_WARPS = 32 };

template <bool kShared>
ASSAY_DEVICE void moe_align_count(const assay_cuda_align_args &a) {
    const uint32_t chunk = ptx::bid_x() * WARPS + ptx::warp();
    const Cells<kShared> cells = cells_of<kShared>(a, ptx::warp(), chunk);
    count_chunk(a, chunk, cells);
    if constexpr (kShared) {
        const Cells<false> stored = stored_cells(a, chunk);
        for (uint32_t e = ptx::lane(); e < static_cast<uint32_t>(a.num_local); e += 32) stored.put(e, cells.get(e));
    }
}

// Cells become sums over earlier chunks, and the count of an expert's slots goes where it can be read: to counts.
ASSAY_DEVICE void moe_align_scan(const assay_cuda_align_args &a) {
    const uint32_t e = ptx::bid_x() * WARPS + ptx::warp(), chunks = static_cast<uint32_t>(a.chunks);
    if (e >= static_cast<uint32_t>(a.num_local)) return;
    uint32_t *row = a.cells + static_cast<size_t>(e) * chunks, before = 0;
    for (uint32_t from = 0; from < chunks; from += 32) {
        const uint32_t c = from + ptx::lane();
        uint32_t sum;
        const uint32_t n = c < chunks ? ptx::ldcg(row + c) : 0;
        const uint32_t at = scan_warp(n, sum);
        if (c < chunks) ptx::st(row + c, before + at);
        before += sum;
    }
    if (!ptx::lane()) ptx::st(a.counts + e, static_cast<int64_t>(before));
}

template <bool kShared>
ASSAY_DEVICE void moe_align_scatter(const assay_cuda_align_args &a) {
    const uint32_t block = ptx::bid_x(), blocks = ptx::grid_x();
    const uint32_t width = static_cast<uint32_t>(a.num_local) | 1;
    uint32_t *words = reinterpret_cast<uint32_t *>(ptx::shared()) + (kShared ? WARPS * width : 0);
    const auto count = [&](uint32_t e) { return static_cast<uint32_t>(ptx::ldcg(a.counts + e)); };
    const auto place = [&](uint32_t e, uint32_t offset, uint32_t n) {
        for (uint32_t w = 0; w < WARPS; w++) {
            const uint32_t sum = stored_cells(a, block * WARPS + w).get(e);
            cells_of<kShared>(a, w, block * WARPS + w).put(e, offset + sum);
        }
        publish(a, e, offset, n, block, blocks);
    };
    const uint32_t total = scan_experts<WARPS>(a, words, count, place);
    ptx::sync();
    const uint32_t chunk = block * WARPS + ptx::warp();
    scatter_chunk(a, chunk, cells_of<kShared>(a, ptx::warp(), chunk));
    publish_total(a, total, block, blocks);
}

// All of it in one block; chunks is ONE_WARPS.
ASSAY_DEVICE void moe_align_one(const assay_cuda_align_args &a) {
    const uint32_t warp = ptx::warp(), experts = static_cast<uint32_t>(a.num_local);
    uint32_t *counts = shared_cells(a, ONE_WARPS).first, *words = counts + experts;
    count_chunk(a, warp, shared_cells(a, warp));
    ptx::sync();
    for (uint32_t e = warp; e < experts; e += ONE_WARPS) {
        const Cells<true> cells = shared_cells(a, ptx::lane());
        uint32_t sum;
        cells.put(e, scan_warp(cells.get(e), sum));
        if (ptx::lane()) continue;
        ptx::sts(counts + e, sum);
        ptx::st(a.counts + e, static_cast<int64_t>(sum));
    }
    ptx::sync();
    const auto count = [&](uint32_t e) { return ptx::lds32(counts + e); };
    const auto place = [&](uint32_t e, uint32_t offset, uint32_t n) {
        for (uint32_t w = 0; w < ONE_WARPS; w++) shared_cells(a, w).put(e, offset + shared_cells(a, w).get(e));
        publish(a, e, offset, n, 0, 1);
    };
    const uint32_t total = scan_experts<ONE_WARPS>(a, words, count, place);
    ptx::sync();
    scatter_chunk(a, warp, shared_cells(a, warp));
    publish_total(a, total, 0, 1);
}

}  // namespace align

using align::moe_align_count;
using align::moe_align_one;
using align::moe_align_scan;
using align::moe_align_scatter;

}  // namespace assay

#endif

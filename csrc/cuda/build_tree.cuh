// Draft trees: assay_tree_build on the GPU, several trees of one size at once.
//
// tree_links   a block a tree: one warp finds depths, links and faults, all threads then compare siblings' tokens.
// tree_masks   a warp a row: positions, the dense and the bit-packed mask, and the paths to leaves.
#ifndef ASSAY_CUDA_BUILD_TREE_CUH
#define ASSAY_CUDA_BUILD_TREE_CUH

#include "assay_cuda.h"
#include "tree_links.cuh"

namespace assay {

constexpr int kTreeThreads = 256;

struct TreeShared {
    int32_t status, fault, deepest, leaves;
    uint64_t duplicate;
};

// By a warp: depths, and the first parent that is none or depth that is too much. Returns a status.
ASSAY_DEVICE int32_t tree_depths(const assay_cuda_tree_args &a, const int32_t *parents, int32_t *depth, int32_t *fault,
                                 int32_t *deepest) {
    const int32_t lane = static_cast<int32_t>(ptx::lane());
    *deepest = 0;
    *fault = -1;
    if (lane == 0) depth[0] = 0;
    ptx::sync_warp();
    for (int64_t base = 0; base < a.nodes; base += 32) {
        const int64_t node = base + lane;
        const bool valid = node < a.nodes;
        const int32_t parent = valid ? static_cast<int32_t>(ptx::ldg32(parents + node)) : -1;
        const bool stray = valid && (parent < -1 || parent >= node);
        const Depth d = depth_in_step(base, stray ? -1 : parent, false,
                                      [&](int64_t up) { return Depth{depth[up + 1], false}; });
        const bool deep = valid && d.depth > a.max_depth;
        const uint32_t faults = ptx::ballot(stray || deep), strays = ptx::ballot(stray);
        const int32_t sound = faults ? static_cast<int32_t>(ptx::ctz(faults)) : 32;
        const uint32_t seen = valid && lane < sound ? static_cast<uint32_t>(d.depth) : 0;
        *deepest = max_of(*deepest, static_cast<int32_t>(ptx::redux_max(seen)));
        if (valid) depth[node + 1] = d.depth;
        ptx::sync_warp();
        if (faults) {
            *fault = static_cast<int32_t>(base) + sound;
            return strays >> sound & 1 ? ASSAY_TREE_BAD_PARENT : ASSAY_TREE_TOO_DEEP;
        }
    }
    return ASSAY_TREE_OK;
}

// By a warp: first_child and next_sibling, from the last node on, so that a list of siblings ascends.
ASSAY_DEVICE void tree_siblings(const assay_cuda_tree_args &a, const int32_t *parents, int32_t *first_child,
                                int32_t *next_sibling) {
    const int32_t lane = static_cast<int32_t>(ptx::lane());
    for (int64_t row = lane; row <= a.nodes; row += 32) first_child[row] = next_sibling[row] = -1;
    ptx::sync_warp();
    for (int64_t base = (a.nodes - 1) / 32 * 32; base >= 0 && a.nodes; base -= 32) {
        const int64_t node = base + lane;
        const bool valid = node < a.nodes;
        const int32_t parent = valid ? static_cast<int32_t>(ptx::ldg32(parents + node)) + 1 : -1 - lane;
        const Siblings s = siblings_in_step(static_cast<uint32_t>(parent));
        if (valid && s.after >= 0) next_sibling[node + 1] = static_cast<int32_t>(base) + s.after + 1;
        else if (valid) next_sibling[node + 1] = first_child[parent];
        ptx::sync_warp();
        if (valid && s.before < 0) first_child[parent] = static_cast<int32_t>(node + 1);
        ptx::sync_warp();
    }
}

ASSAY_DEVICE void tree_links(const assay_cuda_tree_args &a) {
    TreeShared *shared = reinterpret_cast<TreeShared *>(ptx::shared());
    const int64_t tree = ptx::bid_x(), rows = a.nodes + 1;
    const int32_t *parents = a.parents + tree * a.nodes, *tokens = a.tokens ? a.tokens + tree * a.nodes : nullptr;
    int32_t *depth = a.depth + tree * rows, *first_child = a.first_child + tree * rows;
    int32_t *next_sibling = a.next_sibling + tree * rows;
    if (ptx::warp() == 0) {
        int32_t fault, deepest;
        const int32_t status = tree_depths(a, parents, depth, &fault, &deepest);
        if (status == ASSAY_TREE_OK) tree_siblings(a, parents, first_child, next_sibling);
        if (ptx::lane() == 0) *shared = {status, fault, deepest, 0, 0};
    }
    ptx::sync();
    const bool sound = shared->status == ASSAY_TREE_OK;
    if (sound && tokens) {
        // The last node that has a later sibling of its token, and of those the first.
        for (int64_t row = 1 + ptx::tid(); row < rows; row += kTreeThreads) {
            const uint32_t token = ptx::ldg32(tokens + row - 1);
            int32_t other = next_sibling[row];
            while (other >= 0 && ptx::ldg32(tokens + other - 1) != token) other = next_sibling[other];
            if (other >= 0)
                ptx::atomic_max(&shared->duplicate, static_cast<uint64_t>(row) << 32 | static_cast<uint32_t>(other));
        }
    }
    if (sound && a.retrieve) {
        uint32_t leaves = 0;
        for (int64_t row = ptx::tid(); row < rows; row += kTreeThreads) leaves += first_child[row] < 0;
        ptx::atomic_add(&shared->leaves, static_cast<int32_t>(leaves));
    }
    ptx::sync();
    if (ptx::tid() == 0) {
        int32_t *info = a.info + 4 * tree;
        const bool twins = shared->duplicate != 0;
        info[0] = twins ? ASSAY_TREE_DUPLICATE : shared->status;
        info[1] = twins ? static_cast<int32_t>(shared->duplicate & 0xffffffffu) - 1 : shared->fault;
        info[2] = twins ? 0 : shared->leaves;
        info[3] = shared->deepest;
    }
}

// By a warp: what a row sees, itself and its ancestors, as bits: word w of the row in lane w mod 32 of step w / 32.
ASSAY_DEVICE void write_mask_words(uint64_t *words, int64_t count, const int32_t *parents, int64_t row) {
    for (int64_t w = ptx::lane(); w < count; w += 32) {
        uint64_t word = 0;
        for (int64_t at = row;;) {
            if (at / 64 == w) word |= static_cast<uint64_t>(1) << (at & 63);
            if (!at) break;
            at = static_cast<int32_t>(ptx::ldg32(parents + at - 1)) + 1;
        }
        words[w] = word;
    }
}

ASSAY_DEVICE void write_mask(uint8_t *mask, int64_t rows, const int32_t *parents, int64_t row) {
    for (int64_t i = ptx::lane(); i < rows; i += 32) mask[i] = 0;
    ptx::sync_warp();
    if (ptx::lane() == 0) {
        for (int64_t at = row; at > 0; at = static_cast<int32_t>(ptx::ldg32(parents + at - 1)) + 1) mask[at] = 1;
        mask[0] = 1;
    }
}

ASSAY_DEVICE void tree_masks(const assay_cuda_tree_args &a) {
    const int64_t rows = a.nodes + 1, unit = static_cast<int64_t>(ptx::bid_x()) * (kTreeThreads / 32) + ptx::warp();
    const int64_t tree = unit / rows, row = unit % rows;
    if (tree >= a.trees || a.info[4 * tree] != ASSAY_TREE_OK) return;
    const int32_t *parents = a.parents + tree * a.nodes, *depth = a.depth + tree * rows;
    const int32_t *first_child = a.first_child + tree * rows;
    const int64_t words = (rows + 63) / 64;
    if (a.positions && ptx::lane() == 0)
        a.positions[tree * rows + row] = (a.position ? a.position[tree] : 0) + depth[row];
    if (a.mask) write_mask(a.mask + (tree * rows + row) * rows, rows, parents, row);
    if (a.mask_words) write_mask_words(a.mask_words + (tree * rows + row) * words, words, parents, row);
    if (!a.retrieve || first_child[row] >= 0) return;
    uint32_t leaf = 0;   // how many come before
    for (int64_t i = 0; i < row; i += 32) {
        const int64_t at = i + ptx::lane();
        leaf += ptx::popc(ptx::ballot(at < row && first_child[min_of(at, row)] < 0));
    }
    const int32_t deepest = a.info[4 * tree + 3];
    int32_t *path = a.retrieve + tree * max_of<int64_t>(a.nodes, 1) * (a.max_depth + 1) +
                    static_cast<int64_t>(leaf) * (deepest + 1);
    for (int32_t d = depth[row] + 1 + static_cast<int32_t>(ptx::lane()); d <= deepest; d += 32) path[d] = -1;
    if (ptx::lane() == 0) {
        int64_t at = row;
        for (int32_t d = depth[row]; d >= 0; d--) {
            path[d] = static_cast<int32_t>(at);
            at = at ? static_cast<int32_t>(ptx::ldg32(parents + at - 1)) + 1 : 0;
        }
    }
}

}  // namespace assay

#endif

// Depths and links of a tree of draft tokens from its parents, by one warp: 32 nodes a step, in order, and within a step by
// pointer doubling and by matching lanes of one parent. No fault in the input makes it longer.
#ifndef ASSAY_CUDA_TREE_LINKS_CUH
#define ASSAY_CUDA_TREE_LINKS_CUH

#include "ptx.cuh"

namespace assay {

struct Depth {
    int32_t depth;
    bool absent;
};

// By a warp: depth and absence of nodes base .. base + 31, a lane each. up: a node's parent, -1 the root, less than the node;
// own: whether the node itself is absent; before(up): the same of a parent before `base`, whose depth is known.
template <class Before>
ASSAY_DEVICE Depth depth_in_step(int64_t base, int64_t up, bool own, Before before) {
    Depth mine = {1, own};
    int32_t link = up >= base ? static_cast<int32_t>(up - base) : -1;
    if (link < 0) {
        const Depth above = up < 0 ? Depth{0, false} : before(up);
        mine.depth += above.depth;
        mine.absent |= above.absent;
    }
    // Each round doubles the distance that a lane has looked up.
    for (int round = 0; round < 5; round++) {
        const uint32_t from = link < 0 ? 0 : static_cast<uint32_t>(link);
        const int32_t depth = ptx::shfl(mine.depth, from), next = ptx::shfl(link, from);
        const uint32_t absent = ptx::shfl(static_cast<uint32_t>(mine.absent), from);
        if (link >= 0) {
            mine.depth += depth;
            mine.absent |= absent != 0;
            link = next;
        }
    }
    return mine;
}

// Which of the lanes below, and which above, have this lane's key: the nearest of each, -1 for none.
struct Siblings {
    uint32_t all;
    int32_t before, after;
};

ASSAY_DEVICE Siblings siblings_in_step(uint32_t key) {
    const uint32_t all = ptx::match_any(key), lane = ptx::lane();
    const uint32_t below = all & ((1u << lane) - 1), above = all & ~((2u << lane) - 1);
    return {all, below ? 31 - static_cast<int32_t>(ptx::clz(below)) : -1, above ? static_cast<int32_t>(ptx::ctz(above)) : -1};
}

}  // namespace assay

#endif

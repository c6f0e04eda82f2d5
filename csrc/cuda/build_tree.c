/* Draft trees on the GPU: the plan of build_tree.cuh. */
#include "driver.h"

enum { TREE_WARPS = 8 }; /* of a block of tree_masks: a warp a row */

int assay_cuda_tree_build(const assay_cuda_tree_args *a, void *stream) {
    if (!a || a->trees < 0 || a->nodes < 0 || a->nodes > ASSAY_TREE_MOST_NODES || a->max_depth < 0 ||
        a->trees > INT32_MAX / (a->nodes + 1) || (a->nodes && !a->parents) || !a->depth || !a->first_child ||
        !a->next_sibling || !a->info)
        return assay_cuda_fail(ASSAY_EINVAL, "tree_build: expected 0 to %d nodes, max_depth of 0 or more and all but the optional "
                               "arrays, got %lld nodes, max_depth %lld", ASSAY_TREE_MOST_NODES, a ? (long long)a->nodes : -1,
                               a ? (long long)a->max_depth : -1);
    const unsigned trees = (unsigned)a->trees, units = (unsigned)(a->trees * (a->nodes + 1));
    const int status = assay_cuda_launch("assay_tree_links", trees, 1, 1, 64, stream, a, sizeof *a);
    if (status || (!a->positions && !a->mask && !a->mask_words && !a->retrieve)) return status;
    return assay_cuda_launch("assay_tree_masks", (units + TREE_WARPS - 1) / TREE_WARPS, 1, 1, 0, stream, a, sizeof *a);
}

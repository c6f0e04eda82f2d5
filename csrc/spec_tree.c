/* Draft trees: what a forward pass and a verification need to know of one, from its parents alone.
 *
 * Row 0 is the root (the last emitted token), row i + 1 is node i. Parents come before their children, so every pass is
 * one loop over the nodes and no fault in the input can make it longer. */
#include "assay.h"

#include <string.h>

/* The first fault, or ASSAY_TREE_OK. Fills depth and the two links. */
static int32_t link_nodes(const assay_tree_args *a, int64_t *fault, int32_t *deepest) {
    const int64_t n = a->nodes;
    a->depth[0] = 0;
    *deepest = 0;
    for (int64_t i = 0; i < n; i++) {
        *fault = i;
        if (a->parents[i] < -1 || a->parents[i] >= i) return ASSAY_TREE_BAD_PARENT;
        const int32_t depth = a->depth[a->parents[i] + 1] + 1;
        if (depth > a->max_depth) return ASSAY_TREE_TOO_DEEP;
        a->depth[i + 1] = depth;
        if (depth > *deepest) *deepest = depth;
    }
    for (int64_t r = 0; r <= n; r++) a->first_child[r] = a->next_sibling[r] = -1;
    /* Backwards, so that each list of siblings ascends. */
    for (int64_t i = n - 1; i >= 0; i--) {
        const int32_t parent = a->parents[i] + 1;
        if (a->tokens)
            for (int32_t s = a->first_child[parent]; s >= 0; s = a->next_sibling[s])
                if (a->tokens[s - 1] == a->tokens[i]) {
                    *fault = s - 1;
                    return ASSAY_TREE_DUPLICATE;
                }
        a->next_sibling[i + 1] = a->first_child[parent];
        a->first_child[parent] = (int32_t)(i + 1);
    }
    *fault = -1;
    return ASSAY_TREE_OK;
}

/* A row sees what its parent's row sees, and itself. */
static void write_mask(const assay_tree_args *a) {
    const int64_t rows = a->nodes + 1;
    memset(a->mask, 0, (size_t)rows);
    a->mask[0] = 1;
    for (int64_t r = 1; r < rows; r++) {
        uint8_t *row = a->mask + r * rows;
        memcpy(row, a->mask + (a->parents[r - 1] + 1) * rows, (size_t)rows);
        row[r] = 1;
    }
}

static void write_mask_words(const assay_tree_args *a) {
    const int64_t rows = a->nodes + 1, words = (rows + 63) / 64;
    memset(a->mask_words, 0, (size_t)words * sizeof *a->mask_words);
    a->mask_words[0] = 1;
    for (int64_t r = 1; r < rows; r++) {
        uint64_t *row = a->mask_words + r * words;
        memcpy(row, a->mask_words + (a->parents[r - 1] + 1) * words, (size_t)words * sizeof *row);
        row[r / 64] |= (uint64_t)1 << (r % 64);
    }
}

static int64_t write_paths(const assay_tree_args *a, int32_t deepest) {
    int64_t leaves = 0;
    for (int64_t r = 0; r <= a->nodes; r++) {
        if (a->first_child[r] >= 0) continue;
        int32_t *path = a->retrieve + leaves++ * (deepest + 1);
        for (int32_t d = a->depth[r] + 1; d <= deepest; d++) path[d] = -1;
        int32_t at = (int32_t)r;
        for (int32_t d = a->depth[r]; d > 0; d--) {
            path[d] = at;
            at = a->parents[at - 1] + 1;
        }
        path[0] = 0;
    }
    return leaves;
}

int assay_tree_build(const assay_tree_args *a) {
    if (!a || a->nodes < 0 || a->nodes > ASSAY_TREE_MOST_NODES || a->max_depth < 0 || (a->nodes && !a->parents) ||
        !a->depth || !a->first_child || !a->next_sibling || !a->info)
        return ASSAY_EINVAL;
    int64_t fault = -1, leaves = 0;
    int32_t deepest = 0;
    const int32_t status = link_nodes(a, &fault, &deepest);
    if (status == ASSAY_TREE_OK) {
        if (a->positions)
            for (int64_t r = 0; r <= a->nodes; r++) a->positions[r] = a->position + a->depth[r];
        if (a->mask) write_mask(a);
        if (a->mask_words) write_mask_words(a);
        if (a->retrieve) leaves = write_paths(a, deepest);
    }
    a->info[0] = status;
    a->info[1] = (int32_t)fault;
    a->info[2] = (int32_t)leaves;
    a->info[3] = deepest;
    return ASSAY_OK;
}

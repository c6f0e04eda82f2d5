/* Which slots of a routing go to which expert: counting sort, capacity, and the sum of a token's results. */
#include "kernels.h"

#include <string.h>

/* The local expert of an id, or -1. */
static inline int64_t local_of(int32_t id, int64_t num_experts, const int32_t *expert_map, int64_t num_local) {
    if (id < 0 || id >= num_experts) return -1;
    const int64_t e = expert_map ? expert_map[id] : id;
    return e < num_local ? e : -1;
}

static int valid(const int32_t *topk_ids, int64_t slots, int64_t num_experts, const int32_t *expert_map, int64_t num_local,
                 int64_t block_size) {
    return (topk_ids || !slots) && slots >= 0 && slots < INT32_MAX && num_experts >= 1 && num_experts <= INT32_MAX &&
           num_local >= 0 && (expert_map || num_local == num_experts) && block_size >= 1 && block_size <= INT32_MAX;
}

int assay_moe_offsets(const int32_t *topk_ids, int64_t slots, int64_t num_experts, const int32_t *expert_map,
                      int64_t num_local, int64_t block_size, int64_t *offsets, int64_t *counts) {
    if (!valid(topk_ids, slots, num_experts, expert_map, num_local, block_size) || !offsets || !counts) return ASSAY_EINVAL;
    memset(counts, 0, (size_t)num_local * sizeof *counts);
    for (int64_t s = 0; s < slots; s++) {
        const int64_t e = local_of(topk_ids[s], num_experts, expert_map, num_local);
        if (e >= 0) counts[e]++;
    }
    offsets[0] = 0;
    for (int64_t e = 0; e < num_local; e++) offsets[e + 1] = offsets[e] + assay_round_up(counts[e], block_size);
    return ASSAY_OK;
}

int assay_moe_sort(const int32_t *topk_ids, int64_t slots, int64_t num_experts, const int32_t *expert_map,
                   int64_t num_local, int64_t block_size, const int64_t *offsets, int64_t *cursor,
                   int32_t *sorted_token_ids, int32_t *expert_ids, int32_t *position) {
    if (!valid(topk_ids, slots, num_experts, expert_map, num_local, block_size) || !offsets || !cursor) return ASSAY_EINVAL;
    memcpy(cursor, offsets, (size_t)num_local * sizeof *cursor);
    for (int64_t s = 0; s < slots; s++) {
        const int64_t e = local_of(topk_ids[s], num_experts, expert_map, num_local);
        if (e >= 0) sorted_token_ids[cursor[e]] = (int32_t)s;
        position[s] = e >= 0 ? (int32_t)cursor[e]++ : -1;
    }
    for (int64_t e = 0; e < num_local; e++) {
        for (int64_t i = cursor[e]; i < offsets[e + 1]; i++) sorted_token_ids[i] = (int32_t)slots;
        for (int64_t b = offsets[e] / block_size; expert_ids && b < offsets[e + 1] / block_size; b++)
            expert_ids[b] = (int32_t)e;
    }
    return ASSAY_OK;
}

int assay_moe_capacity(int32_t *topk_ids, float *topk_weights, int64_t tokens, int64_t top_k, int64_t num_experts,
                       int64_t capacity, const int64_t *order, int64_t *counts) {
    if (tokens < 0 || top_k < 1 || num_experts < 1 || capacity < 0 || !counts ||
        (tokens && (!topk_ids || !topk_weights)))
        return ASSAY_EINVAL;
    memset(counts, 0, (size_t)num_experts * sizeof *counts);
    for (int64_t j = 0; j < top_k; j++)
        for (int64_t i = 0; i < tokens; i++) {
            const int64_t t = order ? order[i] : i;
            if (t < 0 || t >= tokens) return ASSAY_EINVAL;
            int32_t *id = topk_ids + t * top_k + j;
            if (*id >= 0 && *id < num_experts && counts[*id] < capacity) {
                counts[*id]++;
            } else {
                *id = -1;
                topk_weights[t * top_k + j] = 0;
            }
        }
    return ASSAY_OK;
}

typedef struct {
    const assay_moe_experts_kernel *kernel;
    const float *y, *weights;
    int64_t ldy, n, top_k, ldo;
    const int32_t *position;
    float *out;
} combine_job;

static void combine_tokens(void *arg, int64_t begin, int64_t end) {
    const combine_job *j = arg;
    for (int64_t t = begin; t < end; t++) {
        float *out = j->out + t * j->ldo;
        int more = 0;
        for (int64_t s = t * j->top_k; s < (t + 1) * j->top_k; s++) {
            if (j->position[s] < 0) continue;
            j->kernel->combine(out, j->y + j->position[s] * j->ldy, NULL, j->weights[s], more, j->n);
            more = 1;
        }
        if (!more) memset(out, 0, (size_t)j->n * sizeof *out);
    }
}

int assay_moe_combine(const float *y, int64_t ldy, int64_t n, const int32_t *position, const float *topk_weights,
                      int64_t tokens, int64_t top_k, float *out, int64_t ldo, int variant, int num_threads) {
    if (n < 0 || ldy < n || ldo < n || tokens < 0 || top_k < 1 || num_threads < 0) return ASSAY_EINVAL;
    const assay_moe_experts_kernel *kernel = assay_select(ASSAY_OP_moe_experts, variant);
    if (!kernel) return ASSAY_EISA;
    if (!tokens || !n) return ASSAY_OK;
    if (!position || !topk_weights || !out) return ASSAY_EINVAL;
    combine_job j = {kernel, y, topk_weights, ldy, n, top_k, ldo, position, out};
    return assay_parallel_for(combine_tokens, &j, tokens, num_threads, tokens * top_k * n > 65536);
}

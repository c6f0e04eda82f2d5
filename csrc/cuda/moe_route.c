/* MoE routing on a GPU: checks, and the kernel for so many experts. */
#include "assay_cuda.h"

enum { WARPS = 4 }; /* tokens a block, as in moe_route.cuh */

static int valid(const assay_route_args *a) {
    return a->dtype >= ASSAY_F32 && a->dtype <= ASSAY_BF16 && a->scoring >= ASSAY_SCORE_SOFTMAX &&
           a->scoring <= ASSAY_SCORE_NONE && a->tokens >= 0 && a->tokens <= INT32_MAX && a->num_experts >= 1 &&
           a->num_experts <= ASSAY_CUDA_ROUTE_EXPERTS && a->top_k >= 1 && a->top_k <= a->num_experts &&
           a->ld >= a->num_experts && a->num_shared >= 0 && a->num_shared <= INT32_MAX - a->num_experts && a->n_group >= 1 &&
           a->num_experts % a->n_group == 0 && a->topk_group >= 1 && a->topk_group <= a->n_group;
}

int assay_cuda_moe_route(const assay_route_args *args, void *stream) {
    static const struct {
        int experts;
        const char *name;
    } kernels[] = {{64, "assay_moe_route_64"}, {128, "assay_moe_route_128"}, {256, "assay_moe_route_256"},
                   {512, "assay_moe_route_512"}, {ASSAY_CUDA_ROUTE_EXPERTS, "assay_moe_route_2048"}};
    if (!args || !valid(args)) return ASSAY_EINVAL;
    if (!args->tokens) return ASSAY_OK;
    if (!args->logits || !args->topk_weights || !args->topk_ids || !args->status) return ASSAY_EINVAL;
    int i = 0;
    while (kernels[i].experts < args->num_experts) i++;
    const int stored = kernels[i].experts == ASSAY_CUDA_ROUTE_EXPERTS; /* that one keeps its keys in shared memory */
    const size_t words = (size_t)kernels[i].experts + (size_t)args->n_group;
    return assay_cuda_launch(kernels[i].name, (unsigned)((args->tokens + WARPS - 1) / WARPS), 1, 1,
                             args->n_group > 1 || stored ? WARPS * words * 4 : 0, stream, args, sizeof *args);
}

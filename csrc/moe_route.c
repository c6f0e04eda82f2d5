/* MoE routing, the call: checks, the variant, and which tokens go together. */
#include "kernels.h"

/* Tokens a thread takes at a time, and logits below which one thread does them all: a dispatch costs as much. */
enum { TOKENS_A_UNIT = 64, SHARE_LOGITS = 16384 };

typedef struct {
    const assay_route_args *args;
    const assay_moe_route_kernel *kernel;
} job;

static void run_units(void *arg, int64_t begin, int64_t end) {
    const job *j = arg;
    j->kernel->route(j->args, begin * TOKENS_A_UNIT, assay_min_i64(end * TOKENS_A_UNIT, j->args->tokens));
}

int assay_moe_route(const void *logits, int dtype, int64_t ld, int64_t tokens, int64_t num_experts, int64_t top_k,
                    int renormalize, float *topk_weights, int32_t *topk_ids, int32_t *status, int variant,
                    int num_threads) {
    if (dtype < ASSAY_F32 || dtype > ASSAY_BF16 || tokens < 0 || tokens > INT32_MAX || num_experts < 1 ||
        num_experts > INT32_MAX || top_k < 1 || top_k > num_experts || ld < num_experts || num_threads < 0)
        return ASSAY_EINVAL;
    const assay_moe_route_kernel *kernel = assay_select(ASSAY_OP_moe_route, variant);
    if (!kernel) return ASSAY_EISA;
    if (!tokens) return ASSAY_OK;
    if (!logits || !topk_weights || !topk_ids || !status) return ASSAY_EINVAL;
    const assay_route_args args = {logits, dtype, ld, tokens, num_experts, top_k, renormalize,
                                   topk_weights, topk_ids, status};
    if (num_threads == 1 || tokens * num_experts < SHARE_LOGITS) {
        kernel->route(&args, 0, tokens);
        return ASSAY_OK;
    }
    job j = {&args, kernel};
    return assay_parallel_for(run_units, &j, (tokens + TOKENS_A_UNIT - 1) / TOKENS_A_UNIT, num_threads, 1);
}

/* MoE routing, the call: checks, the variant, and which tokens go together. */
#include "kernels.h"

#include <math.h>

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

/* Groups, bias and scores as assay.h allows them. */
static int valid(const assay_route_args *a) {
    if (a->dtype < ASSAY_F32 || a->dtype > ASSAY_BF16 || a->scoring < ASSAY_SCORE_SOFTMAX || a->scoring > ASSAY_SCORE_NONE ||
        a->tokens < 0 || a->tokens > INT32_MAX || a->num_experts < 1 || a->num_experts > INT32_MAX || a->top_k < 1 ||
        a->top_k > a->num_experts || a->ld < a->num_experts || a->num_shared < 0 ||
        a->num_shared > INT32_MAX - a->num_experts)
        return 0;
    if (a->n_group < 1 || a->num_experts % a->n_group || a->topk_group < 1 || a->topk_group > a->n_group) return 0;
    if ((a->bias || a->n_group > 1) && a->num_experts > ASSAY_ROUTE_KEYS) return 0;
    for (int64_t e = 0; a->bias && e < a->num_experts; e++)
        if (!(a->bias[e] < INFINITY)) return 0;
    return 1;
}

int assay_moe_route(const assay_route_args *args, int variant, int num_threads) {
    if (!args || num_threads < 0 || !valid(args)) return ASSAY_EINVAL;
    const assay_moe_route_kernel *kernel = assay_select(ASSAY_OP_moe_route, variant);
    if (!kernel) return ASSAY_EISA;
    const int64_t tokens = args->tokens;
    if (!tokens) return ASSAY_OK;
    if (!args->logits || !args->topk_weights || !args->topk_ids || !args->status) return ASSAY_EINVAL;
    if (num_threads == 1 || tokens * args->num_experts < SHARE_LOGITS) {
        kernel->route(args, 0, tokens);
        return ASSAY_OK;
    }
    job j = {args, kernel};
    return assay_parallel_for(run_units, &j, (tokens + TOKENS_A_UNIT - 1) / TOKENS_A_UNIT, num_threads, 1);
}

/* Weighted sums of experts' rows on a GPU: checks, and the width of loads. */
#include "assay_cuda.h"

enum { THREADS = 128 }; /* as in moe_combine.cuh */

static int by_fours(const float *p, int64_t stride) { return !p || ((uintptr_t)p % 16 == 0 && stride % 4 == 0); }

int assay_cuda_moe_combine(const assay_cuda_combine_args *args, void *stream) {
    if (!args) return ASSAY_EINVAL;
    const assay_cuda_combine_args *a = args;
    if (a->n < 0 || a->ldy < a->n || a->ldo < a->n || a->tokens < 0 || a->tokens > INT32_MAX || a->top_k < 1) return ASSAY_EINVAL;
    if (!a->tokens || !a->n) return ASSAY_OK;
    if (!a->position || !a->out || (a->bias && (!a->expert_ids || a->block_size < 1))) return ASSAY_EINVAL;
    const int fours = a->n % 4 == 0 && by_fours(a->y, a->ldy) && by_fours(a->out, a->ldo) && by_fours(a->bias, a->n);
    const int64_t columns = fours ? a->n / 4 : a->n;
    return assay_cuda_launch(fours ? "assay_moe_combine_4" : "assay_moe_combine_1", (unsigned)a->tokens,
                             (unsigned)((columns + THREADS - 1) / THREADS), 1, 0, stream, a, sizeof *a);
}

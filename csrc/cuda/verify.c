/* Speculative verification on the GPU: arguments, workspace, and the launches of a call.
 *
 * verify_scan reads every row once; verify_filter finds the cuts of top_k and the like; verify_race or verify_entropy add what
 * GUMBEL and TYPICAL need of a whole row; chain_verify or tree_verify decide. The number of launches depends on the rule and on
 * what is given, never on data. */
#include "driver.h"

#include "../kernels.h"

_Static_assert(ASSAY_CUDA_VOCAB_BLOCK == ASSAY_VOCAB_BLOCK, "the order of sums is that of blocks");

enum { SCAN_SMEM = 8320, FILTER_SMEM = 33536, WALK_SMEM = 64, PASS_WARPS = 4, WALK_WARPS = 8 };

static int has_q(const assay_verify_args *a) { return a->draft_probs || a->draft_prob_ids; }

static int has_filters(const assay_verify_args *a) { return a->top_k || a->top_p || a->min_p || a->typical_p; }

/* Rules that test all positions of a chain at once. */
static int is_chain(const assay_verify_args *a) {
    if (a->parents || a->rule == ASSAY_TYPICAL || a->rule == ASSAY_KSEQ) return 0;
    return a->rule != ASSAY_BLOCK && a->rule < ASSAY_TRAVERSAL ? 1 : !has_q(a);
}

/* Rules that may need a residual over the whole vocabulary. */
static int needs_team(const assay_verify_args *a) {
    return has_q(a) && a->rule >= ASSAY_REJECTION && a->rule != ASSAY_TARGET_ONLY && a->rule != ASSAY_TYPICAL;
}

static size_t lay_out(assay_cuda_verify_args *v, uint8_t *base) {
    const int64_t batch = v->call.batch, rows = v->drafts + batch;
    v->block_count = (v->call.vocab + ASSAY_VOCAB_BLOCK - 1) / ASSAY_VOCAB_BLOCK;
    size_t at = 0;
#define PIECE(name, count) \
    v->name = (void *)((uintptr_t)base + at); \
    at += (size_t)assay_round_up((int64_t)sizeof *v->name * (count), 256)
    PIECE(blocks, rows * v->block_count);
    PIECE(rows, rows);
    PIECE(nodes, rows);
    PIECE(excluded, rows);
    PIECE(masses, rows * v->block_count);
    PIECE(totals, v->call.rule == ASSAY_TYPICAL || v->call.typical_p ? rows * v->block_count : 0);
    PIECE(tokens, v->call.rule == ASSAY_GUMBEL ? rows * v->block_count : 0);
    PIECE(orders, batch);
    PIECE(ticket, 1);
#undef PIECE
    return at;
}

static int sizes_are_right(const assay_cuda_verify_args *v) {
    if (!v || v->call.batch < 0 || v->call.vocab < 1 || v->call.vocab > INT32_MAX || v->drafts < 0 || v->edits < 0 || v->stops < 0)
        return 0;
    const int64_t blocks = (v->call.vocab + ASSAY_VOCAB_BLOCK - 1) / ASSAY_VOCAB_BLOCK;
    return v->call.batch <= INT32_MAX && v->drafts <= INT32_MAX && v->drafts + v->call.batch <= INT32_MAX / blocks;
}

size_t assay_cuda_verify_workspace(const assay_cuda_verify_args *v) {
    if (!sizes_are_right(v)) return 0;
    assay_cuda_verify_args laid = *v;
    return lay_out(&laid, NULL) + 256;
}

static int is_aligned(const void *p, uintptr_t bytes) { return ((uintptr_t)p & (bytes - 1)) == 0; }

/* The first argument that is out of range, by name, as far as the host sees; NULL: none. */
static const char *wrong_argument(const assay_cuda_verify_args *v) {
    const assay_verify_args *a = &v->call;
    if (!sizes_are_right(v)) return "batch, vocab, drafts: rows times blocks of 2048 tokens must stay below 2^31";
    if (a->dtype < ASSAY_F32 || a->dtype > ASSAY_BF16 || a->ld < a->vocab) return "dtype, ld";
    if (a->rule < ASSAY_GREEDY || a->rule > ASSAY_TRAVERSAL_WITHOUT_REPLACEMENT) return "rule";
    if (!a->target_logits || !a->temperature || !a->cu_num_draft_tokens) return "target_logits, temperature, cu_num_draft_tokens";
    if (!a->output_token_ids || !a->num_accepted || !a->num_emitted || !a->status || !a->accept_index || !a->counters)
        return "outputs";
    if (a->max_out < 1) return "max_out";
    if (v->drafts && !a->draft_token_ids) return "draft_token_ids";
    if (a->parents && (a->rule == ASSAY_REJECTION || a->rule == ASSAY_BLOCK)) return "parents: the rule is for chains";
    if (a->draft_prob_ids && (!a->draft_prob_values || a->draft_prob_width < 0)) return "draft_prob_values, draft_prob_width";
    if (a->draft_probs && a->draft_prob_ids) return "draft_probs and draft_prob_ids: one of them";
    if (a->rule == ASSAY_KSEQ && !has_q(a)) return "draft_probs: the rule needs them";
    if (a->repetition_penalty && (!a->frequency_penalty || !a->presence_penalty || !a->cu_edits)) return "penalties: all or none";
    if (a->cu_edits && v->edits && (!a->edit_token_ids || !a->edit_bias || !a->edit_in_prompt || !a->edit_count)) return "edits";
    if (a->bitmask && a->bitmask_ld < (a->vocab + 31) / 32) return "bitmask_ld";
    if (v->stops && !a->stop_token_ids) return "stop_token_ids";
    if (a->num_stop < 0 || a->num_stop > v->stops) return "num_stop";
    if (!(a->threshold_acc > 0) || !(a->threshold_single >= 0) || !(a->posterior_threshold >= 0) || !(a->posterior_alpha >= 0))
        return "thresholds";
    if (a->rule != ASSAY_GREEDY && (a->rule == ASSAY_GUMBEL || !a->uniforms) && (!a->seed || !a->position)) return "seed, position";
    if (!is_aligned(a->target_logits, a->dtype == ASSAY_F32 ? 4 : 2) || !is_aligned(a->draft_probs, 4)) return "alignment";
    return NULL;
}

/* Blocks that share a request: as many as there are multiprocessors for it, and blocks of the vocabulary for their warps. */
static int64_t team_of(const assay_cuda_verify_args *v, int64_t sms) {
    if (!needs_team(&v->call)) return 1;
    const int64_t most = (v->block_count + WALK_WARPS - 1) / WALK_WARPS, share = sms / v->call.batch;
    return share < 1 ? 1 : assay_min_i64(share, most);
}

int assay_cuda_verify(const assay_cuda_verify_args *args, void *workspace, size_t workspace_bytes, void *stream) {
    if (args && sizes_are_right(args) && !args->call.batch) return ASSAY_OK;
    const char *wrong = args ? wrong_argument(args) : "args";
    if (wrong) return assay_cuda_fail(ASSAY_EINVAL, "verify: expected arguments as assay.h describes them, got %s", wrong);
    assay_cuda_verify_args v = *args;
    uint8_t *base = (uint8_t *)(((uintptr_t)workspace + 255) & ~(uintptr_t)255);
    if (!workspace || lay_out(&v, base) + 256 > workspace_bytes)
        return assay_cuda_fail(ASSAY_EWORKSPACE, "verify: expected a workspace of %zu bytes, got %zu", lay_out(&v, base) + 256,
                               workspace ? workspace_bytes : (size_t)0);
    const assay_cuda_device *device = NULL;
    int status = assay_cuda_here(&device);
    if (status) return status;
    v.team = team_of(&v, device->sms);

    const int64_t rows = v.drafts + v.call.batch, units = rows * v.block_count;
    const unsigned passes = (unsigned)((units + PASS_WARPS - 1) / PASS_WARPS);
    status = assay_cuda_launch("assay_verify_scan", (unsigned)units, 1, 1, SCAN_SMEM, stream, &v, sizeof v);
    if (!status && v.call.rule != ASSAY_GREEDY && has_filters(&v.call))
        status = assay_cuda_launch("assay_verify_filter", (unsigned)rows, 1, 1, FILTER_SMEM, stream, &v, sizeof v);
    if (!status && v.call.rule == ASSAY_GUMBEL)
        status = assay_cuda_launch("assay_verify_race", passes, 1, 1, 0, stream, &v, sizeof v);
    if (!status && v.call.rule == ASSAY_TYPICAL)
        status = assay_cuda_launch("assay_verify_entropy", passes, 1, 1, 0, stream, &v, sizeof v);
    if (status) return status;
    return assay_cuda_launch(is_chain(&v.call) ? "assay_chain_verify" : "assay_tree_verify", (unsigned)(v.call.batch * v.team), 1, 1,
                             WALK_SMEM, stream, &v, sizeof v);
}

/* Speculative verification: arguments, workspace, trees, which thread does which request, and what becomes of a request's
 * tokens once its rule (spec_rules.c) has said which stand. */
#include "spec_rows.h"

#include <float.h>
#include <math.h>

/* Work (in elements read once) below which sleeping threads are not woken. */
enum { WAKE_ELEMENTS = 1 << 16 };

/* Links the nodes and tells how many are below their limits. Returns a row status. */
static int build_tree(assay_spec_request *r) {
    const assay_verify_args *a = r->call->a;
    const int32_t *ids = a->draft_token_ids + r->first, *parents = a->parents ? a->parents + r->first : NULL;
    r->nodes[0] = (assay_spec_node){0};
    for (int64_t j = 0; j < r->drafts; j++) {
        const int64_t parent = parents ? parents[j] : j - 1;
        assay_spec_node *node = &r->nodes[j + 1];
        *node = (assay_spec_node){.parent = -1};
        if (parent < -1 || parent >= j) return ASSAY_ROW_BAD_TREE;
        assay_spec_node *above = &r->nodes[parent + 1];
        if (ids[j] == -1 || above->parent < 0) continue; /* absent */
        if (ids[j] < -1) return ASSAY_ROW_BAD_ID;
        node->parent = (int32_t)(parent + 1);
        node->depth = above->depth + 1;
        if (above->last_child) {
            r->nodes[above->last_child].next_sibling = (int32_t)(j + 1);
            node->rank = r->nodes[above->last_child].rank + 1;
        } else {
            above->first_child = (int32_t)(j + 1);
        }
        above->last_child = (int32_t)(j + 1);
    }
    return ASSAY_ROW_OK;
}

static int is_stop(const assay_verify_args *a, int64_t b, int32_t token) {
    const int64_t begin = a->cu_stop ? a->cu_stop[b] : 0, end = a->cu_stop ? a->cu_stop[b + 1] : a->num_stop;
    for (int64_t i = begin; i < end; i++)
        if (a->stop_token_ids[i] == token) return 1;
    return 0;
}

static void verify_request(const assay_spec_call *call, int64_t b) {
    const assay_verify_args *a = call->a;
    const int64_t first = a->cu_num_draft_tokens[b];
    assay_spec_request r = {.call = call, .b = b, .first = first, .drafts = a->cu_num_draft_tokens[b + 1] - first, .node = -1,
                            .q_row = -1};
    r.blocks = call->blocks + b * call->block_count;
    r.nodes = call->nodes + first + b;
    r.excluded = call->excluded + first;
    r.edits = a->cu_edits ? call->edits + a->cu_edits[b] + first : NULL;
    r.counters = a->counters + b * ASSAY_COUNTERS;
    r.given = a->uniforms && a->rule != ASSAY_GUMBEL ? a->uniforms + first + 2 * b : NULL;
    const float t = a->temperature[b];
    r.greedy = a->rule == ASSAY_GREEDY || t == 0;
    /* Kept from overflow and underflow, where 0 * infinity would make a NaN. */
    r.inverse_t = r.greedy ? 1 : fminf(fmaxf(1.0f / t, FLT_MIN), FLT_MAX);
    r.sums = a->logprobs || (!r.greedy && (a->rule != ASSAY_GUMBEL || assay_spec_has_filters(&r)));

    int32_t *out = a->output_token_ids + b * a->max_out, *path = a->accept_index + b * (a->max_out - 1);
    float *logprobs = a->logprobs ? a->logprobs + b * a->max_out : NULL;
    const int32_t most = a->max_emit ? a->max_emit[b] : INT32_MAX;
    for (int i = 0; i < ASSAY_COUNTERS; i++) r.counters[i] = 0;
    int32_t accepted = 0, emitted = 0;
    int status = build_tree(&r);
    if (!status && most) {
        status = assay_spec_walk(&r, out, path, logprobs, &accepted);
        emitted = accepted + 1;
    }
    /* Nothing of a request with a poisoned row is emitted, not even what preceded it. */
    if (status) accepted = emitted = 0;
    for (int32_t i = 0; i < emitted; i++)
        if (i + 1 >= most || is_stop(a, b, out[i])) emitted = i + 1;
    for (int64_t i = emitted; i < a->max_out; i++) {
        out[i] = -1;
        if (logprobs) logprobs[i] = NAN;
    }
    for (int64_t i = accepted; i < a->max_out - 1; i++) path[i] = -1;
    a->num_accepted[b] = accepted;
    a->num_emitted[b] = emitted;
    a->status[b] = status;
}

static void verify_requests(void *arg, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) verify_request(arg, b);
}

static int filters(const assay_verify_args *a) { return a->top_k || a->top_p || a->min_p || a->typical_p; }

/* Cuts the workspace into the call's pieces; returns the bytes it takes. */
static size_t lay_out(const assay_verify_args *a, assay_spec_call *call, uint8_t *base) {
    const int64_t drafts = a->cu_num_draft_tokens[a->batch], edits = a->cu_edits ? a->cu_edits[a->batch] + drafts : 0;
    call->block_count = (a->vocab + ASSAY_VOCAB_BLOCK - 1) / ASSAY_VOCAB_BLOCK;
    size_t at = 0;
#define PIECE(name, type, count) \
    call->name = (type *)((uintptr_t)base + at); \
    at += (size_t)assay_round_up((int64_t)sizeof(type) * (count), 64)
    PIECE(blocks, assay_spec_block, a->batch * call->block_count);
    PIECE(nodes, assay_spec_node, drafts + a->batch);
    PIECE(excluded, int32_t, drafts);
    PIECE(edits, assay_spec_edit, edits);
    PIECE(candidates, assay_spec_candidates, filters(a) ? a->batch : 0);
#undef PIECE
    return at;
}

static int sizes_are_right(const assay_verify_args *a) {
    if (!a || a->batch < 0 || a->batch > INT32_MAX || a->vocab < 1 || a->vocab > INT32_MAX || !a->cu_num_draft_tokens ||
        a->cu_num_draft_tokens[0] != 0)
        return 0;
    for (int64_t b = 0; b < a->batch; b++) {
        if (a->cu_num_draft_tokens[b + 1] < a->cu_num_draft_tokens[b]) return 0;
        if (a->cu_edits && (a->cu_edits[b + 1] < a->cu_edits[b] || a->cu_edits[0] != 0)) return 0;
    }
    return 1;
}

static int is_penalty(float x) { return x > 0 && x <= FLT_MAX; }

/* Everything that decides what is read and written, once a call. */
static int arguments_are_right(const assay_verify_args *a, int *sampled) {
    if (a->dtype < ASSAY_F32 || a->dtype > ASSAY_BF16 || a->ld < a->vocab) return 0;
    if (a->rule < ASSAY_GREEDY || a->rule > ASSAY_TRAVERSAL_WITHOUT_REPLACEMENT) return 0;
    if (!a->target_logits || !a->temperature || !a->output_token_ids || !a->num_accepted || !a->num_emitted || !a->status ||
        !a->accept_index || !a->counters)
        return 0;
    if (a->cu_num_draft_tokens[a->batch] && !a->draft_token_ids) return 0;
    if (a->parents && (a->rule == ASSAY_REJECTION || a->rule == ASSAY_BLOCK)) return 0;
    if (a->draft_prob_ids && (!a->draft_prob_values || a->draft_prob_width < 0)) return 0;
    if (a->draft_probs && a->draft_prob_ids) return 0;
    if (a->rule == ASSAY_KSEQ && !a->draft_probs && !a->draft_prob_ids) return 0;
    if (a->repetition_penalty && (!a->frequency_penalty || !a->presence_penalty || !a->cu_edits)) return 0;
    if (a->cu_edits && a->cu_edits[a->batch] && (!a->edit_token_ids || !a->edit_bias || !a->edit_in_prompt || !a->edit_count))
        return 0;
    if (a->bitmask && a->bitmask_ld < (a->vocab + 31) / 32) return 0;
    if (a->rule == ASSAY_TARGET_ONLY && (!(a->threshold_acc > 0) || !(a->threshold_single >= 0))) return 0;
    if (a->rule == ASSAY_TYPICAL && (!(a->posterior_threshold >= 0) || !(a->posterior_alpha >= 0))) return 0;
    for (int64_t b = 0; b < a->batch; b++) {
        if ((int64_t)a->cu_num_draft_tokens[b + 1] - a->cu_num_draft_tokens[b] + 1 > a->max_out) return 0;
        if (!(a->temperature[b] >= 0 && a->temperature[b] <= FLT_MAX)) return 0;
        if (a->repetition_penalty && !is_penalty(a->repetition_penalty[b])) return 0;
        if (a->max_emit && a->max_emit[b] < 0) return 0;
        *sampled |= a->rule != ASSAY_GREEDY && a->temperature[b] > 0;
    }
    for (int64_t i = 0; a->cu_edits && i < a->cu_edits[a->batch]; i++)
        if (a->edit_token_ids[i] < 0 || a->edit_token_ids[i] >= a->vocab) return 0;
    if (*sampled && !a->uniforms && (!a->seed || !a->position)) return 0;
    return 1;
}

size_t assay_verify_workspace(const assay_verify_args *a) {
    assay_spec_call call;
    return sizes_are_right(a) ? lay_out(a, &call, NULL) + 64 : 0;
}

int assay_verify(const assay_verify_args *a, int variant, int num_threads, void *workspace, size_t workspace_bytes) {
    if (!sizes_are_right(a) || num_threads < 0) return ASSAY_EINVAL;
    const assay_spec_verify_kernel *kernel = assay_select(ASSAY_OP_spec_verify, variant);
    if (!kernel) return ASSAY_EISA;
    if (!a->batch) return ASSAY_OK;
    int sampled = 0;
    if (!arguments_are_right(a, &sampled)) return ASSAY_EINVAL;
    assay_spec_call call = {.a = a, .kernel = kernel};
    uint8_t *base = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    if (!workspace || lay_out(a, &call, base) + 64 > workspace_bytes) return ASSAY_EWORKSPACE;
    if (!filters(a)) call.candidates = NULL;

    const int threads = num_threads ? num_threads : assay_num_threads();
    /* Enough requests: one a thread at a time. Few: threads share each row. */
    if (threads == 1 || a->batch < threads) {
        call.threads = threads;
        verify_requests(&call, 0, a->batch);
        return ASSAY_OK;
    }
    call.threads = 1;
    const int wake = a->batch * a->vocab * (sampled ? 4 : 1) >= WAKE_ELEMENTS;
    return assay_parallel_for(verify_requests, &call, a->batch, threads, wake);
}

/* Processors and filters: what a row's logits become before their softmax.
 *
 * Penalties, bias and bans touch few tokens: a sorted list of them (edits), which the draft's own path extends, lies over a
 * block when it is loaded; a bitmask is applied to the whole block. What filters leave is a range of logits, and of those at
 * its ends the first ids (spec_filter.c finds it). Nothing as wide as the vocabulary is stored. */
#include "spec_rows.h"

#include "cpu/float16.h"
#include "cpu/vexp.h"

static float repetition(const assay_spec_request *r) {
    const assay_verify_args *a = r->call->a;
    return a->repetition_penalty ? a->repetition_penalty[r->b] : 1;
}

float assay_spec_edited(const assay_spec_request *r, const assay_spec_edit *edit, float logit) {
    const assay_verify_args *a = r->call->a;
    if (a->repetition_penalty) {
        const float penalty = a->repetition_penalty[r->b];
        if (edit->seen && penalty != 1) logit = logit > 0 ? logit / penalty : logit * penalty;
        if (edit->count) {
            logit -= a->frequency_penalty[r->b] * (float)edit->count;
            logit -= a->presence_penalty[r->b];
        }
    }
    return logit + edit->bias;
}

/* The first edit of this token or a greater one. */
static int64_t first_edit(const assay_spec_request *r, int64_t token) {
    int64_t low = 0, high = r->edit_count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (r->edits[middle].token < token) low = middle + 1;
        else high = middle;
    }
    return low;
}

void assay_spec_path_edits(assay_spec_request *r, int64_t node) {
    const assay_verify_args *a = r->call->a;
    const int64_t begin = a->cu_edits[r->b], count = a->cu_edits[r->b + 1] - begin;
    for (int64_t i = 0; i < count; i++)
        r->edits[i] = (assay_spec_edit){a->edit_token_ids[begin + i], a->edit_count[begin + i],
                                        a->edit_in_prompt[begin + i] || a->edit_count[begin + i], a->edit_bias[begin + i]};
    r->edit_count = count;
    if (!a->repetition_penalty || (repetition(r) == 1 && a->frequency_penalty[r->b] == 0 && a->presence_penalty[r->b] == 0))
        return;
    for (; node > 0; node = r->nodes[node].parent) {
        const int32_t token = a->draft_token_ids[r->first + node - 1];
        const int64_t at = first_edit(r, token);
        if (at == r->edit_count || r->edits[at].token != token) {
            for (int64_t i = r->edit_count; i > at; i--) r->edits[i] = r->edits[i - 1];
            r->edits[at] = (assay_spec_edit){token, 0, 0, 0};
            r->edit_count++;
        }
        r->edits[at].count++;
        r->edits[at].seen = 1;
    }
}

/* ---- what filters leave ------------------------------------------------------------------------------- */

static float cut_element(const assay_spec_request *r, float logit, int64_t id) {
    const int cuts = r->s.cuts;
    if (cuts & CUT_LOGITS && !assay_spec_inside(&r->s.by_logit, logit, id)) return -INFINITY;
    if (cuts & CUT_MIN_P && !(assay_vexp((logit - r->s.top) * r->inverse_t) >= r->call->a->min_p[r->b])) return -INFINITY;
    if (cuts & CUT_TYPICAL && !assay_spec_inside(&r->s.by_distance, logit, id)) return -INFINITY;
    return logit;
}

/* A range for the elements from `from` on. */
static assay_range moved(const assay_range *range, int64_t from) {
    assay_range m = *range;
    m.last -= from;
    return m;
}

float assay_spec_element(const assay_spec_request *r, int64_t token) {
    float logit = assay_load_f32(r->logits, r->call->a->dtype, token);
    if (r->edit_count) {
        const int64_t at = first_edit(r, token);
        if (at < r->edit_count && r->edits[at].token == token) logit = assay_spec_edited(r, &r->edits[at], logit);
    }
    if (r->mask && !(r->mask[token >> 5] >> (token & 31) & 1)) logit = -INFINITY;
    return r->s.cuts ? cut_element(r, logit, token) : logit;
}

const void *assay_spec_view(const assay_spec_request *r, int64_t b, float *buffer, int *dtype) {
    static const assay_range all = {-INFINITY, INFINITY, INFINITY, -INFINITY, -1};
    const assay_spec_verify_kernel *k = r->call->kernel;
    const int64_t from = b * ASSAY_VOCAB_BLOCK, n = assay_spec_block_length(r, b);
    const void *raw = assay_spec_raw(r, b);
    *dtype = r->call->a->dtype;
    if (!r->processed && !r->s.cuts) return raw;
    const assay_range first = r->s.cuts & CUT_LOGITS ? moved(&r->s.by_logit, from) : all;
    if (r->processed) {
        if (*dtype == ASSAY_F32) memcpy(buffer, raw, (size_t)n * 4);
        else k->keep(raw, *dtype, n, &all, buffer);
        for (int64_t at = first_edit(r, from); at < r->edit_count && r->edits[at].token < from + n; at++)
            buffer[r->edits[at].token - from] = assay_spec_edited(r, &r->edits[at], buffer[r->edits[at].token - from]);
        if (r->mask) {
            const uint32_t *mask = r->mask + from / 32;
            for (int64_t i = 0; i < n; i++) buffer[i] = mask[i >> 5] >> (i & 31) & 1 ? buffer[i] : -INFINITY;
        }
        if (r->s.cuts & CUT_LOGITS) k->keep(buffer, ASSAY_F32, n, &first, buffer);
    } else {
        k->keep(raw, *dtype, n, &first, buffer);
    }
    *dtype = ASSAY_F32;
    if (r->s.cuts & CUT_MIN_P) {
        _Alignas(64) float weights[ASSAY_VOCAB_BLOCK];
        const float least = r->call->a->min_p[r->b];
        k->weights(buffer, ASSAY_F32, n, r->s.top, r->inverse_t, weights);
        for (int64_t i = 0; i < n; i++) buffer[i] = weights[i] >= least ? buffer[i] : -INFINITY;
    }
    if (r->s.cuts & CUT_TYPICAL) {
        const assay_range second = moved(&r->s.by_distance, from);
        k->keep(buffer, ASSAY_F32, n, &second, buffer);
    }
    return buffer;
}


/* The rules of verification (assay.h states them): one request, from the root of its tree. */
#include "spec_rows.h"

#include "cpu/vexp.h"

#include <float.h>

static int32_t id_of(const assay_spec_request *r, int64_t node) { return r->call->a->draft_token_ids[r->first + node - 1]; }

static int has_q(const assay_spec_request *r) { return r->call->a->draft_probs || r->call->a->draft_prob_ids; }

static double accept_uniform(const assay_spec_request *r, int64_t node) {
    const assay_spec_node *n = &r->nodes[node];
    const int traversal = r->call->a->rule >= ASSAY_TRAVERSAL;
    return assay_spec_uniform(r, ASSAY_ACCEPT, node, n->depth - 1,
                              traversal ? (uint32_t)(node - 1) : (uint32_t)n->rank);
}

static double residual_uniform(const assay_spec_request *r, int64_t node) {
    return assay_spec_uniform(r, ASSAY_RESIDUAL, 0, r->nodes[node].depth, 0);
}

static double bonus_uniform(const assay_spec_request *r, int64_t node) {
    return assay_spec_uniform(r, ASSAY_BONUS, 0, r->nodes[node].depth, 0);
}

/* What a rule says at a node: the child to descend to, or 0 and the token that ends the walk. */
typedef struct {
    int64_t child;
    int32_t token;
    int status;
} decision;

static decision emit(int32_t token) { return (decision){0, token, ASSAY_ROW_OK}; }
static decision descend(int64_t child) { return (decision){child, -1, ASSAY_ROW_OK}; }
static decision fail(int status) { return (decision){0, -1, status}; }

/* q of a draft id, checked. */
static int draft_probability(assay_spec_request *r, int32_t id, double *q) {
    *q = assay_spec_q(r, id);
    if (!(*q >= 0 && *q <= FLT_MAX)) return ASSAY_ROW_NAN;
    if (*q == 0 && id < r->call->a->vocab) r->counters[ASSAY_ZERO_DRAFTS]++;
    return ASSAY_ROW_OK;
}

static decision draw_empty(assay_spec_request *r, int64_t node) {
    r->counters[ASSAY_EMPTY_RESIDUALS]++;
    return emit(assay_spec_draw(r, residual_uniform(r, node)));
}

static decision match(const assay_spec_request *r, int64_t node, int32_t token) {
    for (int64_t child = r->nodes[node].first_child; child; child = r->nodes[child].next_sibling)
        if (id_of(r, child) == token) return descend(child);
    return emit(token);
}

/* Whether an older sibling has the same id: what was drawn without replacement has none, and a repeated one is passed over. */
static int repeats(const assay_spec_request *r, int64_t child) {
    for (int64_t older = r->nodes[r->nodes[child].parent].first_child; older != child; older = r->nodes[older].next_sibling)
        if (id_of(r, older) == id_of(r, child)) return 1;
    return 0;
}

/* Siblings of one-hot distributions: each rejected one leaves the target. */
static decision one_hot_siblings(assay_spec_request *r, int64_t node) {
    double share = 1;
    r->excluded_count = 0;
    for (int64_t child = r->nodes[node].first_child; child; child = r->nodes[child].next_sibling) {
        const int32_t id = id_of(r, child);
        double p = (double)assay_spec_probability(r, id);
        for (int64_t i = 0; i < r->excluded_count; i++)
            if (r->excluded[i] == id) p = 0;
        if (accept_uniform(r, child) * share < p) return descend(child);
        if (id < r->call->a->vocab) r->excluded[r->excluded_count++] = id;
        if (r->nodes[child].next_sibling) share = assay_spec_mass_without(r) / r->s.total;
        if (!(share > 0)) break;
    }
    const int32_t token = assay_spec_draw_without(r, residual_uniform(r, node));
    return token < 0 ? draw_empty(r, node) : emit(token);
}

static decision siblings(assay_spec_request *r, int64_t node, int replaced) {
    if (!has_q(r)) return one_hot_siblings(r, node);
    double a = 1, c = 0, step = 1, drawn = 0, total = 0;
    r->q_row = r->first + r->nodes[node].first_child - 1;
    for (int64_t child = r->nodes[node].first_child; child; child = r->nodes[child].next_sibling) {
        const int32_t id = id_of(r, child);
        double q;
        if (!replaced && repeats(r, child)) continue;
        const int status = draft_probability(r, id, &q);
        if (status) return fail(status);
        if (accept_uniform(r, child) * (step * q) < a * (double)assay_spec_probability(r, id) - c * q) return descend(child);
        c += step;
        total = assay_spec_residual(r, a, c);
        if (isnan(total)) return fail(ASSAY_ROW_NAN);
        if (!(total > 0)) return draw_empty(r, node);
        if (!replaced) {
            drawn += q;
            if (!(drawn < 1)) break; /* nothing was left to draw another from */
            step = 1 / (1 - drawn);
        }
        a /= total;
        c /= total;
    }
    return emit(assay_spec_draw_residual(r, residual_uniform(r, node) * total));
}

static decision target_only(assay_spec_request *r, int64_t node) {
    const assay_verify_args *a = r->call->a;
    const double u = accept_uniform(r, r->nodes[node].first_child);
    double reached = 0;
    r->excluded_count = 0;
    for (int64_t child = r->nodes[node].first_child; child; child = r->nodes[child].next_sibling) {
        const int32_t id = id_of(r, child);
        int known = id >= a->vocab;
        for (int64_t i = 0; i < r->excluded_count; i++) known |= r->excluded[i] == id;
        if (known) continue;
        const double p = (double)assay_spec_probability(r, id);
        reached += p;
        if (p > 0 && (u < reached / a->threshold_acc || p >= a->threshold_single)) return descend(child);
        r->excluded[r->excluded_count++] = id;
    }
    const int32_t token = assay_spec_draw_without(r, residual_uniform(r, node));
    return token < 0 ? draw_empty(r, node) : emit(token);
}

static decision kseq(assay_spec_request *r, int64_t node) {
    int64_t count = 0;
    for (int64_t child = r->nodes[node].first_child; child; child = r->nodes[child].next_sibling) count++;
    r->q_row = r->first + r->nodes[node].first_child - 1;
    const double rho = assay_spec_kseq_rho(r, count);
    if (isnan(rho)) return fail(ASSAY_ROW_NAN);
    for (int64_t child = r->nodes[node].first_child; child; child = r->nodes[child].next_sibling) {
        double q;
        const int status = draft_probability(r, id_of(r, child), &q);
        if (status) return fail(status);
        if (accept_uniform(r, child) * (rho * q) < (double)assay_spec_probability(r, id_of(r, child))) return descend(child);
    }
    const double rest = assay_spec_residual(r, 1 / rho, 1);
    if (isnan(rest)) return fail(ASSAY_ROW_NAN);
    const double beta = 1 / rho - rest;
    /* p - gamma min(q, p / rho) = (1 - gamma / rho) p + gamma (p / rho - q)+ */
    const double gamma = beta > 0 ? assay_spec_any_of(beta, count) / beta : (double)count;
    const double of_p = gamma < rho ? 1 - gamma / rho : 0, of_rest = gamma * rest;
    if (!(of_p + of_rest > 0)) return draw_empty(r, node);
    const double u = residual_uniform(r, node) * (of_p + of_rest);
    if (u < of_p || !(rest > 0)) return emit(assay_spec_draw(r, u < of_p ? u / of_p : 1 - 0x1p-53));
    return emit(assay_spec_draw_residual(r, (u - of_p) / gamma));
}

static decision decide(assay_spec_request *r, int64_t node) {
    const assay_verify_args *a = r->call->a;
    if (r->greedy) return match(r, node, assay_spec_argmax(r));
    if (a->rule == ASSAY_GUMBEL) return match(r, node, assay_spec_race(r));
    if (a->rule == ASSAY_SAMPLED) return match(r, node, assay_spec_draw(r, bonus_uniform(r, node)));
    if (!r->nodes[node].first_child) return emit(assay_spec_draw(r, bonus_uniform(r, node)));
    switch (a->rule) {
    case ASSAY_TARGET_ONLY: return target_only(r, node);
    case ASSAY_KSEQ: return kseq(r, node);
    default:
        return siblings(r, node, a->rule != ASSAY_SPECINFER_WITHOUT_REPLACEMENT &&
                                     a->rule != ASSAY_TRAVERSAL_WITHOUT_REPLACEMENT);
    }
}

/* ---- typical acceptance: every node whose parent stands is tried, the best path is taken ------------------- */

static int typical(assay_spec_request *r, int64_t *last) {
    const assay_verify_args *a = r->call->a;
    int64_t best = 0;
    r->nodes[0].score = 0;
    for (int64_t i = 0; i <= r->drafts; i++) r->nodes[i].cursor = i == 0;
    for (int64_t node = 0; node <= r->drafts; node++) {
        assay_spec_node *n = &r->nodes[node];
        if (!n->cursor) continue; /* cursor: it stands */
        if (n->depth > r->nodes[best].depth || (n->depth == r->nodes[best].depth && n->score > r->nodes[best].score)) best = node;
        if (!n->first_child) continue;
        const int status = assay_spec_open(r, node, 1);
        if (status) return status;
        double total;
        const double mean = assay_spec_mean_exponent(r, &total);
        const double bound = a->posterior_alpha * (double)assay_vexp((float)mean) / total;
        const double threshold = bound < a->posterior_threshold ? bound : a->posterior_threshold;
        for (int64_t child = n->first_child; child; child = r->nodes[child].next_sibling) {
            const int32_t id = id_of(r, child);
            if (!((double)assay_spec_probability(r, id) > threshold)) continue;
            r->nodes[child].cursor = 1;
            r->nodes[child].score = n->score + (float)assay_spec_log_probability(r, id);
        }
    }
    *last = best;
    const int status = assay_spec_open(r, best, 1);
    return status;
}

/* ---- traversal: leaf to root ---------------------------------------------------------------------------------- */

/* P of a child, from its parent's A, C and what its q counts now. */
static int chance(assay_spec_request *r, int64_t parent, int64_t child, int replaced) {
    const assay_spec_node *n = &r->nodes[parent];
    const int32_t id = id_of(r, child);
    double q;
    const int status = draft_probability(r, id, &q);
    if (status) return status;
    const double above = n->a * (double)assay_spec_probability(r, id) - n->c * q;
    const double below = replaced ? q : q / (1 - n->drawn);
    double p = 0;
    if (above > 0) p = above < below ? above / below : 1;
    assay_spec_node *m = &r->nodes[child];
    m->p = m->a = p;
    m->c = m->drawn = 0;
    m->cursor = m->first_child;
    return ASSAY_ROW_OK;
}

/* Takes a rejected child from its parent. */
static int removed(assay_spec_request *r, int64_t parent, int64_t child, int replaced) {
    assay_spec_node *n = &r->nodes[parent];
    n->c += replaced ? 1 : 1 / (1 - n->drawn);
    const double rest = assay_spec_residual(r, n->a, n->c);
    if (isnan(rest)) return ASSAY_ROW_NAN;
    const double below = rest + 1 - n->p;
    n->p = below > 0 ? rest / below : 1;
    if (below > 0) {
        n->a /= below;
        n->c /= below;
    }
    n->drawn += assay_spec_q(r, id_of(r, child));
    n->cursor = r->nodes[child].next_sibling;
    if (!replaced && !(n->drawn < 1)) n->cursor = 0; /* nothing was left to draw another from */
    return ASSAY_ROW_OK;
}

static int traverse(assay_spec_request *r, int replaced, int64_t *last, int32_t *token) {
    int64_t node = 0;
    r->nodes[0].a = r->nodes[0].p = 1;
    r->nodes[0].c = r->nodes[0].drawn = 0;
    r->nodes[0].cursor = r->nodes[0].first_child;
    for (;;) {
        assay_spec_node *n = &r->nodes[node];
        int status = ASSAY_ROW_OK;
        if (n->cursor) {
            const int64_t child = n->cursor;
            if (!replaced && repeats(r, child)) {
                n->cursor = r->nodes[child].next_sibling;
                continue;
            }
            if ((status = assay_spec_open(r, node, 0))) return status;
            r->q_row = r->first + n->first_child - 1;
            if ((status = chance(r, node, child, replaced))) return status;
            if (r->nodes[child].p > 0) {
                node = child;
                continue;
            }
            if ((status = removed(r, node, child, replaced))) return status;
            continue;
        }
        if (!node || accept_uniform(r, node) < n->p) break;
        const int64_t parent = n->parent;
        if ((status = assay_spec_open(r, parent, 0))) return status;
        r->q_row = r->first + r->nodes[parent].first_child - 1;
        if ((status = removed(r, parent, node, replaced))) return status;
        node = parent;
    }
    assay_spec_node *n = &r->nodes[node];
    *last = node;
    const int untouched = !n->first_child;
    int status = assay_spec_open(r, node, untouched);
    if (status) return status;
    if (untouched) {
        *token = assay_spec_draw(r, bonus_uniform(r, node));
        return ASSAY_ROW_OK;
    }
    r->q_row = r->first + n->first_child - 1;
    const double rest = assay_spec_residual(r, n->a, n->c);
    if (isnan(rest)) return ASSAY_ROW_NAN;
    if (rest > 0) {
        *token = assay_spec_draw_residual(r, residual_uniform(r, node) * rest);
        return ASSAY_ROW_OK;
    }
    if ((status = assay_spec_open(r, node, 1))) return status;
    *token = draw_empty(r, node).token;
    return ASSAY_ROW_OK;
}

/* ---- the walk ---------------------------------------------------------------------------------------------------- */

/* Writes the tokens and nodes from the root down to `node`, whose rows were all read. */
static int write_path(assay_spec_request *r, int64_t node, int32_t *out, int32_t *path, float *logprobs) {
    for (int64_t at = node; at > 0; at = r->nodes[at].parent) {
        const int32_t depth = r->nodes[at].depth - 1;
        out[depth] = id_of(r, at);
        path[depth] = (int32_t)at - 1;
        if (logprobs) {
            const int status = assay_spec_open(r, r->nodes[at].parent, 0);
            if (status) return status;
            logprobs[depth] = (float)assay_spec_log_probability(r, out[depth]);
        }
    }
    return ASSAY_ROW_OK;
}

int assay_spec_walk(assay_spec_request *r, int32_t *out, int32_t *path, float *logprobs, int32_t *accepted) {
    const int32_t rule = r->call->a->rule;
    const int leaf_first = rule == ASSAY_TRAVERSAL || rule == ASSAY_TRAVERSAL_WITHOUT_REPLACEMENT || rule == ASSAY_BLOCK;
    int64_t node = 0;
    int32_t token;
    int status;
    if (!r->greedy && ((leaf_first && has_q(r)) || rule == ASSAY_TYPICAL)) {
        if (rule == ASSAY_TYPICAL) {
            if ((status = typical(r, &node))) return status;
            token = assay_spec_draw(r, bonus_uniform(r, node));
        } else if ((status = traverse(r, rule != ASSAY_TRAVERSAL_WITHOUT_REPLACEMENT, &node, &token))) {
            return status;
        }
        *accepted = r->nodes[node].depth;
        out[*accepted] = token;
        if (logprobs) logprobs[*accepted] = (float)assay_spec_log_probability(r, token);
        return write_path(r, node, out, path, logprobs);
    }
    for (*accepted = 0;; (*accepted)++) {
        if ((status = assay_spec_open(r, node, 1))) return status;
        const decision d = decide(r, node);
        if (d.status) return d.status;
        out[*accepted] = d.child ? id_of(r, d.child) : d.token;
        if (logprobs) logprobs[*accepted] = (float)assay_spec_log_probability(r, out[*accepted]);
        if (!d.child) return ASSAY_ROW_OK;
        path[*accepted] = (int32_t)d.child - 1;
        node = d.child;
    }
}

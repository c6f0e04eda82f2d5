// The rules of verification on trees (assay.h states them), as csrc/spec_rules.c has them: every sum and comparison in the same
// order. All by the leading warp, whose lanes agree; what it stores of a node, lane 0 does.
#ifndef ASSAY_CUDA_TREE_RULES_CUH
#define ASSAY_CUDA_TREE_RULES_CUH

#include "verify_walk.cuh"

namespace assay {

constexpr int kKseqSteps = 16;

struct Walk {
    Lead lead;
    int32_t zero_drafts;
};

// What a rule says at a node: the child to descend to, or 0 and the token that ends the walk.
struct Decision {
    int64_t child;
    int32_t token, status;
};
ASSAY_DEVICE Decision emit(int32_t token) { return {0, token, ASSAY_ROW_OK}; }
ASSAY_DEVICE Decision descend(int64_t child) { return {child, -1, ASSAY_ROW_OK}; }
ASSAY_DEVICE Decision fail(int32_t status) { return {0, -1, status}; }

ASSAY_DEVICE assay_cuda_node *nodes_of(const VerifyArgs &a, const Request &r) { return a.nodes + r.first + r.b; }

template <class T, class V>
ASSAY_DEVICE void set(T *field, V value) {
    if (ptx::lane() == 0) *field = static_cast<T>(value);
}

ASSAY_DEVICE bool is_traversal(const VerifyArgs &a) { return a.call.rule >= ASSAY_TRAVERSAL; }
ASSAY_DEVICE bool is_replaced(const VerifyArgs &a) {
    return a.call.rule != ASSAY_SPECINFER_WITHOUT_REPLACEMENT && a.call.rule != ASSAY_TRAVERSAL_WITHOUT_REPLACEMENT;
}

ASSAY_DEVICE double accept_uniform(const VerifyArgs &a, const Request &r, int64_t node) {
    const assay_cuda_node &n = nodes_of(a, r)[node];
    return uniform_of(a, r, ASSAY_ACCEPT, node, n.depth - 1, static_cast<uint32_t>(is_traversal(a) ? node - 1 : n.rank));
}
ASSAY_DEVICE double residual_uniform(const VerifyArgs &a, const Request &r, int64_t node) {
    return uniform_of(a, r, ASSAY_RESIDUAL, 0, nodes_of(a, r)[node].depth, 0);
}
ASSAY_DEVICE double bonus_uniform(const VerifyArgs &a, const Request &r, int64_t node) {
    return uniform_of(a, r, ASSAY_BONUS, 0, nodes_of(a, r)[node].depth, 0);
}

// A node's row, counted the first time.
ASSAY_DEVICE Opened open_node(const VerifyArgs &a, const Request &r, Walk *w, int64_t node) {
    assay_cuda_node *n = nodes_of(a, r) + node;
    if (!n->read) w->lead.rows_read++;
    ptx::sync_warp();
    set(&n->read, 1);
    ptx::sync_warp();
    return open_row(a, r, node);
}

ASSAY_DEVICE double drafted(const VerifyArgs &a, Walk *w, int64_t q_row, int32_t id) {
    const double q = q_of(a, q_row, id);
    if (q == 0 && id < a.call.vocab) w->zero_drafts++;
    return q;
}

ASSAY_DEVICE int64_t q_row_of(const VerifyArgs &a, const Request &r, int64_t node) {
    return r.first + nodes_of(a, r)[node].first_child - 1;
}

ASSAY_DEVICE Decision draw_empty(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w) {
    w->lead.empty_residuals++;
    return emit(draw(a, r, o, residual_uniform(a, r, o.row.node)));
}

ASSAY_DEVICE Decision match(const VerifyArgs &a, const Request &r, int64_t node, int32_t token) {
    const assay_cuda_node *nodes = nodes_of(a, r);
    for (int64_t child = nodes[node].first_child; child; child = nodes[child].next_sibling)
        if (id_of(a, r, child) == token) return descend(child);
    return emit(token);
}

// Whether an older sibling has the same id.
ASSAY_DEVICE bool repeats(const VerifyArgs &a, const Request &r, int64_t child) {
    const assay_cuda_node *nodes = nodes_of(a, r);
    for (int64_t older = nodes[nodes[child].parent].first_child; older != child; older = nodes[older].next_sibling)
        if (id_of(a, r, older) == id_of(a, r, child)) return true;
    return false;
}

// A token of p without the excluded ones.
ASSAY_DEVICE Decision draw_rest(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w) {
    const int32_t token = draw_without(a, r, o, &w->lead, residual_uniform(a, r, o.row.node));
    return token < 0 ? draw_empty(a, r, o, w) : emit(token);
}

// Siblings of one-hot distributions: each rejected one leaves the target.
ASSAY_DEVICE Decision one_hot_siblings(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w) {
    const assay_cuda_node *nodes = nodes_of(a, r);
    double share = 1;
    w->lead.excluded = 0;
    for (int64_t child = nodes[o.row.node].first_child; child; child = nodes[child].next_sibling) {
        const int32_t id = id_of(a, r, child);
        const double p = is_excluded(a, r, &w->lead, id) ? 0 : static_cast<double>(probability_of(a, r, o, id));
        if (accept_uniform(a, r, child) * share < p) return descend(child);
        if (id < a.call.vocab) exclude(a, r, &w->lead, id);
        if (nodes[child].next_sibling) share = ptx::div_rn(mass_without(a, r, o, &w->lead), o.state.total);
        if (!(share > 0)) break;
    }
    return draw_rest(a, r, o, w);
}

ASSAY_DEVICE Decision siblings(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w) {
    const assay_cuda_node *nodes = nodes_of(a, r);
    const bool replaced = is_replaced(a);
    const int64_t q_row = q_row_of(a, r, o.row.node);
    double A = 1, C = 0, step = 1, gone = 0, total = 0;
    Residual x = {};
    for (int64_t child = nodes[o.row.node].first_child; child; child = nodes[child].next_sibling) {
        const int32_t id = id_of(a, r, child);
        if (!replaced && repeats(a, r, child)) continue;
        const double q = drafted(a, w, q_row, id);
        if (!is_probability(q)) return fail(ASSAY_ROW_NAN);
        const double p = static_cast<double>(probability_of(a, r, o, id));
        if (accept_uniform(a, r, child) * (step * q) < A * p - C * q) return descend(child);
        C += step;
        total = residual_of(a, r, o, q_row, A, C, &w->lead, &x);
        if (is_nan(total)) return fail(ASSAY_ROW_NAN);
        if (!(total > 0)) return draw_empty(a, r, o, w);
        if (!replaced) {
            gone += q;
            if (!(gone < 1)) break;   // nothing was left to draw another from
            step = ptx::div_rn(1.0, 1 - gone);
        }
        A = ptx::div_rn(A, total);
        C = ptx::div_rn(C, total);
    }
    return emit(draw_residual(a, r, o, x, residual_uniform(a, r, o.row.node) * total));
}

ASSAY_DEVICE Decision target_only(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w) {
    const assay_cuda_node *nodes = nodes_of(a, r);
    const double u = accept_uniform(a, r, nodes[o.row.node].first_child);
    double reached = 0;
    w->lead.excluded = 0;
    for (int64_t child = nodes[o.row.node].first_child; child; child = nodes[child].next_sibling) {
        const int32_t id = id_of(a, r, child);
        if (id >= a.call.vocab || is_excluded(a, r, &w->lead, id)) continue;
        const double p = static_cast<double>(probability_of(a, r, o, id));
        reached += p;
        if (p > 0 && (u < ptx::div_rn(reached, a.call.threshold_acc) || p >= a.call.threshold_single)) return descend(child);
        exclude(a, r, &w->lead, id);
    }
    return draw_rest(a, r, o, w);
}

// 1 - (1 - beta)^count.
ASSAY_DEVICE double any_of(double beta, int32_t count) {
    double none = 1;
    for (int32_t i = 0; i < count; i++) none *= 1 - beta;
    return 1 - none;
}

ASSAY_DEVICE Decision kseq(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w) {
    const assay_cuda_node *nodes = nodes_of(a, r);
    const int32_t count = nodes[o.row.node].children;
    const int64_t q_row = q_row_of(a, r, o.row.node);
    Residual x;
    // beta(rho) = sum min(q, p / rho) = 1 / rho - |R(1 / rho, 1)|.
    double low = 1, rho = static_cast<double>(count);
    for (int i = 0; i < kKseqSteps && count > 1; i++) {
        const double middle = (low + rho) / 2, share = ptx::div_rn(1.0, middle);
        const double rest = residual_of(a, r, o, q_row, share, 1, &w->lead, &x);
        if (is_nan(rest)) return fail(ASSAY_ROW_NAN);
        const double beta = share - rest;
        if (any_of(beta, count) > middle * beta) low = middle;
        else rho = middle;
    }
    for (int64_t child = nodes[o.row.node].first_child; child; child = nodes[child].next_sibling) {
        const int32_t id = id_of(a, r, child);
        const double q = drafted(a, w, q_row, id);
        if (!is_probability(q)) return fail(ASSAY_ROW_NAN);
        if (accept_uniform(a, r, child) * (rho * q) < static_cast<double>(probability_of(a, r, o, id))) return descend(child);
    }
    const double share = ptx::div_rn(1.0, rho), rest = residual_of(a, r, o, q_row, share, 1, &w->lead, &x);
    if (is_nan(rest)) return fail(ASSAY_ROW_NAN);
    const double beta = share - rest;
    // p - gamma min(q, p / rho) = (1 - gamma / rho) p + gamma (p / rho - q)+
    const double gamma = beta > 0 ? ptx::div_rn(any_of(beta, count), beta) : static_cast<double>(count);
    const double of_p = gamma < rho ? 1 - ptx::div_rn(gamma, rho) : 0, of_rest = gamma * rest;
    if (!(of_p + of_rest > 0)) return draw_empty(a, r, o, w);
    const double u = residual_uniform(a, r, o.row.node) * (of_p + of_rest);
    if (u < of_p || !(rest > 0)) return emit(draw(a, r, o, u < of_p ? ptx::div_rn(u, of_p) : 1 - 0x1p-53));
    return emit(draw_residual(a, r, o, x, ptx::div_rn(u - of_p, gamma)));
}

ASSAY_DEVICE Decision decide(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w) {
    const int64_t node = o.row.node;
    if (draws_and_matches(a, r)) {
        if (!r.greedy && a.call.rule == ASSAY_GUMBEL) w->lead.rows_resampled++;
        return match(a, r, node, o.state.token);
    }
    if (!nodes_of(a, r)[node].first_child) return emit(draw(a, r, o, bonus_uniform(a, r, node)));
    if (a.call.rule == ASSAY_TARGET_ONLY) return target_only(a, r, o, w);
    if (a.call.rule == ASSAY_KSEQ) return kseq(a, r, o, w);
    return has_q(a) ? siblings(a, r, o, w) : one_hot_siblings(a, r, o, w);
}

// ---- typical acceptance: every node whose parent stands is tried, the best path is taken ------------------------

ASSAY_DEVICE int32_t typical(const VerifyArgs &a, const Request &r, Walk *w, int64_t *last) {
    assay_cuda_node *nodes = nodes_of(a, r);
    int64_t best = 0;
    for (int64_t i = ptx::lane(); i <= r.drafts; i += 32) nodes[i].cursor = i == 0;   // it stands
    ptx::sync_warp();
    for (int64_t node = 0; node <= r.drafts; node++) {
        const assay_cuda_node n = nodes[node];
        if (!n.cursor) continue;
        if (n.depth > nodes[best].depth || (n.depth == nodes[best].depth && n.score > nodes[best].score)) best = node;
        if (!n.first_child) continue;
        const Opened o = open_node(a, r, w, node);
        if (o.state.status) return o.state.status;
        const double *masses = a.masses + o.at * a.block_count, *totals = a.totals + o.at * a.block_count;
        const double total = sum_blocks(a.block_count, [&](int64_t b) { return totals[b]; });
        const double mean = ptx::div_rn(sum_blocks(a.block_count, [&](int64_t b) { return masses[b]; }), total);
        const double share = a.call.posterior_alpha * static_cast<double>(assay_vexp(static_cast<float>(mean)));
        const double bound = ptx::div_rn(share, total);
        const double threshold = bound < a.call.posterior_threshold ? bound : a.call.posterior_threshold;
        for (int64_t child = n.first_child; child; child = nodes[child].next_sibling) {
            const int32_t id = id_of(a, r, child);
            if (!(static_cast<double>(probability_of(a, r, o, id)) > threshold)) continue;
            set(&nodes[child].cursor, 1);
            set(&nodes[child].score, n.score + log_probability_of(a, r, o, id));
        }
        ptx::sync_warp();
    }
    *last = best;
    return open_node(a, r, w, best).state.status;
}

// ---- traversal: leaf to root ---------------------------------------------------------------------------------------

// P of a child, from its parent's A, C and what its q counts now.
ASSAY_DEVICE int32_t chance(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w, int64_t child, double *p) {
    assay_cuda_node *nodes = nodes_of(a, r);
    const assay_cuda_node n = nodes[o.row.node];
    const int32_t id = id_of(a, r, child);
    const double q = drafted(a, w, q_row_of(a, r, o.row.node), id);
    if (!is_probability(q)) return ASSAY_ROW_NAN;
    const double above = n.a * static_cast<double>(probability_of(a, r, o, id)) - n.c * q;
    const double below = is_replaced(a) ? q : ptx::div_rn(q, 1 - n.drawn);
    *p = 0;
    if (above > 0) *p = above < below ? ptx::div_rn(above, below) : 1;
    ptx::sync_warp();
    if (ptx::lane() == 0) {
        assay_cuda_node &m = nodes[child];
        m.p = m.a = *p;
        m.c = m.drawn = 0;
        m.cursor = m.first_child;
    }
    ptx::sync_warp();
    return ASSAY_ROW_OK;
}

// Takes a rejected child from its parent, whose row is o.
ASSAY_DEVICE int32_t removed(const VerifyArgs &a, const Request &r, const Opened &o, Walk *w, int64_t child) {
    assay_cuda_node *nodes = nodes_of(a, r);
    const int64_t q_row = q_row_of(a, r, o.row.node);
    const bool replaced = is_replaced(a);
    assay_cuda_node n = nodes[o.row.node];
    n.c += replaced ? 1 : ptx::div_rn(1.0, 1 - n.drawn);
    Residual x;
    const double rest = residual_of(a, r, o, q_row, n.a, n.c, &w->lead, &x);
    if (is_nan(rest)) return ASSAY_ROW_NAN;
    const double below = rest + 1 - n.p;
    n.p = below > 0 ? ptx::div_rn(rest, below) : 1;
    if (below > 0) {
        n.a = ptx::div_rn(n.a, below);
        n.c = ptx::div_rn(n.c, below);
    }
    n.drawn += q_of(a, q_row, id_of(a, r, child));
    n.cursor = nodes[child].next_sibling;
    if (!replaced && !(n.drawn < 1)) n.cursor = 0;   // nothing was left to draw another from
    ptx::sync_warp();
    set(nodes + o.row.node, n);
    ptx::sync_warp();
    return ASSAY_ROW_OK;
}

ASSAY_DEVICE int32_t traverse(const VerifyArgs &a, const Request &r, Walk *w, int64_t *last, int32_t *token) {
    assay_cuda_node *nodes = nodes_of(a, r);
    int64_t node = 0;
    if (ptx::lane() == 0) {
        nodes[0].a = nodes[0].p = 1;
        nodes[0].c = nodes[0].drawn = 0;
        nodes[0].cursor = nodes[0].first_child;
    }
    ptx::sync_warp();
    for (;;) {
        const int64_t child = nodes[node].cursor;
        int64_t rejected = child;
        int64_t parent = node;
        if (child) {
            if (!is_replaced(a) && repeats(a, r, child)) {
                ptx::sync_warp();
                set(&nodes[node].cursor, nodes[child].next_sibling);
                ptx::sync_warp();
                continue;
            }
        } else {
            if (!node || accept_uniform(a, r, node) < nodes[node].p) break;
            rejected = node;
            parent = nodes[node].parent;
        }
        const Opened o = open_node(a, r, w, parent);
        if (o.state.status) return o.state.status;
        if (child) {
            double p;
            const int32_t status = chance(a, r, o, w, child, &p);
            if (status) return status;
            if (p > 0) {
                node = child;
                continue;
            }
        }
        const int32_t status = removed(a, r, o, w, rejected);
        if (status) return status;
        node = parent;
    }
    *last = node;
    const Opened o = open_node(a, r, w, node);
    if (o.state.status) return o.state.status;
    const assay_cuda_node n = nodes[node];
    if (!n.first_child) {
        *token = draw(a, r, o, bonus_uniform(a, r, node));
        return ASSAY_ROW_OK;
    }
    Residual x;
    const double rest = residual_of(a, r, o, q_row_of(a, r, node), n.a, n.c, &w->lead, &x);
    if (is_nan(rest)) return ASSAY_ROW_NAN;
    *token = rest > 0 ? draw_residual(a, r, o, x, residual_uniform(a, r, node) * rest) : draw_empty(a, r, o, w).token;
    return ASSAY_ROW_OK;
}

// ---- the walk ----------------------------------------------------------------------------------------------------------

ASSAY_DEVICE void write_token(const VerifyArgs &a, const Request &r, const Opened &o, int64_t depth, int32_t token) {
    const int64_t at = r.b * a.call.max_out + depth;
    set(a.call.output_token_ids + at, token);
    if (a.call.logprobs) set(a.call.logprobs + at, log_probability_of(a, r, o, token));
}

ASSAY_DEVICE int32_t walk(const VerifyArgs &a, const Request &r, Walk *w, int32_t *accepted) {
    const assay_cuda_node *nodes = nodes_of(a, r);
    int32_t *path = a.call.accept_index + r.b * (a.call.max_out - 1);
    const bool from_leaves = has_q(a) && (is_traversal(a) || a.call.rule == ASSAY_BLOCK);
    int64_t node = 0;
    if (!r.greedy && (from_leaves || a.call.rule == ASSAY_TYPICAL)) {
        int32_t token = -1;
        const int32_t status = from_leaves ? traverse(a, r, w, &node, &token) : typical(a, r, w, &node);
        if (status) return status;
        *accepted = nodes[node].depth;
        const Opened end = open_node(a, r, w, node);
        if (!from_leaves) token = draw(a, r, end, bonus_uniform(a, r, node));
        write_token(a, r, end, *accepted, token);
        // Whose rows were all read.
        for (int64_t at = node; at > 0; at = nodes[at].parent) {
            const int32_t depth = nodes[at].depth - 1;
            set(path + depth, at - 1);
            write_token(a, r, open_node(a, r, w, nodes[at].parent), depth, id_of(a, r, at));
        }
        return ASSAY_ROW_OK;
    }
    for (*accepted = 0;; (*accepted)++) {
        const Opened o = open_node(a, r, w, node);
        if (o.state.status) return o.state.status;
        const Decision d = decide(a, r, o, w);
        if (d.status) return d.status;
        write_token(a, r, o, *accepted, d.child ? id_of(a, r, d.child) : d.token);
        if (!d.child) return ASSAY_ROW_OK;
        set(path + *accepted, d.child - 1);
        node = d.child;
    }
}

}  // namespace assay

#endif

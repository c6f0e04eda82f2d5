// Verification of chains: every position's test at once, a thread each, and then the first that fails decides.
//
// GREEDY, SAMPLED and GUMBEL draw a token of every row (a warp a row) and compare; REJECTION and what equals it on a chain
// (SPECINFER with either replacement; BLOCK and TRAVERSAL without q) and TARGET_ONLY test u against p and q. Only the row where the
// chain ends is drawn from.
#ifndef ASSAY_CUDA_CHAIN_VERIFY_CUH
#define ASSAY_CUDA_CHAIN_VERIFY_CUH

#include "verify_walk.cuh"

namespace assay {

ASSAY_DEVICE double accept_uniform_of(const VerifyArgs &a, const Request &r, int64_t j) {
    return uniform_of(a, r, ASSAY_ACCEPT, j + 1, j, a.call.rule >= ASSAY_TRAVERSAL ? static_cast<uint32_t>(j) : 0);
}

// Whether draft j stands if those before it do.
ASSAY_DEVICE bool stands(const VerifyArgs &a, const Request &r, int64_t j) {
    const assay_cuda_row &state = a.rows[r.first + r.b + j];
    if (state.status) return false;
    const int32_t id = id_of(a, r, j + 1);
    if (draws_and_matches(a, r)) return state.token == id;
    const double u = accept_uniform_of(a, r, j);
    const Opened o = open_row(a, r, j);
    const double p = static_cast<double>(probability_of(a, r, o, id));
    if (a.call.rule == ASSAY_TARGET_ONLY)
        return p > 0 && (u < ptx::div_rn(p, a.call.threshold_acc) || p >= a.call.threshold_single);
    if (!has_q(a)) return u < p;
    const double q = q_of(a, r.first + j, id);
    return is_probability(q) && u * q < p;
}

// By the leading warp: the token that ends the chain at node `stop`, all drafts before it standing. Returns a status.
ASSAY_DEVICE int32_t end_of_chain(const VerifyArgs &a, const Request &r, int64_t stop, int64_t present, Lead *lead,
                                  int32_t *token) {
    const Opened o = open_row(a, r, stop);
    const bool matches = draws_and_matches(a, r);
    lead->rows_read = static_cast<int32_t>(stop) + 1;
    const bool raced = matches && !r.greedy && a.call.rule == ASSAY_GUMBEL;
    lead->rows_resampled = raced ? static_cast<int32_t>(stop) + (o.state.status ? 0 : 1) : 0;
    if (o.state.status) return o.state.status;
    *token = o.state.token;
    if (matches) return ASSAY_ROW_OK;
    if (stop == present) {
        *token = draw(a, r, o, uniform_of(a, r, ASSAY_BONUS, 0, stop, 0));
        return ASSAY_ROW_OK;
    }
    const int32_t id = id_of(a, r, stop + 1);
    const double u = uniform_of(a, r, ASSAY_RESIDUAL, 0, stop, 0);
    if (needs_team(a, r)) {
        if (!is_probability(q_of(a, r.first + stop, id))) return ASSAY_ROW_NAN;
        Residual x;
        const double total = residual_of(a, r, o, r.first + stop, 1, 1, lead, &x);
        if (is_nan(total)) return ASSAY_ROW_NAN;
        *token = total > 0 ? draw_residual(a, r, o, x, u * total) : -1;
    } else {
        if (id < a.call.vocab) exclude(a, r, lead, id);
        *token = draw_without(a, r, o, lead, u);
    }
    if (*token < 0) {
        lead->empty_residuals++;
        *token = draw(a, r, o, u);
    }
    return ASSAY_ROW_OK;
}

ASSAY_DEVICE void chain_verify(const VerifyArgs &a) {
    WalkShared *s = walk_shared();
    const Team team = join_team(a);
    const Request r = request_at(a, team.request);
    const bool teamed = needs_team(a, r);
    if (team.part) {
        if (teamed) serve(a, r, team.part);
        return;
    }
    const bool sound = begin_walk(a, r);
    for (int64_t j = ptx::tid(); sound && j < r.drafts; j += kWalkThreads) {
        const int32_t id = id_of(a, r, j + 1);
        if (id == -1) ptx::atomic_min(&s->absent, static_cast<int32_t>(j));
        else if (id < -1) ptx::atomic_min(&s->bad_id, static_cast<int32_t>(j));
    }
    ptx::sync();
    const int64_t present = min_of(static_cast<int64_t>(s->absent), sound ? r.drafts : 0);
    const int32_t status = !sound ? ASSAY_ROW_BAD_REQUEST : s->bad_id < present ? ASSAY_ROW_BAD_ID : ASSAY_ROW_OK;
    const bool walked = !status && r.most > 0;
    int64_t stop = 0;
    if (walked) {
        for (int64_t node = ptx::warp(); node <= present; node += kWalkWarps) settle_row(a, r, node, node);
        ptx::sync();
        for (int64_t j = ptx::tid(); j < present; j += kWalkThreads)
            if (!stands(a, r, j)) ptx::atomic_min(&s->stop, static_cast<int32_t>(j));
        ptx::sync();
        stop = min_of(static_cast<int64_t>(s->stop), present);
        // Drafts that were tested although their own probability is 0.
        for (int64_t j = ptx::tid(); teamed && j <= stop && j < present; j += kWalkThreads) {
            const int32_t id = id_of(a, r, j + 1);
            if (id < a.call.vocab && !a.rows[r.first + r.b + j].status && q_of(a, r.first + j, id) == 0)
                ptx::atomic_add(&s->zero_drafts, 1u);
        }
    }
    Lead lead = {};
    if (ptx::warp() == 0) {
        int32_t token = -1, how = status;
        if (walked) how = end_of_chain(a, r, stop, present, &lead, &token);
        if (teamed) give_order(a, r, &lead, kOrderEnd, 0, Residual{});
        if (ptx::lane() == 0) {
            s->status = how;
            s->accepted = static_cast<int32_t>(stop);
            s->token = token;
        }
    } else if (teamed) {
        serve(a, r, 0);
    }
    ptx::sync();
    if (walked && !s->status) {
        int32_t *out = a.call.output_token_ids + r.b * a.call.max_out, *path = a.call.accept_index + r.b * (a.call.max_out - 1);
        for (int64_t i = ptx::tid(); i <= stop; i += kWalkThreads) {
            const int32_t token = i < stop ? id_of(a, r, i + 1) : s->token;
            out[i] = token;
            if (i < stop) path[i] = static_cast<int32_t>(i);
            if (a.call.logprobs)
                a.call.logprobs[r.b * a.call.max_out + i] = log_probability_of(a, r, open_row(a, r, i), token);
        }
    }
    conclude(a, r, walked, lead);
}

}  // namespace assay

#endif

// What the walks of verification share: a request's team of warps, draws, and what becomes of the tokens.
//
// A request has `team` blocks of 8 warps. Warp 0 of the first block leads: it decides, and where a rule needs a residual over
// the whole vocabulary it writes an order that all the team's warps carry out, a block of 2048 tokens each in turn; they wait
// for orders on a counter. Which blocks form a team is told by tickets, so that a team's blocks start one after the other and
// none waits for one that has no place to run.
#ifndef ASSAY_CUDA_VERIFY_WALK_CUH
#define ASSAY_CUDA_VERIFY_WALK_CUH

#include "verify_rows.cuh"

namespace assay {

constexpr int kWalkThreads = 256;
constexpr int kWalkWarps = kWalkThreads / 32;
enum { kOrderEnd = 0, kOrderResidual = 1 };

struct WalkShared {
    int32_t ticket, absent, bad_id, stop, emitted;
    int32_t status, accepted, token;
    uint32_t broken, zero_drafts;
};

ASSAY_DEVICE WalkShared *walk_shared() { return reinterpret_cast<WalkShared *>(ptx::shared()); }

struct Team {
    int64_t request, part;
};

// By all threads.
ASSAY_DEVICE Team join_team(const VerifyArgs &a) {
    if (a.team == 1) return {ptx::bid_x(), 0};
    if (ptx::tid() == 0) walk_shared()->ticket = static_cast<int32_t>(ptx::atomic_add(a.ticket, 1u));
    ptx::sync();
    const int64_t ticket = walk_shared()->ticket;
    return {ticket / a.team, ticket % a.team};
}

// By all threads of the first block: shared memory for a walk, and whether offsets rise throughout.
ASSAY_DEVICE bool begin_walk(const VerifyArgs &a, const Request &r) {
    WalkShared *s = walk_shared();
    ptx::sync();   // the ticket was read
    if (ptx::tid() == 0) {
        *s = WalkShared{};
        s->absent = s->bad_id = s->stop = s->emitted = 0x7fffffff;
    }
    ptx::sync();
    bool broken = !r.valid || one_of(a.call.cu_num_draft_tokens, 0) != 0;
    for (int64_t b = ptx::tid(); b < a.call.batch; b += kWalkThreads)
        broken |= one_of(a.call.cu_num_draft_tokens, b) > one_of(a.call.cu_num_draft_tokens, b + 1);
    if (broken) ptx::atomic_or(&s->broken, 1u);
    ptx::sync();
    return !s->broken;
}

// Whether the request's rule draws from residuals over the whole vocabulary.
ASSAY_DEVICE bool needs_team(const VerifyArgs &a, const Request &r) {
    return !r.greedy && has_q(a) && a.call.rule >= ASSAY_REJECTION && a.call.rule != ASSAY_TARGET_ONLY &&
           a.call.rule != ASSAY_TYPICAL;
}
ASSAY_DEVICE bool draws_and_matches(const VerifyArgs &a, const Request &r) {
    return r.greedy || a.call.rule == ASSAY_SAMPLED || a.call.rule == ASSAY_GUMBEL;
}

// ---- residuals -------------------------------------------------------------------------------------------

struct Residual {
    float scale, c;
    int64_t q_row;
};

// max(0, A p - C q) of element i of block b.
ASSAY_DEVICE float excess_at(const VerifyArgs &a, const Request &r, const Opened &o, const Residual &x, int64_t b, int32_t i,
                             bool *bad) {
    const int64_t token = b * kVocabBlock + i;
    if (token >= a.call.vocab || i >= kVocabBlock) return 0;
    const float q = q_at(a, x.q_row, token);
    *bad |= !(q >= 0 && q <= kLargest);
    const float excess = weight_at(a, r, o.row, o.state.shift, token) * x.scale - q * x.c;
    return excess > 0 ? excess : 0;
}

// By a warp: its share of the row's blocks.
ASSAY_DEVICE void residual_share(const VerifyArgs &a, const Request &r, const Opened &o, const Residual &x, int64_t part) {
    for (int64_t b = ptx::warp() * a.team + part; b < a.block_count; b += kWalkWarps * a.team) {
        bool bad = false;
        const float sum = sum_block(block_length(a, b), [&](int32_t i) { return excess_at(a, r, o, x, b, i, &bad); });
        const bool any_bad = ptx::any(bad);
        if (ptx::lane() == 0) a.masses[o.at * a.block_count + b] = static_cast<double>(any_bad ? not_a_number() : sum);
    }
}

// By a warp that does not lead: carries out orders until the last.
ASSAY_DEVICE void serve(const VerifyArgs &a, const Request &r, int64_t part) {
    assay_cuda_order *order = a.orders + r.b;
    uint32_t epoch = 0;
    for (;;) {
        uint32_t now = epoch;
        if (ptx::lane() == 0)
            while (now == epoch) now = ptx::ld_acquire(&order->epoch);
        epoch = ptx::shfl(now, 0u);
        ptx::sync_warp();
        if (order->kind == kOrderEnd) return;
        const Opened o = open_row(a, r, order->node);
        residual_share(a, r, o, Residual{order->scale, order->c, order->q_row}, part);
        ptx::sync_warp();
        if (ptx::lane() == 0) ptx::red_add_release(&order->arrived, 1u);
    }
}

// The leading warp's own: what it counts, and how many orders it gave.
struct Lead {
    int32_t rows_read, rows_resampled, empty_residuals, excluded;
    uint32_t epoch;
};

ASSAY_DEVICE void give_order(const VerifyArgs &a, const Request &r, Lead *lead, int32_t kind, int64_t node, const Residual &x) {
    assay_cuda_order *order = a.orders + r.b;
    lead->epoch++;
    ptx::sync_warp();
    if (ptx::lane() == 0) {
        order->kind = kind;
        order->node = node;
        order->scale = x.scale;
        order->c = x.c;
        order->q_row = x.q_row;
        ptx::st_release(&order->epoch, lead->epoch);
    }
}

// By the leading warp: |R(A, C)|, with what is left of each block in a.masses; NaN when q holds what is no probability.
ASSAY_DEVICE double residual_of(const VerifyArgs &a, const Request &r, const Opened &o, int64_t q_row, double A, double C,
                                Lead *lead, Residual *x) {
    *x = {static_cast<float>(static_cast<double>(o.state.scale) * A), static_cast<float>(C), q_row};
    lead->rows_resampled++;
    give_order(a, r, lead, kOrderResidual, o.row.node, *x);
    residual_share(a, r, o, *x, 0);
    const uint32_t expected = lead->epoch * static_cast<uint32_t>(kWalkWarps * a.team - 1);
    if (ptx::lane() == 0)
        while (ptx::ld_acquire(&(a.orders + r.b)->arrived) != expected) {
        }
    ptx::sync_warp();
    const double *masses = a.masses + o.at * a.block_count;
    return sum_blocks(a.block_count, [&](int64_t b) { return masses[b]; });
}

// By a warp, like all draws: the first token whose cumulated residual exceeds the target.
ASSAY_DEVICE int32_t draw_residual(const VerifyArgs &a, const Request &r, const Opened &o, const Residual &x, double target) {
    const double *masses = a.masses + o.at * a.block_count;
    const Place place = place_of(a.block_count, target, [&](int64_t b) { return masses[b]; });
    bool bad = false;
    const int32_t i = pick_in_block(block_length(a, place.block), 1.0, place,
                                    [&](int32_t i) { return excess_at(a, r, o, x, place.block, i, &bad); });
    return static_cast<int32_t>(place.block * kVocabBlock) + i;
}

// ---- draws from p --------------------------------------------------------------------------------------------

// Weight of an element relative to its block's largest.
ASSAY_DEVICE float weight_in_block(const VerifyArgs &a, const Request &r, const Opened &o, int64_t b, int32_t i) {
    return i < kVocabBlock ? weight_at(a, r, o.row, o.blocks[b].largest, b * kVocabBlock + i) : 0.0f;
}

ASSAY_DEVICE int32_t draw(const VerifyArgs &a, const Request &r, const Opened &o, double u) {
    const Place place = place_of(a.block_count, u * o.state.total, [&](int64_t b) { return mass_of(r, o, b); });
    const int32_t i = pick_in_block(block_length(a, place.block), static_cast<double>(factor_of(r, o, place.block)), place,
                                    [&](int32_t i) { return weight_in_block(a, r, o, place.block, i); });
    return static_cast<int32_t>(place.block * kVocabBlock) + i;
}

// The same without the excluded ids, which are the leading warp's list.
ASSAY_DEVICE float weight_without(const VerifyArgs &a, const Request &r, const Opened &o, const int32_t *excluded, int32_t count,
                                  int64_t b, int32_t i) {
    for (int32_t k = 0; k < count; k++)
        if (excluded[k] == b * kVocabBlock + i) return 0;
    return weight_in_block(a, r, o, b, i);
}

ASSAY_DEVICE int32_t *excluded_of(const VerifyArgs &a, const Request &r) { return a.excluded + r.first + r.b; }

ASSAY_DEVICE void exclude(const VerifyArgs &a, const Request &r, Lead *lead, int32_t id) {
    if (ptx::lane() == 0) excluded_of(a, r)[lead->excluded] = id;
    lead->excluded++;
    ptx::sync_warp();
}
ASSAY_DEVICE bool is_excluded(const VerifyArgs &a, const Request &r, const Lead *lead, int32_t id) {
    bool found = false;
    for (int32_t k = 0; k < lead->excluded; k++) found |= excluded_of(a, r)[k] == id;
    return found;
}

// By the leading warp: weight of the row without the excluded ids, of state.total.
ASSAY_DEVICE double mass_without(const VerifyArgs &a, const Request &r, const Opened &o, const Lead *lead) {
    double *masses = a.masses + o.at * a.block_count;
    const int32_t *excluded = excluded_of(a, r);
    for (int64_t b = ptx::lane(); b < a.block_count; b += 32) masses[b] = mass_of(r, o, b);
    ptx::sync_warp();
    for (int32_t k = 0; k < lead->excluded; k++) {
        const int64_t b = excluded[k] / kVocabBlock;
        if (!(o.blocks[b].sum > 0)) continue;
        const float sum = sum_block(block_length(a, b),
                                    [&](int32_t i) { return weight_without(a, r, o, excluded, lead->excluded, b, i); });
        if (ptx::lane() == 0) masses[b] = static_cast<double>(sum) * static_cast<double>(factor_of(r, o, b));
    }
    ptx::sync_warp();
    return sum_blocks(a.block_count, [&](int64_t b) { return masses[b]; });
}

// -1 when nothing is left.
ASSAY_DEVICE int32_t draw_without(const VerifyArgs &a, const Request &r, const Opened &o, const Lead *lead, double u) {
    const double total = mass_without(a, r, o, lead);
    if (!(total > 0)) return -1;
    const double *masses = a.masses + o.at * a.block_count;
    const int32_t *excluded = excluded_of(a, r);
    const Place place = place_of(a.block_count, u * total, [&](int64_t b) { return masses[b]; });
    const int32_t i =
        pick_in_block(block_length(a, place.block), static_cast<double>(factor_of(r, o, place.block)), place,
                      [&](int32_t i) { return weight_without(a, r, o, excluded, lead->excluded, place.block, i); });
    return static_cast<int32_t>(place.block * kVocabBlock) + i;
}

// ---- rows, settled once a request's drafts are known --------------------------------------------------------------

ASSAY_DEVICE int32_t argmax_of(const VerifyArgs &a, const Opened &o) {
    uint32_t block = 0xffffffffu;
    for (int64_t b = ptx::lane(); b < a.block_count; b += 32)
        if (o.blocks[b].largest == o.state.shift) block = min_of(block, static_cast<uint32_t>(b));
    return o.blocks[ptx::redux_min(block)].first;
}

ASSAY_DEVICE int32_t winner_of(const VerifyArgs &a, const Opened &o) {
    const double *times = a.masses + o.at * a.block_count;
    double best = double_infinity();
    int64_t block = 0x7fffffff;
    for (int64_t b = ptx::lane(); b < a.block_count; b += 32)
        if (times[b] < best || block == 0x7fffffff) {
            best = times[b];
            block = b;
        }
    for (uint32_t d = 16; d > 0; d /= 2) {
        const double time = ptx::shfl_xor(best, d);
        const int64_t other = ptx::shfl_xor(block, d);
        if (time < best || (time == best && other < block)) {
            best = time;
            block = other;
        }
    }
    return a.tokens[o.at * a.block_count + block];
}

// By a warp: the state of a node's row, and the token that a rule of drawing and matching draws there.
ASSAY_DEVICE void settle_row(const VerifyArgs &a, const Request &r, int64_t node, int64_t depth) {
    Opened o = open_row(a, r, node);
    combine_blocks(a, r, o);
    o.state.token = -1;
    if (!o.state.status && draws_and_matches(a, r)) {
        if (r.greedy) o.state.token = argmax_of(a, o);
        else if (a.call.rule == ASSAY_GUMBEL) o.state.token = winner_of(a, o);
        else o.state.token = draw(a, r, o, uniform_of(a, r, ASSAY_BONUS, 0, depth, 0));
    }
    ptx::sync_warp();   // all have read its cuts
    if (ptx::lane() == 0) a.rows[o.at] = o.state;
}

// ---- the end -------------------------------------------------------------------------------------------------

ASSAY_DEVICE bool is_stop(const VerifyArgs &a, const Request &r, int32_t token) {
    int64_t begin = 0, end = a.call.num_stop;
    if (a.call.cu_stop) bounds_of(a.call.cu_stop, r.b, a.stops, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        if (one_of(a.call.stop_token_ids, i) == token) return true;
    return false;
}

// By all threads of the first block, once the path's tokens and nodes are written and shared memory says how it ended: cuts the
// output at stop ids and max_emit, and pads.
ASSAY_DEVICE void conclude(const VerifyArgs &a, const Request &r, bool walked, const Lead &lead) {
    WalkShared *s = walk_shared();
    ptx::sync();
    // Nothing of a request with a poisoned row is emitted, not even what preceded it.
    const int32_t status = s->status, accepted = status ? 0 : s->accepted, whole = walked && !status ? accepted + 1 : 0;
    int32_t *out = a.call.output_token_ids + r.b * a.call.max_out, *path = a.call.accept_index + r.b * (a.call.max_out - 1);
    float *logprobs = a.call.logprobs ? a.call.logprobs + r.b * a.call.max_out : nullptr;
    for (int32_t i = static_cast<int32_t>(ptx::tid()); i < whole; i += kWalkThreads)
        if (i + 1 >= r.most || is_stop(a, r, out[i])) ptx::atomic_min(&s->emitted, i + 1);
    ptx::sync();
    const int32_t emitted = min_of(s->emitted, whole);
    for (int64_t i = emitted + static_cast<int64_t>(ptx::tid()); i < a.call.max_out; i += kWalkThreads) {
        out[i] = -1;
        if (logprobs) logprobs[i] = not_a_number();
    }
    for (int64_t i = accepted + static_cast<int64_t>(ptx::tid()); i < a.call.max_out - 1; i += kWalkThreads) path[i] = -1;
    if (ptx::tid() != 0) return;
    a.call.num_accepted[r.b] = accepted;
    a.call.num_emitted[r.b] = emitted;
    a.call.status[r.b] = status;
    int32_t *counters = a.call.counters + r.b * ASSAY_COUNTERS;
    counters[ASSAY_ROWS_READ] = lead.rows_read;
    counters[ASSAY_ROWS_RESAMPLED] = lead.rows_resampled;
    counters[ASSAY_ZERO_DRAFTS] = static_cast<int32_t>(s->zero_drafts);
    counters[ASSAY_EMPTY_RESIDUALS] = lead.empty_residuals;
}

}  // namespace assay

#endif

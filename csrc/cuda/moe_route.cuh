// MoE routing, a warp a token: csrc/assay.h states the op, and csrc/cpu/moe_route/ has the same operations in the same order,
// so that ids and weights have the same bits.
//
//   load     key r of lane i is of expert 32 r + i: coalesced, and from then on in a register (shared memory where there are
//            more than 16), as an integer of the same order, of which the float comes back without loss
//   keys     with a bias or groups: the scores, by the polynomials of csrc/cpu/scores.h. Groups go through shared memory
//   choice   top_k times: a lane's best, redux.max of those, redux.min of the ids that have it (ties to the lower), and the
//            winner's key is struck out
//   weights  slot j is lane j % 32's; the first 32 stay in a register, the others in the output, where only that lane is
//   sums     the CPU's 16 float32 lanes: warp lanes i and i + 16 take turns in lane i's
//
// A bias that the CPU refuses makes every row ROW_NAN (a NaN) or ROW_INF (plus infinity): the host cannot see it.
#ifndef ASSAY_MOE_ROUTE_CUH
#define ASSAY_MOE_ROUTE_CUH

#include "ptx.cuh"

#include "../assay.h"
#include "../cpu/scores.h"

namespace assay {
namespace route {

enum { WARPS = 4 };

// A key that is never chosen: minus infinity, masked, taken, or past the last expert.
constexpr uint32_t NONE = 0x007FFFFFu;
constexpr uint32_t PLUS_INFINITY = 0xFF800000u;

// A float that is not NaN as an integer of the same order. Zeros of either sign are equal.
ASSAY_DEVICE uint32_t ordered(float x) {
    const uint32_t bits = ptx::float_as_uint(ptx::add_rn(x, 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
ASSAY_DEVICE float value_of(uint32_t key) {
    return ptx::uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

ASSAY_DEVICE float load_logit(const assay_route_args &a, int64_t at) {
    if (a.dtype == ASSAY_F32) return ptx::ldg_float(static_cast<const float *>(a.logits) + at);
    const uint16_t half = static_cast<uint16_t>(ptx::ldg16(static_cast<const uint16_t *>(a.logits) + at));
    return a.dtype == ASSAY_F16 ? ptx::half_to_float(half) : ptx::bf16_to_float(half);
}

ASSAY_DEVICE float score(int32_t scoring, float x) {
    if (scoring == ASSAY_SCORE_SIGMOID) return assay_sigmoid(x);
    return scoring == ASSAY_SCORE_SQRTSOFTPLUS ? ptx::sqrt_rn(assay_softplus(x)) : x;
}

// A lane's keys. shared: the warp's row of 32 kValues words, and n_group more for the worth of groups.
template <int kValues>
struct Keys {
    uint32_t own[kValues];
    uint32_t *shared;
    ASSAY_DEVICE uint32_t get(int r) const { return own[r]; }
    ASSAY_DEVICE void put(int r, uint32_t key) { own[r] = key; }
};
// All in shared memory, of which a lane touches its own words only.
template <>
struct Keys<64> {
    uint32_t *shared;
    ASSAY_DEVICE uint32_t get(int r) const { return ptx::lds32(shared + 32 * r + ptx::lane()); }
    ASSAY_DEVICE void put(int r, uint32_t key) { ptx::sts(shared + 32 * r + ptx::lane(), key); }
};
template <int kValues>
constexpr bool IN_REGISTERS = kValues <= 16;
template <int kValues>
constexpr int UNROLL = IN_REGISTERS<kValues> ? kValues : 4;
#ifdef __CUDACC__
#define ASSAY_EACH_KEY(r) _Pragma("unroll UNROLL<kValues>") for (int r = 0; r < kValues; r++)
#else
#define ASSAY_EACH_KEY(r) for (int r = 0; r < kValues; r++)
#endif

// The next 32 addends of a sum whose 16 lanes are the warp's lower half: element i of a row goes to lane i % 16.
ASSAY_DEVICE float add_pair(float sum, float addend) {
    sum = ptx::add_rn(sum, addend);
    return ptx::add_rn(sum, ptx::shfl_down(addend, 16));
}
// assay_fold16, in every lane.
ASSAY_DEVICE float fold(float sum) {
    ASSAY_UNROLL
    for (uint32_t step = 8; step; step /= 2) sum = ptx::add_rn(sum, ptx::shfl_xor(sum, step));
    return ptx::shfl(sum, 0);
}

// Sum of the exponentials of a row whose largest logit is `largest`.
template <int kValues>
ASSAY_DEVICE float softmax_total(const Keys<kValues> &key, float largest) {
    float sum = 0;
    ASSAY_EACH_KEY(r) sum = add_pair(sum, assay_vexp(value_of(key.get(r)) - largest));
    return fold(sum);
}

// A row's logits into scores plus bias, by which experts are chosen; sets `bad` to the status of a bias that is none.
template <int kValues>
ASSAY_DEVICE void score_keys(const assay_route_args &a, float largest, float total, Keys<kValues> &key, int32_t &bad) {
    const uint32_t experts = static_cast<uint32_t>(a.num_experts);
    ASSAY_EACH_KEY(r) {
        const uint32_t e = 32 * r + ptx::lane();
        if (e >= experts) continue;
        const float bias = a.bias ? ptx::ldg_float(a.bias + e) : 0;
        if (bias != bias) bad = ASSAY_ROW_NAN;
        else if (ordered(bias) == PLUS_INFINITY && !bad) bad = ASSAY_ROW_INF;
        if (key.get(r) == NONE) continue;
        const float x = value_of(key.get(r));
        const float s = a.scoring == ASSAY_SCORE_SOFTMAX ? ptx::div_rn(assay_vexp(x - largest), total) : score(a.scoring, x);
        key.put(r, bad ? NONE : ordered(ptx::add_rn(s, bias)));
    }
}

// Two largest of a multiset, as it grows.
struct Best {
    uint32_t first, second;
    ASSAY_DEVICE void take(uint32_t key) {
        second = max_of(second, min_of(first, key));
        first = max_of(first, key);
    }
};

// NONE to every key outside the topk_group best groups. A group is some lanes', as many as fit; each group starts elsewhere, so
// that they meet different banks.
template <int kValues>
ASSAY_DEVICE void mask_groups(const assay_route_args &a, Keys<kValues> &key) {
    uint32_t *shared = key.shared;
    const uint32_t experts = static_cast<uint32_t>(a.num_experts), groups = static_cast<uint32_t>(a.n_group);
    const uint32_t size = experts / groups, lane = ptx::lane();
    uint32_t lanes = 1;
    while (2 * lanes * groups <= 32) lanes *= 2;
    uint32_t *worth = shared + 32 * kValues;
    const auto key_at = [&](uint32_t g, uint32_t i) {
        const uint32_t at = i + g * lanes % size;
        return shared + g * size + (at < size ? at : at - size);
    };
    if constexpr (IN_REGISTERS<kValues>) {
        ASSAY_EACH_KEY(r)
            if (32 * r + lane < experts) ptx::sts(shared + 32 * r + lane, key.get(r));
    }
    ptx::sync_warp();
    const uint32_t part = lane % lanes;
    for (uint32_t from = 0; from < groups; from += 32 / lanes) {
        const uint32_t g = from + lane / lanes;
        Best best = {NONE, NONE};
        for (uint32_t i = part; g < groups && i < size; i += lanes) best.take(ptx::lds32(key_at(g, i)));
        for (uint32_t step = 1; step < lanes; step *= 2) {
            const Best other = {ptx::shfl_xor(best.first, step), ptx::shfl_xor(best.second, step)};
            best.take(other.first);
            best.take(other.second);
        }
        if (g >= groups || part) continue;
        const bool both = a.group_top2 && best.second > NONE;
        ptx::sts(worth + g, both ? ordered(ptx::add_rn(value_of(best.first), value_of(best.second))) : best.first);
    }
    ptx::sync_warp();
    for (uint32_t g = lane / lanes; g < groups; g += 32 / lanes) {
        const uint32_t own = ptx::lds32(worth + g);
        int64_t better = 0;
        for (uint32_t h = 0; h < groups; h++) {
            const uint32_t other = ptx::lds32(worth + h);
            better += other > own || (other == own && h < g);
        }
        if (better < a.topk_group) continue;
        for (uint32_t i = part; i < size; i += lanes) ptx::sts(key_at(g, i), NONE);
    }
    ptx::sync_warp();
    if constexpr (IN_REGISTERS<kValues>) {
        ASSAY_EACH_KEY(r)
            if (32 * r + lane < experts) key.put(r, ptx::lds32(shared + 32 * r + lane));
    }
}

// The best expert that is left, the same in every lane, or -1; its key is struck out.
template <int kValues>
ASSAY_DEVICE int32_t take(Keys<kValues> &key) {
    uint32_t best = NONE, at = 0;
    ASSAY_EACH_KEY(r) {
        const uint32_t k = key.get(r);
        at = k > best ? r : at;
        best = max_of(best, k);
    }
    const uint32_t top = ptx::redux_max(best);
    if (top <= NONE) return -1;
    const uint32_t id = ptx::redux_min(best == top ? 32 * at + ptx::lane() : ~0u);
    ASSAY_EACH_KEY(r)
        if (32 * r + ptx::lane() == id) key.put(r, NONE);
    return static_cast<int32_t>(id);
}

ASSAY_DEVICE void finish_row(const assay_route_args &a, int64_t t, int32_t status) {
    const int64_t width = a.top_k + a.num_shared, at = t * width;
    for (int64_t j = (status ? 0 : a.top_k) + ptx::lane(); j < width; j += 32) {
        ptx::st(a.topk_ids + at + j, status ? -1 : static_cast<int32_t>(a.num_experts + j - a.top_k));
        ptx::st(a.topk_weights + at + j, status ? 0.0f : a.shared_weight);
    }
    if (!ptx::lane()) ptx::st(a.status + t, status);
}

// Weights of the chosen of row t. id: the lane's among the first 32 slots; those of the others are written.
ASSAY_DEVICE void weigh(const assay_route_args &a, int64_t t, int32_t id, float largest, float total) {
    const uint32_t lane = ptx::lane(), top_k = static_cast<uint32_t>(a.top_k);
    const int64_t at = t * (a.top_k + a.num_shared);
    const bool softmax = a.scoring == ASSAY_SCORE_SOFTMAX;
    const auto id_of = [&](uint32_t j) { return j == lane ? id : j < top_k ? ptx::ldcg(a.topk_ids + at + j) : -1; };
    if (softmax && a.renormalize && (a.bias || a.n_group > 1)) {
        uint32_t most = NONE;
        for (uint32_t j = lane; j < top_k; j += 32) {
            const int32_t e = id_of(j);
            if (e >= 0) most = max_of(most, ordered(load_logit(a, t * a.ld + e)));
        }
        largest = value_of(ptx::redux_max(most));
    }
    float first = 0, sum = 0;
    for (uint32_t from = 0; from < top_k; from += 32) {
        const uint32_t j = from + lane;
        const int32_t e = id_of(j);
        float w = 0;
        if (e >= 0) {
            const float x = load_logit(a, t * a.ld + e);
            w = softmax ? assay_vexp(x - largest) : score(a.scoring, x);
        }
        if (!from) first = w;
        else if (j < top_k) ptx::st(a.topk_weights + at + j, w);
        if (a.renormalize) sum = add_pair(sum, w);
    }
    if (a.renormalize) total = softmax ? fold(sum) : ptx::add_rn(fold(sum), 1e-20f);
    else if (!softmax) total = 1;
    if (!ptx::any(id >= 0)) total = 1;
    for (uint32_t j = lane; j < top_k; j += 32) {
        const float w = j == lane ? first : ptx::ldcg(a.topk_weights + at + j);
        ptx::st(a.topk_weights + at + j, ptx::mul_rn(ptx::div_rn(w, total), a.scaling));
    }
}

// Experts up to 32 kValues.
template <int kValues>
ASSAY_DEVICE void moe_route(const assay_route_args &a) {
    const int64_t t = static_cast<int64_t>(ptx::bid_x()) * WARPS + ptx::warp();
    if (t >= a.tokens) return;
    const uint32_t lane = ptx::lane(), experts = static_cast<uint32_t>(a.num_experts), top_k = static_cast<uint32_t>(a.top_k);
    uint32_t most = NONE;
    Keys<kValues> key;
    // Words a warp: 32 a key, which is at least an expert each, and the groups'.
    key.shared = reinterpret_cast<uint32_t *>(ptx::shared()) + ptx::warp() * (32 * kValues + static_cast<uint32_t>(a.n_group));
    bool nan = false;
    ASSAY_EACH_KEY(r) {
        key.put(r, NONE);
        const uint32_t e = 32 * r + lane;
        if (e >= experts) continue;
        const float x = load_logit(a, t * a.ld + e);
        nan = nan || x != x;
        key.put(r, ordered(x));
        most = max_of(most, ordered(x));
    }
    nan = ptx::any(nan);
    most = ptx::redux_max(most);
    int32_t status = nan ? ASSAY_ROW_NAN : most == PLUS_INFINITY ? ASSAY_ROW_INF : most == NONE ? ASSAY_ROW_EMPTY : ASSAY_ROW_OK;
    if (status) return finish_row(a, t, status);
    const float largest = value_of(most);
    const bool keyed = a.bias || a.n_group > 1;
    float total = 1;
    if (a.scoring == ASSAY_SCORE_SOFTMAX && (keyed || !a.renormalize)) total = softmax_total(key, largest);
    if (keyed) {
        score_keys(a, largest, total, key, status);
        status = ptx::any(status == ASSAY_ROW_NAN) ? ASSAY_ROW_NAN : ptx::any(status) ? ASSAY_ROW_INF : ASSAY_ROW_OK;
        if (status) return finish_row(a, t, status);
        if (a.n_group > 1) mask_groups(a, key);
    }
    int32_t first = -1;
    for (uint32_t from = 0; from < top_k; from += 32) {
        int32_t mine = -1;
        const uint32_t end = min_of(top_k - from, 32u);
        for (uint32_t j = 0; j < end; j++) {
            const int32_t id = take(key);
            if (id < 0) break;
            if (j == lane) mine = id;
        }
        if (!from) first = mine;
        if (lane < end) ptx::st(a.topk_ids + t * (a.top_k + a.num_shared) + from + lane, mine);
    }
    weigh(a, t, first, largest, total);
    finish_row(a, t, ASSAY_ROW_OK);
}

}  // namespace route

using route::moe_route;

}  // namespace assay

#endif

// Rows of logits as verification sees them on the GPU: elements after processors and filters, block records to probabilities,
// draws. csrc/spec_rows.c is the same for the CPU; every sum here has its order, so that tokens have its bits:
//   within a block of 2048  16 float lanes (element i in lane i mod 16), folded as vexp.h says
//   over blocks             double, one after the other
// A function without a note is a thread's own. "By a warp": all 32 lanes call it together, with the same arguments, and get the
// same result.
#ifndef ASSAY_CUDA_VERIFY_ROWS_CUH
#define ASSAY_CUDA_VERIFY_ROWS_CUH

#include "ptx.cuh"

#include "../cpu/logarithm.h"
#include "../cpu/vexp.h"
#include "assay_cuda.h"
#include "philox.cuh"

#ifdef __CUDACC__
#define ASSAY_OUT_OF_LINE static __device__ __noinline__
#else
#define ASSAY_OUT_OF_LINE static __attribute__((noinline, unused))
#endif

namespace assay {

using VerifyArgs = assay_cuda_verify_args;

constexpr int kVocabBlock = ASSAY_CUDA_VOCAB_BLOCK;
constexpr float kLargest = 3.402823466e38f;    // FLT_MAX
constexpr float kSmallest = 1.17549435e-38f;   // FLT_MIN
enum { kCutLogits = 1, kCutMinP = 2, kCutTypical = 4 };

ASSAY_DEVICE float infinity() { return ptx::uint_as_float(0x7f800000u); }
ASSAY_DEVICE float not_a_number() { return ptx::uint_as_float(0x7fc00000u); }
ASSAY_DEVICE double double_infinity() { return ptx::ulong_as_double(0x7ff0000000000000ull); }
ASSAY_DEVICE bool is_nan(float x) { return x != x; }
ASSAY_DEVICE bool is_nan(double x) { return x != x; }
ASSAY_DEVICE bool is_finite(float x) { return (ptx::float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
ASSAY_DEVICE float magnitude(float x) { return ptx::uint_as_float(ptx::float_as_uint(x) & 0x7fffffffu); }

// Rises with the logit. Adding 0 makes both zeros one.
ASSAY_DEVICE uint32_t logit_key(float logit) {
    const uint32_t bits = ptx::float_as_uint(logit + 0.0f);
    return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}
ASSAY_DEVICE float logit_of(uint32_t key) { return ptx::uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// ---- requests --------------------------------------------------------------------------------------------

struct Request {
    int64_t b, first, drafts;   // its first draft, and how many
    bool valid, greedy, sums, filtered;
    float inverse_t;
    int32_t most;               // tokens that it may emit
};

ASSAY_DEVICE float one_of(const float *values, int64_t b) { return ptx::ldg_float(values + b); }
ASSAY_DEVICE int32_t one_of(const int32_t *values, int64_t b) { return static_cast<int32_t>(ptx::ldg32(values + b)); }

ASSAY_DEVICE bool uses_top_k(const VerifyArgs &a, int64_t b) {
    return a.call.top_k && one_of(a.call.top_k, b) > 0 && one_of(a.call.top_k, b) < a.call.vocab;
}
ASSAY_DEVICE bool uses_top_p(const VerifyArgs &a, int64_t b) { return a.call.top_p && one_of(a.call.top_p, b) < 1; }
ASSAY_DEVICE bool uses_min_p(const VerifyArgs &a, int64_t b) { return a.call.min_p && one_of(a.call.min_p, b) > 0; }
ASSAY_DEVICE bool uses_typical_p(const VerifyArgs &a, int64_t b) {
    return a.call.typical_p && one_of(a.call.typical_p, b) < 1;
}

// [begin, end) of request b in a list of `length`; false when it is none.
ASSAY_DEVICE bool bounds_of(const int32_t *cu, int64_t b, int64_t length, int64_t *begin, int64_t *end) {
    *begin = one_of(cu, b);
    *end = one_of(cu, b + 1);
    return *begin >= 0 && *begin <= *end && *end <= length;
}

ASSAY_DEVICE Request request_at(const VerifyArgs &a, int64_t b) {
    Request r = {};
    int64_t end, unused;
    r.b = b;
    r.valid = bounds_of(a.call.cu_num_draft_tokens, b, a.drafts, &r.first, &end);
    r.drafts = end - r.first;
    const float t = one_of(a.call.temperature, b);
    r.valid = r.valid && r.drafts < a.call.max_out && t >= 0 && t <= kLargest;
    r.most = a.call.max_emit ? one_of(a.call.max_emit, b) : 0x7fffffff;
    r.valid = r.valid && r.most >= 0;
    if (a.call.repetition_penalty) {
        const float penalty = one_of(a.call.repetition_penalty, b);
        r.valid = r.valid && penalty > 0 && penalty <= kLargest;
    }
    if (a.call.cu_edits) r.valid = r.valid && bounds_of(a.call.cu_edits, b, a.edits, &unused, &end);
    if (a.call.cu_stop) r.valid = r.valid && bounds_of(a.call.cu_stop, b, a.stops, &unused, &end);
    r.greedy = a.call.rule == ASSAY_GREEDY || t == 0;
    // Kept from overflow and underflow, where 0 * infinity would make a NaN.
    const float inverse = ptx::div_rn(1.0f, t);
    r.inverse_t = r.greedy ? 1 : inverse < kSmallest ? kSmallest : inverse > kLargest ? kLargest : inverse;
    r.filtered = !r.greedy && (uses_top_k(a, b) || uses_top_p(a, b) || uses_min_p(a, b) || uses_typical_p(a, b));
    r.sums = a.call.logprobs || (!r.greedy && (a.call.rule != ASSAY_GUMBEL || r.filtered));
    return r;
}

// The request that owns a row, if offsets rise as they should: the last whose first row is not behind it.
ASSAY_DEVICE int64_t owner_of(const VerifyArgs &a, int64_t row) {
    int64_t low = 0, high = a.call.batch;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (one_of(a.call.cu_num_draft_tokens, middle) + middle <= row) low = middle;
        else high = middle;
    }
    return low;
}

// Node number (draft index plus one, 0: the root) of a node's parent; at least the node itself where that is no parent.
ASSAY_DEVICE int64_t parent_of(const VerifyArgs &a, int64_t first, int64_t node) {
    if (!a.call.parents) return node - 1;
    const int64_t parent = one_of(a.call.parents, first + node - 1);
    return parent < -1 ? node : parent + 1;
}
ASSAY_DEVICE int32_t id_of(const VerifyArgs &a, const Request &r, int64_t node) {
    return one_of(a.call.draft_token_ids, r.first + node - 1);
}

// ---- a row's elements ----------------------------------------------------------------------------------------

struct Row {
    const uint8_t *logits;
    int64_t node;
    bool processed;              // penalties, biases or a mask touch it
    const assay_cuda_row *cut;   // what filters cut, in memory; null: nothing
};

ASSAY_DEVICE bool is_penalised(const VerifyArgs &a, int64_t b) {
    return a.call.repetition_penalty &&
           !(one_of(a.call.repetition_penalty, b) == 1 && one_of(a.call.frequency_penalty, b) == 0 &&
             one_of(a.call.presence_penalty, b) == 0);
}

// cuts: whether filters' cuts, as found, are to apply.
ASSAY_DEVICE Row row_at(const VerifyArgs &a, const Request &r, int64_t node, bool cuts) {
    const int64_t at = r.first + r.b + node;
    Row row = {};
    row.logits = static_cast<const uint8_t *>(a.call.target_logits) + at * a.call.ld * (a.call.dtype == ASSAY_F32 ? 4 : 2);
    row.node = node;
    row.processed = a.call.bitmask || (node > 0 && is_penalised(a, r.b)) ||
                    (a.call.cu_edits && one_of(a.call.cu_edits, r.b) < one_of(a.call.cu_edits, r.b + 1));
    row.cut = cuts && r.filtered && a.rows[at].cuts ? a.rows + at : nullptr;
    return row;
}

ASSAY_DEVICE float raw_logit(const VerifyArgs &a, const Row &row, int64_t token) {
    if (a.call.dtype == ASSAY_F32) return ptx::ldg_float(reinterpret_cast<const float *>(row.logits) + token);
    const uint16_t h = static_cast<uint16_t>(ptx::ldg16(row.logits + 2 * token));
    return a.call.dtype == ASSAY_F16 ? ptx::half_to_float(h) : ptx::bf16_to_float(h);
}

// Penalties, bias and bans: the request's list of tokens, and the drafts on the row's own path.
ASSAY_DEVICE float edited_logit(const VerifyArgs &a, int64_t b, int64_t first, int64_t node, int64_t token, float logit) {
    int64_t low, high;
    bounds_of(a.call.cu_edits, b, a.edits, &low, &high);
    const int64_t end = high;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (one_of(a.call.edit_token_ids, middle) < token) low = middle + 1;
        else high = middle;
    }
    const bool listed = low < end && one_of(a.call.edit_token_ids, low) == token;
    int32_t count = listed ? one_of(a.call.edit_count, low) : 0;
    bool seen = count || (listed && one_of(a.call.edit_in_prompt, low));
    bool touched = listed;
    for (node = is_penalised(a, b) ? node : 0; node > 0;) {
        if (one_of(a.call.draft_token_ids, first + node - 1) == token) {
            count++;
            seen = touched = true;
        }
        const int64_t parent = parent_of(a, first, node);
        node = parent < node ? parent : 0;
    }
    if (!touched) return logit;
    if (a.call.repetition_penalty) {
        const float penalty = one_of(a.call.repetition_penalty, b);
        if (seen && penalty != 1) logit = logit > 0 ? ptx::div_rn(logit, penalty) : logit * penalty;
        if (count) {
            logit -= one_of(a.call.frequency_penalty, b) * static_cast<float>(count);
            logit -= one_of(a.call.presence_penalty, b);
        }
    }
    return logit + (listed ? one_of(a.call.edit_bias, low) : 0);
}

ASSAY_DEVICE bool kept(uint32_t key, int64_t id, uint32_t last_key, int32_t last) {
    return key > last_key || (key == last_key && id <= last);
}

// Falls with the distance of -log p from the entropy.
ASSAY_DEVICE uint32_t distance_key(const assay_cuda_row &cut, float inverse_t, float logit) {
    return ~ptx::float_as_uint(magnitude((logit - cut.top) * inverse_t - cut.center));
}

ASSAY_DEVICE float cut_logit(const assay_cuda_row &cut, float min_p, float inverse_t, float logit, int64_t id) {
    const float none = -infinity();
    if (cut.cuts & kCutLogits && !kept(logit_key(logit), id, cut.logit_key, cut.logit_last)) return none;
    if (cut.cuts & kCutMinP && !(assay_vexp((logit - cut.top) * inverse_t) >= min_p)) return none;
    if (cut.cuts & kCutTypical && !kept(distance_key(cut, inverse_t, logit), id, cut.distance_key, cut.distance_last)) return none;
    return logit;
}

// Not inlined: what most rows do without would otherwise fill every loop over a row.
ASSAY_OUT_OF_LINE float processed_logit(const VerifyArgs &a, int64_t b, int64_t first, int64_t node, const assay_cuda_row *cut,
                                        float inverse_t, int64_t token, float logit) {
    if (a.call.cu_edits) logit = edited_logit(a, b, first, node, token, logit);
    if (a.call.bitmask) {
        const uint32_t *mask = a.call.bitmask + (a.call.bitmask_per_row ? first + b + node : b) * a.call.bitmask_ld;
        if (!(ptx::ldg32(mask + (token >> 5)) >> (token & 31) & 1)) logit = -infinity();
    }
    return cut ? cut_logit(*cut, a.call.min_p ? one_of(a.call.min_p, b) : 0, inverse_t, logit, token) : logit;
}

ASSAY_DEVICE float processed(const VerifyArgs &a, const Request &r, const Row &row, int64_t token, float logit) {
    if (!row.processed && !row.cut) return logit;
    return processed_logit(a, r.b, r.first, row.node, row.cut, r.inverse_t, token, logit);
}

// Element `token` as processors and filters leave it; minus infinity past the vocabulary.
ASSAY_DEVICE float element_at(const VerifyArgs &a, const Request &r, const Row &row, int64_t token) {
    if (token >= a.call.vocab) return -infinity();
    return processed(a, r, row, token, raw_logit(a, row, token));
}

ASSAY_DEVICE float weight_at(const VerifyArgs &a, const Request &r, const Row &row, float shift, int64_t token) {
    return assay_vexp((element_at(a, r, row, token) - shift) * r.inverse_t);
}

// ---- sums ----------------------------------------------------------------------------------------------------

// Folds 16 lanes, each half of a warp its own; every lane of a half gets the sum.
ASSAY_DEVICE float fold_half_warp(float lane) {
    lane += ptx::shfl_xor(lane, 8u);
    lane += ptx::shfl_xor(lane, 4u);
    lane += ptx::shfl_xor(lane, 2u);
    return lane + ptx::shfl_xor(lane, 1u);
}

// By a warp: the sum of weight(i) over a block's elements i, in 16 lanes; weight(i) is called once for each i below `n` rounded
// up to 32, by lane i mod 32, and is 0 from n on.
template <class Weight>
ASSAY_DEVICE float sum_block(int32_t n, Weight weight) {
    constexpr int kAhead = 4;
    const int32_t lane = static_cast<int32_t>(ptx::lane());
    float sum = 0;
    for (int32_t from = 0; from < n; from += 32 * kAhead) {
        float w[kAhead];
        ASSAY_UNROLL
        for (int k = 0; k < kAhead; k++) w[k] = from + 32 * k < n ? weight(from + 32 * k + lane) : 0.0f;
        ASSAY_UNROLL
        for (int k = 0; k < kAhead; k++) {
            sum += w[k];
            sum += ptx::shfl_xor(w[k], 16u);
        }
    }
    return ptx::shfl(fold_half_warp(sum), 0u);
}

// By a warp: the double sum over blocks of mass(b), b ascending.
template <class Mass>
ASSAY_DEVICE double sum_blocks(int64_t count, Mass mass) {
    double total = 0;
    for (int64_t from = 0; from < count; from += 32) {
        const int64_t mine = from + ptx::lane();
        const double m = mine < count ? mass(mine) : 0.0;
        const uint32_t n = static_cast<uint32_t>(min_of<int64_t>(32, count - from));
        for (uint32_t i = 0; i < n; i++) total += ptx::shfl(m, i);
    }
    return total;
}

// The block that holds the target of cumulated masses, and what lies before it; the last positive one on overrun.
struct Place {
    int64_t block;
    double before, target;
};

template <class Mass>
ASSAY_DEVICE Place place_of(int64_t count, double target, Mass mass) {
    Place found = {0, 0, double_infinity()};
    double at = 0;
    for (int64_t from = 0; from < count; from += 32) {
        const int64_t mine = from + ptx::lane();
        const double m = mine < count ? mass(mine) : 0.0;
        const uint32_t n = static_cast<uint32_t>(min_of<int64_t>(32, count - from));
        for (uint32_t i = 0; i < n; i++) {
            const double w = ptx::shfl(m, i);
            if (at + w > target) return {from + i, at, target};
            if (w > 0) found = {from + i, at, double_infinity()};
            at += w;
        }
    }
    return found;
}

// By a warp: the first of a block's elements whose cumulated weight exceeds the place's target. Groups of 16 are summed and
// passed over first. When rounding leaves the target beyond the end: the last element of positive weight.
template <class Weight>
ASSAY_DEVICE int32_t pick_in_block(int32_t n, double factor, const Place &place, Weight weight) {
    const int32_t lane = static_cast<int32_t>(ptx::lane());
    double at = place.before, last_at = place.before, target = place.target;
    int32_t group = -1, last = 0;
    for (int32_t from = 0; from < n && group < 0; from += 32) {
        const float sum = fold_half_warp(weight(from + lane));
        for (uint32_t half = 0; half < 2 && group < 0; half++) {
            const double w = static_cast<double>(ptx::shfl(sum, 16 * half)) * factor;
            if (at + w > target) {
                group = from / 16 + static_cast<int32_t>(half);
            } else {
                if (w > 0) {
                    last = from / 16 + static_cast<int32_t>(half);
                    last_at = at;
                }
                at += w;
            }
        }
    }
    if (group < 0) {
        group = last;
        at = last_at;
        target = double_infinity();
    }
    const float mine = weight(16 * group + (lane & 15));
    int32_t found = 0;
    for (uint32_t i = 0; i < 16; i++) {
        const double w = static_cast<double>(ptx::shfl(mine, i)) * factor;
        if (w > 0) found = static_cast<int32_t>(i);
        if (at + w > target) break;
        at += w;
    }
    return 16 * group + found;
}

ASSAY_DEVICE int32_t block_length(const VerifyArgs &a, int64_t b) {
    return static_cast<int32_t>(min_of<int64_t>(kVocabBlock, a.call.vocab - b * kVocabBlock));
}

// ---- a row's state -------------------------------------------------------------------------------------------

// A row at hand: its elements and its state.
struct Opened {
    Row row;
    int64_t at;                       // its number
    const assay_cuda_block *blocks;
    assay_cuda_row state;
};

ASSAY_DEVICE float factor_of(const Request &r, const Opened &o, int64_t b) {
    return assay_vexp((o.blocks[b].largest - o.state.shift) * r.inverse_t);
}
ASSAY_DEVICE double mass_of(const Request &r, const Opened &o, int64_t b) {
    const float sum = o.blocks[b].sum;
    return sum > 0 ? static_cast<double>(sum) * static_cast<double>(factor_of(r, o, b)) : 0;
}

// By a warp: the shift of a row by its blocks' records, and the row's status.
ASSAY_DEVICE int32_t shift_of(const VerifyArgs &a, const assay_cuda_block *blocks, float *shift) {
    uint32_t key = logit_key(-infinity());
    bool nan = false;
    for (int64_t b = ptx::lane(); b < a.block_count; b += 32) {
        const float largest = blocks[b].largest;
        nan |= is_nan(largest);
        if (!is_nan(largest)) key = max_of(key, logit_key(largest));
    }
    *shift = logit_of(ptx::redux_max(key));
    if (ptx::any(nan)) return ASSAY_ROW_NAN;
    if (*shift == infinity()) return ASSAY_ROW_INF;
    return *shift == -infinity() ? ASSAY_ROW_EMPTY : ASSAY_ROW_OK;
}

// By a warp: the row of a node, its state as stored.
ASSAY_DEVICE Opened open_row(const VerifyArgs &a, const Request &r, int64_t node) {
    Opened o;
    o.row = row_at(a, r, node, true);
    o.at = r.first + r.b + node;
    o.blocks = a.blocks + o.at * a.block_count;
    o.state = a.rows[o.at];
    return o;
}

// By a warp: shift and normaliser of a row from its blocks' records, into o.state.
ASSAY_DEVICE void combine_blocks(const VerifyArgs &a, const Request &r, Opened &o) {
    o.state.status = shift_of(a, o.blocks, &o.state.shift);
    o.state.total = o.state.log_total = 0;
    o.state.scale = 0;
    if (o.state.status || !r.sums) return;
    o.state.total = sum_blocks(a.block_count, [&](int64_t b) { return mass_of(r, o, b); });
    o.state.scale = static_cast<float>(ptx::div_rn(1.0, o.state.total));
    o.state.log_total = o.state.total > 0 ? assay_log(o.state.total) : 0;
}

// ---- of one token ----------------------------------------------------------------------------------------------

ASSAY_DEVICE float probability_of(const VerifyArgs &a, const Request &r, const Opened &o, int32_t token) {
    if (token < 0 || token >= a.call.vocab) return 0;
    return weight_at(a, r, o.row, o.state.shift, token) * o.state.scale;
}
ASSAY_DEVICE float log_probability_of(const VerifyArgs &a, const Request &r, const Opened &o, int32_t token) {
    const float exponent = (element_at(a, r, o.row, token) - o.state.shift) * r.inverse_t;
    return static_cast<float>(static_cast<double>(exponent) - o.state.log_total);
}

ASSAY_DEVICE bool has_q(const VerifyArgs &a) { return a.call.draft_probs || a.call.draft_prob_ids; }

// q of a token by row q_row of the drafts' distributions.
ASSAY_DEVICE float q_at(const VerifyArgs &a, int64_t q_row, int64_t token) {
    if (a.call.draft_probs) return ptx::ldg_float(a.call.draft_probs + q_row * a.call.vocab + token);
    const int64_t start = q_row * a.call.draft_prob_width;
    int64_t low = 0, high = a.call.draft_prob_width;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (one_of(a.call.draft_prob_ids, start + middle) < token) low = middle + 1;
        else high = middle;
    }
    float q = 0;
    for (; low < a.call.draft_prob_width && one_of(a.call.draft_prob_ids, start + low) == token; low++)
        q += one_of(a.call.draft_prob_values, start + low);
    return q;
}
ASSAY_DEVICE double q_of(const VerifyArgs &a, int64_t q_row, int32_t token) {
    return token < 0 || token >= a.call.vocab ? 0 : static_cast<double>(q_at(a, q_row, token));
}
ASSAY_DEVICE bool is_probability(double q) { return q >= 0 && q <= static_cast<double>(kLargest); }

// What a rule draws with: the caller's number, or the one keyed by the position of the token that it decides.
ASSAY_OUT_OF_LINE double keyed_uniform(uint64_t seed, uint64_t position, uint32_t domain, uint32_t node) {
    return philox_uniform(seed, position, domain, node);
}
ASSAY_DEVICE double uniform_of(const VerifyArgs &a, const Request &r, uint32_t domain, int64_t node, int64_t depth,
                               uint32_t key_node) {
    if (a.call.uniforms) {
        const double *given = a.call.uniforms + r.first + 2 * r.b;
        if (a.call.rule == ASSAY_SAMPLED) return given[depth];
        return given[domain == ASSAY_ACCEPT ? node - 1 : domain == ASSAY_RESIDUAL ? r.drafts : r.drafts + 1];
    }
    return keyed_uniform(a.call.seed[r.b], static_cast<uint64_t>(a.call.position[r.b]) + static_cast<uint64_t>(depth), domain,
                         key_node);
}

}  // namespace assay

#endif

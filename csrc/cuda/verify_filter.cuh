// top_k, top_p, min_p and typical_p: the cuts of a row, and its blocks' records after them. A block of threads a row.
//
// As csrc/spec_process.c: each filter keeps the first elements of an order, up to a key and among its equals to an id. The key is
// found 11, 11 and 10 bits at a time in a histogram; blocks whose largest logit rules them out are passed over. Masses are
// added up in fixed point, units of 2^-46, so that their sum is exact and atomic additions may come in any order.
#ifndef ASSAY_CUDA_VERIFY_FILTER_CUH
#define ASSAY_CUDA_VERIFY_FILTER_CUH

#include "verify_scan.cuh"

namespace assay {

constexpr int kFilterThreads = 256;
constexpr int kBuckets = 2048;
constexpr int kBucketsEach = kBuckets / kFilterThreads;

// A sum of weights: low in units of 2^-46, high of 2^-14. Neither overflows for fewer than 2^31 weights of at most 1.
struct Mass {
    uint64_t high, low;
};
// As csrc/cpu/spec_verify/mass.h: by two roundings to the nearest, of 2^-23 and of 2^-46.
ASSAY_DEVICE Mass mass_of_weight(float w) {
    constexpr float kFine = 0x1.8p-23f;
    const float whole = w + 1.0f, rest = (w - (whole - 1.0f)) + kFine;
    const int64_t high = static_cast<int64_t>(ptx::float_as_uint(whole)) - ptx::float_as_uint(1.0f);
    const int64_t low = static_cast<int64_t>(ptx::float_as_uint(rest)) - ptx::float_as_uint(kFine);
    const uint64_t units = static_cast<uint64_t>(high * (1 << 23) + low);
    return {units >> 32, units & 0xffffffffu};
}
ASSAY_DEVICE Mass operator+(const Mass &a, const Mass &b) { return {a.high + b.high, a.low + b.low}; }
ASSAY_DEVICE double value_of(const Mass &m) {
    const uint64_t high = m.high + (m.low >> 32), low = m.low & 0xffffffffu;
    return static_cast<double>(high << 9 | low >> 23) * 0x1p-23 + static_cast<double>(low & 0x7fffffu) * 0x1p-46;
}

struct Tally {
    uint64_t count;
    Mass mass;
};
ASSAY_DEVICE Tally operator+(const Tally &a, const Tally &b) { return {a.count + b.count, a.mass + b.mass}; }

struct FilterShared {
    union {
        struct {
            uint32_t count[kBuckets], limb[3][kBuckets];   // limbs of a mass: 32 bits each, least first
        } histogram;
        ScanShared scan;
    };
    Tally warps[kFilterThreads / 32];
    Tally before;              // of the bucket that was found
    uint32_t found;            // its place from the top
    uint32_t hits[kVocabBlock / 32];
};

// A row on its way through the filters: its cuts so far, which its elements read from memory.
struct Filter {
    Row row;
    assay_cuda_row cut;
};

// An order and how much of it to keep: so many elements, or where that is 0 so large a share of the total weight; where that is
// negative, of what the order has.
struct Selection {
    bool by_distance;
    uint64_t elements;
    double share, total;
};

ASSAY_DEVICE uint32_t key_of(const Request &r, const Filter &f, const Selection &s, float logit) {
    return s.by_distance ? distance_key(f.cut, r.inverse_t, logit) : logit_key(logit);
}

// Whether block b can hold a key whose bits from `shift` up are these: its largest logit tells, not the distance.
ASSAY_DEVICE bool may_hold(const assay_cuda_block &block, const Selection &s, uint32_t prefix, uint32_t shift) {
    if (!(block.largest > -infinity())) return false;
    return s.by_distance || logit_key(block.largest) >> shift >= prefix;
}

ASSAY_DEVICE float weight_below_top(const Request &r, const Filter &f, float logit) {
    return assay_vexp((logit - f.cut.top) * r.inverse_t);
}

// With carries: the sum is the same in any order.
ASSAY_DEVICE void add_weight(FilterShared *shared, uint32_t bucket, float w) {
    const Mass m = mass_of_weight(w);
    const uint32_t low = static_cast<uint32_t>(m.low);
    uint64_t rest = m.high;
    if (low) rest += ptx::atomic_add(&shared->histogram.limb[0][bucket], low) > ~low;
    const uint32_t middle = static_cast<uint32_t>(rest);
    uint32_t top = static_cast<uint32_t>(rest >> 32);
    if (middle) top += ptx::atomic_add(&shared->histogram.limb[1][bucket], middle) > ~middle;
    if (top) ptx::atomic_add(&shared->histogram.limb[2][bucket], top);
}

// By all threads, as what follows.
ASSAY_DEVICE void fill_histogram(const VerifyArgs &a, const Request &r, const Filter &f, const assay_cuda_block *blocks,
                                 const Selection &s, uint32_t prefix, uint32_t shift, uint32_t bits, FilterShared *shared) {
    const bool below = shift + bits < 32;   // the first level has no prefix
    for (uint32_t i = ptx::tid(); i < kBuckets; i += kFilterThreads) {
        shared->histogram.count[i] = 0;
        for (int limb = 0; limb < 3; limb++) shared->histogram.limb[limb][i] = 0;
    }
    ptx::sync();
    for (int64_t b = ptx::warp(); b < a.block_count; b += kFilterThreads / 32) {
        if (!may_hold(blocks[b], s, below ? prefix : 0, below ? shift + bits : 31)) continue;
        for (int32_t i = static_cast<int32_t>(ptx::lane()); i < block_length(a, b); i += 32) {
            const float x = element_at(a, r, f.row, b * kVocabBlock + i);
            if (!(x > -infinity())) continue;
            const uint32_t key = key_of(r, f, s, x);
            if (below && key >> (shift + bits) != prefix) continue;
            const uint32_t bucket = key >> shift & ((1u << bits) - 1);
            ptx::atomic_add(&shared->histogram.count[bucket], 1u);
            if (!s.elements) add_weight(shared, bucket, weight_below_top(r, f, x));
        }
    }
    ptx::sync();
}

ASSAY_DEVICE Tally tally_of_bucket(const FilterShared *shared, uint32_t bucket) {
    const uint64_t high = static_cast<uint64_t>(shared->histogram.limb[2][bucket]) << 32 | shared->histogram.limb[1][bucket];
    return {shared->histogram.count[bucket], {high, shared->histogram.limb[0][bucket]}};
}

ASSAY_DEVICE Tally shfl_up_tally(const Tally &t, uint32_t delta) {
    return {ptx::shfl_up(t.count, delta), {ptx::shfl_up(t.mass.high, delta), ptx::shfl_up(t.mass.low, delta)}};
}

ASSAY_DEVICE bool is_enough(const Selection &s, const Tally &t, double target) {
    return s.elements ? t.count >= s.elements : value_of(t.mass) >= target;
}

// The bucket, from the top, with which there is enough; `before` grows by what lies above it. *target: at the first level, of
// all there is. False: there is not enough.
ASSAY_DEVICE bool find_bucket(const Selection &s, bool first_level, uint32_t bits, Tally *before, double *target,
                              uint32_t *bucket, FilterShared *shared) {
    const uint32_t buckets = 1u << bits, each = buckets / kFilterThreads, top = buckets - 1 - each * ptx::tid();
    Tally mine = {};
    for (uint32_t j = 0; j < each; j++) mine = mine + tally_of_bucket(shared, top - j);
    Tally upto = mine;
    for (uint32_t d = 1; d < 32; d *= 2) {
        const Tally other = shfl_up_tally(upto, d);
        if (ptx::lane() >= d) upto = upto + other;
    }
    if (ptx::lane() == 31) shared->warps[ptx::warp()] = upto;
    if (ptx::tid() == 0) shared->found = 0xffffffffu;
    ptx::sync();
    Tally all = {}, above = *before;
    for (uint32_t w = 0; w < kFilterThreads / 32; w++) {
        all = all + shared->warps[w];
        if (w < ptx::warp()) above = above + shared->warps[w];
    }
    if (first_level) *target = s.share * (s.total < 0 ? value_of(all.mass) : s.total);
    // What lies above this thread's buckets: all up to them, less its own.
    above = above + Tally{upto.count - mine.count, {upto.mass.high - mine.mass.high, upto.mass.low - mine.mass.low}};
    uint32_t place = 0xffffffffu;
    Tally found = {};
    for (uint32_t j = 0; j < each && place == 0xffffffffu; j++) {
        const Tally t = tally_of_bucket(shared, top - j);
        if (t.count && is_enough(s, above + t, *target)) {
            place = each * ptx::tid() + j;
            found = above;
        }
        above = above + t;
    }
    if (place != 0xffffffffu) ptx::atomic_min(&shared->found, place);
    ptx::sync();
    const uint32_t best = shared->found;
    if (best == place && best != 0xffffffffu) shared->before = found;
    ptx::sync();
    if (best == 0xffffffffu) return false;
    *bucket = buckets - 1 - best;
    *before = shared->before;
    return true;
}

// The id at which the elements of this key have reached what is wanted beyond `before`.
ASSAY_DEVICE int32_t last_of_key(const VerifyArgs &a, const Request &r, const Filter &f, const assay_cuda_block *blocks,
                                 const Selection &s, uint32_t key, Tally before, double target, FilterShared *shared) {
    constexpr int32_t kWords = kVocabBlock / 32;
    int32_t last = -1;
    for (int64_t b = 0; b < a.block_count; b++) {
        if (!may_hold(blocks[b], s, key, 0)) continue;
        for (int32_t word = static_cast<int32_t>(ptx::warp()); word < kWords; word += kFilterThreads / 32) {
            const float x = element_at(a, r, f.row, b * kVocabBlock + 32 * word + ptx::lane());
            const uint32_t hits = ptx::ballot(x > -infinity() && key_of(r, f, s, x) == key);
            if (ptx::lane() == 0) shared->hits[word] = hits;
        }
        ptx::sync();
        bool reached = false;
        for (int32_t word = 0; word < kWords && !reached; word++) {
            uint32_t hits = shared->hits[word];
            if (s.elements && before.count + ptx::popc(hits) < s.elements) {
                before.count += ptx::popc(hits);
                continue;
            }
            for (; hits && !reached; hits &= hits - 1) {
                last = static_cast<int32_t>(b * kVocabBlock) + 32 * word + static_cast<int32_t>(ptx::ctz(hits));
                before.count++;
                if (!s.elements)
                    before.mass = before.mass + mass_of_weight(weight_below_top(r, f, element_at(a, r, f.row, last)));
                reached = is_enough(s, before, target);
            }
        }
        ptx::sync();
        if (reached) break;
    }
    return last;
}

// The cut that keeps the fewest elements that are enough. False when all are needed.
ASSAY_DEVICE bool select_first(const VerifyArgs &a, const Request &r, const Filter &f, const assay_cuda_block *blocks,
                               const Selection &s, uint32_t *key, int32_t *last, FilterShared *shared) {
    uint32_t prefix = 0;
    Tally before = {};
    double target = 0;
    for (uint32_t level = 0; level < 3; level++) {
        const uint32_t shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
        uint32_t bucket;
        fill_histogram(a, r, f, blocks, s, prefix, shift, bits, shared);
        if (!find_bucket(s, level == 0, bits, &before, &target, &bucket, shared)) return false;
        prefix = prefix << bits | bucket;
    }
    *key = prefix;
    *last = last_of_key(a, r, f, blocks, s, prefix, before, target, shared);
    return true;
}

// The mean of (l - top) / T under what is left of the row, and the weight of that.
ASSAY_DEVICE float center_of(const VerifyArgs &a, const Request &r, const Filter &f, const assay_cuda_block *blocks, int64_t at,
                             double *total) {
    double *masses = a.masses + at * a.block_count, *totals = a.totals + at * a.block_count;
    for (int64_t b = ptx::warp(); b < a.block_count; b += kFilterThreads / 32) {
        double mass, total;
        entropy_of_block(a, r, f.row, blocks[b], f.cut.top, b, &mass, &total);
        if (ptx::lane() == 0) {
            masses[b] = mass;
            totals[b] = total;
        }
    }
    ptx::sync();
    *total = sum_blocks(a.block_count, [&](int64_t b) { return totals[b]; });
    return static_cast<float>(ptx::div_rn(sum_blocks(a.block_count, [&](int64_t b) { return masses[b]; }), *total));
}

// By all threads: makes the cuts found so far those of the row's elements.
ASSAY_DEVICE void publish(const VerifyArgs &a, Filter *f, int64_t at) {
    ptx::sync();
    if (ptx::tid() == 0) a.rows[at] = f->cut;
    ptx::sync();
    f->row.cut = f->cut.cuts ? a.rows + at : nullptr;
}

ASSAY_DEVICE void verify_filter(const VerifyArgs &a) {
    FilterShared *shared = reinterpret_cast<FilterShared *>(ptx::shared());
    const int64_t at = ptx::bid_x();
    const Unit u = unit_at(a, at);
    const Request &r = u.request;
    if (!u.read || !r.filtered) return;
    assay_cuda_block *blocks = a.blocks + at * a.block_count;
    Filter f = {row_at(a, r, u.node, false), {}};
    if (shift_of(a, blocks, &f.cut.top) != ASSAY_ROW_OK) return;
    if (uses_top_k(a, r.b)) {
        const Selection s = {false, static_cast<uint64_t>(one_of(a.call.top_k, r.b)), 0, 0};
        if (select_first(a, r, f, blocks, s, &f.cut.logit_key, &f.cut.logit_last, shared)) f.cut.cuts |= kCutLogits;
        publish(a, &f, at);
    }
    if (uses_top_p(a, r.b)) {
        // A prefix of a prefix of the same order; the share is of what is left.
        const double total = f.cut.cuts ? -1 : sum_blocks(a.block_count, [&](int64_t b) {
            const float sum = blocks[b].sum, factor = assay_vexp((blocks[b].largest - f.cut.top) * r.inverse_t);
            return sum > 0 ? static_cast<double>(sum) * static_cast<double>(factor) : 0;
        });
        const Selection s = {false, 0, static_cast<double>(one_of(a.call.top_p, r.b)), total};
        uint32_t key;
        int32_t last;
        if (select_first(a, r, f, blocks, s, &key, &last, shared)) {
            f.cut.cuts |= kCutLogits;
            f.cut.logit_key = key;
            f.cut.logit_last = last;
        }
    }
    if (uses_min_p(a, r.b)) f.cut.cuts |= kCutMinP;
    publish(a, &f, at);
    if (uses_typical_p(a, r.b)) {
        double total;
        f.cut.center = center_of(a, r, f, blocks, at, &total);
        const Selection s = {true, 0, static_cast<double>(one_of(a.call.typical_p, r.b)), total};
        if (select_first(a, r, f, blocks, s, &f.cut.distance_key, &f.cut.distance_last, shared)) f.cut.cuts |= kCutTypical;
        publish(a, &f, at);
    }
    if (!f.cut.cuts) return;
    const float least = f.cut.cuts & kCutLogits ? logit_of(f.cut.logit_key) : -infinity();
    for (int64_t b = 0; b < a.block_count; b++) {
        ptx::sync();
        assay_cuda_block block = blocks[b];
        if (!f.row.processed && block.largest < least) {
            block.largest = -infinity();
            block.sum = 0;
            ptx::sync();   // all have read it
        } else {
            block = scan_block<kFilterThreads>(a, r, f.row, b, &shared->scan);
        }
        if (ptx::tid() == 0) blocks[b] = block;
    }
}

}  // namespace assay

#endif

// The passes of verification over all rows at once, a block of the vocabulary each.
//
// verify_scan     128 threads a block of 2048 logits: its largest, where it stands, and the sum of exp((l - largest) / T).
//                 Logits go from memory to registers once, as 16-byte (float32) or 8-byte pieces; weights to shared memory
//                 for the sum's 16 lanes, a chain of 128 additions each that other blocks of the multiprocessor hide.
// verify_race     GUMBEL: a warp a block, its best time and whose it is.
// verify_entropy  TYPICAL: a warp a block, the sums that the entropy comes of.
#ifndef ASSAY_CUDA_VERIFY_SCAN_CUH
#define ASSAY_CUDA_VERIFY_SCAN_CUH

#include "verify_rows.cuh"

namespace assay {

constexpr int kScanThreads = 128;
constexpr int kPassThreads = 128;

struct ScanShared {
    float weights[kVocabBlock];
    uint32_t keys[8], flags[8], firsts[8];   // of a warp each
};

// A row by its number: whose it is, and whether it is read. Not read: a node without a draft, a request that emits nothing.
struct Unit {
    Request request;
    int64_t node;
    bool read;
};

ASSAY_DEVICE Unit unit_at(const VerifyArgs &a, int64_t row) {
    Unit u;
    const int64_t b = owner_of(a, row);
    u.request = request_at(a, b);
    u.node = row - u.request.first - b;
    u.read = u.request.valid && u.node >= 0 && u.node <= u.request.drafts && u.request.most > 0 &&
             (u.node == 0 || id_of(a, u.request, u.node) >= 0);
    return u;
}

// The block's raw logits: value e of thread t is element 4 (t + e / 4 kThreads) + e % 4. Minus infinity past n.
template <int kThreads>
ASSAY_DEVICE void load_block(const VerifyArgs &a, const Row &row, int64_t from, int32_t n, float (&x)[kVocabBlock / kThreads]) {
    const int32_t item = a.call.dtype == ASSAY_F32 ? 4 : 2;
    const uint8_t *base = row.logits + from * item;
    const bool whole = n == kVocabBlock && (reinterpret_cast<uintptr_t>(base) & static_cast<uintptr_t>(4 * item - 1)) == 0;
    ASSAY_UNROLL
    for (int g = 0; g < kVocabBlock / kThreads / 4; g++) {
        const int32_t i = 4 * (static_cast<int32_t>(ptx::tid()) + g * kThreads);
        if (whole && item == 4) {
            const u32x4 v = ptx::ldg128(base + 4 * i);
            x[4 * g] = ptx::uint_as_float(v.x);
            x[4 * g + 1] = ptx::uint_as_float(v.y);
            x[4 * g + 2] = ptx::uint_as_float(v.z);
            x[4 * g + 3] = ptx::uint_as_float(v.w);
        } else if (whole) {
            const u32x2 v = ptx::ldg64(base + 2 * i);
            const uint32_t halves[4] = {v.x & 0xffffu, v.x >> 16, v.y & 0xffffu, v.y >> 16};
            ASSAY_UNROLL
            for (int k = 0; k < 4; k++)
                x[4 * g + k] = a.call.dtype == ASSAY_F16 ? ptx::half_to_float(static_cast<uint16_t>(halves[k]))
                                                         : ptx::bf16_to_float(static_cast<uint16_t>(halves[k]));
        } else {
            ASSAY_UNROLL
            for (int k = 0; k < 4; k++) x[4 * g + k] = i + k < n ? raw_logit(a, row, from + i + k) : -infinity();
        }
    }
}

// By all kThreads threads: the record of block b of a row. Thread 0 has it. Ends with shared memory free for the next call.
template <int kThreads>
ASSAY_DEVICE assay_cuda_block scan_block(const VerifyArgs &a, const Request &r, const Row &row, int64_t b, ScanShared *shared) {
    enum { kRawNan = 1, kRawInf = 2, kNan = 4 };
    constexpr int kPer = kVocabBlock / kThreads, kWarps = kThreads / 32;
    const int64_t from = b * kVocabBlock;
    const int32_t n = block_length(a, b), tid = static_cast<int32_t>(ptx::tid());
    float x[kPer];
    load_block<kThreads>(a, row, from, n, x);
    uint32_t key = logit_key(-infinity()), flags = 0;
    ASSAY_UNROLL
    for (int e = 0; e < kPer; e++) {
        if (is_nan(x[e])) flags |= kRawNan;
        if (x[e] == infinity()) flags |= kRawInf;
        if (row.processed || row.cut) {
            const int32_t i = 4 * (tid + e / 4 * kThreads) + e % 4;
            if (i < n) x[e] = processed(a, r, row, from + i, x[e]);
            if (is_nan(x[e])) flags |= kNan;
        }
        if (!is_nan(x[e])) key = max_of(key, logit_key(x[e]));
    }
    key = ptx::redux_max(key);
    flags = (ptx::any(flags & kRawNan) ? kRawNan : 0) | (ptx::any(flags & kRawInf) ? kRawInf : 0) |
            (ptx::any(flags & kNan) ? kNan : 0);
    if (ptx::lane() == 0) {
        shared->keys[ptx::warp()] = key;
        shared->flags[ptx::warp()] = flags;
    }
    ptx::sync();
    for (int w = 0; w < kWarps; w++) {
        key = max_of(key, shared->keys[w]);
        flags |= shared->flags[w];
    }
    // A mask must not hide what poisons the row.
    float largest = logit_of(key);
    if (flags & kRawNan) largest = not_a_number();
    else if (flags & kRawInf) largest = infinity();
    else if (flags & kNan) largest = not_a_number();
    uint32_t first = 0xffffffffu;
    const bool summed = r.sums && is_finite(largest);
    ASSAY_UNROLL
    for (int e = kPer - 1; e >= 0; e--) {
        const int32_t i = 4 * (tid + e / 4 * kThreads) + e % 4;
        if (x[e] == largest && i < n) first = static_cast<uint32_t>(i);
        if (summed) x[e] = assay_vexp((x[e] - largest) * r.inverse_t);
    }
    first = ptx::redux_min(first);
    if (ptx::lane() == 0) shared->firsts[ptx::warp()] = first;
    if (summed) {
        ASSAY_UNROLL
        for (int g = 0; g < kPer / 4; g++)
            ptx::sts(&shared->weights[4 * (tid + g * kThreads)],
                     u32x4{ptx::float_as_uint(x[4 * g]), ptx::float_as_uint(x[4 * g + 1]), ptx::float_as_uint(x[4 * g + 2]),
                           ptx::float_as_uint(x[4 * g + 3])});
    }
    ptx::sync();
    assay_cuda_block block = {largest, 0, 0, 0};
    if (ptx::warp() == 0) {
        if (summed) {
            float sum = 0;
            const float *lane = shared->weights + (tid & 15);
            ASSAY_UNROLL
            for (int i = 0; i < kVocabBlock / 16; i++) sum += ptx::uint_as_float(ptx::lds32(lane + 16 * i));
            block.sum = fold_half_warp(sum);
        }
        for (int w = 0; w < kWarps; w++) first = min_of(first, shared->firsts[w]);
        block.first = first == 0xffffffffu ? 0 : static_cast<int32_t>(from + first);
    }
    ptx::sync();
    return block;
}

ASSAY_DEVICE void verify_scan(const VerifyArgs &a) {
    const int64_t cta = ptx::bid_x(), at = cta / a.block_count, b = cta % a.block_count;
    const Unit u = unit_at(a, at);
    if (b == 0 && ptx::tid() == 0) {
        a.rows[at] = assay_cuda_row{};
        if (at < a.call.batch) a.orders[at] = assay_cuda_order{};
        if (at == 0) *a.ticket = 0;
    }
    if (!u.read) return;
    const Row row = row_at(a, u.request, u.node, false);
    const assay_cuda_block block =
        scan_block<kScanThreads>(a, u.request, row, b, reinterpret_cast<ScanShared *>(ptx::shared()));
    if (ptx::tid() == 0) a.blocks[cta] = block;
}

// ---- a warp a block ------------------------------------------------------------------------------------------

// -log(1 - u) > u: u / weight above the best time is beaten without a logarithm. The margin is for roundings.
constexpr double kRaceMargin = 0.999999;

// The least -log(1 - u) / weight so far, and whose it is; u is keyed by seed, position and token.
struct Race {
    double time;
    int64_t token;
};

ASSAY_DEVICE void race_try(Race *race, uint32_t low, uint32_t high, float weight, int64_t token) {
    if (!(weight > 0)) return;
    const double u = assay_unit_interval(low, high);
    if (u * kRaceMargin > race->time * static_cast<double>(weight)) return;
    const double time = ptx::div_rn(-assay_log(1.0 - u), static_cast<double>(weight));
    if (time < race->time) *race = {time, token};
}

// Depth of a node whose ancestors are as they should be; otherwise some number.
ASSAY_DEVICE int64_t depth_of(const VerifyArgs &a, const Request &r, int64_t node) {
    if (!a.call.parents) return node;
    int64_t depth = 0;
    while (node > 0) {
        const int64_t parent = parent_of(a, r.first, node);
        node = parent < node ? parent : 0;
        depth++;
    }
    return depth;
}

ASSAY_DEVICE void verify_race(const VerifyArgs &a) {
    const int64_t unit = static_cast<int64_t>(ptx::bid_x()) * (kPassThreads / 32) + ptx::warp();
    if (unit >= (a.drafts + a.call.batch) * a.block_count) return;
    const int64_t at = unit / a.block_count, b = unit % a.block_count;
    const Unit u = unit_at(a, at);
    if (!u.read || u.request.greedy) return;
    const Opened o = open_row(a, u.request, u.node);
    Race race = {double_infinity(), b * kVocabBlock};
    float shift;
    if (shift_of(a, o.blocks, &shift) == ASSAY_ROW_OK && is_finite(o.blocks[b].largest)) {
        const uint64_t seed = a.call.seed[u.request.b];
        const uint64_t position = static_cast<uint64_t>(a.call.position[u.request.b]) +
                                  static_cast<uint64_t>(depth_of(a, u.request, u.node));
        const int32_t n = block_length(a, b);
        for (int32_t i = 2 * static_cast<int32_t>(ptx::lane()); i < n; i += 64) {
            const int64_t token = b * kVocabBlock + i;
            const float even = weight_at(a, u.request, o.row, shift, token);
            const float odd = weight_at(a, u.request, o.row, shift, token + 1);
            if (!(even > 0) && !(odd > 0)) continue;
            const Philox p = philox_words(seed, position, ASSAY_NOISE, static_cast<uint32_t>(token / 2));
            race_try(&race, p.x[0], p.x[1], even, token);
            race_try(&race, p.x[2], p.x[3], odd, token + 1);
        }
    }
    // Of equal times the first token's.
    ptx::sync_warp();
    for (uint32_t d = 16; d > 0; d /= 2) {
        const double time = ptx::shfl_xor(race.time, d);
        const int64_t token = ptx::shfl_xor(race.token, d);
        if (time < race.time || (time == race.time && token < race.token)) race = {time, token};
    }
    if (ptx::lane() == 0) {
        a.masses[unit] = race.time;
        a.tokens[unit] = static_cast<int32_t>(race.token);
    }
}

// By a warp: what block b gives to sum exp(z) and sum z exp(z), z = (l - shift) / T.
ASSAY_DEVICE void entropy_of_block(const VerifyArgs &a, const Request &r, const Row &row, const assay_cuda_block &block,
                                   float shift, int64_t b, double *mass, double *total) {
    *mass = *total = 0;
    if (!is_finite(block.largest)) return;
    const int64_t from = b * kVocabBlock;
    const int32_t n = block_length(a, b);
    *total = static_cast<double>(sum_block(n, [&](int32_t i) { return weight_at(a, r, row, shift, from + i); }));
    *mass = static_cast<double>(sum_block(n, [&](int32_t i) {
        const float z = (element_at(a, r, row, from + i) - shift) * r.inverse_t, w = assay_vexp(z);
        return w > 0 ? w * z : 0.0f;
    }));
}

ASSAY_DEVICE void verify_entropy(const VerifyArgs &a) {
    const int64_t unit = static_cast<int64_t>(ptx::bid_x()) * (kPassThreads / 32) + ptx::warp();
    if (unit >= (a.drafts + a.call.batch) * a.block_count) return;
    const int64_t at = unit / a.block_count, b = unit % a.block_count;
    const Unit u = unit_at(a, at);
    if (!u.read || u.request.greedy) return;
    const Opened o = open_row(a, u.request, u.node);
    float shift;
    double mass = 0, total = 0;
    if (shift_of(a, o.blocks, &shift) == ASSAY_ROW_OK)
        entropy_of_block(a, u.request, o.row, o.blocks[b], shift, b, &mass, &total);
    if (ptx::lane() == 0) {
        a.masses[unit] = mass;
        a.totals[unit] = total;
    }
}

}  // namespace assay

#endif

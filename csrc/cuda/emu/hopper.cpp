// Hopper's asynchronous machinery: barriers that count bytes, bulk copies, warpgroup products.
//
// Chosen against the kernel: a bulk copy's destination is NaN from its issue until somebody waits for its barrier (COPY_LATE), a
// product's d is NaN and its b unread until the wait that covers it.
#include "hopper.h"

#include <math.h>

#include <algorithm>

#include "state.h"

namespace assay {
namespace emu {

namespace {

MBarrier &barrier_at(const char *what, void *barrier) {
    check_shared(what, barrier, 8, 8);
    auto &all = launch->running->block->mbarriers;
    auto found = all.find(barrier);
    if (found == all.end()) fail("%s: the barrier was never initialised", what);
    return found->second;
}

void end_phase_if_done(MBarrier &b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.arrivals;
    launch->spins = 0;
}

Warpgroup &my_warpgroup() {
    Thread *self = launch->running;
    return self->block->warpgroups[self->at.tid / 128];
}

// The 128 threads of a warpgroup meet; the last calls all().
template <class F>
void meet(const char *what, void *mine, F all) {
    Thread *self = launch->running;
    Warpgroup &group = my_warpgroup();
    if (self->at.threads < 128 * (self->at.tid / 128 + 1)) fail("%s: the block has no whole warpgroup here", what);
    if (group.arrived && strcmp(group.what, what))
        fail("lanes of a warpgroup reached different instructions: %s and %s", group.what, what);
    group.what = what;
    group.lanes[self->at.tid % 128] = mine;
    if (++group.arrived < 128) {
        wait(what);
        return;
    }
    all(group);
    group.arrived = 0;
    for (uint32_t i = 0; i < 128; i++) {
        Thread *other = &self->block->threads[self->at.tid / 128 * 128 + i];
        if (other != self) make_runnable(other);
    }
}

constexpr uint64_t kSwizzle128 = 1ull << 62;

// d's values of all lanes from where they are kept while products are under way.
void execute(Warpgroup &group, const PendingProduct &op, const uint8_t *shared, size_t shared_bytes) {
    const uint32_t n = op.columns;
    std::vector<float> a(64 * 16), b(16 * n), d(64 * n, 0.0f);
    auto row_of = [](uint32_t thread, uint32_t half) { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; };
    for (uint32_t t = 0; t < 128; t++)
        for (uint32_t reg = 0; reg < 4; reg++)
            for (uint32_t e = 0; e < 2; e++)
                a[row_of(t, reg & 1) * 16 + 8 * (reg >> 1) + 2 * (t % 4) + e] =
                    op.value(static_cast<uint16_t>(op.a[t][reg] >> (16 * e)));
    const uint32_t start = static_cast<uint32_t>(op.b & 0x3FFF) << 4;
    const uint32_t stride = static_cast<uint32_t>(op.b >> 32 & 0x3FFF) << 4;
    for (uint32_t row = 0; row < n; row++)
        for (uint32_t k = 0; k < 16; k++) {
            uint32_t at = start + row / 8 * stride + row % 8 * 128 + 2 * k;
            at ^= (at >> 7 & 7) << 4;
            if (at + 2 > shared_bytes) fail("wgmma: b at %u, outside the %zu of shared memory", at, shared_bytes);
            uint16_t bits;
            memcpy(&bits, shared + at, 2);
            b[k * n + row] = op.value(bits);
        }
    for (uint32_t t = 0; t < 128; t++)
        for (uint32_t i = 0; i < n / 2 && op.accumulate; i++)
            d[row_of(t, i / 2 % 2) * n + i / 4 * 8 + 2 * (t % 4) + i % 2] = group.held[op.d[t]][i];
    for (uint32_t i = 0; i < 64; i++)
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t j = 0; j < n; j++) d[i * n + j] += a[i * 16 + k] * b[k * n + j];
    for (uint32_t t = 0; t < 128; t++)
        for (uint32_t i = 0; i < n / 2; i++)
            group.held[op.d[t]][i] = d[row_of(t, i / 2 % 2) * n + i / 4 * 8 + 2 * (t % 4) + i % 2];
}

}  // namespace

void mbarrier_init(void *barrier, uint32_t arrivals) {
    Quiet quiet;
    check_shared("mbarrier.init", barrier, 8, 8);
    auto &all = launch->running->block->mbarriers;
    if (all.count(barrier)) fail("mbarrier.init: the barrier is initialised already");
    MBarrier &b = all[barrier];
    b.arrivals = b.pending = arrivals;
}

void mbarrier_arrive(void *barrier, uint32_t expected_bytes) {
    Quiet quiet;
    MBarrier &b = barrier_at("mbarrier.arrive", barrier);
    if (!b.pending) fail("mbarrier.arrive: more arrivals than the %u of a phase", b.arrivals);
    release(&b.order[b.phase & 1]);
    b.bytes += expected_bytes;
    b.pending--;
    end_phase_if_done(b);
}

void bulk_load(void *smem, const void *gmem, uint32_t bytes, void *barrier) {
    {
        Quiet quiet;
        check_shared("bulk copy", smem, bytes, 16);
        check_global("bulk copy", gmem, bytes, 16);
        if (bytes % 16) fail("bulk copy of %u bytes, not a multiple of 16", bytes);
        MBarrier &b = barrier_at("bulk copy", barrier);
        launch->counters.bulk_bytes += bytes;
        b.copies.push_back({static_cast<uint8_t *>(smem), static_cast<const uint8_t *>(gmem), bytes});
    }
    memset(smem, 0xFF, bytes);
    {
        Quiet quiet;
        release(&barrier_at("bulk copy", barrier).issued);
    }
    const uint32_t mode = launch->options.copy;
    if (mode == COPY_EARLY || (mode == COPY_RANDOM && draw() & 1)) land_bulk(barrier);
}

void land_bulk(void *barrier) {
    std::vector<BulkCopy> due;
    {
        // The copy engine's write follows the NaN's: whichever thread plays the engine must not be seen to race with the issuer.
        Quiet quiet;
        MBarrier &b = barrier_at("bulk copy", barrier);
        due.swap(b.copies);
        if (!due.empty()) acquire(&b.issued);
    }
    for (const BulkCopy &c : due) memcpy(c.to, c.from, c.bytes);
    Quiet quiet;
    MBarrier &b = barrier_at("bulk copy", barrier);
    for (const BulkCopy &c : due) b.bytes -= c.bytes;
    if (!due.empty()) release(&b.order[b.phase & 1]);
    if (!due.empty()) end_phase_if_done(b);
}

void mbarrier_wait(void *barrier, uint32_t parity) {
    for (;;) {
        bool done;
        {
            Quiet quiet;
            MBarrier &b = barrier_at("mbarrier wait", barrier);
            done = (b.phase & 1) != parity;
            if (done) acquire(&b.order[parity & 1]);
        }
        if (done) return;
        land_bulk(barrier);
        spin();
    }
}

void wgmma_fence() {
    Quiet quiet;
    my_warpgroup().fenced[launch->running->at.tid % 128] = true;
}

void wgmma_issue(const WarpgroupProduct &part) {
    Quiet quiet;
    Warpgroup &mine = my_warpgroup();
    if (!mine.fenced[launch->running->at.tid % 128]) fail("wgmma without wgmma.fence since the last wait");
    WarpgroupProduct local = part;
    meet("wgmma", &local, [](Warpgroup &group) {
        PendingProduct op;
        const WarpgroupProduct &first = *static_cast<WarpgroupProduct *>(group.lanes[0]);
        op.b = first.b;
        op.columns = first.columns;
        op.accumulate = first.accumulate;
        op.value = first.value;
        op.group = group.groups;
        if ((op.b & ~0x3FFF3FFF3FFFull) != kSwizzle128) fail("wgmma: descriptor %016llx has another layout", (unsigned long long)op.b);
        for (uint32_t t = 0; t < 128; t++) {
            const WarpgroupProduct &lane = *static_cast<WarpgroupProduct *>(group.lanes[t]);
            if (lane.b != op.b || lane.accumulate != op.accumulate) fail("wgmma: lanes disagree on b or on accumulating");
            op.d[t] = lane.d;
            memcpy(op.a[t], lane.a, sizeof(lane.a));
            if (!group.held.count(lane.d)) group.held[lane.d].assign(lane.d, lane.d + op.columns / 2);
            std::fill(lane.d, lane.d + op.columns / 2, NAN);
        }
        group.pending.push_back(op);
        launch->counters.wgmma++;
    });
}

void wgmma_commit() {
    Quiet quiet;
    meet("wgmma.commit", nullptr, [](Warpgroup &group) { group.groups++; });
}

void wgmma_wait(uint32_t newest_under_way) {
    Quiet quiet;
    Block &block = *launch->running->block;
    my_warpgroup().fenced[launch->running->at.tid % 128] = false;
    meet("wgmma.wait", nullptr, [&](Warpgroup &group) {
        while (!group.pending.empty() && group.pending.front().group + newest_under_way < group.groups) {
            execute(group, group.pending.front(), block.shared, block.shared_bytes);
            group.pending.pop_front();
        }
        // What no product under way still adds to goes back to its registers.
        for (auto it = group.held.begin(); it != group.held.end();) {
            const bool busy = std::any_of(group.pending.begin(), group.pending.end(), [&](const PendingProduct &op) {
                return std::find(op.d, op.d + 128, it->first) != op.d + 128;
            });
            if (busy) {
                ++it;
            } else {
                std::copy(it->second.begin(), it->second.end(), it->first);
                it = group.held.erase(it);
            }
        }
    });
}

}  // namespace emu
}  // namespace assay

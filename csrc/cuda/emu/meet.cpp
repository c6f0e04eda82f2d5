// Where threads meet: warp collectives, barriers, fences, waits for flags.
#include "state.h"

namespace assay {
namespace emu {

void collective(const char *what, uint32_t mask, void *mine, Exchange all, bool orders) {
    Quiet quiet;
    Thread *self = launch->running;
    Warp &warp = self->block->warps[self->at.tid / 32];
    const uint32_t bit = 1u << (self->at.tid & 31);
    if (!(mask & bit)) fail("%s: the mask %08x lacks the calling lane", what, mask);
    Meeting *meeting = nullptr;
    for (Meeting &m : warp.meetings) {
        if (!(m.mask & mask)) continue;
        if (m.mask != mask || strcmp(m.what, what))
            fail("lanes reached different collectives: %s (mask %08x) and %s (mask %08x)", m.what, m.mask, what, mask);
        meeting = &m;
    }
    if (!meeting) {
        warp.meetings.push_back(Meeting());
        meeting = &warp.meetings.back();
        meeting->what = what;
        meeting->mask = mask;
        meeting->generation = warp.generation++;
    }
    char *order = &warp.order[meeting->generation & 1];
    if (orders) release(order);
    meeting->lanes[self->at.tid & 31] = mine;
    meeting->arrived |= bit;
    if (meeting->arrived == mask) {
        all(meeting->lanes, mask);
        for (uint32_t l = 0; l < 32; l++)
            if ((mask & ~bit) >> l & 1) make_runnable(&self->block->threads[(self->at.tid & ~31u) + l]);
        warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
        launch->counters.collectives++;
    } else {
        wait(what);
    }
    if (orders) acquire(order);
}

void barrier(uint32_t id, uint32_t threads) {
    Quiet quiet;
    Thread *self = launch->running;
    if (id >= kBarriers) fail("barrier %u: there are %u", id, kBarriers);
    if (threads == 0 || threads % 32 || threads > self->at.threads)
        fail("barrier %u for %u threads in a block of %u", id, threads, self->at.threads);
    Barrier &b = self->block->barriers[id];
    if (b.arrived && b.expected != threads)
        fail("barrier %u: some threads wait for %u, others for %u", id, b.expected, threads);
    b.expected = threads;
    char *order = &b.order[b.generation & 1];
    release(order);
    if (++b.arrived == threads) {
        for (Thread *t : b.waiting) make_runnable(t);
        b.waiting.clear();
        b.arrived = 0;
        b.generation++;
        launch->counters.barriers++;
        launch->spins = 0;
    } else {
        b.waiting.push_back(self);
        wait("a barrier");
    }
    acquire(order);
}

// Stronger than a fence is: what came before any thread's fence is seen after any later one.
void fence() {
    release(&launch->fence_order);
    acquire(&launch->fence_order);
}

void spin() {
    Quiet quiet;
    const uint64_t limit = launch->options.spin_limit ? launch->options.spin_limit : 1 << 22;
    if (++launch->spins > limit) fail("livelock: %llu looks at flags and no progress", (unsigned long long)limit);
    yield();
}

void progress() {
    Quiet quiet;
    launch->spins = 0;
}

void count_atomic() {
    Quiet quiet;
    launch->counters.atomics++;
}

}  // namespace emu
}  // namespace assay

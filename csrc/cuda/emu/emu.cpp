// The emulator's scheduler, barriers, collectives, asynchronous copies and counters. See emu.h.
#include "emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"

namespace assay {
namespace emu {

const Position *here = nullptr;
Counters *counters = nullptr;

namespace {

constexpr uint32_t kBarriers = 16;
constexpr size_t kSharedLimit = 227 << 10;

struct CopyInFlight {
    uint8_t *to;
    const uint8_t *from;
    bool valid;
    uint64_t group;
};

struct Block;

struct Thread {
    Position at;
    Block *block;
    Fiber fiber;
    const char *waits_for = nullptr;
    std::vector<CopyInFlight> copies;
    uint64_t groups = 0;                       // committed
    uint64_t accesses[ACCESS_KINDS] = {};      // so far
    bool done = false;
};

struct Meeting {                               // a collective that some lanes have reached
    const char *what;
    uint32_t mask, arrived = 0;
    uint64_t generation;
    void *lanes[32] = {};
};

struct WarpAccess {
    uint32_t mask = 0, bytes = 0;
    const void *address[32];
};

struct Warp {
    std::vector<Meeting> meetings;
    uint64_t generation = 0;
    char order[2];                             // addresses for the sanitizer: odd and even generations
    std::deque<WarpAccess> pending[ACCESS_KINDS];
    uint64_t first[ACCESS_KINDS] = {};
};

struct Barrier {
    uint32_t expected = 0, arrived = 0;
    uint64_t generation = 0;
    char order[2];
    std::vector<Thread *> waiting;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    uint8_t *shared = nullptr;
    size_t shared_bytes = 0;
    uint32_t live = 0;
    ~Block() {
        for (Thread &t : threads) fiber_end(t.fiber);
        free(shared);
    }
};

struct Launch {
    const Kernel *kernel;
    const void *args;
    Options options;
    Counters counters = {};
    Fiber main;
    Thread *running = nullptr;
    std::vector<Thread *> runnable;            // a ring from `head` when in order, a bag when at random
    size_t head = 0;
    uint64_t random;
    uint64_t spins = 0;
    std::string error;
    bool failed = false;
    char begin_order, end_order, fence_order;
    const Region *last_region = nullptr;
};

Launch *launch = nullptr;
std::mutex one_launch;
std::vector<void *> spare_stacks;

std::vector<std::pair<const Kernel *, size_t>> &tables() {
    static std::vector<std::pair<const Kernel *, size_t>> all;
    return all;
}

void *take_stack() {
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
    if (!spare_stacks.empty()) {
        void *stack = spare_stacks.back();
        spare_stacks.pop_back();
        return stack;
    }
#endif
    return malloc(kStackBytes);
}

void give_stack(void *stack) {
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
    if (spare_stacks.size() < 4096) {
        spare_stacks.push_back(stack);
        return;
    }
#endif
    free(stack);
}

uint64_t draw() {                              // splitmix64
    uint64_t z = launch->random += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

void make_runnable(Thread *t) { launch->runnable.push_back(t); }

// The next to run, or null when all wait.
Thread *next_thread() {
    std::vector<Thread *> &bag = launch->runnable;
    if (launch->options.seed) {
        if (bag.empty()) return nullptr;
        std::swap(bag[draw() % bag.size()], bag.back());
        Thread *t = bag.back();
        bag.pop_back();
        return t;
    }
    if (launch->head == bag.size()) return nullptr;
    Thread *t = bag[launch->head++];
    if (launch->head >= 8192) {
        bag.erase(bag.begin(), bag.begin() + static_cast<ptrdiff_t>(launch->head));
        launch->head = 0;
    }
    return t;
}

void run(Thread *t) {
    launch->running = t;
    here = t ? &t->at : nullptr;
    launch->counters.switches++;
}

// Leaves the running fiber for another, or for the main one when none can run.
void leave() {
    Thread *from = launch->running, *to = next_thread();
    if (to == from) return;
    run(to);
    fiber_switch(from->fiber, to ? to->fiber : launch->main);
}

void wait(const char *what) {
    launch->running->waits_for = what;
    Thread *self = launch->running;
    leave();
    self->waits_for = nullptr;
}

void count_access(Access kind, const WarpAccess &access) {
    if (kind == SHARED_ACCESS) {
        launch->counters.shared_accesses++;
        const uint32_t together = std::min(32u, 128u / access.bytes);
        for (uint32_t first = 0; first < 32; first += together) {
            std::vector<uintptr_t> words;
            for (uint32_t l = first; l < first + together; l++)
                if (access.mask >> l & 1)
                    for (uint32_t b = 0; b < access.bytes; b += 4)
                        words.push_back((reinterpret_cast<uintptr_t>(access.address[l]) + b) / 4);
            if (words.empty()) continue;
            std::sort(words.begin(), words.end());
            words.erase(std::unique(words.begin(), words.end()), words.end());
            uint32_t on_bank[32] = {};
            for (uintptr_t w : words) on_bank[w % 32]++;
            launch->counters.shared_wavefronts += *std::max_element(on_bank, on_bank + 32);
        }
        return;
    }
    uintptr_t sectors[64];
    uint32_t n = 0;
    for (uint32_t l = 0; l < 32; l++) {
        if (!(access.mask >> l & 1)) continue;
        const uintptr_t begin = reinterpret_cast<uintptr_t>(access.address[l]) / 32;
        const uintptr_t end = (reinterpret_cast<uintptr_t>(access.address[l]) + access.bytes - 1) / 32;
        for (uintptr_t s = begin; s <= end; s++)
            if (!n || sectors[n - 1] != s) sectors[n++] = s;
    }
    std::sort(sectors, sectors + n);
    launch->counters.global_sectors += static_cast<uint64_t>(std::unique(sectors, sectors + n) - sectors);
}

void count_pending(Block &block) {
    for (Warp &w : block.warps)
        for (int kind = 0; kind < ACCESS_KINDS; kind++)
            for (const WarpAccess &a : w.pending[kind]) count_access(static_cast<Access>(kind), a);
}

void fiber_main() {
    Thread *self = launch->running;
    fiber_entered(self->fiber);
    acquire(&launch->begin_order);
    launch->kernel->run(launch->args);
    for (const CopyInFlight &c : self->copies)
        if (c.group == self->groups) fail("cp.async issued but never committed");
    release(&launch->end_order);
    Quiet quiet;
    self->done = true;
    if (--self->block->live == 0) {
        run(nullptr);
        fiber_switch(self->fiber, launch->main);
    }
    leave();
    abort();                                   // a finished fiber is not resumed
}

std::unique_ptr<Block> start_block(uint64_t index, const uint32_t grid[3], uint32_t threads, size_t smem) {
    std::unique_ptr<Block> block(new Block);
    block->shared_bytes = smem;
    void *memory = nullptr;
    if (posix_memalign(&memory, 1024, smem ? smem : 1) == 0) block->shared = static_cast<uint8_t *>(memory);
    memset(block->shared, 0xFF, smem);
    block->warps.resize(threads / 32);
    block->threads.resize(threads);
    block->live = threads;
    for (uint32_t i = 0; i < threads; i++) {
        Thread &t = block->threads[i];
        t.block = block.get();
        t.at.tid = i;
        t.at.threads = threads;
        t.at.bid[0] = static_cast<uint32_t>(index % grid[0]);
        t.at.bid[1] = static_cast<uint32_t>(index / grid[0] % grid[1]);
        t.at.bid[2] = static_cast<uint32_t>(index / grid[0] / grid[1]);
        memcpy(t.at.grid, grid, sizeof(t.at.grid));
        t.at.shared = block->shared;
        fiber_start(t.fiber, take_stack(), kStackBytes, fiber_main);
        make_runnable(&t);
    }
    launch->counters.blocks++;
    launch->counters.threads += threads;
    return block;
}

void end_block(Block &block) {
    if (!launch->failed) count_pending(block);
    for (Thread &t : block.threads) give_stack(t.fiber.stack);
}

// Who waits for what, and who has returned: "64 for barrier, 31 for shfl, 1 returned".
std::string describe_waits(const std::vector<std::unique_ptr<Block>> &resident) {
    std::vector<std::pair<std::string, size_t>> counts;
    for (const auto &block : resident)
        for (const Thread &t : block->threads) {
            const std::string what = t.done ? "returned" : t.waits_for ? std::string("wait for ") + t.waits_for : "run";
            auto found = std::find_if(counts.begin(), counts.end(), [&](const auto &c) { return c.first == what; });
            if (found == counts.end()) counts.emplace_back(what, 1);
            else found->second++;
        }
    std::string text;
    for (const auto &c : counts) text += (text.empty() ? "" : ", ") + std::to_string(c.second) + " " + c.first;
    return text;
}

void run_blocks(const uint32_t grid[3], uint32_t threads, size_t smem) {
    const uint64_t total = static_cast<uint64_t>(grid[0]) * grid[1] * grid[2];
    const uint64_t limit = launch->options.resident ? launch->options.resident : 64;
    std::vector<uint64_t> order(total);
    for (uint64_t i = 0; i < total; i++) order[i] = i;
    if (launch->options.seed)
        for (uint64_t i = total; i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
    std::vector<std::unique_ptr<Block>> resident;
    uint64_t started = 0;
    while (!launch->failed) {
        while (started < total && resident.size() < limit)
            resident.push_back(start_block(order[started++], grid, threads, smem));
        if (resident.empty()) break;
        Thread *t = next_thread();
        if (!t) {
            launch->error = "deadlock: no thread can make progress (" + describe_waits(resident) + ")";
            launch->failed = true;
            break;
        }
        run(t);
        fiber_switch(launch->main, t->fiber);
        for (size_t i = resident.size(); i-- > 0;)
            if (resident[i]->live == 0) {
                end_block(*resident[i]);
                resident.erase(resident.begin() + static_cast<ptrdiff_t>(i));
            }
    }
    for (auto &block : resident) end_block(*block);
}

}  // namespace

Registration::Registration(const Kernel *kernels, size_t count) { tables().emplace_back(kernels, count); }

size_t kernel_count() {
    size_t n = 0;
    for (const auto &t : tables()) n += t.second;
    return n;
}
const Kernel *kernel_at(size_t i) {
    for (const auto &t : tables()) {
        if (i < t.second) return t.first + i;
        i -= t.second;
    }
    return nullptr;
}
const Kernel *find(const char *name) {
    for (size_t i = 0; i < kernel_count(); i++)
        if (!strcmp(kernel_at(i)->name, name)) return kernel_at(i);
    return nullptr;
}

void fail(const char *format, ...) {
    Quiet quiet;
    char text[400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    const Position &at = launch->running->at;
    char where[120];
    snprintf(where, sizeof(where), " [block %u,%u,%u thread %u]", at.bid[0], at.bid[1], at.bid[2], at.tid);
    if (!launch->failed) launch->error = std::string(text) + where;
    launch->failed = true;
    Thread *self = launch->running;
    run(nullptr);
    fiber_switch(self->fiber, launch->main);
    abort();
}

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
    make_runnable(launch->running);
    leave();
}

void progress() {
    Quiet quiet;
    launch->spins = 0;
}

void count_atomic() {
    Quiet quiet;
    launch->counters.atomics++;
}

namespace {
void land(const CopyInFlight &c) {             // not quiet: these are the kernel's own accesses
    if (c.valid) memcpy(c.to, c.from, 16);
    else memset(c.to, 0, 16);
}
}  // namespace

void copy_async(void *smem, const void *gmem, bool valid) {
    CopyInFlight copy;
    bool late;
    {
        Quiet quiet;
        check_shared("cp.async", smem, 16, 16);
        if (valid) {
            check_global("cp.async", gmem, 16, 16);
            record(GLOBAL_COPY, gmem, 16);
        }
        copy = {static_cast<uint8_t *>(smem), static_cast<const uint8_t *>(gmem), valid, launch->running->groups};
        const uint32_t mode = launch->options.copy;
        late = mode == COPY_LATE || (mode == COPY_RANDOM && draw() & 1);
        launch->running->copies.push_back(copy);
        if (!late) launch->running->copies.back().to = nullptr;
    }
    if (late) memset(smem, 0xFF, 16);
    else land(copy);
}

void copy_commit() {
    Quiet quiet;
    launch->running->groups++;
}

void copy_wait(uint32_t newest_in_flight) {
    std::vector<CopyInFlight> due;
    {
        Quiet quiet;
        Thread *self = launch->running;
        auto covered = [&](const CopyInFlight &c) { return c.group + newest_in_flight < self->groups; };
        for (const CopyInFlight &c : self->copies)
            if (covered(c) && c.to) due.push_back(c);
        self->copies.erase(std::remove_if(self->copies.begin(), self->copies.end(), covered), self->copies.end());
    }
    for (const CopyInFlight &c : due) land(c);
}

void check_shared(const char *what, const void *p, size_t bytes, size_t alignment) {
    Quiet quiet;
    const Block &b = *launch->running->block;
    const uint8_t *at = static_cast<const uint8_t *>(p);
    if (at < b.shared || at + bytes > b.shared + b.shared_bytes)
        fail("%s: %zu bytes at %td, outside the %zu of shared memory", what, bytes, at - b.shared, b.shared_bytes);
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        fail("%s: shared address %td is not a multiple of %zu", what, at - b.shared, alignment);
}

void check_either(const char *what, const void *p, size_t bytes, size_t alignment) {
    const Block &b = *launch->running->block;
    const uint8_t *at = static_cast<const uint8_t *>(p);
    if (at >= b.shared && at < b.shared + b.shared_bytes) check_shared(what, p, bytes, alignment);
    else check_global(what, p, bytes, alignment);
}

void check_global(const char *what, const void *p, size_t bytes, size_t alignment) {
    Quiet quiet;
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail("%s: address %p is not a multiple of %zu", what, p, alignment);
    if (!launch->options.regions) return;
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    auto holds = [&](const Region &r) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(r.begin);
        return at >= begin && at + bytes <= begin + r.bytes;
    };
    if (launch->last_region && holds(*launch->last_region)) return;
    for (size_t i = 0; i < launch->options.region_count; i++)
        if (holds(launch->options.regions[i])) {
            launch->last_region = &launch->options.regions[i];
            return;
        }
    fail("%s: %zu bytes at %p, outside every buffer of the launch", what, bytes, p);
}

void record(Access kind, const void *p, uint32_t bytes) {
    Quiet quiet;
    if (kind == GLOBAL_LOAD) launch->counters.ldg_bytes += bytes;
    else if (kind == GLOBAL_STORE) launch->counters.st_bytes += bytes;
    else if (kind == GLOBAL_COPY) launch->counters.async_bytes += bytes;
    Thread *self = launch->running;
    Warp &warp = self->block->warps[self->at.tid / 32];
    auto &pending = warp.pending[kind];
    const uint32_t l = self->at.tid & 31;
    const uint64_t n = self->accesses[kind]++;
    if (n < warp.first[kind]) return;          // a lane far behind the others: its share was counted without it
    while (pending.size() <= n - warp.first[kind]) pending.push_back(WarpAccess());
    WarpAccess &a = pending[n - warp.first[kind]];
    a.mask |= 1u << l;
    a.bytes = std::max(a.bytes, bytes);
    a.address[l] = p;
    while (!pending.empty() && (pending.front().mask == ~0u || pending.size() > 4096)) {
        count_access(kind, pending.front());
        pending.pop_front();
        warp.first[kind]++;
    }
}

}  // namespace emu
}  // namespace assay

using namespace assay::emu;

extern "C" int assay_emu_launch(const char *name, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t threads,
                                size_t smem, const void *args, size_t args_bytes, const Options *options,
                                Counters *out, char *error, size_t error_bytes) {
    std::lock_guard<std::mutex> lock(one_launch);
    Launch state;
    state.kernel = find(name);
    state.options = options ? *options : Options();
    state.random = state.options.seed;
    const uint32_t grid[3] = {grid_x, grid_y, grid_z};
    auto refuse = [&](const std::string &why) {
        snprintf(error, error_bytes, "%s: %s", name, why.c_str());
        return 1;
    };
    if (!state.kernel) return refuse("no such kernel");
    if (args_bytes != state.kernel->args_bytes)
        return refuse("takes " + std::to_string(state.kernel->args_bytes) + " bytes of arguments, got " +
                      std::to_string(args_bytes));
    if (threads == 0 || threads % 32 || threads > state.kernel->threads)
        return refuse(std::to_string(threads) + " threads; at most " + std::to_string(state.kernel->threads) +
                      ", a multiple of 32");
    if (smem > state.kernel->smem_bytes || smem > kSharedLimit)
        return refuse(std::to_string(smem) + " bytes of shared memory; at most " +
                      std::to_string(state.kernel->smem_bytes));
    if (!grid_x || !grid_y || !grid_z || grid_x > 0x7FFFFFFF || grid_y > 65535 || grid_z > 65535)
        return refuse("the grid is empty or too large");
    const std::vector<uint64_t> copy_of_args((args_bytes + 7) / 8);
    memcpy(const_cast<uint64_t *>(copy_of_args.data()), args, args_bytes);
    state.args = copy_of_args.data();
    launch = &state;
    counters = &state.counters;
    fiber_adopt(state.main);
    release(&state.begin_order);
    {
        Quiet quiet;
        run_blocks(grid, threads, smem);
    }
    acquire(&state.end_order);
    launch = nullptr;
    here = nullptr;
    counters = nullptr;
    if (out) *out = state.counters;
    if (state.failed) return refuse(state.error);
    if (error_bytes) error[0] = 0;
    return 0;
}

extern "C" int assay_emu_kernel(size_t i, const char **name, size_t *args_bytes, uint32_t *threads,
                                uint32_t *smem_bytes, uint32_t *min_blocks) {
    const Kernel *k = kernel_at(i);
    if (!k) return 1;
    *name = k->name;
    *args_bytes = k->args_bytes;
    *threads = k->threads;
    *smem_bytes = k->smem_bytes;
    *min_blocks = k->min_blocks;
    return 0;
}

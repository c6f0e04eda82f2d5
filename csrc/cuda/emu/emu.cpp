// The emulator's scheduler and launch. See emu.h.
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <mutex>

#include "state.h"

namespace assay {
namespace emu {

const Position *here = nullptr;
Counters *counters = nullptr;
Launch *launch = nullptr;

namespace {

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

}  // namespace

uint64_t draw() {                              // splitmix64
    Quiet quiet;                               // the generator is the emulator's: CUDA threads that draw do not race for it
    uint64_t z = launch->random += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

void make_runnable(Thread *t) { launch->runnable.push_back(t); }

void run(Thread *t) {
    launch->running = t;
    here = t ? &t->at : nullptr;
    launch->counters.switches++;
}

namespace {

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

// Leaves the running fiber for another, or for the main one when none can run.
void leave() {
    Thread *from = launch->running, *to = next_thread();
    if (to == from) return;
    run(to);
    fiber_switch(from->fiber, to ? to->fiber : launch->main);
}

}  // namespace

void wait(const char *what) {
    launch->running->waits_for = what;
    Thread *self = launch->running;
    leave();
    self->waits_for = nullptr;
}

void yield() {
    make_runnable(launch->running);
    leave();
}

namespace {

void fiber_main() {
    Thread *self = launch->running;
    fiber_entered(self->fiber);
    acquire(&launch->begin_order);
    launch->kernel->run(launch->args);
    for (const CopyInFlight &c : self->copies)
        if (c.group == self->groups) fail("cp.async issued but never committed");
    release(&launch->end_order);
    Fiber *next;
    {
        Quiet quiet;
        self->done = true;
        Thread *to = --self->block->live == 0 ? nullptr : next_thread();
        run(to);
        next = to ? &to->fiber : &launch->main;
    }
    fiber_switch(self->fiber, *next);   // not quiet: ThreadSanitizer wants to see a fiber end as it began
    abort();                                   // a finished fiber is not resumed
}

std::unique_ptr<Block> start_block(uint64_t index, const uint32_t grid[3], uint32_t threads, size_t smem) {
    std::unique_ptr<Block> block(new Block);
    block->shared_bytes = smem;
    void *memory = nullptr;
    if (posix_memalign(&memory, 1024, smem ? smem : 1) == 0) block->shared = static_cast<uint8_t *>(memory);
    memset(block->shared, 0xFF, smem);
    block->warps.resize(threads / 32);
    block->warpgroups.resize(threads / 128 + 1);
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
    uint64_t limit = launch->options.resident ? launch->options.resident : 64;
#ifdef __SANITIZE_THREAD__
    limit = std::min<uint64_t>(limit, std::max(1u, 6144 / threads));   // ThreadSanitizer knows 8128 fibers at a time
#endif
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

}  // namespace emu
}  // namespace assay

using namespace assay::emu;

extern "C" int assay_emu_launch(const char *name, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t threads,
                                size_t smem, const void *args, size_t args_bytes, const Options *options,
                                Counters *out, char *error, size_t error_bytes) {
    std::lock_guard<std::mutex> lock(one_launch);
#ifdef __SANITIZE_THREAD__
    Launch &state = *new Launch;   // kept: a fiber's last look at it, as it ends, is ordered before nothing
#else
    Launch state;
#endif
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

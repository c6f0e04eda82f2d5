// What the emulator's parts share: threads, warps, blocks, the launch.
#ifndef ASSAY_EMU_STATE_H
#define ASSAY_EMU_STATE_H

#include <stdlib.h>
#include <string.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emu.h"
#include "fiber.h"

namespace assay {
namespace emu {

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

struct BulkCopy {
    uint8_t *to;
    const uint8_t *from;
    uint32_t bytes;
};

struct MBarrier {                              // a barrier in shared memory
    uint32_t arrivals = 0, pending = 0;        // of a phase, and still to come
    int64_t bytes = 0;                         // expected less arrived
    uint64_t phase = 0;
    char order[2];
    std::vector<BulkCopy> copies;              // under way
    char issued;                               // address for the sanitizer: from issue to landing
};

struct PendingProduct {
    float *d[128];
    uint32_t a[128][4];
    uint64_t b, group;
    uint32_t columns;
    bool accumulate;
    float (*value)(uint16_t);
};

struct Warpgroup {
    const char *what = nullptr;
    uint32_t arrived = 0;
    void *lanes[128] = {};
    bool fenced[128] = {};
    uint64_t groups = 0;                       // committed
    std::deque<PendingProduct> pending;
    std::map<float *, std::vector<float>> held;   // d of products under way
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    std::map<void *, MBarrier> mbarriers;
    Barrier barriers[kBarriers];
    uint8_t *shared = nullptr;
    size_t shared_bytes = 0;
    uint32_t live = 0;
    ~Block() {
        for (Thread &t : threads)
            if (t.done) fiber_end(t.fiber);    // those of a launch that failed are left as they stand
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

extern Launch *launch;

uint64_t draw();
void make_runnable(Thread *thread);
// Switches to the main fiber, or from it when null.
void run(Thread *thread);
// The running thread waits for another to make it runnable.
void wait(const char *what);
// The running thread lets others run.
void yield();
void count_pending(Block &block);
// Lets the copies that report to a barrier arrive.
void land_bulk(void *barrier);

}  // namespace emu
}  // namespace assay

#endif

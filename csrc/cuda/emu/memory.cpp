// Memory: asynchronous copies, checks of addresses, counted accesses.
#include <algorithm>

#include "state.h"

namespace assay {
namespace emu {

namespace {

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

}  // namespace

void count_pending(Block &block) {
    for (Warp &w : block.warps)
        for (int kind = 0; kind < ACCESS_KINDS; kind++)
            for (const WarpAccess &a : w.pending[kind]) count_access(static_cast<Access>(kind), a);
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
    Quiet quiet;
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

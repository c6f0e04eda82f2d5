// The emulator: runs a kernel's own source on the CPU. Tests only, never shipped.
//
// One fiber a CUDA thread. A fiber runs until it meets a barrier, a warp collective or a wait; the scheduler then picks
// another, in order (seed 0) or at random. Several blocks are resident at a time, so that blocks can wait for each other.
// What the hardware leaves open is chosen against the kernel: shared memory starts as NaN, an asynchronous copy's
// destination is NaN from its issue until the wait that covers it, blocks start in any order.
// What is illegal on hardware ends the launch with a message: a deadlock, lanes in different collectives, a misaligned or
// stray shared access, a copy never committed.
#ifndef ASSAY_EMU_H
#define ASSAY_EMU_H

#include <stddef.h>
#include <stdint.h>

namespace assay {
namespace emu {

// What a launch did, summed over blocks. Bytes are those asked for; sectors are distinct 32-byte pieces a warp access,
// which is what leaves L1.
struct Counters {
    uint64_t threads, blocks;
    uint64_t barriers;            // barriers completed (not arrivals)
    uint64_t mma;                 // mma instructions (a warp each)
    uint64_t wgmma;               // wgmma instructions (a warpgroup each)
    uint64_t ldg_bytes;           // global loads through registers
    uint64_t st_bytes;            // global stores through registers
    uint64_t async_bytes;         // cp.async: bytes read from global memory
    uint64_t bulk_bytes;          // bulk copies: bytes read from global memory
    uint64_t global_sectors;      // of loads, stores and cp.async together
    uint64_t atomics;
    uint64_t ldmatrix, ldmatrix_wavefronts;   // instructions; 8 rows a wavefront without conflicts
    uint64_t shared_accesses, shared_wavefronts;   // lds and sts: instructions (a warp each)
    uint64_t collectives;
    uint64_t switches;
};

enum Copy : uint32_t { COPY_LATE = 0, COPY_EARLY = 1, COPY_RANDOM = 2 };

// Memory that a kernel may touch.
struct Region {
    const void *begin;
    size_t bytes;
};

struct Options {
    uint64_t seed;                // 0: threads and blocks in order
    uint32_t copy;                // when an asynchronous copy lands
    uint32_t resident;            // blocks in flight at a time; 0: all of the grid, up to 64
    uint64_t spin_limit;          // waits on a flag without progress, all threads together; more is a livelock; 0: 2^22
    const Region *regions;        // where global accesses may go; null: anywhere
    size_t region_count;
};

struct Kernel {
    const char *name;
    void (*run)(const void *args);
    size_t args_bytes;
    uint32_t threads, smem_bytes, min_blocks;
};

// A table of kernels, made known by constructing this.
struct Registration {
    Registration(const Kernel *kernels, size_t count);
};
const Kernel *find(const char *name);
size_t kernel_count();
const Kernel *kernel_at(size_t i);

// ---- for ptx_host.h: all called by a fiber ---------------------------------------------------------------------
struct Position {
    uint32_t tid, threads;
    uint32_t bid[3], grid[3];
    uint8_t *shared;
};
extern const Position *here;      // of the fiber that runs
extern Counters *counters;        // of the launch that runs

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);

// Lanes meet: each brings `mine`; the last to come calls all(lanes, mask), lanes[i] being what lane i brought.
// orders: also a fence among the lanes, as __syncwarp is and a shuffle is not.
typedef void (*Exchange)(void *const *lanes, uint32_t mask);
void collective(const char *what, uint32_t mask, void *mine, Exchange all, bool orders = false);
void barrier(uint32_t id, uint32_t threads);
// A fence of the whole device.
void fence();
// A look at a flag: others run. And a change that somebody may look for.
void spin();
void progress();
void count_atomic();

void copy_async(void *smem, const void *gmem, bool valid);
void copy_commit();
void copy_wait(uint32_t newest_in_flight);

// Fails unless [p, p + bytes) lies in the block's shared memory, aligned to `alignment`.
void check_shared(const char *what, const void *p, size_t bytes, size_t alignment);
// Fails unless [p, p + bytes) lies in one of the launch's regions, aligned.
void check_global(const char *what, const void *p, size_t bytes, size_t alignment);
// The same where shared memory will do as well: atomics.
void check_either(const char *what, const void *p, size_t bytes, size_t alignment);
enum Access { GLOBAL_LOAD, GLOBAL_STORE, GLOBAL_COPY, SHARED_ACCESS, ACCESS_KINDS };
// The n-th access of a kind by each lane of a warp is taken for one instruction.
void record(Access kind, const void *p, uint32_t bytes);

}  // namespace emu
}  // namespace assay

extern "C" {
// Runs a kernel; 0, or 1 with a message in error. counters may be null.
int assay_emu_launch(const char *name, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t threads, size_t smem,
                     const void *args, size_t args_bytes, const assay::emu::Options *options,
                     assay::emu::Counters *counters, char *error, size_t error_bytes);
int assay_emu_kernel(size_t i, const char **name, size_t *args_bytes, uint32_t *threads, uint32_t *smem_bytes,
                     uint32_t *min_blocks);
}

#endif

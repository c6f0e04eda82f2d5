// A driver without a GPU: what mock_libcuda.cpp and mock_streams.cpp (the calls) and mock_machine.cpp (devices, streams, time)
// share. Tests only.
//
// Work is done as late as the rules allow: a stream's queue runs when somebody waits for it, so that a missing wait, a copy on
// the wrong stream or memory freed too early shows. Modelled time passes by a law that is set from outside, and events tell it.
#ifndef ASSAY_MOCK_H
#define ASSAY_MOCK_H

#include <stddef.h>
#include <stdint.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "emu.h"

namespace mock {

// cuda.h's numbers.
enum Result {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    OUT_OF_RESOURCES = 701,
    CONTEXT_IS_DESTROYED = 709,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907
};
enum CaptureMode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Stream;
struct Context;

// What a piece of work waits for: another stream up to one of its pieces.
struct Dependency {
    std::shared_ptr<Stream> stream;
    uint64_t number;
};
struct Work {
    std::function<Result()> run;
    std::function<double()> seconds;     // asked after run
    std::vector<Dependency> after;
    double submitted_s = 0;
    uint64_t number = 0;
};
struct Capture {
    int mode = GLOBAL;
    unsigned long thread = 0;
    bool invalid = false;
    Stream *origin = nullptr;
    std::vector<Work> nodes;
    std::set<Stream *> members;
    std::set<Stream *> loose;            // members with work that the origin does not wait for yet
};
struct Stream {
    Context *context = nullptr;
    bool legacy = false, blocking = true, destroyed = false;
    std::deque<Work> queue;
    uint64_t submitted = 0, done = 0;    // numbers of the last piece
    double time_s = 0;
    std::shared_ptr<Capture> capture;
};
struct Event {
    Context *context = nullptr;
    bool timed = true;
    std::shared_ptr<Stream> stream;      // of the last record
    uint64_t number = 0;
    std::shared_ptr<double> time_s;
    std::shared_ptr<Capture> captured;   // recorded in a capture: no time
    Stream *captured_stream = nullptr;
};
struct Graph {
    std::vector<Work> nodes;
};
struct Allocation {
    uint8_t *base;
    size_t bytes;
    Context *context;
};
struct Image {
    std::string text;                    // PTX, or the bytes of a cubin
    int capability = 0;                  // 10 major + minor
    bool exact = false, ptx = false;
};
struct Kernel {
    std::string name;
    Image *image;
    std::map<int, int> dynamic_smem;     // by device
};
struct Function {
    Kernel *kernel;
    Context *context;
};
struct Context {
    unsigned long long id = 0;
    int device = 0;
    bool primary = false, destroyed = false;
    int sticky = OK;
    std::vector<std::shared_ptr<Stream>> streams;   // [0]: the legacy stream
    std::map<Kernel *, std::unique_ptr<Function>> functions;
};

struct Machine {
    std::recursive_mutex lock;
    bool initialized = false;
    std::map<std::string, double> settings;         // see setting() for the defaults
    std::map<std::string, std::pair<int, int>> failures;   // call -> result, calls to pass first
    std::map<std::string, uint64_t> calls;
    std::string last_error;
    std::map<uint64_t, Allocation> memory;          // by address
    std::vector<std::unique_ptr<Context>> contexts;
    std::map<int, Context *> primaries;
    std::vector<std::unique_ptr<Image>> images;
    std::map<Image *, std::vector<std::unique_ptr<Kernel>>> kernels;
    std::map<void *, std::shared_ptr<Stream>> streams;
    std::map<void *, std::unique_ptr<Event>> events;
    std::map<void *, std::unique_ptr<Graph>> graphs, execs;
    double host_s = 0, busy_s = 0;
    bool replaying = false;              // a graph's nodes run, and not a launch of its own
    const char *(*find_kernel)(const char *) = nullptr;    // the library that emulates a kernel
    // A law of time of the test's: whether a launch is emulated at all, and the seconds that its kernel then takes.
    int (*executes)(const char *, const uint32_t *, const void *, size_t) = nullptr;
    double (*law)(const char *, const uint32_t *, const void *, size_t) = nullptr;
    std::map<std::string, double> remembered_s;     // with "execute" 0: what a launch took
    std::string last_launch;                        // whose data lie in L2
    assay::emu::Counters counters = {};             // of the last launch
};
extern Machine *machine;
extern thread_local std::vector<Context *> current;

// A number of the machine's: "name:device", else "name", else its default.
double setting(const std::string &name, int device = -1);
unsigned long this_thread();
// The allocation that holds [p, p + bytes), or null.
const Allocation *holding(uint64_t p, size_t bytes);

// A capture that forbids this thread what could disturb it; a forbidden call ends it.
bool capture_forbids();
// Queues work, or adds it to the stream's capture.
Result submit(const std::shared_ptr<Stream> &stream, Work work);
// Runs what is queued, up to a piece of work.
Result run_until(const std::shared_ptr<Stream> &stream, uint64_t number);
Result run_all(Context *context);
std::shared_ptr<Stream> stream_of(void *handle, Context *context, Result *result);
Work kernel_work(Function *function, const uint32_t grid[3], uint32_t threads, size_t smem, const void *args, size_t args_bytes);
Work copy_work(uint64_t dst, uint64_t src, size_t bytes);
Work set_work(uint64_t dst, int byte, size_t bytes);
// The table entry of an emulated kernel: its argument's size; false when there is none.
bool emulated(const std::string &name, size_t *args_bytes, uint32_t *threads);
Result read_image(const void *code, Image *image);
bool runs_on(const Image &image, int device);

}  // namespace mock

#endif

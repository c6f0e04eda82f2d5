// The machine behind the mock driver: settings, memory, streams that run late, captures, the law of time, kernels.
#include "mock.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

namespace mock {

Machine *machine = new Machine;   // never destroyed: calls may come while the process ends
thread_local std::vector<Context *> current;

double setting(const std::string &name, int device) {
    // A100-like. The law of a kernel's time: launch_s + max(DRAM bytes / dram_bytes_per_s, mma / mma_per_s); what the same
    // launch read just before and L2 holds comes at l2_bytes_per_s.
    static const std::map<std::string, double> defaults = {
        {"devices", 2},          {"driver", 12090},         {"major", 8},           {"minor", 0},
        {"sms", 4},              {"memory", 1 << 28},       {"smem_optin", 166912}, {"smem_per_sm", 167936},
        {"regs_per_sm", 65536},  {"threads_per_sm", 2048},  {"blocks_per_sm", 32},  {"l2", 1 << 22},
        {"clock_khz", 1410000},  {"memory_khz", 1215000},   {"bus_bits", 5120},     {"ptx_version", 8.8},
        {"execute", 1},          {"seed", 0},               {"copy", 0},            {"launch_s", 2e-6},
        {"submit_s", 1e-6},      {"node_s", 1e-6},          {"dram_bytes_per_s", 1.5e12},
        {"l2_bytes_per_s", 4e12}, {"mma_per_s", 7.6e10},    {"copy_bytes_per_s", 2e10}, {"init", 0},
        {"idle_w", 50},          {"busy_w", 250},           {"throttle", 0},
    };
    for (const std::string &key : {name + ":" + std::to_string(device), name}) {
        const auto found = machine->settings.find(key);
        if (found != machine->settings.end()) return found->second;
    }
    return defaults.at(name);
}

unsigned long this_thread() { return static_cast<unsigned long>(pthread_self()); }

const Allocation *holding(uint64_t p, size_t bytes) {
    auto after = machine->memory.upper_bound(p);
    if (after == machine->memory.begin()) return nullptr;
    const Allocation &a = (--after)->second;
    return p + bytes <= after->first + a.bytes ? &a : nullptr;
}

// ---- streams ----------------------------------------------------------------------------------------------

bool capture_forbids() {
    bool forbidden = false;
    for (auto &context : machine->contexts)
        for (auto &stream : context->streams)
            if (stream->capture && stream->capture->mode != RELAXED &&
                (stream->capture->mode == GLOBAL || stream->capture->thread == this_thread())) {
                stream->capture->invalid = true;
                forbidden = true;
            }
    return forbidden;
}

std::shared_ptr<Stream> stream_of(void *handle, Context *context, Result *result) {
    *result = OK;
    if (!handle || handle == reinterpret_cast<void *>(1)) {
        for (auto &other : context->streams)
            if (other->capture && other->blocking) {
                other->capture->invalid = true;
                *result = CAPTURE_IMPLICIT;
            }
        return context->streams[0];
    }
    const auto found = machine->streams.find(handle);
    if (found == machine->streams.end() || found->second->context != context) {
        *result = INVALID_HANDLE;
        return nullptr;
    }
    return found->second;
}

Result submit(const std::shared_ptr<Stream> &stream, Work work) {
    if (stream->capture) {
        if (stream->capture->invalid) return CAPTURE_INVALIDATED;
        if (stream.get() != stream->capture->origin) stream->capture->loose.insert(stream.get());
        stream->capture->nodes.push_back(std::move(work));
        return OK;
    }
    // The legacy stream waits for the blocking ones, and they for it.
    for (auto &other : stream->context->streams)
        if (other != stream && other->submitted > other->done && ((stream->legacy && other->blocking) || (other->legacy && stream->blocking)))
            work.after.push_back({other, other->submitted});
    machine->host_s += setting("submit_s", stream->context->device);
    work.submitted_s = machine->host_s;
    work.number = ++stream->submitted;
    stream->queue.push_back(std::move(work));
    return OK;
}

Result run_until(const std::shared_ptr<Stream> &stream, uint64_t number) {
    Context *context = stream->context;
    while (stream->done < number && !stream->queue.empty()) {
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        double begin = work.submitted_s > stream->time_s ? work.submitted_s : stream->time_s;
        for (const Dependency &d : work.after) {
            run_until(d.stream, d.number);
            if (d.stream->time_s > begin) begin = d.stream->time_s;
        }
        stream->time_s = begin;   // for events, which note it
        const Result result = context->sticky ? static_cast<Result>(context->sticky) : work.run();
        if (result != OK) context->sticky = result;
        const double seconds = result == OK && work.seconds ? work.seconds() : 0;
        stream->time_s = begin + seconds;
        machine->busy_s += seconds;
        stream->done = work.number;
    }
    return static_cast<Result>(context->sticky);
}

Result run_all(Context *context) {
    for (auto &stream : context->streams) {
        run_until(stream, stream->submitted);
        if (stream->time_s > machine->host_s) machine->host_s = stream->time_s;
    }
    return static_cast<Result>(context->sticky);
}

// ---- work ----------------------------------------------------------------------------------------------------

Work copy_work(uint64_t dst, uint64_t src, size_t bytes) {
    Work work;
    work.run = [=] {
        memcpy(reinterpret_cast<void *>(dst), reinterpret_cast<const void *>(src), bytes);
        return OK;
    };
    work.seconds = [=] { return setting("launch_s") + static_cast<double>(bytes) / setting("copy_bytes_per_s"); };
    return work;
}

Work set_work(uint64_t dst, int byte, size_t bytes) {
    Work work;
    work.run = [=] {
        memset(reinterpret_cast<void *>(dst), byte, bytes);
        machine->last_launch.clear();   // L2 holds this instead
        return OK;
    };
    work.seconds = [=] { return setting("launch_s") + static_cast<double>(bytes) / setting("dram_bytes_per_s"); };
    return work;
}

namespace {

typedef int (*Launch)(const char *, uint32_t, uint32_t, uint32_t, uint32_t, size_t, const void *, size_t,
                      const assay::emu::Options *, assay::emu::Counters *, char *, size_t);
typedef int (*Row)(size_t, const char **, size_t *, uint32_t *, uint32_t *, uint32_t *);
struct Emulated {
    Launch launch;
    size_t args_bytes;
    uint32_t threads;
};

const Emulated *emulation(const std::string &name) {
    static std::map<std::string, Emulated> known;
    const auto found = known.find(name);
    if (found != known.end()) return &found->second;
    const char *path = machine->find_kernel ? machine->find_kernel(name.c_str()) : nullptr;
    void *library = path && *path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) {
        machine->last_error = name + ": no emulation" + (path && *path ? std::string(": ") + dlerror() : "");
        return nullptr;
    }
    const Launch launch = reinterpret_cast<Launch>(dlsym(library, "assay_emu_launch"));
    const Row row = reinterpret_cast<Row>(dlsym(library, "assay_emu_kernel"));
    const char *other;
    size_t bytes;
    uint32_t threads, smem, blocks;
    for (size_t i = 0; row && launch && !row(i, &other, &bytes, &threads, &smem, &blocks); i++)
        known[other] = {launch, bytes, threads};
    return known.count(name) ? &known[name] : nullptr;
}

double kernel_seconds(int device, const std::string &key, const assay::emu::Counters &done) {
    const double bytes = 32.0 * static_cast<double>(done.global_sectors);
    const bool warm = machine->last_launch == key && bytes <= setting("l2", device);
    const double memory = bytes / setting(warm ? "l2_bytes_per_s" : "dram_bytes_per_s", device);
    const double math = static_cast<double>(done.mma) / setting("mma_per_s", device);
    machine->last_launch = key;
    return setting("launch_s", device) + (memory > math ? memory : math);
}

}  // namespace

bool emulated(const std::string &name, size_t *args_bytes, uint32_t *threads) {
    const Emulated *found = emulation(name);
    if (found) *args_bytes = found->args_bytes, *threads = found->threads;
    return found != nullptr;
}

Work kernel_work(Function *function, const uint32_t grid[3], uint32_t threads, size_t smem, const void *args, size_t args_bytes) {
    const std::string name = function->kernel->name;
    const int device = function->context->device;
    const std::vector<uint8_t> copy(static_cast<const uint8_t *>(args), static_cast<const uint8_t *>(args) + args_bytes);
    const uint32_t x = grid[0], y = grid[1], z = grid[2];
    const std::string key = name + "/" + std::to_string(x) + "/" + std::to_string(y) + "/" + std::to_string(z) + "/" +
                            std::string(copy.begin(), copy.end());
    const auto done = std::make_shared<assay::emu::Counters>();
    const Context *context = function->context;
    const std::vector<uint32_t> blocks = {x, y, z};
    Work work;
    work.run = [=]() -> Result {
        if (machine->executes && !machine->executes(name.c_str(), blocks.data(), copy.data(), copy.size())) return OK;
        if (setting("execute", device) == 0 && machine->remembered_s.count(key)) {
            memcpy(done.get(), &machine->counters, sizeof *done);
            done->global_sectors = static_cast<uint64_t>(machine->remembered_s[key]);
            done->mma = static_cast<uint64_t>(machine->remembered_s[key + "mma"]);
            return OK;
        }
        std::vector<assay::emu::Region> regions;
        for (const auto &a : machine->memory)
            if (a.second.context == context) regions.push_back({a.second.base, a.second.bytes});
        assay::emu::Options options = {};
        options.seed = static_cast<uint64_t>(setting("seed", device));
        options.copy = static_cast<uint32_t>(setting("copy", device));
        options.regions = regions.data();
        options.region_count = regions.size();
        char error[1024] = "";
        const int failed = emulation(name)->launch(name.c_str(), x, y, z, threads, smem, copy.data(), copy.size(), &options, done.get(),
                                                   error, sizeof error);
        machine->counters = *done;
        machine->remembered_s[key] = static_cast<double>(done->global_sectors);
        machine->remembered_s[key + "mma"] = static_cast<double>(done->mma);
        if (!failed) return OK;
        machine->last_error = error;
        return strstr(error, "outside every buffer") ? ILLEGAL_ADDRESS : LAUNCH_FAILED;
    };
    work.seconds = [=] {
        if (machine->law) return setting("launch_s", device) + machine->law(name.c_str(), blocks.data(), copy.data(), copy.size());
        return kernel_seconds(device, key, *done);
    };
    return work;
}

// ---- images --------------------------------------------------------------------------------------------------

Result read_image(const void *code, Image *image) {
    const uint8_t *bytes = static_cast<const uint8_t *>(code);
    if (memcmp(bytes, "\177ELF", 4) == 0) {
        uint64_t sections;
        uint32_t flags;
        uint16_t size, count, machine_number;
        memcpy(&machine_number, bytes + 18, 2);
        memcpy(&sections, bytes + 40, 8);
        memcpy(&flags, bytes + 48, 4);
        memcpy(&size, bytes + 58, 2);
        memcpy(&count, bytes + 60, 2);
        if (machine_number != 190) return INVALID_IMAGE;   // EM_CUDA
        const bool young = bytes[8] >= 8;                  // two layouts of e_flags, as NVRTC 12.9 writes them
        image->capability = young ? flags >> 8 & 255 : flags & 255;
        image->exact = flags & (young ? 8 : 0x800);
        uint64_t end = sections + static_cast<uint64_t>(size) * count;
        for (uint16_t i = 0; i < count; i++) {
            uint32_t type;
            uint64_t at, length;
            memcpy(&type, bytes + sections + size * i + 4, 4);
            memcpy(&at, bytes + sections + size * i + 24, 8);
            memcpy(&length, bytes + sections + size * i + 32, 8);
            if (type != 8 && at + length > end) end = at + length;   // SHT_NOBITS takes no room
        }
        image->text.assign(reinterpret_cast<const char *>(bytes), end);
        return OK;
    }
    image->text = static_cast<const char *>(code);
    const size_t version = image->text.find(".version "), target = image->text.find(".target sm_");
    if (version == std::string::npos || target == std::string::npos) return INVALID_IMAGE;
    image->ptx = true;
    image->capability = atoi(image->text.c_str() + target + 11);
    return atof(image->text.c_str() + version + 9) > setting("ptx_version") ? UNSUPPORTED_PTX_VERSION : OK;
}

bool runs_on(const Image &image, int device) {
    const int has = 10 * static_cast<int>(setting("major", device)) + static_cast<int>(setting("minor", device));
    if (image.ptx) return has >= image.capability;
    if (image.exact) return has == image.capability;
    return has / 10 == image.capability / 10 && has >= image.capability;
}

}  // namespace mock

// ---- what tests call --------------------------------------------------------------------------------------------

using namespace mock;

extern "C" {

// Everything as at the start but the memory that a test may still hold.
void mock_reset() {
    std::lock_guard<std::recursive_mutex> hold(machine->lock);
    static std::vector<std::unique_ptr<Context>> past;   // memory that a test still holds points there
    for (auto &context : machine->contexts) {
        context->destroyed = true;
        context->streams.resize(1);
        context->streams[0]->queue.clear();
        past.push_back(std::move(context));
    }
    machine->contexts.clear();
    machine->initialized = false;
    machine->settings.clear();
    machine->failures.clear();
    machine->calls.clear();
    machine->last_error.clear();
    machine->primaries.clear();
    machine->remembered_s.clear();
    machine->last_launch.clear();
    machine->streams.clear();
    machine->events.clear();
    machine->graphs.clear();
    machine->execs.clear();
    machine->host_s = machine->busy_s = 0;
    machine->executes = nullptr;
    machine->law = nullptr;
    current.clear();
}
void mock_set(const char *name, double value) { machine->settings[name] = value; }
double mock_get(const char *name) {
    const std::string n = name;
    if (n == "host_s") return machine->host_s;
    if (n == "busy_s") return machine->busy_s;
    if (n == "replaying") return machine->replaying;
    if (n == "allocations") return static_cast<double>(machine->memory.size());
    return setting(n);
}
// The call answers `result` after it was made `passes` times more; once.
void mock_fail(const char *call, int result, int passes) { machine->failures[call] = {result, passes}; }
uint64_t mock_calls(const char *call) { return machine->calls[call]; }
const char *mock_last_error() { return machine->last_error.c_str(); }
void mock_find_kernel(const char *(*find)(const char *)) { machine->find_kernel = find; }
// Both or none: see Machine. A law's seconds come on top of launch_s (in a graph: node_s).
void mock_law(int (*executes)(const char *, const uint32_t *, const void *, size_t),
              double (*law)(const char *, const uint32_t *, const void *, size_t)) {
    machine->executes = executes;
    machine->law = law;
}
void mock_counters(assay::emu::Counters *counters) { *counters = machine->counters; }

}

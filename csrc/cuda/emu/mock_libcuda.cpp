// The driver's calls, as the launcher makes them, with the rules of the CUDA driver API that a mistake would break.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mock.h"

using namespace mock;
using Hold = std::lock_guard<std::recursive_mutex>;

namespace {

// Counts the call; answers for it when a test asked for a failure.
bool injected(const char *call, int *result) {
    machine->calls[call]++;
    const auto found = machine->failures.find(call);
    if (found == machine->failures.end()) return false;
    if (found->second.second-- > 0) return false;
    *result = found->second.first;
    machine->failures.erase(found);
    return true;
}

Context *top() { return current.empty() ? nullptr : current.back(); }

#define ENTER(call)                          \
    Hold hold(machine->lock);                \
    int answer = OK;                         \
    if (injected(#call, &answer)) return answer; \
    if (!machine->initialized) return NOT_INITIALIZED
#define ENTER_CONTEXT(call)                  \
    ENTER(call);                             \
    Context *const context = top();          \
    if (!context) return INVALID_CONTEXT;    \
    if (context->destroyed) return CONTEXT_IS_DESTROYED; \
    if (context->sticky) return context->sticky
#define FORBIDDEN_IN_CAPTURE() \
    if (capture_forbids()) return CAPTURE_UNSUPPORTED
#define STREAM(name, handle)                                            \
    Result found_##name = OK;                                           \
    const std::shared_ptr<Stream> name = stream_of(handle, context, &found_##name); \
    if (found_##name != OK) return found_##name

bool is_device(int device) { return device >= 0 && device < setting("devices"); }

Context *new_context(int device, bool primary) {
    static unsigned long long ids = 0;
    std::unique_ptr<Context> context(new Context);
    context->id = ++ids;
    context->device = device;
    context->primary = primary;
    context->streams.push_back(std::make_shared<Stream>());
    context->streams[0]->context = context.get();
    context->streams[0]->legacy = true;
    machine->contexts.push_back(std::move(context));
    return machine->contexts.back().get();
}

size_t used(int device) {
    size_t bytes = 0;
    for (const auto &a : machine->memory)
        if (a.second.context->device == device && !a.second.context->destroyed) bytes += a.second.bytes;
    return bytes;
}

struct Name {
    int code;
    const char *name, *text;
};
const Name names[] = {
    {OK, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing blocking stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
};

}  // namespace

extern "C" {

// ---- the driver and its devices ---------------------------------------------------------------------------
int cuDriverGetVersion(int *version) {
    Hold hold(machine->lock);
    int answer = OK;
    if (injected("cuDriverGetVersion", &answer)) return answer;
    *version = static_cast<int>(setting("driver"));
    return OK;
}
int cuInit(unsigned) {
    Hold hold(machine->lock);
    int answer = OK;
    if (injected("cuInit", &answer)) return answer;
    if (setting("devices") < 1) return NO_DEVICE;
    machine->initialized = true;
    return OK;
}
int cuGetErrorName(int code, const char **name) {
    Hold hold(machine->lock);
    int answer = OK;
    if (injected("cuGetErrorName", &answer)) return answer;
    for (const Name &n : names)
        if (n.code == code) return *name = n.name, OK;
    *name = nullptr;
    return INVALID_VALUE;
}
int cuGetErrorString(int code, const char **text) {
    Hold hold(machine->lock);
    int answer = OK;
    if (injected("cuGetErrorString", &answer)) return answer;
    for (const Name &n : names)
        if (n.code == code) return *text = n.text, OK;
    *text = nullptr;
    return INVALID_VALUE;
}
int cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount);
    *count = static_cast<int>(setting("devices"));
    return OK;
}
int cuDeviceGet(int *device, int ordinal) {
    ENTER(cuDeviceGet);
    if (!is_device(ordinal)) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}
int cuDeviceGetName(char *name, int length, int device) {
    ENTER(cuDeviceGetName);
    if (!is_device(device)) return INVALID_DEVICE;
    snprintf(name, static_cast<size_t>(length), "Mock GPU %d", device);
    return OK;
}
int cuDeviceGetUuid_v2(void *uuid, int device) {
    ENTER(cuDeviceGetUuid_v2);
    memset(uuid, 0xA5, 16);
    static_cast<uint8_t *>(uuid)[15] = static_cast<uint8_t>(device);
    return OK;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER(cuDeviceGetAttribute);
    if (!is_device(device)) return INVALID_DEVICE;
    static const std::map<int, const char *> known = {
        {75, "major"},        {76, "minor"},         {16, "sms"},        {97, "smem_optin"}, {81, "smem_per_sm"},
        {82, "regs_per_sm"},  {39, "threads_per_sm"}, {106, "blocks_per_sm"}, {38, "l2"},     {13, "clock_khz"},
        {36, "memory_khz"},   {37, "bus_bits"},
    };
    const auto found = known.find(attribute);
    *value = found == known.end() ? 0 : static_cast<int>(setting(found->second, device));
    return OK;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    ENTER(cuDeviceTotalMem_v2);
    *bytes = static_cast<size_t>(setting("memory", device));
    return OK;
}

// ---- contexts --------------------------------------------------------------------------------------------------
int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER(cuDevicePrimaryCtxRetain);
    FORBIDDEN_IN_CAPTURE();
    if (!is_device(device)) return INVALID_DEVICE;
    if (!machine->primaries.count(device)) machine->primaries[device] = new_context(device, true);
    *context = machine->primaries[device];
    return OK;
}
int cuCtxCreate_v2(void **context, unsigned, int device) {
    ENTER(cuCtxCreate_v2);
    if (!is_device(device)) return INVALID_DEVICE;
    Context *made = new_context(device, false);
    current.push_back(made);
    *context = made;
    return OK;
}
int cuCtxDestroy_v2(void *handle) {
    ENTER(cuCtxDestroy_v2);
    Context *context = static_cast<Context *>(handle);
    run_all(context);
    context->destroyed = true;
    if (top() == context) current.pop_back();
    return OK;
}
int cuCtxGetCurrent(void **context) {
    ENTER(cuCtxGetCurrent);
    *context = top();
    return OK;
}
int cuCtxSetCurrent(void *context) {
    ENTER(cuCtxSetCurrent);
    if (!current.empty()) current.pop_back();
    if (context) current.push_back(static_cast<Context *>(context));
    return OK;
}
int cuCtxPushCurrent_v2(void *context) {
    ENTER(cuCtxPushCurrent_v2);
    if (!context || static_cast<Context *>(context)->destroyed) return INVALID_CONTEXT;
    current.push_back(static_cast<Context *>(context));
    return OK;
}
int cuCtxPopCurrent_v2(void **context) {
    ENTER(cuCtxPopCurrent_v2);
    if (current.empty()) return INVALID_CONTEXT;
    *context = current.back();
    current.pop_back();
    return OK;
}
int cuCtxGetDevice(int *device) {
    ENTER(cuCtxGetDevice);
    if (!top()) return INVALID_CONTEXT;
    *device = top()->device;
    return OK;
}
int cuCtxGetId(void *handle, unsigned long long *id) {
    ENTER(cuCtxGetId);
    Context *context = handle ? static_cast<Context *>(handle) : top();
    if (!context) return INVALID_CONTEXT;
    if (context->destroyed) return CONTEXT_IS_DESTROYED;
    *id = context->id;
    return OK;
}
int cuCtxSynchronize() {
    ENTER_CONTEXT(cuCtxSynchronize);
    FORBIDDEN_IN_CAPTURE();
    return run_all(context);
}

// ---- code --------------------------------------------------------------------------------------------------------
int cuLibraryLoadData(void **library, const void *code, int *, void **, unsigned, int *, void **, unsigned) {
    ENTER(cuLibraryLoadData);
    FORBIDDEN_IN_CAPTURE();
    std::unique_ptr<Image> image(new Image);
    const Result read = read_image(code, image.get());
    if (read != OK) return read;
    bool somewhere = false;
    for (int d = 0; is_device(d); d++) somewhere |= runs_on(*image, d);
    if (!somewhere) return NO_BINARY_FOR_GPU;
    *library = image.get();
    machine->images.push_back(std::move(image));
    return OK;
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    ENTER(cuLibraryGetKernel);
    Image *image = static_cast<Image *>(library);
    const std::string mark = image->ptx ? std::string(".entry ") + name + "(" : std::string(".text.") + name + '\0';
    size_t bytes;
    uint32_t threads;
    if (image->text.find(mark) == std::string::npos) return NOT_FOUND;
    if (!emulated(name, &bytes, &threads)) return NOT_FOUND;
    for (auto &k : machine->kernels[image])
        if (k->name == name) return *kernel = k.get(), OK;
    machine->kernels[image].emplace_back(new Kernel{name, image, {}});
    *kernel = machine->kernels[image].back().get();
    return OK;
}
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
    ENTER(cuKernelSetAttribute);
    if (attribute != 8 || value < 0 || value > setting("smem_optin", device)) return INVALID_VALUE;
    static_cast<Kernel *>(kernel)->dynamic_smem[device] = value;
    return OK;
}
int cuKernelGetFunction(void **function, void *handle) {
    ENTER_CONTEXT(cuKernelGetFunction);
    Kernel *kernel = static_cast<Kernel *>(handle);
    auto &mine = context->functions[kernel];
    if (!mine) {
        FORBIDDEN_IN_CAPTURE();   // it loads the code into this context
        if (!runs_on(*kernel->image, context->device)) return NO_BINARY_FOR_GPU;
        mine.reset(new Function{kernel, context});
    }
    *function = mine.get();
    return OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *handle, int threads, size_t smem) {
    ENTER_CONTEXT(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    // Registers are not known here.
    const int d = static_cast<Function *>(handle)->context->device;
    double most = setting("threads_per_sm", d) / threads;
    if (most > setting("blocks_per_sm", d)) most = setting("blocks_per_sm", d);
    const double fit = setting("smem_per_sm", d) / (static_cast<double>(smem) + 1024);
    *blocks = static_cast<int>(most < fit ? most : fit);
    return OK;
}
int cuLaunchKernel(void *handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned smem,
                   void *stream_handle, void **parameters, void **extra) {
    ENTER_CONTEXT(cuLaunchKernel);
    Function *function = static_cast<Function *>(handle);
    STREAM(stream, stream_handle);
    if (function->context != context) return INVALID_HANDLE;
    size_t bytes = 0;
    uint32_t most = 0;
    if (!emulated(function->kernel->name, &bytes, &most)) return NOT_FOUND;
    if (!gx || !gy || !gz || gx > 0x7FFFFFFF || gy > 65535 || gz > 65535 || !bx || by != 1 || bz != 1 || !parameters || extra)
        return INVALID_VALUE;
    if (bx > most) return OUT_OF_RESOURCES;   // __launch_bounds__
    const auto allowed = function->kernel->dynamic_smem.find(context->device);
    if (smem > static_cast<unsigned>(allowed == function->kernel->dynamic_smem.end() ? 48 << 10 : allowed->second)) return INVALID_VALUE;
    const uint32_t grid[3] = {gx, gy, gz};
    return submit(stream, kernel_work(function, grid, bx, smem, parameters[0], bytes));
}

// ---- memory ------------------------------------------------------------------------------------------------------
int cuMemAlloc_v2(uint64_t *p, size_t bytes) {
    ENTER_CONTEXT(cuMemAlloc_v2);
    FORBIDDEN_IN_CAPTURE();
    if (!bytes) return INVALID_VALUE;
    if (used(context->device) + bytes > setting("memory", context->device)) return OUT_OF_MEMORY;
    void *got = nullptr;
    if (posix_memalign(&got, 256, (bytes + 255) / 256 * 256)) return OUT_OF_MEMORY;
    memset(got, 0xFF, bytes);   // NaN, as floats
    *p = reinterpret_cast<uint64_t>(got);
    machine->memory[*p] = {static_cast<uint8_t *>(got), bytes, context};
    return OK;
}
int cuMemFree_v2(uint64_t p) {
    ENTER(cuMemFree_v2);
    FORBIDDEN_IN_CAPTURE();
    const auto found = machine->memory.find(p);
    if (found == machine->memory.end()) return INVALID_VALUE;
    if (!found->second.context->destroyed) run_all(found->second.context);   // it waits, as the driver does
    memset(found->second.base, 0xFF, found->second.bytes);
    free(found->second.base);
    machine->memory.erase(found);
    return OK;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER_CONTEXT(cuMemGetInfo_v2);
    *total = static_cast<size_t>(setting("memory", context->device));
    *free_bytes = *total - used(context->device);
    return OK;
}
int cuMemcpyHtoDAsync_v2(uint64_t dst, const void *src, size_t bytes, void *handle) {
    ENTER_CONTEXT(cuMemcpyHtoDAsync_v2);
    STREAM(stream, handle);
    if (!holding(dst, bytes) || holding(reinterpret_cast<uint64_t>(src), 1)) return INVALID_VALUE;
    if (stream->capture) return submit(stream, copy_work(dst, reinterpret_cast<uint64_t>(src), bytes));
    // Pageable memory is staged before the call returns.
    const auto staged = std::make_shared<std::vector<uint8_t>>(static_cast<const uint8_t *>(src), static_cast<const uint8_t *>(src) + bytes);
    Work work = copy_work(dst, reinterpret_cast<uint64_t>(staged->data()), bytes);
    const std::function<Result()> run = work.run;
    work.run = [run, staged] { return run(); };
    return submit(stream, work);
}
int cuMemcpyDtoHAsync_v2(void *dst, uint64_t src, size_t bytes, void *handle) {
    ENTER_CONTEXT(cuMemcpyDtoHAsync_v2);
    STREAM(stream, handle);
    if (!holding(src, bytes) || holding(reinterpret_cast<uint64_t>(dst), 1)) return INVALID_VALUE;
    return submit(stream, copy_work(reinterpret_cast<uint64_t>(dst), src, bytes));
}
int cuMemcpyDtoDAsync_v2(uint64_t dst, uint64_t src, size_t bytes, void *handle) {
    ENTER_CONTEXT(cuMemcpyDtoDAsync_v2);
    STREAM(stream, handle);
    if (!holding(dst, bytes) || !holding(src, bytes)) return INVALID_VALUE;
    return submit(stream, copy_work(dst, src, bytes));
}
int cuMemsetD8Async(uint64_t dst, unsigned char byte, size_t bytes, void *handle) {
    ENTER_CONTEXT(cuMemsetD8Async);
    STREAM(stream, handle);
    if (!holding(dst, bytes)) return INVALID_VALUE;
    return submit(stream, set_work(dst, byte, bytes));
}
int cuPointerGetAttribute(void *value, int attribute, uint64_t p) {
    ENTER(cuPointerGetAttribute);
    const Allocation *a = holding(p, 1);
    if (!a || attribute != 9) return INVALID_VALUE;
    *static_cast<int *>(value) = a->context->device;
    return OK;
}

// ---- streams -------------------------------------------------------------------------------------------------------
int cuStreamCreate(void **handle, unsigned flags) {
    ENTER_CONTEXT(cuStreamCreate);
    const auto stream = std::make_shared<Stream>();
    stream->context = context;
    stream->blocking = !(flags & 1);
    context->streams.push_back(stream);
    machine->streams[stream.get()] = stream;
    *handle = stream.get();
    return OK;
}
int cuStreamDestroy_v2(void *handle) {
    ENTER(cuStreamDestroy_v2);
    const auto found = machine->streams.find(handle);
    if (found == machine->streams.end()) return INVALID_HANDLE;
    if (found->second->capture) found->second->capture->invalid = true;
    found->second->capture.reset();
    found->second->destroyed = true;   // its work still runs
    machine->streams.erase(found);
    return OK;
}
int cuStreamSynchronize(void *handle) {
    ENTER_CONTEXT(cuStreamSynchronize);
    STREAM(stream, handle);
    if (stream->capture) {
        stream->capture->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    const Result result = run_until(stream, stream->submitted);
    if (stream->time_s > machine->host_s) machine->host_s = stream->time_s;
    return result;
}
int cuStreamIsCapturing(void *handle, int *status) {
    ENTER_CONTEXT(cuStreamIsCapturing);
    STREAM(stream, handle);
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return OK;
}
int cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER_CONTEXT(cuStreamBeginCapture_v2);
    STREAM(stream, handle);
    if (stream->legacy) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return INVALID_VALUE;
    stream->capture = std::make_shared<Capture>();
    stream->capture->mode = mode;
    stream->capture->thread = this_thread();
    stream->capture->origin = stream.get();
    stream->capture->members.insert(stream.get());
    return OK;
}
int cuStreamEndCapture(void *handle, void **graph) {
    ENTER_CONTEXT(cuStreamEndCapture);
    STREAM(stream, handle);
    *graph = nullptr;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) return INVALID_VALUE;
    if (capture->origin != stream.get()) return CAPTURE_UNMATCHED;
    for (auto &other : context->streams)
        if (other->capture == capture) other->capture.reset();
    if (capture->invalid) return CAPTURE_INVALIDATED;
    if (!capture->loose.empty()) return CAPTURE_UNJOINED;
    std::unique_ptr<Graph> made(new Graph{capture->nodes});
    *graph = made.get();
    machine->graphs[*graph] = std::move(made);
    return OK;
}
int cuStreamWaitEvent(void *handle, void *event_handle, unsigned) {
    ENTER_CONTEXT(cuStreamWaitEvent);
    STREAM(stream, handle);
    const auto found = machine->events.find(event_handle);
    if (found == machine->events.end()) return INVALID_HANDLE;
    const Event &event = *found->second;
    if (event.captured) {
        if (stream->capture && stream->capture != event.captured) return INVALID_VALUE;
        stream->capture = event.captured;   // joins the capture
        event.captured->members.insert(stream.get());
        if (stream.get() == event.captured->origin) event.captured->loose.erase(event.captured_stream);
        return OK;
    }
    if (stream->capture) {
        stream->capture->invalid = true;   // an event from outside of the capture
        return CAPTURE_UNSUPPORTED;
    }
    if (!event.stream) return OK;
    Work work;
    work.run = [] { return OK; };
    work.after.push_back({event.stream, event.number});
    return submit(stream, work);
}

// ---- graphs -------------------------------------------------------------------------------------------------------
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long) {
    ENTER_CONTEXT(cuGraphInstantiateWithFlags);
    const auto found = machine->graphs.find(graph);
    if (found == machine->graphs.end()) return INVALID_VALUE;
    std::unique_ptr<Graph> made(new Graph(*found->second));
    *exec = made.get();
    machine->execs[*exec] = std::move(made);
    return OK;
}
int cuGraphDestroy(void *graph) {
    ENTER(cuGraphDestroy);
    return machine->graphs.erase(graph) ? OK : INVALID_VALUE;
}
int cuGraphExecDestroy(void *exec) {
    ENTER(cuGraphExecDestroy);
    return machine->execs.erase(exec) ? OK : INVALID_VALUE;
}
int cuGraphLaunch(void *exec, void *handle) {
    ENTER_CONTEXT(cuGraphLaunch);
    STREAM(stream, handle);
    const auto found = machine->execs.find(exec);
    if (found == machine->execs.end()) return INVALID_VALUE;
    const std::vector<Work> nodes = found->second->nodes;
    const int device = context->device;
    Work work;
    const auto total = std::make_shared<double>(0);
    work.run = [nodes, total, device]() -> Result {
        *total = setting("launch_s", device);
        for (const Work &node : nodes) {
            machine->replaying = true;
            const Result result = node.run();
            machine->replaying = false;
            if (result != OK) return result;
            // A node of a graph costs node_s where a launch of its own costs launch_s.
            *total += (node.seconds ? node.seconds() : 0) - setting("launch_s", device) + setting("node_s", device);
        }
        return OK;
    };
    work.seconds = [total] { return *total; };
    return submit(stream, work);
}

// ---- events -------------------------------------------------------------------------------------------------------
int cuEventCreate(void **handle, unsigned flags) {
    ENTER_CONTEXT(cuEventCreate);
    std::unique_ptr<Event> event(new Event);
    event->context = context;
    event->timed = !(flags & 2);
    *handle = event.get();
    machine->events[*handle] = std::move(event);
    return OK;
}
int cuEventDestroy_v2(void *handle) {
    ENTER(cuEventDestroy_v2);
    return machine->events.erase(handle) ? OK : INVALID_HANDLE;
}
int cuEventRecord(void *handle, void *stream_handle) {
    ENTER_CONTEXT(cuEventRecord);
    STREAM(stream, stream_handle);
    const auto found = machine->events.find(handle);
    if (found == machine->events.end() || found->second->context != context) return INVALID_HANDLE;
    Event &event = *found->second;
    if (stream->capture) {
        event.captured = stream->capture;
        event.captured_stream = stream.get();
        return OK;
    }
    event.captured.reset();
    event.time_s = std::make_shared<double>(0);
    const auto time_s = event.time_s;
    Stream *const raw = stream.get();
    Work work;
    work.run = [time_s, raw] {
        *time_s = raw->time_s;
        return OK;
    };
    const Result result = submit(stream, work);
    event.stream = stream;
    event.number = stream->submitted;
    return result;
}
int cuEventSynchronize(void *handle) {
    ENTER_CONTEXT(cuEventSynchronize);
    FORBIDDEN_IN_CAPTURE();
    const auto found = machine->events.find(handle);
    if (found == machine->events.end()) return INVALID_HANDLE;
    if (found->second->captured) return CAPTURED_EVENT;
    if (!found->second->stream) return OK;
    const Result result = run_until(found->second->stream, found->second->number);
    if (*found->second->time_s > machine->host_s) machine->host_s = *found->second->time_s;
    return result;
}
int cuEventElapsedTime(float *ms, void *begin, void *end) {
    ENTER_CONTEXT(cuEventElapsedTime);
    const auto a = machine->events.find(begin), b = machine->events.find(end);
    if (a == machine->events.end() || b == machine->events.end()) return INVALID_HANDLE;
    for (const Event *e : {a->second.get(), b->second.get()}) {
        if (!e->timed || !e->stream || e->captured) return INVALID_HANDLE;
        if (e->stream->done < e->number) return NOT_READY;
    }
    *ms = static_cast<float>(1e3 * (*b->second->time_s - *a->second->time_s));
    return OK;
}

}

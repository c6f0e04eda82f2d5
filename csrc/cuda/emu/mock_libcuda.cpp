// The driver's calls on devices, contexts, code and memory, as the launcher makes them, with the rules of the CUDA driver API that
// a mistake would break.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mock_calls.h"

using namespace mock;

namespace {

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

}

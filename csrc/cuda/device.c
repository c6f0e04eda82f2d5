/* Devices, contexts, memory, streams, events, graphs: the driver's calls with statuses. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

enum { MOST_DEVICES = 64 };

/* cuda.h's numbers. */
enum {
    EVENT_DISABLE_TIMING = 2,
    STREAM_NON_BLOCKING = 1,
    CAPTURE_THREAD_LOCAL = 1,
    POINTER_DEVICE_ORDINAL = 9
};

typedef struct {
    _Atomic int known; /* 0: not yet, else 1 + the status */
    assay_cuda_device info;
    _Atomic(void *) primary;
} device_record;

static device_record devices[MOST_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void assay_cuda_forget_devices(void) { memset(devices, 0, sizeof devices); }

int assay_cuda_device_count(int *count) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuDeviceGetCount, count);
}

static int look(int ordinal, assay_cuda_device *d) {
    static const struct {
        int attribute;
        size_t offset;
    } numbers[] = {
        {75, offsetof(assay_cuda_device, major)},
        {76, offsetof(assay_cuda_device, minor)},
        {16, offsetof(assay_cuda_device, sms)},
        {97, offsetof(assay_cuda_device, smem_optin)},
        {81, offsetof(assay_cuda_device, smem_per_sm)},
        {82, offsetof(assay_cuda_device, regs_per_sm)},
        {39, offsetof(assay_cuda_device, threads_per_sm)},
        {106, offsetof(assay_cuda_device, blocks_per_sm)},
        {38, offsetof(assay_cuda_device, l2_bytes)},
        {13, offsetof(assay_cuda_device, clock_khz)},
        {36, offsetof(assay_cuda_device, memory_clock_khz)},
        {37, offsetof(assay_cuda_device, memory_bus_bits)},
        {32, offsetof(assay_cuda_device, ecc)},
        {18, offsetof(assay_cuda_device, integrated)},
    };
    int handle;
    size_t bytes = 0;
    memset(d, 0, sizeof *d);
    d->ordinal = ordinal;
    int status = ASSAY_CUDA_CALL(cuDeviceGet, &handle, ordinal);
    for (size_t i = 0; !status && i < sizeof numbers / sizeof *numbers; i++) {
        int value = 0;
        status = ASSAY_CUDA_CALL(cuDeviceGetAttribute, &value, numbers[i].attribute, handle);
        memcpy((char *)d + numbers[i].offset, &value, sizeof value);
    }
    if (!status) status = ASSAY_CUDA_CALL(cuDeviceGetName, d->name, sizeof d->name - 1, handle);
    if (!status) status = ASSAY_CUDA_CALL(cuDeviceGetUuid, d->uuid, handle);
    if (!status) status = ASSAY_CUDA_CALL(cuDeviceTotalMem, &bytes, handle);
    d->memory_bytes = (int64_t)bytes;
    return status;
}

int assay_cuda_device_info(int ordinal, const assay_cuda_device **device) {
    int count = 0;
    int status = assay_cuda_device_count(&count);
    if (status) return status;
    if (ordinal < 0 || ordinal >= count || ordinal >= MOST_DEVICES)
        return assay_cuda_fail(ASSAY_CUDA_ENODEVICE, "cuda:%d: expected one of %d visible GPU%s", ordinal, count, count == 1 ? "" : "s");
    device_record *record = &devices[ordinal];
    if (!record->known) {
        pthread_mutex_lock(&lock);
        if (!record->known) {
            status = look(ordinal, &record->info);
            if (!status) record->known = 1;
        }
        pthread_mutex_unlock(&lock);
    }
    *device = &record->info;
    return status;
}

int assay_cuda_context(uint64_t *id, const assay_cuda_device **device) {
    int status = assay_cuda_open();
    if (status) return status;
    void *context = NULL;
    unsigned long long number = 0;
    int ordinal = 0;
    status = ASSAY_CUDA_CALL(cuCtxGetCurrent, &context);
    if (status) return status;
    if (!context)
        return assay_cuda_fail(ASSAY_CUDA_ECONTEXT, "no CUDA context is current on this thread: make one so (cuCtxSetCurrent, "
                               "assay_cuda_push, or any call of a library that does)");
    status = ASSAY_CUDA_CALL(cuCtxGetId, context, &number);
    if (!status) status = ASSAY_CUDA_CALL(cuCtxGetDevice, &ordinal);
    *id = number;
    return status ? status : assay_cuda_device_info(ordinal, device);
}

int assay_cuda_here(const assay_cuda_device **device) {
    uint64_t id;
    return assay_cuda_context(&id, device);
}

int assay_cuda_push(int ordinal, int *pushed) {
    const assay_cuda_device *device;
    *pushed = 0;
    int status = assay_cuda_device_info(ordinal, &device);
    if (status) return status;
    void *context = NULL;
    int current = -1;
    status = ASSAY_CUDA_CALL(cuCtxGetCurrent, &context);
    if (!status && context) status = ASSAY_CUDA_CALL(cuCtxGetDevice, &current);
    if (status || current == ordinal) return status;
    void *primary = devices[ordinal].primary;
    if (!primary) {
        /* Kept until the process ends, as the CUDA runtime does: to give it back could end a context in use. */
        int handle = 0;
        status = ASSAY_CUDA_CALL(cuDeviceGet, &handle, ordinal);
        if (!status) status = ASSAY_CUDA_CALL(cuDevicePrimaryCtxRetain, &primary, handle);
        if (status) return status;
        devices[ordinal].primary = primary;
    }
    status = ASSAY_CUDA_CALL(cuCtxPushCurrent, primary);
    *pushed = !status;
    return status;
}

int assay_cuda_pop(int pushed) {
    void *context;
    return pushed ? ASSAY_CUDA_CALL(cuCtxPopCurrent, &context) : ASSAY_OK;
}

/* ---- one call each ------------------------------------------------------------------------------------- */

static uint64_t address(const void *p) { return (uint64_t)(uintptr_t)p; }

int assay_cuda_malloc(size_t bytes, void **p) {
    uint64_t got = 0;
    int status = assay_cuda_open();
    if (!status) status = ASSAY_CUDA_CALL(cuMemAlloc, &got, bytes ? bytes : 1);
    *p = (void *)(uintptr_t)got;
    return status;
}

int assay_cuda_free(void *p) {
    const int status = assay_cuda_open();
    return status || !p ? status : ASSAY_CUDA_CALL(cuMemFree, address(p));
}

int assay_cuda_pointer_device(const void *p, int *ordinal) {
    const int status = assay_cuda_open();
    if (status) return status;
    const int result = assay_cuda_api.cuPointerGetAttribute(ordinal, POINTER_DEVICE_ORDINAL, address(p));
    if (result == CU_ERROR_INVALID_VALUE) return assay_cuda_fail(ASSAY_EINVAL, "%p: no memory that CUDA knows", p);
    return assay_cuda_result(result, "cuPointerGetAttribute");
}

int assay_cuda_memory(size_t *free_bytes, size_t *total_bytes) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuMemGetInfo, free_bytes, total_bytes);
}

int assay_cuda_copy(void *dst, const void *src, size_t bytes, int kind, void *stream) {
    const int status = assay_cuda_open();
    if (status || !bytes) return status;
    switch (kind) {
        case ASSAY_CUDA_TO_DEVICE: return ASSAY_CUDA_CALL(cuMemcpyHtoDAsync, address(dst), src, bytes, stream);
        case ASSAY_CUDA_TO_HOST: return ASSAY_CUDA_CALL(cuMemcpyDtoHAsync, dst, address(src), bytes, stream);
        case ASSAY_CUDA_ON_DEVICE: return ASSAY_CUDA_CALL(cuMemcpyDtoDAsync, address(dst), address(src), bytes, stream);
        default: return assay_cuda_fail(ASSAY_EINVAL, "kind: expected 0..2, got %d", kind);
    }
}

int assay_cuda_memset(void *dst, int byte, size_t bytes, void *stream) {
    const int status = assay_cuda_open();
    return status || !bytes ? status : ASSAY_CUDA_CALL(cuMemsetD8Async, address(dst), (unsigned char)byte, bytes, stream);
}

int assay_cuda_stream_create(void **stream) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuStreamCreate, stream, STREAM_NON_BLOCKING);
}

int assay_cuda_stream_destroy(void *stream) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuStreamDestroy, stream);
}

int assay_cuda_stream_sync(void *stream) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuStreamSynchronize, stream);
}

int assay_cuda_stream_capturing(void *stream, int *capturing) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuStreamIsCapturing, stream, capturing);
}

int assay_cuda_stream_wait(void *stream, void *other) {
    void *event = NULL;
    int status = assay_cuda_open();
    if (!status) status = ASSAY_CUDA_CALL(cuEventCreate, &event, EVENT_DISABLE_TIMING);
    if (status) return status;
    status = ASSAY_CUDA_CALL(cuEventRecord, event, other);
    if (!status) status = ASSAY_CUDA_CALL(cuStreamWaitEvent, stream, event, 0);
    const int destroyed = ASSAY_CUDA_CALL(cuEventDestroy, event); /* lives on until it has happened */
    return status ? status : destroyed;
}

int assay_cuda_event_create(void **event) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuEventCreate, event, 0);
}

int assay_cuda_event_destroy(void *event) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuEventDestroy, event);
}

int assay_cuda_event_record(void *event, void *stream) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuEventRecord, event, stream);
}

int assay_cuda_event_sync(void *event) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuEventSynchronize, event);
}

int assay_cuda_event_elapsed(void *begin, void *end, double *seconds) {
    float milliseconds = 0;
    int status = assay_cuda_open();
    if (!status) status = ASSAY_CUDA_CALL(cuEventElapsedTime, &milliseconds, begin, end);
    *seconds = 1e-3 * milliseconds;
    return status;
}

int assay_cuda_capture_begin(void *stream) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuStreamBeginCapture, stream, CAPTURE_THREAD_LOCAL);
}

int assay_cuda_capture_end(void *stream, void **graph) {
    void *captured = NULL;
    int status = assay_cuda_open();
    if (!status) status = ASSAY_CUDA_CALL(cuStreamEndCapture, stream, &captured);
    if (status) return status;
    status = ASSAY_CUDA_CALL(cuGraphInstantiate, graph, captured, 0);
    const int destroyed = ASSAY_CUDA_CALL(cuGraphDestroy, captured);
    return status ? status : destroyed;
}

int assay_cuda_graph_launch(void *graph, void *stream) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuGraphLaunch, graph, stream);
}

int assay_cuda_graph_destroy(void *graph) {
    const int status = assay_cuda_open();
    return status ? status : ASSAY_CUDA_CALL(cuGraphExecDestroy, graph);
}

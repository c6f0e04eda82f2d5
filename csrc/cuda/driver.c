/* Opens NVIDIA's driver at run time and puts its errors into words. */
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ASSAY_STRING_OF(x) #x
#define ASSAY_STRING(x) ASSAY_STRING_OF(x)

enum { OLDEST = 12000 }; /* cuLibrary*, cuCtxGetId */

assay_cuda_calls assay_cuda_api;

static _Thread_local char message[768];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int opened = -1; /* the status of opening, -1: not tried */
static _Atomic int forked;
static int driver_version;
static char driver_path[512], failure[sizeof message];

const char *assay_cuda_message(void) { return message; }

int assay_cuda_fail(int status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    return status;
}

static int meaning(int result, const char **advice) {
    *advice = "";
    if (result >= CU_ERROR_STREAM_CAPTURE_UNSUPPORTED && result <= CU_ERROR_STREAM_CAPTURE_LAST) {
        *advice = "; a graph is being captured: allocate, load (one call before the capture, or warmup) and wait outside of it";
        return ASSAY_CUDA_ECAPTURE;
    }
    if (result == CU_ERROR_ILLEGAL_ADDRESS || result == CU_ERROR_LAUNCH_TIMEOUT || result == CU_ERROR_ASSERT ||
        (result >= CU_ERROR_HARDWARE_STACK_ERROR && result <= CU_ERROR_LAUNCH_FAILED) ||
        result == CU_ERROR_ECC_UNCORRECTABLE || result == CU_ERROR_DEINITIALIZED) {
        *advice = "; a kernel that ran before failed (anybody's in this process) and its CUDA context is lost: start a new "
                  "process; compute-sanitizer names the kernel";
        return ASSAY_CUDA_ESTICKY;
    }
    switch (result) {
        case CU_ERROR_OUT_OF_MEMORY:
            *advice = "; the GPU's memory is full: free some, or take a smaller batch";
            return ASSAY_CUDA_ENOMEM;
        case CU_ERROR_NO_DEVICE:
            *advice = "; no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES";
            return ASSAY_CUDA_ENODEVICE;
        case CU_ERROR_INVALID_DEVICE:
            *advice = "; no GPU of that number";
            return ASSAY_CUDA_ENODEVICE;
        case CU_ERROR_INVALID_CONTEXT:
        case CU_ERROR_CONTEXT_IS_DESTROYED:
            *advice = "; no usable CUDA context is current on this thread";
            return ASSAY_CUDA_ECONTEXT;
        case CU_ERROR_NO_BINARY_FOR_GPU:
        case CU_ERROR_INVALID_PTX:
        case CU_ERROR_UNSUPPORTED_PTX_VERSION:
        case CU_ERROR_NOT_FOUND:
            *advice = "; the compiled kernels do not fit this GPU and driver";
            return ASSAY_CUDA_EIMAGE;
        case CU_ERROR_STUB_LIBRARY:
            *advice = "; this is the toolkit's stub, not a driver: take its folder off LD_LIBRARY_PATH";
            return ASSAY_CUDA_ENODRIVER;
        default:
            *advice = "; CUresult in the CUDA Driver API's reference says what may cause it";
            return ASSAY_CUDA_ECALL;
    }
}

int assay_cuda_result(int result, const char *call) {
    if (result == 0) return ASSAY_OK;
    const char *name = NULL, *text = NULL, *advice;
    if (!assay_cuda_api.cuGetErrorName || assay_cuda_api.cuGetErrorName(result, &name) || !name) name = "CUDA error";
    if (!assay_cuda_api.cuGetErrorString || assay_cuda_api.cuGetErrorString(result, &text) || !text) text = "no text";
    const int status = meaning(result, &advice);
    return assay_cuda_fail(status, "%s: %s (%d), %s%s", call, name, result, text, advice);
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found)
        assay_cuda_fail(ASSAY_CUDA_EDRIVER, "%s lacks %s: a driver for CUDA 12.0 or newer (525 or newer) is needed",
                        driver_path, name);
    return found;
}

static int open_driver(void) {
    const char *asked = getenv("ASSAY_CUDA_DRIVER");
    snprintf(driver_path, sizeof driver_path, "%s", asked && *asked ? asked : "libcuda.so.1");
    void *library = dlopen(driver_path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return assay_cuda_fail(ASSAY_CUDA_ENODRIVER, "NVIDIA's driver does not load (%s): install it, or in a container start it with GPUs; "
                               "ASSAY_CUDA_DRIVER may name its file", dlerror());
    int (*get_version)(int *) = NULL;
    void *found = symbol(library, "cuDriverGetVersion");
    if (!found) return ASSAY_CUDA_EDRIVER;
    memcpy(&get_version, &found, sizeof found);
    const int result = get_version(&driver_version);
    if (result) return assay_cuda_result(result, "cuDriverGetVersion");
    if (driver_version < OLDEST)
        return assay_cuda_fail(ASSAY_CUDA_EDRIVER, "the driver supports CUDA %d.%d: 12.0 or newer is needed (driver 525 or newer)",
                               driver_version / 1000, driver_version % 1000 / 10);
#define ASSAY_CUDA_RESOLVE(name, exported, parameters)     \
    found = symbol(library, ASSAY_STRING(exported));       \
    if (!found) return ASSAY_CUDA_EDRIVER;                 \
    memcpy(&assay_cuda_api.name, &found, sizeof found);
    ASSAY_CUDA_CALLS(ASSAY_CUDA_RESOLVE)
#undef ASSAY_CUDA_RESOLVE
    return ASSAY_CUDA_CALL(cuInit, 0);
}

static void after_fork(void) {
    if (opened == ASSAY_OK) forked = 1;
}

int assay_cuda_open(void) {
    if (forked)
        return assay_cuda_fail(ASSAY_CUDA_EFORK, "CUDA was started before this process was forked, and does not survive that: start "
                               "workers by spawn, or use CUDA only in them");
    int status = opened;
    if (status == ASSAY_OK) return status;
    pthread_mutex_lock(&lock);
    if (opened < 0) {
        static int watched;
        if (!watched) watched = !pthread_atfork(NULL, NULL, after_fork);
        status = open_driver();
        if (status) memcpy(failure, message, sizeof failure);
        opened = status;
    }
    status = opened;
    if (status) memcpy(message, failure, sizeof message);
    pthread_mutex_unlock(&lock);
    return status;
}

void assay_cuda_refresh(void) {
    pthread_mutex_lock(&lock);
    assay_cuda_forget_kernels();
    assay_cuda_forget_devices();
    memset(&assay_cuda_api, 0, sizeof assay_cuda_api);
    opened = -1;
    forked = 0;
    pthread_mutex_unlock(&lock);
}

int assay_cuda_driver(int *version, const char **path) {
    const int status = assay_cuda_open();
    if (status) return status;
    *version = driver_version;
    *path = driver_path;
    return ASSAY_OK;
}

/* NVIDIA's driver, as far as assay calls it: opened at run time, declared here, so that no CUDA is needed to build.
 * Prototypes are cuda.h's with handles as void *, devices and results as int, device pointers as uint64_t. */
#ifndef ASSAY_CUDA_DRIVER_H
#define ASSAY_CUDA_DRIVER_H

#include "assay_cuda.h"

/* X(name, exported name, parameters) */
#define ASSAY_CUDA_CALLS(X) \
    X(cuInit, cuInit, (unsigned)) \
    X(cuGetErrorName, cuGetErrorName, (int, const char **)) \
    X(cuGetErrorString, cuGetErrorString, (int, const char **)) \
    X(cuDeviceGetCount, cuDeviceGetCount, (int *)) \
    X(cuDeviceGet, cuDeviceGet, (int *, int)) \
    X(cuDeviceGetName, cuDeviceGetName, (char *, int, int)) \
    X(cuDeviceGetUuid, cuDeviceGetUuid_v2, (void *, int)) \
    X(cuDeviceGetAttribute, cuDeviceGetAttribute, (int *, int, int)) \
    X(cuDeviceTotalMem, cuDeviceTotalMem_v2, (size_t *, int)) \
    X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (void **, int)) \
    X(cuCtxGetCurrent, cuCtxGetCurrent, (void **)) \
    X(cuCtxGetDevice, cuCtxGetDevice, (int *)) \
    X(cuCtxGetId, cuCtxGetId, (void *, unsigned long long *)) \
    X(cuCtxPushCurrent, cuCtxPushCurrent_v2, (void *)) \
    X(cuCtxPopCurrent, cuCtxPopCurrent_v2, (void **)) \
    X(cuLibraryLoadData, cuLibraryLoadData, (void **, const void *, int *, void **, unsigned, int *, void **, unsigned)) \
    X(cuLibraryGetKernel, cuLibraryGetKernel, (void **, void *, const char *)) \
    X(cuKernelSetAttribute, cuKernelSetAttribute, (int, int, void *, int)) \
    X(cuKernelGetFunction, cuKernelGetFunction, (void **, void *)) \
    X(cuLaunchKernel, cuLaunchKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, \
                                       void **, void **)) \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor, cuOccupancyMaxActiveBlocksPerMultiprocessor, \
      (int *, void *, int, size_t)) \
    X(cuMemAlloc, cuMemAlloc_v2, (uint64_t *, size_t)) \
    X(cuMemFree, cuMemFree_v2, (uint64_t)) \
    X(cuMemGetInfo, cuMemGetInfo_v2, (size_t *, size_t *)) \
    X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, void *)) \
    X(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, void *)) \
    X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, (uint64_t, uint64_t, size_t, void *)) \
    X(cuMemsetD8Async, cuMemsetD8Async, (uint64_t, unsigned char, size_t, void *)) \
    X(cuPointerGetAttribute, cuPointerGetAttribute, (void *, int, uint64_t)) \
    X(cuStreamCreate, cuStreamCreate, (void **, unsigned)) \
    X(cuStreamDestroy, cuStreamDestroy_v2, (void *)) \
    X(cuStreamSynchronize, cuStreamSynchronize, (void *)) \
    X(cuStreamWaitEvent, cuStreamWaitEvent, (void *, void *, unsigned)) \
    X(cuStreamIsCapturing, cuStreamIsCapturing, (void *, int *)) \
    X(cuStreamBeginCapture, cuStreamBeginCapture_v2, (void *, int)) \
    X(cuStreamEndCapture, cuStreamEndCapture, (void *, void **)) \
    X(cuGraphInstantiate, cuGraphInstantiateWithFlags, (void **, void *, unsigned long long)) \
    X(cuGraphDestroy, cuGraphDestroy, (void *)) \
    X(cuGraphExecDestroy, cuGraphExecDestroy, (void *)) \
    X(cuGraphLaunch, cuGraphLaunch, (void *, void *)) \
    X(cuEventCreate, cuEventCreate, (void **, unsigned)) \
    X(cuEventDestroy, cuEventDestroy_v2, (void *)) \
    X(cuEventRecord, cuEventRecord, (void *, void *)) \
    X(cuEventSynchronize, cuEventSynchronize, (void *)) \
    X(cuEventElapsedTime, cuEventElapsedTime, (float *, void *, void *))

typedef struct {
#define ASSAY_CUDA_POINTER(name, exported, parameters) int(*name) parameters;
    ASSAY_CUDA_CALLS(ASSAY_CUDA_POINTER)
#undef ASSAY_CUDA_POINTER
} assay_cuda_calls;

/* cuda.h's numbers. */
enum {
    CU_ERROR_INVALID_VALUE = 1,
    CU_ERROR_OUT_OF_MEMORY = 2,
    CU_ERROR_NOT_INITIALIZED = 3,
    CU_ERROR_DEINITIALIZED = 4,
    CU_ERROR_STUB_LIBRARY = 34,
    CU_ERROR_NO_DEVICE = 100,
    CU_ERROR_INVALID_DEVICE = 101,
    CU_ERROR_INVALID_CONTEXT = 201,
    CU_ERROR_NO_BINARY_FOR_GPU = 209,
    CU_ERROR_ECC_UNCORRECTABLE = 214,
    CU_ERROR_INVALID_PTX = 218,
    CU_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CU_ERROR_NOT_FOUND = 500,
    CU_ERROR_ILLEGAL_ADDRESS = 700,
    CU_ERROR_LAUNCH_TIMEOUT = 702,
    CU_ERROR_CONTEXT_IS_DESTROYED = 709,
    CU_ERROR_ASSERT = 710,
    CU_ERROR_HARDWARE_STACK_ERROR = 714,
    CU_ERROR_LAUNCH_FAILED = 719,
    CU_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CU_ERROR_STREAM_CAPTURE_LAST = 908
};

/* The opened driver; only after assay_cuda_open() returned ASSAY_OK. */
extern assay_cuda_calls assay_cuda_api;

/* Sets the thread's message and returns `status`. */
int assay_cuda_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* ASSAY_OK for result 0, else the status that a driver's result means, with a message. */
int assay_cuda_result(int result, const char *call);
#define ASSAY_CUDA_CALL(name, ...) assay_cuda_result(assay_cuda_api.name(__VA_ARGS__), #name)
/* What assay_cuda_refresh does in each file. */
void assay_cuda_forget_kernels(void);
void assay_cuda_forget_devices(void);
/* The current context of this thread and its unchanging number. */
int assay_cuda_context(uint64_t *id, const assay_cuda_device **device);

#endif

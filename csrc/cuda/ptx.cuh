// Everything of the GPU that kernels use: one function per instruction, in namespace assay::ptx, with two back ends.
//   ptx_device.cuh  inline PTX and compiler intrinsics (nvcc, NVRTC)
//   emu/ptx_host.h  the same functions on the CPU, over the emulator's fibers (g++, clang++)
// A kernel includes this header and no other of CUDA's or C++'s, so that one source compiles in all four.
#ifndef ASSAY_PTX_CUH
#define ASSAY_PTX_CUH

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <stddef.h>
#include <stdint.h>
#endif

#ifdef __CUDACC__
#define ASSAY_DEVICE __device__ __forceinline__
#define ASSAY_KERNEL(name, args_type, threads, min_blocks) \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const __grid_constant__ args_type args)
#define ASSAY_UNROLL _Pragma("unroll")
#define ASSAY_NO_UNROLL _Pragma("unroll 1")
#else
#define ASSAY_DEVICE inline
#define ASSAY_UNROLL
#define ASSAY_NO_UNROLL
#endif

namespace assay {

struct alignas(8) u32x2 {
    uint32_t x, y;
};
struct alignas(16) u32x4 {
    uint32_t x, y, z, w;
};

}  // namespace assay

#ifdef __CUDACC__
#include "ptx_device.cuh"
#else
#include "emu/ptx_host.h"
#endif

namespace assay {

template <class T>
ASSAY_DEVICE T min_of(T a, T b) {
    return b < a ? b : a;
}
template <class T>
ASSAY_DEVICE T max_of(T a, T b) {
    return a < b ? b : a;
}
template <class T>
ASSAY_DEVICE T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

constexpr uint32_t ceil_div_const(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

}  // namespace assay

#endif

// The CPU's half of ptx.cuh, over the emulator's fibers.
#ifndef ASSAY_PTX_HOST_H
#define ASSAY_PTX_HOST_H

#include <math.h>
#include <string.h>

#include "emu.h"
#include "numbers.h"

namespace assay {
namespace ptx {

// ---- where am I ----------------------------------------------------------------------------------
inline uint32_t tid() { return emu::here->tid; }
inline uint32_t bid_x() { return emu::here->bid[0]; }
inline uint32_t bid_y() { return emu::here->bid[1]; }
inline uint32_t bid_z() { return emu::here->bid[2]; }
inline uint32_t grid_x() { return emu::here->grid[0]; }
inline uint32_t grid_y() { return emu::here->grid[1]; }
inline uint32_t grid_z() { return emu::here->grid[2]; }
inline uint32_t block_threads() { return emu::here->threads; }
inline uint32_t lane() { return emu::here->tid & 31; }
inline uint32_t warp() { return emu::here->tid >> 5; }
inline uint8_t *shared() { return emu::here->shared; }
inline uint32_t shared_address(const void *p) {
    emu::check_shared("shared_address", p, 0, 1);
    return static_cast<uint32_t>(static_cast<const uint8_t *>(p) - emu::here->shared);
}

// ---- barriers and fences ---------------------------------------------------------------------------
inline void sync() { emu::barrier(0, emu::here->threads); }
inline void bar_sync(uint32_t id, uint32_t threads) { emu::barrier(id, threads); }
inline void sync_warp(uint32_t mask = ~0u) {
    emu::collective("sync_warp", mask, nullptr, [](void *const *, uint32_t) {}, true);
}
inline void fence_device() { emu::fence(); }

// ---- warp collectives ----------------------------------------------------------------------------------
namespace host {
template <class T>
struct Shuffle {
    T value, result;
    uint32_t operand;
};
enum { INDEXED, XOR, UP, DOWN };
template <class T, int HOW>
T shuffle(const char *what, T value, uint32_t operand) {
    Shuffle<T> mine = {value, value, operand};
    emu::collective(what, ~0u, &mine, [](void *const *lanes, uint32_t) {
        for (uint32_t i = 0; i < 32; i++) {
            Shuffle<T> &to = *static_cast<Shuffle<T> *>(lanes[i]);
            uint32_t from = HOW == INDEXED ? to.operand & 31
                            : HOW == XOR   ? i ^ to.operand
                            : HOW == UP    ? i - to.operand
                                           : i + to.operand;
            if (from > 31) from = i;   // the lane's own value, as on the GPU
            to.result = static_cast<Shuffle<T> *>(lanes[from])->value;
        }
    });
    return mine.result;
}
struct Vote {
    uint32_t value, result;
};
}  // namespace host
template <class T>
inline T shfl(T v, uint32_t src) { return host::shuffle<T, host::INDEXED>("shfl", v, src); }
template <class T>
inline T shfl_xor(T v, uint32_t mask) { return host::shuffle<T, host::XOR>("shfl_xor", v, mask); }
template <class T>
inline T shfl_up(T v, uint32_t delta) { return host::shuffle<T, host::UP>("shfl_up", v, delta); }
template <class T>
inline T shfl_down(T v, uint32_t delta) { return host::shuffle<T, host::DOWN>("shfl_down", v, delta); }
inline uint32_t ballot(bool p) {
    host::Vote mine = {p, 0};
    emu::collective("ballot", ~0u, &mine, [](void *const *lanes, uint32_t) {
        uint32_t votes = 0;
        for (uint32_t i = 0; i < 32; i++) votes |= static_cast<host::Vote *>(lanes[i])->value << i;
        for (uint32_t i = 0; i < 32; i++) static_cast<host::Vote *>(lanes[i])->result = votes;
    });
    return mine.result;
}
inline bool any(bool p) { return ballot(p) != 0; }
inline bool all(bool p) { return ballot(p) == ~0u; }
inline uint32_t match_any(uint32_t v) {
    host::Vote mine = {v, 0};
    emu::collective("match_any", ~0u, &mine, [](void *const *lanes, uint32_t) {
        for (uint32_t i = 0; i < 32; i++) {
            host::Vote &to = *static_cast<host::Vote *>(lanes[i]);
            for (uint32_t j = 0; j < 32; j++)
                to.result |= static_cast<uint32_t>(static_cast<host::Vote *>(lanes[j])->value == to.value) << j;
        }
    });
    return mine.result;
}

inline uint32_t redux_max(uint32_t v) {
    host::Vote mine = {v, 0};
    emu::collective("redux_max", ~0u, &mine, [](void *const *lanes, uint32_t) {
        uint32_t most = 0;
        for (uint32_t i = 0; i < 32; i++) {
            const uint32_t value = static_cast<host::Vote *>(lanes[i])->value;
            most = value > most ? value : most;
        }
        for (uint32_t i = 0; i < 32; i++) static_cast<host::Vote *>(lanes[i])->result = most;
    });
    return mine.result;
}
inline uint32_t redux_min(uint32_t v) { return ~redux_max(~v); }

// ---- bits ------------------------------------------------------------------------------------------
inline uint32_t popc(uint32_t v) { return static_cast<uint32_t>(__builtin_popcount(v)); }
inline uint32_t popc(uint64_t v) { return static_cast<uint32_t>(__builtin_popcountll(v)); }
inline uint32_t ffs(uint32_t v) { return static_cast<uint32_t>(__builtin_ffs(static_cast<int>(v))); }
inline uint32_t ffs(uint64_t v) { return static_cast<uint32_t>(__builtin_ffsll(static_cast<long long>(v))); }
inline uint32_t clz(uint32_t v) { return v ? static_cast<uint32_t>(__builtin_clz(v)) : 32; }
inline uint32_t clz(uint64_t v) { return v ? static_cast<uint32_t>(__builtin_clzll(v)) : 64; }
inline uint32_t ctz(uint32_t v) { return v ? ffs(v) - 1 : 32; }
inline uint32_t ctz(uint64_t v) { return v ? ffs(v) - 1 : 64; }
inline uint32_t mulhi32(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
template <uint32_t LUT>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    if (LUT & 0x01) d |= ~a & ~b & ~c;
    if (LUT & 0x02) d |= ~a & ~b & c;
    if (LUT & 0x04) d |= ~a & b & ~c;
    if (LUT & 0x08) d |= ~a & b & c;
    if (LUT & 0x10) d |= a & ~b & ~c;
    if (LUT & 0x20) d |= a & ~b & c;
    if (LUT & 0x40) d |= a & b & ~c;
    if (LUT & 0x80) d |= a & b & c;
    return d;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t d = 0;
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t s = selector >> (4 * i) & 15;
        uint32_t byte = static_cast<uint32_t>(both >> (8 * (s & 7))) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        d |= byte << (8 * i);
    }
    return d;
}
inline uint32_t float_as_uint(float v) { return emu::bits_of(v); }
inline float uint_as_float(uint32_t v) { return emu::float_of(v); }
inline uint64_t double_as_ulong(double v) {
    uint64_t u;
    memcpy(&u, &v, 8);
    return u;
}
inline double ulong_as_double(uint64_t u) {
    double v;
    memcpy(&v, &u, 8);
    return v;
}

// ---- float and double: compiled with -ffp-contract=off ---------------------------------------------------
inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return sqrtf(a); }
inline float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double add_rn(double a, double b) { return a + b; }
inline double mul_rn(double a, double b) { return a * b; }
inline double div_rn(double a, double b) { return a / b; }
inline double sqrt_rn(double a) { return sqrt(a); }
inline double fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rint_even(float a) { return rintf(a); }
inline int32_t float_to_int(float a) {
    if (a != a) return 0;
    if (a >= 2147483648.0f) return INT32_MAX;
    if (a < -2147483648.0f) return INT32_MIN;
    return static_cast<int32_t>(rintf(a));
}

// ---- half and bfloat16 as bits ------------------------------------------------------------------------
inline float half_to_float(uint16_t h) { return emu::half_to_float(h); }
inline uint16_t float_to_half(float f) { return emu::float_to_half(f); }
inline float bf16_to_float(uint16_t h) { return emu::bf16_to_float(h); }
inline uint16_t float_to_bf16(float f) { return emu::float_to_bf16(f); }
inline uint32_t pack_half2(float lo, float hi) {
    return emu::float_to_half(lo) | static_cast<uint32_t>(emu::float_to_half(hi)) << 16;
}
inline uint32_t pack_bf162(float lo, float hi) {
    return emu::float_to_bf16(lo) | static_cast<uint32_t>(emu::float_to_bf16(hi)) << 16;
}
namespace host {
inline uint16_t fma_half(uint16_t a, uint16_t b, uint16_t c) {
    return emu::double_to_half(
        emu::fma_to_odd(emu::half_to_float(a), emu::half_to_float(b), emu::half_to_float(c)));
}
inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
    return emu::double_to_bf16(
        emu::fma_to_odd(emu::bf16_to_float(a), emu::bf16_to_float(b), emu::bf16_to_float(c)));
}
inline uint32_t pair(uint16_t lo, uint16_t hi) { return lo | static_cast<uint32_t>(hi) << 16; }
inline uint16_t low(uint32_t v) { return static_cast<uint16_t>(v); }
inline uint16_t high(uint32_t v) { return static_cast<uint16_t>(v >> 16); }
}  // namespace host
inline uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
    using namespace host;
    return pair(fma_half(low(a), low(b), low(c)), fma_half(high(a), high(b), high(c)));
}
inline uint32_t hadd2(uint32_t a, uint32_t b) { return hfma2(a, 0x3C003C00u, b); }
inline uint32_t hsub2(uint32_t a, uint32_t b) { return hfma2(b, 0xBC00BC00u, a); }
inline uint32_t hmul2(uint32_t a, uint32_t b) { return hfma2(a, b, 0x80008000u); }
inline uint32_t bfma2(uint32_t a, uint32_t b, uint32_t c) {
    using namespace host;
    return pair(fma_bf16(low(a), low(b), low(c)), fma_bf16(high(a), high(b), high(c)));
}
inline uint32_t bmul2(uint32_t a, uint32_t b) { return bfma2(a, b, 0x80008000u); }
inline uint32_t badd2(uint32_t a, uint32_t b) { return bfma2(a, 0x3F803F80u, b); }

// ---- global memory -------------------------------------------------------------------------------------
namespace host {
template <class T>
inline T load(const void *p) {
    emu::check_global("load", p, sizeof(T), sizeof(T));
    emu::record(emu::GLOBAL_LOAD, p, sizeof(T));
    return *static_cast<const T *>(p);
}
}  // namespace host
inline uint32_t ldg8(const void *p) { return host::load<uint8_t>(p); }
inline uint32_t ldg16(const void *p) { return host::load<uint16_t>(p); }
inline uint32_t ldg32(const void *p) { return host::load<uint32_t>(p); }
inline u32x2 ldg64(const void *p) { return host::load<u32x2>(p); }
inline u32x4 ldg128(const void *p) { return host::load<u32x4>(p); }
inline float ldg_float(const float *p) { return host::load<float>(p); }
inline u32x4 ld128_stream(const void *p) { return host::load<u32x4>(p); }
template <class T>
inline T ldcg(const T *p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "ldcg: 4 or 8 bytes");
    return host::load<T>(p);
}
inline u32x4 ldcg128(const void *p) { return host::load<u32x4>(p); }
template <class T>
inline void st(void *p, T v) {
    emu::check_global("store", p, sizeof(T), alignof(T));
    emu::record(emu::GLOBAL_STORE, p, sizeof(T));
    *static_cast<T *>(p) = v;
}

// ---- shared memory ---------------------------------------------------------------------------------------
namespace host {
template <class T>
inline T load_shared(const void *p) {
    emu::check_shared("shared load", p, sizeof(T), sizeof(T));
    emu::record(emu::SHARED_ACCESS, p, sizeof(T));
    return *static_cast<const T *>(p);
}
}  // namespace host
inline uint32_t lds32(const void *p) { return host::load_shared<uint32_t>(p); }
inline u32x2 lds64(const void *p) { return host::load_shared<u32x2>(p); }
inline u32x4 lds128(const void *p) { return host::load_shared<u32x4>(p); }
template <class T>
inline void sts(void *p, T v) {
    emu::check_shared("shared store", p, sizeof(T), sizeof(T));
    emu::record(emu::SHARED_ACCESS, p, sizeof(T));
    *static_cast<T *>(p) = v;
}

// ---- atomics and flags between blocks ------------------------------------------------------------------------
namespace host {
template <class T, class F>
inline T update(T *p, F next) {
    emu::check_either("atomic", p, sizeof(T), sizeof(T));
    emu::count_atomic();
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    T want = next(old);
    while (!__atomic_compare_exchange_n(p, &old, want, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) want = next(old);
    if (want != old) emu::progress();
    return old;
}
}  // namespace host
template <class T>
inline T atomic_add(T *p, T v) { return host::update(p, [v](T old) { return static_cast<T>(old + v); }); }
inline float atomic_add(float *p, float v) {
    return emu::float_of(host::update(reinterpret_cast<uint32_t *>(p),
                                      [v](uint32_t old) { return emu::bits_of(emu::float_of(old) + v); }));
}
template <class T>
inline T atomic_max(T *p, T v) { return host::update(p, [v](T old) { return old < v ? v : old; }); }
template <class T>
inline T atomic_min(T *p, T v) { return host::update(p, [v](T old) { return v < old ? v : old; }); }
inline uint32_t atomic_or(uint32_t *p, uint32_t v) { return host::update(p, [v](uint32_t old) { return old | v; }); }
template <class T>
inline T atomic_cas(T *p, T expected, T v) {
    const T old = host::update(p, [=](T was) { return was == expected ? v : was; });
    if (old != expected) emu::spin();
    return old;
}
inline uint32_t atomic_exch(uint32_t *p, uint32_t v) { return host::update(p, [v](uint32_t) { return v; }); }
inline uint32_t ld_acquire(const uint32_t *p) {
    emu::spin();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void st_release(uint32_t *p, uint32_t v) {
    emu::progress();
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
inline void red_add_release(uint32_t *p, uint32_t v) {
    emu::progress();
    __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
}
inline uint32_t atomic_add_acq_rel(uint32_t *p, uint32_t v) {
    emu::count_atomic();
    emu::progress();
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------
inline void cp_async16(void *smem, const void *gmem, bool valid = true) { emu::copy_async(smem, gmem, valid); }
inline void cp_async16_stream(void *smem, const void *gmem, bool valid = true) { emu::copy_async(smem, gmem, valid); }
inline void cp_async_commit() { emu::copy_commit(); }
template <int N>
inline void cp_async_wait() {
    emu::copy_wait(N);
}

inline uint64_t timer_ns() { return 0; }

}  // namespace ptx
}  // namespace assay

#include "matrix.h"

#endif

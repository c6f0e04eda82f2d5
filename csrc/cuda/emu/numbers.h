// float16 and bfloat16 on the CPU, rounded to nearest even, NaN as the GPU writes it (0x7FFF).
#ifndef ASSAY_EMU_NUMBERS_H
#define ASSAY_EMU_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace assay {
namespace emu {

inline uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7FFF;
    if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

// To a format of `fraction` fraction bits whose smallest normal is 2^lowest and largest value is `largest`.
inline double round_to(double v, int fraction, int lowest) {
    int exponent;
    frexp(v, &exponent);
    const int unit = (exponent - 1 < lowest ? lowest : exponent - 1) - fraction;
    return ldexp(nearbyint(ldexp(v, -unit)), unit);
}

inline uint16_t double_to_half(double v) {
    if (v != v) return 0x7FFF;
    const uint16_t sign = signbit(v) ? 0x8000 : 0;
    v = fabs(v);
    if (v < 0x1p-26) return sign;
    if (v >= 65520.0) return sign | 0x7C00;
    const double rounded = round_to(v, 10, -14);
    if (rounded < 0x1p-14) return sign | static_cast<uint16_t>(rounded * 0x1p24);
    const uint32_t u = bits_of(static_cast<float>(rounded));
    return sign | static_cast<uint16_t>((u - (112u << 23)) >> 13);
}
inline uint16_t float_to_half(float v) { return double_to_half(v); }

inline float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
inline uint16_t float_to_bf16(float v) {
    if (v != v) return 0x7FFF;
    const uint32_t u = bits_of(v);
    return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
inline uint16_t double_to_bf16(double v) {
    if (v != v) return 0x7FFF;
    if (v == 0 || isinf(v)) return static_cast<uint16_t>(bits_of(static_cast<float>(v)) >> 16);
    return static_cast<uint16_t>(bits_of(static_cast<float>(round_to(v, 7, -126))) >> 16);
}

// a b + c for short formats, whose product is exact in double; the sum rounded to odd, so that rounding it again to the short
// format gives what rounding once would.
inline double fma_to_odd(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;
    if (!isfinite(sum)) return sum;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    uint64_t u;
    memcpy(&u, &sum, 8);
    if (error == 0 || u & 1) return sum;
    return nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

}  // namespace emu
}  // namespace assay

#endif

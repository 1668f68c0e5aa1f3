// The roundings of the official inference code, in place: FP8 e4m3 in groups of 64 on key-value rows, Hadamard and FP4 e2m1 in
// groups of 32 on indexer queries and keys. Scales are powers of two read off exponent bits, as in nautile.quant.
#pragma once
#include "vec.h"

namespace nautile {

// 2^ceil(log2(amax / (1 + fraction) 2^exponent)): the smallest power of two that brings amax under the largest payload value.
static inline float power_of_two_scale(float amax, float fraction, int exponent) {
    uint32_t bits;
    std::memcpy(&bits, &amax, 4);
    int biased = (int)(bits >> 23) - exponent + ((bits & 0x7FFFFF) > (uint32_t)(fraction * 8388608.0f));
    biased = biased < 1 ? 1 : biased > 254 ? 254 : biased;
    bits = (uint32_t)biased << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return scale;
}

// x to `mantissa` explicit bits, exponents below `smallest` share its step; ties to even.
static inline float round_to(float x, int mantissa, float smallest) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0x7F800000;
    float power;
    std::memcpy(&power, &bits, 4);
    float step = (power < smallest ? smallest : power) / (float)(1 << mantissa);
    return std::nearbyint(x / step) * step;
}

static inline void quantise_groups(float* x, int size, int group, float least, float fraction, int exponent, int mantissa, float smallest) {
    for (int at = 0; at < size; at += group) {
        float amax = least;
        for (int i = 0; i < group; i++) amax = std::fabs(x[at + i]) > amax ? std::fabs(x[at + i]) : amax;
        float scale = power_of_two_scale(amax, fraction, exponent);
        for (int i = 0; i < group; i++) x[at + i] = round_to(x[at + i] / scale, mantissa, smallest) * scale;
    }
}

// The first `plain` elements of a key-value row, a multiple of 64. The largest e4m3 value is 448 = 1.75 * 2^8.
static inline void quantise_row(float* x, int plain) { quantise_groups(x, plain, 64, 1e-4f, 0.75f, 8, 3, 0.015625f); }

// Normalised Hadamard transform (Sylvester order), then FP4, whose largest value is 6 = 1.5 * 2^2. size: a power of two >= 32.
static inline void quantise_index(float* x, int size) {
    for (int half = 1; half < size; half *= 2)
        for (int at = 0; at < size; at += 2 * half)
            for (int i = at; i < at + half; i++) {
                float low = x[i], high = x[i + half];
                x[i] = low + high, x[i + half] = low - high;
            }
    float factor = (float)(1.0 / std::sqrt((double)size));
    for (int i = 0; i < size; i++) x[i] *= factor;
    quantise_groups(x, size, 32, 6.0f * 1.17549435e-38f, 0.5f, 2, 1, 1.0f);
}

}  // namespace nautile

// Sixteen float lanes and what the kernels do with them. The types are GCC vectors, so every function has a meaning on any
// machine; AVX-512 and AVX2 are used where the compiler targets them. Multiply-adds are spelled out (the code is compiled with
// -ffp-contract=off), so a result never depends on which function it was inlined into.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace nautile {

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec4 __attribute__((vector_size(16)));

template <class V> struct Integers;
template <> struct Integers<vec> { typedef ivec type; };
template <> struct Integers<vec4> { typedef ivec4 type; };

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec spread(float x) { return vec{} + x; }

// The first n of 16 floats, zeros behind them.
static inline vec load_some(const float* p, int n) {
    if (n >= LANES) return load(p);
    float full[LANES] = {};
    for (int i = 0; i < n; i++) full[i] = p[i];
    return load(full);
}
static inline void store_some(float* p, vec v, int n) {
    if (n >= LANES) return store(p, v);
    float full[LANES];
    store(full, v);
    for (int i = 0; i < n; i++) p[i] = full[i];
}

// a * b + c, rounded once where the machine can.
static inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    std::memcpy(&c, z, 64);
    return c;
#else
    return a * b + c;
#endif
}

// Keeps a vector in a register: the compiler would rather read it again from memory for each of its uses.
static inline void hold(uvec& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

// Sum and maximum over the lanes, always in the same tree.
typedef float vec8 __attribute__((vector_size(32)));
static inline float sum(vec v) {
    vec8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    vec4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}
static inline float maximum(vec v) {
    float x[LANES], top = v[0];
    store(x, v);
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
static inline vec smaller(vec a, vec b) { return a < b ? a : b; }

// e^x to about 1e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Arguments are clamped to the normal range.
template <class V> static inline V exponential(V x) {
    typedef typename Integers<V>::type I;
    const V low = V{} - 87.0f, high = V{} + 88.0f, magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
    x = x < low ? low : x;
    x = x > high ? high : x;
    V n = x * 1.44269504f + magic;
    I bits = (I)n;
    n = n - magic;
    V r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (V)((I)p + ((bits - 0x4B400000) << 23));
}
// log(1 + e^x), to about 2e-7 of it: max(x, 0) + 2 atanh(y / (2 + y)) with y = e^-|x|, by the series of atanh up to 1/3.
static inline vec softplus(vec x) {
    const vec y = exponential(x < 0.0f ? x : -x), s = y / (2.0f + y), square = s * s;
    vec series = spread(1.0f / 17);
    for (int odd = 15; odd >= 1; odd -= 2) series = fma(series, square, spread(1.0f / (float)odd));
    return fma(s + s, series, larger(x, vec{}));
}
template <class V> static inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

// bfloat16 ------------------------------------------------------------------------------------------------------------

static inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
typedef uint16_t half16 __attribute__((vector_size(32)));
static inline uvec widen(const uint16_t* p) {
    half16 half;
    std::memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, uvec);
}
static inline vec load_bf16(const uint16_t* p) { return (vec)(widen(p) << 16); }
// Sixteen floats to bfloat16 (nearest, ties to even); returns what that left out.
static inline vec store_bf16(uint16_t* p, vec v) {
    uvec bits = (uvec)v, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    half16 half = __builtin_convertvector(rounded, half16);
    std::memcpy(p, &half, sizeof half);
    return v - (vec)(rounded << 16);
}

// acc + pairs of bfloat16 products, lane by lane: two consecutive k of a column against the same two of a row.
static inline vec dot_pairs(vec acc, uvec a, uvec b) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = fma((vec)(a << 16), (vec)(b << 16), acc);
    return fma((vec)(a & 0xFFFF0000u), (vec)(b & 0xFFFF0000u), acc);
#endif
}

}  // namespace nautile

// Vectors of float32 as wide as the target's registers, in GCC/Clang vector types: one source for
// AVX-512, AVX2 and NEON. Products in bfloat16 exist where the CPU multiplies its pairs (AVX-512).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace sparseattn {

// SPARSEATTN_LANES and SPARSEATTN_PAIRS stand in for another target in tests: wider vectors than the
// CPU has, made of several of its own, and products of pairs put together from plain ones.
#if defined(SPARSEATTN_LANES)
#define SPARSEATTN_WIDTH SPARSEATTN_LANES
#elif defined(__AVX512F__)
#define SPARSEATTN_WIDTH 16
#elif defined(__AVX2__)
#define SPARSEATTN_WIDTH 8
#else
#define SPARSEATTN_WIDTH 4
#endif
constexpr int LANES = SPARSEATTN_WIDTH;

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && !defined(SPARSEATTN_LANES)
#define SPARSEATTN_BF16 1
#endif
#if defined(__AVX512F__) && !defined(SPARSEATTN_LANES)
#define SPARSEATTN_AVX512 1
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

constexpr float LOG2E = 1.44269504088896340736f;
constexpr double LN2 = 0.693147180559945309417;
constexpr float INF = std::numeric_limits<float>::infinity();

// A bfloat16 in memory.
struct bf16 {
    uint16_t bits;
};

static inline vf load(const float* at) {
    vf x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

static inline void store(float* at, vf x) { std::memcpy(at, &x, sizeof x); }

static inline vf splat(float x) {
    vf all;
    for (int l = 0; l < LANES; ++l) all[l] = x;
    return all;
}

static inline vi splat_int(int32_t x) {
    vi all;
    for (int l = 0; l < LANES; ++l) all[l] = x;
    return all;
}

static inline vi lane_numbers() {
    vi all;
    for (int l = 0; l < LANES; ++l) all[l] = l;
    return all;
}

// NaN in `x` stays, and of two numbers the greater.
static inline vf greater(vf x, vf than) { return x < than ? than : x; }

static inline bool any(vi mask) {
#if defined(SPARSEATTN_AVX512)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int32_t found = 0;
    for (int l = 0; l < LANES; ++l) found |= mask[l];
    return found != 0;
#endif
}

static inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

static inline float widen(float x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
static inline void narrow(float x, bf16& into) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        into.bits = uint16_t((bits >> 16) | 0x40);
        return;
    }
    into.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline void narrow(float x, float& into) { into = x; }

static inline void store_narrow(float* at, vf x) { store(at, x); }

static inline void store_narrow(bf16* at, vf x) {
#if defined(SPARSEATTN_BF16)
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(at, &y, sizeof y);
#else
    vu bits = (vu)x;
    vu even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu quiet = (bits >> 16) | 0x40u;
    even = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : even;
    for (int l = 0; l < LANES; ++l) at[l].bits = uint16_t(even[l]);
#endif
}

static inline vf load_wide(const float* at) { return load(at); }

static inline vf load_wide(const bf16* at) {
#if defined(SPARSEATTN_AVX512)
    __m256i half;
    std::memcpy(&half, at, sizeof half);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
    vu bits;
    for (int l = 0; l < LANES; ++l) bits[l] = uint32_t(at[l].bits) << 16;
    return (vf)bits;
#endif
}

// 2 ** x for x <= 127: exactly 1 at 0, 0 below 2 ** -126, NaN for NaN. Coefficients are a minimax fit
// of the relative error on [-1/2, 1/2]: 1.9e-9 for float32, 2.6e-6 where results are rounded to
// bfloat16.
template <bool FINE>
static inline vf exp2v(vf x) {
    const float shift = 12582912.0f;  // 1.5 * 2 ** 23: adding it leaves the nearest integer
    vf moved = x + shift;
    vf f = x - (moved - shift);
    vf p;
    if (FINE) {
        p = 0x1.41d334p-13f * f + 0x1.5f456ap-10f;
        p = p * f + 0x1.3b2dbcp-7f;
        p = p * f + 0x1.c6aed4p-5f;
        p = p * f + 0x1.ebfbdap-3f;
        p = p * f + 0x1.62e430p-1f;
        p = p * f + 1.0f;
    } else {
        p = 0x1.3997d6p-7f * f + 0x1.ca1442p-5f;
        p = p * f + 0x1.ec06dap-3f;
        p = p * f + 0x1.62e0dcp-1f;
        p = p * f + 0x1.ffffe8p-1f;
    }
    vi power = ((vi)moved + 127) << 23;
    vf y = p * (vf)power;
    return x < -126.0f ? splat(0.0f) : y;
}

// tanh: near 0 an odd polynomial (minimax, 4e-9 relative), where 1 - 2 / (exp(2 x) + 1) would lose its digits.
static inline vf tanhv(vf x) {
    vf size = x < 0.0f ? -x : x;
    vf t = x * x;
    vf p = -0x1.72eedc0000000p-8f * t + 0x1.515cde0000000p-6f;
    p = p * t - 0x1.b8153e0000000p-5f;
    p = p * t + 0x1.1105800000000p-3f;
    p = p * t - 0x1.5555240000000p-2f;
    vf near = x + x * t * p;
    vf capped = size > 20.0f ? splat(20.0f) : size;  // NaN stays
    vf far = 1.0f - 2.0f / (exp2v<true>(capped * (2.0f * LOG2E)) + 1.0f);
    far = x < 0.0f ? -far : far;
    return size < 0.625f ? near : far;
}

template <class T>
static inline T* at_bytes(T* base, int64_t bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(base)) + bytes);
}

}  // namespace sparseattn

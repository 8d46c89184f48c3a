// The one micro-kernel behind every product: C[i][lanes] (+)= sum_k A[i, k] * B[k][lanes].
//
// A is read element by element and broadcast, at any strides, so that keys and values are used as
// they lie; B and C hold lanes in a row. An element is 32 bits: a float, or a pair of bfloat16 that
// are neighbours along k (then k counts pairs).
#pragma once

#include "vectors.h"

namespace sparseattn {

struct Floats {
    static inline vf add(vf sum, uint32_t a, vu b) {
        float x;
        std::memcpy(&x, &a, 4);
        return sum + x * (vf)b;
    }
};

#if defined(SPARSEATTN_BF16) || defined(SPARSEATTN_PAIRS)
#define SPARSEATTN_PAIRED 1
struct Pairs {
    static inline vf add(vf sum, uint32_t a, vu b) {
#if defined(SPARSEATTN_BF16)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#else
        const vf low = (vf)(b << 16), high = (vf)(b & 0xffff0000u);
        return sum + widen(bf16{uint16_t(a)}) * low + widen(bf16{uint16_t(a >> 16)}) * high;
#endif
    }
};
#endif

// How many rows of A and vectors of B stay in registers together: 32 registers, or AVX2's 16.
#if SPARSEATTN_WIDTH == 16
constexpr int MOST_ROWS = 8, MOST_VECTORS = 2;
#elif SPARSEATTN_WIDTH == 8
constexpr int MOST_ROWS = 6, MOST_VECTORS = 2;
#else
constexpr int MOST_ROWS = 4, MOST_VECTORS = 4;
#endif

// One factor of a product: element (i, k) lies `i * rows + k * steps` bytes from the base.
struct Factor {
    const void* base;
    int64_t rows, steps;
};

template <class K, int ROWS, int VECTORS, bool ADD>
static inline __attribute__((always_inline)) void product_tile(
    const char* a, int64_t rows, int64_t steps, const char* b, int64_t b_row, float* c, int64_t c_row,
    int64_t count) {
    vf sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = splat(0.0f);
    for (int64_t k = 0; k < count; ++k) {
        vu x[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) std::memcpy(&x[v], b + v * LANES * 4, sizeof(vu));
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            uint32_t y;
            std::memcpy(&y, a + i * rows, 4);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = K::add(sum[i][v], y, x[v]);
        }
        a += steps;
        b += b_row;
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) {
            // Added at the end: a sum of sums errs less than one long sum.
            float* at = c + i * c_row + v * LANES;
            store(at, ADD ? load(at) + sum[i][v] : sum[i][v]);
        }
}

template <class K, int VECTORS, bool ADD>
static inline void product_panel(
    int64_t height, Factor a, const char* b, int64_t b_row, float* c, int64_t c_row, int64_t count) {
    const char* at = static_cast<const char*>(a.base);
    int64_t i = 0;
    for (; i + MOST_ROWS <= height; i += MOST_ROWS)
        product_tile<K, MOST_ROWS, VECTORS, ADD>(
            at + i * a.rows, a.rows, a.steps, b, b_row, c + i * c_row, c_row, count);
    if (i + 4 <= height) {
        product_tile<K, 4, VECTORS, ADD>(
            at + i * a.rows, a.rows, a.steps, b, b_row, c + i * c_row, c_row, count);
        i += 4;
    }
    if (i + 2 <= height) {
        product_tile<K, 2, VECTORS, ADD>(
            at + i * a.rows, a.rows, a.steps, b, b_row, c + i * c_row, c_row, count);
        i += 2;
    }
    if (i < height)
        product_tile<K, 1, VECTORS, ADD>(
            at + i * a.rows, a.rows, a.steps, b, b_row, c + i * c_row, c_row, count);
}

// C[height][width] (+)= A[height, count] B[count][width].
//
//   width: a multiple of LANES. b_row: bytes from one row of B to the next. c_row: floats.
template <class K, bool ADD>
static inline void product(
    int64_t height, int64_t width, int64_t count, Factor a, const void* b, int64_t b_row, float* c,
    int64_t c_row) {
    const char* from = static_cast<const char*>(b);
    int64_t at = 0;
    for (; at + MOST_VECTORS * LANES <= width; at += MOST_VECTORS * LANES)
        product_panel<K, MOST_VECTORS, ADD>(height, a, from + at * 4, b_row, c + at, c_row, count);
    for (; at < width; at += LANES)
        product_panel<K, 1, ADD>(height, a, from + at * 4, b_row, c + at, c_row, count);
}

}  // namespace sparseattn

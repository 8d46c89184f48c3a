// What Python says of a linear call, numbers as float or double, and products of either.
#pragma once

#include "softmax_tile.h"

namespace sparseattn {

// A run of rows of the batch: sparseattn/runs.py. `keys` counts those that some query reaches.
struct LinearRun {
    int64_t batch, batches, query, queries, key, keys, offset, holes;
};

// Order and sizes are those of sparseattn/engines/linear/in_native.py.
struct LinearCall {
    Rows q, k, v, out, grad, dq, dk, dv;
    int64_t length, mean;                // [B, Hq, N] float64 in one piece, or 0
    int64_t runs, run_count;             // LinearRun
    int64_t key_mask, key_mask_row;      // bytes [B, M] where keys have holes, or 0
    int64_t projection;                  // [F, D] of the numbers that are computed with, or 0
    int64_t decay;                       // [Hq] float64, or 0
    int64_t q_heads, kv_heads, n, head_dim, value_dim, features;  // features: before a turn
    int64_t function, turned, q_most, k_most, normalize, causal;
    int64_t half, wide, threads;         // half: bfloat16; wide: float64; else float32
    double q_scale, k_scale, turn, q_drop, k_drop;

    int64_t groups() const { return q_heads / kv_heads; }
    int64_t all_features() const { return features * (turned ? 2 : 1); }
    const LinearRun& run(int64_t i) const { return reinterpret_cast<const LinearRun*>(runs)[i]; }
    double* length_row(int64_t b, int64_t h, int64_t i) const {
        return reinterpret_cast<double*>(length) + (b * q_heads + h) * n + i;
    }
    double* mean_row(int64_t b, int64_t h, int64_t i) const {
        return reinterpret_cast<double*>(mean) + (b * q_heads + h) * n + i;
    }
};

// Positions of a chunk: pairs within it are weighed one by one. A multiple of all lanes, and of the
// rows of the micro-kernel, as far as can be.
constexpr int CHUNK = SPARSEATTN_WIDTH == 16 ? 32 : 48;
// Chunks whose sums are taken in the numbers of the call, before float64 takes them up.
constexpr int SPAN = SPARSEATTN_WIDTH == 16 ? 24 : 16;
constexpr int64_t SPANNED = int64_t(CHUNK) * SPAN;

typedef double vd __attribute__((vector_size(4 * LANES)));
template <class Real>
using Lane = std::conditional_t<std::is_same_v<Real, float>, vf, vd>;
template <class Real>
constexpr int WIDTH = 4 * LANES / int(sizeof(Real));
static_assert(CHUNK % LANES == 0, "a chunk is whole vectors");

template <class Real>
static inline Lane<Real> pick(const Real* at) {
    Lane<Real> x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

template <class Real>
static inline void put(Real* at, Lane<Real> x) {
    std::memcpy(at, &x, sizeof x);
}

// A factor of a product in elements: (i, k) lies at `at[i * rows + k * steps]`.
template <class Real>
struct Left {
    const Real* at;
    int64_t rows, steps;
};

template <int ROWS_, int VECTORS_, bool ADD>
static inline __attribute__((always_inline)) void wide_tile(
    const double* a, int64_t rows, int64_t steps, const double* b, int64_t b_row, double* c,
    int64_t c_row, int64_t count) {
    vd sum[ROWS_][VECTORS_];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS_; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS_; ++v) sum[i][v] = vd{};
    for (int64_t k = 0; k < count; ++k, a += steps, b += b_row) {
        vd x[VECTORS_];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS_; ++v) x[v] = pick(b + v * WIDTH<double>);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS_; ++i)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS_; ++v) sum[i][v] += a[i * rows] * x[v];
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS_; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS_; ++v) {
            double* at = c + i * c_row + v * WIDTH<double>;
            put(at, ADD ? pick(at) + sum[i][v] : sum[i][v]);
        }
}

// C[height][width] (+)= A[height, count] B[count][width]; width a multiple of LANES.
// Out of line: unrolled as they are, copies at every call would take minutes to compile.
template <bool ADD>
static __attribute__((noinline)) void multiply(
    int64_t height, int64_t width, int64_t count, Left<float> a, const float* b, int64_t b_row,
    float* c, int64_t c_row) {
    product<Floats, ADD>(height, width, count, Factor{a.at, a.rows * 4, a.steps * 4}, b, b_row * 4, c, c_row);
}

template <bool ADD>
static __attribute__((noinline)) void multiply(
    int64_t height, int64_t width, int64_t count, Left<double> a, const double* b, int64_t b_row,
    double* c, int64_t c_row) {
    for (int64_t at = 0; at < width; at += LANES) {
        int64_t i = 0;
        for (; i + MOST_ROWS <= height; i += MOST_ROWS)
            wide_tile<MOST_ROWS, 2, ADD>(a.at + i * a.rows, a.rows, a.steps, b + at, b_row, c + i * c_row + at, c_row, count);
        for (; i + 2 <= height; i += 2)
            wide_tile<2, 2, ADD>(a.at + i * a.rows, a.rows, a.steps, b + at, b_row, c + i * c_row + at, c_row, count);
        for (; i < height; ++i)
            wide_tile<1, 2, ADD>(a.at + i * a.rows, a.rows, a.steps, b + at, b_row, c + i * c_row + at, c_row, count);
    }
}

// As multiply, in parts of few steps: rows of B that are a power of 2 apart then stay cached; and a sum
// of sums errs less, where what comes of it nearly cancels.
template <int64_t PART, class Real>
static inline void multiply_apart(
    int64_t height, int64_t width, int64_t count, Left<Real> a, const Real* b, int64_t b_row, Real* c, int64_t c_row) {
    multiply<false>(height, width, std::min(count, PART), a, b, b_row, c, c_row);
    for (int64_t k = PART; k < count; k += PART)
        multiply<true>(height, width, std::min(count - k, PART), Left<Real>{a.at + k * a.steps, a.rows, a.steps}, b + k * b_row, b_row, c, c_row);
}

static inline void widen_to(float x, float& into) { into = x; }
static inline void widen_to(double x, double& into) { into = x; }
static inline void widen_to(bf16 x, float& into) { into = widen(x); }

static inline void narrow_to(double x, double& into) { into = x; }
static inline void narrow_to(float x, float& into) { into = x; }
static inline void narrow_to(float x, bf16& into) { narrow(x, into); }

// Rows [count][width] of a tensor, whose next row is `stride` elements on, as columns of
// into [width][CHUNK], times `scale`; columns from `first` on, 0 in all others.
template <class T, class Real>
static __attribute__((noinline)) void turn_in(
    const T* at, int64_t stride, int64_t width, int64_t first, int64_t count, Real scale, Real* into) {
    int64_t d = 0;
    if constexpr (std::is_same_v<Real, float>) {
        for (int64_t r = 0; r < CHUNK; r += LANES) {
            for (d = 0; d + LANES <= width; d += LANES) {
                vf square[LANES];
                if (r >= first && r + LANES <= first + count) {
                    const T* from = at + (r - first) * stride + d;
                    for (int64_t l = 0; l < LANES; ++l) {
                        square[l] = load_wide(from + l * stride) * scale;
                        __builtin_prefetch(from + (l + 2 * LANES) * stride);  // may lie beyond the tensor
                    }
                } else {
                    for (int64_t l = 0; l < LANES; ++l) {
                        const int64_t i = r + l - first;
                        square[l] = i >= 0 && i < count ? load_wide(at + i * stride + d) * scale : splat(0.0f);
                    }
                }
                transpose_lanes(square);
                for (int64_t l = 0; l < LANES; ++l) store(into + (d + l) * CHUNK + r, square[l]);
            }
        }
    }
    for (; d < width; ++d) {
        Real* row = into + d * CHUNK;
        for (int64_t i = 0; i < CHUNK; ++i) row[i] = 0;
        for (int64_t i = 0; i < count; ++i) {
            Real x;
            widen_to(at[i * stride + d], x);
            row[first + i] = x * scale;
        }
    }
}

// The reverse: columns of from [width][CHUNK] to rows of a tensor.
template <class T, class Real>
static __attribute__((noinline)) void turn_out(
    const Real* from, int64_t width, int64_t first, int64_t count, T* at, int64_t stride) {
    int64_t d = 0;
    if constexpr (std::is_same_v<Real, float>) {
        for (int64_t r = first / LANES * LANES; r < first + count; r += LANES) {
            for (d = 0; d + LANES <= width; d += LANES) {
                vf square[LANES];
                for (int64_t l = 0; l < LANES; ++l) square[l] = load(from + (d + l) * CHUNK + r);
                transpose_lanes(square);
                for (int64_t l = 0; l < LANES; ++l) {
                    const int64_t i = r + l - first;
                    if (i >= 0 && i < count) store_narrow(at + i * stride + d, square[l]);
                }
            }
        }
    }
    for (; d < width; ++d)
        for (int64_t i = 0; i < count; ++i) narrow_to(from[d * CHUNK + first + i], at[i * stride + d]);
}

// Rows of a tensor as into [CHUNK][padded], whose padding is 0.
template <class T, class Real>
static __attribute__((noinline)) void copy_rows(
    const T* at, int64_t stride, int64_t width, int64_t padded, int64_t first, int64_t count, Real* into) {
    for (int64_t i = 0; i < count; ++i) {
        Real* row = into + (first + i) * padded;
        for (int64_t e = 0; e < width; ++e) widen_to(at[i * stride + e], row[e]);
        for (int64_t e = width; e < padded; ++e) row[e] = 0;
    }
}

// Calls f with the rows of x at (b, h, n) in the numbers that they are in: bfloat16, or those that the
// call is computed with. Only what reads or writes a tensor is made for both.
template <class Real, class F>
static inline void in_own_numbers(const LinearCall& call, const Rows& x, int64_t b, int64_t h, int64_t n, const F& f) {
    if constexpr (std::is_same_v<Real, float>)
        if (call.half) return f(x.row<bf16>(b, h, n));
    f(x.row<Real>(b, h, n));
}

}  // namespace sparseattn

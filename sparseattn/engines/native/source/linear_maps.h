// Feature maps of `FusedMap` (sparseattn/engines/linear/maps.py), tokens in the lanes, and their
// gradients. What is made is columns of a chunk: [features][CHUNK].
#pragma once

#include "linear_call.h"

namespace sparseattn {

enum Function : int64_t { IDENTITY = 0, ELU_PLUS_ONE = 1, RELU = 2, EXP = 3 };

// exp, from 0 to infinity, NaN for NaN: reduced to |r| <= ln 2 / 2 by an ln 2 in two parts, so that
// nothing of a great exponent is lost.
static inline vf expv(vf x) {
    const float shift = 12582912.0f;
    vf held = x < -104.0f ? splat(-104.0f) : x;
    held = held > 89.0f ? splat(89.0f) : held;
    vf moved = held * LOG2E + shift;
    vf n = moved - shift;
    vf r = held - n * 0.693145751953125f;
    r = r - n * 1.42860682030941723212e-6f;
    vf f = r * LOG2E;
    vf p = 0x1.41d334p-13f * f + 0x1.5f456ap-10f;
    p = p * f + 0x1.3b2dbcp-7f;
    p = p * f + 0x1.c6aed4p-5f;
    p = p * f + 0x1.ebfbdap-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
    // 2 ** n as two factors: results may lie beyond either end of the exponents.
    vi power = (vi)moved - 0x4b400000, half = power >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
}

static inline vd expv(vd x) {
    typedef int64_t vl __attribute__((vector_size(4 * LANES)));
    const double shift = 0x1.8p52;
    vd low = vd{} - 746.0, high = vd{} + 710.0;
    vd held = x < -746.0 ? low : x;
    held = held > 710.0 ? high : held;
    vd moved = held * 1.44269504088896340736 + shift;
    vd n = moved - shift;
    vd r = held - n * 0x1.62e42fee00000p-1;
    r = r - n * 0x1.a39ef35793c76p-33;
    vd p = vd{} + 1.0 / 6227020800.0;
    const double factors[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0};
    for (double factor : factors) p = p * r + 1.0 / factor;
    vl power = (vl)moved - 0x4338000000000000, half = power >> 1;
    return p * (vd)((half + 1023) << 52) * (vd)((power - half + 1023) << 52);
}

// One side of a call: its queries or its keys.
template <class Real>
struct Side {
    Real scale, drop;
    bool most;
};

// cos and sin of the turn at positions, made once where many heads ask for the same.
template <class Real>
class Turns {
   public:
    Turns(const LinearCall& call, int64_t most) : turn_(call.turn), cos_(size_t(call.turned ? most : 0)), sin_(cos_.size()) {
        const int64_t count = int64_t(cos_.size());
        parallel_for(call.threads, (count + 1023) / 1024, [&](int64_t part, int64_t) {
            for (int64_t p = part * 1024; p < std::min(count, part * 1024 + 1024); ++p) fill(p, cos_[size_t(p)], sin_[size_t(p)]);
        });
    }
    void at(int64_t position, Real& cosine, Real& sine) const {
        if (position >= 0 && position < int64_t(cos_.size())) {
            cosine = cos_[size_t(position)];
            sine = sin_[size_t(position)];
        } else {
            fill(position, cosine, sine);
        }
    }

   private:
    void fill(int64_t position, Real& cosine, Real& sine) const {
        const double angle = turn_ * double(position);
        cosine = Real(std::cos(angle));
        sine = Real(std::sin(angle));
    }
    double turn_;
    std::vector<Real> cos_, sin_;
};

// Features of the columns x [D][CHUNK], which hold scaled rows; hidden columns are set to 0 after.
//
//   phi: [all_features][CHUNK]. base: [features][CHUNK], the map before its turn; phi where it has none.
template <class Real>
static inline void make_features(
    const LinearCall& call, const Side<Real>& side, const Turns<Real>& turns, int64_t position, const Real* x,
    Real* base, Real* phi) {
    typedef Lane<Real> V;
    constexpr int W = WIDTH<Real>;
    const int64_t d = call.head_dim, f = call.features;
    const Real* y = x;
    if (call.projection) {
        const Real* rows = reinterpret_cast<const Real*>(call.projection);
        multiply<false>(f, CHUNK, d, Left<Real>{rows, d, 1}, x, CHUNK, base, CHUNK);
        for (int64_t i = 0; i < CHUNK; i += W) {
            V low = V{};
            if (side.most) {
                low = pick(base + i);
                for (int64_t g = 1; g < f; ++g) {
                    V one = pick(base + g * CHUNK + i);
                    low = low < one ? one : low;
                }
            } else {
                for (int64_t e = 0; e < d; ++e) {
                    V one = pick(x + e * CHUNK + i);
                    low += one * one;
                }
                low *= Real(0.5);
            }
            low += side.drop;
            for (int64_t g = 0; g < f; ++g) put(base + g * CHUNK + i, V(pick(base + g * CHUNK + i) - low));
        }
        y = base;
    }
    const int64_t all = f * CHUNK;
    if (call.function == EXP) {
        for (int64_t i = 0; i < all; i += W) put(base + i, expv(pick(y + i)));
    } else if (call.function == ELU_PLUS_ONE) {
        for (int64_t i = 0; i < all; i += W) {
            V one = pick(y + i);
            put(base + i, V(one > Real(0) ? V(one + Real(1)) : expv(one)));
        }
    } else if (call.function == RELU) {
        for (int64_t i = 0; i < all; i += W) {
            V one = pick(y + i);
            put(base + i, V(one < Real(0) ? V{} : one));
        }
    } else {
        for (int64_t i = 0; i < all; i += W) put(base + i, pick(y + i));
    }
    if (!call.turned) return;
    Real cosine[CHUNK], sine[CHUNK];
    for (int64_t i = 0; i < CHUNK; ++i) turns.at(position + i, cosine[i], sine[i]);
    for (int64_t g = 0; g < f; ++g)
        for (int64_t i = 0; i < CHUNK; i += W) {
            V one = pick(base + g * CHUNK + i);
            put(phi + g * CHUNK + i, V(one * pick(cosine + i)));
            put(phi + (f + g) * CHUNK + i, V(one * pick(sine + i)));
        }
}

// The gradient of x before its scale, from that of the features, which is overwritten.
//
//   dx: [D][CHUNK].
template <class Real>
static inline void pull_back(
    const LinearCall& call, const Side<Real>& side, const Turns<Real>& turns, int64_t position, const Real* x,
    const Real* base, Real* dphi, Real* dx) {
    typedef Lane<Real> V;
    constexpr int W = WIDTH<Real>;
    const int64_t d = call.head_dim, f = call.features, all = f * CHUNK;
    if (call.turned) {
        Real cosine[CHUNK], sine[CHUNK];
        for (int64_t i = 0; i < CHUNK; ++i) turns.at(position + i, cosine[i], sine[i]);
        for (int64_t g = 0; g < f; ++g)
            for (int64_t i = 0; i < CHUNK; i += W) {
                Real* at = dphi + g * CHUNK + i;
                put(at, V(pick(at) * pick(cosine + i) + pick(at + all) * pick(sine + i)));
            }
    }
    if (call.function == EXP) {
        for (int64_t i = 0; i < all; i += W) put(dphi + i, V(pick(dphi + i) * pick(base + i)));
    } else if (call.function == ELU_PLUS_ONE) {
        for (int64_t i = 0; i < all; i += W) {
            V one = pick(base + i), grad = pick(dphi + i);
            put(dphi + i, V(one > Real(1) ? grad : V(grad * one)));
        }
    } else if (call.function == RELU) {
        for (int64_t i = 0; i < all; i += W) {
            V one = pick(base + i), grad = pick(dphi + i);
            put(dphi + i, V(one == Real(0) ? V{} : grad));
        }
    }
    if (!call.projection) {
        for (int64_t i = 0; i < all; i += W) put(dx + i, V(pick(dphi + i) * side.scale));
        return;
    }
    const Real* rows = reinterpret_cast<const Real*>(call.projection);
    multiply_apart<64>(d, CHUNK, f, Left<Real>{rows, 1, d}, dphi, CHUNK, dx, CHUNK);
    for (int64_t i = 0; i < CHUNK; i += W) {
        V sum = V{};
        if (!side.most)
            for (int64_t g = 0; g < f; ++g) sum += pick(dphi + g * CHUNK + i);
        for (int64_t e = 0; e < d; ++e) {
            Real* at = dx + e * CHUNK + i;
            put(at, V((pick(at) - sum * pick(x + e * CHUNK + i)) * side.scale));
        }
    }
}

}  // namespace sparseattn

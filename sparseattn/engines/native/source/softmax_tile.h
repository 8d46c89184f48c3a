// One tile of queries: its logits against a stretch of keys, masked, and running sums over keys
// (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 1), with queries in the lanes.
#pragma once

#include <algorithm>

#include "call.h"

namespace sparseattn {

// Powers are measured from a maximum that may lag behind by this much (base 2): a row's own maximum
// moves only when it has to, which saves most rescaling. float32 holds the powers as well as ever.
constexpr float LAG = 8.0f;

// A square of LANES rows [r][c] as [c][r].
static inline void transpose_lanes(vf* x) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && !defined(SPARSEATTN_PLAIN)
#define SPARSEATTN_SHUFFLES 1
#endif
#endif
#if defined(SPARSEATTN_SHUFFLES) && SPARSEATTN_WIDTH == 16
    vf y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            vf a = y[i + j], b = y[i + j + 2];
            x[i + j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            x[i + j + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            vf a = x[i + j], b = x[i + j + 4];
            y[i + j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            y[i + j + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int j = 0; j < 8; ++j) {
        vf a = y[j], b = y[j + 8];
        x[j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[j + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
#elif defined(SPARSEATTN_SHUFFLES) && SPARSEATTN_WIDTH == 8
    vf y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            vf a = y[i + j], b = y[i + j + 2];
            x[i + j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            x[i + j + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; ++j) {
        vf a = x[j], b = x[j + 4];
        x[j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        x[j + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    float flat[LANES][LANES];
    for (int i = 0; i < LANES; ++i) store(flat[i], x[i]);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) x[j][i] = flat[i][j];
#endif
}

// `count` rows of x (each `width` wide) as columns: into[c][r], r < ROWS, 0 beyond; times `by`.
// Rows are `step` elements apart, or those that `which` names.
template <class T>
static inline void pack_columns(
    const T* x, int64_t step, int64_t count, int64_t width, float by, float* into, const int32_t* which = nullptr) {
    for (int64_t r = 0; r < ROWS; r += LANES) {
        int64_t rows = std::min<int64_t>(LANES, count - r), c = 0;
        const T* from[LANES];
        for (int64_t l = 0; l < rows; ++l) from[l] = x + (which ? int64_t(which[r + l]) : r + l) * step;
        for (; rows > 0 && c + LANES <= width; c += LANES) {
            vf square[LANES];
            if (rows >= LANES)  // apart, so that it unrolls
                for (int l = 0; l < LANES; ++l) square[l] = load_wide(from[l] + c) * by;
            else
                for (int l = 0; l < LANES; ++l) square[l] = l < rows ? load_wide(from[l] + c) * by : splat(0.0f);
            transpose_lanes(square);
            for (int l = 0; l < LANES; ++l) store(into + (c + l) * ROWS + r, square[l]);
        }
        for (; c < width; ++c)
            for (int64_t l = 0; l < LANES; ++l) into[c * ROWS + r + l] = l < rows ? widen(from[l][c]) * by : 0.0f;
    }
}

// The reverse: columns from[c][r] as `count` rows of x, each lane times `by[r]`.
template <class T>
static inline void unpack_columns(
    const float* from, const float* by, T* x, int64_t step, int64_t count, int64_t width) {
    for (int64_t r = 0; r < count; r += LANES) {
        int64_t rows = std::min<int64_t>(LANES, count - r), c = 0;
        vf factor = load(by + r);
        for (; c + LANES <= width; c += LANES) {
            vf square[LANES];
            for (int l = 0; l < LANES; ++l) square[l] = load(from + (c + l) * ROWS + r) * factor;
            transpose_lanes(square);
            if (rows >= LANES)
                for (int l = 0; l < LANES; ++l) store_narrow(x + (r + l) * step + c, square[l]);
            else
                for (int64_t l = 0; l < rows; ++l) store_narrow(x + (r + l) * step + c, square[l]);
        }
        for (; c < width; ++c)
            for (int64_t l = 0; l < rows; ++l) narrow(from[c * ROWS + r + l] * factor[l], x[(r + l) * step + c]);
    }
}

// Neighbouring rows 2p and 2p + 1 of x [count][ROWS], rounded, as pairs into[p][ROWS]; an odd last
// row is paired with 0.
static inline void pair_rows(const float* x, int64_t count, uint32_t* into) {
    for (int64_t j = 0; j < count; j += 2)
        for (int64_t r = 0; r < ROWS; r += LANES) {
            vf low = load(x + j * ROWS + r), high = j + 1 < count ? load(x + (j + 1) * ROWS + r) : splat(0.0f);
#if defined(SPARSEATTN_BF16)
            __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
            __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
            __m512i both = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
            std::memcpy(into + j / 2 * ROWS + r, &both, sizeof both);
#else
            for (int l = 0; l < LANES; ++l) {
                bf16 a, b;
                narrow(low[l], a);
                narrow(high[l], b);
                into[j / 2 * ROWS + r + l] = a.bits | uint32_t(b.bits) << 16;
            }
#endif
        }
}

// The same of rows x [count][width] of bfloat16, `step` elements apart, as they are.
static inline void pair_rows(const bf16* x, int64_t step, int64_t count, int64_t width, uint32_t* into) {
    for (int64_t j = 0; j < count; j += 2) {
        const bf16 *low = x + j * step, *high = j + 1 < count ? low + step : nullptr;
        uint32_t* at = into + j / 2 * width;
        for (int64_t d = 0; d < width; ++d) at[d] = low[d].bits | (high ? uint32_t(high[d].bits) << 16 : 0);
    }
}

// What decides which pairs of a tile and a stretch are visible.
struct Sight {
    int64_t low, high, first;   // of a band: query `first + r` sees the keys from low + first + r on
    int64_t keys;               // of the run
    const uint8_t* allowed;     // of each key of the run, or none
};

// -inf into the logits [count][ROWS] of pairs that are not visible.
static inline void hide(float* logits, const Stretch& here, const Sight& sight) {
    const vi lanes = lane_numbers();
    if (here.banded) {
        for (int64_t r = 0; r < ROWS; r += LANES) {
            // Query r sees key j where 0 <= j - low - r <= high - low.
            int64_t shift = here.start - sight.low - sight.first - r;
            int32_t length = int32_t(sight.high - sight.low);
            for (int64_t j = 0; j < here.count; ++j) {
                vi ahead = splat_int(int32_t(shift + j)) - lanes;
                vi hidden = (ahead < 0) | (ahead > length);
                vf x = load(logits + j * ROWS + r);
                store(logits + j * ROWS + r, hidden ? splat(-INF) : x);
            }
        }
    }
    if (here.bits)
        for (int64_t r = 0; r < ROWS; r += LANES)
            for (int64_t w = 0; w * 32 < here.count; ++w) {
                vu words;
                for (int l = 0; l < LANES; ++l) words[l] = here.bits[(r + l) * WORDS + w];
                for (int64_t j = w * 32; j < std::min<int64_t>(here.count, w * 32 + 32); ++j) {
                    vi shown = (vi)(words << 31);
                    vf x = load(logits + j * ROWS + r);
                    store(logits + j * ROWS + r, shown < 0 ? x : splat(-INF));
                    words >>= 1;
                }
            }
    if (sight.allowed)
        for (int64_t j = 0; j < here.count; ++j)
            if (!sight.allowed[here.start + j])
                for (int64_t r = 0; r < ROWS; ++r) logits[j * ROWS + r] = -INF;
}

// Whether rows [count][width] hold nothing but finite numbers.
template <class T>
static inline bool finite_rows(const T* x, int64_t step, int64_t count, int64_t width) {
    vi most = splat_int(0);
    float rest = 0.0f;
    for (int64_t j = 0; j < count; ++j) {
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            vi size = (vi)load_wide(x + j * step + c) & 0x7fffffff;
            most = size > most ? size : most;
        }
        for (; c < width; ++c) rest += widen(x[j * step + c]) * 0.0f;
    }
    return rest == 0.0f && !any(most >= 0x7f800000);
}

// Rows [count][width] of which some are not finite, with zeros for what is not, one after the other.
template <class T, class Stored>
static inline void clean_rows(const T* x, int64_t step, int64_t count, int64_t width, Stored* into) {
    for (int64_t j = 0; j < count; ++j)
        for (int64_t c = 0; c < width; ++c) {
            const float y = widen(x[j * step + c]);
            narrow(y - y == 0.0f ? y : 0.0f, into[j * width + c]);
        }
}

// softcap's tanh: logits, already divided by the cap, become their tanh.
static inline void cap(float* logits, int64_t count, float by) {
    for (int64_t at = 0; at < count * ROWS; at += LANES) store(logits + at, tanhv(load(logits + at) * by));
}

// The running maximum and sum of each row, in units of base 2.
struct Running {
    alignas(64) float top[ROWS], sum[ROWS];
    Running() {
        for (int r = 0; r < ROWS; ++r) top[r] = -INF, sum[r] = 0.0f;
    }
};

// Logits [count][ROWS] become powers 2 ** (logit * unit - top), and are added to the sums. Where a
// row's maximum has to move, its column of `mixed` [width][ROWS] is scaled.
template <bool FINE>
static inline void powers(
    float* logits, int64_t count, float unit, Running& state, float* mixed, int64_t width) {
    for (int64_t r = 0; r < ROWS; r += LANES) {
        vf best[4] = {splat(-INF), splat(-INF), splat(-INF), splat(-INF)};
        int64_t j = 0;
        for (; j + 4 <= count; j += 4)
            for (int u = 0; u < 4; ++u) best[u] = greater(best[u], load(logits + (j + u) * ROWS + r));
        for (; j < count; ++j) best[0] = greater(best[0], load(logits + j * ROWS + r));
        vf most = greater(greater(best[0], best[1]), greater(best[2], best[3])) * unit;
        vf top = load(state.top + r), total = load(state.sum + r);
        vi moves = most > top + LAG;
        moves |= (vi)(top == -INF) & (vi)(most > -INF);
        if (any(moves)) {
            vf next = moves ? most : top;
            vf shrink = exp2v<true>(top - next);
            shrink = moves ? shrink : splat(1.0f);
            shrink = top == -INF ? splat(1.0f) : shrink;
            total *= shrink;
            for (int64_t d = 0; d < width; ++d) store(mixed + d * ROWS + r, load(mixed + d * ROWS + r) * shrink);
            top = next;
            store(state.top + r, top);
        }
        vf base = top == -INF ? splat(0.0f) : top;
        // Apart from the total: thousands of small numbers, each added to a large one, would cost it
        // digits that a mean of many values shows.
        vf sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
        for (j = 0; j + 4 <= count; j += 4)
            for (int u = 0; u < 4; ++u) {
                vf p = exp2v<FINE>(load(logits + (j + u) * ROWS + r) * unit - base);
                sums[u] += p;
                store(logits + (j + u) * ROWS + r, p);
            }
        for (; j < count; ++j) {
            vf p = exp2v<FINE>(load(logits + j * ROWS + r) * unit - base);
            sums[0] += p;
            store(logits + j * ROWS + r, p);
        }
        store(state.sum + r, total + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
}

// What makes a tile's products in float32, whatever K and V are stored in.
struct InFloats {
    typedef float Stored;
    typedef Floats Product;
    static constexpr bool PAIRED = false;
};

#if defined(SPARSEATTN_PAIRED)
struct InPairs {
    typedef bf16 Stored;
    typedef Pairs Product;
    static constexpr bool PAIRED = true;
};
#endif

}  // namespace sparseattn

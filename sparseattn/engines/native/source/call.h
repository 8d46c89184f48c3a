// What Python says of a softmax call, and the tables of its plan.
#pragma once

#include <algorithm>

#include "products.h"
#include "threads.h"

namespace sparseattn {

// Rows [batch, heads, tokens, width] with a last stride of 1; strides in elements.
struct Rows {
    int64_t at, batch, head, token;
    template <class T>
    T* row(int64_t b, int64_t h, int64_t n) const {
        return reinterpret_cast<T*>(at) + b * batch + h * head + n * token;
    }
};

// The tables are those of sparseattn/engines/softmax/plan.py. Order and sizes are those of
// sparseattn/engines/softmax/in_native.py.
struct Call {
    Rows q, k, v, out, grad, dq, dk, dv;
    int64_t lse, grad_lse;                        // [B, Hq, N] in one piece, float64 and float32; grad_lse or 0
    int64_t runs, tiles, cols, looks, masks;      // int32 tables
    int64_t key_mask, key_mask_row;               // bytes [B, M] where keys have holes, or 0
    int64_t key_mask_query;                       // its step from query to query, for rows alone
    int64_t tile_count, batch, rows;              // batch: of each tile; rows: of the tensors
    int64_t q_heads, kv_heads, n, m, head_dim, value_dim;
    int64_t band, half, exact, threads;           // half: bfloat16; exact: few pairs
    double scale, softcap;                        // softcap 0: none

    int64_t groups() const { return q_heads / kv_heads; }
};

struct Run {
    int32_t batch, query, queries, key, keys, low, high, unused;
};

struct Tile {
    int32_t run, block, start, partial, stop, unused[3];
};

constexpr int ROWS = 32;        // queries in a tile: its lanes
constexpr int VECTORS = ROWS / LANES;
constexpr int KEYS = 64;        // keys in a block
constexpr int WHOLE = KEYS / MOST_ROWS * MOST_ROWS;  // of which the products have no rest
constexpr int64_t WITH_SINKS = 2;  // of exact: weights do not add up to 1
constexpr int MOST_WIDTH = 256;  // of a head
constexpr int WORDS = KEYS / 32;  // of a row of a mask

static_assert(ROWS % (MOST_VECTORS * LANES) == 0, "a tile is whole panels");

static inline const Run& run_of(const Call& call, const Tile& tile) {
    return reinterpret_cast<const Run*>(call.runs)[tile.run];
}

static inline const Tile& tile_of(const Call& call, int64_t number) {
    return reinterpret_cast<const Tile*>(call.tiles)[number];
}

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A stretch of keys, relative to a run, and what is known of the pairs with a tile's queries.
struct Stretch {
    int64_t start, count;
    bool banded;             // some pairs lie outside the band
    const uint32_t* bits;    // [ROWS, WORDS], or none
};

// Calls f(Stretch) for what the queries of a tile see, in ascending order within a band.
//
//   even: those of a band start at even places of the whole tensor's keys, where they can.
template <class F>
static inline void for_stretches(const Call& call, const Tile& tile, bool even, F&& f) {
    const Run& run = run_of(call, tile);
    int64_t first = int64_t(tile.block) * ROWS, last = std::min<int64_t>(first + ROWS, run.queries) - 1;
    if (call.band) {
        int64_t start = std::max<int64_t>(0, run.low + first);
        int64_t stop = std::min<int64_t>(run.keys, run.high + last + 1);
        // Every query of the tile sees the keys from `open` to `close` - 1.
        int64_t open = std::max<int64_t>(0, run.low + last), close = run.high + first + 1;
        if (even && start > 0 && start < stop) start -= (run.key + start) & 1;
        // Whole panels where there are keys: what is beyond the band is hidden.
        stop = std::min<int64_t>(run.keys, start + round_up(stop - start, MOST_ROWS));
        for (int64_t at = start; at < stop; at += WHOLE) {
            int64_t count = std::min<int64_t>(WHOLE, stop - at);
            f(Stretch{at, count, at < open || at + count > close, nullptr});
        }
        return;
    }
    const int32_t* cols = reinterpret_cast<const int32_t*>(call.cols);
    const int32_t* looks = reinterpret_cast<const int32_t*>(call.looks);
    const uint32_t* masks = reinterpret_cast<const uint32_t*>(call.masks);
    for (int64_t entry = tile.start; entry < tile.stop; ++entry) {
        int64_t at = int64_t(cols[entry]) * KEYS, count = std::min<int64_t>(KEYS, run.keys - at);
        const uint32_t* bits = entry < tile.partial ? nullptr : masks + int64_t(looks[entry]) * (ROWS + 1) * WORDS;
        f(Stretch{at, count, false, bits});
    }
}

}  // namespace sparseattn

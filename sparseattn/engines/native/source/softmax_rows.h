// Few queries, or few pairs: one row at a time, with the width in the lanes. Keys are read as they lie
// and once for all heads of a group, so a decoding step runs as fast as memory does. In float64 it
// serves calls of so few float32 pairs that the rounding of single numbers would show.
#pragma once

#include "softmax_forward.h"

namespace sparseattn {

constexpr int DOUBLES = LANES / 2;
typedef double vd __attribute__((vector_size(8 * DOUBLES)));

// What rows are computed in: a number, and a vector of as many as are loaded together.
struct Single {
    typedef float Number;
    typedef vf Vector;
    static constexpr int WIDTH = LANES;
    template <class T>
    static inline vf read(const T* at) { return load_wide(at); }
    static inline float power(float x) { return std::exp2(x); }
};

struct Double {
    typedef double Number;
    typedef vd Vector;
    static constexpr int WIDTH = DOUBLES;
    template <class T>
    static inline vd read(const T* at) {
        vd x;
        for (int l = 0; l < DOUBLES; ++l) x[l] = double(widen(at[l]));
        return x;
    }
    static inline double power(double x) { return std::exp2(x); }
};

template <class T, class In>
class RowsTask {
   public:
    typedef typename In::Number Number;
    typedef typename In::Vector Vector;
    static constexpr int WIDTH = In::WIDTH;

    static int64_t each(const Call& call) {  // numbers a row: query, sums of values, weights, total and top
        return round_up(call.head_dim, LANES) + round_up(call.value_dim, LANES) + KEYS + LANES;
    }
    static int64_t bytes(const Call& call) { return int64_t(sizeof(Number)) * each(call) * ROWS * call.groups(); }

    RowsTask(const Call& call, void* room) : call_(call), room_(static_cast<Number*>(room)) {}

    // The rows of one tile, for all heads of the group of key head `kv`.
    void run(const Tile& tile, int64_t z, int64_t kv) {
        const Run& run = run_of(call_, tile);
        const int64_t b = run.batch + z, first = int64_t(tile.block) * ROWS, d = call_.head_dim, dv = call_.value_dim;
        const int64_t rows = std::min<int64_t>(ROWS, run.queries - first), groups = call_.groups();
        const int64_t wide = round_up(d, LANES), wide_v = round_up(dv, LANES), step = each(call_);
        const Number scale = Number(call_.scale), inf = std::numeric_limits<Number>::infinity();
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t r = 0; r < rows; ++r) {
                Number* at = room_ + (g * rows + r) * step;
                const T* q = call_.q.template row<T>(b, kv * groups + g, run.query + first + r);
                for (int64_t c = 0; c < d; ++c) at[c] = Number(widen(q[c])) * scale;
                std::memset(at + wide, 0, size_t(wide_v) * sizeof(Number));
                at[wide + wide_v + KEYS] = Number(0);
                at[wide + wide_v + KEYS + 1] = -inf;
            }
        const uint8_t* allowed = nullptr;
        if (call_.key_mask) allowed = reinterpret_cast<const uint8_t*>(call_.key_mask) + b * call_.key_mask_row + run.key;
        for_stretches(call_, tile, false, [&](const Stretch& here) {
            const T* k = call_.k.template row<T>(b, kv, run.key + here.start);
            const T* v = call_.v.template row<T>(b, kv, run.key + here.start);
            for (int64_t r = 0; r < rows; ++r) {
                const uint64_t seen = visible(here, run, first + r, r, allowed ? allowed + (first + r) * call_.key_mask_query : nullptr);
                if (seen == 0) continue;
                for (int64_t g = 0; g < groups; ++g) add(room_ + (g * rows + r) * step, k, v, here.count, seen);
            }
        });
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t r = 0; r < rows; ++r) {
                const Number *at = room_ + (g * rows + r) * step, *sums = at + wide;
                const Number total = at[wide + wide_v + KEYS], top = at[wide + wide_v + KEYS + 1];
                const int64_t head = kv * groups + g, query = run.query + first + r;
                const bool empty = top == -inf;
                const Number by = empty ? Number(0) : Number(1) / total;
                T* out = call_.out.template row<T>(b, head, query);
                for (int64_t c = 0; c < dv; ++c) narrow(float(sums[c] * by), out[c]);
                double* lse = reinterpret_cast<double*>(call_.lse) + (b * call_.q_heads + head) * call_.n + query;
                *lse = empty ? -INF : (double(top) + std::log2(double(total))) * LN2;
            }
    }

   private:
    // Which keys of a stretch one query sees, as bits.
    static uint64_t visible(const Stretch& here, const Run& run, int64_t query, int64_t r, const uint8_t* allowed) {
        uint64_t seen = here.count == 64 ? ~uint64_t(0) : (uint64_t(1) << here.count) - 1;
        if (here.banded) {
            const int64_t low = run.low + query - here.start, high = run.high + query - here.start;
            if (low >= here.count || high < 0 || high < low) return 0;
            if (low > 0) seen &= ~uint64_t(0) << low;
            if (high < 63) seen &= (uint64_t(2) << high) - 1;
        }
        if (here.bits) seen &= here.bits[r * WORDS] | uint64_t(here.bits[r * WORDS + 1]) << 32;
        if (allowed)
            for (int64_t j = 0; j < here.count; ++j)
                if (!allowed[here.start + j]) seen &= ~(uint64_t(1) << j);
        return seen;
    }

    Number dot(const Number* q, const T* k) const {
        const int64_t d = call_.head_dim;
        Vector sum[4] = {};
        int64_t c = 0;
        for (; c + 4 * WIDTH <= d; c += 4 * WIDTH)
            for (int u = 0; u < 4; ++u) sum[u] += vector(q + c + u * WIDTH) * In::read(k + c + u * WIDTH);
        for (; c + WIDTH <= d; c += WIDTH) sum[0] += vector(q + c) * In::read(k + c);
        const Vector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        Number total = 0;
        for (; c < d; ++c) total += q[c] * Number(widen(k[c]));
        // Halves onto halves: a tree of sums.
        Number parts[WIDTH];
        std::memcpy(parts, &all, sizeof all);
        for (int half = WIDTH / 2; half > 0; half /= 2)
            for (int l = 0; l < half; ++l) parts[l] += parts[l + half];
        return total + parts[0];
    }

    static Vector vector(const Number* at) {
        Vector x;
        std::memcpy(&x, at, sizeof x);
        return x;
    }

    // The visible keys of a stretch, added to one row's sums.
    void add(Number* row, const T* k, const T* v, int64_t count, uint64_t seen) const {
        const int64_t wide = round_up(call_.head_dim, LANES), wide_v = round_up(call_.value_dim, LANES), dv = call_.value_dim;
        Number *sums = row + wide, *weights = sums + wide_v, &total = weights[KEYS], &top = weights[KEYS + 1];
        const Number inf = std::numeric_limits<Number>::infinity(), unit = Number((call_.softcap > 0 ? call_.softcap : 1.0) / LN2);
        Number most = -inf;
        for (int64_t j = 0; j < count; ++j) {
            if (!(seen >> j & 1)) continue;
            Number x = dot(row, k + j * call_.k.token);
            if (call_.softcap > 0) x = std::tanh(x / Number(call_.softcap));
            weights[j] = x * unit;
            most = weights[j] > most ? weights[j] : most;
        }
        if (most > top) {
            const Number shrink = top == -inf ? Number(1) : In::power(top - most);
            for (int64_t c = 0; c < wide_v; ++c) sums[c] *= shrink;
            total *= shrink;
            top = most;
        }
        const Number base = top == -inf ? Number(0) : top;  // every logit -inf, or NaN
        Number added = 0;
        for (int64_t j = 0; j < count; ++j)
            if (seen >> j & 1) added += weights[j] = In::power(weights[j] - base);
        total += added;
        if (top == -inf && added != added) top = base;  // NaN is no empty row
        int64_t c = 0;
        for (; c + 4 * WIDTH <= dv; c += 4 * WIDTH) mix<4>(sums + c, weights, v + c, count, seen);
        for (; c + WIDTH <= dv; c += WIDTH) mix<1>(sums + c, weights, v + c, count, seen);
        for (; c < dv; ++c)
            for (int64_t j = 0; j < count; ++j)
                if (seen >> j & 1) sums[c] += weights[j] * Number(widen(v[j * call_.v.token + c]));
    }

    template <int VECTORS>
    void mix(Number* sums, const Number* weights, const T* v, int64_t count, uint64_t seen) const {
        Vector sum[VECTORS] = {};
        for (int64_t j = 0; j < count; ++j) {
            if (!(seen >> j & 1)) continue;
            for (int u = 0; u < VECTORS; ++u) sum[u] += weights[j] * In::read(v + j * call_.v.token + u * WIDTH);
        }
        for (int u = 0; u < VECTORS; ++u) {
            const Vector all = vector(sums + u * WIDTH) + sum[u];
            std::memcpy(sums + u * WIDTH, &all, sizeof all);
        }
    }

    const Call& call_;
    Number* room_;
};

template <class T, class In>
static inline void softmax_rows(const Call& call) {
    const int64_t heads = call.batch * call.kv_heads, count = call.tile_count * heads;
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(call.threads, count));
    const int64_t each = round_up(RowsTask<T, In>::bytes(call), 64);
    Room room(each * threads);
    parallel_for(threads, count, [&](int64_t index, int64_t worker) {
        RowsTask<T, In> task(call, static_cast<char*>(room.grow(0)) + worker * each);
        const int64_t h = index / call.tile_count;
        task.run(tile_of(call, index % call.tile_count), h / call.kv_heads, h % call.kv_heads);
    });
}

}  // namespace sparseattn

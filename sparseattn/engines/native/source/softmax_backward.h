// Gradients of softmax attention: five products a tile of queries and stretch of keys, of which the
// logits and the slopes of the weights are made anew (FlashAttention-2, algorithm 2).
//
// A task goes through some tiles of one run, for all query heads of one group, and adds what keys and
// values get to sums of its own. A run is one task, or few, by its size alone; tasks of one run are
// added up in order, so the bits are the same whatever the number of threads.
#pragma once

#include "softmax_forward.h"

namespace sparseattn {

// Tiles [first, stop) of `order`, all of one run; they see the run's keys [low, high).
struct Piece {
    int64_t run, first, stop, low, high;
    int64_t sums;  // where its sums begin, in floats, among those of one head
};

constexpr int64_t FEWEST_TASKS = 16;
constexpr int64_t LEAST_STRETCHES = 32;  // of a piece: less is not worth sums of its own

// The tiles of every run in order, cut into pieces of about as much work.
class Pieces {
   public:
    Pieces(const Call& call, bool paired) : order_(size_t(call.tile_count)) {
        for (int64_t t = 0; t < call.tile_count; ++t) order_[size_t(t)] = t;
        std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
            const Tile &x = tile_of(call, a), &y = tile_of(call, b);
            return x.run != y.run ? x.run < y.run : x.block < y.block;
        });
        std::vector<int64_t> work(order_.size()), low(order_.size()), high(order_.size());
        int64_t all = 0;
        for (size_t t = 0; t < order_.size(); ++t) {
            low[t] = std::numeric_limits<int64_t>::max();
            for_stretches(call, tile(call, int64_t(t)), paired, [&](const Stretch& here) {
                ++work[t];
                low[t] = std::min(low[t], here.start);
                high[t] = std::max(high[t], here.start + here.count);
            });
            all += work[t];
        }
        const int64_t tasks = call.batch * call.kv_heads;
        const int64_t wanted = std::max<int64_t>(1, (FEWEST_TASKS + tasks - 1) / tasks);
        const int64_t most = std::max(LEAST_STRETCHES, (all + wanted - 1) / wanted);
        int64_t done = 0;
        for (size_t t = 0; t < order_.size(); ++t) {
            const int64_t run = tile(call, int64_t(t)).run;
            if (list_.empty() || list_.back().run != run || done >= most) {
                list_.push_back(Piece{run, int64_t(t), int64_t(t), low[t], 0, 0});
                done = 0;
            }
            Piece& piece = list_.back();
            piece.stop = int64_t(t) + 1;
            piece.low = std::min(piece.low, low[t]);
            piece.high = std::max(piece.high, high[t]);
            done += work[t];
        }
    }

    const Tile& tile(const Call& call, int64_t at) const { return tile_of(call, order_[size_t(at)]); }
    std::vector<Piece>& list() { return list_; }

   private:
    std::vector<int64_t> order_;
    std::vector<Piece> list_;
};

template <class T, class Mode>
class BackwardTask {
   public:
    typedef typename Mode::Stored Stored;
    typedef typename Mode::Product Product;

    static int64_t bytes(const Call& call) {
        const int64_t d = call.head_dim, dv = call.value_dim, wide = round_up(d, LANES), wide_v = round_up(dv, LANES);
        int64_t floats = (2 * d + dv + 2 * KEYS + wide + wide_v) * ROWS + KEYS * d;
        if (Mode::PAIRED) floats += ((d + 1) / 2 + (dv + 1) / 2 + KEYS / 2 + wide / 2 + wide_v / 2) * ROWS + KEYS * ROWS + KEYS / 2 * d;
        return 4 * floats;
    }

    BackwardTask(const Call& call, const Sources<T, Mode>& sources, void* room)
        : call_(call), from_(sources), units_(call, Mode::PAIRED), wide_(round_up(call.head_dim, LANES)),
          wide_v_(round_up(call.value_dim, LANES)) {
        float* at = static_cast<float*>(room);
        auto take = [&](int64_t count) {
            float* here = at;
            at += count;
            return here;
        };
        logits_ = take(KEYS * ROWS);
        slopes_ = take(KEYS * ROWS);
        q_rows_ = take(wide_ * ROWS);
        g_rows_ = take(wide_v_ * ROWS);
        q_ = take(call.head_dim * ROWS);
        g_ = take(call.value_dim * ROWS);
        dq_ = take(call.head_dim * ROWS);
        clean_ = reinterpret_cast<Stored*>(take(KEYS * call.head_dim));
        if (!Mode::PAIRED) return;
        auto pairs = [&](int64_t count) { return reinterpret_cast<uint32_t*>(take(count)); };
        q_pairs_ = pairs((call.head_dim + 1) / 2 * ROWS);
        g_pairs_ = pairs((call.value_dim + 1) / 2 * ROWS);
        q_row_pairs_ = pairs(wide_ / 2 * ROWS);
        g_row_pairs_ = pairs(wide_v_ / 2 * ROWS);
        halves_ = reinterpret_cast<bf16*>(pairs(KEYS * ROWS));
        s_pairs_ = pairs(KEYS / 2 * ROWS);
        k_pairs_ = pairs(KEYS / 2 * call.head_dim);
    }

    // One tile of one head; `dk` and `dv` are sums [keys][wide] from the run's key `low` on.
    void run(const Tile& tile, int64_t z, int64_t head, int64_t low, float* dk, float* dv) {
        const Run& run = run_of(call_, tile);
        const int64_t b = run.batch + z, kv = head / call_.groups(), first = int64_t(tile.block) * ROWS;
        const int64_t rows = std::min<int64_t>(ROWS, run.queries - first), d = call_.head_dim, dv_width = call_.value_dim;
        const int64_t query = run.query + first;
        load_rows(b, head, query, rows);
        const uint8_t* allowed = nullptr;
        if (call_.key_mask) allowed = reinterpret_cast<const uint8_t*>(call_.key_mask) + b * call_.key_mask_row + run.key;
        const Sight sight{run.low, run.high, first, run.keys, allowed};
        // The logits of a stretch, and the slopes of the weights; whether some pairs may be hidden.
        auto look = [&](const Stretch& here) {
            const int64_t j = run.key + here.start, count = here.count;
            product<Product, false>(
                count, ROWS, Mode::PAIRED ? (d + 1) / 2 : d, from_.across_keys(b, kv, j),
                Mode::PAIRED ? static_cast<void*>(q_pairs_) : q_, ROWS * 4, logits_, ROWS);
            product<Product, false>(
                count, ROWS, Mode::PAIRED ? (dv_width + 1) / 2 : dv_width, from_.across_values(b, kv, j),
                Mode::PAIRED ? static_cast<void*>(g_pairs_) : g_, ROWS * 4, slopes_, ROWS);
            if (units_.before) cap(logits_, count, units_.before);
            const bool partly = here.banded || here.bits || allowed;
            if (partly) hide(logits_, here, sight);
            return partly;
        };
        if (call_.exact) {
            alignas(64) float total[ROWS] = {}, mean[ROWS] = {};
            for_stretches(call_, tile, Mode::PAIRED, [&](const Stretch& here) {
                look(here);
                sum_up(here.count, total, mean);
            });
            settle(total, mean, rows, b, head, query);
        }
        for_stretches(call_, tile, Mode::PAIRED, [&](const Stretch& here) {
            const int64_t j = run.key + here.start, count = here.count;
            const bool partly = look(here);
            weigh(count);
            Factor keys;
            if (partly && !finite_rows(call_.k.template row<T>(b, kv, j), call_.k.token, count, d))
                keys = cleaned(call_.k.template row<T>(b, kv, j), count);
            else
                keys = from_.along_keys(call_, b, kv, j, count, k_pairs_);
            float *dk_here = dk + (here.start - low) * wide_, *dv_here = dv + (here.start - low) * wide_v_;
            if (Mode::PAIRED) {
                const int64_t half = ROWS / 2;
                round_rows(logits_, count);
                product<Product, true>(count, wide_v_, half, {halves_, ROWS * 2, 4}, g_row_pairs_, wide_v_ * 4, dv_here, wide_v_);
                round_rows(slopes_, count);
                product<Product, true>(count, wide_, half, {halves_, ROWS * 2, 4}, q_row_pairs_, wide_ * 4, dk_here, wide_);
                pair_rows(slopes_, count, s_pairs_);
                product<Product, true>(d, ROWS, (count + 1) / 2, keys, s_pairs_, ROWS * 4, dq_, ROWS);
            } else {
                product<Product, true>(count, wide_v_, ROWS, {logits_, ROWS * 4, 4}, g_rows_, wide_v_ * 4, dv_here, wide_v_);
                product<Product, true>(count, wide_, ROWS, {slopes_, ROWS * 4, 4}, q_rows_, wide_ * 4, dk_here, wide_);
                product<Product, true>(d, ROWS, count, keys, slopes_, ROWS * 4, dq_, ROWS);
            }
        });
        alignas(64) float by[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) by[r] = float(call_.scale);
        unpack_columns(dq_, by, call_.dq.template row<T>(b, head, query), call_.dq.token, rows, d);
    }

   private:
    // Queries and gradients of a tile, as rows and as columns; those of a row that sees nothing are 0.
    void load_rows(int64_t b, int64_t head, int64_t query, int64_t rows) {
        const int64_t d = call_.head_dim, dv = call_.value_dim, at = (b * call_.q_heads + head) * call_.n + query;
        const double* lse = reinterpret_cast<const double*>(call_.lse) + at;
        const float* slope = call_.grad_lse ? reinterpret_cast<const float*>(call_.grad_lse) + at : nullptr;
        std::memset(q_rows_, 0, size_t(wide_ * ROWS * 4));
        std::memset(g_rows_, 0, size_t(wide_v_ * ROWS * 4));
        std::memset(dq_, 0, size_t(d * ROWS * 4));
        for (int64_t r = 0; r < ROWS; ++r) {
            base_[r] = INF;  // no weights: a row past the last query may see keys by its place
            rest_[r] = delta_[r] = 0.0f;
            if (r >= rows || lse[r] == -INF) continue;
            base_[r] = float(lse[r] / LN2);
            rest_[r] = float(lse[r] / LN2 - base_[r]);
            const T* q = call_.q.template row<T>(b, head, query + r);
            const T* g = call_.grad.template row<T>(b, head, query + r);
            const T* o = call_.out.template row<T>(b, head, query + r);
            for (int64_t c = 0; c < d; ++c) q_rows_[r * wide_ + c] = widen(q[c]) * units_.turn;
            double delta = 0.0;
            for (int64_t c = 0; c < dv; ++c) {
                g_rows_[r * wide_v_ + c] = widen(g[c]);
                delta += double(widen(g[c])) * widen(o[c]);
            }
            delta_[r] = float(delta - (slope ? slope[r] : 0.0f));
        }
        pack_columns(q_rows_, wide_, ROWS, d, 1.0f, q_);
        pack_columns(g_rows_, wide_v_, ROWS, dv, 1.0f, g_);
        if (!Mode::PAIRED) return;
        pair_rows(q_, d, q_pairs_);
        pair_rows(g_, dv, g_pairs_);
        pair_wide_rows(q_rows_, wide_, q_row_pairs_);
        pair_wide_rows(g_rows_, wide_v_, g_row_pairs_);
    }

    // The weights of each row and their slopes, summed as they come out here.
    void sum_up(int64_t count, float* total, float* mean) const {
        for (int64_t r = 0; r < ROWS; r += LANES) {
            const vf base = load(base_ + r), rest = load(rest_ + r);
            vf weights = splat(0.0f), slopes = splat(0.0f);
            for (int64_t j = 0; j < count; ++j) {
                const vf x = load(logits_ + j * ROWS + r);
                const vi hidden = (x == -INF) | (base == INF);
                const vf p = exp2v<!Mode::PAIRED>(x * units_.unit - base - rest);
                const vf s = p * load(slopes_ + j * ROWS + r);
                weights += hidden ? splat(0.0f) : p;
                slopes += hidden ? splat(0.0f) : s;
            }
            store(total + r, load(total + r) + weights);
            store(mean + r, load(mean + r) + slopes);
        }
    }

    // What these sums say of a row in place of its lse and output, whose own rounding is an error of
    // all its weights alike: where few numbers are added up it would show.
    void settle(const float* total, const float* mean, int64_t rows, int64_t b, int64_t head, int64_t query) {
        const float* slope = reinterpret_cast<const float*>(call_.grad_lse);
        if (slope) slope += (b * call_.q_heads + head) * call_.n + query;
        for (int64_t r = 0; r < rows; ++r) {
            if (base_[r] == INF || !(total[r] > 0.0f)) continue;
            const float sum = call_.exact == WITH_SINKS ? 1.0f : total[r];  // a sink takes the rest of 1
            rest_[r] += float(std::log2(double(sum)));
            delta_[r] = mean[r] / sum - (slope ? slope[r] : 0.0f);
        }
    }

    // Logits become weights, and slopes of weights become slopes of logits before the softcap.
    void weigh(int64_t count) {
        for (int64_t r = 0; r < ROWS; r += LANES) {
            const vf base = load(base_ + r), rest = load(rest_ + r), delta = load(delta_ + r);
            for (int64_t j = 0; j < count; ++j) {
                const vf x = load(logits_ + j * ROWS + r);
                // Whatever hidden keys and values hold, or those that a row past the last query sees.
                const vi hidden = (x == -INF) | (base == INF);
                vf p = exp2v<!Mode::PAIRED>(x * units_.unit - base - rest);
                vf s = p * (load(slopes_ + j * ROWS + r) - delta);
                if (units_.before) s *= 1.0f - x * x;
                p = hidden ? splat(0.0f) : p;
                s = hidden ? splat(0.0f) : s;
                store(logits_ + j * ROWS + r, p);
                store(slopes_ + j * ROWS + r, s);
            }
        }
    }

    void round_rows(const float* x, int64_t count) {
        for (int64_t i = 0; i < count * ROWS; i += LANES) store_narrow(halves_ + i, load(x + i));
    }

    static void pair_wide_rows(const float* x, int64_t width, uint32_t* into) {
        for (int64_t r = 0; r < ROWS; r += 2)
            for (int64_t c = 0; c < width; ++c) {
                bf16 a, b;
                narrow(x[r * width + c], a);
                narrow(x[(r + 1) * width + c], b);
                into[r / 2 * width + c] = a.bits | uint32_t(b.bits) << 16;
            }
    }

    // Keys of which some are hidden and not finite, with zeros for what is not: a slope of 0 must
    // stay 0, and a row that sees such a key has NaN for slope.
    Factor cleaned(const T* k, int64_t count) {
        const int64_t d = call_.head_dim;
        clean_rows(k, call_.k.token, count, d, clean_);
        if (!Mode::PAIRED) return {clean_, 4, d * 4};
        pair_rows(reinterpret_cast<const bf16*>(clean_), d, count, d, k_pairs_);
        return {k_pairs_, 4, d * 4};
    }

    const Call& call_;
    const Sources<T, Mode>& from_;
    Units units_;
    int64_t wide_, wide_v_;
    float *logits_, *slopes_, *q_rows_, *g_rows_, *q_, *g_, *dq_;
    // The logarithm of a row's sum, base 2, in two parts: its rounding would be an error of all weights.
    alignas(64) float base_[ROWS], rest_[ROWS], delta_[ROWS];
    Stored* clean_;
    uint32_t *q_pairs_, *g_pairs_, *q_row_pairs_, *g_row_pairs_, *s_pairs_, *k_pairs_;
    bf16* halves_;
};

// What the pieces of some keys of a run add up to, as gradients.
template <class T>
static inline void write_sums(
    const std::vector<Piece>& pieces, int64_t run, const float* sums, int64_t offset, int64_t low, int64_t high,
    int64_t width, int64_t wide, float by, T* into, int64_t step, float* row) {
    for (int64_t j = low; j < high; ++j) {
        std::memset(row, 0, size_t(wide * 4));
        for (const Piece& piece : pieces) {
            if (piece.run != run || j < piece.low || j >= piece.high) continue;
            const float* from = sums + piece.sums + (piece.high - piece.low) * offset + (j - piece.low) * wide;
            for (int64_t c = 0; c < wide; c += LANES) store(row + c, load(row + c) + load(from + c));
        }
        for (int64_t c = 0; c < width; ++c) narrow(row[c] * by, into[j * step + c]);
    }
}

template <class T, class Mode>
static inline void softmax_backward(const Call& call) {
    Sources<T, Mode> sources(call, true);
    Pieces pieces(call, Mode::PAIRED);
    std::vector<Piece>& list = pieces.list();
    const int64_t wide = round_up(call.head_dim, LANES), wide_v = round_up(call.value_dim, LANES);
    int64_t floats = 0;
    for (Piece& piece : list) {
        if (piece.high == 0) piece.low = 0;  // its queries see nothing
        piece.sums = floats;
        floats += (piece.high - piece.low) * (wide + wide_v);
    }
    const int64_t heads = call.batch * call.kv_heads, each = round_up(BackwardTask<T, Mode>::bytes(call), 64);
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(call.threads, heads * int64_t(list.size())));
    Room room(each * threads), sums(std::max<int64_t>(1, heads * floats * 4));
    const int64_t count = int64_t(list.size());
    parallel_for(threads, heads * count, [&](int64_t index, int64_t worker) {
        const int64_t h = index / count, z = h / call.kv_heads, kv = h % call.kv_heads;
        const Piece& piece = list[size_t(index % count)];
        const int64_t keys = piece.high - piece.low;
        float* dk = sums.floats() + h * floats + piece.sums;
        float* dv = dk + keys * wide;
        std::memset(dk, 0, size_t(keys * (wide + wide_v) * 4));
        BackwardTask<T, Mode> task(call, sources, static_cast<char*>(room.grow(0)) + worker * each);
        for (int64_t t = piece.first; t < piece.stop; ++t)
            for (int64_t g = 0; g < call.groups(); ++g)
                task.run(pieces.tile(call, t), z, kv * call.groups() + g, piece.low, dk, dv);
    });
    // Runs, in as many parts as there are pieces of them.
    const float rest = Units(call, Mode::PAIRED).rest;
    parallel_for(threads, heads * count, [&](int64_t index, int64_t) {
        const int64_t h = index / count, z = h / call.kv_heads, kv = h % call.kv_heads;
        const int64_t run = list[size_t(index % count)].run;
        int64_t low = std::numeric_limits<int64_t>::max(), high = 0, before = 0, parts = 0;
        for (int64_t p = 0; p < count; ++p) {
            if (list[size_t(p)].run != run) continue;
            before += p < index % count;
            ++parts;
            low = std::min(low, list[size_t(p)].low);
            high = std::max(high, list[size_t(p)].high);
        }
        const int64_t span = high - low, start = low + span * before / parts, stop = low + span * (before + 1) / parts;
        const Run& where = reinterpret_cast<const Run*>(call.runs)[run];
        const float* all = sums.floats() + h * floats;
        float row[MOST_WIDTH];
        T* dk = call.dk.template row<T>(where.batch + z, kv, where.key);
        T* dv = call.dv.template row<T>(where.batch + z, kv, where.key);
        write_sums(list, run, all, 0, start, stop, call.head_dim, wide, rest, dk, call.dk.token, row);
        write_sums(list, run, all, wide, start, stop, call.value_dim, wide_v, 1.0f, dv, call.dv.token, row);
    });
}

}  // namespace sparseattn

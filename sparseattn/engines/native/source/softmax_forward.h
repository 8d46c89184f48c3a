// Softmax attention forward: a task is one tile of queries of one head; it writes its own rows only.
#pragma once

#include "softmax_tile.h"

namespace sparseattn {

// Keys and values as a tile's products read them: as they lie, or in a copy made once a call.
template <class T, class Mode>
class Sources {
   public:
    typedef typename Mode::Stored Stored;

    // backward: values are read along their width too, and keys along their rows.
    Sources(const Call& call, bool backward) : k_(call.k), v_(call.v) {
        const int64_t heads = call.rows * call.kv_heads;
        copied(call, k_, call.head_dim, k_room_);
        if (backward || !Mode::PAIRED) copied(call, v_, call.value_dim, v_room_);
        if (!Mode::PAIRED) return;
        const int64_t pairs = (call.m + 1) / 2;
        auto paired = [&](const Rows& x, int64_t width, Room& room) {
            uint32_t* into = static_cast<uint32_t*>(room.grow(heads * pairs * width * 4));
            parallel_for(call.threads, heads, [&](int64_t h, int64_t) {
                const bf16* from = x.template row<bf16>(h / call.kv_heads, h % call.kv_heads, 0);
                pair_rows(from, x.token, call.m, width, into + h * pairs * width);
            });
        };
        paired(call.v, call.value_dim, v_pairs_);
        if (backward) paired(call.k, call.head_dim, k_pairs_);
    }

    const Stored* key(int64_t b, int64_t h, int64_t j) const { return k_.template row<Stored>(b, h, j); }
    const Stored* value(int64_t b, int64_t h, int64_t j) const { return v_.template row<Stored>(b, h, j); }
    int64_t key_step() const { return k_.token; }
    int64_t value_step() const { return v_.token; }

    // K [j][d] with d along the product's steps: for logits.
    Factor across_keys(int64_t b, int64_t h, int64_t j) const {
        return {key(b, h, j), k_.token * int64_t(sizeof(Stored)), 4};
    }
    Factor across_values(int64_t b, int64_t h, int64_t j) const {
        return {value(b, h, j), v_.token * int64_t(sizeof(Stored)), 4};
    }
    // V [j][d] with j along the steps: for sums over keys.
    // `room` [KEYS / 2, width] takes the pairs of stretches that start at an odd place.
    Factor along_values(const Call& call, int64_t b, int64_t h, int64_t j, int64_t count, uint32_t* room) const {
        return along(call, call.v, v_, v_pairs_, call.value_dim, b, h, j, count, room);
    }
    Factor along_keys(const Call& call, int64_t b, int64_t h, int64_t j, int64_t count, uint32_t* room) const {
        return along(call, call.k, k_, k_pairs_, call.head_dim, b, h, j, count, room);
    }

   private:
    // In float32 where products are, or with a width that pairs divide.
    void copied(const Call& call, Rows& x, int64_t width, Room& room) {
        const bool odd = Mode::PAIRED && width % 2;
        if (sizeof(T) == sizeof(Stored) && !odd) return;
        const int64_t wide = odd ? width + 1 : width, heads = call.rows * call.kv_heads;
        Stored* into = static_cast<Stored*>(room.grow(heads * call.m * wide * int64_t(sizeof(Stored))));
        const Rows from = x;
        parallel_for(call.threads, heads, [&](int64_t h, int64_t) {
            for (int64_t j = 0; j < call.m; ++j) {
                const T* row = from.template row<T>(h / call.kv_heads, h % call.kv_heads, j);
                Stored* to = into + (h * call.m + j) * wide;
                for (int64_t d = 0; d < width; ++d) narrow(widen(row[d]), to[d]);
                if (odd) narrow(0.0f, to[width]);
            }
        });
        x = Rows{reinterpret_cast<int64_t>(into), call.kv_heads * call.m * wide, call.m * wide, wide};
    }

    Factor along(
        const Call& call, const Rows& given, const Rows& x, const Room& made, int64_t width, int64_t b, int64_t h,
        int64_t j, int64_t count, uint32_t* room) const {
        if (!Mode::PAIRED) return {x.template row<Stored>(b, h, j), 4, x.token * 4};
        if (j % 2) {
            pair_rows(given.template row<bf16>(b, h, j), given.token, count, width, room);
            return {room, 4, width * 4};
        }
        const int64_t pairs = (call.m + 1) / 2;
        return {made.floats() + ((b * call.kv_heads + h) * pairs + j / 2) * width, 4, width * 4};
    }

    Rows k_, v_;
    Room k_room_, v_room_, k_pairs_, v_pairs_;
};

// How the scale enters. Queries take it where they are float32: rounded query by query it errs less
// than as one rounded number. Where they stay bfloat16 they take its sign alone, so that what
// multiplies their logits is positive.
struct Units {
    float turn;    // times queries
    float unit;    // times logits, or their tanh: base 2
    float rest;    // of the scale, in the gradients of keys
    float before;  // times logits, before the tanh of a softcap; 0 without one
    Units(const Call& call, bool rounded) {
        const double size = call.scale < 0 ? -call.scale : call.scale == 0 ? 1.0 : call.scale;
        const double left = rounded ? size : 1.0;
        rest = float(left);
        turn = float(rounded ? (call.scale > 0) - (call.scale < 0) : call.scale);
        before = call.softcap > 0 ? float(left / call.softcap) : 0.0f;
        unit = float((call.softcap > 0 ? call.softcap : left) / LN2);
    }
};

template <class T, class Mode>
class ForwardTask {
   public:
    typedef typename Mode::Stored Stored;
    typedef typename Mode::Product Product;

    static int64_t bytes(const Call& call) {
        const int64_t pairs = Mode::PAIRED ? ((call.head_dim + 1) / 2 + KEYS / 2) * ROWS + KEYS / 2 * call.value_dim : 0;
        return 4 * ((call.head_dim + call.value_dim + KEYS) * ROWS + KEYS * call.value_dim + pairs) + KEYS * ROWS;
    }

    ForwardTask(const Call& call, const Sources<T, Mode>& sources, void* room) : call_(call), from_(sources), units_(call, Mode::PAIRED) {
        q_ = static_cast<float*>(room);
        mixed_ = q_ + call.head_dim * ROWS;
        logits_ = mixed_ + call.value_dim * ROWS;
        clean_ = reinterpret_cast<Stored*>(logits_ + KEYS * ROWS);
        hidden_ = reinterpret_cast<uint8_t*>(logits_ + KEYS * (ROWS + call.value_dim));
        q_pairs_ = reinterpret_cast<uint32_t*>(hidden_ + KEYS * ROWS);
        p_pairs_ = q_pairs_ + (call.head_dim + 1) / 2 * ROWS;
        v_pairs_ = p_pairs_ + KEYS / 2 * ROWS;
    }

    void run(const Tile& tile, int64_t z, int64_t head) {
        const Run& run = run_of(call_, tile);
        const int64_t b = run.batch + z, kv = head / call_.groups(), first = int64_t(tile.block) * ROWS;
        const int64_t rows = std::min<int64_t>(ROWS, run.queries - first);
        const int64_t query = run.query + first;
        pack_columns(call_.q.template row<T>(b, head, query), call_.q.token, rows, call_.head_dim, units_.turn, q_);
        if (Mode::PAIRED) pair_rows(q_, call_.head_dim, q_pairs_);
        std::memset(mixed_, 0, size_t(call_.value_dim * ROWS * 4));
        Running state;
        const uint8_t* allowed = nullptr;
        if (call_.key_mask) allowed = reinterpret_cast<const uint8_t*>(call_.key_mask) + b * call_.key_mask_row + run.key;
        const Sight sight{run.low, run.high, first, run.keys, allowed};
        for_stretches(call_, tile, Mode::PAIRED, [&](const Stretch& here) {
            const int64_t j = run.key + here.start;
            product<Product, false>(
                here.count, ROWS, Mode::PAIRED ? (call_.head_dim + 1) / 2 : call_.head_dim,
                from_.across_keys(b, kv, j), Mode::PAIRED ? static_cast<void*>(q_pairs_) : q_, ROWS * 4, logits_, ROWS);
            if (units_.before) cap(logits_, here.count, units_.before);
            const bool partly = here.banded || here.bits || allowed;
            bool careful = false;
            if (partly) {
                hide(logits_, here, sight);
                careful = !finite_rows(call_.v.template row<T>(b, kv, j), call_.v.token, here.count, call_.value_dim);
                if (careful)
                    for (int64_t i = 0; i < here.count * ROWS; ++i) hidden_[i] = logits_[i] == -INF;
            }
            powers<!Mode::PAIRED>(logits_, here.count, units_.unit, state, mixed_, call_.value_dim);
            Factor values;
            if (careful)
                values = cleaned(call_.v.template row<T>(b, kv, j), here.count);
            else
                values = from_.along_values(call_, b, kv, j, here.count, v_pairs_);
            if (Mode::PAIRED) pair_rows(logits_, here.count, p_pairs_);
            product<Product, true>(
                call_.value_dim, ROWS, Mode::PAIRED ? (here.count + 1) / 2 : here.count,
                values, Mode::PAIRED ? static_cast<void*>(p_pairs_) : logits_, ROWS * 4,
                mixed_, ROWS);
        });
        alignas(64) float by[ROWS];
        double* lse = reinterpret_cast<double*>(call_.lse) + (b * call_.q_heads + head) * call_.n + query;
        for (int64_t r = 0; r < ROWS; ++r) {
            by[r] = state.top[r] == -INF ? 0.0f : 1.0f / state.sum[r];
            if (r < rows)
                lse[r] = state.top[r] == -INF ? -INF : (double(state.top[r]) + std::log2(double(state.sum[r]))) * LN2;
        }
        unpack_columns(mixed_, by, call_.out.template row<T>(b, head, query), call_.out.token, rows, call_.value_dim);
    }

   private:
    // Values of which some are not finite, and which some rows must not see: zeros stand for those in
    // the product, whose bits are so those of any other hidden value, and rows that see them get them
    // here.
    Factor cleaned(const T* v, int64_t count) {
        const int64_t width = call_.value_dim;
        for (int64_t j = 0; j < count; ++j)
            for (int64_t d = 0; d < width; ++d) {
                const float x = widen(v[j * call_.v.token + d]);
                if (x - x == 0.0f) continue;
                for (int64_t r = 0; r < ROWS; ++r)
                    if (!hidden_[j * ROWS + r]) mixed_[d * ROWS + r] += logits_[j * ROWS + r] * x;
            }
        clean_rows(v, call_.v.token, count, width, clean_);
        if (!Mode::PAIRED) return {clean_, 4, width * 4};
        pair_rows(reinterpret_cast<const bf16*>(clean_), width, count, width, v_pairs_);
        return {v_pairs_, 4, width * 4};
    }

    const Call& call_;
    const Sources<T, Mode>& from_;
    Units units_;
    float *q_, *mixed_, *logits_;
    Stored* clean_;
    uint8_t* hidden_;
    uint32_t *q_pairs_, *p_pairs_, *v_pairs_;
};

// One task for each tile and head, each with a room of its worker's own.
template <class Task, class Source>
static inline void each_task(const Call& call, const Source& sources) {
    const int64_t heads = call.batch * call.q_heads, count = call.tile_count * heads;
    const int64_t threads = std::min<int64_t>(call.threads, std::max<int64_t>(1, count));
    const int64_t each = round_up(Task::bytes(call), 64);
    Room room(each * threads);
    parallel_for(threads, count, [&](int64_t index, int64_t worker) {
        Task task(call, sources, static_cast<char*>(room.grow(0)) + worker * each);
        const int64_t h = index / call.tile_count;
        task.run(tile_of(call, index % call.tile_count), h / call.q_heads, h % call.q_heads);
    });
}

template <class T, class Mode>
static inline void softmax_forward(const Call& call) {
    Sources<T, Mode> sources(call, false);
    each_task<ForwardTask<T, Mode>>(call, sources);
}

}  // namespace sparseattn

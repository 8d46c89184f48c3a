// Gradients of linear attention. Forwards along the positions a state of the keys gives those of the
// queries; backwards one of the queries gives those of the keys and values. Features are made anew.
#pragma once

#include "linear_forward.h"

namespace sparseattn {

template <class Real>
class LinearQueries {
   public:
    typedef Lane<Real> V;
    static constexpr int W = WIDTH<Real>;

    LinearQueries(const LinearCall& call, const Turns<Real>& turns, int64_t state)
        : on(call, turns, state), chunk(on.chunk), state_(state * int64_t(sizeof(Real))) {
        Real* at = static_cast<Real*>(room_.grow(CHUNK * (chunk.ff + CHUNK + chunk.d) * int64_t(sizeof(Real))));
        dphi_ = at;
        slopes_ = dphi_ + CHUNK * chunk.ff;
        dx_ = slopes_ + CHUNK * CHUNK;
    }

    void serve_causal(const Unit& unit, int64_t start, const Real* met, Real* own, bool last) {
        on.span(unit, start, own, last, [&](const Places& at, int64_t since) {
            if (!at.queries.count) return;
            const Real* state = chunk.meet(met, own, since, on.shape(chunk.call).size(), static_cast<Real*>(state_.grow(0)));
            on.for_heads(unit, [&](int64_t h) {
                write(unit, h, at.start - unit.run->offset + at.queries.first, at.queries, at.start, at.keys, state);
            });
        });
    }

    void serve_all(const Unit& unit, int64_t start, const Real* met) {
        const LinearRun& run = *unit.run;
        const int64_t few = on.load_few(unit);
        for (int64_t at = start; at < std::min(run.queries, start + SPANNED); at += CHUNK) {
            const Part part{0, std::min<int64_t>(CHUNK, run.queries - at)};
            on.for_heads(unit, [&](int64_t h) { write(unit, h, at, part, run.offset + at, few, few ? nullptr : met); });
        }
    }

    LinearForward<Real> on;

   private:
    // Row sums L, and the mean of g . v over a row's weights, into chunk.sums and chunk.more. As sums over
    // the pairs: where a query sees one key, they cancel to the last bit.
    void row_sums(int64_t keys, const Real* state) {
        const int64_t count = state ? chunk.ff : 0;
        for (int64_t i = 0; i < CHUNK; i += W)
            put(chunk.more + i, chunk.summed(count, [&](int64_t g) { return V(pick(chunk.q_phi + g * CHUNK + i) * pick(dphi_ + g * CHUNK + i)); }));
        chunk.fade(chunk.more, 1, false);
        on.add_state(state);
        if (keys) {
            chunk.weigh(chunk.k_phi, Part{0, keys}, chunk.q_phi, chunk.ff, on.order(), chunk.pairs);
            on.add_pairs(keys);
        }
        for (int64_t i = 0; i < CHUNK; i += W) {
            V sum = pick(chunk.sums + i);
            sum = sum == Real(0) ? V(V{} + Real(INF)) : sum;
            V mean = pick(chunk.more + i) / sum;
            for (int64_t j = 0; j < keys; ++j)
                mean += (pick(chunk.pairs + j * CHUNK + i) / sum) * pick(slopes_ + j * CHUNK + i);
            put(chunk.sums + i, sum);
            put(chunk.more + i, mean);
        }
    }

    void write(const Unit& unit, int64_t h, int64_t row, Part part, int64_t position, int64_t keys, const Real* state) {
        const LinearRun& run = *unit.run;
        const LinearCall& call = chunk.call;
        const int64_t ff = chunk.ff;
        chunk.load_queries(run, unit.batch, h, row, part, position);
        chunk.columns_in(call.grad, unit.batch, h, run.query + row, chunk.dv, part, Real(1), chunk.columns);
        if (state)
            multiply_apart<32>(ff, CHUNK, chunk.dv, Left<Real>{state, chunk.e, 1}, chunk.columns, CHUNK, dphi_, CHUNK);
        else
            std::fill(dphi_, dphi_ + ff * CHUNK, Real(0));
        if (keys) chunk.weigh_rows(chunk.v, chunk.v_row, Part{0, keys}, chunk.columns, chunk.dv, slopes_);
        if (call.normalize) {
            row_sums(keys, state);
            const Real* total = state ? state + ff * chunk.e : nullptr;
            for (int64_t i = 0; i < CHUNK; i += W) {
                const V sum = pick(chunk.sums + i), mean = pick(chunk.more + i);
                for (int64_t g = 0; state && g < ff; ++g) {
                    Real* at = dphi_ + g * CHUNK + i;
                    put(at, V((pick(at) - mean * total[g]) / sum));
                }
                for (int64_t j = 0; j < keys; ++j) {
                    Real* at = slopes_ + j * CHUNK + i;
                    put(at, V((pick(at) - mean) / sum));
                }
            }
            for (int64_t i = 0; i < part.count; ++i) {
                *call.length_row(unit.batch, h, run.query + row + i) = double(chunk.sums[part.first + i]);
                *call.mean_row(unit.batch, h, run.query + row + i) = double(chunk.more[part.first + i]);
            }
        }
        chunk.fade(dphi_, ff, false);
        if (keys) {
            chunk.mask(slopes_, Part{0, keys}, on.order());
            multiply<true>(ff, CHUNK, keys, Left<Real>{chunk.k_phi, CHUNK, 1}, slopes_, CHUNK, dphi_, CHUNK);
        }
        pull_back(call, chunk.query, chunk.turns, position, chunk.q_x, chunk.q_base, dphi_, dx_);
        chunk.columns_out(dx_, call.dq, unit.batch, h, run.query + row, chunk.d, part);
    }

    Chunk<Real>& chunk;
    Room room_, state_;
    Real *dphi_, *slopes_, *dx_;  // columns; slopes_: [CHUNK keys][CHUNK queries]
};

template <class Real>
class LinearKeys {
   public:
    static constexpr int W = WIDTH<Real>;

    static Shape shape(const LinearCall& call) {
        return Shape{call.all_features(), round_up(call.value_dim, LANES), call.decay ? call.groups() : 1};
    }

    LinearKeys(const LinearCall& call, const Turns<Real>& turns, int64_t state)
        : chunk(call, turns), shape_(shape(call)), state_(state * int64_t(sizeof(Real))) {
        const int64_t floats = CHUNK * (2 * chunk.ff + CHUNK + chunk.d + 3 * chunk.e);
        Real* at = static_cast<Real*>(room_.grow(floats * int64_t(sizeof(Real))));
        auto take = [&](int64_t count) {
            Real* here = at;
            at += count * CHUNK;
            return here;
        };
        dphi_ = take(chunk.ff);
        part_dphi_ = take(chunk.ff);
        slopes_ = take(CHUNK);
        dx_ = take(chunk.d);
        dv_ = take(chunk.e);
        part_dv_ = take(chunk.e);
        divided_ = take(chunk.e);
    }

    // Backwards over the chunks of a causal span; `own` is the sum of its queries.
    void serve_causal(const Unit& unit, int64_t start, const Real* met, Real* own, bool last) {
        span(unit, start, met, own, last, true);
    }

    void sum_causal(const Unit& unit, int64_t start, Real* own) { span(unit, start, nullptr, own, false, false); }

    void sum_all(const Unit& unit, int64_t start, Real* own) {
        if (unit.run->keys <= CHUNK) return;  // as `load_few` has it
        for_queries(unit, start, std::min(unit.run->queries, start + SPANNED), [&](Part part) {
            chunk.add(chunk.q_phi, divided_, chunk.e, chunk.more, part.count, true, own);
        });
    }

    void serve_all(const Unit& unit, int64_t start, const Real* met) {
        const LinearRun& run = *unit.run;
        for (int64_t at = start; at < std::min(run.keys, start + SPANNED); at += CHUNK) {
            const int64_t keys = std::min<int64_t>(CHUNK, run.keys - at);
            begin(unit, at, keys);
            if (run.keys <= CHUNK)
                for_queries(unit, 0, run.queries, [&](Part part) { within(part, keys, Chunk<Real>::whole); });
            else
                through_state(met, keys);
            write(unit, at, keys);
        }
    }

   private:
    // Calls f(part) with the rows [start, stop) of all query heads, chunk after chunk.
    template <class F>
    void for_queries(const Unit& unit, int64_t start, int64_t stop, const F& f) {
        for (int64_t at = start; at < stop; at += CHUNK)
            for (int64_t g = 0; g < chunk.call.groups(); ++g) {
                const Part part{0, std::min<int64_t>(CHUNK, stop - at)};
                load_queries(unit, g, at, part, unit.run->offset + at);
                f(part);
            }
    }

    void span(const Unit& unit, int64_t start, const Real* met, Real* own, bool last, bool serving) {
        const LinearRun& run = *unit.run;
        for (int64_t since = SPANNED - CHUNK; since >= 0; since -= CHUNK) {
            const Places at = places_of(run, start + since);
            const bool keys = serving && at.keys;
            if (keys) begin(unit, at.start, at.keys);
            for (int64_t g = 0; g < chunk.call.groups(); ++g) {
                const int64_t part = chunk.decays() ? g : 0, size = shape_.part();
                chunk.decay_of(unit.head * chunk.call.groups() + g);
                if (keys && (g == 0 || chunk.decays())) {
                    const Real* state = chunk.meet(
                        met ? met + part * size : nullptr, own + part * size, SPANNED - CHUNK - since, size,
                        static_cast<Real*>(state_.grow(0)));
                    if (state) through_state(state, at.keys);
                }
                const bool adds = !(last && since == 0);
                if (at.queries.count && (keys || adds)) {
                    load_queries(unit, g, at.start - run.offset + at.queries.first, at.queries, at.start);
                    if (keys) within(at.queries, at.keys, Chunk<Real>::early);
                    if (adds) {
                        const int64_t first = at.queries.first;
                        // Places before the first query have features of 0.
                        std::fill(divided_, divided_ + first * chunk.e, Real(0));
                        chunk.add(chunk.q_phi, divided_, chunk.e, chunk.more, at.queries.stop(), true, own + part * size);
                    }
                } else if (adds && chunk.decays()) {
                    for (int64_t i = 0; i < size; ++i) own[part * size + i] *= chunk.power(CHUNK);
                }
            }
            if (keys) write(unit, at.start, at.keys);
        }
    }

    // Features of the queries of group g, their gradients (chunk.rows), and divided ones; chunk.sums and
    // chunk.more hold 1 / L and - mean / L.
    void load_queries(const Unit& unit, int64_t g, int64_t row, Part part, int64_t position) {
        const LinearRun& run = *unit.run;
        const LinearCall& call = chunk.call;
        const int64_t h = unit.head * call.groups() + g, e = chunk.e;
        chunk.load_queries(run, unit.batch, h, row, part, position);
        chunk.rows_in(call.grad, unit.batch, h, run.query + row, part, chunk.rows);
        std::fill(chunk.more, chunk.more + CHUNK, Real(0));
        for (int64_t i = part.first; i < part.stop(); ++i) {
            Real sum = 1;
            if (call.normalize) {
                sum = Real(*call.length_row(unit.batch, h, run.query + row + i - part.first));
                mean_[i] = Real(*call.mean_row(unit.batch, h, run.query + row + i - part.first));
                chunk.more[i] = -mean_[i] / sum;
            }
            chunk.sums[i] = sum;
            for (int64_t c = 0; c < e; ++c) divided_[i * e + c] = chunk.rows[i * e + c] / sum;
        }
    }

    void begin(const Unit& unit, int64_t start, int64_t keys) {
        const LinearRun& run = *unit.run;
        const LinearCall& call = chunk.call;
        chunk.load_keys(run, unit.batch, unit.head, start, keys, start);
        chunk.columns_in(call.v, unit.batch, unit.head, run.key + start, chunk.dv, Part{0, keys}, Real(1), chunk.columns);
        for (int64_t i = 0; chunk.holes && i < keys; ++i)
            if (!chunk.holes[i])
                for (int64_t c = 0; c < chunk.dv; ++c) chunk.columns[c * CHUNK + i] = 0;
        std::fill(dphi_, dphi_ + CHUNK * chunk.ff, Real(0));
        std::fill(dv_, dv_ + CHUNK * chunk.e, Real(0));
    }

    void through_state(const Real* state, int64_t keys) {
        const int64_t ff = chunk.ff, e = chunk.e;
        multiply<false>(ff, CHUNK, chunk.dv, Left<Real>{state, e, 1}, chunk.columns, CHUNK, part_dphi_, CHUNK);
        multiply_apart<64>(keys, e, ff, Left<Real>{chunk.k_phi, 1, CHUNK}, state, e, part_dv_, e);
        if (chunk.call.normalize)
            for (int64_t g = 0; g < ff; ++g)
                for (int64_t i = 0; i < CHUNK; ++i) part_dphi_[g * CHUNK + i] += state[ff * e + g];
        chunk.fade(part_dphi_, ff, true);
        for (int64_t i = 0; i < ff * CHUNK; ++i) dphi_[i] += part_dphi_[i];
        for (int64_t i = 0; i < keys; ++i) {
            const Real by = chunk.decays() ? chunk.power(CHUNK - i) : Real(1);
            for (int64_t c = 0; c < e; ++c) dv_[i * e + c] += part_dv_[i * e + c] * by;
        }
    }

    // Pairs of the chunk's keys with the queries at hand.
    void within(Part part, int64_t keys, typename Chunk<Real>::Order order) {
        const int64_t ff = chunk.ff, e = chunk.e, first = part.first, count = part.count;
        chunk.weigh(chunk.q_phi, part, chunk.k_phi, ff, order, chunk.pairs);
        multiply<true>(keys, e, count, Left<Real>{chunk.pairs + first * CHUNK, 1, CHUNK}, divided_ + first * e, e, dv_, e);
        chunk.weigh_rows(chunk.rows, e, part, chunk.columns, chunk.dv, slopes_);
        if (chunk.call.normalize)
            for (int64_t i = first; i < part.stop(); ++i)
                for (int64_t j = 0; j < CHUNK; ++j) slopes_[i * CHUNK + j] = (slopes_[i * CHUNK + j] - mean_[i]) / chunk.sums[i];
        chunk.mask(slopes_, part, order);
        multiply<true>(ff, CHUNK, count, Left<Real>{chunk.q_phi + first, CHUNK, 1}, slopes_ + first * CHUNK, CHUNK, dphi_, CHUNK);
    }

    void write(const Unit& unit, int64_t start, int64_t keys) {
        const LinearRun& run = *unit.run;
        const LinearCall& call = chunk.call;
        pull_back(call, chunk.key, chunk.turns, start, chunk.k_x, chunk.k_base, dphi_, dx_);
        for (int64_t i = 0; chunk.holes && i < keys; ++i) {
            if (chunk.holes[i]) continue;
            for (int64_t c = 0; c < chunk.d; ++c) dx_[c * CHUNK + i] = 0;
            std::fill(dv_ + i * chunk.e, dv_ + (i + 1) * chunk.e, Real(0));
        }
        chunk.columns_out(dx_, call.dk, unit.batch, unit.head, run.key + start, chunk.d, Part{0, keys});
        in_own_numbers<Real>(call, call.dv, unit.batch, unit.head, run.key + start, [&](auto* to) {
            for (int64_t i = 0; i < keys; ++i)
                for (int64_t c = 0; c < chunk.dv; ++c) narrow_to(dv_[i * chunk.e + c], to[i * call.dv.token + c]);
        });
    }

    Chunk<Real> chunk;
    Shape shape_;
    Room room_, state_;
    Real mean_[CHUNK];
    Real *dphi_, *part_dphi_, *slopes_, *dx_;  // columns of keys; slopes_: [CHUNK queries][CHUNK keys]
    Real *dv_, *part_dv_, *divided_;           // rows [CHUNK][e]
};

template <class Real>
static inline void linear_backward(const LinearCall& call) {
    const Turns<Real> turns(call, most_positions(call));
    const int64_t threads = std::max<int64_t>(1, call.threads);
    {
        typedef LinearQueries<Real> Worker;
        const Shape shape = LinearForward<Real>::shape(call);
        auto make = [&] { return std::make_unique<Worker>(call, turns, shape.size()); };
        Workers<Worker, decltype(make)> workers(threads, make);
        const std::vector<Unit> units = units_of(call, call.decay ? call.q_heads : call.kv_heads);
        if (call.causal)
            sweep<Real>(
                threads, units, shape, false, decay_of_heads(call, 1),
                [&](const Unit& u, int64_t start, Real* own, int64_t w) { workers[w].on.sum_causal(u, start, own); },
                [&](const Unit& u, int64_t start, const Real* met, Real* own, bool last, int64_t w) {
                    workers[w].serve_causal(u, start, met, own, last);
                });
        else
            gather<Real>(
                threads, units, shape, [](const Unit& u) { return u.run->keys; },
                [](const Unit& u) { return u.run->queries; },
                [&](const Unit& u, int64_t start, Real* own, int64_t w) { workers[w].on.sum_all(u, start, own); },
                [&](const Unit& u, int64_t start, const Real* met, const double*, int64_t w) { workers[w].serve_all(u, start, met); });
    }
    typedef LinearKeys<Real> Worker;
    const Shape shape = Worker::shape(call);
    auto make = [&] { return std::make_unique<Worker>(call, turns, shape.size()); };
    Workers<Worker, decltype(make)> workers(threads, make);
    const std::vector<Unit> units = units_of(call, call.kv_heads);
    if (call.causal)
        sweep<Real>(
            threads, units, shape, true, decay_of_heads(call, call.groups()),
            [&](const Unit& u, int64_t start, Real* own, int64_t w) { workers[w].sum_causal(u, start, own); },
            [&](const Unit& u, int64_t start, const Real* met, Real* own, bool last, int64_t w) {
                workers[w].serve_causal(u, start, met, own, last);
            });
    else
        gather<Real>(
            threads, units, shape, [](const Unit& u) { return u.run->queries; },
            [](const Unit& u) { return u.run->keys; },
            [&](const Unit& u, int64_t start, Real* own, int64_t w) { workers[w].sum_all(u, start, own); },
            [&](const Unit& u, int64_t start, const Real* met, const double*, int64_t w) { workers[w].serve_all(u, start, met); });
}

}  // namespace sparseattn

// Linear attention, forward: a chunk's pairs weighed one by one, all that is before it through a state.
#pragma once

#include <memory>

#include "linear_chunk.h"

namespace sparseattn {

template <class Real>
class LinearForward {
   public:
    typedef Lane<Real> V;
    static constexpr int W = WIDTH<Real>;

    LinearForward(const LinearCall& call, const Turns<Real>& turns, int64_t state)
        : chunk(call, turns), state_(state * int64_t(sizeof(Real))) {}

    static Shape shape(const LinearCall& call) {
        return Shape{call.all_features(), round_up(call.value_dim, LANES), 1};
    }

    int64_t key_head(const Unit& unit) const { return chunk.decays() ? unit.head / chunk.call.groups() : unit.head; }

    // A causal span: adds its keys to `own`, and where `serving` writes what its queries see.
    template <class Serve>
    void span(const Unit& unit, int64_t start, Real* own, bool last, const Serve& serve) {
        const LinearRun& run = *unit.run;
        chunk.decay_of(unit.head);
        for (int64_t since = 0; since < SPANNED; since += CHUNK) {
            const Places at = places_of(run, start + since);
            if (at.keys) {
                chunk.load_keys(run, unit.batch, key_head(unit), at.start, at.keys, at.start);
                chunk.load_values(run, unit.batch, key_head(unit), at.start, at.keys);
            }
            serve(at, since);
            if (last && start + since + CHUNK >= std::max(run.keys, run.offset + run.queries)) return;
            if (at.keys)
                chunk.add(chunk.k_phi, chunk.v, chunk.v_row, nullptr, at.keys, false, own);
            else if (chunk.decays())
                for (int64_t i = 0; i < shape(chunk.call).size(); ++i) own[i] *= chunk.power(CHUNK);
        }
    }

    void sum_causal(const Unit& unit, int64_t start, Real* own) {
        span(unit, start, own, false, [](const Places&, int64_t) {});
    }

    void serve_causal(const Unit& unit, int64_t start, const Real* met, Real* own, bool last) {
        span(unit, start, own, last, [&](const Places& at, int64_t since) {
            if (!at.queries.count) return;
            const Real* state = chunk.meet(met, own, since, shape(chunk.call).size(), static_cast<Real*>(state_.grow(0)));
            for_heads(unit, [&](int64_t h) {
                write(unit, h, at.start - unit.run->offset + at.queries.first, at.queries, at.start, at.keys, state);
            });
        });
    }

    void sum_all(const Unit& unit, int64_t start, Real* own) {
        const LinearRun& run = *unit.run;
        for (int64_t at = start; at < std::min(run.keys, start + SPANNED); at += CHUNK) {
            const int64_t keys = std::min<int64_t>(CHUNK, run.keys - at);
            chunk.load_keys(run, unit.batch, unit.head, at, keys, at);
            chunk.load_values(run, unit.batch, unit.head, at, keys);
            chunk.add(chunk.k_phi, chunk.v, chunk.v_row, nullptr, keys, false, own);
        }
    }

    void serve_all(const Unit& unit, int64_t start, const Real* met, const double* total) {
        const LinearRun& run = *unit.run;
        const int64_t few = load_few(unit);
        for (int64_t at = start; at < std::min(run.queries, start + SPANNED); at += CHUNK) {
            const Part part{0, std::min<int64_t>(CHUNK, run.queries - at)};
            for_heads(unit, [&](int64_t h) {
                if (std::is_same_v<Real, float> && !chunk.call.half && !few)
                    write_wide(unit, h, at, part, run.offset + at, total);
                else
                    write(unit, h, at, part, run.offset + at, few, few ? nullptr : met);
            });
        }
    }

    // The keys of a run that is not causal, where one chunk has them all; else 0. Weighed one by one,
    // they cancel in the gradients to the last bit where there is one.
    int64_t load_few(const Unit& unit) {
        const LinearRun& run = *unit.run;
        if (run.keys > CHUNK) return 0;
        chunk.load_keys(run, unit.batch, unit.head, 0, run.keys, 0);
        chunk.load_values(run, unit.batch, unit.head, 0, run.keys);
        return run.keys;
    }

    // The query heads of a unit.
    template <class F>
    void for_heads(const Unit& unit, const F& f) {
        if (chunk.decays()) return f(unit.head);
        const int64_t groups = chunk.call.groups();
        for (int64_t h = unit.head * groups; h < (unit.head + 1) * groups; ++h) f(h);
    }

    // Sums of the weights of the queries at hand, into chunk.sums, of the pairs in chunk.pairs.
    void add_pairs(int64_t keys) {
        for (int64_t i = 0; i < CHUNK; i += W)
            put(chunk.sums + i, V(pick(chunk.sums + i) + chunk.summed(keys, [&](int64_t j) { return pick(chunk.pairs + j * CHUNK + i); })));
    }

    void add_state(const Real* state) {
        const int64_t count = state ? chunk.ff : 0;
        const Real* totals = state + chunk.ff * chunk.e;
        for (int64_t i = 0; i < CHUNK; i += W)
            put(chunk.sums + i, chunk.summed(count, [&](int64_t g) { return V(pick(chunk.q_phi + g * CHUNK + i) * totals[g]); }));
        chunk.fade(chunk.sums, 1, false);
    }

    typename Chunk<Real>::Order order() const { return chunk.call.causal ? Chunk<Real>::late : Chunk<Real>::whole; }

    Chunk<Real> chunk;

   private:
    void write(const Unit& unit, int64_t h, int64_t row, Part part, int64_t position, int64_t keys, const Real* state) {
        const LinearRun& run = *unit.run;
        const LinearCall& call = chunk.call;
        const int64_t e = chunk.e, ff = chunk.ff;
        Real* out = chunk.rows;
        chunk.load_queries(run, unit.batch, h, row, part, position);
        if (state)
            multiply_apart<64>(part.count, e, ff, Left<Real>{chunk.q_phi + part.first, 1, CHUNK}, state, e, out + part.first * e, e);
        else
            std::fill(out + part.first * e, out + part.stop() * e, Real(0));
        if (state && chunk.decays())
            for (int64_t i = part.first; i < part.stop(); ++i)
                for (int64_t c = 0; c < e; ++c) out[i * e + c] *= chunk.power(i);
        if (call.normalize) add_state(state);
        if (keys) {
            chunk.weigh(chunk.k_phi, Part{0, keys}, chunk.q_phi, ff, order(), chunk.pairs);
            if (call.normalize) add_pairs(keys);
            // Where a NaN stands among the keys, a 0 does not keep it from the queries before it.
            const bool all = !call.causal;
            const int64_t step = all ? int64_t(CHUNK) : chunk.finite(keys) ? int64_t(Chunk<Real>::PANEL) : 1;
            for (int64_t i = part.first, next; i < part.stop(); i = next) {
                next = std::min(part.stop(), i / step * step + step);
                multiply<true>(next - i, e, all ? keys : std::min(keys, next), Left<Real>{chunk.pairs + i, 1, CHUNK}, chunk.v, chunk.v_row, out + i * e, e);
            }
        }
        double* lengths = call.length ? call.length_row(unit.batch, h, run.query + row) : nullptr;
        in_own_numbers<Real>(call, call.out, unit.batch, h, run.query + row, [&](auto* to) {
            for (int64_t i = 0; i < part.count; ++i) {
                const Real sum = call.normalize ? chunk.sums[part.first + i] : Real(1);
                if (lengths) lengths[i] = double(sum);
                write_row(out + (part.first + i) * e, sum, to + i * call.out.token);
            }
        });
    }

    // As write, of products with the state in float64: where every query sees many keys, the errors of
    // the definition in float32 average, one a key, and those of such a product do not.
    void write_wide(const Unit& unit, int64_t h, int64_t row, Part part, int64_t position, const double* state) {
        const LinearRun& run = *unit.run;
        const LinearCall& call = chunk.call;
        const int64_t e = chunk.e, ff = chunk.ff;
        chunk.load_queries(run, unit.batch, h, row, part, position);
        double* phi = static_cast<double*>(wide_.grow(CHUNK * (ff + e + 1) * 8));
        double *out = phi + CHUNK * ff, *sums = out + CHUNK * e;
        for (int64_t i = 0; i < ff * CHUNK; ++i) phi[i] = double(chunk.q_phi[i]);
        multiply_apart<64>(part.count, e, ff, Left<double>{phi, 1, CHUNK}, state, e, out, e);
        for (int64_t i = 0; i < CHUNK; i += WIDTH<double>) {
            vd sum = {};
            for (int64_t g = 0; call.normalize && g < ff; ++g) sum += pick(phi + g * CHUNK + i) * state[ff * e + g];
            put(sums + i, sum);
        }
        double* lengths = call.length ? call.length_row(unit.batch, h, run.query + row) : nullptr;
        float* to = call.out.row<float>(unit.batch, h, run.query + row);
        for (int64_t i = 0; i < part.count; ++i) {
            double sum = call.normalize ? sums[i] : 1.0;
            if (lengths) lengths[i] = sum;
            const double by = sum == 0.0 ? 0.0 : 1.0 / sum;
            for (int64_t c = 0; c < chunk.dv; ++c) to[i * call.out.token + c] = float(out[i * e + c] * by);
        }
    }

    template <class T>
    void write_row(const Real* from, Real sum, T* to) {
        int64_t c = 0;
        if constexpr (std::is_same_v<Real, float>) {
            const float by = sum == 0.0f ? 0.0f : 1.0f / sum;
            if (std::abs(by) < 1e30f)  // what has no such inverse, like a NaN, is divided by itself
                for (; c + LANES <= chunk.dv; c += LANES) {
                    const vf x = load(from + c), y = x * by;
                    store_narrow(to + c, y + (x - y * sum) * by);  // as good as a division
                }
        }
        for (; c < chunk.dv; ++c) narrow_to(from[c] / (sum == Real(0) ? Real(INF) : sum), to[c]);
    }

    Room state_, wide_;
};

// One worker's object for each thread, made where it is first needed.
template <class Worker, class Make>
class Workers {
   public:
    Workers(int64_t threads, const Make& make) : make_(make), all_(size_t(threads)) {}
    Worker& operator[](int64_t worker) {
        if (!all_[size_t(worker)]) all_[size_t(worker)] = make_();
        return *all_[size_t(worker)];
    }

   private:
    const Make& make_;
    std::vector<std::unique_ptr<Worker>> all_;
};

static inline int64_t most_positions(const LinearCall& call) {
    int64_t most = 0;
    for (int64_t r = 0; r < call.run_count; ++r) {
        const LinearRun& run = call.run(r);
        most = std::max({most, run.keys, std::min(run.offset + run.queries, 4 * (run.keys + run.queries))});
    }
    return most + CHUNK;
}

static inline auto decay_of_heads(const LinearCall& call, int64_t groups) {
    return [&call, groups](const Unit& unit, int64_t part) {
        return call.decay ? reinterpret_cast<const double*>(call.decay)[unit.head * groups + part] : 1.0;
    };
}

template <class Real>
static inline void linear_forward(const LinearCall& call) {
    typedef LinearForward<Real> Worker;
    const Turns<Real> turns(call, most_positions(call));
    const Shape shape = Worker::shape(call);
    auto make = [&] { return std::make_unique<Worker>(call, turns, shape.size()); };
    Workers<Worker, decltype(make)> workers(std::max<int64_t>(1, call.threads), make);
    const std::vector<Unit> units = units_of(call, call.decay ? call.q_heads : call.kv_heads);
    if (call.causal)
        sweep<Real>(
            call.threads, units, shape, false, decay_of_heads(call, 1),
            [&](const Unit& u, int64_t start, Real* own, int64_t w) { workers[w].sum_causal(u, start, own); },
            [&](const Unit& u, int64_t start, const Real* met, Real* own, bool last, int64_t w) {
                workers[w].serve_causal(u, start, met, own, last);
            });
    else
        gather<Real>(
            call.threads, units, shape, [](const Unit& u) { return u.run->keys; },
            [](const Unit& u) { return u.run->queries; },
            [&](const Unit& u, int64_t start, Real* own, int64_t w) { workers[w].sum_all(u, start, own); },
            [&](const Unit& u, int64_t start, const Real* met, const double* total, int64_t w) {
                workers[w].serve_all(u, start, met, total);
            });
}

}  // namespace sparseattn

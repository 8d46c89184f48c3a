// Sweeps over the spans of runs, forwards or backwards: each span meets the sum of all before it.
//
// A span's own sum begins at zero, and float64 carries it on: so spans may be summed apart and served
// apart, or one after the other, with the same bits.
#pragma once

#include "linear_maps.h"

namespace sparseattn {

// One head of one run.
struct Unit {
    const LinearRun* run;
    int64_t batch, head;
};

// Units of `heads` heads, for every run and row of the batch.
static inline std::vector<Unit> units_of(const LinearCall& call, int64_t heads) {
    std::vector<Unit> units;
    for (int64_t r = 0; r < call.run_count; ++r)
        for (int64_t b = 0; b < call.run(r).batches; ++b)
            for (int64_t h = 0; h < heads; ++h) units.push_back(Unit{&call.run(r), call.run(r).batch + b, h});
    return units;
}

// Where the spans of a causal run start, ascending: those with keys, then those with queries.
class Spans {
   public:
    explicit Spans(const LinearRun& run) {
        const int64_t first = std::max<int64_t>(0, run.offset), last = run.offset + run.queries;
        keys_ = (run.keys + SPANNED - 1) / SPANNED;
        jump_ = std::max(keys_, first / SPANNED) - keys_;
        count_ = std::max(keys_, (last + SPANNED - 1) / SPANNED - jump_);
    }
    int64_t count() const { return count_; }
    int64_t start(int64_t t) const { return (t < keys_ ? t : t + jump_) * SPANNED; }

   private:
    int64_t keys_, jump_, count_;
};

// How a state is laid out: `parts` of [features][padded], and then [features] sums; each with a decay.
struct Shape {
    int64_t features, padded, parts;
    int64_t part() const { return features * (padded + 1); }
    int64_t size() const { return parts * part(); }
};

// What one thread has of a state.
template <class Real>
struct Carried {
    Room total, met, own;
    explicit Carried(int64_t size) : total(size * 8), met(size * int64_t(sizeof(Real))), own(size * int64_t(sizeof(Real))) {}
};

template <class Real>
static inline void round_to(const double* total, int64_t size, Real* met) {
    for (int64_t i = 0; i < size; ++i) met[i] = Real(total[i]);
}

// Past a span, and over `gap` positions more: total = (total * decay ** SPANNED + own) * decay ** gap.
template <class Real, class Decay>
static inline void pass(
    double* total, const Real* own, const Shape& shape, int64_t gap, const Unit& unit, const Decay& decay) {
    for (int64_t p = 0; p < shape.parts; ++p) {
        const double gamma = decay(unit, p), over = std::pow(gamma, double(SPANNED)), beyond = std::pow(gamma, double(gap));
        double* to = total + p * shape.part();
        const Real* from = own + p * shape.part();
        if (gamma == 1.0) {
            for (int64_t i = 0; i < shape.part(); ++i) to[i] += double(from[i]);
        } else {
            for (int64_t i = 0; i < shape.part(); ++i) to[i] = (to[i] * over + double(from[i])) * beyond;
        }
    }
}

constexpr int64_t AHEAD = 4;  // spans of a thread in a round

// Causal runs: serve(unit, start, met, own, last, worker) for every span, in order.
//
//   met: the state that the span meets, or null for zero. own: zero at first; serve adds the span's
//   own sum to it, unless `last`. sum(unit, start, own, worker) does only that.
template <class Real, class Decay, class Sum, class Serve>
static inline void sweep(
    int64_t threads, const std::vector<Unit>& units, const Shape& shape, bool reverse, const Decay& decay,
    const Sum& sum, const Serve& serve) {
    const int64_t count = int64_t(units.size()), size = shape.size();
    std::vector<Spans> spans;
    int64_t most = 0;
    for (const Unit& unit : units) {
        spans.emplace_back(*unit.run);
        most = std::max(most, spans.back().count());
    }
    auto place = [&](int64_t u, int64_t t) {
        const Spans& own = spans[size_t(u)];
        return own.start(reverse ? own.count() - 1 - t : t);
    };
    auto beyond = [&](int64_t u, int64_t t) { return std::abs(place(u, t + 1) - place(u, t)) - SPANNED; };
    if (threads == 1 || count >= 2 * threads || most <= 2) {
        std::vector<Carried<Real>> rooms;
        for (int64_t w = 0; w < std::min(threads, count); ++w) rooms.emplace_back(size);
        parallel_for(threads, count, [&](int64_t u, int64_t worker) {
            Carried<Real>& room = rooms[size_t(worker)];
            double* total = static_cast<double*>(room.total.grow(0));
            Real *met = static_cast<Real*>(room.met.grow(0)), *own = static_cast<Real*>(room.own.grow(0));
            std::fill(total, total + size, 0.0);
            const int64_t stop = spans[size_t(u)].count();
            for (int64_t t = 0; t < stop; ++t) {
                std::fill(own, own + size, Real(0));
                if (t) round_to(total, size, met);
                serve(units[size_t(u)], place(u, t), t ? met : nullptr, own, t + 1 == stop, worker);
                if (t + 1 < stop) pass(total, own, shape, beyond(u, t), units[size_t(u)], decay);
            }
        });
        return;
    }
    const int64_t ahead = std::max<int64_t>(1, AHEAD * threads / count);
    Room totals(count * size * 8), owns(count * ahead * size * int64_t(sizeof(Real))), mets(count * ahead * size * int64_t(sizeof(Real)));
    double* total = static_cast<double*>(totals.grow(0));
    Real *own = static_cast<Real*>(owns.grow(0)), *met = static_cast<Real*>(mets.grow(0));
    std::fill(total, total + count * size, 0.0);
    for (int64_t from = 0; from < most; from += ahead) {
        parallel_for(threads, count * ahead, [&](int64_t item, int64_t worker) {
            const int64_t u = item / ahead, t = from + item % ahead;
            if (t + 1 >= spans[size_t(u)].count()) return;
            Real* to = own + item * size;
            std::fill(to, to + size, Real(0));
            sum(units[size_t(u)], place(u, t), to, worker);
        });
        parallel_for(threads, count, [&](int64_t u, int64_t) {
            for (int64_t i = 0; i < ahead && from + i < spans[size_t(u)].count(); ++i) {
                const int64_t item = u * ahead + i;
                round_to(total + u * size, size, met + item * size);
                if (from + i + 1 < spans[size_t(u)].count())
                    pass(total + u * size, own + item * size, shape, beyond(u, from + i), units[size_t(u)], decay);
            }
        });
        parallel_for(threads, count * ahead, [&](int64_t item, int64_t worker) {
            const int64_t u = item / ahead, t = from + item % ahead;
            if (t >= spans[size_t(u)].count()) return;
            Real* to = own + item * size;  // served, its sum is not needed again
            std::fill(to, to + size, Real(0));
            serve(units[size_t(u)], place(u, t), t ? met + item * size : nullptr, to, t + 1 == spans[size_t(u)].count(), worker);
        });
    }
}

// Runs that are not causal: the sum of all spans of `sources` rows, then
// serve(unit, start, met, total, worker) for the spans of `served` rows; total is met before it is rounded.
template <class Real, class Sources, class Served, class Sum, class Serve>
static inline void gather(
    int64_t threads, const std::vector<Unit>& units, const Shape& shape, const Sources& sources,
    const Served& served, const Sum& sum, const Serve& serve) {
    const int64_t size = shape.size(), batch = std::max<int64_t>(1, 2 * threads);
    auto spans = [&](int64_t rows) { return (rows + SPANNED - 1) / SPANNED; };
    for (int64_t first = 0; first < int64_t(units.size()); first += batch) {
        const int64_t count = std::min<int64_t>(batch, int64_t(units.size()) - first);
        const int64_t ahead = std::max<int64_t>(1, AHEAD * threads / count);
        const Unit* own_units = units.data() + first;
        int64_t most = 0, widest = 0;
        for (int64_t u = 0; u < count; ++u) {
            most = std::max(most, spans(sources(own_units[u])));
            widest = std::max(widest, spans(served(own_units[u])));
        }
        Room totals(count * size * 8), owns(count * ahead * size * int64_t(sizeof(Real))), mets(count * size * int64_t(sizeof(Real)));
        double* total = static_cast<double*>(totals.grow(0));
        Real *own = static_cast<Real*>(owns.grow(0)), *met = static_cast<Real*>(mets.grow(0));
        std::fill(total, total + count * size, 0.0);
        for (int64_t from = 0; from < most; from += ahead) {
            parallel_for(threads, count * ahead, [&](int64_t item, int64_t worker) {
                const int64_t u = item / ahead, t = from + item % ahead;
                Real* to = own + item * size;
                std::fill(to, to + size, Real(0));
                if (t < spans(sources(own_units[u]))) sum(own_units[u], t * SPANNED, to, worker);
            });
            parallel_for(threads, count, [&](int64_t u, int64_t) {
                for (int64_t i = 0; i < ahead && from + i < spans(sources(own_units[u])); ++i)
                    for (int64_t e = 0; e < size; ++e) total[u * size + e] += double(own[(u * ahead + i) * size + e]);
                round_to(total + u * size, size, met + u * size);
            });
        }
        parallel_for(threads, count * widest, [&](int64_t item, int64_t worker) {
            const int64_t u = item / widest, t = item % widest;
            if (t < spans(served(own_units[u]))) serve(own_units[u], t * SPANNED, met + u * size, total + u * size, worker);
        });
    }
}

}  // namespace sparseattn

// A chunk of positions: features of its queries and keys, its values, and what it adds to a state.
#pragma once

#include "linear_sweep.h"

namespace sparseattn {

// Places `first` to `first + count - 1` of a chunk.
struct Part {
    int64_t first, count;
    int64_t stop() const { return first + count; }
};

// What one thread needs for the chunks of a call.
template <class Real>
class Chunk {
   public:
    typedef Lane<Real> V;
    static constexpr int W = WIDTH<Real>;
    static constexpr int PANEL = MOST_VECTORS * LANES;
    static_assert(CHUNK % PANEL == 0, "pairs are whole panels");

    Chunk(const LinearCall& call, const Turns<Real>& turns)
        : call(call), turns(turns), d(call.head_dim), dv(call.value_dim), f(call.features), ff(call.all_features()),
          e(round_up(call.value_dim, LANES)), query{Real(call.q_scale), Real(call.q_drop), call.q_most != 0},
          key{Real(call.k_scale), Real(call.k_drop), call.k_most != 0}, powers_(size_t(call.decay ? call.q_heads : 0)) {
        const int64_t bases = call.turned ? f : 0;
        const int64_t floats = CHUNK * (2 * d + 2 * (bases + ff) + ff + 2 * e + dv + CHUNK) + CHUNK * 8 + 2 * CHUNK;
        Real* at = static_cast<Real*>(room_.grow(floats * int64_t(sizeof(Real))));
        auto take = [&](int64_t count) {
            Real* here = at;
            at += count;
            return here;
        };
        q_x = take(d * CHUNK);
        k_x = take(d * CHUNK);
        q_phi = take(ff * CHUNK);
        k_phi = take(ff * CHUNK);
        q_base = call.turned ? take(f * CHUNK) : q_phi;
        k_base = call.turned ? take(f * CHUNK) : k_phi;
        weighed_ = take(ff * CHUNK);
        values_ = take(e * CHUNK);
        rows = take(e * CHUNK);
        columns = take(dv * CHUNK);
        pairs = take(CHUNK * CHUNK);
        sums = take(CHUNK);
        more = take(CHUNK);
    }

    // Powers of a head's decay from here on; 1 where there is none.
    void decay_of(int64_t head) {
        if (!call.decay) return;
        std::vector<Real>& own = powers_[size_t(head)];
        if (own.empty()) {
            const double gamma = reinterpret_cast<const double*>(call.decay)[head];
            for (int64_t i = 0; i <= SPANNED; ++i) own.push_back(Real(std::pow(gamma, double(i))));
        }
        power_ = own.data();
    }
    bool decays() const { return call.decay != 0; }
    Real power(int64_t distance) const { return power_[distance]; }

    // Rows of a tensor, from n on, as places `part` of columns [width][CHUNK], or of rows [CHUNK][e].
    void columns_in(const Rows& x, int64_t b, int64_t h, int64_t n, int64_t width, Part part, Real scale, Real* into) {
        in_own_numbers<Real>(call, x, b, h, n, [&](const auto* at) { turn_in(at, x.token, width, part.first, part.count, scale, into); });
    }
    void rows_in(const Rows& x, int64_t b, int64_t h, int64_t n, Part part, Real* into) {
        in_own_numbers<Real>(call, x, b, h, n, [&](const auto* at) { copy_rows(at, x.token, dv, e, part.first, part.count, into); });
    }
    // The reverse.
    void columns_out(const Real* from, const Rows& x, int64_t b, int64_t h, int64_t n, int64_t width, Part part) {
        in_own_numbers<Real>(call, x, b, h, n, [&](auto* at) { turn_out(from, width, part.first, part.count, at, x.token); });
    }

    // Features of the queries [row, row + part.count) of a run, at places `part` of a chunk.
    void load_queries(const LinearRun& run, int64_t b, int64_t h, int64_t row, Part part, int64_t position) {
        columns_in(call.q, b, h, run.query + row, d, part, query.scale, q_x);
        make_features(call, query, turns, position, q_x, q_base, q_phi);
        hide(q_phi, [&](int64_t i) { return i < part.first || i >= part.stop(); }, part.count == CHUNK);
    }

    // Features of the keys [start, start + count) of a run, at places 0 to count - 1.
    void load_keys(const LinearRun& run, int64_t b, int64_t h, int64_t start, int64_t count, int64_t position) {
        columns_in(call.k, b, h, run.key + start, d, Part{0, count}, key.scale, k_x);
        make_features(call, key, turns, position, k_x, k_base, k_phi);
        holes = run.holes ? reinterpret_cast<const uint8_t*>(call.key_mask) + b * call.key_mask_row + run.key + start : nullptr;
        hide(k_phi, [&](int64_t i) { return i >= count || (holes && !holes[i]); }, count == CHUNK && !holes);
    }

    void load_values(const LinearRun& run, int64_t b, int64_t h, int64_t start, int64_t count) {
        if (e == dv && !run.holes && !call.half) {
            v = call.v.row<Real>(b, h, run.key + start);
            v_row = call.v.token;
            return;
        }
        rows_in(call.v, b, h, run.key + start, Part{0, count}, values_);
        for (int64_t i = 0; holes && i < count; ++i)
            if (!holes[i]) std::fill(values_ + i * e, values_ + (i + 1) * e, Real(0));
        v = values_;
        v_row = e;
    }

    // State += sum over places below `count` of phi [value, extra], weighed by decays if there are any.
    //
    //   extra: of each place, or null for 1. back: weights are decay ** place, else decay ** (CHUNK - place).
    void add(const Real* phi, const Real* value, int64_t value_row, const Real* extra, int64_t count, bool back, Real* state) {
        if (decays()) {
            for (int64_t i = 0; i < ff * (e + 1); ++i) state[i] *= power(CHUNK);
            for (int64_t g = 0; g < ff; ++g)
                for (int64_t i = 0; i < CHUNK; ++i) weighed_[g * CHUNK + i] = phi[g * CHUNK + i] * power(back ? i : CHUNK - i);
            phi = weighed_;
        }
        multiply<true>(ff, e, count, Left<Real>{phi, CHUNK, 1}, value, value_row, state, e);
        if (!call.normalize) return;
        for (int64_t g = 0; g < ff; ++g) {
            V sum = V{};
            for (int64_t i = 0; i < CHUNK; i += W) sum += extra ? V(pick(phi + g * CHUNK + i) * pick(extra + i)) : pick(phi + g * CHUNK + i);
            Real all = 0;
            for (int l = 0; l < W; ++l) all += sum[l];
            state[ff * e + g] += all;
        }
    }

    // The state that a chunk meets, so far into its span: null for zero.
    const Real* meet(const Real* met, const Real* own, int64_t since, int64_t size, Real* room) {
        if (since == 0) return met;
        if (met == nullptr) return own;
        const Real by = decays() ? power(since) : Real(1);
        int64_t i = 0;
        for (; i + W <= size; i += W) put(room + i, V(pick(met + i) * by + pick(own + i)));
        for (; i < size; ++i) room[i] = met[i] * by + own[i];
        return room;
    }

    // Products of columns: into[i][j] = sum over g of x[g][i] y[g][j], for the rows below `count`.
    //
    //   late: places i > j are exactly 0, and their products, where they are not, times
    //   decay ** (j - i); early: the reverse, i < j, of rows that stand later.
    enum Order { late, early, whole };
    void weigh(const Real* x, Part part, const Real* y, int64_t width, Order order, Real* into) {
        for (int64_t at = 0; at < CHUNK; at += PANEL) {
            int64_t first = part.first, stop = part.stop();
            if (order == late) stop = std::min<int64_t>(stop, at + PANEL);
            if (order == early) first = std::max(first, at);
            if (stop > first)
                multiply<false>(stop - first, PANEL, width, Left<Real>{x + first, 1, CHUNK}, y + at, CHUNK, into + first * CHUNK + at, CHUNK);
        }
        mask(into, part, order);
    }

    // As weigh, of rows x [CHUNK][x_row].
    void weigh_rows(const Real* x, int64_t x_row, Part part, const Real* y, int64_t width, Real* into) {
        multiply<false>(part.count, CHUNK, width, Left<Real>{x + part.first * x_row, x_row, 1}, y, CHUNK, into + part.first * CHUNK, CHUNK);
    }

    void mask(Real* into, Part part, Order order) {
        for (int64_t i = part.first; i < part.stop(); ++i) {
            Real* row = into + i * CHUNK;
            if (decays())
                for (int64_t j = 0; j < CHUNK; ++j) row[j] *= power(std::abs(i - j));
            if (order == late) std::fill(row, row + i, Real(0));
            if (order == early) std::fill(row + i + 1, row + CHUNK, Real(0));
        }
    }

    // Each place times decay ** place, or decay ** (CHUNK - place).
    void fade(Real* columns_of, int64_t count, bool back) {
        if (!decays()) return;
        for (int64_t g = 0; g < count; ++g)
            for (int64_t i = 0; i < CHUNK; ++i) columns_of[g * CHUNK + i] *= power(back ? CHUNK - i : i);
    }

    // The sum of term(0) to term(count - 1), as four: less is lost than in one long sum, or waited for.
    template <class Term>
    static V summed(int64_t count, const Term& term) {
        V sum[4] = {};
        int64_t g = 0;
        for (; g + 4 <= count; g += 4)
            for (int64_t l = 0; l < 4; ++l) sum[l] += term(g + l);
        for (; g < count; ++g) sum[0] += term(g);
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    // Whether everything in features and values below `count` is finite.
    bool finite(int64_t count) const {
        V sum = V{};
        for (int64_t i = 0; i < ff * CHUNK; i += W) sum += pick(k_phi + i) * Real(0);
        for (int64_t j = 0; j < count; ++j)
            for (int64_t i = 0; i < e; i += W) sum += pick(v + j * v_row + i) * Real(0);
        Real all = 0;
        for (int l = 0; l < W; ++l) all += sum[l];
        return all == Real(0);
    }

    const LinearCall& call;
    const Turns<Real>& turns;
    const int64_t d, dv, f, ff, e;  // e: value_dim, padded
    const Side<Real> query, key;
    Real *q_x, *k_x, *q_phi, *k_phi, *q_base, *k_base;  // columns: [..][CHUNK]
    Real *rows, *columns, *pairs, *sums, *more;         // [CHUNK][e], [dv][CHUNK], [CHUNK][CHUNK], [CHUNK]
    const Real* v = nullptr;                            // rows of values
    int64_t v_row = 0;
    const uint8_t* holes = nullptr;  // of the keys at hand: 0 where hidden

   private:
    template <class Hidden>
    void hide(Real* phi, const Hidden& hidden, bool none) {
        if (none) return;
        for (int64_t i = 0; i < CHUNK; ++i)
            if (hidden(i))
                for (int64_t g = 0; g < ff; ++g) phi[g * CHUNK + i] = 0;
    }

    Room room_;
    Real *weighed_, *values_;
    std::vector<std::vector<Real>> powers_;
    const Real* power_ = nullptr;
};

// Chunks of a span of a causal run: where they start, and what they have.
struct Places {
    int64_t start, keys;  // keys stand at places 0 to keys - 1
    Part queries;
};

static inline Places places_of(const LinearRun& run, int64_t start) {
    const int64_t keys = std::clamp<int64_t>(run.keys - start, 0, CHUNK);
    const int64_t first = std::clamp<int64_t>(run.offset - start, 0, CHUNK);
    const int64_t stop = std::clamp<int64_t>(run.offset + run.queries - start, 0, CHUNK);
    return Places{start, keys, Part{first, std::max<int64_t>(0, stop - first)}};
}

}  // namespace sparseattn

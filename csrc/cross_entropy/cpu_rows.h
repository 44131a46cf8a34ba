// Cross-entropy on the CPU, compiled once per instruction-set level. Two walks over the same maths:
//
//   row   one row at a time, vector lanes along the classes: rows with unit class stride and many
//         classes. Three passes over a row that stays in cache: maximum; exp and sums; gradient.
//   tile  kLanes rows at a time, one row per lane: few classes, or classes that are not adjacent in
//         memory (N, C, H, W). A tile is packed into scratch class by class (transposed in
//         registers when classes are adjacent), computed, and unpacked.
//
// Neither walk reads or writes outside the rows it is given.
#pragma once

#include "core/compensated_sum.h"
#include "core/vec.h"
#include "core/vec_math.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/math.h"

namespace fusedstep::cross_entropy::FUSEDSTEP_LEVEL {
namespace {

using namespace ::fusedstep::FUSEDSTEP_LEVEL;

// Above this many classes the row walk is faster even where classes are adjacent: two
// transpositions cost more than a row's horizontal reductions (the times cross between 100 and 128
// on AVX-512).
constexpr std::int64_t kMaxTileClasses = 112;
// Below this many rows a tile is mostly empty.
constexpr std::int64_t kMinTileRows = 4;

// Classes that a tile sums in a row before they join the total: rounding grows with their number
// and with that of the blocks, so with the square root of C.
inline std::int64_t tile_block(std::int64_t classes) {
    if (classes <= 256) return 16;
    return static_cast<std::int64_t>(std::sqrt(static_cast<double>(classes)));
}

// Uninitialised scratch of n elements: on the stack when small.
template <class A>
class Scratch {
public:
    explicit Scratch(std::int64_t n) {
        if (n > kInline) heap_.reset(new (std::align_val_t{64}) A[static_cast<std::size_t>(n)]);
    }
    A* data() { return heap_ ? heap_.get() : inline_; }

private:
    struct Free {
        void operator()(A* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    static constexpr std::int64_t kInline = 4096 / sizeof(A);
    alignas(64) A inline_[kInline];
    std::unique_ptr<A, Free> heap_;
};

// ---- The dense part of the target vector u: everything but the true class of an index target ----
//
// kDense: there is one. kPerRow: it differs from row to row, and no row has a true class.

// Class indices without smoothing: u is zero but at the true class.
template <class A>
struct NoDense {
    static constexpr bool kDense = false;
    static constexpr bool kPerRow = false;
    static constexpr A mass{};  // the sum over the classes

    A scalar(std::int64_t) const { return A{}; }
    FUSEDSTEP_VEC Vec<A> across_rows(std::int64_t) const { return Vec<A>{}; }
};

// Label smoothing: u_c = smoothing / C * w_c in every row.
template <class A>
struct SmoothDense {
    static constexpr bool kDense = true;
    static constexpr bool kPerRow = false;
    const A* weight;
    A per_class;
    A mass;  // the sum over the classes

    A scalar(std::int64_t c) const { return weight ? per_class * weight[c] : per_class; }
    FUSEDSTEP_VEC Vec<A> along_classes(std::int64_t c) const {
        return weight ? load(weight + c) * per_class : broadcast(per_class);
    }
    FUSEDSTEP_VEC Vec<A> along_classes_partial(std::int64_t c, std::int64_t n) const {
        return weight ? load_partial(weight + c, n) * per_class : broadcast(per_class);
    }
    FUSEDSTEP_VEC Vec<A> across_rows(std::int64_t c) const { return broadcast(scalar(c)); }
};

// Class probabilities: of one row (T as stored) or of one packed tile (T = A).
template <class A, class T>
struct ProbabilityDense {
    static constexpr bool kDense = true;
    static constexpr bool kPerRow = true;
    using Stored = T;
    const T* target;
    const A* weight;
    A keep;
    A smoothing_per_class;

    FUSEDSTEP_VEC Vec<A> along_classes(std::int64_t c) const {
        return probability_coefficient(load(target + c),
                                       weight ? load(weight + c) : broadcast(A{1}), broadcast(keep),
                                       broadcast(smoothing_per_class));
    }
    FUSEDSTEP_VEC Vec<A> along_classes_partial(std::int64_t c, std::int64_t n) const {
        return probability_coefficient(load_partial(target + c, n),
                                       weight ? load_partial(weight + c, n) : broadcast(A{1}),
                                       broadcast(keep), broadcast(smoothing_per_class));
    }
    FUSEDSTEP_VEC Vec<A> across_rows(std::int64_t c) const {
        return probability_coefficient(load(target + c * kLanes<A>),
                                       broadcast(weight ? weight[c] : A{1}), broadcast(keep),
                                       broadcast(smoothing_per_class));
    }
};

// ---- The row walk ----

template <class A>
struct ExpSums {
    A exp_sum;     // S
    A target_sum;  // dense part of U, where rows differ in it
    A target_dot;  // dense part of L
};

template <class T>
acc_t<T> row_max(const T* x, std::int64_t classes) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    Vec<A> const lowest = broadcast(-std::numeric_limits<A>::infinity());
    Vec<A> m[4] = {lowest, lowest, lowest, lowest};
    std::int64_t c = 0;
    for (; c + 4 * L <= classes; c += 4 * L) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) m[k] = max(load(x + c + k * L), m[k]);
    }
    for (; c + L <= classes; c += L) m[0] = max(load(x + c), m[0]);
    if (c < classes) {
        Vec<A> const tail = load_partial(x + c, classes - c);
        m[1] = max(first_lanes<A>(classes - c) ? tail : lowest, m[1]);
    }
    return reduce_max<A>(max(max(m[0], m[1]), max(m[2], m[3])));
}

// exp(x - m), stored to e where kStore, and the row's sums. Sums are taken in blocks, whose
// totals join a sum that a row of any length does not round more than a short one.
template <bool kStore, class T, class Dense>
ExpSums<acc_t<T>> exp_pass(const T* x, std::int64_t classes, acc_t<T> row_maximum,
                           const Dense& dense, acc_t<T>* e) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    constexpr std::int64_t kBlock = 64 * 4 * L;
    Vec<A> const m = broadcast(row_maximum);
    LaneSum<A> exp_sum, target_sum, target_dot;

    auto one = [&](std::int64_t c, Vec<A>& s, Vec<A>& u_sum, Vec<A>& u_dot)
                   __attribute__((always_inline)) {
                       Vec<A> const shifted = load(x + c) - m;
                       Vec<A> const v = exp(shifted);
                       if constexpr (kStore) store(e + c, v);
                       s += v;
                       if constexpr (Dense::kDense) {
                           Vec<A> const u = dense.along_classes(c);
                           if constexpr (Dense::kPerRow) u_sum += u;
                           u_dot = fmadd(u, shifted, u_dot);
                       }
                   };

    std::int64_t c = 0;
    while (c + 4 * L <= classes) {
        std::int64_t const block_end = c + kBlock < classes ? c + kBlock : classes;
        Vec<A> s[4] = {}, u_sum[2] = {}, u_dot[2] = {};
        for (; c + 4 * L <= block_end; c += 4 * L) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) one(c + k * L, s[k], u_sum[k % 2], u_dot[k % 2]);
        }
        exp_sum.add((s[0] + s[1]) + (s[2] + s[3]));
        if constexpr (Dense::kDense) {
            target_sum.add(u_sum[0] + u_sum[1]);
            target_dot.add(u_dot[0] + u_dot[1]);
        }
    }
    Vec<A> last{}, last_sum{}, last_dot{};
    for (; c + L <= classes; c += L) one(c, last, last_sum, last_dot);
    if (c < classes) {
        std::int64_t const n = classes - c;
        VecInt<A> const valid = first_lanes<A>(n);
        Vec<A> const shifted = load_partial(x + c, n) - m;
        Vec<A> const v = valid ? exp(shifted) : Vec<A>{};
        if constexpr (kStore) store_partial(e + c, v, n);
        last += v;
        if constexpr (Dense::kDense) {
            Vec<A> const u = dense.along_classes_partial(c, n);
            last_sum += valid ? u : Vec<A>{};
            last_dot += valid ? u * shifted : Vec<A>{};
        }
    }
    exp_sum.add(last);
    if constexpr (Dense::kDense) {
        target_sum.add(last_sum);
        target_dot.add(last_dot);
        return {static_cast<A>(exp_sum.total()), static_cast<A>(target_sum.total()),
                static_cast<A>(target_dot.total())};
    } else {
        return {static_cast<A>(exp_sum.total()), A{}, A{}};
    }
}

// grad_c = value(c) * scale - u_c * gradient_scale, where value is exp(x_c - m), read or
// recomputed. Both products are rounded, so that they cancel to zero where they are equal (one
// class).
template <class T, class Dense, class Value, class ValuePartial>
void gradient_pass(std::int64_t classes, acc_t<T> scale, const Dense& dense,
                   acc_t<T> gradient_scale, T* grad, Value value, ValuePartial value_partial) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    Vec<A> const k = broadcast(scale);
    std::int64_t c = 0;
#pragma GCC unroll 4
    for (; c + L <= classes; c += L) {
        Vec<A> g = value(c) * k;
        if constexpr (Dense::kDense) g -= dense.along_classes(c) * gradient_scale;
        store(grad + c, g);
    }
    if (c < classes) {
        std::int64_t const n = classes - c;
        Vec<A> g = value_partial(c, n) * k;
        if constexpr (Dense::kDense) g -= dense.along_classes_partial(c, n) * gradient_scale;
        store_partial(grad + c, g, n);
    }
}

template <class T>
void zero_row(T* grad, std::int64_t classes) {
    std::memset(static_cast<void*>(grad), 0, static_cast<std::size_t>(classes) * sizeof(T));
}

// ---- Where the rows are ----

struct Offsets {
    std::int64_t logits;
    std::int64_t grad;
    std::int64_t target;
};

// Splits [begin, end) into runs along the last row dimension: f(first row, rows, offsets of it).
template <class F>
void for_each_run(const Args& args, std::int64_t begin, std::int64_t end, F f) {
    std::int64_t const inner = args.row_sizes[args.row_dims - 1];
    for (std::int64_t row = begin; row < end;) {
        Offsets at{};
        std::int64_t rest = row;
        for (int d = args.row_dims - 1; d >= 0; --d) {
            std::int64_t const i = rest % args.row_sizes[d];
            rest /= args.row_sizes[d];
            at.logits += i * args.logits_row_strides[d];
            at.grad += i * args.grad_row_strides[d];
            at.target += i * args.target_row_strides[d];
        }
        std::int64_t const left = inner - row % inner;
        std::int64_t const n = left < end - row ? left : end - row;
        f(row, n, at);
        row += n;
    }
}

// ---- The arguments with their types, and what both walks share ----

template <class T, class Dense>
struct Problem {
    using A = acc_t<T>;

    const Args& args;
    Dense dense;  // of a probability target: without its row's offset
    const T* logits;
    T* grad;
    const A* weight;
    A smoothing;  // of an index target
    Variant<A> variant;
    A gradient_scale;
    A* stats;
    A* lse;
    const A* grad_output;
    Offsets stride;  // along a run

    bool ignored(std::int64_t row) const {
        if constexpr (!Dense::kPerRow) return args.target_index[row] == args.ignore_index;
        return false;
    }
    A class_weight(std::int64_t y) const { return weight ? weight[y] : A{1}; }
    Dense dense_at(std::int64_t target_offset) const {
        Dense here = dense;
        if constexpr (Dense::kPerRow) here.target += target_offset;
        return here;
    }
    A* stats_of(std::int64_t row) const { return stats + kRowStats * row; }
    A upstream(std::int64_t row) const {
        return gradient_scale * grad_output[row * args.grad_output_stride];
    }
    bool walks_by_row() const {
        bool const adjacent = args.logits_class_stride == 1 &&
                              (grad == nullptr || args.grad_class_stride == 1) &&
                              (!Dense::kPerRow || args.target_class_stride == 1);
        return adjacent && (args.classes > kMaxTileClasses || args.rows < kMinTileRows);
    }
};

template <class T, class Dense>
Problem<T, Dense> make_problem(const Args& args, Dense dense) {
    using A = acc_t<T>;
    int const last = args.row_dims - 1;
    return {args,
            dense,
            static_cast<const T*>(args.logits),
            static_cast<T*>(args.grad),
            static_cast<const A*>(args.weight),
            static_cast<A>(args.label_smoothing),
            args.variant.to<A>(),
            static_cast<A>(args.gradient_scale),
            static_cast<A*>(args.row_stats),
            static_cast<A*>(args.row_lse),
            static_cast<const A*>(args.grad_output),
            {args.logits_row_strides[last], args.grad_row_strides[last],
             args.target_row_strides[last]}};
}

// The mathematics of one row, or of one row per lane.
struct RowMath {
    template <class V>
    FUSEDSTEP_VEC static V exp(V x) {
        if constexpr (std::is_floating_point_v<V>)
            return FUSEDSTEP_LEVEL::exp(broadcast(x))[0];
        else
            return FUSEDSTEP_LEVEL::exp(x);
    }
    template <class V>
    FUSEDSTEP_VEC static V log(V x) {
        if constexpr (std::is_floating_point_v<V>)
            return std::log(x);
        else
            return FUSEDSTEP_LEVEL::log(x);
    }
    template <class V>
    FUSEDSTEP_VEC static V fmadd(V a, V b, V c) {
        if constexpr (std::is_floating_point_v<V>)
            return FUSEDSTEP_LEVEL::fmadd(broadcast(a), broadcast(b), broadcast(c))[0];
        else
            return FUSEDSTEP_LEVEL::fmadd(a, b, c);
    }
};

// Out of line: once per row, and the kernels need not be compiled for every dtype of a loss.
__attribute__((noinline)) void write_row_loss(const Args& args, std::int64_t row, double loss) {
    dispatch(args.loss_dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        static_cast<T*>(args.row_losses)[row] = from_acc<T>(static_cast<acc_t<T>>(loss));
    });
}

template <class T, class Dense>
void write_stats(const Problem<T, Dense>& p, std::int64_t row, acc_t<T> m, acc_t<T> scale,
                 acc_t<T> u_y) {
    if (!p.stats) return;
    acc_t<T>* const stats = p.stats_of(row);
    stats[0] = m;
    stats[1] = scale;
    stats[2] = u_y;
}

// ---- Row walk: the two directions ----

// Writes the gradient of one row. value(c) and value_partial(c, n) give exp(x - m); the true class,
// whose coefficient is u_y beside the dense part, is computed apart, so that it is rounded to T
// once. Where value reads the gradient row itself, value_y must have been read before.
template <class T, class Dense, class Value, class ValuePartial>
void write_gradient(const Problem<T, Dense>& p, const Dense& dense, std::int64_t row,
                    acc_t<T> scale, acc_t<T> u_y, acc_t<T> upstream, T* grad, acc_t<T> value_y,
                    Value value, ValuePartial value_partial) {
    acc_t<T> const k = scale * upstream;
    gradient_pass(p.args.classes, k, dense, upstream, grad, value, value_partial);
    if constexpr (!Dense::kPerRow) {
        std::int64_t const y = p.args.target_index[row];
        grad[y] = from_acc<T>(value_y * k - (dense.scalar(y) + u_y) * upstream);
    }
}

template <class T, class Dense>
double forward_by_row(const Problem<T, Dense>& p, std::int64_t begin, std::int64_t end) {
    using A = acc_t<T>;
    const Args& args = p.args;
    std::int64_t const classes = args.classes;
    // exp(x - m) waits in the gradient row itself where that has the precision, else in scratch.
    constexpr bool kInPlace = std::is_same_v<T, A>;
    Scratch<A> scratch(p.grad && !kInPlace ? classes : 0);
    CompensatedSum total;

    for_each_run(args, begin, end, [&](std::int64_t first, std::int64_t n, Offsets at) {
        for (std::int64_t i = 0; i < n; ++i) {
            std::int64_t const row = first + i;
            const T* const x = p.logits + at.logits + i * p.stride.logits;
            T* const grad = p.grad ? p.grad + at.grad + i * p.stride.grad : nullptr;
            if (p.ignored(row)) {
                if (grad) zero_row(grad, classes);
                if (args.row_losses) write_row_loss(args, row, 0.0);
                write_stats(p, row, A{}, A{}, A{});
                if (p.lse) p.lse[row] = A{};
                continue;
            }
            Dense const dense = p.dense_at(at.target + i * p.stride.target);
            A* e = scratch.data();
            if constexpr (kInPlace) e = grad;

            A const m = row_max(x, classes);
            ExpSums<A> sums = grad ? exp_pass<true>(x, classes, m, dense, e)
                                   : exp_pass<false>(x, classes, m, dense, e);
            A u_y{}, shifted_y{}, e_y{}, row_weight{1};
            if constexpr (!Dense::kPerRow) {
                std::int64_t const y = args.target_index[row];
                row_weight = p.class_weight(y);
                u_y = index_coefficient(row_weight, p.smoothing);
                A const x_y = to_acc(x[y]);
                shifted_y = x_y - m;
                // What that is rounded by, where the maximum is the larger of the two; not finite
                // where one of the three is not.
                A const lost = x_y - (shifted_y + m);
                if (std::isfinite(lost)) sums.target_dot += u_y * lost;
                sums.target_sum = dense.mass + u_y;
                if (grad) e_y = e[y];
            }
            A const log_sum = std::log(sums.exp_sum);
            RowTerms<A> terms{
                row_loss<RowMath>(sums.target_sum, log_sum, sums.target_dot, u_y, shifted_y),
                sums.target_sum, u_y};
            if (!p.variant.is_cross_entropy()) {
                RowSums<A> const of{m, sums.exp_sum, log_sum, shifted_y, row_weight};
                change_terms<RowMath>(terms, of, p.variant);
            }
            A const scale = softmax_scale(terms.softmax, sums.exp_sum);
            write_stats(p, row, m, scale, terms.truth);
            if (p.lse) p.lse[row] = m + log_sum;
            if (args.row_losses) {
                write_row_loss(args, row, static_cast<double>(terms.loss));
            } else {
                total.add(static_cast<double>(terms.loss));
            }
            if (grad) {
                write_gradient(
                    p, dense, row, scale, terms.truth, p.gradient_scale, grad, e_y,
                    [e](std::int64_t c) { return load(e + c); },
                    [e](std::int64_t c, std::int64_t k) { return load_partial(e + c, k); });
            }
        }
    });
    return total.total();
}

template <class T, class Dense>
void backward_by_row(const Problem<T, Dense>& p, std::int64_t begin, std::int64_t end) {
    using A = acc_t<T>;
    const Args& args = p.args;
    for_each_run(args, begin, end, [&](std::int64_t first, std::int64_t n, Offsets at) {
        for (std::int64_t i = 0; i < n; ++i) {
            std::int64_t const row = first + i;
            const T* const x = p.logits + at.logits + i * p.stride.logits;
            T* const grad = p.grad + at.grad + i * p.stride.grad;
            if (p.ignored(row)) {
                zero_row(grad, args.classes);
                continue;
            }
            Dense const dense = p.dense_at(at.target + i * p.stride.target);
            const A* const stats = p.stats_of(row);
            Vec<A> const m = broadcast(stats[0]);
            A e_y{};
            if constexpr (!Dense::kPerRow) {
                e_y = exp(broadcast(to_acc(x[args.target_index[row]])) - m)[0];
            }
            write_gradient(
                p, dense, row, stats[1], stats[2], p.upstream(row), grad, e_y,
                [x, m](std::int64_t c) { return exp(load(x + c) - m); },
                [x, m](std::int64_t c, std::int64_t k) { return exp(load_partial(x + c, k) - m); });
        }
    });
}

// ---- Tile walk: packing ----

// Reads rows [0, n) x classes of T, row r at p + r * row_stride, into tile[c * L + r]; the lanes of
// absent rows become zero.
template <class T>
void pack_tile(const T* p, std::int64_t row_stride, std::int64_t class_stride, int n,
               std::int64_t classes, acc_t<T>* tile) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    if (row_stride == 1) {
        if (n == L) {
            for (std::int64_t c = 0; c < classes; ++c)
                store(tile + c * L, load(p + c * class_stride));
        } else {
            for (std::int64_t c = 0; c < classes; ++c) {
                store(tile + c * L, load_partial(p + c * class_stride, n));
            }
        }
    } else if (class_stride == 1) {
        for (std::int64_t c = 0; c < classes; c += L) {
            std::int64_t const width = classes - c < L ? classes - c : L;
            Vec<A> block[L];
#pragma GCC unroll 16
            for (int r = 0; r < L; ++r) {
                block[r] = r < n ? load_partial(p + r * row_stride + c, width) : Vec<A>{};
            }
            transpose<A>(block);
#pragma GCC unroll 16
            for (int k = 0; k < L; ++k) {
                if (k < width) store(tile + (c + k) * L, block[k]);
            }
        }
    } else {
        for (std::int64_t c = 0; c < classes; ++c) {
            for (int r = 0; r < L; ++r) {
                tile[c * L + r] = r < n ? to_acc(p[r * row_stride + c * class_stride]) : A{};
            }
        }
    }
}

template <class T>
void unpack_tile(const acc_t<T>* tile, T* p, std::int64_t row_stride, std::int64_t class_stride,
                 int n, std::int64_t classes) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    if (row_stride == 1) {
        if (n == L) {
            for (std::int64_t c = 0; c < classes; ++c)
                store(p + c * class_stride, load(tile + c * L));
        } else {
            for (std::int64_t c = 0; c < classes; ++c) {
                store_partial(p + c * class_stride, load(tile + c * L), n);
            }
        }
    } else if (class_stride == 1) {
        for (std::int64_t c = 0; c < classes; c += L) {
            std::int64_t const width = classes - c < L ? classes - c : L;
            Vec<A> block[L];
#pragma GCC unroll 16
            for (int k = 0; k < L; ++k) block[k] = k < width ? load(tile + (c + k) * L) : Vec<A>{};
            transpose<A>(block);
#pragma GCC unroll 16
            for (int r = 0; r < L; ++r) {
                if (r < n) store_partial(p + r * row_stride + c, block[r], width);
            }
        }
    } else {
        for (std::int64_t c = 0; c < classes; ++c) {
            for (int r = 0; r < n; ++r) {
                p[r * row_stride + c * class_stride] = from_acc<T>(tile[c * L + r]);
            }
        }
    }
}

// ---- Tile walk: the maths, one row per lane ----

// The true class of each lane, and its u_y; a lane that has none (absent, ignored) has u_y = 0 and
// live = 0. backward has u_y from stats.
template <class A>
struct TrueClasses {
    VecInt<A> index;
    VecInt<A> live;
    Vec<A> u;
};

template <class T, class Dense>
TrueClasses<acc_t<T>> true_classes(const Problem<T, Dense>& p, std::int64_t row, int n) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    VecInt<A> const present = first_lanes<A>(n);
    if constexpr (Dense::kPerRow) return {VecInt<A>{}, present, Vec<A>{}};
    LaneInt<A> index[L] = {};
    LaneInt<A> live[L] = {};
    for (int r = 0; r < n; ++r) {
        std::int64_t const y = p.args.target_index[row + r];
        bool const counts = y != p.args.ignore_index;
        index[r] = counts ? static_cast<LaneInt<A>>(y) : 0;
        live[r] = -static_cast<LaneInt<A>>(counts);
    }
    TrueClasses<A> result{};
    std::memcpy(&result.index, index, sizeof(index));
    std::memcpy(&result.live, live, sizeof(live));
    return result;
}

// Turns a tile of exp(x - m) into the gradient, in place. Lanes that are not live become zero.
template <class T, class Dense, class TileDense>
void tile_gradient(const Problem<T, Dense>& p, const TileDense& dense,
                   const TrueClasses<acc_t<T>>& truth, Vec<acc_t<T>> scale, Vec<acc_t<T>> upstream,
                   acc_t<T>* tile) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    Vec<A> const k = scale * upstream;
    for (std::int64_t c = 0; c < p.args.classes; ++c) {
        Vec<A> u = dense.across_rows(c);
        if constexpr (!Dense::kPerRow) {
            u += truth.index == static_cast<LaneInt<A>>(c) ? truth.u : Vec<A>{};
        }
        Vec<A> g = load(tile + c * L) * k - u * upstream;
        if constexpr (!Dense::kPerRow) g = truth.live ? g : Vec<A>{};
        store(tile + c * L, g);
    }
}

// Calls f(first row, rows, tile, dense, grad) for every tile of rows [begin, end): tile holds its
// logits, dense its part of u, and the gradient of its first row is at grad.
template <class T, class Dense, class TileDense, class F>
void for_each_tile(const Problem<T, Dense>& p, TileDense dense, std::int64_t begin,
                   std::int64_t end, F f) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    const Args& args = p.args;
    Scratch<A> tile(args.classes * L);
    Scratch<A> target(Dense::kPerRow ? args.classes * L : 0);
    for_each_run(args, begin, end, [&](std::int64_t first, std::int64_t count, Offsets at) {
        for (std::int64_t i = 0; i < count; i += L) {
            int const n = static_cast<int>(count - i < L ? count - i : L);
            pack_tile(p.logits + at.logits + i * p.stride.logits, p.stride.logits,
                      args.logits_class_stride, n, args.classes, tile.data());
            if constexpr (Dense::kPerRow) {
                pack_tile(p.dense.target + at.target + i * p.stride.target, p.stride.target,
                          args.target_class_stride, n, args.classes, target.data());
                dense.target = target.data();
            }
            f(first + i, n, tile.data(), dense,
              p.grad ? p.grad + at.grad + i * p.stride.grad : nullptr);
        }
    });
}

template <class T, class Dense, class TileDense>
double forward_by_tile(const Problem<T, Dense>& p, const TileDense& tile_dense, std::int64_t begin,
                       std::int64_t end) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    const Args& args = p.args;
    std::int64_t const classes = args.classes;
    std::int64_t const block_size = tile_block(classes);
    LaneSum<A> total;
    for_each_tile(
        p, tile_dense, begin, end,
        [&](std::int64_t row, int n, A* tile, const TileDense& dense, T* grad) {
            TrueClasses<A> truth = true_classes(p, row, n);
            Vec<A> row_weight = broadcast(A{1});
            if constexpr (!Dense::kPerRow) {
                if (p.weight) {
                    for (int r = 0; r < L; ++r) row_weight[r] = p.weight[truth.index[r]];
                }
                Vec<A> const u = index_coefficient(row_weight, broadcast(p.smoothing));
                truth.u = truth.live ? u : Vec<A>{};
            }

            Vec<A> m = load(tile);
            for (std::int64_t c = 1; c < classes; ++c) m = max(load(tile + c * L), m);

            Vec<A> target_sum = truth.u;
            Vec<A> target_dot{}, shifted_y{};
            if constexpr (!Dense::kPerRow) {
                Vec<A> x_y;
                for (int r = 0; r < L; ++r) {
                    x_y[r] = tile[static_cast<std::int64_t>(truth.index[r]) * L + r];
                }
                target_sum += dense.mass;
                shifted_y = x_y - m;
            }
            Vec<A> exp_sum{};
            for (std::int64_t block = 0; block < classes; block += block_size) {
                std::int64_t const block_end =
                    block + block_size < classes ? block + block_size : classes;
                Vec<A> s[2] = {}, u_sum[2] = {}, u_dot[2] = {};
                auto const one = [&](std::int64_t c, int k) __attribute__((always_inline)) {
                    Vec<A> const shifted = load(tile + c * L) - m;
                    Vec<A> const e = exp(shifted);
                    store(tile + c * L, e);
                    s[k] += e;
                    if constexpr (Dense::kDense) {
                        Vec<A> const u = dense.across_rows(c);
                        if constexpr (Dense::kPerRow) u_sum[k] += u;
                        u_dot[k] = fmadd(u, shifted, u_dot[k]);
                    }
                };
                std::int64_t c = block;
                for (; c + 2 <= block_end; c += 2) one(c, 0), one(c + 1, 1);
                if (c < block_end) one(c, 0);
                exp_sum += s[0] + s[1];
                if constexpr (Dense::kPerRow) target_sum += u_sum[0] + u_sum[1];
                if constexpr (Dense::kDense) target_dot += u_dot[0] + u_dot[1];
            }
            Vec<A> const log_sum = log(exp_sum);
            RowTerms<Vec<A>> terms{
                row_loss<RowMath>(target_sum, log_sum, target_dot, truth.u, shifted_y), target_sum,
                truth.u};
            if (!p.variant.is_cross_entropy()) {
                RowSums<Vec<A>> const of{m, exp_sum, log_sum, shifted_y, row_weight};
                change_terms<RowMath>(terms, of, p.variant);
                truth.u = truth.live ? terms.truth : Vec<A>{};
            }
            Vec<A> const loss = truth.live ? terms.loss : Vec<A>{};
            Vec<A> const scale = softmax_scale(terms.softmax, exp_sum);
            if (args.row_losses) {
                for (int r = 0; r < n; ++r) {
                    write_row_loss(args, row + r, static_cast<double>(loss[r]));
                }
            } else {
                total.add(loss);
            }
            if (p.stats) {
                for (int r = 0; r < n; ++r) {
                    bool const live = truth.live[r] != 0;
                    write_stats(p, row + r, live ? m[r] : A{}, live ? scale[r] : A{}, truth.u[r]);
                }
            }
            if (p.lse) {
                Vec<A> const lse = truth.live ? m + log_sum : Vec<A>{};
                store_partial(p.lse + row, lse, n);
            }
            if (grad) {
                tile_gradient(p, dense, truth, scale, broadcast(p.gradient_scale), tile);
                unpack_tile(tile, grad, p.stride.grad, args.grad_class_stride, n, classes);
            }
        });
    return total.total();
}

template <class T, class Dense, class TileDense>
void backward_by_tile(const Problem<T, Dense>& p, const TileDense& tile_dense, std::int64_t begin,
                      std::int64_t end) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    const Args& args = p.args;
    for_each_tile(p, tile_dense, begin, end,
                  [&](std::int64_t row, int n, A* tile, const TileDense& dense, T* grad) {
                      TrueClasses<A> truth = true_classes(p, row, n);
                      Vec<A> m{}, scale{}, upstream{};
                      for (int r = 0; r < n; ++r) {
                          const A* const stats = p.stats_of(row + r);
                          m[r] = stats[0];
                          scale[r] = stats[1];
                          truth.u[r] = stats[2];
                          upstream[r] = p.upstream(row + r);
                      }
                      for (std::int64_t c = 0; c < args.classes; ++c) {
                          store(tile + c * L, exp(load(tile + c * L) - m));
                      }
                      tile_gradient(p, dense, truth, scale, upstream, tile);
                      unpack_tile(tile, grad, p.stride.grad, args.grad_class_stride, n,
                                  args.classes);
                  });
}

// ---- Entry points: from runtime kinds to types ----

// Calls f(problem, dense part as a tile reads it).
template <class F>
auto with_problem(const Args& args, F f) {
    return dispatch(args.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = acc_t<T>;
        const A* const weight = static_cast<const A*>(args.weight);
        double const classes = static_cast<double>(args.classes);
        A const per_class = static_cast<A>(args.label_smoothing / classes);
        if (args.target_kind == TargetKind::index) {
            return f(make_problem<T>(args, NoDense<A>{}), NoDense<A>{});
        }
        if (args.target_kind == TargetKind::smoothed_index) {
            double const mass = args.weight_sum * (args.label_smoothing / classes);
            SmoothDense<A> const dense{weight, per_class, static_cast<A>(mass)};
            return f(make_problem<T>(args, dense), dense);
        }
        A const keep = static_cast<A>(1.0 - args.label_smoothing);
        ProbabilityDense<A, A> const tile_dense{nullptr, weight, keep, per_class};
        auto probability = [&](auto target_tag) {
            using Stored = typename decltype(target_tag)::type;
            ProbabilityDense<A, Stored> const dense{
                static_cast<const Stored*>(args.target_probability), weight, keep, per_class};
            return f(make_problem<T>(args, dense), tile_dense);
        };
        // A probability is stored as the logits are, or in the type they are computed in.
        return args.target_dtype == args.dtype ? probability(Tag<T>{}) : probability(Tag<A>{});
    });
}

double forward(const Args& args, std::int64_t begin, std::int64_t end) {
    return with_problem(args, [&](const auto& problem, auto tile_dense) {
        return problem.walks_by_row() ? forward_by_row(problem, begin, end)
                                      : forward_by_tile(problem, tile_dense, begin, end);
    });
}

void backward(const Args& args, std::int64_t begin, std::int64_t end) {
    with_problem(args, [&](const auto& problem, auto tile_dense) {
        if (problem.walks_by_row()) {
            backward_by_row(problem, begin, end);
        } else {
            backward_by_tile(problem, tile_dense, begin, end);
        }
        return 0;
    });
}

TargetScan scan_targets(const Args& args, std::int64_t begin, std::int64_t end) {
    const std::int64_t* const target = args.target_index;
    std::int64_t counted = 0;
    std::int64_t invalid = 0;
    for (std::int64_t row = begin; row < end; ++row) {
        bool const counts = target[row] != args.ignore_index;
        bool const in_range =
            static_cast<std::uint64_t>(target[row]) < static_cast<std::uint64_t>(args.classes);
        counted += counts;
        invalid += counts & !in_range;
    }
    TargetScan scan{static_cast<double>(counted), -1};
    if (invalid > 0) {
        for (std::int64_t row = begin; scan.first_invalid < 0; ++row) {
            bool const in_range = target[row] >= 0 && target[row] < args.classes;
            if (target[row] != args.ignore_index && !in_range) scan.first_invalid = row;
        }
    } else if (args.weight) {
        bool const wide = args.dtype == DType::float64;
        CompensatedSum sum;
        for (std::int64_t row = begin; row < end; ++row) {
            if (target[row] == args.ignore_index) continue;
            sum.add(wide ? static_cast<const double*>(args.weight)[target[row]]
                         : static_cast<const float*>(args.weight)[target[row]]);
        }
        scan.weight_sum = sum.total();
    }
    return scan;
}

}  // namespace

extern const CpuKernels kernels{scan_targets, forward, backward};

}  // namespace fusedstep::cross_entropy::FUSEDSTEP_LEVEL

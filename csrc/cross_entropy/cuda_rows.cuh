// Cross-entropy on CUDA. A group of threads shares a row: a few lanes of a warp, a warp, a block,
// or a cluster of blocks; cuda_plan.h says when. Between the first look at a row, for its maximum,
// and the last, for its gradient, each thread keeps its part of the row
//
//   in registers      a few classes: logits are read once
//   in shared memory  16-byte vectors, copied there past the registers: logits are read once, and
//                     those of the next row while the gradient of this one is written
//   nowhere           the row is read twice, the second time mostly from a cache
//
// A grid is at most as large as what is resident at once, and groups take row after row. Where a
// grid has more than one block, blocks exchange what all of them need (the divisor of a mean before
// the rows, the losses after them) and wait for each other in between, so that a reduced loss and
// its gradient take one launch. Every sum is taken in an order that depends on sizes and on the
// device alone.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/cuda_launch.h"
#include "core/cuda_math.cuh"
#include "core/cuda_pieces.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_shared.cuh"
#include "core/cuda_vector.cuh"
#include "core/dtype.h"
#include "cross_entropy/cuda_entry.h"
#include "cross_entropy/cuda_plan.h"
#include "cross_entropy/math.h"

// Code for older devices must not name clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FUSEDSTEP_HAS_CLUSTERS 0
#else
#define FUSEDSTEP_HAS_CLUSTERS 1
#endif

namespace fusedstep::cross_entropy {
namespace {

namespace cg = cooperative_groups;

constexpr std::int64_t kNoFault = INT64_MAX;

struct Larger {
    template <class V>
    __device__ __forceinline__ V operator()(V a, V b) const {
        return larger(a, b);
    }
};
struct Least {
    __device__ __forceinline__ std::int64_t operator()(std::int64_t a, std::int64_t b) const {
        return a < b ? a : b;
    }
};

// ---- A row in memory ----

struct Offsets {
    std::int64_t logits;
    std::int64_t grad;
    std::int64_t target;
};

__device__ __forceinline__ Offsets row_offsets(const Args& args, std::int64_t row) {
    Offsets at{};
    for (int d = args.row_dims - 1; d >= 0; --d) {
        std::int64_t const i = d == 0 ? row : row % args.row_sizes[d];
        if (d > 0) row /= args.row_sizes[d];
        at.logits += i * args.logits_row_strides[d];
        at.grad += i * args.grad_row_strides[d];
        at.target += i * args.target_row_strides[d];
    }
    return at;
}

// ---- Targets ----

// The true class of a row of an index target.
template <class A, class Index>
struct Truth {
    Index index;  // -1 where the target is ignored or out of range, or is no index
    bool live;    // false: ignored
    bool fault;
    A u;  // u_y, less its dense part; NaN where the target is out of range. backward has it from
          // stats
};

template <class A, class Index>
__device__ __forceinline__ Truth<A, Index> true_class(const Args& args, std::int64_t row) {
    if (args.target_kind == TargetKind::probability) return {-1, true, false, A{}};
    std::int64_t const y = args.target_index[row];
    if (y == args.ignore_index) return {-1, false, false, A{}};
    if (y < 0 || y >= args.classes) return {-1, true, true, static_cast<A>(NAN)};
    return {static_cast<Index>(y), true, false, A{}};
}

template <class A>
__device__ __forceinline__ A class_weight(const Args& args, std::int64_t y) {
    return args.weight ? static_cast<const A*>(args.weight)[y] : A{1};
}

// The dense part of the target vector u of one row: label smoothing or probabilities.
template <class T>
struct Dense {
    using A = acc_t<T>;

    const Args& args;
    std::int64_t target_row;  // offset of the row's probabilities
    A keep;
    A per_class;

    __device__ __forceinline__ Dense(const Args& args_, std::int64_t target_row_)
        : args(args_),
          target_row(target_row_),
          keep(static_cast<A>(1.0 - args_.label_smoothing)),
          per_class(static_cast<A>(args_.label_smoothing / static_cast<double>(args_.classes))) {}

    // u of the classes [c, c + n).
    template <int n>
    __device__ __forceinline__ void read(std::int64_t c, A (&u)[n]) const {
        const A* const weight = static_cast<const A*>(args.weight);
        if (args.target_kind == TargetKind::smoothed_index) {
#pragma unroll
            for (int k = 0; k < n; ++k) u[k] = weight ? per_class * weight[c + k] : per_class;
            return;
        }
        if (args.target_dtype == args.dtype) {
            read_probabilities(static_cast<const T*>(args.target_probability), c, u);
        } else {
            read_probabilities(static_cast<const A*>(args.target_probability), c, u);
        }
#pragma unroll
        for (int k = 0; k < n; ++k) {
            u[k] = probability_coefficient(u[k], weight ? weight[c + k] : A{1}, keep, per_class);
        }
    }

private:
    template <class Stored, int n>
    __device__ __forceinline__ void read_probabilities(const Stored* target, std::int64_t c,
                                                       A (&u)[n]) const {
        const Stored* const from = target + target_row + c * args.target_class_stride;
        if constexpr (n == kVectorLanes<Stored>) {
            if (args.target_class_stride == 1 && is_vector_aligned(from)) {
                Vector<Stored> const vector = load_vector(from);
#pragma unroll
                for (int k = 0; k < n; ++k) u[k] = to_acc(vector.lane[k]);
                return;
            }
        }
#pragma unroll
        for (int k = 0; k < n; ++k) u[k] = to_acc(from[k * args.target_class_stride]);
    }
};

// The mathematics of a row's numbers.
template <class T>
struct RowMath {
    __device__ __forceinline__ static acc_t<T> exp(acc_t<T> x) { return exponential<T>(x); }
    __device__ __forceinline__ static acc_t<T> log(acc_t<T> x) { return natural_log(x); }
    __device__ __forceinline__ static acc_t<T> fmadd(acc_t<T> a, acc_t<T> b, acc_t<T> c) {
        return fused_multiply_add(a, b, c);
    }
};

// ---- A group of threads that share a row ----

// Sums over the classes of a row: value[0] is S; value[1] and value[2] are the U and L of the dense
// part of u, where there is one.
template <class A, bool kDense>
struct Sums {
    A value[kDense ? 3 : 1]{};

    __device__ __forceinline__ A target_sum() const { return kDense ? value[kDense ? 1 : 0] : A{}; }
    __device__ __forceinline__ A target_dot() const { return kDense ? value[kDense ? 2 : 0] : A{}; }
};

template <class A, bool kDense>
struct Shared {
    A max[1][kMaxWarps];
    A sums[kDense ? 3 : 1][kMaxWarps];
    A cluster_max;
    Sums<A, kDense> cluster_sums;
    double weight[1][kMaxWarps];
    double loss[1][kMaxWarps];
    std::int64_t fault[1][kMaxWarps];
};

// Lanes of a warp.
template <class A, bool kDense>
struct LaneGroup {
    int size;

    __device__ __forceinline__ LaneGroup(int group, Shared<A, kDense>&) : size(group) {}
    __device__ __forceinline__ int member() const { return static_cast<int>(threadIdx.x) % size; }
    __device__ __forceinline__ int members() const { return size; }
    __device__ __forceinline__ int stage_begin(int pieces) const {
        int const thread = static_cast<int>(threadIdx.x);
        return thread / size * size * pieces + thread % size;
    }
    __device__ __forceinline__ int stage_step() const { return size; }
    // Groups of a block take adjacent rows.
    __device__ __forceinline__ std::int64_t first_row() const {
        return std::int64_t{blockIdx.x} * (blockDim.x / size);
    }
    __device__ __forceinline__ std::int64_t row_in_block() const { return threadIdx.x / size; }
    __device__ __forceinline__ std::int64_t row_step() const {
        return std::int64_t{gridDim.x} * (blockDim.x / size);
    }
    __device__ __forceinline__ A max(A value) const { return reduce_lanes(value, size, Larger{}); }
    __device__ __forceinline__ void add(Sums<A, kDense>& sums) const {
#pragma unroll
        for (A& value : sums.value) value = reduce_lanes(value, size, Add{});
    }
    __device__ __forceinline__ void leave() const {}
};

// A block, or a cluster of blocks.
template <class A, bool kDense>
struct BlockGroup {
    Shared<A, kDense>& shared;
    unsigned rank = 0;  // of the block in its cluster
    unsigned blocks = 1;

    __device__ __forceinline__ BlockGroup(int, Shared<A, kDense>& shared_) : shared(shared_) {
#if FUSEDSTEP_HAS_CLUSTERS
        rank = cg::this_cluster().block_rank();
        blocks = cg::this_cluster().num_blocks();
#endif
    }
    __device__ __forceinline__ int member() const {
        return static_cast<int>(rank * blockDim.x + threadIdx.x);
    }
    __device__ __forceinline__ int members() const { return static_cast<int>(blocks * blockDim.x); }
    __device__ __forceinline__ int stage_begin(int) const { return static_cast<int>(threadIdx.x); }
    __device__ __forceinline__ int stage_step() const { return static_cast<int>(blockDim.x); }
    __device__ __forceinline__ std::int64_t first_row() const { return blockIdx.x / blocks; }
    __device__ __forceinline__ std::int64_t row_in_block() const { return 0; }
    __device__ __forceinline__ std::int64_t row_step() const { return gridDim.x / blocks; }

    // max() and add() alternate, and each has a barrier between its writes and its reads of shared
    // memory: whoever writes for the next row has passed the other one's barrier, behind which
    // nobody still reads.
    __device__ __forceinline__ A max(A value) const {
        A values[1] = {value};
        reduce_block(values, shared.max, Larger{});
#if FUSEDSTEP_HAS_CLUSTERS
        if (blocks > 1) {
            auto const cluster = cg::this_cluster();
            if (threadIdx.x == 0) shared.cluster_max = values[0];
            cluster.sync();
            for (unsigned r = 0; r < blocks; ++r) {
                values[0] = larger(values[0], *cluster.map_shared_rank(&shared.cluster_max, r));
            }
        }
#endif
        return values[0];
    }
    __device__ __forceinline__ void add(Sums<A, kDense>& sums) const {
        reduce_block(sums.value, shared.sums, Add{});
#if FUSEDSTEP_HAS_CLUSTERS
        if (blocks > 1) {
            auto const cluster = cg::this_cluster();
            if (threadIdx.x == 0) shared.cluster_sums = sums;
            cluster.sync();
            sums = Sums<A, kDense>{};
            for (unsigned r = 0; r < blocks; ++r) {
                const auto& other = *cluster.map_shared_rank(&shared.cluster_sums, r);
#pragma unroll
                for (int i = 0; i < (kDense ? 3 : 1); ++i) sums.value[i] += other.value[i];
            }
        }
#endif
    }
    // Nobody may go while others read its shared memory.
    __device__ __forceinline__ void leave() const {
#if FUSEDSTEP_HAS_CLUSTERS
        if (blocks > 1) cg::this_cluster().sync();
#endif
    }
};

// ---- What the blocks of a grid tell each other ----

__device__ __forceinline__ void wait_for_grid() {
    if (gridDim.x > 1) cg::this_grid().sync();
}

// 1 / (the weights of all rows that count), the same in every thread. NaN where no row counts.
template <class A, bool kDense>
__device__ __forceinline__ double mean_divisor(const ForwardArgs& a, Shared<A, kDense>& shared) {
    const Args& args = a.args;
    if (args.target_kind == TargetKind::probability) return static_cast<double>(args.rows);
    double weight[1] = {0};
    std::int64_t const step = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < args.rows;
         row += step) {
        std::int64_t const y = args.target_index[row];
        if (y == args.ignore_index || y < 0 || y >= args.classes) continue;
        weight[0] += args.weight ? static_cast<double>(static_cast<const A*>(args.weight)[y]) : 1.0;
    }
    reduce_block(weight, shared.weight, Add{});
    if (gridDim.x > 1) {
        if (threadIdx.x == 0) a.totals[blockIdx.x].weight = weight[0];
        wait_for_grid();
        weight[0] = 0;
        for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
            weight[0] += a.totals[block].weight;
        }
        reduce_block(weight, shared.weight, Add{});
    }
    return weight[0] == 0 ? static_cast<double>(NAN) : weight[0];
}

// Adds up what the blocks found and leaves it where the host asked for it.
template <class A, bool kDense>
__device__ __forceinline__ void finish(const ForwardArgs& a, Shared<A, kDense>& shared,
                                       double thread_loss, std::int64_t thread_fault,
                                       double divisor) {
    double loss[1] = {thread_loss};
    std::int64_t fault[1] = {thread_fault};
    reduce_block(loss, shared.loss, Add{});
    reduce_block(fault, shared.fault, Least{});
    if (gridDim.x > 1) {
        if (threadIdx.x == 0) {
            a.totals[blockIdx.x].loss = loss[0];
            a.totals[blockIdx.x].first_fault = fault[0];
        }
        wait_for_grid();
        if (blockIdx.x > 0) return;
        loss[0] = 0;
        fault[0] = kNoFault;
        for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
            loss[0] += a.totals[block].loss;
            fault[0] = Least{}(fault[0], a.totals[block].first_fault);
        }
        reduce_block(loss, shared.loss, Add{});
        reduce_block(fault, shared.fault, Least{});
    }
    if (threadIdx.x > 0) return;
    if (a.loss) store_scalar(a.loss, a.args.loss_dtype, 0, loss[0] / divisor);
    if (a.args.row_stats) {
        static_cast<A*>(a.args.row_stats)[kRowStats * a.args.rows] = static_cast<A>(1.0 / divisor);
    }
    if (fault[0] != kNoFault && a.fault->found == 0) {
        a.fault->row = fault[0];
        a.fault->target = a.args.target_index[fault[0]];
        a.fault->classes = a.args.classes;
        __threadfence_system();
        a.fault->found = 1;
    }
}

// ---- Forward ----

// One piece of a row joins a thread's sums: exp(x - m), and the dense part of u. What is stored as
// it is computed is left as exp(x - m): see write_gradient.
template <class T, bool kDense, class Row>
__device__ __forceinline__ void add_piece(Sums<acc_t<T>, kDense>& sums, const Row& row,
                                          typename Row::Index piece, typename Row::Piece& values,
                                          acc_t<T> m, const Dense<T>& dense) {
    using A = acc_t<T>;
    A u[Row::kLanes];
    if constexpr (kDense) dense.read(row.first(piece), u);
#pragma unroll
    for (int k = 0; k < Row::kLanes; ++k) {
        A const shifted = to_acc(values.lane[k]) - m;
        A const e = exponential<T>(shifted);
        sums.value[0] += e;
        if constexpr (std::is_same_v<T, A>) values.lane[k] = e;
        if constexpr (kDense) {
            sums.value[1] += u[k];
            sums.value[2] += u[k] * shifted;
        }
    }
}

// Maximum and sums of a thread's part of a row that it does not hold: the sums are relative to
// shift(), and follow the maximum as it grows.
template <class T, bool kDense>
struct Running {
    using A = acc_t<T>;

    A max = -kInfinity<A>;
    Sums<A, kDense> sums;

    // The maximum, or 0 while nothing was finite.
    __device__ __forceinline__ A shift() const { return max == -kInfinity<A> ? A{} : max; }

    __device__ __forceinline__ void raise(A new_max) {
        A const before = shift();
        max = new_max;
        A const difference = before - shift();
        if (difference == A{}) return;
        if (sums.value[0] != A{}) sums.value[0] *= exponential<T>(difference);
        if constexpr (kDense) {
            if (sums.value[1] != A{}) sums.value[2] += sums.value[1] * difference;
        }
    }
};

enum class Kept { registers, shared, nowhere };

// What the gradient of a row is made of.
template <class A, class Index>
struct RowGradient {
    A m;
    A scale;     // softmax_scale() times upstream
    A upstream;  // the derivative of what is returned with respect to this row's loss
    Truth<A, Index> truth;
};

// U p_c times upstream, from a logit or (kDone) from what add_piece left of it.
template <class T, bool kDone>
__device__ __forceinline__ acc_t<T> scaled_softmax(T value, acc_t<T> m, acc_t<T> scale) {
    if constexpr (kDone && std::is_same_v<T, acc_t<T>>) return value * scale;
    return exponential<T>(to_acc(value) - m) * scale;
}

// The gradient of one piece: of logits, or (kDone) of what add_piece left of them. Both products
// are rounded, so that they cancel to zero where they are equal (one class).
template <class T, bool kDense, bool kDone, class Row>
__device__ __forceinline__ void write_gradient(T* grad, std::int64_t grad_stride, const Row& row,
                                               typename Row::Index piece,
                                               const typename Row::Piece& values,
                                               const RowGradient<acc_t<T>, typename Row::Index>& of,
                                               const Dense<T>& dense) {
    using A = acc_t<T>;
    auto const c = row.first(piece);
    bool const has_truth = of.truth.index >= c && of.truth.index - c < Row::kLanes;
    typename Row::Piece gradient;
    A u[Row::kLanes];
    if constexpr (kDense) dense.read(c, u);
#pragma unroll
    for (int k = 0; k < Row::kLanes; ++k) {
        A g = scaled_softmax<T, kDone>(values.lane[k], of.m, of.scale);
        if constexpr (kDense) g -= u[k] * of.upstream;
        gradient.lane[k] = from_acc<T>(g);
    }
    if (has_truth) {  // computed again, to be rounded once
#pragma unroll
        for (int k = 0; k < Row::kLanes; ++k) {
            if (of.truth.index != c + k) continue;
            A const u_c = kDense ? u[k] + of.truth.u : of.truth.u;
            A const g = scaled_softmax<T, kDone>(values.lane[k], of.m, of.scale);
            gradient.lane[k] = from_acc<T>(g - u_c * of.upstream);
        }
    }
    row.store(grad, grad_stride, piece, gradient);
}

// What a thread reads of a row.
template <class Row>
struct RowShare {
    typename Row::Index end;   // of the row's pieces; 0 where it is ignored
    typename Row::Index edge;  // the class that it takes in addition; -1: none
    Lanes<typename Row::Element, 1> at_edge;
};

// A group writes zeros to a row.
template <class T, class Row>
__device__ __forceinline__ void zero_gradient(T* grad, std::int64_t grad_stride, const Row& row,
                                              typename Row::Index begin, typename Row::Index end,
                                              int step, int edge_member) {
    for (auto piece = begin; piece < end; piece += step) {
        row.store(grad, grad_stride, piece, typename Row::Piece{});
    }
    auto const edge = row.edge(edge_member);
    if (edge >= 0) grad[edge] = T{};
}

template <class T, bool kDense, bool kVectors, Kept kKept, template <class, bool> class Group>
__global__ __launch_bounds__(kMaxThreads, min_blocks(sizeof(T))) void forward_kernel(
    const __grid_constant__ ForwardArgs a, int group_size, int stage_pieces) {
    using A = acc_t<T>;
    constexpr bool kOnce = kKept != Kept::nowhere;
    using Index = std::conditional_t<kOnce, int, std::int64_t>;
    using Single = Pieces<T, false, Index>;
    using Row = Pieces<T, kVectors, Index>;
    using Piece = typename Row::Piece;
    constexpr int kAtOnce = kVectors ? 2 : 4;  // reads in flight, of a row that is kept nowhere
    const Args& args = a.args;
    static_assert(sizeof(Shared<A, kDense>) <= kStaticShared);
    auto& shared = block_shared<Shared<A, kDense>>();
    Group<A, kDense> const group(group_size, shared);

    Variant<double> const variant = kDense ? args.variant.for_dense_targets() : args.variant;
    bool const changes_terms = !variant.is_cross_entropy();
    double loss_sum = 0;
    std::int64_t first_fault = kNoFault;

    int const member = group.member();
    int const step = group.members();
    [[maybe_unused]] Piece kept[kHeldElements];
    // Each thread reads only what it wrote itself: no barrier is needed between the two.
    [[maybe_unused]] T* stage = nullptr;
    [[maybe_unused]] int const stage_step = group.stage_step() * Row::kLanes;
    if constexpr (kKept == Kept::shared) {
        stage = dynamic_shared<T>() + group.stage_begin(stage_pieces) * Row::kLanes;
    }
    // Calls f(piece, its values) for what this thread keeps of a row; f may change the values.
    auto const for_each_kept = [&](Index end, auto f) {
        if constexpr (kKept == Kept::registers) {
#pragma unroll
            for (int i = 0; i < kHeldElements; ++i) {
                Index const piece = member + i * step;
                if (piece < end) f(piece, kept[i]);
            }
        } else {
            T* at = stage;
#pragma unroll 4
            for (Index piece = member; piece < end; piece += step) {
                Piece values = bit_cast<Piece>(load_vector(at));
                if (f(piece, values)) *reinterpret_cast<Piece*>(at) = values;
                at += stage_step;
            }
        }
    };
    auto const share_of = [&](const T* x, const Row& pieces, bool live) {
        RowShare<Row> share{live ? pieces.count : 0, live ? pieces.edge(member) : -1,
                            Single::outside()};
        if (share.edge >= 0) {
            share.at_edge = Single(x, args.classes, args.logits_class_stride).load(x, share.edge);
        }
        return share;
    };

    // Of the row whose turn comes next, where rows are kept in shared memory.
    [[maybe_unused]] RowShare<Row> next{0, -1, Single::outside()};
    [[maybe_unused]] const T* next_from = nullptr;  // its first piece
    auto const look_ahead = [&](std::int64_t row) {
        next = {0, -1, Single::outside()};
        if (row >= args.rows) return;
        const T* const x = static_cast<const T*>(args.logits) + row_offsets(args, row).logits;
        Row const pieces(x, args.classes, args.logits_class_stride);
        next = share_of(x, pieces, true_class<A, Index>(args, row).live);
        next_from = x + pieces.first(0);
    };
    // What it reads of that row from `piece` on, for which `to` has room.
    auto const copy_ahead = [&](Index piece, T* to) {
#pragma unroll 4
        for (; piece < next.end; piece += step) {
            copy_async(to, next_from + piece * Row::kLanes);
            to += stage_step;
        }
    };
    if constexpr (kKept == Kept::shared) {
        look_ahead(group.first_row() + group.row_in_block());
        copy_ahead(member, stage);
    }

    double const divisor = a.reduction == Reduction::mean ? mean_divisor<A>(a, shared) : 1.0;
    A const upstream = static_cast<A>(1.0 / divisor);

    for (std::int64_t base = group.first_row(); base < args.rows; base += group.row_step()) {
        std::int64_t const row = base + group.row_in_block();
        bool const present = row < args.rows;
        Offsets const at = row_offsets(args, present ? row : 0);
        auto truth = Truth<A, Index>{-1, false, false, A{}};
        if (present) truth = true_class<A, Index>(args, row);
        if (truth.index >= 0) {
            truth.u = index_coefficient(class_weight<A>(args, truth.index),
                                        static_cast<A>(args.label_smoothing));
        }
        Dense<T> const dense(args, at.target);
        const T* const x = static_cast<const T*>(args.logits) + at.logits;
        Row const pieces(x, args.classes, args.logits_class_stride);
        Single const singles(x, args.classes, args.logits_class_stride);
        RowShare<Row> share = kKept == Kept::shared ? next : share_of(x, pieces, truth.live);
        Index const end = share.end;
        Index const edge = share.edge;
        typename Single::Piece& at_edge = share.at_edge;

        A m;
        Sums<A, kDense> sums;
        if constexpr (kOnce) {
            A most = largest(at_edge, -kInfinity<A>);
            if constexpr (kKept == Kept::shared) {
                wait_for_copies();
            } else {
                for_each_kept(end, [&](Index piece, Piece& values) {
                    values = pieces.load(x, piece);
                    return true;
                });
            }
            for_each_kept(end, [&](Index, Piece& values) {
                most = largest(values, most);
                return false;
            });
            m = group.max(most);
            for_each_kept(end, [&](Index piece, Piece& values) {
                add_piece<T, kDense>(sums, pieces, piece, values, m, dense);
                return std::is_same_v<T, A>;
            });
            if (edge >= 0) add_piece<T, kDense>(sums, singles, edge, at_edge, m, dense);
            // Here, for the target to have arrived when it is asked what it is.
            if constexpr (kKept == Kept::shared) look_ahead(row + group.row_step());
        } else {
            Running<T, kDense> running;
            for (Index first = member; first < end; first += kAtOnce * step) {
                Piece values[kAtOnce];
                pieces.load(x, first, static_cast<Index>(step), end, values);
                A most = running.max;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) most = largest(values[i], most);
                running.raise(most);
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    Index const piece = first + i * step;
                    if (!kDense || piece < end) {
                        add_piece<T, kDense>(running.sums, pieces, piece, values[i],
                                             running.shift(), dense);
                    }
                }
            }
            if (edge >= 0) {
                auto values = at_edge;
                running.raise(largest(values, running.max));
                add_piece<T, kDense>(running.sums, singles, edge, values, running.shift(), dense);
            }
            m = group.max(running.max);
            running.raise(m);
            sums = running.sums;
        }
        group.add(sums);

        A const exp_sum = sums.value[0];
        RowTerms<A> terms{A{}, truth.u + sums.target_sum(), truth.u};
        // Everyone needs the terms where they are others than cross-entropy's.
        if (truth.live && (member == 0 || changes_terms)) {
            A const log_sum = natural_log(exp_sum);
            A const shifted_y =
                truth.index >= 0 ? to_acc(x[truth.index * args.logits_class_stride]) - m : A{};
            terms.loss =
                row_loss<RowMath<T>>(terms.softmax, log_sum, sums.target_dot(), truth.u, shifted_y);
            if (changes_terms && !truth.fault) {
                A const weight = truth.index >= 0 ? class_weight<A>(args, truth.index) : A{1};
                RowSums<A> const of{m, exp_sum, log_sum, shifted_y, weight};
                change_terms<RowMath<T>>(terms, of, variant.to<A>());
                truth.u = terms.truth;
            }
        }
        A const softmax = softmax_scale(terms.softmax, exp_sum);
        if (present && member == 0) {
            if (args.row_losses) store_scalar(args.row_losses, args.loss_dtype, row, terms.loss);
            if (args.row_stats) {
                A* const stats = static_cast<A*>(args.row_stats) + kRowStats * row;
                stats[0] = truth.live ? m : A{};
                stats[1] = truth.live ? softmax : A{};
                stats[2] = truth.u;
            }
            if (args.row_lse) {
                A const lse = truth.fault ? truth.u : m + natural_log(exp_sum);
                static_cast<A*>(args.row_lse)[row] = truth.live ? lse : A{};
            }
            loss_sum += terms.loss;
            if (truth.fault && first_fault == kNoFault) first_fault = row;
        }
        // What is kept of a row makes room for the next one, piece by piece.
        [[maybe_unused]] Index copied = member;
        [[maybe_unused]] T* room = stage;
        if (args.grad && present) {
            T* const grad = static_cast<T*>(args.grad) + at.grad;
            std::int64_t const stride = args.grad_class_stride;
            RowGradient<A, Index> const of{m, softmax * upstream, upstream, truth};
            if (!truth.live) {
                zero_gradient(grad, stride, pieces, static_cast<Index>(member), pieces.count, step,
                              member);
            } else if constexpr (kKept == Kept::shared) {
#pragma unroll 4
                for (; copied < end; copied += step) {
                    Piece const values = bit_cast<Piece>(load_vector(room));
                    write_gradient<T, kDense, true>(grad, stride, pieces, copied, values, of,
                                                    dense);
                    if (copied < next.end) copy_async(room, next_from + copied * Row::kLanes);
                    room += stage_step;
                }
            } else if constexpr (kOnce) {
                for_each_kept(end, [&](Index piece, Piece& values) {
                    write_gradient<T, kDense, true>(grad, stride, pieces, piece, values, of, dense);
                    return false;
                });
            } else {
                for_each_loaded<kAtOnce>(pieces, x, static_cast<Index>(member), end,
                                         static_cast<Index>(step),
                                         [&](Index piece, const Piece& values) {
                                             write_gradient<T, kDense, false>(
                                                 grad, stride, pieces, piece, values, of, dense);
                                         });
            }
            if (edge >= 0) {
                write_gradient<T, kDense, kOnce>(grad, stride, singles, edge, at_edge, of, dense);
            }
        }
        if constexpr (kKept == Kept::shared) copy_ahead(copied, room);
    }
    group.leave();
    finish(a, shared, loss_sum, first_fault, divisor);
}

// ---- Backward ----

// Recomputes the gradient from row_stats. `group_size` threads of a block share `segment` pieces of
// a row, of which each row has `segments`.
template <class T, bool kDense, bool kVectors>
__global__ __launch_bounds__(kMaxThreads, min_blocks(sizeof(T))) void backward_kernel(
    const __grid_constant__ BackwardArgs a, int group_size, std::int64_t segment,
    std::int64_t segments) {
    using A = acc_t<T>;
    using Single = Pieces<T, false, std::int64_t>;
    using Row = Pieces<T, kVectors, std::int64_t>;
    constexpr int kAtOnce = kVectors ? 2 : 4;  // reads in flight
    const Args& args = a.args;
    if (a.keep_if_one && load_scalar(args.grad_output, a.grad_output_dtype, 0) == 1) return;

    const A* const stats = static_cast<const A*>(args.row_stats);
    A const scale = stats[kRowStats * args.rows];
    int const member = static_cast<int>(threadIdx.x) % group_size;
    std::int64_t const groups = blockDim.x / group_size;
    std::int64_t const work = args.rows * segments;
    for (std::int64_t item = blockIdx.x * groups + threadIdx.x / group_size; item < work;
         item += gridDim.x * groups) {
        std::int64_t const row = item / segments;
        std::int64_t const part = item % segments;
        Offsets const at = row_offsets(args, row);
        const A* const of_row = stats + kRowStats * row;
        auto truth = true_class<A, std::int64_t>(args, row);
        A const softmax = truth.fault ? truth.u : of_row[1];
        if (truth.index >= 0) truth.u = of_row[2];
        Dense<T> const dense(args, at.target);
        const T* const x = static_cast<const T*>(args.logits) + at.logits;
        T* const grad = static_cast<T*>(args.grad) + at.grad;
        std::int64_t const stride = args.grad_class_stride;
        Row const pieces(x, args.classes, args.logits_class_stride);
        Single const singles(x, args.classes, args.logits_class_stride);

        A const upstream = scale * static_cast<A>(load_scalar(args.grad_output, a.grad_output_dtype,
                                                              row * args.grad_output_stride));
        RowGradient<A, std::int64_t> const of{of_row[0], softmax * upstream, upstream, truth};
        std::int64_t const begin = part * segment + member;
        std::int64_t const limit = (part + 1) * segment;
        std::int64_t const end = limit < pieces.count ? limit : pieces.count;
        int const edge_member = part == 0 ? member : INT_MAX;
        if (!truth.live) {
            zero_gradient(grad, stride, pieces, begin, end, group_size, edge_member);
            continue;
        }
        for_each_loaded<kAtOnce>(pieces, x, begin, end, std::int64_t{group_size},
                                 [&](std::int64_t piece, const typename Row::Piece& values) {
                                     write_gradient<T, kDense, false>(grad, stride, pieces, piece,
                                                                      values, of, dense);
                                 });
        std::int64_t const edge = pieces.edge(edge_member);
        if (edge >= 0) {
            write_gradient<T, kDense, false>(grad, stride, singles, edge, singles.load(x, edge), of,
                                             dense);
        }
    }
}

// ---- Launches, for one type of logits ----

template <class T, bool kDense>
cudaError_t launch_forward(const ForwardArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
    Plan plan = forward_plan(a.args, limits);
    auto const kernel = [&plan] {
        switch (plan.walk) {
            case Walk::lanes:
                return forward_kernel<T, kDense, false, Kept::registers, LaneGroup>;
            case Walk::warp:
                return forward_kernel<T, kDense, true, Kept::shared, LaneGroup>;
            case Walk::block:
                return forward_kernel<T, kDense, true, Kept::shared, BlockGroup>;
            case Walk::stream:
                return forward_kernel<T, kDense, true, Kept::nowhere, BlockGroup>;
            case Walk::stream_column:
                return forward_kernel<T, kDense, false, Kept::nowhere, LaneGroup>;
            case Walk::stream_strided:
                break;
        }
        return forward_kernel<T, kDense, false, Kept::nowhere, BlockGroup>;
    }();
    if (cudaError_t const error = allow_shared(plan.shape, kStaticShared, limits, kernel)) {
        return error;
    }
    if (plan.shape.cluster > 1) {
        // How many clusters fit depends on how multiprocessors are grouped on this device.
        int clusters = 0;
        if (cudaError_t const error = resident_clusters(plan.shape, kernel, &clusters)) {
            return error;
        }
        auto const resident = static_cast<unsigned>(clusters) * plan.shape.cluster;
        if (resident < plan.shape.blocks) plan.shape.blocks = resident;
    }
    plan.shape.cooperative = plan.shape.blocks > 1;
    return launch(plan.shape, stream, kernel, a, plan.group, plan.stage_pieces);
}

template <class T, bool kDense>
cudaError_t launch_backward(const BackwardArgs& a, const DeviceLimits& limits,
                            cudaStream_t stream) {
    BackwardPlan const plan = backward_plan(a.args, limits);
    auto const kernel =
        plan.vectors ? backward_kernel<T, kDense, true> : backward_kernel<T, kDense, false>;
    return launch(plan.shape, stream, kernel, a, plan.group, plan.segment, plan.segments);
}

}  // namespace

// The table of one type of logits; cuda_<type>.cu instantiates it.
template <class T>
CudaKernels cuda_kernels_of() {
    return {launch_forward<T, false>, launch_forward<T, true>, launch_backward<T, false>,
            launch_backward<T, true>};
}

}  // namespace fusedstep::cross_entropy

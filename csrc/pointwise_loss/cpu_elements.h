// The pointwise losses on the CPU, compiled once per instruction-set level. Two walks over the same
// maths, both of which read each operand once:
//
//   adjacent  operands of one type whose elements follow one another, a reduced loss: straight from
//             and to memory
//   packed    everything else: blocks of elements are converted into scratch that stays in the
//             first cache, computed there, and converted back
#pragma once

#include "core/compensated_sum.h"
#include "core/vec.h"
#include "core/vec_math.h"
#include "pointwise_loss/math.h"
#include "pointwise_loss/pointwise_loss.h"

namespace fusedstep::pointwise_loss::FUSEDSTEP_LEVEL {
namespace {

using namespace ::fusedstep::FUSEDSTEP_LEVEL;

struct VectorMath {
    template <class V>
    using Number = std::remove_cvref_t<decltype(V{}[0])>;
    template <class V>
    static FUSEDSTEP_VEC Sum<V> exp(V x) {
        return exp_sum(x);
    }
    template <class V>
    static FUSEDSTEP_VEC V fmadd(V a, V b, V c) {
        return ::fusedstep::FUSEDSTEP_LEVEL::fmadd(a, b, c);
    }
};

template <class T>
FUSEDSTEP_VEC Vec<acc_t<T>> load_partial_or_whole(const T* p, std::int64_t n) {
    return n == kLanes<acc_t<T>> ? load(p) : load_partial(p, n);
}

template <class T>
FUSEDSTEP_VEC void store_partial_or_whole(T* p, Vec<acc_t<T>> v, std::int64_t n) {
    n == kLanes<acc_t<T>> ? store(p, v) : store_partial(p, v, n);
}

// ---- Where the elements are ----

struct Offsets {
    std::int64_t input, target, weight, pos_weight, grad, loss, grad_output;
};

// Splits [begin, end) into runs along the last dimension: f(elements, offsets of the first).
template <class F>
void for_each_run(const Args& args, std::int64_t begin, std::int64_t end, F f) {
    std::int64_t const inner = args.sizes[args.dims - 1];
    for (std::int64_t element = begin; element < end;) {
        Offsets at{};
        std::int64_t rest = element;
        for (int d = args.dims - 1; d >= 0; --d) {
            std::int64_t const i = rest % args.sizes[d];
            rest /= args.sizes[d];
            at.input += i * args.input.strides[d];
            at.target += i * args.target.strides[d];
            at.weight += i * args.weight.strides[d];
            at.pos_weight += i * args.pos_weight.strides[d];
            at.grad += i * args.grad.strides[d];
            at.loss += i * args.loss.strides[d];
            at.grad_output += i * args.grad_output.strides[d];
        }
        std::int64_t const left = inner - element % inner;
        std::int64_t const n = left < end - element ? left : end - element;
        f(n, at);
        element += n;
    }
}

// ---- The adjacent walk ----

template <class A>
FUSEDSTEP_VEC Reciprocal<Vec<A>> broadcast_scale(const Args& args) {
    return {broadcast(static_cast<A>(args.derivative_scale.high)),
            broadcast(static_cast<A>(args.derivative_scale.low))};
}

// Sums are taken in blocks of vectors, then in double, so that rounding does not grow with n.
template <Kind kind, bool kGrad, class T>
double adjacent_run(const Args& args, const T* input, const T* target, T* grad, std::int64_t n) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    constexpr std::int64_t kBlock = 16 * 4 * L;
    Vec<A> const parameter = broadcast(static_cast<A>(args.parameter));
    Reciprocal<Vec<A>> const scale = broadcast_scale<A>(args);
    Vec<A> const one = broadcast(A{1});
    LaneSum<A> total;
    std::int64_t i = 0;
    while (i + 4 * L <= n) {
        std::int64_t const block_end = i + kBlock < n ? i + kBlock : n;
        Vec<A> sum[4] = {};
        for (; i + 4 * L <= block_end; i += 4 * L) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                std::int64_t const at = i + k * L;
                auto const [loss, derivative] =
                    evaluate<kind, VectorMath>(load(input + at), load(target + at), parameter);
                sum[k] += loss;
                if constexpr (kGrad)
                    store(grad + at, gradient<VectorMath>(kind, derivative, scale, one));
            }
        }
        total.add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    for (; i < n; i += L) {
        std::int64_t const width = n - i < L ? n - i : L;
        auto const [loss, derivative] =
            evaluate<kind, VectorMath>(load_partial_or_whole(input + i, width),
                                       load_partial_or_whole(target + i, width), parameter);
        total.add(first_lanes<A>(width) ? loss : Vec<A>{});
        if constexpr (kGrad) {
            store_partial_or_whole(grad + i, gradient<VectorMath>(kind, derivative, scale, one),
                                   width);
        }
    }
    return total.total();
}

// ---- The packed walk ----

inline constexpr std::int64_t kPacked = 512;

template <class A>
struct Scratch {
    // A multiple of every vector's lanes: what lies behind the last element is computed, not used.
    alignas(64) A input[kPacked], target[kPacked], weight[kPacked], pos_weight[kPacked],
        grad_output[kPacked], loss[kPacked], derivative[kPacked];
};

template <class A>
void pack(const Operand& operand, DType dtype, std::int64_t offset, std::int64_t stride,
          std::int64_t n, A* to) {
    dispatch(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (std::is_same_v<acc_t<T>, A>) {
            const T* const from = static_cast<const T*>(operand.data) + offset;
            if (stride == 0) {
                for (std::int64_t i = 0; i < n; ++i) to[i] = to_acc(*from);
            } else if (stride == 1) {
                constexpr int L = kLanes<A>;
                for (std::int64_t i = 0; i < n; i += L) {
                    store(to + i, load_partial_or_whole(from + i, n - i < L ? n - i : L));
                }
            } else {
                for (std::int64_t i = 0; i < n; ++i) to[i] = to_acc(from[i * stride]);
            }
        }
    });
}

template <class A>
void unpack(const A* from, std::int64_t n, const Operand& operand, DType dtype, std::int64_t offset,
            std::int64_t stride) {
    dispatch(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (std::is_same_v<acc_t<T>, A>) {
            T* const to = static_cast<T*>(operand.data) + offset;
            if (stride == 1) {
                constexpr int L = kLanes<A>;
                for (std::int64_t i = 0; i < n; i += L) {
                    store_partial_or_whole(to + i, load(from + i), n - i < L ? n - i : L);
                }
            } else {
                for (std::int64_t i = 0; i < n; ++i) to[i * stride] = from_acc<T>(from[i]);
            }
        }
    });
}

// Leaves loss and derivative of n elements in scratch.
template <Kind kind, class A>
void evaluate_packed(const Args& args, Scratch<A>& scratch, std::int64_t n) {
    constexpr int L = kLanes<A>;
    Vec<A> parameter = broadcast(static_cast<A>(args.parameter));
    for (std::int64_t i = 0; i < n; i += L) {
        if constexpr (kind == Kind::weighted_bce) parameter = load(scratch.pos_weight + i);
        Point<Vec<A>> point = evaluate<kind, VectorMath>(load(scratch.input + i),
                                                         load(scratch.target + i), parameter);
        if (args.weight.data) {
            point.loss *= load(scratch.weight + i);
            point.derivative *= load(scratch.weight + i);
        }
        store(scratch.loss + i, point.loss);
        store(scratch.derivative + i, point.derivative);
    }
}

// ---- Entry points: from runtime kinds to types ----

// Calls f(scratch with loss and derivative, elements, offsets, offset of the first element of the
// block along the last dimension) for each block of elements [begin, end).
template <class A, class F>
void for_each_packed(const Args& args, std::int64_t begin, std::int64_t end, F f) {
    int const last = args.dims - 1;
    Scratch<A> scratch{};
    for_each_run(args, begin, end, [&](std::int64_t count, const Offsets& at) {
        for (std::int64_t i = 0; i < count; i += kPacked) {
            std::int64_t const n = count - i < kPacked ? count - i : kPacked;
            auto const read = [&](const Operand& operand, DType dtype, std::int64_t offset, A* to) {
                if (!operand.data) return;
                std::int64_t const stride = operand.strides[last];
                pack(operand, dtype, offset + i * stride, stride, n, to);
            };
            read(args.input, args.dtype, at.input, scratch.input);
            read(args.target, args.target_dtype, at.target, scratch.target);
            read(args.weight, args.weight_dtype, at.weight, scratch.weight);
            read(args.pos_weight, args.pos_weight_dtype, at.pos_weight, scratch.pos_weight);
            read(args.grad_output, args.grad_output_dtype, at.grad_output, scratch.grad_output);
            with_kind(args.kind, [&](auto kind) { evaluate_packed<kind(), A>(args, scratch, n); });
            f(scratch, n, at, i);
        }
    });
}

template <class A>
void write_packed(const A* from, std::int64_t n, const Operand& operand, DType dtype,
                  std::int64_t offset, std::int64_t i, int last) {
    std::int64_t const stride = operand.strides[last];
    unpack(from, n, operand, dtype, offset + i * stride, stride);
}

// Leaves the gradient where the derivative was: for a grad_output of 1, or for those in scratch.
template <class A>
void gradient_packed(const Args& args, Scratch<A>& scratch, std::int64_t n, bool by_grad_output) {
    constexpr int L = kLanes<A>;
    Reciprocal<Vec<A>> const scale = broadcast_scale<A>(args);
    for (std::int64_t i = 0; i < n; i += L) {
        Vec<A> const upstream = by_grad_output ? load(scratch.grad_output + i) : broadcast(A{1});
        store(scratch.derivative + i,
              gradient<VectorMath>(args.kind, load(scratch.derivative + i), scale, upstream));
    }
}

template <class A>
double packed_forward(const Args& args, std::int64_t begin, std::int64_t end) {
    constexpr int L = kLanes<A>;
    int const last = args.dims - 1;
    CompensatedSum sum;  // of runs that may be short
    for_each_packed<A>(
        args, begin, end,
        [&](Scratch<A>& scratch, std::int64_t n, const Offsets& at, std::int64_t i) {
            if (args.loss.data) {
                write_packed(scratch.loss, n, args.loss, args.loss_dtype, at.loss, i, last);
            } else {
                LaneSum<A> block;
                for (std::int64_t k = 0; k < n; k += L) {
                    block.add(first_lanes<A>(n - k) ? load(scratch.loss + k) : Vec<A>{});
                }
                sum.add(block.total());
            }
            if (args.grad.data) {
                gradient_packed(args, scratch, n, false);
                write_packed(scratch.derivative, n, args.grad, args.dtype, at.grad, i, last);
            }
        });
    return sum.total();
}

template <class A>
void packed_backward(const Args& args, std::int64_t begin, std::int64_t end) {
    int const last = args.dims - 1;
    for_each_packed<A>(args, begin, end,
                       [&](Scratch<A>& scratch, std::int64_t n, const Offsets& at, std::int64_t i) {
                           gradient_packed(args, scratch, n, true);
                           write_packed(scratch.derivative, n, args.grad, args.dtype, at.grad, i,
                                        last);
                       });
}

double forward(const Args& args, std::int64_t begin, std::int64_t end) {
    if (!args.adjacent || args.target_dtype != args.dtype || args.loss.data) {
        return args.dtype == DType::float64 ? packed_forward<double>(args, begin, end)
                                            : packed_forward<float>(args, begin, end);
    }
    return dispatch(args.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T* const input = static_cast<const T*>(args.input.data) + begin;
        const T* const target = static_cast<const T*>(args.target.data) + begin;
        T* const grad = static_cast<T*>(args.grad.data);
        return with_kind(args.kind, [&](auto kind) {
            return grad ? adjacent_run<kind(), true>(args, input, target, grad + begin, end - begin)
                        : adjacent_run<kind(), false>(args, input, target, grad, end - begin);
        });
    });
}

void backward(const Args& args, std::int64_t begin, std::int64_t end) {
    args.dtype == DType::float64 ? packed_backward<double>(args, begin, end)
                                 : packed_backward<float>(args, begin, end);
}

}  // namespace

extern const CpuKernels kernels{forward, backward};

}  // namespace fusedstep::pointwise_loss::FUSEDSTEP_LEVEL

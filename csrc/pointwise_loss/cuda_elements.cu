// The pointwise losses on CUDA: a grid that is resident at once shares the elements, in vectors of
// 16 bytes where every operand is adjacent and aligned, else one by one. Sums are taken in an order
// that depends on sizes and on the device alone.
#include <cooperative_groups.h>

#include "core/cuda_math.cuh"
#include "core/cuda_pieces.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_shared.cuh"
#include "pointwise_loss/cuda_entry.h"

namespace fusedstep::pointwise_loss {
namespace {

template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? kMinBlocks / 2 : kMinBlocks;
// Vectors of each operand that a thread has in flight; before compute capability 8.0 two do not fit
// the registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kAtOnce = 1;
#else
constexpr int kAtOnce = 2;
#endif

// Full precision, whatever is stored: a loss is computed from few values, so memory is the limit.
struct ScalarMath {
    template <class A>
    using Number = A;
    template <class A>
    struct Sum {
        A high;
        A low;
    };
    template <class A>
    static __device__ __forceinline__ Sum<A> exp(A x) {
        return {exponential<A>(x), A{}};
    }
    template <class A>
    static __device__ __forceinline__ A fmadd(A a, A b, A c) {
        return fused_multiply_add(a, b, c);
    }
};

// Where an element of each operand lies.
__device__ __forceinline__ std::int64_t offset(const Args& args, const Operand& operand,
                                               std::int64_t element) {
    std::int64_t at = 0;
    for (int d = args.dims - 1; d > 0; --d) {
        at += element % args.sizes[d] * operand.strides[d];
        element /= args.sizes[d];
    }
    return at + element * operand.strides[0];
}

template <class A>
__device__ __forceinline__ A read(const Args& args, const Operand& operand, DType dtype,
                                  std::int64_t element) {
    return static_cast<A>(load_scalar(operand.data, dtype, offset(args, operand, element)));
}

template <class A>
__device__ __forceinline__ Reciprocal<A> scale_in(const Args& args) {
    return {static_cast<A>(args.derivative_scale.high), static_cast<A>(args.derivative_scale.low)};
}

// One element, whatever its types and strides.
template <class A>
__device__ __forceinline__ Point<A> point(const Args& args, std::int64_t element) {
    A const x = read<A>(args, args.input, args.dtype, element);
    A const t = read<A>(args, args.target, args.target_dtype, element);
    A const parameter = args.pos_weight.data
                            ? read<A>(args, args.pos_weight, args.pos_weight_dtype, element)
                            : static_cast<A>(args.parameter);
    Point<A> result;
    with_kind(args.kind,
              [&](auto kind) { result = evaluate<kind(), ScalarMath>(x, t, parameter); });
    if (args.weight.data) {
        A const w = read<A>(args, args.weight, args.weight_dtype, element);
        result.loss *= w;
        result.derivative *= w;
    }
    return result;
}

template <class A>
__device__ __forceinline__ void write(const Args& args, const Operand& operand, DType dtype,
                                      std::int64_t element, A value) {
    store_scalar(operand.data, dtype, offset(args, operand, element), value);
}

// One vector of adjacent elements: f(lane, its point) for each.
template <class T, class Piece, class F>
__device__ __forceinline__ void each_point(const Args& args, const Piece& input,
                                           const Piece& target, F f) {
    using A = acc_t<T>;
    A const parameter = static_cast<A>(args.parameter);
    with_kind(args.kind, [&](auto kind) {
#pragma unroll
        for (int k = 0; k < kVectorLanes<T>; ++k) {
            f(k, evaluate<kind(), ScalarMath>(to_acc(input.lane[k]), to_acc(target.lane[k]),
                                              parameter));
        }
    });
}

// The sum over the grid, in thread 0 of block 0.
__device__ __forceinline__ double grid_sum(double value, double* totals,
                                           double (&scratch)[1][kMaxWarps]) {
    double sum[1] = {value};
    reduce_block(sum, scratch, Add{});
    if (gridDim.x == 1) return sum[0];
    if (threadIdx.x == 0) totals[blockIdx.x] = sum[0];
    cooperative_groups::this_grid().sync();
    if (blockIdx.x > 0) return 0;
    sum[0] = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
        sum[0] += totals[block];
    }
    reduce_block(sum, scratch, Add{});
    return sum[0];
}

template <class T, bool kVectors>
__global__ __launch_bounds__(kMaxThreads, kBlocks<T>) void forward_kernel(
    const __grid_constant__ ForwardArgs a) {
    using A = acc_t<T>;
    struct Shared {
        double sum[1][kMaxWarps];
    };
    auto& shared = block_shared<Shared>();
    const Args& args = a.args;
    Reciprocal<A> const scale = scale_in<A>(args);
    std::int64_t const thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    std::int64_t const step = std::int64_t{gridDim.x} * blockDim.x;
    double sum = 0;

    auto const one = [&](std::int64_t element) {
        Point<A> const p = point<A>(args, element);
        sum += p.loss;
        if (args.loss.data) write(args, args.loss, args.loss_dtype, element, p.loss);
        if (args.grad.data) {
            write(args, args.grad, args.dtype, element,
                  gradient<ScalarMath>(args.kind, p.derivative, scale, A{1}));
        }
    };
    if constexpr (kVectors) {
        auto* const input = static_cast<const T*>(args.input.data);
        auto* const target = static_cast<const T*>(args.target.data);
        auto* const grad = static_cast<T*>(args.grad.data);
        auto* const loss = static_cast<T*>(args.loss.data);
        Pieces<T, true, std::int64_t> const pieces(input, args.numel, 1);
        for (std::int64_t first = thread; first < pieces.count; first += kAtOnce * step) {
            Vector<T> x[kAtOnce], t[kAtOnce];
            pieces.load(input, first, step, pieces.count, x);
            pieces.load(target, first, step, pieces.count, t);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                std::int64_t const piece = first + i * step;
                if (piece >= pieces.count) break;
                Vector<T> losses, derivatives;
                A part{};
                each_point<T>(args, x[i], t[i], [&](int k, const Point<A>& p) {
                    part += p.loss;
                    losses.lane[k] = from_acc<T>(p.loss);
                    derivatives.lane[k] =
                        from_acc<T>(gradient<ScalarMath>(args.kind, p.derivative, scale, A{1}));
                });
                sum += part;
                if (loss) pieces.store(loss, 1, piece, losses);
                if (grad) pieces.store(grad, 1, piece, derivatives);
            }
        }
        std::int64_t const edge = pieces.edge(static_cast<int>(thread));
        if (edge >= 0) one(edge);
    } else {
        for (std::int64_t element = thread; element < args.numel; element += step) one(element);
    }
    if (!a.loss) return;
    double const total = grid_sum(sum, a.totals, shared.sum);
    if (thread == 0) store_scalar(a.loss, args.loss_dtype, 0, total / a.divisor);
}

template <class T, bool kVectors>
__global__ __launch_bounds__(kMaxThreads, kBlocks<T>) void backward_kernel(
    const __grid_constant__ BackwardArgs a) {
    using A = acc_t<T>;
    const Args& args = a.args;
    if (a.keep_if_one && load_scalar(args.grad_output.data, args.grad_output_dtype, 0) == 1) return;
    Reciprocal<A> const scale = scale_in<A>(args);
    std::int64_t const thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    std::int64_t const step = std::int64_t{gridDim.x} * blockDim.x;

    auto const one = [&](std::int64_t element) {
        A const upstream = read<A>(args, args.grad_output, args.grad_output_dtype, element);
        write(args, args.grad, args.dtype, element,
              gradient<ScalarMath>(args.kind, point<A>(args, element).derivative, scale, upstream));
    };
    if constexpr (kVectors) {
        auto* const input = static_cast<const T*>(args.input.data);
        auto* const target = static_cast<const T*>(args.target.data);
        auto* const grad = static_cast<T*>(args.grad.data);
        auto* const grad_output = static_cast<const T*>(args.grad_output.data);
        bool const is_one_value = args.grad_output.strides[0] == 0;
        A const value = is_one_value
                            ? static_cast<A>(load_scalar(grad_output, args.grad_output_dtype, 0))
                            : A{};
        Pieces<T, true, std::int64_t> const pieces(input, args.numel, 1);
        for (std::int64_t first = thread; first < pieces.count; first += kAtOnce * step) {
            Vector<T> x[kAtOnce], t[kAtOnce], upstream[kAtOnce];
            pieces.load(input, first, step, pieces.count, x);
            pieces.load(target, first, step, pieces.count, t);
            if (!is_one_value) pieces.load(grad_output, first, step, pieces.count, upstream);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                std::int64_t const piece = first + i * step;
                if (piece >= pieces.count) break;
                Vector<T> derivatives;
                each_point<T>(args, x[i], t[i], [&](int k, const Point<A>& p) {
                    A const factor = is_one_value ? value : to_acc(upstream[i].lane[k]);
                    derivatives.lane[k] =
                        from_acc<T>(gradient<ScalarMath>(args.kind, p.derivative, scale, factor));
                });
                pieces.store(grad, 1, piece, derivatives);
            }
        }
        std::int64_t const edge = pieces.edge(static_cast<int>(thread));
        if (edge >= 0) one(edge);
    } else {
        for (std::int64_t element = thread; element < args.numel; element += step) one(element);
    }
}

// Whether an operand can be read or written in vectors together with the input.
bool fits_vectors(const Args& args, const Operand& operand) {
    auto const alignment = [](const void* pointer) {
        return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes;
    };
    return !operand.data ||
           (operand.strides[0] == 1 && alignment(operand.data) == alignment(args.input.data));
}

bool has_vectors(const Args& args) {
    return args.adjacent && args.target_dtype == args.dtype && fits_vectors(args, args.target) &&
           fits_vectors(args, args.grad);
}

}  // namespace

cudaError_t forward(const ForwardArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
    const Args& args = a.args;
    bool const vectors = has_vectors(args) && fits_vectors(args, args.loss) &&
                         (!args.loss.data || args.loss_dtype == args.dtype);
    unsigned const count = blocks(args.numel, item_size(args.dtype), limits);
    LaunchShape const shape{
        .blocks = count, .threads = kThreads, .cooperative = count > 1 && a.loss != nullptr};
    return dispatch(args.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return launch(shape, stream, vectors ? forward_kernel<T, true> : forward_kernel<T, false>,
                      a);
    });
}

cudaError_t backward(const BackwardArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
    const Args& args = a.args;
    bool const is_one_value = args.grad_output.strides[0] == 0;
    bool const vectors =
        has_vectors(args) && (is_one_value || (args.grad_output_dtype == args.dtype &&
                                               fits_vectors(args, args.grad_output)));
    LaunchShape const shape{.blocks = blocks(args.numel, item_size(args.dtype), limits),
                            .threads = kThreads};
    return dispatch(args.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return launch(shape, stream, vectors ? backward_kernel<T, true> : backward_kernel<T, false>,
                      a);
    });
}

}  // namespace fusedstep::pointwise_loss

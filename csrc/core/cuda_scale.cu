#include "core/cuda_pieces.cuh"
#include "core/cuda_scale.h"

namespace fusedstep {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kAtOnce = 4;  // vectors that a thread has in flight

template <class T>
__global__ __launch_bounds__(kMaxThreads,
                             kMinBlocks) void scale_kernel(const __grid_constant__ ScaleArgs a) {
    using A = acc_t<T>;
    A const factor = static_cast<A>(load_scalar(a.grad_output, a.grad_output_dtype, 0));
    if (factor == A{1}) return;
    T* const grad = static_cast<T*>(a.grad);
    Pieces<T, true, std::int64_t> const pieces(grad, a.numel, 1);
    int const thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    std::int64_t const step = std::int64_t{gridDim.x} * blockDim.x;
    for_each_loaded<kAtOnce>(pieces, grad, std::int64_t{thread}, pieces.count, step,
                             [&](std::int64_t piece, Vector<T>& values) {
#pragma unroll
                                 for (T& value : values.lane) {
                                     value = from_acc<T>(to_acc(value) * factor);
                                 }
                                 pieces.store(grad, 1, piece, values);
                             });
    std::int64_t const edge = pieces.edge(thread);
    if (edge >= 0) grad[edge] = from_acc<T>(to_acc(grad[edge]) * factor);
}

}  // namespace

cudaError_t scale(const ScaleArgs& args, const DeviceLimits& limits, cudaStream_t stream) {
    auto const launch_for = [&](auto tag) {
        using T = typename decltype(tag)::type;
        std::int64_t const wanted = args.numel / (kThreads * kVectorLanes<T>)+1;
        std::int64_t const resident =
            std::int64_t{limits.multiprocessors} * (kResidentThreads / kThreads);
        auto const blocks = static_cast<unsigned>(wanted < resident ? wanted : resident);
        return launch({.blocks = blocks, .threads = kThreads}, stream, scale_kernel<T>, args);
    };
    return args.dtype == DType::float64 ? launch_for(Tag<double>{}) : launch_for(Tag<float>{});
}

}  // namespace fusedstep

// The CUDA entry points of this room. All pointers are to memory of the device, all work is
// enqueued on the stream, nothing waits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda_launch.h"
#include "pointwise_loss/pointwise_loss.h"

namespace fusedstep::pointwise_loss {

inline constexpr unsigned kThreads = 256;

struct ForwardArgs {
    Args args;
    void* loss;      // the reduced loss, in args.loss_dtype; null where args.loss is there
    double divisor;  // of the reduced loss
    double* totals;  // one for each of max_blocks()
};

struct BackwardArgs {
    Args args;
    // args.grad already is the gradient for a grad_output of 1 (one value): where that is what it
    // is, nothing is done.
    bool keep_if_one;
};

// Blocks enough for the elements, at most as many as are resident at once: 64-bit values take twice
// as many registers.
constexpr unsigned blocks(std::int64_t numel, std::int64_t item_size, const DeviceLimits& limits) {
    std::int64_t const wanted = numel * item_size / (kThreads * kVectorBytes) + 1;
    std::int64_t const resident = std::int64_t{limits.multiprocessors} *
                                  (kResidentThreads / kThreads) / (item_size == 8 ? 2 : 1);
    return static_cast<unsigned>(wanted < resident ? wanted : resident);
}

// The number of blocks that forward() may launch.
constexpr std::int64_t max_blocks(const Args& args, const DeviceLimits& limits) {
    return blocks(args.numel, item_size(args.dtype), limits);
}

// Losses, their reduction and, where args.grad is there, the gradient: one launch.
cudaError_t forward(const ForwardArgs& a, const DeviceLimits& limits, cudaStream_t stream);

// The gradient, recomputed from the operands and grad_output: one launch.
cudaError_t backward(const BackwardArgs& a, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fusedstep::pointwise_loss

// The CUDA entry points of this room: what they take beside the contract's Args. All pointers are
// to memory of the device, all work is enqueued on the stream, nothing waits.
//
// Unlike on the CPU nobody has seen the class indices before: a row whose index is out of range
// gets a loss and a gradient of NaN, and is written down in `fault`. Args::gradient_scale and
// Args::weight_sum are not read: the device computes its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/reduction.h"
#include "cross_entropy/cross_entropy.h"

namespace fusedstep::cross_entropy {

// A class index out of range; in memory of the host that the device can write. The first one stays
// until the host takes it away.
struct TargetFault {
    std::int64_t row;
    std::int64_t target;
    std::int64_t classes;
    std::int32_t found;
};

// What each block of a grid tells the others.
struct BlockTotals {
    double weight;
    double loss;
    std::int64_t first_fault;  // a row; none: kNoFault
};

struct ForwardArgs {
    Args args;
    Reduction reduction;
    void* loss;           // the reduced loss, in args.loss_dtype; null for none
    BlockTotals* totals;  // one for each of max_blocks()
    TargetFault* fault;   // null for probabilities
};

struct BackwardArgs {
    Args args;
    DType grad_output_dtype;
    // args.grad already is the gradient for a grad_output of 1 (one value): where that is what it
    // is, nothing is done.
    bool keep_if_one;
};

// The launches for one type of logits, without and with a dense part of the target vector.
struct CudaKernels {
    cudaError_t (*forward)(const ForwardArgs&, const DeviceLimits&, cudaStream_t);
    cudaError_t (*forward_dense)(const ForwardArgs&, const DeviceLimits&, cudaStream_t);
    cudaError_t (*backward)(const BackwardArgs&, const DeviceLimits&, cudaStream_t);
    cudaError_t (*backward_dense)(const BackwardArgs&, const DeviceLimits&, cudaStream_t);
};
extern const CudaKernels cuda_float32, cuda_float64, cuda_bfloat16, cuda_float16;

// The number of blocks that forward() may launch.
std::int64_t max_blocks(const Args& args, const DeviceLimits& limits);

// Loss, its reduction and, where args.grad is given, the gradient: one launch. Also leaves the
// gradient's scale behind row_stats, where these are given.
cudaError_t forward(const ForwardArgs& args, const DeviceLimits& limits, cudaStream_t stream);

// The gradient, recomputed from logits, row_stats and grad_output: one launch.
cudaError_t backward(const BackwardArgs& args, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fusedstep::cross_entropy

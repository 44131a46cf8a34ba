// The contract between the torch side of this room and its kernels: plain pointers, sizes and
// strides (in elements), nothing else.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/dtype.h"
#include "pointwise_loss/math.h"

namespace fusedstep::pointwise_loss {

inline constexpr int kMaxDims = 8;

// Elements are those of the input in its order in memory; torch.cpp merges dimensions wherever all
// operands allow, so that one is left in practice.
struct Operand {
    void* data;  // read only but for loss and grad; null: not there
    std::int64_t strides[kMaxDims];
};

struct Args {
    Kind kind;
    double parameter;  // smooth_l1's beta, huber's delta
    std::int64_t numel;
    int dims;  // >= 1
    std::int64_t sizes[kMaxDims];
    // There is one dimension, along which input, target and gradient have stride 1, and there is
    // neither weight nor pos_weight.
    bool adjacent;

    DType dtype;  // of input and grad
    // Each is dtype, or float32 where that is of 16 bits.
    DType target_dtype;
    DType weight_dtype;
    DType pos_weight_dtype;
    DType loss_dtype;
    Operand input;
    Operand target;
    Operand weight;      // multiplies the loss of each element; only of a binary cross-entropy
    Operand pos_weight;  // there for weighted_bce
    Operand grad;        // the gradient with respect to the input; absent: not wanted
    Operand loss;        // of each element; absent: reduced

    Reciprocal<double> derivative_scale;  // as derivative_scale() makes it

    // backward only: gradient of the loss, in grad_output_dtype; strides of 0 where it is one
    // value.
    Operand grad_output;
    DType grad_output_dtype;
};

// What the derivatives of evaluate() are to be multiplied by where the loss is divided by
// `divisor`, in two numbers of the type that dtype is computed in. Both are above 0, so that their
// products with an infinite derivative are the same infinity, and the sum of these is no NaN. A
// parameter of smooth_l1 is from 2^-64 to 2^64.
Reciprocal<double> derivative_scale(Kind kind, double parameter, double divisor, DType dtype);

// Work is split into chunks of this many elements, whatever the number of threads: that, and a sum
// over chunks in order, makes the result the same bits for any number of threads.
inline constexpr std::int64_t kChunk = 16384;

struct CpuKernels {
    // Computes elements [begin, end) and returns the sum of their losses (0 when loss is there).
    double (*forward)(const Args&, std::int64_t begin, std::int64_t end);
    // Writes grad of elements [begin, end) from grad_output.
    void (*backward)(const Args&, std::int64_t begin, std::int64_t end);
};
FUSEDSTEP_DECLARE_LEVELS(CpuKernels)

const CpuKernels& cpu_kernels();

}  // namespace fusedstep::pointwise_loss

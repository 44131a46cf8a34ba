// The contract between the torch side of this room and its kernels: plain pointers, sizes and
// strides (in elements), nothing else.
#pragma once

#include <cstdint>
#include <limits>

#include "core/cpu_level.h"
#include "core/dtype.h"
#include "cross_entropy/math.h"

namespace fusedstep::cross_entropy {

enum class TargetKind {
    index,           // int64 class indices
    smoothed_index,  // int64 class indices with label smoothing
    probability,     // one probability per class, in the logits' dtype or in float32
};

// Rows are the positions a loss is computed at: (N, d1, ..., dK) flattened, last dimension fastest.
// torch.cpp merges dimensions wherever all operands allow, so one or two are left in practice.
inline constexpr int kMaxRowDims = 8;

// A lane of 32 bits holds a class index.
inline constexpr std::int64_t kMaxClasses = std::numeric_limits<std::int32_t>::max();

// Numbers of a row in Args::row_stats.
inline constexpr std::int64_t kRowStats = 3;

struct Args {
    std::int64_t rows;
    std::int64_t classes;  // 1 to kMaxClasses
    int row_dims;          // >= 1
    std::int64_t row_sizes[kMaxRowDims];

    // Logits; read only. dtype is that of the logits and of the gradient.
    DType dtype;
    const void* logits;
    std::int64_t logits_class_stride;
    std::int64_t logits_row_strides[kMaxRowDims];

    // Targets. Indices are contiguous, one per row. On the CPU each is either ignore_index or in
    // [0, classes): scan_targets() has seen them. (cuda_entry.h says what holds on CUDA.)
    TargetKind target_kind;
    const std::int64_t* target_index;
    std::int64_t ignore_index;
    DType target_dtype;
    const void* target_probability;
    std::int64_t target_class_stride;
    std::int64_t target_row_strides[kMaxRowDims];

    const void* weight;      // one per class, contiguous, in acc_t; null: all one
    double weight_sum;       // of label smoothing: over all classes (classes where weight is null)
    double label_smoothing;  // in [0, 1]
    Variant<double> variant;

    // Multiplies the gradient: 1 / (sum of the rows' weights) for a mean, else 1.
    double gradient_scale;

    // Gradient with respect to the logits; null when none is wanted.
    void* grad;
    std::int64_t grad_class_stride;
    std::int64_t grad_row_strides[kMaxRowDims];

    // Loss of each row, contiguous, in loss_dtype; null when it is reduced.
    DType loss_dtype;
    void* row_losses;

    // Per row {m, E, u_y} in acc_t, adjacent: all that a backward needs to recompute the gradient
    // (E exp(x_c - m) - u_c) upstream. u_y is what the true class of an index target has beside the
    // dense part of u; zeros for an ignored row. Null when not wanted (forward); read by backward,
    // to which any numbers are welcome whose exp(x_c - m) is finite.
    void* row_stats;

    // log sum_c exp x_c of each row, contiguous, in acc_t; 0 for an ignored row. Null when not
    // wanted.
    void* row_lse;

    // backward only: gradient of the loss, in acc_t, one value (stride 0) or one per row (stride
    // 1).
    const void* grad_output;
    std::int64_t grad_output_stride;
};

// Work is split into chunks of this many rows, whatever the number of threads: that, and a sum over
// chunks in order, makes the result the same bits for any number of threads.
std::int64_t rows_per_chunk(std::int64_t rows, std::int64_t classes);

struct TargetScan {
    double weight_sum;           // sum of the weights of rows that are not ignored
    std::int64_t first_invalid;  // first row in range whose target is out of range, or -1
};

struct CpuKernels {
    // Looks at class-index targets of rows [begin, end); writes nothing.
    TargetScan (*scan_targets)(const Args&, std::int64_t begin, std::int64_t end);
    // Computes rows [begin, end) and returns the sum of their losses (0 when row_losses is set).
    double (*forward)(const Args&, std::int64_t begin, std::int64_t end);
    // Writes grad of rows [begin, end) from row_stats and grad_output.
    void (*backward)(const Args&, std::int64_t begin, std::int64_t end);
};
FUSEDSTEP_DECLARE_LEVELS(CpuKernels)

const CpuKernels& cpu_kernels();

}  // namespace fusedstep::cross_entropy

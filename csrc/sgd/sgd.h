// The contract between the torch side of this room and its kernels: plain pointers and sizes,
// nothing else.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/dtype.h"
#include "core/multi_tensor.h"

namespace fusedstep::sgd {

// Of one parameter group.
struct Hyperparameters {
    double lr;
    double momentum;  // 0: none, and the entries have no buffer
    double dampening;
    double weight_decay;
    bool nesterov;
    bool maximize;
};

// One parameter. Its gradient and its momentum buffer have its dtype and its layout in memory, so
// that element i of one belongs to element i of the others. No two entries overlap: chunks are
// updated in any order, or at the same time.
struct Entry {
    Extent extent;
    void* param;
    void* grad;             // written only where it is unscaled
    void* momentum_buffer;  // null without momentum
    std::int32_t group;     // whose hyperparameters it follows
    DType dtype;
    bool first_step;  // the momentum buffer holds nothing yet
};

struct Step {
    const Hyperparameters* groups;
    const Entry* entries;
    std::int64_t entry_count;
    // What every gradient was multiplied by. Where it is not 1, gradients are divided by it in
    // place, rounded to their dtype, before they are used.
    double grad_scale;
};

struct CpuKernels {
    // Updates the chunks [first, last) of step's entries. Cannot fail.
    void (*update)(const Step& step, std::int64_t first, std::int64_t last);
};
FUSEDSTEP_DECLARE_LEVELS(CpuKernels)

const CpuKernels& cpu_kernels();

}  // namespace fusedstep::sgd

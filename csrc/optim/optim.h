// The contract between the torch side of this room and its kernels: plain pointers and sizes,
// nothing else.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/dtype.h"
#include "core/multi_tensor.h"

namespace fusedstep::optim {

// Of one parameter group.
struct Hyperparameters {
    double lr;
    double momentum;  // 0: none, and the entries have no buffer
    double dampening;
    double weight_decay;
    // On CUDA only: one number in the device's memory that is the learning rate instead of `lr`;
    // null where there is none.
    const void* device_lr;
    DType device_lr_dtype;
    bool nesterov;
    bool maximize;
};

// One parameter. Its gradient and its momentum buffer have its dtype (see EntryPrecision for the
// exception) and its layout in memory, so that element i of one belongs to element i of the others.
// No array overlaps another, of this entry or of one that is updated at the same time: chunks are
// taken in any order.
struct Entry {
    Extent extent;
    void* param;
    void* grad;             // written only where it is unscaled
    void* momentum_buffer;  // null without momentum
    std::int32_t group;     // whose hyperparameters it follows
    DType dtype;
    bool first_step;  // the momentum buffer holds nothing yet
};

enum class Precision : std::uint8_t {
    ordinary,             // rounded to nearest, and no more is known of it
    master_weights,       // of a 16-bit parameter: float32 weights keep what rounding drops
    stochastic_rounding,  // of a bfloat16 parameter: rounded up or down by chance
};

// What becomes of a parameter's rounding errors.
struct EntryPrecision {
    // With master weights, laid out as the parameter is; the momentum buffer is float32 then too.
    // An element that is not the rounded master weight has been changed since: it is the weight.
    float* master_param;
    std::uint64_t key;  // of stochastic rounding; see random_bits()
    Precision precision;
};

struct Step {
    const Hyperparameters* groups;
    std::int64_t group_count;
    const Entry* entries;
    std::int64_t entry_count;
    const EntryPrecision* precisions;  // one per entry; null where all are ordinary
    // What every gradient was multiplied by. Where it is not 1, gradients are divided by it in
    // place, rounded to their dtype, before they are used.
    double grad_scale;
    // On CUDA only: numbers in the device's memory; null where there are none.
    const float* device_grad_scale;  // instead of grad_scale
    // Where it is not 0 nothing changes, except that the buffers of first steps are filled with the
    // zero from which a later step continues as a first one would.
    const float* device_found_inf;
};

struct CpuKernels {
    // Updates the chunks [first, last) of step's entries. Cannot fail.
    void (*update)(const Step& step, std::int64_t first, std::int64_t last);
};
FUSEDSTEP_DECLARE_LEVELS(CpuKernels)

const CpuKernels& cpu_kernels();

}  // namespace fusedstep::optim

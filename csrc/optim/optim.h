// The contract between the torch side of the optimizers and their kernels: plain pointers and
// sizes, nothing else. What one optimizer computes is its rule (rules/<name>.h); rules.h lists
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/cpu_level.h"
#include "core/dtype.h"
#include "core/multi_tensor.h"

namespace fusedstep::optim {

// ---- What torch calls the parts of an optimizer, for whatever reads its objects ----

// A learning rate: a number or, on CUDA, one number in the device's memory.
struct LearningRate {
    double value;
    const void* on_device;  // null where there is none
    DType dtype;            // of the number on the device
};

// A number of a parameter group: the double at `offset` of the rule's Hyperparameters.
struct Number {
    const char* key;
    const char* called;  // in errors: "Invalid <called>: nan"
    std::size_t offset;
};

// A boolean of a parameter group: the bool at `offset` of the rule's Hyperparameters.
struct Flag {
    const char* key;
    std::size_t offset;
};

// An array of a parameter's state, one element for each of the parameter's.
struct State {
    const char* key;
    // What a step leaves in it that is skipped before it has held anything: a later step continues
    // from there as a first one would.
    double skipped;
};

inline constexpr std::size_t kMaxStates = 4;
inline constexpr std::size_t kMaxGroupBytes = 96;  // of a rule's Hyperparameters

// ---- One step ----

enum class Storage : std::uint8_t {
    ordinary,             // rounded to nearest, and no more is known of it
    master_weights,       // of a 16-bit parameter: float32 weights keep what rounding drops
    stochastic_rounding,  // of a bfloat16 parameter: rounded up or down by chance
};

// One parameter. Its gradient and its states have its dtype (see EntryStorage for the exception)
// and its layout in memory, so that element i of one belongs to element i of the others. No array
// overlaps another, of this entry or of one that is updated at the same time: chunks are taken in
// any order.
struct Entry {
    Extent extent;
    void* param;
    void* grad;          // written only where it is unscaled
    std::int32_t group;  // whose hyperparameters it follows
    DType dtype;
    bool first_step;           // the states hold nothing yet
    void* states[kMaxStates];  // in the order of the rule's; null for those that it does without
};

// How a parameter is kept.
struct EntryStorage {
    // With master weights, laid out as the parameter is; the states are float32 then too. An
    // element that is not the rounded master weight has been changed since: it is the weight.
    float* master_param;
    std::uint64_t key;  // of stochastic rounding; see random_bits()
    Storage storage;
};

struct Step {
    const void* groups;  // the rule's Hyperparameters, one for each parameter group
    std::int64_t group_count;
    const Entry* entries;
    std::int64_t entry_count;
    const EntryStorage* storages;  // one per entry; null where all are ordinary
    // What every gradient was multiplied by. Where it is not 1, gradients are divided by it in
    // place, rounded to their dtype, before they are used.
    double grad_scale;
    // On CUDA only: numbers in the device's memory; null where there are none.
    const float* device_grad_scale;  // instead of grad_scale
    // Where it is not 0 nothing changes, except that the states of first steps are filled with
    // State::skipped.
    const float* device_found_inf;
};

// Updates the chunks [first, last) of step's entries. Cannot fail.
using CpuUpdate = void (*)(const Step& step, std::int64_t first, std::int64_t last);

}  // namespace fusedstep::optim

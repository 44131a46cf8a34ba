// A parameter that is about to become an entry of a step: what is found of it, and whether the
// kernels cover it.
#pragma once

#include <array>
#include <cstdint>

#include "optim/torch/dtensor.h"
#include "optim/torch/groups.h"
#include "torch_glue/plain.h"

namespace fusedstep::optim {

// What an entry points to: held, because without the GIL another thread may drop its own.
struct Tensors {
    HeldTensor param;
    at::Tensor grad;
    std::array<HeldTensor, kMaxStates> states;
    HeldTensor master_param;
};

// The memory of an array.
struct Range {
    std::uintptr_t begin;
    std::uintptr_t end;

    Range() = default;
    Range(const void* data, std::size_t bytes)
        : begin(reinterpret_cast<std::uintptr_t>(data)), end(begin + bytes) {}
    // From a tensor's first element to its last.
    explicit Range(const at::Tensor& tensor);

    bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
    bool operator<(const Range& other) const { return begin < other.begin; }
};

// How a parameter of this dtype is kept; ValueError where it cannot be kept as was asked.
inline Storage storage_of(const at::Tensor& param, const Extensions& extensions) {
    if (!is_narrow(param.scalar_type())) return Storage::ordinary;
    if (extensions.master_weights) return Storage::master_weights;
    if (!extensions.seed) return Storage::ordinary;
    if (param.scalar_type() != at::kBFloat16) {
        throw py::value_error("stochastic_rounding is for bfloat16 parameters, not for float16");
    }
    return Storage::stochastic_rounding;
}

struct Candidate {
    const py::object& object;
    const Optimizer& optimizer;
    const Options& options;
    bool distributed;  // a DTensor
    bool unscale;      // its gradient is to be written
    Tensors tensors{};
    bool same_shape = false;   // as the gradient's
    bool copies_grad = false;  // the gradient has another layout, and the kernels read a copy
    Storage storage{};
    std::uint64_t steps = 0;  // that were rounded stochastically
    Entry entry{};

    bool has_master() const { return storage == Storage::master_weights; }
    bool has_state(std::size_t i) const { return options.states >> i & 1; }
    // Whether a state beside master weights can stay what it is; it is copied otherwise.
    bool is_float_like_param(const HeldTensor& state) const;

    // Each says whether the parameter is covered so far, and raises where neither the kernels nor
    // torch could update it. In this order; nothing is made or written.
    Covered<> find_gradient();
    void check_update();
    Covered<> find_states(PyObject* state);  // of the parameter; null where there is none
    Covered<> check_tensors();
    Covered<> check_memory();
};

}  // namespace fusedstep::optim

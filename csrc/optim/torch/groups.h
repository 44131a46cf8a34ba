// Optimizers as torch's objects show them: the strings of a rule, and what a parameter group says.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "optim/rules.h"
#include "optim/torch/objects.h"
#include "torch_glue/coverage.h"

namespace fusedstep::optim {

// A rule, the strings that torch's objects have for its parts, and its counts. Lives forever.
struct Optimizer {
    explicit Optimizer(std::size_t number);

    std::size_t number;  // of kRules
    const Rule& rule;
    std::vector<PyObject*> numbers;
    std::vector<PyObject*> flags;
    std::vector<PyObject*> states;
    std::string step_name;  // in errors: "SGD.step"
    CallCounter calls;      // updates of one parameter

    // Of every rule, in the order of kRules.
    static const std::vector<Optimizer*>& all();
};

// What fusedstep's own classes add to torch's; of torch's classes nothing.
struct Extensions {
    bool master_weights = false;        // in the state: master_param, and other states in float32
    std::optional<std::uint64_t> seed;  // of stochastic rounding; in the state: step, a count
    bool require_finite = false;        // of every number of a parameter group
};

// What a parameter group says.
struct Options {
    // The rule's Hyperparameters, whose LearningRate comes first, and what is left of the array.
    std::array<std::uint64_t, kMaxGroupBytes / sizeof(std::uint64_t)> group{};
    at::Tensor device_lr;       // the tensor behind LearningRate::on_device
    unsigned states = 0;        // bit i for the rule's states[i]: which its parameters have
    double largest_finite = 0;  // of its numbers, by magnitude

    LearningRate& lr() { return *reinterpret_cast<LearningRate*>(group.data()); }
};

// ValueError for a number that is read here and not finite, if that is required.
Covered<Options> read_options(const Optimizer& optimizer, PyObject* group,
                              const Extensions& extensions);

// Of a parameter: its group, and its place among the parameters of all groups.
struct Membership {
    py::object group;
    std::uint64_t place;
};

// None where it is in no group.
std::optional<Membership> membership(const py::list& param_groups, const py::object& param);

}  // namespace fusedstep::optim

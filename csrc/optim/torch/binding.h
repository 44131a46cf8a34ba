// What the Python module binds of this room.
#pragma once

#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

namespace fusedstep::optim {

// How 16-bit parameters are rounded; without either, to nearest.
struct Rounding {
    bool master_weights = false;        // in the state: master_param and momentum_buffer in float32
    std::optional<std::uint64_t> seed;  // of stochastic rounding; in the state: step, a count
};

// One step of torch.optim.SGD over an optimizer's param_groups and state. Where found_inf is
// neither None nor 0 it does nothing. Gradients are divided by grad_scale first, in place, unless
// it is None. Where the kernels do not cover all parameters with a gradient, it calls
// step_by_torch(optimizer, [(group, [parameter, ...]), ...], grad_scale) to update the others,
// before it updates what they cover: an error that is raised there leaves that as it was.
//
// Of a DTensor the local tensor is updated, if gradient and state lie on its mesh with its
// placements and none of these is a sum (Partial). New state has them too.
//
// On CUDA a step is one launch for each device, and nothing waits for one: a learning rate, a
// grad_scale and a found_inf that lie there are read there. Three cases read found_inf here, and so
// wait: parameters on the CPU, parameters that are not covered, and a first step with momentum and
// dampening.
//
// Everything is checked before anything is written: ValueError for a hyperparameter that is not
// finite, RuntimeError for a gradient or a state that does not fit its parameter, or for new state
// in the capture of a CUDA graph. Parameters that are covered and share memory, or whose gradients
// or states do, are updated one after the other, in their order.
void step(const pybind11::object& optimizer, const pybind11::object& grad_scale,
          const pybind11::object& found_inf, const Rounding& rounding,
          const pybind11::object& step_by_torch);

// The same for one parameter, which has a gradient: once that is used it is None. A parameter that
// is in no group is left alone. RuntimeError where a hook awaits the gradient, as that of
// DistributedDataParallel does, which reduces it over processes.
void step_in_backward(const pybind11::object& optimizer, const pybind11::object& param,
                      const Rounding& rounding, const pybind11::object& step_by_torch);

// RuntimeError where the current stream of the device, if that is a CUDA device, is captured in a
// graph: replays make a parameter's new state, called `name`, again and again.
void refuse_capture(c10::Device device, const std::string& name);

// Sets the grad of every parameter to None.
void zero_grad(const pybind11::list& param_groups);

}  // namespace fusedstep::optim

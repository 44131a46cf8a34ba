// What the Python module binds of this room.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep::sgd {

// One step of torch.optim.SGD over an optimizer's param_groups and state, as Python holds them.
// Where found_inf is neither None nor 0 it does nothing. Gradients are divided by grad_scale first,
// in place, unless it is None. Returns [(group, [parameter, ...]), ...]: the parameters with a
// gradient that the kernels do not cover, untouched.
//
// Of a DTensor the local tensor is updated, if gradient and momentum buffer lie on its mesh with
// its placements and none of these is a sum (Partial). A new momentum buffer has them too.
//
// On CUDA a step is one launch for each device, and nothing waits for one: a learning rate, a
// grad_scale and a found_inf that lie there are read there. Two cases read found_inf here, and so
// wait: parameters on the CPU, and a first step with momentum and dampening.
//
// Everything is checked before anything is written: ValueError for a hyperparameter that is not
// finite, RuntimeError for a gradient or a momentum buffer that does not fit its parameter. An
// update is as if parameters followed one another only where their memory is distinct.
pybind11::list step(const pybind11::list& param_groups, const pybind11::dict& state,
                    const pybind11::object& grad_scale, const pybind11::object& found_inf);

// Sets the grad of every parameter to None.
void zero_grad(const pybind11::list& param_groups);

}  // namespace fusedstep::sgd

// What the Python module binds of this room.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep::sgd {

// One step of torch.optim.SGD over an optimizer's param_groups and state, as Python holds them.
// Gradients are divided by grad_scale first, in place. Returns [(group, [parameter, ...]), ...]:
// the parameters with a gradient that the kernels do not cover, untouched.
//
// Everything is checked before anything is written: ValueError for a hyperparameter that is not
// finite, RuntimeError for a gradient or a momentum buffer that does not fit its parameter. An
// update is as if parameters followed one another only where their memory is distinct.
pybind11::list step(const pybind11::list& param_groups, const pybind11::dict& state,
                    double grad_scale);

// Sets the grad of every parameter to None.
void zero_grad(const pybind11::list& param_groups);

}  // namespace fusedstep::sgd

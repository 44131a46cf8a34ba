// What the Python module binds of the optimizers.
#pragma once

#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include "optim/torch/groups.h"

namespace fusedstep::optim {

// One step of an optimizer over its param_groups and state. Where found_inf is neither None nor 0
// it does nothing. Gradients are divided by grad_scale first, in place, unless it is None. Where
// the kernels do not cover all parameters with a gradient, it calls step_by_torch(optimizer,
// [(group, [parameter, ...]), ...], grad_scale) to update the others, before it updates what they
// cover: an error that is raised there leaves that as it was.
//
// Of a DTensor the local tensor is updated, if gradient and state lie on its mesh with its
// placements and none of these is a sum (Partial). New state has them too.
//
// On CUDA a step is one launch for each device, and nothing waits for one: a learning rate, a
// grad_scale and a found_inf that lie there are read there. Three cases read found_inf here, and so
// wait: parameters on the CPU, parameters that are not covered, and a first step from which a
// skipped one would differ (the rule's first_step_differs).
//
// Everything is checked before anything is written: ValueError for a hyperparameter that is not
// finite, if the extensions require it, RuntimeError for a gradient or a state that does not fit
// its parameter, or for new state in the capture of a CUDA graph. Parameters that are covered and
// share memory, or whose gradients or states do, are updated one after the other, in their order.
void step(Optimizer& rule, const py::object& optimizer, const py::object& grad_scale,
          const py::object& found_inf, const Extensions& extensions,
          const py::object& step_by_torch);

// The same for one parameter, which has a gradient: once that is used it is None. A parameter that
// is in no group is left alone. RuntimeError where a hook awaits the gradient, as that of
// DistributedDataParallel does, which reduces it over processes.
void step_in_backward(Optimizer& rule, const py::object& optimizer, const py::object& param,
                      const Extensions& extensions, const py::object& step_by_torch);

// The keys of the states that the parameters of a group have, those of the rule.
py::list states_of_group(const Optimizer& rule, const py::object& group);

// See plan.h.
void refuse_capture(c10::Device device, const std::string& name);

// Sets the grad of every parameter to None.
void zero_grad(const py::list& param_groups);

}  // namespace fusedstep::optim

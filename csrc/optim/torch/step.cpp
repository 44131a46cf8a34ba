// The entry points: a step, a step of one parameter in backward, zero_grad.
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include "optim/torch/binding.h"
#include "optim/torch/plan.h"

namespace fusedstep::optim {
namespace {

// `left` is what the plan does not cover: by group, parameters.
void carry_out(StepPlan& plan, const py::object& optimizer, const py::list& left,
               const py::object& step_by_torch) {
    plan.prepare();
    if (!left.empty()) step_by_torch(optimizer, left, plan.grad_scale());
    plan.run();
}

// Raises where somebody waits for the gradient: such hooks run after those of the parameter.
void require_nobody_waits(const Optimizer& rule, const at::Tensor& param) {
    auto const accumulator = torch::autograd::impl::try_get_grad_accumulator(param);
    TORCH_CHECK(!accumulator || accumulator->post_hooks().empty(), rule.rule.name,
                "(in_backward=True) would use and drop a gradient that a hook is still waiting "
                "for: that of DistributedDataParallel, say, which is going to average it over "
                "processes; use fully_shard, or step()");
}

}  // namespace

void step(Optimizer& rule, const py::object& optimizer, const py::object& grad_scale,
          const py::object& found_inf, const Extensions& extensions,
          const py::object& step_by_torch) {
    StepPlan plan(rule, states_of(optimizer), grad_scale, found_inf, extensions);
    if (plan.overflowed(false)) return;
    py::list left;
    for (py::handle group : param_groups_of(optimizer)) {
        if (!PyDict_Check(group.ptr())) throw py::type_error("a parameter group is no dict");
        py::list of_group = plan.add_group(group.ptr());
        if (!of_group.empty()) left.append(py::make_tuple(group, std::move(of_group)));
    }
    if (plan.overflowed(!left.empty())) return;
    carry_out(plan, optimizer, left, step_by_torch);
}

void step_in_backward(Optimizer& rule, const py::object& optimizer, const py::object& param,
                      const Extensions& extensions, const py::object& step_by_torch) {
    std::optional<Membership> const found = membership(param_groups_of(optimizer), param);
    if (!found) return;
    require_nobody_waits(rule, THPVariable_Unpack(param.ptr()));
    StepPlan plan(rule, states_of(optimizer), py::none(), py::none(), extensions);
    py::list left;
    if (!plan.add_one(found->group.ptr(), param, found->place)) {
        py::list params;
        params.append(param);
        left.append(py::make_tuple(found->group, std::move(params)));
    }
    carry_out(plan, optimizer, left, step_by_torch);
    drop_grad(param);
}

py::list states_of_group(const Optimizer& rule, const py::object& group) {
    Covered<Options> const options = read_options(rule, group.ptr(), {});
    py::list found;
    for (std::size_t i = 0; i < rule.states.size(); ++i) {
        if (!options || (options->states >> i & 1)) found.append(py::handle(rule.states[i]));
    }
    return found;
}

void zero_grad(const py::list& param_groups) {
    for (py::handle group : param_groups) {
        for_each_param(group.ptr(), [](const py::object& param) {
            if (has_grad(param)) drop_grad(param);
        });
    }
}

}  // namespace fusedstep::optim

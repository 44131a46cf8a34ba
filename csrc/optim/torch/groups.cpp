#include "optim/torch/groups.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "optim/torch/devices.h"
#include "torch_glue/python.h"

namespace fusedstep::optim {
namespace {

template <class Part>
std::vector<PyObject*> interned(std::span<const Part> parts) {
    std::vector<PyObject*> strings;
    for (const Part& part : parts) strings.push_back(PyUnicode_InternFromString(part.key));
    return strings;
}

}  // namespace

Optimizer::Optimizer(std::size_t number_)
    : number(number_),
      rule(kRules[number_]),
      numbers(interned(rule.numbers)),
      flags(interned(rule.flags)),
      states(interned(rule.states)),
      step_name(std::string(rule.name) + ".step"),
      calls(rule.name) {}

const std::vector<Optimizer*>& Optimizer::all() {
    static const std::vector<Optimizer*> optimizers = [] {
        std::vector<Optimizer*> made;
        for (std::size_t i = 0; i < kRuleCount; ++i) made.push_back(new Optimizer(i));
        return made;
    }();
    return optimizers;
}

Covered<Options> read_options(const Optimizer& optimizer, PyObject* group,
                              const Extensions& extensions) {
    const Rule& rule = optimizer.rule;
    bool differentiable = false;
    Options options;
    auto const read = [&](PyObject* key, const char* called) {
        PyObject* const value = get(group, key);
        bool const is_plain = PyFloat_CheckExact(value) || PyLong_CheckExact(value);
        if (!is_plain && THPVariable_Check(value) && THPVariable_Unpack(value).requires_grad()) {
            differentiable = true;
            return 0.0;
        }
        double const number = as_number(value);
        if (std::isfinite(number)) {
            options.largest_finite = std::max(options.largest_finite, std::abs(number));
        } else if (extensions.require_finite) {
            throw py::value_error(std::string("Invalid ") + called + ": " + std::to_string(number));
        }
        return number;
    };
    auto* const bytes = reinterpret_cast<char*>(options.group.data());
    const at::Tensor* const lr = plain_tensor(get(group, keys().lr));
    if (lr && !lr->requires_grad() && is_device_number(*lr)) {
        options.device_lr = *lr;
        options.lr().on_device = lr->const_data_ptr();
        options.lr().dtype = *kernel_dtype(lr->scalar_type());
    } else {
        options.lr().value = read(keys().lr, "learning rate");
    }
    for (std::size_t i = 0; i < rule.numbers.size(); ++i) {
        *reinterpret_cast<double*>(bytes + rule.numbers[i].offset) =
            read(optimizer.numbers[i], rule.numbers[i].called);
    }
    if (differentiable) return not_covered("a hyperparameter that requires a gradient");
    for (std::size_t i = 0; i < rule.flags.size(); ++i) {
        *reinterpret_cast<bool*>(bytes + rule.flags[i].offset) =
            get_flag(group, optimizer.flags[i]);
    }
    options.states = rule.states_of(bytes);
    return options;
}

std::optional<Membership> membership(const py::list& param_groups, const py::object& param) {
    std::uint64_t place = 0;
    for (py::handle group : param_groups) {
        py::object const params = params_of(group.ptr());
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i, ++place) {
            if (PySequence_Fast_GET_ITEM(params.ptr(), i) == param.ptr()) {
                return Membership{py::reinterpret_borrow<py::object>(group), place};
            }
        }
    }
    return std::nullopt;
}

}  // namespace fusedstep::optim

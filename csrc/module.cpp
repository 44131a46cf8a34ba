// The Python module fusedstep._C: thin entry points past the dispatcher, for eager speed.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "core/cpu_level.h"
#include "cross_entropy/binding.h"
#include "pointwise_loss/binding.h"
#include "optim/torch/binding.h"
#include "torch_glue/coverage.h"
#include "torch_glue/python.h"

namespace py = pybind11;

namespace {

using fusedstep::cross_entropy::check_targets;

// Tensors of one call as C++ sees them, if all are plain and nothing is watching calls. Borrowed:
// the call's arguments hold them.
class PlainTensors {
public:
    PlainTensors(std::initializer_list<py::handle> required,
                 std::initializer_list<py::handle> optional)
        : plain_(!at::impl::torch_function_mode_enabled()) {
        for (py::handle object : required) add(object);
        for (py::handle object : optional)
            object.is_none() ? tensors_.push_back(nullptr) : add(object);
    }
    explicit operator bool() const { return plain_; }
    const at::Tensor& required(std::size_t i) const { return *tensors_[i]; }
    std::optional<at::Tensor> optional(std::size_t i) const {
        return tensors_[i] ? std::optional<at::Tensor>(*tensors_[i]) : std::nullopt;
    }

private:
    void add(py::handle object) {
        tensors_.push_back(fusedstep::plain_tensor(object.ptr()));
        plain_ = plain_ && tensors_.back();
    }

    bool plain_;
    c10::SmallVector<const at::Tensor*, 4> tensors_;
};

// A Python number as a T, or none: for what would be rounded to an integer, and for a tensor, whose
// gradient might be wanted.
template <class T>
std::optional<T> number(py::handle object) {
    constexpr bool convert = std::is_floating_point_v<T>;
    py::detail::make_caster<T> caster;
    if (THPVariable_Check(object.ptr()) || !caster.load(object, convert)) return std::nullopt;
    return static_cast<T>(caster);
}

// As the kernels count them; none for another name.
std::optional<std::int64_t> reduction_code(py::handle reduction) {
    if (!PyUnicode_Check(reduction.ptr())) return std::nullopt;
    std::int64_t code = 0;
    for (const char* name : {"none", "mean", "sum"}) {
        if (PyUnicode_CompareWithASCIIString(reduction.ptr(), name) == 0) return code;
        ++code;
    }
    return std::nullopt;
}

// What a loss returns of its numbers, or None where one is missing or torch's own function has to
// run. Other Python threads may run beside it, but for so few elements on the CPU that handing over
// the interpreter takes as long.
template <class Loss, class... Numbers>
py::object computed(const PlainTensors& tensors, Loss loss, std::optional<Numbers>... numbers) {
    constexpr std::int64_t kBrief = 2048;
    if (!tensors || !(numbers.has_value() && ...)) return py::none();
    const at::Tensor& input = tensors.required(0);
    std::optional<py::gil_scoped_release> release;
    if (!input.is_cpu() || input.numel() > kBrief) release.emplace();
    auto result = loss(*numbers...);
    release.reset();
    return result ? py::cast(std::move(*result)) : py::none();
}

py::object cross_entropy(py::handle input, py::handle target, py::handle weight,
                         py::handle reduction, py::handle ignore_index,
                         py::handle label_smoothing) {
    PlainTensors const tensors({input, target}, {weight});
    return computed(
        tensors,
        [&](std::int64_t reduction, std::int64_t ignore_index, double label_smoothing) {
            return fusedstep::cross_entropy::cross_entropy(tensors.required(0), tensors.required(1),
                                                           tensors.optional(2), reduction,
                                                           ignore_index, label_smoothing);
        },
        reduction_code(reduction), number<std::int64_t>(ignore_index),
        number<double>(label_smoothing));
}

py::object cross_entropy_with_lse(py::handle input, py::handle target, py::handle weight,
                                  py::handle reduction, py::handle ignore_index,
                                  py::handle label_smoothing, py::handle z_loss) {
    PlainTensors const tensors({input, target}, {weight});
    return computed(
        tensors,
        [&](std::int64_t reduction, std::int64_t ignore_index, double label_smoothing,
            double z_loss) {
            return fusedstep::cross_entropy::cross_entropy_with_lse(
                tensors.required(0), tensors.required(1), tensors.optional(2), reduction,
                ignore_index, label_smoothing, z_loss);
        },
        reduction_code(reduction), number<std::int64_t>(ignore_index),
        number<double>(label_smoothing), number<double>(z_loss));
}

py::object focal_loss(py::handle input, py::handle target, py::handle gamma, py::handle weight,
                      py::handle reduction, py::handle ignore_index) {
    PlainTensors const tensors({input, target}, {weight});
    return computed(
        tensors,
        [&](double gamma, std::int64_t reduction, std::int64_t ignore_index) {
            return fusedstep::cross_entropy::focal_loss(tensors.required(0), tensors.required(1),
                                                        tensors.optional(2), reduction,
                                                        ignore_index, gamma);
        },
        number<double>(gamma), reduction_code(reduction), number<std::int64_t>(ignore_index));
}

py::object pointwise_loss(py::handle input, py::handle target, py::handle weight,
                          py::handle pos_weight, std::int64_t kind, py::handle reduction,
                          py::handle parameter) {
    PlainTensors const tensors({input, target}, {weight, pos_weight});
    return computed(
        tensors,
        [&](std::int64_t reduction, double parameter) {
            return fusedstep::pointwise_loss::pointwise_loss(
                tensors.required(0), tensors.required(1), tensors.optional(2), tensors.optional(3),
                kind, reduction, parameter);
        },
        reduction_code(reduction), number<double>(parameter));
}

// [(operator, kind of device, runs of the kernels, {reason: calls left to torch}), ...]
py::list call_counts() {
    py::list result;
    for (const fusedstep::Calls& calls : fusedstep::CallCounter::all()) {
        result.append(py::make_tuple(calls.op, calls.device, calls.fused, calls.fell_back));
    }
    return result;
}

void count_fallback(const std::string& op, c10::Device device, const std::string& reason) {
    fusedstep::CallCounter::of(op).fell_back(device, reason);
}

// Gives an autograd node defined here its own Python type, so that printing grad_fn names it.
void register_node_type(const std::type_info& node, const char* name) {
    auto* const type = new PyTypeObject{PyVarObject_HEAD_INIT(nullptr, 0)};  // lives forever
    torch::autograd::_initFunctionPyTypeObject(*type, name, nullptr, nullptr);
    torch::autograd::registerCppFunction(node, type);
}

// The table of optimizers, by name, with what runs each.
void define_optimizers(py::module_& m) {
    using namespace fusedstep::optim;
    using namespace py::literals;
    py::class_<Extensions>(m, "Extensions")
        .def(py::init<bool, std::optional<std::uint64_t>, bool>(), py::kw_only(),
             py::arg("master_weights") = false, py::arg("seed") = py::none(),
             py::arg("require_finite") = false)
        .def_readonly("master_weights", &Extensions::master_weights);
    py::object const make = py::module_::import("types").attr("SimpleNamespace");
    auto const function = [](auto f) {
        return py::cpp_function(torch::wrap_pybind_function(std::move(f)));
    };
    py::dict optimizers;
    for (Optimizer* const rule : Optimizer::all()) {
        py::dict numbers("lr"_a = "learning rate");  // by key, what errors call it
        for (const Number& number : rule->rule.numbers) numbers[number.key] = number.called;
        py::list states;
        for (const State& state : rule->rule.states) states.append(state.key);
        // Functions that know the rule: a method would look it up in its object in every step.
        optimizers[rule->rule.name] = make(
            "name"_a = rule->rule.name, "numbers"_a = numbers, "states"_a = py::tuple(states),
            "states_of"_a =
                function([rule](const py::object& group) { return states_of_group(*rule, group); }),
            "step"_a = function([rule](const py::object& optimizer, const py::object& grad_scale,
                                       const py::object& found_inf, const Extensions& extensions,
                                       const py::object& step_by_torch) {
                step(*rule, optimizer, grad_scale, found_inf, extensions, step_by_torch);
            }),
            "step_in_backward"_a =
                function([rule](const py::object& optimizer, const py::object& param,
                                const Extensions& extensions, const py::object& step_by_torch) {
                    step_in_backward(*rule, optimizer, param, extensions, step_by_torch);
                }));
    }
    m.attr("optimizers") = optimizers;
    m.def("refuse_capture", torch::wrap_pybind_function(&refuse_capture));
    m.def("zero_grad", torch::wrap_pybind_function(&zero_grad));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "fusedstep's compiled core.";
    m.def("cross_entropy", torch::wrap_pybind_function(&cross_entropy));
    m.def("cross_entropy_with_lse", torch::wrap_pybind_function(&cross_entropy_with_lse));
    m.def("cross_entropy_gradient",
          torch::wrap_pybind_function_no_gil(&fusedstep::cross_entropy::cross_entropy_gradient));
    m.def("focal_loss", torch::wrap_pybind_function(&focal_loss));
    m.def("pointwise_loss", torch::wrap_pybind_function(&pointwise_loss));
    m.def("check_targets", torch::wrap_pybind_function_no_gil(&check_targets));
    define_optimizers(m);
    m.def("call_counts", &call_counts);
    m.def("reset_call_counts", &fusedstep::CallCounter::reset_all);
    m.def("count_fallback", torch::wrap_pybind_function(&count_fallback));
    m.def("cpu_capability", [] { return fusedstep::cpu_level_name(fusedstep::cpu_level()); });
    register_node_type(fusedstep::cross_entropy::backward_node_type(), "CrossEntropyBackward0");
    register_node_type(fusedstep::cross_entropy::double_backward_node_type(),
                       "CrossEntropyBackwardBackward0");
    for (auto [node, name] : fusedstep::pointwise_loss::backward_node_types()) {
        register_node_type(*node, name);
    }
    register_node_type(fusedstep::pointwise_loss::double_backward_node_type(),
                       "PointwiseLossBackwardBackward0");
}

// The Python module fusedstep._C: thin entry points past the dispatcher, for eager speed.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "core/cpu_level.h"
#include "cross_entropy/binding.h"
#include "sgd/binding.h"

namespace py = pybind11;

namespace {

using fusedstep::cross_entropy::backward_node_type;
using fusedstep::cross_entropy::check_targets;

// A torch.Tensor or Parameter itself: a subclass may mean something else by its operations.
const at::Tensor* plain_tensor(py::handle object) {
    return THPVariable_CheckExact(object.ptr()) ? &THPVariable_Unpack(object.ptr()) : nullptr;
}

// The loss, or None where torch's own op has to run.
py::object cross_entropy(py::handle input, py::handle target, py::handle weight,
                         std::int64_t reduction, std::int64_t ignore_index,
                         double label_smoothing) {
    const at::Tensor* const logits = plain_tensor(input);
    const at::Tensor* const targets = plain_tensor(target);
    const at::Tensor* const weights = weight.is_none() ? nullptr : plain_tensor(weight);
    if (!logits || !targets || (!weights && !weight.is_none()) ||
        at::impl::torch_function_mode_enabled()) {
        return py::none();
    }
    std::optional<at::Tensor> loss;
    {
        py::gil_scoped_release release;
        loss = fusedstep::cross_entropy::cross_entropy(
            *logits, *targets, weights ? std::optional<at::Tensor>(*weights) : std::nullopt,
            reduction, ignore_index, label_smoothing);
    }
    return loss ? py::cast(std::move(*loss)) : py::none();
}

// Gives an autograd node defined here its own Python type, so that printing grad_fn names it.
void register_node_type(const std::type_info& node, const char* name) {
    auto* const type = new PyTypeObject{PyVarObject_HEAD_INIT(nullptr, 0)};  // lives forever
    torch::autograd::_initFunctionPyTypeObject(*type, name, nullptr, nullptr);
    torch::autograd::registerCppFunction(node, type);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "fusedstep's compiled core.";
    m.def("cross_entropy", torch::wrap_pybind_function(&cross_entropy));
    m.def("check_targets", torch::wrap_pybind_function_no_gil(&check_targets));
    m.def("sgd_step", torch::wrap_pybind_function(&fusedstep::sgd::step));
    m.def("sgd_zero_grad", torch::wrap_pybind_function(&fusedstep::sgd::zero_grad));
    m.def("cpu_capability", [] { return fusedstep::cpu_level_name(fusedstep::cpu_level()); });
    register_node_type(backward_node_type(), "CrossEntropyBackward0");
}

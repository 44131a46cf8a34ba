// SGD for torch: reads an optimizer's parameter groups and state as Python holds them, lists what
// the kernels cover, runs them, and hands the rest back.
#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sgd/binding.h"
#include "sgd/sgd.h"
#include "torch_glue/plain.h"

namespace fusedstep::sgd {
namespace {

namespace py = pybind11;
using at::Tensor;

// ---- Python objects ----

struct Keys {
    PyObject* params = PyUnicode_InternFromString("params");
    PyObject* lr = PyUnicode_InternFromString("lr");
    PyObject* momentum = PyUnicode_InternFromString("momentum");
    PyObject* dampening = PyUnicode_InternFromString("dampening");
    PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
    PyObject* nesterov = PyUnicode_InternFromString("nesterov");
    PyObject* maximize = PyUnicode_InternFromString("maximize");
    PyObject* momentum_buffer = PyUnicode_InternFromString("momentum_buffer");
    PyObject* grad = PyUnicode_InternFromString("grad");
};

const Keys& keys() {
    static const Keys* const interned = new Keys;
    return *interned;
}

// A borrowed reference; null where the dictionary lacks the key.
PyObject* find(PyObject* dict, PyObject* key) {
    PyObject* const value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// A borrowed reference; KeyError where the dictionary lacks the key.
PyObject* get(PyObject* dict, PyObject* key) {
    PyObject* const value = find(dict, key);
    if (value == nullptr) {
        PyErr_SetObject(PyExc_KeyError, key);
        throw py::error_already_set();
    }
    return value;
}

bool get_flag(PyObject* dict, PyObject* key) {
    int const truth = PyObject_IsTrue(get(dict, key));
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
}

// A number, or a tensor of one element; nothing where that element requires a gradient.
std::optional<double> get_number(PyObject* dict, PyObject* key) {
    PyObject* const value = get(dict, key);
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (!PyLong_CheckExact(value) && THPVariable_Check(value) &&
        THPVariable_Unpack(value).requires_grad()) {
        return std::nullopt;
    }
    double const number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

// Calls f with every parameter of a group. f may run Python code.
template <class F>
void for_each_param(PyObject* group, F f) {
    auto const params = py::reinterpret_steal<py::object>(
        PySequence_Fast(get(group, keys().params), "the params of a parameter group are no list"));
    if (!params) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i) {
        f(py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(params.ptr(), i)));
    }
}

bool has_grad(const py::object& param) {
    if (THPVariable_CheckExact(param.ptr())) {
        return THPVariable_Unpack(param.ptr()).unsafeGetTensorImpl()->grad().defined();
    }
    return !param.attr(keys().grad).is_none();
}

// ---- What is covered ----

std::optional<Hyperparameters> read_hyperparameters(PyObject* group) {
    auto const finite = [group](PyObject* key, const char* name) {
        std::optional<double> const number = get_number(group, key);
        if (number && !std::isfinite(*number)) {
            throw py::value_error(std::string("Invalid ") + name + ": " + std::to_string(*number));
        }
        return number;
    };
    std::optional<double> const lr = finite(keys().lr, "learning rate");
    std::optional<double> const momentum = finite(keys().momentum, "momentum value");
    std::optional<double> const dampening = finite(keys().dampening, "dampening value");
    std::optional<double> const weight_decay = finite(keys().weight_decay, "weight_decay value");
    if (!lr || !momentum || !dampening || !weight_decay) return std::nullopt;
    return Hyperparameters{*lr,
                           *momentum,
                           *dampening,
                           *weight_decay,
                           get_flag(group, keys().nesterov),
                           get_flag(group, keys().maximize)};
}

// In this machine's memory, where its strides say, and no dispatch key but an ordinary tensor's has
// a say in what is done with it.
bool is_ordinary(const Tensor& tensor) {
    constexpr c10::DispatchKeySet kOrdinary({
        c10::DispatchKey::CPU,
        c10::DispatchKey::AutogradCPU,
        c10::DispatchKey::ADInplaceOrView,
        c10::DispatchKey::AutocastCPU,
    });
    return kOrdinary.has_all(tensor.key_set());
}

// Ordinary, and to be written outside inference mode: its version can be counted.
bool is_writable(const Tensor& tensor) { return is_ordinary(tensor) && !tensor.is_inference(); }

// Of two tensors of one shape: whether an element has the same offset in both.
bool same_layout(const Tensor& a, const Tensor& b) {
    if (a.is_contiguous() && b.is_contiguous()) return true;
    for (std::int64_t d = 0; d < a.dim(); ++d) {
        if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
    }
    return true;
}

// Raises where neither the kernels nor torch could update the parameter.
void check_update(const Tensor& param, const Tensor& grad, const Hyperparameters& h) {
    TORCH_CHECK(at::is_expandable_to(grad.sizes(), param.sizes()), "a gradient of shape ",
                grad.sizes(), " does not fit its parameter of shape ", param.sizes());
    TORCH_CHECK(c10::canCast(grad.scalar_type(), param.scalar_type()), "a gradient of dtype ",
                grad.scalar_type(), " does not fit its parameter of dtype ", param.scalar_type());
    if (param.layout() == at::kStrided) at::assert_no_internal_overlap(param);
    double const largest = std::max({std::abs(h.lr), std::abs(h.momentum),
                                     std::abs(1.0 - h.dampening), std::abs(h.weight_decay)});
    TORCH_CHECK(largest <= std::numeric_limits<float>::max() ||
                    c10::toRealValueType(param.scalar_type()) == at::kDouble,
                "a hyperparameter of magnitude ", largest, " overflows a parameter of dtype ",
                param.scalar_type());
}

void check_buffer(const Tensor& buffer, const Tensor& param, const Tensor& grad) {
    TORCH_CHECK(buffer.sizes() == grad.sizes(), "a momentum_buffer of shape ", buffer.sizes(),
                " does not fit its gradient of shape ", grad.sizes());
    TORCH_CHECK(c10::canCast(grad.scalar_type(), buffer.scalar_type()) &&
                    c10::canCast(buffer.scalar_type(), param.scalar_type()),
                "a momentum_buffer of dtype ", buffer.scalar_type(),
                " does not fit its parameter of dtype ", param.scalar_type());
}

// ---- One step ----

// What one step does, collected and checked before any of it is done.
class StepPlan {
public:
    StepPlan(const py::dict& state, double grad_scale) : state_(state), grad_scale_(grad_scale) {
        entries_.reserve(16);
        tensors_.reserve(16);
    }

    // Takes in the parameters of a group; returns those with a gradient that are not covered.
    py::list add_group(PyObject* group);
    void run();

private:
    // Those an entry points to: held, because without the GIL another thread may drop its own.
    struct Tensors {
        Tensor param;
        Tensor grad;
        Tensor momentum_buffer;
    };
    struct NewBuffer {
        py::object param;
        py::object momentum_buffer;
    };

    bool add(const py::object& param_object, const Hyperparameters& h);

    const py::dict& state_;
    double const grad_scale_;
    std::vector<Hyperparameters> groups_;
    std::vector<Entry> entries_;
    std::vector<Tensors> tensors_;  // one per entry
    std::vector<NewBuffer> new_buffers_;
    std::int64_t chunks_ = 0;
};

py::list StepPlan::add_group(PyObject* group) {
    std::optional<Hyperparameters> const h = read_hyperparameters(group);
    bool const covered = h && !in_functorch() && !in_dispatch_mode();
    if (covered) groups_.push_back(*h);
    py::list left;
    for_each_param(group, [&](const py::object& param) {
        if (has_grad(param) && !(covered && add(param, *h))) left.append(param);
    });
    return left;
}

// Returns whether the kernels cover it; if so it is part of the plan.
bool StepPlan::add(const py::object& param_object, const Hyperparameters& h) {
    if (!THPVariable_CheckExact(param_object.ptr())) return false;
    const Tensor& param = THPVariable_Unpack(param_object.ptr());
    Tensor grad = param.unsafeGetTensorImpl()->grad();
    if (param.is_nested() || grad.is_nested()) return false;
    check_update(param, grad, h);

    bool const with_momentum = h.momentum != 0;
    Tensor buffer;
    if (with_momentum) {
        PyObject* const of_param = find(state_.ptr(), param_object.ptr());
        if (of_param && !PyDict_Check(of_param)) return false;
        PyObject* const found = of_param ? find(of_param, keys().momentum_buffer) : nullptr;
        if (found && found != Py_None) {
            if (!THPVariable_CheckExact(found)) return false;
            buffer = THPVariable_Unpack(found);
            if (buffer.is_nested()) return false;
            check_buffer(buffer, param, grad);
        }
    }

    std::optional<DType> const dtype = kernel_dtype(param.scalar_type());
    bool const unscale = grad_scale_ != 1;
    if (!dtype || !is_writable(param) || !param.is_non_overlapping_and_dense()) return false;
    if (!(unscale ? is_writable(grad) : is_ordinary(grad)) || grad.sizes() != param.sizes() ||
        grad.scalar_type() != param.scalar_type()) {
        return false;
    }
    bool const first_step = with_momentum && !buffer.defined();
    if (buffer.defined() && (!is_writable(buffer) || !same_layout(param, buffer) ||
                             buffer.scalar_type() != param.scalar_type())) {
        return false;
    }
    if (!same_layout(param, grad)) {
        if (unscale) return false;  // the gradient itself is to change, not a copy
        at::NoGradGuard const no_grad;
        grad = at::empty_like(param).copy_(grad);
    }
    if (first_step) {
        buffer = at::empty_like(param);
        new_buffers_.push_back(
            {param_object, py::reinterpret_steal<py::object>(THPVariable_Wrap(buffer))});
    }

    Entry const entry{{chunks_, param.numel()},
                      param.mutable_data_ptr(),
                      unscale ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr()),
                      buffer.defined() ? buffer.mutable_data_ptr() : nullptr,
                      static_cast<std::int32_t>(groups_.size() - 1),
                      *dtype,
                      first_step};
    chunks_ = entry.extent.end_chunk();
    entries_.push_back(entry);
    tensors_.push_back({param, std::move(grad), std::move(buffer)});
    return true;
}

void StepPlan::run() {
    // A thread takes at least 32,768 elements, as in torch's own elementwise kernels.
    constexpr std::int64_t kGrain = 32768 / kChunk;
    // From a million elements on (half a millisecond from memory) other Python threads may run.
    constexpr std::int64_t kReleaseGil = (std::int64_t{1} << 20) / kChunk;

    Step const step{groups_.data(), entries_.data(), static_cast<std::int64_t>(entries_.size()),
                    grad_scale_};
    {
        std::optional<py::gil_scoped_release> release;
        if (chunks_ >= kReleaseGil) release.emplace();
        at::parallel_for(0, chunks_, kGrain, [&step](std::int64_t first, std::int64_t last) {
            cpu_kernels().update(step, first, last);
        });
    }
    for (const Tensors& written : tensors_) {
        written.param.unsafeGetTensorImpl()->bump_version();
        if (grad_scale_ != 1) written.grad.unsafeGetTensorImpl()->bump_version();
        if (written.momentum_buffer.defined()) {
            written.momentum_buffer.unsafeGetTensorImpl()->bump_version();
        }
    }
    for (const NewBuffer& made : new_buffers_) {
        auto const of_param =  // made by the state where it is missing: it is a defaultdict
            py::reinterpret_steal<py::object>(PyObject_GetItem(state_.ptr(), made.param.ptr()));
        if (!of_param || PyObject_SetItem(of_param.ptr(), keys().momentum_buffer,
                                          made.momentum_buffer.ptr()) != 0) {
            throw py::error_already_set();
        }
    }
}

}  // namespace

py::list step(const py::list& param_groups, const py::dict& state, double grad_scale) {
    StepPlan plan(state, grad_scale);
    py::list leftovers;
    for (py::handle group : param_groups) {
        if (!PyDict_Check(group.ptr())) throw py::type_error("a parameter group is no dict");
        py::list left = plan.add_group(group.ptr());
        if (!left.empty()) leftovers.append(py::make_tuple(group, std::move(left)));
    }
    plan.run();
    return leftovers;
}

void zero_grad(const py::list& param_groups) {
    for (py::handle group : param_groups) {
        if (!PyDict_Check(group.ptr())) throw py::type_error("a parameter group is no dict");
        for_each_param(group.ptr(), [](const py::object& param) {
            if (!has_grad(param)) return;
            if (THPVariable_CheckExact(param.ptr())) {
                THPVariable_Unpack(param.ptr()).mutable_grad().reset();
            } else {
                py::setattr(param, keys().grad, py::none());
            }
        });
    }
}

}  // namespace fusedstep::sgd

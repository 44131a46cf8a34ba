// SGD for torch: reads an optimizer's parameter groups and state as Python holds them, lists what
// the kernels cover, runs them, and hands the rest back.
#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>
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
#include "torch_glue/coverage.h"
#include "torch_glue/cuda.h"
#include "torch_glue/plain.h"

#if defined(FUSEDSTEP_CUDA)
#include <ATen/ops/empty.h>

#include "sgd/cuda_step.h"
#endif

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
    PyObject* local_tensor = PyUnicode_InternFromString("_local_tensor");
    PyObject* device_mesh = PyUnicode_InternFromString("device_mesh");
    PyObject* placements = PyUnicode_InternFromString("placements");
    PyObject* is_partial = PyUnicode_InternFromString("is_partial");
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

// A number, or a tensor of one element, which is read here.
double as_number(PyObject* value) {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    double const number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

// The tensor that a Python object is; null where it is none, or of a subclass.
const Tensor* plain_tensor(PyObject* object) {
    return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
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

// ---- DTensor: the part of a tensor that lies on this rank ----

// torch.distributed.tensor.DTensor; null before something imports it, when no tensor can be one.
PyObject* dtensor_class() {
    static PyObject* found = nullptr;
    if (found == nullptr) {
        PyObject* const modules = PyImport_GetModuleDict();
        PyObject* const module = PyDict_GetItemString(modules, "torch.distributed.tensor");
        if (module != nullptr) found = PyObject_GetAttrString(module, "DTensor");
        PyErr_Clear();  // being imported
    }
    return found;
}

bool is_dtensor(PyObject* object) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object)) == dtensor_class();
}

// The tensor that a kernel reads and writes: a plain tensor itself, what a DTensor holds on this
// rank; null for any other object. Borrowed from the object.
const Tensor* local_tensor(PyObject* object) {
    if (THPVariable_CheckExact(object)) return &THPVariable_Unpack(object);
    if (!is_dtensor(object)) return nullptr;
    return plain_tensor(py::object(py::handle(object).attr(keys().local_tensor)).ptr());
}

// Whether an update of a DTensor is the same update of every local tensor: none is a summand.
bool holds_elements(py::handle dtensor) {
    for (py::handle placement : dtensor.attr(keys().placements)) {
        if (placement.attr(keys().is_partial)().cast<bool>()) return false;
    }
    return true;
}

// Of a DTensor and another object: whether local tensors on one rank hold the same elements.
bool same_placements(py::handle dtensor, py::handle other) {
    auto const same = [&](PyObject* key) { return dtensor.attr(key).equal(other.attr(key)); };
    return is_dtensor(other.ptr()) && same(keys().device_mesh) && same(keys().placements);
}

// ---- What is covered ----

CallCounter calls("SGD");  // updates of one parameter

// In this machine's memory or in CUDA's, where its strides say, and no dispatch key but an ordinary
// tensor's has a say in what is done with it.
bool is_ordinary(const Tensor& tensor) {
    constexpr c10::DispatchKeySet kOrdinary({
        c10::DispatchKey::CPU,
        c10::DispatchKey::AutogradCPU,
        c10::DispatchKey::AutocastCPU,
#if defined(FUSEDSTEP_CUDA)
        c10::DispatchKey::CUDA,
        c10::DispatchKey::AutogradCUDA,
        c10::DispatchKey::AutocastCUDA,
#endif
        c10::DispatchKey::ADInplaceOrView,
    });
    return kOrdinary.has_all(tensor.key_set());
}

bool runs_on_cuda(c10::Device device) {
#if defined(FUSEDSTEP_CUDA)
    return device.type() == kCudaDevice;
#else
    static_cast<void>(device);
    return false;
#endif
}

// The one number of this tensor can stay where it is: a CUDA kernel reads it.
bool is_device_number(const Tensor& tensor) {
    return runs_on_cuda(tensor.device()) && is_ordinary(tensor) && tensor.numel() == 1 &&
           kernel_dtype(tensor.scalar_type());
}

// Of one group; `device_lr` is the tensor behind Hyperparameters::device_lr.
struct Options {
    Hyperparameters h;
    Tensor device_lr;
};

// Numbers that are read here must be finite.
Covered<Options> read_options(PyObject* group) {
    bool differentiable = false;
    auto const read = [&](PyObject* key, const char* name) {
        PyObject* const value = get(group, key);
        bool const is_plain = PyFloat_CheckExact(value) || PyLong_CheckExact(value);
        if (!is_plain && THPVariable_Check(value) && THPVariable_Unpack(value).requires_grad()) {
            differentiable = true;
            return 0.0;
        }
        double const number = as_number(value);
        if (!std::isfinite(number)) {
            throw py::value_error(std::string("Invalid ") + name + ": " + std::to_string(number));
        }
        return number;
    };
    Options options{};
    Hyperparameters& h = options.h;
    const Tensor* const lr = plain_tensor(get(group, keys().lr));
    if (lr && !lr->requires_grad() && is_device_number(*lr)) {
        options.device_lr = *lr;
        h.device_lr = lr->const_data_ptr();
        h.device_lr_dtype = *kernel_dtype(lr->scalar_type());
    } else {
        h.lr = read(keys().lr, "learning rate");
    }
    h.momentum = read(keys().momentum, "momentum value");
    h.dampening = read(keys().dampening, "dampening value");
    h.weight_decay = read(keys().weight_decay, "weight_decay value");
    if (differentiable) return not_covered("a hyperparameter that requires a gradient");
    h.nesterov = get_flag(group, keys().nesterov);
    h.maximize = get_flag(group, keys().maximize);
    return options;
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

// ---- What GradScaler leaves ----

// A number that GradScaler sets on an optimizer: known here, or left on a CUDA device for kernels
// to read.
class ScalerNumber {
public:
    // Anything but a CUDA tensor is read now; None is `otherwise`.
    ScalerNumber(py::handle object, double otherwise) : object_(object) {
        if (object.is_none()) {
            value_ = otherwise;
            return;
        }
        const Tensor* const tensor = plain_tensor(object.ptr());
        if (tensor && is_device_number(*tensor) && tensor->scalar_type() == at::kFloat) {
            on_device_ = *tensor;
        } else {
            value_ = as_number(object.ptr());
        }
    }

    bool is_known() const { return !on_device_.defined(); }

    // Waits for the device, where it lies there.
    void read() {
        if (is_known()) return;
        value_ = as_number(object_.ptr());
        on_device_.reset();
    }

    // Where it is known.
    double value() const { return value_; }

    // In the memory of `device`; undefined where it is known here.
    Tensor on(c10::Device device) const {
        return is_known() || on_device_.device() == device
                   ? on_device_
                   : on_device_.to(at::TensorOptions(device), /*non_blocking=*/true);
    }

private:
    py::handle object_;
    double value_ = 0;
    Tensor on_device_;
};

// ---- One step ----

// What one step does, collected and checked before any of it is done.
class StepPlan {
public:
    StepPlan(const py::dict& state, py::handle grad_scale, py::handle found_inf)
        : state_(state), grad_scale_(grad_scale, 1), found_inf_(found_inf, 0) {}

    // Takes in the parameters of a group; returns those with a gradient that are not covered.
    py::list add_group(PyObject* group);

    // Whether there was an overflow, and nothing is to be done. As far as it is known here: it is,
    // at the price of waiting for the device, where a kernel alone could not do what is right.
    bool overflowed();

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
    // The entries on one device.
    struct Share {
        explicit Share(c10::Device device) : device(device) {}

        c10::Device device;
        c10::SmallVector<Entry, 16> entries;
        c10::SmallVector<Tensors, 16> tensors;  // one per entry
        std::int64_t chunks = 0;
    };

    // Whether gradients are written, as far as is known here.
    bool unscales() const { return !(grad_scale_.is_known() && grad_scale_.value() == 1); }

    Covered<> add(const py::object& param_object, const Options& options);
    Share& share_on(c10::Device device);
    Step step_of(const Share& share) const;
    void run_on_cpu(const Share& share);
    void run_on_cuda(const Share& share);

    const py::dict& state_;
    ScalerNumber grad_scale_;
    ScalerNumber found_inf_;
    c10::SmallVector<Hyperparameters, 2> groups_;
    std::vector<Tensor> learning_rates_;  // on devices
    c10::SmallVector<Share, 1> shares_;
    std::vector<NewBuffer> new_buffers_;
    std::vector<Tensor> dtensors_;  // parameters whose local tensors are updated
    bool on_cpu_ = false;
    bool dampened_first_step_ = false;
};

py::list StepPlan::add_group(PyObject* group) {
    Covered<Options> options = read_options(group);
    if (in_functorch() || in_dispatch_mode()) options = not_covered("a mode that watches calls");
    if (options) {
        groups_.push_back(options->h);
        if (options->device_lr.defined()) learning_rates_.push_back(options->device_lr);
    }
    py::list left;
    for_each_param(group, [&](const py::object& param) {
        if (!has_grad(param)) return;
        Covered<> const answer = options ? add(param, *options) : options.why_not();
        if (answer) return;
        left.append(param);
        calls.fell_back(THPVariable_Unpack(param.ptr()).device(), answer.why_not());
    });
    return left;
}

// A parameter that is covered is part of the plan.
Covered<> StepPlan::add(const py::object& param_object, const Options& options) {
    const Tensor* const local = local_tensor(param_object.ptr());
    if (local == nullptr) return not_covered("a tensor subclass");
    const Tensor& param = *local;
    const Hyperparameters& h = options.h;
    bool const distributed = !THPVariable_CheckExact(param_object.ptr());
    Tensor grad;
    if (distributed) {
        py::object const object = param_object.attr(keys().grad);
        if (!holds_elements(param_object)) return not_covered("a DTensor of partial sums");
        if (!same_placements(param_object, object)) {
            return not_covered("a gradient placed unlike its parameter");
        }
        const Tensor* const local_grad = local_tensor(object.ptr());
        if (local_grad == nullptr) return not_covered("a tensor subclass");
        grad = *local_grad;
    } else {
        grad = param.unsafeGetTensorImpl()->grad();
    }
    if (param.is_nested() || grad.is_nested()) return not_covered("a nested tensor");
    check_update(param, grad, h);

    bool const with_momentum = h.momentum != 0;
    Tensor buffer;
    if (with_momentum) {
        PyObject* const of_param = find(state_.ptr(), param_object.ptr());
        if (of_param && !PyDict_Check(of_param)) return not_covered("a state that is no dict");
        PyObject* const found = of_param ? find(of_param, keys().momentum_buffer) : nullptr;
        if (found && found != Py_None) {
            if (distributed && !same_placements(param_object, found)) {
                return not_covered("a momentum buffer placed unlike its parameter");
            }
            const Tensor* const local_buffer = local_tensor(found);
            if (local_buffer == nullptr || (!distributed && is_dtensor(found))) {
                return not_covered("a momentum buffer of a tensor subclass");
            }
            buffer = *local_buffer;
            if (buffer.is_nested()) return not_covered("a nested tensor");
            check_buffer(buffer, param, grad);
        }
    }

    std::optional<DType> const dtype = kernel_dtype(param.scalar_type());
    bool const unscale = unscales();
    c10::Device const device = param.device();
    auto const is_elsewhere = [device](const Tensor& tensor) {
        return tensor.defined() && tensor.device() != device;
    };
    if (is_elsewhere(grad) || is_elsewhere(buffer) || is_elsewhere(options.device_lr)) {
        return not_covered("a gradient, momentum buffer or lr on another device");
    }
    if (!dtype) return not_covered("a dtype that the kernels do not compute");
    if (grad.is_sparse()) return not_covered("a sparse gradient");
    if (!is_writable(param) || !(unscale ? is_writable(grad) : is_ordinary(grad))) {
        return not_covered("a device or a kind of tensor without kernels");
    }
    if (!param.is_non_overlapping_and_dense()) return not_covered("a strided view as a parameter");
    if (grad.sizes() != param.sizes() || grad.scalar_type() != param.scalar_type()) {
        return not_covered("a gradient of another shape or dtype");
    }
    bool const first_step = with_momentum && !buffer.defined();
    if (buffer.defined() && (!is_writable(buffer) || !same_layout(param, buffer) ||
                             buffer.scalar_type() != param.scalar_type())) {
        return not_covered("a momentum buffer of another dtype or layout");
    }
    if (!same_layout(param, grad)) {
        if (unscale) {  // the gradient itself is to change, not a copy
            return not_covered("a gradient of another layout, to be unscaled in place");
        }
        at::NoGradGuard const no_grad;
        grad = at::empty_like(param).copy_(grad);
    }
    if (first_step) {
        at::NoGradGuard const no_grad;
        auto made = py::reinterpret_steal<py::object>(
            THPVariable_Wrap(at::empty_like(THPVariable_Unpack(param_object.ptr()))));
        buffer = *local_tensor(made.ptr());
        new_buffers_.push_back({param_object, std::move(made)});
        dampened_first_step_ |= h.dampening != 0;
    }

    Share& share = share_on(device);
    Entry const entry{{share.chunks, param.numel()},
                      param.mutable_data_ptr(),
                      unscale ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr()),
                      buffer.defined() ? buffer.mutable_data_ptr() : nullptr,
                      static_cast<std::int32_t>(groups_.size() - 1),
                      *dtype,
                      first_step};
    share.chunks = entry.extent.end_chunk();
    share.entries.push_back(entry);
    share.tensors.push_back({param, std::move(grad), std::move(buffer)});
    if (distributed) dtensors_.push_back(THPVariable_Unpack(param_object.ptr()));
    return covered;
}

StepPlan::Share& StepPlan::share_on(c10::Device device) {
    for (Share& share : shares_) {
        if (share.device == device) return share;
    }
    on_cpu_ |= !runs_on_cuda(device);
    return shares_.emplace_back(device);
}

bool StepPlan::overflowed() {
    // A skipped first step leaves a buffer of zeros, and the next one goes on from there: the same
    // as a first step, unless there is dampening, which first steps know nothing of.
    if (on_cpu_ || dampened_first_step_) found_inf_.read();
    if (on_cpu_) grad_scale_.read();
    return found_inf_.is_known() && found_inf_.value() != 0;
}

Step StepPlan::step_of(const Share& share) const {
    return {groups_.data(),
            static_cast<std::int64_t>(groups_.size()),
            share.entries.data(),
            static_cast<std::int64_t>(share.entries.size()),
            grad_scale_.value(),
            nullptr,
            nullptr};
}

void StepPlan::run_on_cpu(const Share& share) {
    // A thread takes at least 32,768 elements, as in torch's own elementwise kernels.
    constexpr std::int64_t kGrain = 32768 / kChunk;
    // From a million elements on (half a millisecond from memory) other Python threads may run.
    constexpr std::int64_t kReleaseGil = (std::int64_t{1} << 20) / kChunk;

    Step const step = step_of(share);
    std::optional<py::gil_scoped_release> release;
    if (share.chunks >= kReleaseGil) release.emplace();
    at::parallel_for(0, share.chunks, kGrain, [&step](std::int64_t first, std::int64_t last) {
        cpu_kernels().update(step, first, last);
    });
}

#if defined(FUSEDSTEP_CUDA)

constexpr const char* kOp = "SGD.step";

// A step's table in the memory of the device, from when the stream comes to what is enqueued next.
Tensor table_on_device(const Step& step, c10::Device device, cudaStream_t stream) {
    auto const bytes = static_cast<std::int64_t>(table_bytes(step));
    auto const options = at::TensorOptions(at::kByte);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_launch(cudaStreamIsCapturing(stream, &capture), kOp);
    if (capture == cudaStreamCaptureStatusNone) {
        Tensor const staging = at::empty({bytes}, options.pinned_memory(kCudaDevice == at::kCUDA));
        write_table(step, staging.mutable_data_ptr());
        return staging.to(options.device(device), /*non_blocking=*/true);
    }
    // Every replay of the graph copies again, so that its source must live as long as the graph:
    // nobody says how long that is, and it is never freed.
    void* const staging = new_host_visible(table_bytes(step));
    write_table(step, staging);
    Tensor table = at::empty({bytes}, options.device(device));
    check_launch(cudaMemcpyAsync(table.mutable_data_ptr(), staging, table_bytes(step),
                                 cudaMemcpyHostToDevice, stream),
                 kOp);
    return table;
}

void StepPlan::run_on_cuda(const Share& share) {
    CudaGuard const guard(share.device);
    cudaStream_t const stream = current_stream(share.device);
    Tensor const grad_scale = grad_scale_.on(share.device);
    Tensor const found_inf = found_inf_.on(share.device);
    Step step = step_of(share);
    if (grad_scale.defined()) step.device_grad_scale = grad_scale.const_data_ptr<float>();
    if (found_inf.defined()) step.device_found_inf = found_inf.const_data_ptr<float>();
    Tensor const table = table_fits(step) ? Tensor() : table_on_device(step, share.device, stream);
    check_launch(cuda_update(step, table.defined() ? table.const_data_ptr() : nullptr,
                             device_limits(share.device), stream),
                 kOp);
}

#else

void StepPlan::run_on_cuda(const Share&) {}

#endif

void StepPlan::run() {
    for (const Share& share : shares_) {
        runs_on_cuda(share.device) ? run_on_cuda(share) : run_on_cpu(share);
        calls.fused(share.device, static_cast<std::int64_t>(share.entries.size()));
    }
    for (const Share& share : shares_) {
        for (const Tensors& written : share.tensors) {
            written.param.unsafeGetTensorImpl()->bump_version();
            if (unscales()) written.grad.unsafeGetTensorImpl()->bump_version();
            if (written.momentum_buffer.defined()) {
                written.momentum_buffer.unsafeGetTensorImpl()->bump_version();
            }
        }
    }
    for (const Tensor& param : dtensors_) param.unsafeGetTensorImpl()->bump_version();
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

py::list step(const py::list& param_groups, const py::dict& state, const py::object& grad_scale,
              const py::object& found_inf) {
    StepPlan plan(state, grad_scale, found_inf);
    if (plan.overflowed()) return py::list();
    py::list leftovers;
    for (py::handle group : param_groups) {
        if (!PyDict_Check(group.ptr())) throw py::type_error("a parameter group is no dict");
        py::list left = plan.add_group(group.ptr());
        if (!left.empty()) leftovers.append(py::make_tuple(group, std::move(left)));
    }
    if (plan.overflowed()) return py::list();
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

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
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sgd/binding.h"
#include "sgd/math.h"
#include "sgd/sgd.h"
#include "torch_glue/coverage.h"
#include "torch_glue/cuda.h"
#include "torch_glue/plain.h"
#include "torch_glue/python.h"

#if defined(FUSEDSTEP_CUDA)
#include <ATen/ops/empty.h>

#include "sgd/cuda_step.h"
#endif

namespace fusedstep::sgd {
namespace {

namespace py = pybind11;
using at::Tensor;

[[maybe_unused]] constexpr const char* kOp = "SGD.step";

// A thread takes at least so many chunks: 32,768 elements, as in torch's own elementwise kernels.
constexpr std::int64_t kGrain = 32768 / kChunk;

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
    PyObject* master_param = PyUnicode_InternFromString("master_param");
    PyObject* step = PyUnicode_InternFromString("step");
    PyObject* grad = PyUnicode_InternFromString("grad");
    PyObject* local_tensor = PyUnicode_InternFromString("_local_tensor");
    PyObject* device_mesh = PyUnicode_InternFromString("device_mesh");
    PyObject* placements = PyUnicode_InternFromString("placements");
    PyObject* is_partial = PyUnicode_InternFromString("is_partial");
    PyObject* is_replicate = PyUnicode_InternFromString("is_replicate");
    PyObject* get_coordinate = PyUnicode_InternFromString("get_coordinate");
    PyObject* shape = PyUnicode_InternFromString("shape");
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

// A tensor held by its Python object: one more reference from C++ would ask for the interpreter,
// which takes as long as the rest of what is done for a small parameter.
class HeldTensor {
public:
    HeldTensor() = default;
    // Of an object that is a plain tensor.
    explicit HeldTensor(py::object object) : object_(std::move(object)) {}

    explicit operator bool() const { return static_cast<bool>(object_); }
    const Tensor& operator*() const { return THPVariable_Unpack(object_.ptr()); }
    const Tensor* operator->() const { return &**this; }

private:
    py::object object_;
};

// The tensor that a kernel reads and writes: a plain tensor itself, what a DTensor holds on this
// rank; none for any other object.
HeldTensor local_tensor(py::handle object) {
    if (THPVariable_CheckExact(object.ptr())) {
        return HeldTensor(py::reinterpret_borrow<py::object>(object));
    }
    if (!is_dtensor(object.ptr())) return {};
    py::object local = object.attr(keys().local_tensor);
    return THPVariable_CheckExact(local.ptr()) ? HeldTensor(std::move(local)) : HeldTensor();
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

// The number, from 0, of the part of a DTensor that this rank holds; ranks that hold the same part
// have the same number.
std::uint64_t part_number(py::handle dtensor) {
    py::object const mesh = dtensor.attr(keys().device_mesh);
    py::object const coordinate = mesh.attr(keys().get_coordinate)();
    if (coordinate.is_none()) return 0;  // outside the mesh: it holds nothing
    auto const coordinates = coordinate.cast<std::vector<std::uint64_t>>();
    auto const sizes = mesh.attr(keys().shape).cast<std::vector<std::uint64_t>>();
    std::uint64_t number = 0;
    std::size_t dim = 0;
    for (py::handle placement : dtensor.attr(keys().placements)) {
        if (!placement.attr(keys().is_replicate)().cast<bool>()) {
            number = number * sizes.at(dim) + coordinates.at(dim);
        }
        ++dim;
    }
    return number;
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

bool is_capturing([[maybe_unused]] c10::Device device) {
#if defined(FUSEDSTEP_CUDA)
    if (!runs_on_cuda(device)) return false;
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_launch(cudaStreamIsCapturing(current_stream(device), &capture), kOp);
    return capture != cudaStreamCaptureStatusNone;
#else
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

// The memory of an array; empty where there is none.
struct Range {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;

    Range() = default;
    Range(const void* data, std::size_t bytes)
        : begin(reinterpret_cast<std::uintptr_t>(data)), end(begin + bytes) {}
    // Of a tensor whose elements are adjacent.
    explicit Range(const Tensor& tensor) : Range(tensor.const_data_ptr(), tensor.nbytes()) {}
    explicit Range(const HeldTensor& tensor) : Range(tensor ? Range(*tensor) : Range()) {}

    bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
    bool operator<(const Range& other) const { return begin < other.begin; }
};

// Raises where neither the kernels nor torch could update the parameter.
void check_update(const Tensor& param, const Tensor& grad, const Hyperparameters& h) {
    TORCH_CHECK(at::is_expandable_to(grad.sizes(), param.sizes()), "a gradient of shape ",
                grad.sizes(), " does not fit its parameter of shape ", param.sizes());
    TORCH_CHECK(c10::canCast(grad.scalar_type(), param.scalar_type()), "a gradient of dtype ",
                grad.scalar_type(), " does not fit its parameter of dtype ", param.scalar_type());
    if (param.layout() == at::kStrided && !param.is_non_overlapping_and_dense()) {
        at::assert_no_internal_overlap(param);
    }
    double const largest = std::max({std::abs(h.lr), std::abs(h.momentum),
                                     std::abs(1.0 - h.dampening), std::abs(h.weight_decay)});
    TORCH_CHECK(largest <= std::numeric_limits<float>::max() ||
                    c10::toRealValueType(param.scalar_type()) == at::kDouble,
                "a hyperparameter of magnitude ", largest, " overflows a parameter of dtype ",
                param.scalar_type());
}

void check_master(const Tensor& master, const Tensor& param) {
    TORCH_CHECK(master.sizes() == param.sizes() && at::isFloatingType(master.scalar_type()),
                "a master_param of shape ", master.sizes(), " and dtype ", master.scalar_type(),
                " does not fit its parameter of shape ", param.sizes());
}

void check_buffer(const Tensor& buffer, const Tensor& param, const Tensor& grad) {
    TORCH_CHECK(buffer.sizes() == grad.sizes(), "a momentum_buffer of shape ", buffer.sizes(),
                " does not fit its gradient of shape ", grad.sizes());
    TORCH_CHECK(c10::canCast(grad.scalar_type(), buffer.scalar_type()) &&
                    c10::canCast(buffer.scalar_type(), param.scalar_type()),
                "a momentum_buffer of dtype ", buffer.scalar_type(),
                " does not fit its parameter of dtype ", param.scalar_type());
}

// ---- Rounding of 16-bit parameters ----

Precision precision_of(const Tensor& param, const Rounding& rounding) {
    if (!is_narrow(param.scalar_type())) return Precision::ordinary;
    if (rounding.master_weights) return Precision::master_weights;
    if (!rounding.seed) return Precision::ordinary;
    if (param.scalar_type() != at::kBFloat16) {
        throw py::value_error("stochastic_rounding is for bfloat16 parameters, not for float16");
    }
    return Precision::stochastic_rounding;
}

// A new tensor for the state of a parameter, of its kind: of a DTensor one with its placements.
py::object empty_state(const py::object& param, at::TensorOptions options) {
    at::NoGradGuard const no_grad;
    Tensor made = at::empty_like(THPVariable_Unpack(param.ptr()), options);
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(made)));
}

// The tensor that the kernels read and write in a parameter's state, or why they do not.
Covered<HeldTensor> state_tensor(const py::object& param, PyObject* found) {
    bool const distributed = is_dtensor(param.ptr());
    if (distributed && !same_placements(param, found)) {
        return not_covered("a state placed unlike its parameter");
    }
    HeldTensor local = local_tensor(found);
    if (!local || (!distributed && is_dtensor(found))) {
        return not_covered("a state of a tensor subclass");
    }
    if (local->is_nested()) return not_covered("a nested tensor");
    return local;
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
    StepPlan(const py::dict& state, py::handle grad_scale, py::handle found_inf,
             const Rounding& rounding)
        : state_(state),
          grad_scale_(grad_scale, 1),
          found_inf_(found_inf, 0),
          rounding_(rounding) {}

    // Takes in the parameters of a group; returns those with a gradient that are not covered.
    py::list add_group(PyObject* group);

    // Takes in one parameter of a group, which has a gradient; returns whether it is covered. Its
    // place is that among the parameters of all groups.
    bool add_one(PyObject* group, const py::object& param, std::uint64_t place);

    // Whether there was an overflow, and nothing is to be done. As far as it is known here: it is,
    // at the price of waiting for the device, where a kernel alone could not do what is right, or
    // where torch's functions are to update parameters too.
    bool overflowed(bool left_to_torch);

    // Where it is known, as it is behind overflowed(true).
    double grad_scale() const { return grad_scale_.value(); }

    // Takes all the memory that the step wants: what follows may fail no more, but for a launch.
    void prepare();

    void run();

private:
    // Those an entry points to: held, because without the GIL another thread may drop its own.
    struct Tensors {
        HeldTensor param;
        Tensor grad;
        HeldTensor momentum_buffer;
        HeldTensor master_param;
    };
    // To be set in a parameter's state.
    struct NewState {
        py::object param;
        PyObject* key;
        py::object value;
    };
    // The entries on one device.
    struct Share {
        explicit Share(c10::Device device) : device(device) {}

        c10::Device device;
        c10::SmallVector<Entry, 16> entries;
        c10::SmallVector<Tensors, 16> tensors;   // one per entry
        std::vector<EntryPrecision> precisions;  // one per entry, or none
        bool is_ordinary = true;                 // all entries
        std::int64_t chunks = 0;
        // In the device's memory, where it is a CUDA device: see Step and cuda_update().
        Tensor grad_scale;
        Tensor found_inf;
        Tensor table;
    };

    // Whether gradients are written, as far as is known here.
    bool unscales() const { return !(grad_scale_.is_known() && grad_scale_.value() == 1); }

    Covered<Options> add_options(PyObject* group);
    Covered<> add(const py::object& param, const Covered<Options>& options);
    Covered<> add_covered(const py::object& param_object, const Options& options);
    // Borrowed; null where there is none.
    PyObject* state_of(PyObject* param);
    Share& share_on(c10::Device device);
    // Whether entries share memory and would not be updated in their order.
    static bool any_overlap(const Share& share);
    // Where any do, makes a share of each entry: shares are run one after the other.
    void separate_overlapping();
    Step step_of(const Share& share) const;
    Step step_on_cuda(const Share& share) const;
    void run_on_cpu(const Share& share);
    void prepare_on_cuda(Share& share);
    void run_on_cuda(const Share& share);

    const py::dict& state_;
    Py_ssize_t next_state_ = 0;  // for PyDict_Next()
    ScalerNumber grad_scale_;
    ScalerNumber found_inf_;
    const Rounding& rounding_;
    std::uint64_t place_ = 0;  // of a parameter among those of all groups
    c10::SmallVector<Hyperparameters, 2> groups_;
    std::vector<Tensor> learning_rates_;  // on devices
    c10::SmallVector<Share, 1> shares_;
    std::vector<NewState> new_states_;
    std::vector<Tensor> dtensors_;  // parameters whose local tensors are updated
    bool on_cpu_ = false;
    bool dampened_first_step_ = false;
};

// Or why the kernels cover no parameter of the group.
Covered<Options> StepPlan::add_options(PyObject* group) {
    if (in_functorch() || in_dispatch_mode()) return not_covered("a mode that watches calls");
    Covered<Options> options = read_options(group);
    if (options) {
        groups_.push_back(options->h);
        if (options->device_lr.defined()) learning_rates_.push_back(options->device_lr);
    }
    return options;
}

py::list StepPlan::add_group(PyObject* group) {
    Covered<Options> const options = add_options(group);
    py::list left;
    for_each_param(group, [&](const py::object& param) {
        if (has_grad(param) && !add(param, options)) left.append(param);
        ++place_;
    });
    return left;
}

bool StepPlan::add_one(PyObject* group, const py::object& param, std::uint64_t place) {
    Covered<Options> const options = add_options(group);
    place_ = place;
    return static_cast<bool>(add(param, options));
}

Covered<> StepPlan::add(const py::object& param, const Covered<Options>& options) {
    Covered<> const answer = options ? add_covered(param, *options) : options.why_not();
    if (answer) return answer;
    const Tensor& tensor = THPVariable_Unpack(param.ptr());
    Precision const precision = precision_of(tensor, rounding_);
    TORCH_CHECK(precision != Precision::stochastic_rounding,
                "stochastic_rounding does not cover this parameter of shape ", tensor.sizes(), ": ",
                answer.why_not().reason);
    TORCH_CHECK(
        precision != Precision::master_weights || !is_dtensor(param.ptr()) || holds_elements(param),
        "master_weights do not cover this parameter of shape ", tensor.sizes(), ": ",
        answer.why_not().reason);
    calls.fell_back(tensor.device(), answer.why_not());
    return answer;
}

// A parameter that is covered is part of the plan.
Covered<> StepPlan::add_covered(const py::object& param_object, const Options& options) {
    HeldTensor held = local_tensor(param_object);
    if (!held) return not_covered("a tensor subclass");
    const Tensor& param = *held;
    const Hyperparameters& h = options.h;
    bool const distributed = !THPVariable_CheckExact(param_object.ptr());
    Tensor grad;
    if (distributed) {
        py::object const object = param_object.attr(keys().grad);
        if (!holds_elements(param_object)) return not_covered("a DTensor of partial sums");
        if (!same_placements(param_object, object)) {
            return not_covered("a gradient placed unlike its parameter");
        }
        HeldTensor const local_grad = local_tensor(object);
        if (!local_grad) return not_covered("a tensor subclass");
        grad = *local_grad;
    } else {
        grad = param.unsafeGetTensorImpl()->grad();
    }
    if (param.is_nested() || grad.is_nested()) return not_covered("a nested tensor");
    check_update(param, grad, h);

    Precision const precision = precision_of(param, rounding_);
    bool const has_master = precision == Precision::master_weights;
    bool const is_stochastic = precision == Precision::stochastic_rounding;
    bool const with_momentum = h.momentum != 0;
    HeldTensor buffer;
    HeldTensor master;
    std::uint64_t steps = 0;
    if (with_momentum || precision != Precision::ordinary) {
        PyObject* const of_param = state_of(param_object.ptr());
        if (of_param && !PyDict_Check(of_param)) return not_covered("a state that is no dict");
        auto const find_state = [of_param](bool wanted, PyObject* key) -> PyObject* {
            PyObject* const found = wanted && of_param ? find(of_param, key) : nullptr;
            return found == Py_None ? nullptr : found;
        };
        if (PyObject* const found = find_state(with_momentum, keys().momentum_buffer)) {
            auto local = state_tensor(param_object, found);
            if (!local) return local.why_not();
            buffer = *std::move(local);
            check_buffer(*buffer, param, grad);
        }
        if (PyObject* const found = find_state(has_master, keys().master_param)) {
            auto local = state_tensor(param_object, found);
            if (!local) return local.why_not();
            master = *std::move(local);
            check_master(*master, param);
        }
        if (PyObject* const found = find_state(is_stochastic, keys().step)) {
            steps = py::handle(found).cast<std::uint64_t>();
        }
    }

    std::optional<DType> const dtype = kernel_dtype(param.scalar_type());
    bool const unscale = unscales();
    c10::Device const device = param.device();
    auto const is_elsewhere = [device](const Tensor& tensor) {
        return tensor.defined() && tensor.device() != device;
    };
    if (is_elsewhere(grad) || (buffer && is_elsewhere(*buffer)) ||
        (master && is_elsewhere(*master)) || is_elsewhere(options.device_lr)) {
        return not_covered("a gradient, a state or lr on another device");
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
    bool const first_step = with_momentum && !buffer;
    if (buffer && !has_master &&
        (!is_writable(*buffer) || !same_layout(param, *buffer) ||
         buffer->scalar_type() != param.scalar_type())) {
        return not_covered("a momentum buffer of another dtype or layout");
    }
    if (is_stochastic && is_capturing(device)) {
        TORCH_CHECK(false,
                    "stochastic_rounding cannot be captured in a CUDA graph: every replay "
                    "would draw the same numbers");
    }
    if (!same_layout(param, grad)) {
        if (unscale) {  // the gradient itself is to change, not a copy
            return not_covered("a gradient of another layout, to be unscaled in place");
        }
        at::NoGradGuard const no_grad;
        grad = at::empty_like(param).copy_(grad);
    }
    // Of a state beside master weights, which is copied where it is anything else.
    auto const is_float_like_param = [&param](const HeldTensor& tensor) {
        return tensor && tensor->scalar_type() == at::kFloat && is_writable(*tensor) &&
               same_layout(param, *tensor);
    };
    void* const param_data = param.mutable_data_ptr();
    void* const grad_data =
        unscale ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
    auto const bytes = static_cast<std::size_t>(param.numel() * item_size(*dtype));
    Range const of_param(param_data, bytes);
    Range const of_grad(grad_data, bytes);
    void* buffer_data = buffer && !has_master ? buffer->mutable_data_ptr() : nullptr;
    Range of_buffer(buffer_data, buffer_data ? bytes : 0);
    bool overlap = of_param.overlaps(of_grad);
    if (has_master) {
        if (is_float_like_param(buffer)) of_buffer = Range(*buffer);
        Range const of_master = is_float_like_param(master) ? Range(*master) : Range();
        overlap |= of_master.overlaps(of_param) || of_master.overlaps(of_grad) ||
                   of_master.overlaps(of_buffer);
    }
    if (overlap || of_buffer.overlaps(of_param) || of_buffer.overlaps(of_grad)) {
        return not_covered("a parameter, gradient or state in the memory of another");
    }
    if (first_step) {
        refuse_capture(device, "momentum_buffer");
        py::object made = empty_state(
            param_object, has_master ? at::TensorOptions(at::kFloat) : at::TensorOptions());
        buffer = local_tensor(made);
        new_states_.push_back({param_object, keys().momentum_buffer, std::move(made)});
        dampened_first_step_ |= h.dampening != 0;
    }
    if (has_master) {
        // What the state holds, or a copy of it.
        auto const keep = [&](PyObject* key, const char* name, HeldTensor& tensor) {
            if (is_float_like_param(tensor)) return;
            refuse_capture(device, name);
            py::object made = empty_state(param_object, at::kFloat);
            at::NoGradGuard const no_grad;
            HeldTensor copy = local_tensor(made);
            copy->copy_(tensor ? *tensor : param);
            tensor = std::move(copy);
            new_states_.push_back({param_object, key, std::move(made)});
        };
        keep(keys().master_param, "master_param", master);
        if (buffer) keep(keys().momentum_buffer, "momentum_buffer", buffer);
    }
    if (buffer && !buffer_data) buffer_data = buffer->mutable_data_ptr();
    std::uint64_t key = 0;
    if (is_stochastic) {
        std::uint64_t const part = distributed ? part_number(param_object) : 0;
        key = rounding_key(*rounding_.seed, place_ + (part << 32), steps);
        new_states_.push_back({param_object, keys().step, py::int_(steps + 1)});
    }

    Share& share = share_on(device);
    Entry const entry{{share.chunks, param.numel()},
                      param_data,
                      grad_data,
                      buffer_data,
                      static_cast<std::int32_t>(groups_.size() - 1),
                      *dtype,
                      first_step};
    share.chunks = entry.extent.end_chunk();
    share.entries.push_back(entry);
    if (rounding_.master_weights || rounding_.seed) {
        share.precisions.push_back(
            {has_master ? master->mutable_data_ptr<float>() : nullptr, key, precision});
        share.is_ordinary &= precision == Precision::ordinary;
    }
    share.tensors.push_back(
        {std::move(held), std::move(grad), std::move(buffer), std::move(master)});
    if (distributed) dtensors_.push_back(THPVariable_Unpack(param_object.ptr()));
    return covered;
}

// A dictionary keeps the order in which its items came, which mostly is that of the parameters: the
// next item is looked at before the hash of a tensor is asked for, a Python function.
PyObject* StepPlan::state_of(PyObject* param) {
    Py_ssize_t next = next_state_;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    if (!PyDict_Next(state_.ptr(), &next, &key, &value) || key != param) {
        return find(state_.ptr(), param);
    }
    next_state_ = next;
    return value;
}

StepPlan::Share& StepPlan::share_on(c10::Device device) {
    for (Share& share : shares_) {
        if (share.device == device) return share;
    }
    on_cpu_ |= !runs_on_cuda(device);
    return shares_.emplace_back(device);
}

bool StepPlan::overflowed(bool left_to_torch) {
    // A skipped first step leaves a buffer of zeros, and the next one goes on from there: the same
    // as a first step, unless there is dampening, which first steps know nothing of.
    if (on_cpu_ || left_to_torch || dampened_first_step_) found_inf_.read();
    if (on_cpu_ || left_to_torch) grad_scale_.read();
    return found_inf_.is_known() && found_inf_.value() != 0;
}

Step StepPlan::step_of(const Share& share) const {
    return {groups_.data(),
            static_cast<std::int64_t>(groups_.size()),
            share.entries.data(),
            static_cast<std::int64_t>(share.entries.size()),
            share.is_ordinary ? nullptr : share.precisions.data(),
            grad_scale_.value(),
            nullptr,
            nullptr};
}

void StepPlan::run_on_cpu(const Share& share) {
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

// A step's table in the memory of the device, from when the stream comes to what is enqueued next.
Tensor table_on_device(const Step& step, c10::Device device, cudaStream_t stream) {
    auto const bytes = static_cast<std::int64_t>(table_bytes(step));
    auto const options = at::TensorOptions(at::kByte);
    if (!is_capturing(device)) {
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

// A share's step with what of it lies on the device.
Step StepPlan::step_on_cuda(const Share& share) const {
    Step step = step_of(share);
    if (share.grad_scale.defined()) {
        step.device_grad_scale = share.grad_scale.const_data_ptr<float>();
    }
    if (share.found_inf.defined()) {
        step.device_found_inf = share.found_inf.const_data_ptr<float>();
    }
    return step;
}

void StepPlan::prepare_on_cuda(Share& share) {
    CudaGuard const guard(share.device);
    share.grad_scale = grad_scale_.on(share.device);
    share.found_inf = found_inf_.on(share.device);
    Step const step = step_on_cuda(share);
    if (!table_fits(step)) {
        share.table = table_on_device(step, share.device, current_stream(share.device));
    }
}

void StepPlan::run_on_cuda(const Share& share) {
    CudaGuard const guard(share.device);
    check_launch(cuda_update(step_on_cuda(share),
                             share.table.defined() ? share.table.const_data_ptr() : nullptr,
                             device_limits(share.device), current_stream(share.device)),
                 kOp);
}

#else

void StepPlan::prepare_on_cuda(Share&) {}
void StepPlan::run_on_cuda(const Share&) {}

#endif

bool StepPlan::any_overlap(const Share& share) {
    bool const in_order =  // of entries, which one thread keeps
        !runs_on_cuda(share.device) && (share.chunks <= kGrain || at::get_num_threads() == 1);
    if (in_order || share.entries.size() < 2) return false;
    c10::SmallVector<Range, 256> ranges;
    for (const Tensors& of_entry : share.tensors) {
        for (const Range& range : {Range(of_entry.param), Range(of_entry.grad),
                                   Range(of_entry.momentum_buffer), Range(of_entry.master_param)}) {
            if (range.begin < range.end) ranges.push_back(range);
        }
    }
    std::stable_sort(ranges.begin(), ranges.end());  // merges runs: most arrays lie in order
    auto const overlap = [](const Range& a, const Range& b) { return a.overlaps(b); };
    return std::adjacent_find(ranges.begin(), ranges.end(), overlap) != ranges.end();
}

void StepPlan::separate_overlapping() {
    if (std::none_of(shares_.begin(), shares_.end(), any_overlap)) return;
    c10::SmallVector<Share, 1> separated;
    for (const Share& share : shares_) {
        for (std::size_t i = 0; i < share.entries.size(); ++i) {
            Share& one = separated.emplace_back(share.device);
            one.entries.push_back(share.entries[i]);
            one.entries[0].extent = {0, share.tensors[i].param->numel()};
            one.chunks = one.entries[0].extent.end_chunk();
            one.tensors.push_back(share.tensors[i]);
            if (!share.precisions.empty()) one.precisions.push_back(share.precisions[i]);
            one.is_ordinary = share.is_ordinary;
        }
    }
    shares_ = std::move(separated);
}

void StepPlan::prepare() {
    separate_overlapping();
    for (Share& share : shares_) {
        if (runs_on_cuda(share.device)) prepare_on_cuda(share);
    }
}

void StepPlan::run() {
    for (const Share& share : shares_) {
        runs_on_cuda(share.device) ? run_on_cuda(share) : run_on_cpu(share);
        calls.fused(share.device, static_cast<std::int64_t>(share.entries.size()));
    }
    for (const Share& share : shares_) {
        for (const Tensors& written : share.tensors) {
            if (unscales()) written.grad.unsafeGetTensorImpl()->bump_version();
            for (const HeldTensor* tensor :
                 {&written.param, &written.momentum_buffer, &written.master_param}) {
                if (*tensor) (**tensor).unsafeGetTensorImpl()->bump_version();
            }
        }
    }
    for (const Tensor& param : dtensors_) param.unsafeGetTensorImpl()->bump_version();
    for (const NewState& made : new_states_) {
        auto const of_param =  // made by the state where it is missing: it is a defaultdict
            py::reinterpret_steal<py::object>(PyObject_GetItem(state_.ptr(), made.param.ptr()));
        if (!of_param || PyObject_SetItem(of_param.ptr(), made.key, made.value.ptr()) != 0) {
            throw py::error_already_set();
        }
    }
}

// Raises where a DistributedDataParallel is going to average the gradient, which it does when hooks
// of the gradient have run: its own is the only one of C++ on what accumulates a gradient.
void require_no_reducer(const Tensor& param) {
    auto const accumulator = torch::autograd::impl::try_get_grad_accumulator(param);
    if (!accumulator) return;
    for (const auto& hook : accumulator->post_hooks()) {
        TORCH_CHECK(!dynamic_cast<torch::autograd::utils::LambdaPostHook*>(hook.get()),
                    "SGD(in_backward=True) would use this process's gradient before "
                    "DistributedDataParallel has averaged it; use fully_shard, or step()");
    }
}

}  // namespace

void refuse_capture(c10::Device device, const std::string& name) {
    TORCH_CHECK(!is_capturing(device), "a step that makes a parameter's ", name,
                " cannot be captured in a CUDA graph, whose every replay would make it anew; "
                "take a step with the same gradients and options before the capture");
}

void step(const py::list& param_groups, const py::dict& state, const py::object& grad_scale,
          const py::object& found_inf, const Rounding& rounding, const py::object& step_by_torch) {
    StepPlan plan(state, grad_scale, found_inf, rounding);
    if (plan.overflowed(false)) return;
    py::list left;
    for (py::handle group : param_groups) {
        if (!PyDict_Check(group.ptr())) throw py::type_error("a parameter group is no dict");
        py::list of_group = plan.add_group(group.ptr());
        if (!of_group.empty()) left.append(py::make_tuple(group, std::move(of_group)));
    }
    if (plan.overflowed(!left.empty())) return;
    plan.prepare();
    if (!left.empty()) step_by_torch(left, plan.grad_scale());
    plan.run();
}

bool step_in_backward(const py::dict& group, const py::object& param, std::uint64_t place,
                      const py::dict& state, const Rounding& rounding) {
    if (THPVariable_CheckExact(param.ptr())) require_no_reducer(THPVariable_Unpack(param.ptr()));
    StepPlan plan(state, py::none(), py::none(), rounding);
    if (!plan.add_one(group.ptr(), param, place)) return false;
    plan.prepare();
    plan.run();
    THPVariable_Unpack(param.ptr()).mutable_grad().reset();
    return true;
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

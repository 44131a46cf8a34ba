// SGD for torch: reads an optimizer's parameter groups and state as Python holds them, lists what
// the kernels cover, runs them, and hands the rest back.
#include <ATen/EmptyTensor.h>
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
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "optim/torch/binding.h"
#include "optim/rules/sgd.h"
#include "optim/optim.h"
#include "torch_glue/coverage.h"
#include "torch_glue/cuda.h"
#include "torch_glue/plain.h"
#include "torch_glue/python.h"

#if defined(FUSEDSTEP_CUDA)
#include <ATen/ops/empty.h>

#include "optim/cuda.h"
#endif

namespace fusedstep::optim {
namespace {

namespace py = pybind11;
using at::Tensor;

[[maybe_unused]] constexpr const char* kOp = "SGD.step";

// A thread takes at least so many chunks: 32,768 elements, as in torch's own elementwise kernels.
constexpr std::int64_t kGrain = 32768 / kChunk;

// ---- Python objects ----

struct Keys {
    PyObject* param_groups = PyUnicode_InternFromString("param_groups");
    PyObject* state = PyUnicode_InternFromString("state");
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

py::list param_groups_of(py::handle optimizer) {
    py::object groups = optimizer.attr(keys().param_groups);
    if (!PyList_Check(groups.ptr())) {
        throw py::type_error("an optimizer's param_groups are no list");
    }
    return py::reinterpret_steal<py::list>(groups.release());
}

py::dict states_of(py::handle optimizer) {
    py::object state = optimizer.attr(keys().state);
    if (!PyDict_Check(state.ptr())) throw py::type_error("an optimizer's state is no dict");
    return py::reinterpret_steal<py::dict>(state.release());
}

// A number, or a tensor of one element, which is read here.
double as_number(PyObject* value) {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    double const number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

// As PySequence_Fast_GET_ITEM and its like read it.
py::object params_of(PyObject* group) {
    if (!PyDict_Check(group)) throw py::type_error("a parameter group is no dict");
    auto params = py::reinterpret_steal<py::object>(
        PySequence_Fast(get(group, keys().params), "the params of a parameter group are no list"));
    if (!params) throw py::error_already_set();
    return params;
}

// Calls f with every parameter of a group. f may run Python code.
template <class F>
void for_each_param(PyObject* group, F f) {
    py::object const params = params_of(group);
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

bool has_kernels([[maybe_unused]] c10::Device device) {
#if defined(FUSEDSTEP_CUDA)
    return !runs_on_cuda(device) || runs_kernels(device);
#else
    return true;
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
    // From a tensor's first element to its last.
    explicit Range(const Tensor& tensor)
        : Range(tensor.const_data_ptr(),
                tensor.is_contiguous() ? tensor.nbytes()
                                       : at::detail::computeStorageNbytes(
                                             tensor.sizes(), tensor.strides(), tensor.itemsize())) {
    }
    explicit Range(const HeldTensor& tensor) : Range(tensor ? Range(*tensor) : Range()) {}

    bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
    bool operator<(const Range& other) const { return begin < other.begin; }
};

// Torch's answer, which takes longer, is not asked where nothing is cast.
bool can_cast(at::ScalarType from, at::ScalarType to) {
    return from == to || c10::canCast(from, to);
}

// Raises where neither the kernels nor torch could update the parameter.
void check_update(const Tensor& param, const Tensor& grad, const Hyperparameters& h) {
    TORCH_CHECK(at::is_expandable_to(grad.sizes(), param.sizes()), "a gradient of shape ",
                grad.sizes(), " does not fit its parameter of shape ", param.sizes());
    TORCH_CHECK(can_cast(grad.scalar_type(), param.scalar_type()), "a gradient of dtype ",
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
    TORCH_CHECK(can_cast(grad.scalar_type(), buffer.scalar_type()) &&
                    can_cast(buffer.scalar_type(), param.scalar_type()),
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
    StepPlan(py::dict state, py::handle grad_scale, py::handle found_inf, const Rounding& rounding)
        : state_(std::move(state)),
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
    // A gradient in another layout than its parameter: copied to its entry's in its turn.
    struct GradientCopy {
        std::size_t entry;
        Tensor from;
    };
    // A parameter that is about to become an entry.
    struct Candidate {
        const py::object& object;
        const Options& options;
        bool distributed;
        bool unscale;
        Tensors tensors{};
        bool copies_grad = false;  // is to have a GradientCopy
        Precision precision{};
        std::uint64_t steps = 0;  // that were rounded stochastically
        std::uint64_t key = 0;    // of stochastic rounding
        Entry entry{};

        bool has_master() const { return precision == Precision::master_weights; }
        bool has_momentum() const { return options.h.momentum != 0; }
        // Whether a state beside master weights can stay what it is; it is copied otherwise.
        bool is_float_like_param(const HeldTensor& state) const {
            return state && state->scalar_type() == at::kFloat && is_writable(*state) &&
                   same_layout(*tensors.param, *state);
        }
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
        std::vector<GradientCopy> copies;
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
    Covered<> add_covered(const py::object& param, const Options& options);
    // The steps of add_covered(), in their order. Up to make_state() nothing is made.
    Covered<> find_gradient(Candidate& candidate) const;
    Covered<> find_state(Candidate& candidate);
    Covered<> check_tensors(Candidate& candidate) const;
    Covered<> check_memory(Candidate& candidate) const;
    void make_state(Candidate& candidate);
    void list(Candidate&& candidate);
    // Borrowed; null where there is none.
    PyObject* state_of(PyObject* param);
    Share& share_on(c10::Device device);
    // Whether entries share memory and would not be updated in their order.
    static bool any_overlap(const Share& share);
    // Where any do, makes a share of each entry: shares are run one after the other.
    void separate_overlapping();
    Step step_of(const Share& share) const;
    Step step_on_cuda(const Share& share) const;
    static void copy_gradients(const Share& share);
    void run_on_cpu(const Share& share);
    void prepare_on_cuda(Share& share);
    void run_on_cuda(const Share& share);

    py::dict state_;
    Py_ssize_t next_state_ = 0;  // for PyDict_Next()
    ScalerNumber grad_scale_;
    ScalerNumber found_inf_;
    const Rounding& rounding_;
    std::uint64_t place_ = 0;  // of a parameter among those of all groups
    c10::SmallVector<Hyperparameters, 2> groups_;
    std::vector<Tensor> learning_rates_;  // on devices
    c10::SmallVector<Share, 1> shares_;
    std::vector<NewState> new_states_;
    std::vector<std::pair<c10::Device, NotCovered>> fell_back_;  // to be counted
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
    fell_back_.emplace_back(tensor.device(), answer.why_not());
    return answer;
}

// A parameter that is covered is part of the plan.
Covered<> StepPlan::add_covered(const py::object& param, const Options& options) {
    Candidate candidate{param, options, !THPVariable_CheckExact(param.ptr()), unscales()};
    if (auto const answer = find_gradient(candidate); !answer) return answer;
    const Tensors& found = candidate.tensors;
    check_update(*found.param, found.grad, options.h);
    candidate.precision = precision_of(*found.param, rounding_);
    if (candidate.has_momentum() || candidate.precision != Precision::ordinary) {
        if (auto const answer = find_state(candidate); !answer) return answer;
    }
    if (auto const answer = check_tensors(candidate); !answer) return answer;
    if (auto const answer = check_memory(candidate); !answer) return answer;
    make_state(candidate);
    list(std::move(candidate));
    return covered;
}

// The tensors of this rank, where they hold the same elements.
Covered<> StepPlan::find_gradient(Candidate& candidate) const {
    Tensors& found = candidate.tensors;
    found.param = local_tensor(candidate.object);
    if (!found.param) return not_covered("a tensor subclass");
    if (candidate.distributed) {
        py::object const grad = candidate.object.attr(keys().grad);
        if (!holds_elements(candidate.object)) return not_covered("a DTensor of partial sums");
        if (!same_placements(candidate.object, grad)) {
            return not_covered("a gradient placed unlike its parameter");
        }
        HeldTensor const local_grad = local_tensor(grad);
        if (!local_grad) return not_covered("a tensor subclass");
        found.grad = *local_grad;
    } else {
        found.grad = found.param->unsafeGetTensorImpl()->grad();
    }
    if (found.param->is_nested() || found.grad.is_nested()) return not_covered("a nested tensor");
    return covered;
}

Covered<> StepPlan::find_state(Candidate& candidate) {
    PyObject* const state = state_of(candidate.object.ptr());
    if (state && !PyDict_Check(state)) return not_covered("a state that is no dict");
    auto const find_item = [state](bool wanted, PyObject* key) -> PyObject* {
        PyObject* const found = wanted && state ? find(state, key) : nullptr;
        return found == Py_None ? nullptr : found;
    };
    Tensors& found = candidate.tensors;
    if (PyObject* const item = find_item(candidate.has_momentum(), keys().momentum_buffer)) {
        auto local = state_tensor(candidate.object, item);
        if (!local) return local.why_not();
        found.momentum_buffer = *std::move(local);
        check_buffer(*found.momentum_buffer, *found.param, found.grad);
    }
    if (PyObject* const item = find_item(candidate.has_master(), keys().master_param)) {
        auto local = state_tensor(candidate.object, item);
        if (!local) return local.why_not();
        found.master_param = *std::move(local);
        check_master(*found.master_param, *found.param);
    }
    bool const is_stochastic = candidate.precision == Precision::stochastic_rounding;
    if (PyObject* const item = find_item(is_stochastic, keys().step)) {
        candidate.steps = py::handle(item).cast<std::uint64_t>();
    }
    return covered;
}

// Devices, dtypes and layouts.
Covered<> StepPlan::check_tensors(Candidate& candidate) const {
    Tensors& found = candidate.tensors;
    const Tensor& param = *found.param;
    const HeldTensor& buffer = found.momentum_buffer;
    std::optional<DType> const dtype = kernel_dtype(param.scalar_type());
    c10::Device const device = param.device();
    auto const is_elsewhere = [device](const Tensor& tensor) {
        return tensor.defined() && tensor.device() != device;
    };
    if (is_elsewhere(found.grad) || (buffer && is_elsewhere(*buffer)) ||
        (found.master_param && is_elsewhere(*found.master_param)) ||
        is_elsewhere(candidate.options.device_lr)) {
        return not_covered("a gradient, a state or lr on another device");
    }
    if (!dtype) return not_covered("a dtype that the kernels do not compute");
    candidate.entry.dtype = *dtype;
    if (found.grad.is_sparse()) return not_covered("a sparse gradient");
    if (!is_writable(param) || !has_kernels(device) ||
        !(candidate.unscale ? is_writable(found.grad) : is_ordinary(found.grad))) {
        return not_covered("a device or a kind of tensor without kernels");
    }
    if (!param.is_non_overlapping_and_dense()) return not_covered("a strided view as a parameter");
    if (found.grad.sizes() != param.sizes() || found.grad.scalar_type() != param.scalar_type()) {
        return not_covered("a gradient of another shape or dtype");
    }
    if (buffer && !candidate.has_master() &&
        (!is_writable(*buffer) || !same_layout(param, *buffer) ||
         buffer->scalar_type() != param.scalar_type())) {
        return not_covered("a momentum buffer of another dtype or layout");
    }
    if (candidate.precision == Precision::stochastic_rounding && is_capturing(device)) {
        TORCH_CHECK(false,
                    "stochastic_rounding cannot be captured in a CUDA graph: every replay "
                    "would draw the same numbers");
    }
    candidate.copies_grad = !same_layout(param, found.grad);
    if (candidate.copies_grad && candidate.unscale) {  // the gradient itself is to change
        return not_covered("a gradient of another layout, to be unscaled in place");
    }
    return covered;
}

// Elements are updated in any order, so that no array of the parameter may overlap another.
Covered<> StepPlan::check_memory(Candidate& candidate) const {
    Entry& entry = candidate.entry;
    const auto& [held_param, grad, buffer, master] = candidate.tensors;
    const Tensor& param = *held_param;
    entry.param = param.mutable_data_ptr();
    entry.grad =
        candidate.unscale ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
    entry.extent.numel = param.numel();
    auto const bytes = static_cast<std::size_t>(entry.extent.numel * item_size(entry.dtype));
    Range const of_param(entry.param, bytes);
    Range const of_grad = candidate.copies_grad ? Range(grad) : Range(entry.grad, bytes);
    Range of_buffer;
    bool overlap = of_param.overlaps(of_grad);
    if (candidate.has_master()) {
        if (candidate.is_float_like_param(buffer)) of_buffer = Range(*buffer);
        if (candidate.is_float_like_param(master)) {
            Range const of_master(*master);
            overlap |= of_master.overlaps(of_param) || of_master.overlaps(of_grad) ||
                       of_master.overlaps(of_buffer);
        }
    } else if (buffer) {
        entry.momentum_buffer = buffer->mutable_data_ptr();
        of_buffer = Range(entry.momentum_buffer, bytes);
    }
    if (overlap || of_buffer.overlaps(of_param) || of_buffer.overlaps(of_grad)) {
        return not_covered("a parameter, gradient or state in the memory of another");
    }
    return covered;
}

// What the state lacks, and copies of what the kernels cannot write.
void StepPlan::make_state(Candidate& candidate) {
    Tensors& found = candidate.tensors;
    c10::Device const device = found.param->device();
    if (candidate.has_momentum() && !found.momentum_buffer) {
        refuse_capture(device, "momentum_buffer");
        py::object made =
            empty_state(candidate.object, candidate.has_master() ? at::TensorOptions(at::kFloat)
                                                                 : at::TensorOptions());
        found.momentum_buffer = local_tensor(made);
        candidate.entry.first_step = true;
        new_states_.push_back({candidate.object, keys().momentum_buffer, std::move(made)});
        dampened_first_step_ |= candidate.options.h.dampening != 0;
    }
    if (candidate.has_master()) {
        // What the state holds, or a copy of it.
        auto const keep = [&](PyObject* key, const char* name, HeldTensor& state) {
            if (candidate.is_float_like_param(state)) return;
            refuse_capture(device, name);
            py::object made = empty_state(candidate.object, at::kFloat);
            at::NoGradGuard const no_grad;
            HeldTensor copy = local_tensor(made);
            copy->copy_(state ? *state : *found.param);
            state = std::move(copy);
            new_states_.push_back({candidate.object, key, std::move(made)});
        };
        keep(keys().master_param, "master_param", found.master_param);
        if (found.momentum_buffer) {
            keep(keys().momentum_buffer, "momentum_buffer", found.momentum_buffer);
        }
    }
    if (candidate.precision == Precision::stochastic_rounding) {
        std::uint64_t const part = candidate.distributed ? part_number(candidate.object) : 0;
        candidate.key = rounding_key(*rounding_.seed, place_ + (part << 32), candidate.steps);
        new_states_.push_back({candidate.object, keys().step, py::int_(candidate.steps + 1)});
    }
}

void StepPlan::list(Candidate&& candidate) {
    Entry& entry = candidate.entry;
    Tensors& found = candidate.tensors;
    if (found.momentum_buffer && !entry.momentum_buffer) {
        entry.momentum_buffer = found.momentum_buffer->mutable_data_ptr();
    }
    Share& share = share_on(found.param->device());
    entry.extent.first_chunk = share.chunks;
    entry.group = static_cast<std::int32_t>(groups_.size() - 1);
    share.chunks = entry.extent.end_chunk();
    if (candidate.copies_grad) {
        at::NoGradGuard const no_grad;
        Tensor from = std::exchange(found.grad, at::empty_like(*found.param));
        entry.grad = found.grad.mutable_data_ptr();
        share.copies.push_back({share.entries.size(), std::move(from)});
    }
    share.entries.push_back(entry);
    if (rounding_.master_weights || rounding_.seed) {
        share.precisions.push_back(
            {candidate.has_master() ? found.master_param->mutable_data_ptr<float>() : nullptr,
             candidate.key, candidate.precision});
        share.is_ordinary &= candidate.precision == Precision::ordinary;
    }
    share.tensors.push_back(std::move(found));
    if (candidate.distributed) dtensors_.push_back(THPVariable_Unpack(candidate.object.ptr()));
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

void StepPlan::copy_gradients(const Share& share) {
    at::NoGradGuard const no_grad;
    for (const GradientCopy& copy : share.copies) share.tensors[copy.entry].grad.copy_(copy.from);
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
        !runs_on_cuda(share.device) && share.copies.empty() &&
        (share.chunks <= kGrain || at::get_num_threads() == 1);
    if (in_order || share.entries.size() < 2) return false;
    c10::SmallVector<Range, 256> ranges;
    auto const add = [&ranges](const Range& range) {
        if (range.begin < range.end) ranges.push_back(range);
    };
    for (const Tensors& of_entry : share.tensors) {
        add(Range(of_entry.param));
        add(Range(of_entry.grad));
        add(Range(of_entry.momentum_buffer));
        add(Range(of_entry.master_param));
    }
    for (const GradientCopy& copy : share.copies) add(Range(copy.from));
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
            for (const GradientCopy& copy : share.copies) {
                if (copy.entry == i) one.copies.push_back({0, copy.from});
            }
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
    for (const auto& [device, why_not] : fell_back_) calls.fell_back(device, why_not);
    for (const Share& share : shares_) {
        if (!share.copies.empty()) copy_gradients(share);
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

// `left` is what the plan does not cover: by group, parameters.
void carry_out(StepPlan& plan, const py::object& optimizer, const py::list& left,
               const py::object& step_by_torch) {
    plan.prepare();
    if (!left.empty()) step_by_torch(optimizer, left, plan.grad_scale());
    plan.run();
}

// Of a parameter: its group, and its place among the parameters of all groups.
struct Membership {
    py::object group;
    std::uint64_t place;
};

// None where it is in no group.
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

// Raises where somebody waits for the gradient: such hooks run after those of the parameter.
void require_nobody_waits(const Tensor& param) {
    auto const accumulator = torch::autograd::impl::try_get_grad_accumulator(param);
    TORCH_CHECK(!accumulator || accumulator->post_hooks().empty(),
                "SGD(in_backward=True) would use and drop a gradient that a hook is still waiting "
                "for: that of DistributedDataParallel, say, which is going to average it over "
                "processes; use fully_shard, or step()");
}

void drop_grad(const py::object& param) {
    if (THPVariable_CheckExact(param.ptr())) {
        THPVariable_Unpack(param.ptr()).mutable_grad().reset();
    } else {
        py::setattr(param, keys().grad, py::none());
    }
}

}  // namespace

void refuse_capture(c10::Device device, const std::string& name) {
    TORCH_CHECK(!is_capturing(device), "a step that makes a parameter's ", name,
                " cannot be captured in a CUDA graph, whose every replay would make it anew; "
                "take a step with the same gradients and options before the capture");
}

void step(const py::object& optimizer, const py::object& grad_scale, const py::object& found_inf,
          const Rounding& rounding, const py::object& step_by_torch) {
    StepPlan plan(states_of(optimizer), grad_scale, found_inf, rounding);
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

void step_in_backward(const py::object& optimizer, const py::object& param,
                      const Rounding& rounding, const py::object& step_by_torch) {
    std::optional<Membership> const found = membership(param_groups_of(optimizer), param);
    if (!found) return;
    require_nobody_waits(THPVariable_Unpack(param.ptr()));
    StepPlan plan(states_of(optimizer), py::none(), py::none(), rounding);
    py::list left;
    if (!plan.add_one(found->group.ptr(), param, found->place)) {
        py::list params;
        params.append(param);
        left.append(py::make_tuple(found->group, std::move(params)));
    }
    carry_out(plan, optimizer, left, step_by_torch);
    drop_grad(param);
}

void zero_grad(const py::list& param_groups) {
    for (py::handle group : param_groups) {
        for_each_param(group.ptr(), [](const py::object& param) {
            if (has_grad(param)) drop_grad(param);
        });
    }
}

}  // namespace fusedstep::optim

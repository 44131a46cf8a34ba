#include "optim/torch/candidate.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>

#include <cmath>
#include <limits>
#include <optional>

#include "optim/torch/devices.h"

namespace fusedstep::optim {
namespace {

using at::Tensor;

// Of two tensors of one shape: whether an element has the same offset in both.
bool same_layout(const Tensor& a, const Tensor& b) {
    if (a.is_contiguous() && b.is_contiguous()) return true;
    for (std::int64_t d = 0; d < a.dim(); ++d) {
        if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
    }
    return true;
}

// Torch's answer, which takes longer, is not asked where nothing is cast.
bool can_cast(at::ScalarType from, at::ScalarType to) {
    return from == to || c10::canCast(from, to);
}

void check_state(const char* key, const Tensor& state, const Tensor& param, const Tensor& grad) {
    if (state.scalar_type() == param.scalar_type() && grad.scalar_type() == param.scalar_type() &&
        state.sizes() == grad.sizes()) {
        return;
    }
    TORCH_CHECK(state.sizes() == grad.sizes(), "a ", key, " of shape ", state.sizes(),
                " does not fit its gradient of shape ", grad.sizes());
    TORCH_CHECK(can_cast(grad.scalar_type(), state.scalar_type()) &&
                    can_cast(state.scalar_type(), param.scalar_type()),
                "a ", key, " of dtype ", state.scalar_type(),
                " does not fit its parameter of dtype ", param.scalar_type());
}

void check_master(const Tensor& master, const Tensor& param) {
    TORCH_CHECK(master.sizes() == param.sizes() && at::isFloatingType(master.scalar_type()),
                "a master_param of shape ", master.sizes(), " and dtype ", master.scalar_type(),
                " does not fit its parameter of shape ", param.sizes());
}

// The tensor that the kernels read and write in a parameter's state, or why they do not.
Covered<HeldTensor> state_tensor(const py::object& param, bool distributed, PyObject* found) {
    if (!distributed && THPVariable_CheckExact(found) && !THPVariable_Unpack(found).is_nested()) {
        return HeldTensor(py::reinterpret_borrow<py::object>(found));
    }
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

}  // namespace

Range::Range(const Tensor& tensor)
    : Range(tensor.const_data_ptr(),
            tensor.is_contiguous() ? tensor.nbytes()
                                   : at::detail::computeStorageNbytes(
                                         tensor.sizes(), tensor.strides(), tensor.itemsize())) {}

bool Candidate::is_float_like_param(const HeldTensor& state) const {
    return state && state->scalar_type() == at::kFloat && is_writable(*state) &&
           same_layout(*tensors.param, *state);
}

// The tensors of this rank, where they hold the same elements.
Covered<> Candidate::find_gradient() {
    tensors.param = local_tensor(object);
    if (!tensors.param) return not_covered("a tensor subclass");
    if (distributed) {
        py::object const grad = object.attr(keys().grad);
        if (!holds_elements(object)) return not_covered("a DTensor of partial sums");
        if (!same_placements(object, grad)) {
            return not_covered("a gradient placed unlike its parameter");
        }
        HeldTensor const local_grad = local_tensor(grad);
        if (!local_grad) return not_covered("a tensor subclass");
        tensors.grad = *local_grad;
    } else {
        tensors.grad = tensors.param->unsafeGetTensorImpl()->grad();
    }
    if (tensors.param->is_nested() || tensors.grad.is_nested()) {
        return not_covered("a nested tensor");
    }
    return covered;
}

void Candidate::check_update() {
    const Tensor& param = *tensors.param;
    const Tensor& grad = tensors.grad;
    same_shape = grad.sizes() == param.sizes();
    TORCH_CHECK(same_shape || at::is_expandable_to(grad.sizes(), param.sizes()),
                "a gradient of shape ", grad.sizes(), " does not fit its parameter of shape ",
                param.sizes());
    TORCH_CHECK(can_cast(grad.scalar_type(), param.scalar_type()), "a gradient of dtype ",
                grad.scalar_type(), " does not fit its parameter of dtype ", param.scalar_type());
    if (param.layout() == at::kStrided && !param.is_non_overlapping_and_dense()) {
        at::assert_no_internal_overlap(param);
    }
    TORCH_CHECK(options.largest_finite <= std::numeric_limits<float>::max() ||
                    c10::toRealValueType(param.scalar_type()) == at::kDouble,
                "a hyperparameter of magnitude ", options.largest_finite,
                " overflows a parameter of dtype ", param.scalar_type());
}

Covered<> Candidate::find_states(PyObject* state) {
    if (state && !PyDict_Check(state)) return not_covered("a state that is no dict");
    auto const find_item = [state](PyObject* key) -> PyObject* {
        PyObject* const found = state ? find(state, key) : nullptr;
        return found == Py_None ? nullptr : found;
    };
    unsigned missing = 0;
    for (std::size_t i = 0; i < optimizer.rule.states.size(); ++i) {
        if (!has_state(i)) continue;
        PyObject* const item = find_item(optimizer.states[i]);
        if (!item) {
            missing |= 1u << i;
            continue;
        }
        auto local = state_tensor(object, distributed, item);
        if (!local) return local.why_not();
        tensors.states[i] = *std::move(local);
        check_state(optimizer.rule.states[i].key, *tensors.states[i], *tensors.param, tensors.grad);
    }
    if (missing && missing != options.states) return not_covered("a state that lacks a part");
    entry.first_step = missing != 0;
    if (has_master()) {
        if (PyObject* const item = find_item(keys().master_param)) {
            auto local = state_tensor(object, distributed, item);
            if (!local) return local.why_not();
            tensors.master_param = *std::move(local);
            check_master(*tensors.master_param, *tensors.param);
        }
    }
    if (storage == Storage::stochastic_rounding) {
        if (PyObject* const item = find_item(keys().step)) {
            steps = py::handle(item).cast<std::uint64_t>();
        }
    }
    return covered;
}

// Devices, dtypes and layouts.
Covered<> Candidate::check_tensors() {
    const Tensor& param = *tensors.param;
    std::optional<DType> const dtype = kernel_dtype(param.scalar_type());
    c10::Device const device = param.device();
    bool elsewhere = tensors.grad.device() != device ||
                     (options.device_lr.defined() && options.device_lr.device() != device) ||
                     (tensors.master_param && tensors.master_param->device() != device);
    bool like_param = true;  // every state, where there are no master weights
    for (std::size_t i = 0; i < optimizer.rule.states.size(); ++i) {
        const HeldTensor& state = tensors.states[i];
        if (!state) continue;
        elsewhere |= state->device() != device;
        like_param = like_param && is_writable(*state) && same_layout(param, *state) &&
                     state->scalar_type() == param.scalar_type();
    }
    if (elsewhere) return not_covered("a gradient, a state or lr on another device");
    if (!dtype) return not_covered("a dtype that the kernels do not compute");
    entry.dtype = *dtype;
    if (tensors.grad.is_sparse()) return not_covered("a sparse gradient");
    if (!is_writable(param) || !has_kernels(device) ||
        !(unscale ? is_writable(tensors.grad) : is_ordinary(tensors.grad))) {
        return not_covered("a device or a kind of tensor without kernels");
    }
    if (!param.is_non_overlapping_and_dense()) return not_covered("a strided view as a parameter");
    if (!same_shape || tensors.grad.scalar_type() != param.scalar_type()) {
        return not_covered("a gradient of another shape or dtype");
    }
    if (!has_master() && !like_param) return not_covered("a state of another dtype or layout");
    TORCH_CHECK(storage != Storage::stochastic_rounding || !is_capturing(device),
                "stochastic_rounding cannot be captured in a CUDA graph: every replay would draw "
                "the same numbers");
    copies_grad = !same_layout(param, tensors.grad);
    if (copies_grad && unscale) {  // the gradient itself is to change
        return not_covered("a gradient of another layout, to be unscaled in place");
    }
    return covered;
}

// Elements are updated in any order, so that no array of the parameter may overlap another.
Covered<> Candidate::check_memory() {
    const Tensor& param = *tensors.param;
    const Tensor& grad = tensors.grad;
    entry.param = param.mutable_data_ptr();
    entry.grad = unscale ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
    entry.extent.numel = param.numel();
    auto const bytes = static_cast<std::size_t>(entry.extent.numel * item_size(entry.dtype));
    Range const of_param(entry.param, bytes);
    Range const of_grad = copies_grad ? Range(grad) : Range(entry.grad, bytes);
    bool overlap = of_param.overlaps(of_grad);
    Range others[kMaxStates + 1];  // states and master weights
    std::size_t count = 0;
    auto const add = [&](const Range& range) {
        overlap |= range.overlaps(of_param) || range.overlaps(of_grad);
        for (std::size_t i = 0; i < count; ++i) overlap |= range.overlaps(others[i]);
        others[count++] = range;
    };
    for (std::size_t i = 0; i < optimizer.rule.states.size(); ++i) {
        const HeldTensor& state = tensors.states[i];
        if (!state) continue;
        if (!has_master()) {
            entry.states[i] = state->mutable_data_ptr();
            add(Range(entry.states[i], bytes));
        } else if (is_float_like_param(state)) {
            add(Range(*state));
        }
    }
    if (is_float_like_param(tensors.master_param)) add(Range(*tensors.master_param));
    if (overlap) return not_covered("a parameter, gradient or state in the memory of another");
    return covered;
}

}  // namespace fusedstep::optim

#include "optim/torch/plan.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "optim/storage.h"
#include "optim/torch/devices.h"

namespace fusedstep::optim {
namespace {

using at::Tensor;

// A new tensor for the state of a parameter, of its kind: of a DTensor one with its placements.
py::object empty_state(const py::object& param, at::TensorOptions options) {
    at::NoGradGuard const no_grad;
    Tensor made = at::empty_like(THPVariable_Unpack(param.ptr()), options);
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(made)));
}

}  // namespace

void refuse_capture(c10::Device device, const std::string& name) {
    TORCH_CHECK(!is_capturing(device), "a step that makes a parameter's ", name,
                " cannot be captured in a CUDA graph, whose every replay would make it anew; "
                "take a step with the same gradients and options before the capture");
}

Covered<Options> StepPlan::add_options(PyObject* group) {
    if (in_functorch() || in_dispatch_mode()) return not_covered("a mode that watches calls");
    Covered<Options> options = read_options(optimizer_, group, extensions_);
    if (options) {
        auto const* const group = options->group.data();
        groups_.append(group, group + optimizer_.rule.group_bytes / sizeof(*group));
        ++group_count_;
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
    Storage const storage = storage_of(tensor, extensions_);
    TORCH_CHECK(storage != Storage::stochastic_rounding,
                "stochastic_rounding does not cover this parameter of shape ", tensor.sizes(), ": ",
                answer.why_not().reason);
    TORCH_CHECK(
        storage != Storage::master_weights || !is_dtensor(param.ptr()) || holds_elements(param),
        "master_weights do not cover this parameter of shape ", tensor.sizes(), ": ",
        answer.why_not().reason);
    fell_back_.emplace_back(tensor.device(), answer.why_not());
    return answer;
}

// A parameter that is covered is part of the plan.
Covered<> StepPlan::add_covered(const py::object& param, const Options& options) {
    Candidate candidate{param, optimizer_, options, !THPVariable_CheckExact(param.ptr()),
                        unscales()};
    if (auto const answer = candidate.find_gradient(); !answer) return answer;
    candidate.check_update();
    candidate.storage = storage_of(*candidate.tensors.param, extensions_);
    if (options.states || candidate.storage != Storage::ordinary) {
        auto const answer = candidate.find_states(state_of(param.ptr()));
        if (!answer) return answer;
    }
    if (auto const answer = candidate.check_tensors(); !answer) return answer;
    if (auto const answer = candidate.check_memory(); !answer) return answer;
    EntryStorage const storage = make_state(candidate);
    list(std::move(candidate), storage);
    return covered;
}

EntryStorage StepPlan::make_state(Candidate& candidate) {
    Tensors& found = candidate.tensors;
    const Rule& rule = optimizer_.rule;
    c10::Device const device = found.param->device();
    EntryStorage storage{nullptr, 0, candidate.storage};
    bool const has_master = candidate.has_master();
    auto const make = [&](PyObject* key, const char* name, at::TensorOptions options) {
        refuse_capture(device, name);
        py::object made = empty_state(candidate.object, options);
        HeldTensor local = local_tensor(made);
        new_states_.push_back({candidate.object, key, std::move(made)});
        return local;
    };
    // What the state holds, or a copy of it in float32.
    auto const keep = [&](PyObject* key, const char* name, HeldTensor& state) {
        if (candidate.is_float_like_param(state)) return;
        at::NoGradGuard const no_grad;
        HeldTensor copy = make(key, name, at::kFloat);
        copy->copy_(state ? *state : *found.param);
        state = std::move(copy);
    };
    for (std::size_t i = 0; i < rule.states.size(); ++i) {
        if (!candidate.has_state(i)) continue;
        HeldTensor& state = found.states[i];
        if (!state) {
            state = make(optimizer_.states[i], rule.states[i].key,
                         has_master ? at::TensorOptions(at::kFloat) : at::TensorOptions());
        } else if (has_master) {
            keep(optimizer_.states[i], rule.states[i].key, state);
        }
        if (!candidate.entry.states[i]) candidate.entry.states[i] = state->mutable_data_ptr();
    }
    if (has_master) {
        keep(keys().master_param, "master_param", found.master_param);
        storage.master_param = found.master_param->mutable_data_ptr<float>();
    }
    first_step_differs_ |=
        candidate.entry.first_step && rule.first_step_differs(candidate.options.group.data());
    if (candidate.storage == Storage::stochastic_rounding) {
        std::uint64_t const part = candidate.distributed ? part_number(candidate.object) : 0;
        storage.key = rounding_key(*extensions_.seed, place_ + (part << 32), candidate.steps);
        new_states_.push_back({candidate.object, keys().step, py::int_(candidate.steps + 1)});
    }
    return storage;
}

void StepPlan::list(Candidate&& candidate, const EntryStorage& storage) {
    Entry& entry = candidate.entry;
    Tensors& found = candidate.tensors;
    Share& share = share_on(found.param->device());
    entry.extent.first_chunk = share.chunks;
    entry.group = group_count_ - 1;
    share.chunks = entry.extent.end_chunk();
    if (candidate.copies_grad) {
        at::NoGradGuard const no_grad;
        Tensor from = std::exchange(found.grad, at::empty_like(*found.param));
        entry.grad = found.grad.mutable_data_ptr();
        share.copies.push_back({share.entries.size(), std::move(from)});
    }
    share.entries.push_back(entry);
    if (extensions_.master_weights || extensions_.seed) {
        share.storages.push_back(storage);
        share.is_ordinary &= storage.storage == Storage::ordinary;
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
    if (on_cpu_ || left_to_torch || first_step_differs_) found_inf_.read();
    if (on_cpu_ || left_to_torch) grad_scale_.read();
    return found_inf_.is_known() && found_inf_.value() != 0;
}

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
        add(Range(*of_entry.param));
        add(Range(of_entry.grad));
        for (const HeldTensor& state : of_entry.states) {
            if (state) add(Range(*state));
        }
        if (of_entry.master_param) add(Range(*of_entry.master_param));
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
            if (!share.storages.empty()) one.storages.push_back(share.storages[i]);
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

}  // namespace fusedstep::optim

// Runs what a plan holds.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <optional>

#include "optim/torch/plan.h"

#if defined(FUSEDSTEP_CUDA)
#include <ATen/ops/empty.h>

#include "optim/cuda.h"
#endif

namespace fusedstep::optim {

using at::Tensor;

Step StepPlan::step_of(const Share& share) const {
    return {groups_.data(),
            group_count_,
            share.entries.data(),
            static_cast<std::int64_t>(share.entries.size()),
            share.is_ordinary ? nullptr : share.storages.data(),
            grad_scale_.value(),
            nullptr,
            nullptr};
}

void StepPlan::copy_gradients(const Share& share) {
    at::NoGradGuard const no_grad;
    for (const GradientCopy& copy : share.copies) share.tensors[copy.entry].grad.copy_(copy.from);
}

void StepPlan::run_on_cpu(const Share& share) const {
    // From a million elements on (half a millisecond from memory) other Python threads may run.
    constexpr std::int64_t kReleaseGil = (std::int64_t{1} << 20) / kChunk;

    Step const step = step_of(share);
    CpuUpdate const update = cpu_kernels().update[optimizer_.number];
    std::optional<py::gil_scoped_release> release;
    if (share.chunks >= kReleaseGil) release.emplace();
    at::parallel_for(
        0, share.chunks, kGrain,
        [&step, update](std::int64_t first, std::int64_t last) { update(step, first, last); });
}

#if defined(FUSEDSTEP_CUDA)

namespace {

// A step's table in the memory of the device, from when the stream comes to what is enqueued next.
Tensor table_on_device(const Optimizer& optimizer, const Step& step, c10::Device device,
                       cudaStream_t stream) {
    std::size_t const size = table_bytes(optimizer.rule, step);
    auto const bytes = static_cast<std::int64_t>(size);
    auto const options = at::TensorOptions(at::kByte);
    if (!is_capturing(device)) {
        Tensor const staging = at::empty({bytes}, options.pinned_memory(kCudaDevice == at::kCUDA));
        write_table(optimizer.rule, step, staging.mutable_data_ptr());
        return staging.to(options.device(device), /*non_blocking=*/true);
    }
    // Every replay of the graph copies again, so that its source must live as long as the graph:
    // nobody says how long that is, and it is never freed.
    void* const staging = new_host_visible(size);
    write_table(optimizer.rule, step, staging);
    Tensor table = at::empty({bytes}, options.device(device));
    check_launch(
        cudaMemcpyAsync(table.mutable_data_ptr(), staging, size, cudaMemcpyHostToDevice, stream),
        optimizer.step_name.c_str());
    return table;
}

// Of each rule, in the order of kRules.
#define FUSEDSTEP_CUDA_UPDATE(R) cuda_update_of<R>,
constexpr CudaUpdate (*kCudaUpdates[])() = {FUSEDSTEP_RULES(FUSEDSTEP_CUDA_UPDATE)};
#undef FUSEDSTEP_CUDA_UPDATE

}  // namespace

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

void StepPlan::prepare_on_cuda(Share& share) const {
    CudaGuard const guard(share.device);
    share.grad_scale = grad_scale_.on(share.device);
    share.found_inf = found_inf_.on(share.device);
    Step const step = step_on_cuda(share);
    if (!table_fits(optimizer_.rule, step)) {
        share.table = table_on_device(optimizer_, step, share.device, current_stream(share.device));
    }
}

void StepPlan::run_on_cuda(const Share& share) const {
    CudaGuard const guard(share.device);
    CudaUpdate const update = kCudaUpdates[optimizer_.number]();
    check_launch(
        update(step_on_cuda(share), share.table.defined() ? share.table.const_data_ptr() : nullptr,
               device_limits(share.device), current_stream(share.device)),
        optimizer_.step_name.c_str());
}

#else

void StepPlan::prepare_on_cuda(Share&) const {}
void StepPlan::run_on_cuda(const Share&) const {}

#endif

void StepPlan::run() {
    CallCounter& calls = optimizer_.calls;
    for (const auto& [device, why_not] : fell_back_) calls.fell_back(device, why_not);
    for (const Share& share : shares_) {
        if (!share.copies.empty()) copy_gradients(share);
        runs_on_cuda(share.device) ? run_on_cuda(share) : run_on_cpu(share);
        calls.fused(share.device, static_cast<std::int64_t>(share.entries.size()));
    }
    std::size_t const states = optimizer_.rule.states.size();
    auto const bump = [](const HeldTensor& tensor) {
        if (tensor) tensor->unsafeGetTensorImpl()->bump_version();
    };
    for (const Share& share : shares_) {
        for (const Tensors& written : share.tensors) {
            if (unscales()) written.grad.unsafeGetTensorImpl()->bump_version();
            bump(written.param);
            for (std::size_t i = 0; i < states; ++i) bump(written.states[i]);
            bump(written.master_param);
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

}  // namespace fusedstep::optim

// The pointwise losses for torch: what is covered, the operators, the autograd node.
//
//   fusedstep::pointwise_loss            what users call; covered here, or torch's own op
//   fusedstep::pointwise_loss_forward    loss, and with it the gradient where it is wanted now
//   fusedstep::pointwise_loss_backward   the gradient, recomputed from the operands
//
// The gradient is computed in the forward pass or in the backward pass: torch_glue/loss.h says
// when.

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/neg.h>
#include <c10/core/GradMode.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "core/compensated_sum.h"
#include "core/reduction.h"
#include "pointwise_loss/binding.h"
#include "pointwise_loss/pointwise_loss.h"
#include "pointwise_loss/torch_operators.h"
#include "torch_glue/coverage.h"
#include "torch_glue/cuda.h"
#include "torch_glue/gradient_memory.h"
#include "torch_glue/loss.h"
#include "torch_glue/node.h"
#include "torch_glue/plain.h"
#include "torch_glue/profiler.h"
#include "torch_glue/traceable_node.h"
#if defined(FUSEDSTEP_CUDA)
#include "pointwise_loss/cuda_entry.h"
#endif

namespace fusedstep::pointwise_loss {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- What is covered ----

// A loss as users see it.
struct Loss {
    CallCounter calls;
    const char* node;  // the name of its node in autograd's graph: that of torch's own
};

// In the order of Kind, without weighted_bce, which is bce_with_logits to users.
std::array<Loss, 5> losses{
    {{CallCounter("l1_loss"), "L1LossBackward0"},
     {CallCounter("mse_loss"), "MseLossBackward0"},
     {CallCounter("smooth_l1_loss"), "SmoothL1LossBackward0"},
     {CallCounter("huber_loss"), "HuberLossBackward0"},
     {CallCounter("binary_cross_entropy_with_logits"), "BinaryCrossEntropyWithLogitsBackward0"}}};

Loss& loss_of(std::int64_t kind) { return losses.at(static_cast<std::size_t>(kind)); }
CallCounter& calls(std::int64_t kind) { return loss_of(kind).calls; }

// Of beta or delta, where there is one.
bool fits_kernels(Kind kind, double parameter) {
    // 1 / (beta numel) is a normal float32.
    if (kind == Kind::smooth_l1) return parameter >= 0x1p-64 && parameter <= 0x1p64;
    return kind != Kind::huber || parameter > 0;
}

// Whether what is beside the input has its dtype, or the one in which the kernels compute it.
bool fits(at::ScalarType type, at::ScalarType input) {
    return type == input || type == accumulate_type(input);
}

// Of a weight or pos_weight, constant and to be expanded to the shape of the input.
Covered<> covered_factor(const OptionalTensor& factor, const Tensor& input) {
    if (!is_given(factor)) return covered;
    if (!is_plain_strided(*factor)) {
        return not_covered("a weight that is sparse, or wrapped by a transform");
    }
    if (factor->device() != input.device()) return not_covered("a weight on another device");
    if (torch::autograd::isFwGradDefined(factor)) {
        return not_covered("forward-mode differentiation");
    }
    if (factor->requires_grad()) return not_covered("a weight that requires a gradient");
    if (!fits(factor->scalar_type(), input.scalar_type())) {
        return not_covered("a weight of another dtype than input");
    }
    if (!at::is_expandable_to(factor->sym_sizes(), input.sym_sizes())) {
        return not_covered("a weight that does not expand to the shape of input");
    }
    return covered;
}

// The dtype of the loss. Decides from metadata alone.
Covered<at::ScalarType> covered_loss_type(const Call& call) {
    const auto& [input, target, weight, pos_weight, kind, reduction, parameter] = call;
    if (!has_kernels(input)) return not_covered("a device without kernels");
    if (in_functorch()) return not_covered("a torch.func transform");
    if (in_jit_trace()) return not_covered("a program that torch.jit.trace records");
    if (!is_plain_strided(input)) return not_covered("input is sparse, or wrapped by a transform");
    if (!is_plain_strided(target)) {
        return not_covered("target is sparse, or wrapped by a transform");
    }
    if (target.device() != input.device()) return not_covered("target on another device");
    if (torch::autograd::isFwGradDefined(input) || torch::autograd::isFwGradDefined(target)) {
        return not_covered("forward-mode differentiation");
    }
    if (input.dim() > kMaxDims) {
        return not_covered("a number of dimensions that the kernels do not walk");
    }
    if (input.sym_sizes() != target.sym_sizes()) return not_covered("shapes that broadcast");
    if (!fits_kernels(kind, parameter)) {
        return parameter > 0 ? not_covered("a beta of an extreme size")
                             : not_covered("beta or delta is not positive");
    }
    if ((is_given(weight) || is_given(pos_weight)) && kind != Kind::bce_with_logits) {
        return not_covered("a weight for each element");
    }
    for (const OptionalTensor* factor : {&weight, &pos_weight}) {
        if (auto const answer = covered_factor(*factor, input); !answer) return answer.why_not();
    }
    if (target.requires_grad()) {
        if (!is_of_difference(kind)) return not_covered("a target that requires a gradient");
        if (target.scalar_type() != input.scalar_type()) {
            return not_covered("a target of another dtype that requires a gradient");
        }
    }
    if (kind == Kind::l1 && (input.is_inference() || target.is_inference()) &&
        c10::GradMode::is_enabled() && (input.requires_grad() || target.requires_grad())) {
        return not_covered("an inference tensor, which cannot be saved for backward");
    }
    at::ScalarType const type = input.scalar_type();
    if (!kernel_dtype(type)) return not_covered("a dtype that the kernels do not compute");
    bool const widened = is_narrow(type) && in_autocast(input);
    bool const mixed = widened && target.scalar_type() == at::kFloat;
    if (target.scalar_type() != type && !mixed) {
        return not_covered("a target of another dtype than input");
    }
    return widened ? at::kFloat : type;
}

// ---- Kernel arguments ----

// The operands as a kernel wants them: dimensions in the order of the input's memory, merged
// wherever all operands allow it.
struct KernelArgs {
    Args args{};

    KernelArgs(const Call& call, const Tensor& loss, const Tensor& grad,
               const Tensor& grad_output) {
        const Tensor& input = call.input;
        check(call, loss, grad_output);
        args.kind = is_given(call.pos_weight) ? Kind::weighted_bce : call.kind;
        args.numel = input.numel();
        args.dtype = *kernel_dtype(input.scalar_type());
        args.parameter = call.parameter;
        args.target_dtype = *kernel_dtype(call.target.scalar_type());
        if (is_given(call.weight)) args.weight_dtype = *kernel_dtype(call.weight->scalar_type());
        if (is_given(call.pos_weight)) {
            args.pos_weight_dtype = *kernel_dtype(call.pos_weight->scalar_type());
        }
        args.derivative_scale =
            derivative_scale(args.kind, args.parameter, call.divisor(), args.dtype);

        std::array<std::pair<Operand*, Tensor>, 7> operands{
            {{&args.input, input},
             {&args.target, call.target},
             {&args.weight, is_given(call.weight) ? call.weight->expand_as(input) : Tensor()},
             {&args.pos_weight,
              is_given(call.pos_weight) ? call.pos_weight->expand_as(input) : Tensor()},
             {&args.grad, grad},
             {&args.loss, loss},
             {&args.grad_output, grad_output}}};
        for (auto& [operand, tensor] : operands) {
            if (tensor.defined()) operand->data = const_cast<void*>(tensor.const_data_ptr());
        }
        if (loss.defined()) args.loss_dtype = *kernel_dtype(loss.scalar_type());
        if (grad_output.defined()) {
            args.grad_output_dtype = *kernel_dtype(grad_output.scalar_type());
        }

        std::array<std::int64_t, kMaxDims> order{};
        std::iota(order.begin(), order.begin() + input.dim(), 0);
        std::stable_sort(
            order.begin(), order.begin() + input.dim(),
            [&](std::int64_t a, std::int64_t b) { return input.stride(a) > input.stride(b); });
        for (std::int64_t i = 0; i < input.dim(); ++i) {
            std::int64_t const d = order[static_cast<std::size_t>(i)];
            std::int64_t const size = input.size(d);
            if (size == 1) continue;
            bool merge = args.dims > 0;
            for (const auto& [operand, tensor] : operands) {
                merge = merge && (!tensor.defined() ||
                                  operand->strides[args.dims - 1] == size * tensor.stride(d));
            }
            if (!merge) ++args.dims;
            int const last = args.dims - 1;
            args.sizes[last] = merge ? args.sizes[last] * size : size;
            for (const auto& [operand, tensor] : operands) {
                if (tensor.defined()) operand->strides[last] = tensor.stride(d);
            }
        }
        if (args.dims == 0) {  // one element
            args.dims = 1;
            args.sizes[0] = 1;
            for (const auto& [operand, tensor] : operands) operand->strides[0] = 1;
            if (grad_output.defined()) args.grad_output.strides[0] = 0;
        }
        auto const adjacent = [](const Operand& operand) {
            return !operand.data || operand.strides[0] == 1;
        };
        args.adjacent = args.dims == 1 && adjacent(args.input) && adjacent(args.target) &&
                        adjacent(args.grad) && !args.weight.data && !args.pos_weight.data;
    }

private:
    // The operators can be called without what pointwise_loss() checks first.
    static void check(const Call& call, const Tensor& loss, const Tensor& grad_output) {
        const Tensor& input = call.input;
        at::ScalarType const type = input.scalar_type();
        TORCH_CHECK(kernel_dtype(type),
                    "pointwise_loss: the kernels do not compute input of dtype ", type);
        TORCH_CHECK(input.dim() <= kMaxDims, "pointwise_loss: the kernels do not walk input of ",
                    input.dim(), " dimensions");
        TORCH_CHECK(input.sizes() == call.target.sizes(), "pointwise_loss: target of shape ",
                    call.target.sizes(), " does not fit input of shape ", input.sizes());
        TORCH_CHECK(fits_kernels(call.kind, call.parameter),
                    "pointwise_loss: the kernels do not compute a parameter of ", call.parameter);
        check_fits("target", call.target, input);
        check_fits("loss", loss, input);
        check_fits("grad_output", grad_output, input);
        check_factor("weight", call.weight, call);
        check_factor("pos_weight", call.pos_weight, call);
    }

    static void check_fits(const char* name, const Tensor& tensor, const Tensor& input) {
        if (!tensor.defined()) return;
        TORCH_CHECK(fits(tensor.scalar_type(), input.scalar_type()), "pointwise_loss: ", name,
                    " of dtype ", tensor.scalar_type(), " does not fit input of dtype ",
                    input.scalar_type());
        TORCH_CHECK(tensor.device() == input.device(), "pointwise_loss: ", name, " on ",
                    tensor.device(), " does not fit input on ", input.device());
    }

    static void check_factor(const char* name, const OptionalTensor& factor, const Call& call) {
        if (!is_given(factor)) return;
        TORCH_CHECK(call.kind == Kind::bce_with_logits, "pointwise_loss: ", name,
                    " is for a binary cross-entropy, not for kind ", static_cast<int>(call.kind));
        check_fits(name, *factor, call.input);
        TORCH_CHECK(at::is_expandable_to(factor->sizes(), call.input.sizes()),
                    "pointwise_loss: ", name, " of shape ", factor->sizes(),
                    " does not expand to input of shape ", call.input.sizes());
    }
};

struct Outputs {
    Tensor loss;
    Tensor grad;  // undefined where it is not wanted

    Outputs(const Call& call, at::ScalarType loss_dtype, Tensor grad_)
        : loss(call.is_reduced()
                   ? empty_beside(call.input, {}, loss_dtype)
                   : at::empty_like(call.input, call.input.options().dtype(loss_dtype))),
          grad(std::move(grad_)) {
        at::ScalarType const type = call.input.scalar_type();
        TORCH_CHECK(fits(loss_dtype, type), "pointwise_loss: a loss of dtype ", loss_dtype,
                    " does not fit input of dtype ", type);
    }
    std::tuple<Tensor, Tensor> tuple(const Call& call) const {
        return {loss, grad.defined() ? grad : nothing(call.input, call.input.scalar_type())};
    }
};

// Of the arguments of an operator, which can be called with any numbers.
Call make_call(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
               const OptionalTensor& pos_weight, std::int64_t kind, std::int64_t reduction,
               double parameter) {
    TORCH_CHECK(static_cast<std::size_t>(kind) < losses.size(), "pointwise_loss: there is no kind ",
                kind);
    return {input,
            target,
            weight,
            pos_weight,
            static_cast<Kind>(kind),
            reduction_of("pointwise_loss", reduction),
            parameter};
}

// ---- CPU ----

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& input, const Tensor& target,
                                       const OptionalTensor& weight,
                                       const OptionalTensor& pos_weight, std::int64_t kind,
                                       std::int64_t reduction, double parameter,
                                       at::ScalarType loss_dtype, bool with_grad) {
    Call const call = make_call(input, target, weight, pos_weight, kind, reduction, parameter);
    Outputs const out(call, loss_dtype, with_grad ? empty_gradient(input) : Tensor());
    KernelArgs const kernel(call, call.is_reduced() ? Tensor() : out.loss, out.grad, Tensor());
    const Args& args = kernel.args;
    c10::SmallVector<double, 64> sums((args.numel + kChunk - 1) / kChunk);
    for_each_chunk(args.numel, kChunk,
                   [&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
                       sums[chunk] = cpu_kernels().forward(args, begin, end);
                   });
    if (call.is_reduced()) {
        CompensatedSum total;
        for (double sum : sums) total.add(sum);
        write_scalar(out.loss, 0, total.total() / call.divisor());
    }
    calls(kind).fused(input.device());
    return out.tuple(call);
}

// A grad_output of the shape of a loss, as a kernel reads it: expanded where it is one value.
Tensor upstream_for(const Call& call, const Tensor& grad_output) {
    TORCH_CHECK(grad_output.numel() == 1 || grad_output.sizes() == call.input.sizes(),
                "grad_output of shape ", grad_output.sizes(), " does not fit input of shape ",
                call.input.sizes());
    return grad_output.expand(call.input.sizes());
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                    const OptionalTensor& weight, const OptionalTensor& pos_weight,
                    std::int64_t kind, std::int64_t reduction, double parameter) {
    Call const call = make_call(input, target, weight, pos_weight, kind, reduction, parameter);
    Tensor const grad = empty_gradient(input);
    KernelArgs const kernel(call, Tensor(), grad, upstream_for(call, grad_output));
    for_each_chunk(kernel.args.numel, kChunk,
                   [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                       cpu_kernels().backward(kernel.args, begin, end);
                   });
    return grad;
}

// ---- CUDA: one launch each way, no synchronisation ----

#if defined(FUSEDSTEP_CUDA)

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& input, const Tensor& target,
                                        const OptionalTensor& weight,
                                        const OptionalTensor& pos_weight, std::int64_t kind,
                                        std::int64_t reduction, double parameter,
                                        at::ScalarType loss_dtype, bool with_grad) {
    CudaGuard const guard(input.device());
    const DeviceLimits& limits = device_limits(input.device());
    Call const call = make_call(input, target, weight, pos_weight, kind, reduction, parameter);
    Outputs const out(call, loss_dtype, with_grad ? at::empty_like(input) : Tensor());
    KernelArgs kernel(call, call.is_reduced() ? Tensor() : out.loss, out.grad, Tensor());
    kernel.args.loss_dtype = *kernel_dtype(loss_dtype);
    Tensor const totals = at::empty({call.is_reduced() ? max_blocks(kernel.args, limits) : 0},
                                    input.options().dtype(at::kDouble));
    ForwardArgs const args{kernel.args, call.is_reduced() ? out.loss.mutable_data_ptr() : nullptr,
                           call.divisor(), static_cast<double*>(totals.mutable_data_ptr())};
    check_launch(forward(args, limits, current_stream(input.device())), "pointwise_loss");
    calls(kind).fused(input.device());
    return out.tuple(call);
}

// Writes the gradient. Where it is the one for a grad_output of 1 already, nothing happens if that
// is what grad_output is.
void write_backward_cuda(const Call& call, const Tensor& grad_output, const Tensor& grad,
                         bool keep_if_one) {
    CudaGuard const guard(grad.device());
    KernelArgs const kernel(call, Tensor(), grad, upstream_for(call, grad_output));
    BackwardArgs const args{kernel.args, keep_if_one};
    check_launch(backward(args, device_limits(grad.device()), current_stream(grad.device())),
                 "pointwise_loss_backward");
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                     const OptionalTensor& weight, const OptionalTensor& pos_weight,
                     std::int64_t kind, std::int64_t reduction, double parameter) {
    Call const call = make_call(input, target, weight, pos_weight, kind, reduction, parameter);
    Tensor const grad = at::empty_like(input);
    write_backward_cuda(call, grad_output, grad, /*keep_if_one=*/false);
    return grad;
}

#endif

// ---- Operators ----

const auto& forward_op() {
    static auto const op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fusedstep::pointwise_loss_forward", "")
                               .typed<decltype(forward_cpu)>();
    return op;
}

const auto& backward_op() {
    static auto const op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fusedstep::pointwise_loss_backward", "")
                               .typed<decltype(backward_cpu)>();
    return op;
}

// ---- Autograd ----

struct PointwiseLossBackward : TraceableNode<PointwiseLossBackward, 2> {
    SavedVariable input;
    SavedVariable target;
    SavedOptional weight;
    SavedOptional pos_weight;
    std::int64_t kind = 0;
    std::int64_t reduction = 0;
    double parameter = 0;
    at::ScalarType loss_dtype = at::kFloat;
    std::uint64_t forward_capture = 0;
    Tensor grad;  // for a grad_output of 1; undefined where it is recomputed

    std::string name() const override { return loss_of(kind).node; }

    template <class F>
    void visit(const F& f) {
        f(input), f(target), f(weight.saved), f(weight.given), f(pos_weight.saved);
        f(pos_weight.given), f(kind), f(reduction), f(parameter), f(loss_dtype), f(grad);
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        input.reset_data();
        target.reset_data();
        weight.saved.reset_data();
        pos_weight.saved.reset_data();
        grad = Tensor();
        released_ = true;
    }

    variable_list apply(variable_list&& grad_outputs) override {
        std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
        const Tensor& grad_output = grad_outputs[0];
        Wanted const wanted = wanted_gradients();
        if (!grad_output.defined() || !(wanted[0] || wanted[1])) return {Tensor(), Tensor()};
        if (is_differentiated(grad_outputs)) return differentiable(grad_outputs, wanted);
        return gradients(grad_outputs, wanted);
    }

    variable_list gradients(const variable_list& grad_outputs, Wanted wanted) {
        const Tensor& grad_output = grad_outputs[0];
        auto const [of_input, of_target] = wanted;
        Tensor result = grad.defined() ? scaled_gradient(*this, grad, grad_output, symbolic)
                                       : recomputed(grad_output);
        if (!of_target) return {std::move(result), Tensor()};
        if (!of_input) return {Tensor(), result.neg_()};  // never what is saved
        Tensor opposite = at::neg(result);
        return {std::move(result), std::move(opposite)};
    }

    Tensor recomputed(const Tensor& grad_output) {
        // Unpacking may run a whole forward pass, with autograd (torch.utils.checkpoint).
        Call const saved = operands_ ? *operands_ : saved_call();
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return backward_op().call(grad_output, saved.input, saved.target, saved.weight,
                                  saved.pos_weight, kind, reduction, parameter);
    }

#if defined(FUSEDSTEP_CUDA)
    void recompute_into(const Tensor& result, const Tensor& grad_output) {
        write_backward_cuda(saved_call(), grad_output, result, /*keep_if_one=*/true);
    }
#endif

private:
    bool released_ = false;
    const Call* operands_ = nullptr;  // unpacked already: a checkpoint lets that happen only once

    Call saved_call() const {
        return make_call(input.unpack(), target.unpack(), weight.unpack(), pos_weight.unpack(),
                         kind, reduction, parameter);
    }

    // The same gradients as differentiable functions of the operands and of what arrived.
    variable_list differentiable(const variable_list& grad_outputs, Wanted wanted) {
        c10::AutoGradMode const with_graph(true);
        const Tensor& grad_output = grad_outputs[0];
        Call const call = saved_call();
        calls(kind).fell_back(call.input.device(), kDifferentiableBackward);
        if (symbolic || !is_constant(grad_output)) {
            Tensor const of_input = differentiable_gradient(grad_output, call);
            variable_list result(2);
            if (wanted[0]) result[0] = of_input;
            if (wanted[1]) result[1] = of_input.neg().to(call.target.scalar_type());
            return result;
        }
        operands_ = &call;
        auto const forget = c10::make_scope_exit([this] { operands_ = nullptr; });
        variable_list result = [&] {
            c10::NoGradGuard const values;
            return gradients(grad_outputs, wanted);
        }();
        make_differentiable(result[0], result[1], grad_output, call);
        return result;
    }
};

// A type for each loss: Python shows the name of a type.
template <Kind kind>
struct BackwardOf final : PointwiseLossBackward {};

auto make_backward(Kind kind) {
    using Pointer = decltype(make_node<PointwiseLossBackward>());
    return with_kind(kind, [](auto k) -> Pointer { return make_node<BackwardOf<k()>>(); });
}

Tensor fused(const Call& call, at::ScalarType loss_dtype) {
    bool const with_grad =
        c10::GradMode::is_enabled() && (call.input.requires_grad() || call.target.requires_grad());
    bool const symbolic = is_symbolic(call.input) || in_dispatch_mode();
    bool const grad_now =
        with_grad && gradient_in_forward(call.input.scalar_type(), call.is_reduced(), symbolic);
    auto const kind = static_cast<std::int64_t>(call.kind);
    auto const reduction = static_cast<std::int64_t>(call.reduction);
    auto [loss, grad] = [&] {
        LossEvent const event(calls(kind).op(), with_grad, call.input, call.target);
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return forward_op().call(call.input, call.target, call.weight, call.pos_weight, kind,
                                 reduction, call.parameter, loss_dtype, grad_now);
    }();
    if (with_grad) {
        auto node = make_backward(call.kind);
        node->set_next_edges(torch::autograd::collect_next_edges(call.input, call.target));
        node->input = SavedVariable(call.input, /*is_output=*/false);
        node->target = SavedVariable(call.target, /*is_output=*/false);
        node->weight.save(call.weight);
        node->pos_weight.save(call.pos_weight);
        node->kind = kind;
        node->reduction = reduction;
        node->parameter = call.parameter;
        node->loss_dtype = loss_dtype;
        node->symbolic = symbolic;
        if (grad_now && !symbolic) node->forward_capture = capture_around(call.input);
        if (grad_now) node->grad = std::move(grad);
        torch::autograd::set_history(loss, node);
    }
    return loss;
}

OptionalTensor covered_loss(const Call& call) {
    auto const loss_dtype = covered_loss_type(call);
    if (!loss_dtype) {
        calls(static_cast<std::int64_t>(call.kind))
            .fell_back(call.input.device(), loss_dtype.why_not());
        return std::nullopt;
    }
    return fused(call, *loss_dtype);
}

Tensor pointwise_loss_op(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& pos_weight, std::int64_t kind,
                         std::int64_t reduction, double parameter) {
    Call const call = make_call(input, target, weight, pos_weight, kind, reduction, parameter);
    OptionalTensor loss = covered_loss(call);
    return loss ? std::move(*loss) : torch_loss(call);
}

}  // namespace

OptionalTensor pointwise_loss(const Tensor& input, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& pos_weight,
                              std::int64_t kind, std::int64_t reduction, double parameter) {
    return covered_loss(make_call(input, target, weight, pos_weight, kind, reduction, parameter));
}

std::vector<std::pair<const std::type_info*, const char*>> backward_node_types() {
    std::vector<std::pair<const std::type_info*, const char*>> types;
    for (std::size_t kind = 0; kind < losses.size(); ++kind) {
        with_kind(static_cast<Kind>(kind),
                  [&](auto k) { types.emplace_back(&typeid(BackwardOf<k()>), losses[kind].node); });
    }
    return types;
}

TORCH_LIBRARY_FRAGMENT(fusedstep, m) {
    m.set_python_module("fusedstep.fakes");
    m.def(
        "pointwise_loss(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, int kind, "
        "int reduction, float parameter) -> Tensor",
        pointwise_loss_op);
    m.def(
        "pointwise_loss_forward(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
        "int kind, int reduction, float parameter, ScalarType loss_dtype, bool with_grad) -> "
        "(Tensor loss, Tensor grad)");
    m.def(
        "pointwise_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
        "Tensor? pos_weight, int kind, int reduction, float parameter) -> Tensor");
}

#if !defined(FUSEDSTEP_EMULATED_CUDA)
TORCH_LIBRARY_IMPL(fusedstep, CPU, m) {
    m.impl("pointwise_loss_forward", forward_cpu);
    m.impl("pointwise_loss_backward", backward_cpu);
}
#endif

#if defined(FUSEDSTEP_CUDA)
TORCH_LIBRARY_IMPL(fusedstep, FUSEDSTEP_CUDA_KEY, m) {
    m.impl("pointwise_loss_forward", forward_cuda);
    m.impl("pointwise_loss_backward", backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(fusedstep, Autograd, m) {
    m.impl("pointwise_loss_forward", torch::autograd::autogradNotImplementedFallback());
    m.impl("pointwise_loss_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fusedstep::pointwise_loss

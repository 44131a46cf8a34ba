#include "pointwise_loss/torch_operators.h"

#include <ATen/ops/abs.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/huber_loss.h>
#include <ATen/ops/l1_loss.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/smooth_l1_loss.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <string>
#include <utility>

#include "pointwise_loss/binding.h"
#include "torch_glue/node.h"
#include "torch_glue/traceable_node.h"

namespace fusedstep::pointwise_loss {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The factor that is one number in all derivatives of a call.
double constant_factor(const Call& call) {
    double const factor = call.kind == Kind::mse ? 2 : 1;
    return factor / (call.kind == Kind::smooth_l1 ? call.parameter : 1) / call.divisor();
}

// What backward of the gradient gives the input for v: v times the second derivative, in the type
// of v or a wider one. The values alone. Where a loss has a corner, torch's 0.
Tensor second_derivative(const Tensor& v, const Tensor& grad_output, const Call& call) {
    if (call.kind == Kind::l1) return at::zeros_like(v);
    // A product of two numbers and a power of two is rounded once in any type.
    bool const rounds_once = call.kind == Kind::mse && call.reduction != Reduction::mean;
    at::ScalarType const type =
        rounds_once ? v.scalar_type() : accumulate_type(call.input.scalar_type());
    double const factor = constant_factor(call);
    Tensor k = converted(grad_output, type);
    bool const one = k.dim() == 0;
    if (one && factor != 1) k = k * factor;
    Tensor scaled = at::mul(converted(v, type), k);
    if (!one && factor != 1) scaled.mul_(factor);
    if (is_given(call.weight)) scaled.mul_(*call.weight);
    switch (call.kind) {
        case Kind::smooth_l1:
        case Kind::huber: {
            Tensor const d = at::sub(converted(call.input, type), call.target);
            return at::hardtanh_backward(scaled, d, -call.parameter, call.parameter);
        }
        case Kind::bce_with_logits:
        case Kind::weighted_bce: {
            if (is_given(call.pos_weight)) {
                Tensor const t = converted(call.target, type);
                scaled.mul_(at::sub(*call.pos_weight, 1).mul(t).add_(1));
            }
            // s (1 - s) is even in x; of -|x| neither factor cancels.
            Tensor const s = converted(at::abs(call.input), type).neg_().sigmoid_();
            return at::sigmoid_backward(scaled, s);
        }
        case Kind::l1:
        case Kind::mse:
            break;
    }
    return scaled;
}

// The gradients as functions of input and target: of one of them or of both, in this order.
struct PointwiseLossBackwardBackward0 final : TraceableNode<PointwiseLossBackwardBackward0, 2> {
    SavedVariable input;
    SavedVariable target;
    SavedVariable grad_output;
    SavedOptional weight;
    SavedOptional pos_weight;
    std::int64_t kind = 0;
    std::int64_t reduction = 0;
    double parameter = 0;
    bool of_input = false;
    bool of_target = false;

    std::string name() const override { return "PointwiseLossBackwardBackward0"; }

    template <class F>
    void visit(const F& f) {
        f(input), f(target), f(grad_output), f(weight.saved), f(weight.given), f(pos_weight.saved);
        f(pos_weight.given), f(kind), f(reduction), f(parameter), f(of_input), f(of_target);
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        input.reset_data();
        target.reset_data();
        grad_output.reset_data();
        weight.saved.reset_data();
        pos_weight.saved.reset_data();
        released_ = true;
    }

    variable_list apply(variable_list&& arrived) override {
        std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
        Wanted const wanted = wanted_gradients();
        if (!is_differentiated(arrived)) return gradients(arrived, wanted);
        c10::AutoGradMode const with_graph(true);
        Tensor const v = toward_input(arrived);
        if (!v.defined() || !(wanted[0] || wanted[1])) return variable_list(2);
        Call call = saved_call();
        // Without the hooks of the operands, one of which may be a function of the other.
        call.input = call.input.alias();
        call.target = call.target.alias();
        variable_list of;
        if (wanted[0]) of.push_back(call.input);
        if (wanted[1]) of.push_back(call.target);
        variable_list grads =
            torch::autograd::grad({differentiable_gradient(grad_output.unpack(), call)}, of, {v},
                                  /*retain_graph=*/true, /*create_graph=*/true);
        variable_list result(2);
        if (wanted[1]) result[1] = grads.back();
        if (wanted[0]) result[0] = grads.front();
        return result;
    }

    variable_list gradients(const variable_list& arrived, Wanted wanted) {
        variable_list result(2);
        Tensor const v = toward_input(arrived);
        if (!v.defined() || !(wanted[0] || wanted[1])) return result;
        Call const call = saved_call();
        Tensor const k = grad_output.unpack();
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        Tensor const second = second_derivative(v, k, call);
        if (wanted[0]) result[0] = converted(second, call.input.scalar_type());
        if (wanted[1]) result[1] = second.neg().to(call.target.scalar_type());
        return result;
    }

private:
    bool released_ = false;

    Call saved_call() const {
        return {input.unpack(),
                target.unpack(),
                weight.unpack(),
                pos_weight.unpack(),
                static_cast<Kind>(kind),
                static_cast<Reduction>(reduction),
                parameter};
    }

    // What arrived for both gradients, as if for the one with respect to the input.
    Tensor toward_input(const variable_list& arrived) const {
        Tensor const v = of_input ? arrived.front() : Tensor();
        Tensor const opposite = of_target ? arrived.back() : Tensor();
        if (!opposite.defined()) return v;
        return v.defined() ? at::sub(v, opposite) : opposite.neg();
    }
};

}  // namespace

Tensor torch_loss(const Call& call) {
    auto const reduction = static_cast<std::int64_t>(call.reduction);
    switch (call.kind) {
        case Kind::l1:
            return at::l1_loss(call.input, call.target, reduction);
        case Kind::mse:
            return at::mse_loss(call.input, call.target, reduction);
        case Kind::smooth_l1:
            return at::smooth_l1_loss(call.input, call.target, reduction, call.parameter);
        case Kind::huber:
            return at::huber_loss(call.input, call.target, reduction, call.parameter);
        case Kind::bce_with_logits:
        case Kind::weighted_bce:
            break;
    }
    return at::binary_cross_entropy_with_logits(call.input, call.target, call.weight,
                                                call.pos_weight, reduction);
}

Tensor differentiable_gradient(const Tensor& grad_output, const Call& call) {
    at::ScalarType const type = accumulate_type(call.input.scalar_type());
    Tensor const x = converted(call.input, type);
    Tensor const t = converted(call.target, type);
    auto const derivative = [&] {
        switch (call.kind) {
            case Kind::l1:
                return at::sign(x - t);
            case Kind::mse:
                return x - t;
            case Kind::smooth_l1:
            case Kind::huber:  // hardtanh's own derivative at a bound is 0, unlike clamp's
                return at::hardtanh(x - t, -call.parameter, call.parameter);
            case Kind::bce_with_logits:
            case Kind::weighted_bce:
                break;
        }
        // (1 - t) s - q t (1 - s): for targets of 0 and 1 nothing cancels in either tail.
        Tensor const positive =
            is_given(call.pos_weight) ? converted(*call.pos_weight, type) * t : t;
        return (1 - t) * x.sigmoid() - positive * x.neg().sigmoid();
    };
    Tensor k = converted(grad_output, type) * constant_factor(call);
    if (is_given(call.weight)) k = k * converted(*call.weight, type);
    return converted(derivative() * k, call.input.scalar_type());
}

void make_differentiable(Tensor& of_input, Tensor& of_target, const Tensor& grad_output,
                         const Call& call) {
    auto node = make_node<PointwiseLossBackwardBackward0>();
    node->set_next_edges(torch::autograd::collect_next_edges(call.input, call.target));
    node->input = SavedVariable(call.input, /*is_output=*/false);
    node->target = SavedVariable(call.target, /*is_output=*/false);
    node->grad_output = SavedVariable(grad_output, /*is_output=*/false);
    node->weight.save(call.weight);
    node->pos_weight.save(call.pos_weight);
    node->kind = static_cast<std::int64_t>(call.kind);
    node->reduction = static_cast<std::int64_t>(call.reduction);
    node->parameter = call.parameter;
    node->of_input = of_input.defined();
    node->of_target = of_target.defined();
    if (of_input.defined()) torch::autograd::set_history(of_input, node);
    if (of_target.defined()) torch::autograd::set_history(of_target, node);
}

const std::type_info& double_backward_node_type() { return typeid(PointwiseLossBackwardBackward0); }

}  // namespace fusedstep::pointwise_loss

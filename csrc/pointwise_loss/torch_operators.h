// The losses of this folder of torch's operators: for what the kernels do not cover, and for a
// gradient that is differentiated itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "core/reduction.h"
#include "pointwise_loss/math.h"
#include "torch_glue/loss.h"

namespace fusedstep::pointwise_loss {

// The tensors and numbers of one call.
struct Call {
    at::Tensor input;
    at::Tensor target;
    OptionalTensor weight;
    OptionalTensor pos_weight;
    Kind kind;
    Reduction reduction;
    double parameter;

    bool is_reduced() const { return reduction != Reduction::none; }
    // Of the reduced loss.
    double divisor() const {
        return reduction == Reduction::mean ? static_cast<double>(input.numel()) : 1.0;
    }
};

// A tensor that may not be there, saved for backward.
struct SavedOptional {
    torch::autograd::SavedVariable saved;
    bool given = false;

    void save(const OptionalTensor& tensor) {
        given = is_given(tensor);
        if (given) saved = torch::autograd::SavedVariable(*tensor, /*is_output=*/false);
    }
    OptionalTensor unpack() const { return given ? OptionalTensor(saved.unpack()) : std::nullopt; }
};

// torch's own loss.
at::Tensor torch_loss(const Call& call);

// The gradient with respect to the input, in its dtype, as a differentiable function of input,
// target and grad_output; weights are constants. Closed formulas, so that no loss is computed on
// the way. Of a loss of input - target alone, the target's is minus this one.
at::Tensor differentiable_gradient(const at::Tensor& grad_output, const Call& call);

// Makes the values that a kernel has computed of these gradients, one of which may be undefined,
// functions of input and target in autograd's graph. grad_output is a constant.
void make_differentiable(at::Tensor& of_input, at::Tensor& of_target, const at::Tensor& grad_output,
                         const Call& call);

}  // namespace fusedstep::pointwise_loss

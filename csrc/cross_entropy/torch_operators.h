// The losses of this folder of torch's operators: for what the kernels do not cover, and for a
// gradient that is differentiated itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "torch_glue/loss.h"

namespace fusedstep::cross_entropy {

// What is computed of the tensors.
struct Options {
    std::int64_t reduction;  // a Reduction
    std::int64_t ignore_index;
    double label_smoothing = 0;
    double z_loss = 0;
    std::optional<double> gamma{};  // of focal loss; none: cross-entropy
};

inline bool is_class_index(const at::Tensor& target) {
    return target.scalar_type() == at::kLong || target.scalar_type() == at::kByte;
}

inline std::int64_t class_dim(const at::Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

inline c10::SymInt class_count(const at::Tensor& logits) {
    return logits.sym_size(class_dim(logits));
}

// The shape of class indices for these logits: theirs without the class dimension.
c10::SymDimVector index_shape(const at::Tensor& logits);

// What a loss is computed of; target and weight are constants.
struct Operands {
    at::Tensor logits;
    at::Tensor target;
    OptionalTensor weight;
};

struct LossAndLse {
    at::Tensor loss;
    at::Tensor lse;
};

// What the kernels compute, as a differentiable function. Raises torch's errors. The loss is in the
// logits' type or a wider one, lse in the type that is computed in.
LossAndLse composed(const Operands& operands, const Options& options);

// The gradient with respect to the logits, in their type, as a differentiable function of them and
// of what arrived for the loss and for lse (one of which may be undefined). Closed formulas, so
// that no loss is computed on the way. Exactly 0 in an ignored row, whatever its logits and
// whatever arrived, and so are all its derivatives.
at::Tensor differentiable_gradient(const at::Tensor& grad_loss, const at::Tensor& grad_lse,
                                   const Operands& operands, const Options& options);

// Makes the values that a kernel has computed of this gradient, for a cross-entropy (without z_loss
// and gamma) and with nothing arrived for lse, a function of the logits in autograd's graph.
// grad_loss is a constant.
void make_differentiable(at::Tensor& gradient, const at::Tensor& grad_loss,
                         const Operands& operands, const Options& options);

}  // namespace fusedstep::cross_entropy

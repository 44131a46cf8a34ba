// What the Python module binds of this room.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <typeinfo>

namespace fusedstep::cross_entropy {

// Cross-entropy of plain tensors, or nothing where the kernels do not cover the arguments and
// torch's own op has to run (and to raise torch's own errors). `reduction` is a Reduction.
//
// Raises ValueError or RuntimeError (the type torch raises) for a target whose shape does not fit
// the logits, and on the CPU IndexError for a class index out of range, all before anything is
// written. On CUDA nothing waits for the targets to be known: the IndexError is raised by the next
// call, or by check_targets().
std::optional<at::Tensor> cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                        const std::optional<at::Tensor>& weight,
                                        std::int64_t reduction, std::int64_t ignore_index,
                                        double label_smoothing);

// The same of cross-entropy plus z_loss times the squared log-sum-exp of each row, and these
// log-sum-exps. Raises ValueError for a z_loss that is negative or not finite.
std::optional<std::tuple<at::Tensor, at::Tensor>> cross_entropy_with_lse(
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    std::int64_t reduction, std::int64_t ignore_index, double label_smoothing, double z_loss);

// The gradient of the loss of each row with respect to the logits, for the grad_rows that arrived,
// as a differentiable function of both, of torch's operators.
at::Tensor cross_entropy_gradient(const at::Tensor& grad_rows, const at::Tensor& logits,
                                  const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                  std::int64_t ignore_index, double label_smoothing);

// The loss as cross_entropy() gives it, of focal loss, for class indices alone. Raises ValueError
// for a gamma that is negative or not finite.
std::optional<at::Tensor> focal_loss(const at::Tensor& logits, const at::Tensor& target,
                                     const std::optional<at::Tensor>& weight,
                                     std::int64_t reduction, std::int64_t ignore_index,
                                     double gamma);

// Waits for a CUDA device and raises IndexError for a class index out of range that any call on it
// has met since the last such error. On other devices there is nothing to check.
void check_targets(c10::Device device);

// The types of the autograd nodes, so that Python can show their names; the second is that of a
// gradient with create_graph=True.
const std::type_info& backward_node_type();
const std::type_info& double_backward_node_type();

}  // namespace fusedstep::cross_entropy

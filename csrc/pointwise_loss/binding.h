// What the Python module binds of this room.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <typeinfo>
#include <utility>
#include <vector>

namespace fusedstep::pointwise_loss {

// A loss of plain tensors, or nothing where the kernels do not cover the arguments and torch's own
// op has to run (and to warn, or to raise torch's own errors). `kind` is a Kind, `reduction` a
// Reduction, `parameter` smooth_l1's beta or huber's delta.
std::optional<at::Tensor> pointwise_loss(const at::Tensor& input, const at::Tensor& target,
                                         const std::optional<at::Tensor>& weight,
                                         const std::optional<at::Tensor>& pos_weight,
                                         std::int64_t kind, std::int64_t reduction,
                                         double parameter);

// The type of each loss's autograd node, and the name that Python is to show.
std::vector<std::pair<const std::type_info*, const char*>> backward_node_types();

// The type of the node of a gradient with create_graph=True.
const std::type_info& double_backward_node_type();

}  // namespace fusedstep::pointwise_loss

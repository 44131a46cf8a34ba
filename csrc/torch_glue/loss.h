// What the losses' torch files share: values on the CPU, chunks of work, and what becomes of a
// gradient that the forward pass has computed.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "core/dtype.h"
#include "core/reduction.h"
#include "torch_glue/cuda.h"
#include "torch_glue/plain.h"
#if defined(FUSEDSTEP_CUDA)
#include "core/cuda_scale.h"
#endif

namespace fusedstep {

using OptionalTensor = std::optional<at::Tensor>;

inline bool is_given(const OptionalTensor& tensor) {
    return tensor.has_value() && tensor->defined();
}

// Past the dispatcher where there is nothing to convert.
inline at::Tensor converted(const at::Tensor& tensor, at::ScalarType type) {
    return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// The argument of an operator, which can be called with any number; raises for what it is not.
inline Reduction reduction_of(const char* op, std::int64_t code) {
    TORCH_CHECK(is_reduction(code), op, ": there is no reduction ", code);
    return static_cast<Reduction>(code);
}

// On a device that this build has kernels for; of a fake tensor too.
inline bool has_kernels(const at::Tensor& tensor) {
#if defined(FUSEDSTEP_CUDA)
    if (is_cuda(tensor)) return is_symbolic(tensor) || runs_kernels(tensor.device());
#endif
    return tensor.is_cpu() || tensor.is_meta();
}

// The capture of a CUDA graph that what is done to this tensor becomes part of; 0 for none.
inline std::uint64_t capture_around([[maybe_unused]] const at::Tensor& tensor) {
#if defined(FUSEDSTEP_CUDA)
    if (is_cuda(tensor)) return current_capture(tensor.device());
#endif
    return 0;
}

// Whether autocast widens 16-bit tensors of this device before a loss.
inline bool in_autocast(const at::Tensor& tensor) {
    return !tensor.is_meta() && at::autocast::is_autocast_enabled(tensor.device().type());
}

// A new tensor where `like` is; on the CPU past the dispatcher, whose way takes as long again.
inline at::Tensor empty_beside(const at::Tensor& like, at::IntArrayRef shape, at::ScalarType type) {
    if (like.is_cpu()) return at::detail::empty_cpu(shape, type);
    return at::empty(shape, like.options().dtype(type));
}

// An output that is not wanted.
inline at::Tensor nothing(const at::Tensor& like, at::ScalarType type) {
    return empty_beside(like, {0}, type);
}

// ---- Values of tensors on the CPU ----

inline void write_scalar(const at::Tensor& tensor, std::int64_t index, double value) {
    dispatch(*kernel_dtype(tensor.scalar_type()), [&](auto tag) {
        using T = typename decltype(tag)::type;
        static_cast<T*>(tensor.mutable_data_ptr())[index] =
            from_acc<T>(static_cast<acc_t<T>>(value));
    });
}

inline double read_scalar(const at::Tensor& tensor, std::int64_t index) {
    return dispatch(*kernel_dtype(tensor.scalar_type()), [&](auto tag) -> double {
        using T = typename decltype(tag)::type;
        return to_acc(static_cast<const T*>(tensor.const_data_ptr())[index]);
    });
}

// Calls f(chunk, begin, end) for every chunk of [0, n), in parallel where there is enough work.
template <class F>
void for_each_chunk(std::int64_t n, std::int64_t chunk_size, const F& f) {
    constexpr std::int64_t kChunksPerTask = 4;
    std::int64_t const chunks = (n + chunk_size - 1) / chunk_size;
    at::parallel_for(0, chunks, kChunksPerTask, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
            f(chunk, chunk * chunk_size, std::min(n, (chunk + 1) * chunk_size));
        }
    });
}

// Whether what a backward pass computes is differentiated itself, with a graph of torch's
// operators: in reverse (create_graph=True), or forward, by what arrived. torch.func has graphs of
// its own.
inline bool is_differentiated(const torch::autograd::variable_list& grad_outputs) {
    if (c10::GradMode::is_enabled()) return true;
    if (in_functorch()) return false;
    return std::any_of(grad_outputs.begin(), grad_outputs.end(), [](const at::Tensor& grad_output) {
        return torch::autograd::isFwGradDefined(grad_output);
    });
}

// Whether a gradient that is differentiated itself may be values of a kernel, with a node of ours
// for what it depends on: what arrived is no part of that, and nothing records torch's operators.
inline bool is_constant(const at::Tensor& grad_output) {
    return !grad_output.requires_grad() && !torch::autograd::isFwGradDefined(grad_output) &&
           !is_wrapped(grad_output) && !is_symbolic(grad_output) && !in_functorch() &&
           !in_dispatch_mode();
}

// ---- A gradient that the forward pass has computed ----

// Whether it is: with reduction "mean" or "sum", while what it is made of is in cache. It is left
// to the backward pass where that rounds less or moves fewer bytes: reduction "none" (each element
// has its own grad_output), float16 (an unscaled gradient underflows: loss scaling must act before
// rounding), and 16 bits in a traced program, whose backward cannot look at grad_output.
inline bool gradient_in_forward(at::ScalarType type, bool reduced, bool symbolic) {
    return reduced && type != at::kHalf && !(symbolic && is_narrow(type));
}

inline bool is_power_of_two(double value) {
    int exponent = 0;
    return std::abs(std::frexp(value, &exponent)) == 0.5;
}

// `grad`, the gradient for a grad_output of 1, times grad_output; bfloat16 is computed anew where a
// second rounding would show. What is saved is handed over, and changed in place, only when this
// graph is about to be freed: a second backward must find it. So must every replay of a CUDA graph
// that holds the backward pass and not the forward pass (Node::forward_capture says which does).
//
// Node::recomputed(grad_output) computes the gradient into new memory; on CUDA, where nobody can
// look at grad_output, Node::recompute_into(grad, grad_output) does it in place unless that is 1.
template <class Node>
at::Tensor scaled_gradient(Node& node, at::Tensor& grad, const at::Tensor& grad_output,
                           bool symbolic) {
    if (symbolic && is_narrow(grad.scalar_type())) return node.recomputed(grad_output);
    if (symbolic || is_symbolic(grad_output) || is_wrapped(grad_output) || in_functorch() ||
        in_dispatch_mode()) {
        return at::mul(grad, grad_output).to(grad.scalar_type());
    }
    // What calls a node past autograd's engine may bring anything.
    TORCH_CHECK(grad_output.numel() == 1 && kernel_dtype(grad_output.scalar_type()) &&
                    grad_output.device() == grad.device(),
                "a loss's backward: grad_output must be one floating-point number on ",
                grad.device(), ", but has shape ", grad_output.sizes(), " and dtype ",
                grad_output.scalar_type(), " on ", grad_output.device());
    bool const keep = torch::autograd::get_current_graph_task_keep_graph();
    bool const narrow = is_narrow(grad.scalar_type());
#if defined(FUSEDSTEP_CUDA)
    if (is_cuda(grad)) {
        if (keep || node.forward_capture != capture_around(grad)) {
            return narrow ? node.recomputed(grad_output) : at::mul(grad, grad_output);
        }
        at::Tensor const result = std::move(grad);
        if (narrow) {
            node.recompute_into(result, grad_output);
        } else {
            CudaGuard const guard(result.device());
            ScaleArgs const args{result.mutable_data_ptr(), result.numel(),
                                 *kernel_dtype(result.scalar_type()), grad_output.const_data_ptr(),
                                 *kernel_dtype(grad_output.scalar_type())};
            check_launch(
                scale(args, device_limits(result.device()), current_stream(result.device())),
                "a loss's backward");
        }
        return result;
    }
#endif
    double const factor = read_scalar(grad_output, 0);
    if (factor == 1.0) return keep ? grad.clone() : std::move(grad);
    if (narrow && !is_power_of_two(factor)) {
        if (!keep) grad = at::Tensor();  // its memory is free before another gradient is made
        return node.recomputed(grad_output);
    }
    if (keep) return at::mul(grad, grad_output);
    // No longer saved: a hook may raise before the graph is freed.
    at::Tensor const result = std::move(grad);
    return result.mul_(grad_output);
}

}  // namespace fusedstep

// Cross-entropy for torch: what is covered, the operators, the autograd node.
//
//   fusedstep::cross_entropy            what users call; covered here, or torch's own op
//   fusedstep::cross_entropy_with_lse   the same with log-sum-exp and z-loss, and
//   fusedstep::focal_loss               focal loss; covered here, or composed of torch's ops
//   fusedstep::cross_entropy_forward    loss, and with it the gradient or what a recompute needs
//   fusedstep::cross_entropy_backward   the gradient, recomputed from the logits
//
// The gradient is computed in the forward pass, while a row is in cache, or recomputed from the
// logits in the backward pass: torch_glue/loss.h says when.

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/softmax.h>
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
#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>
#include <utility>

#include "core/compensated_sum.h"
#include "core/reduction.h"
#include "cross_entropy/binding.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/torch_operators.h"
#if defined(FUSEDSTEP_CUDA)
#include "cross_entropy/cuda_entry.h"
#endif
#include "torch_glue/coverage.h"
#include "torch_glue/cuda.h"
#include "torch_glue/gradient_memory.h"
#include "torch_glue/loss.h"
#include "torch_glue/node.h"
#include "torch_glue/plain.h"
#include "torch_glue/profiler.h"
#include "torch_glue/traceable_node.h"

namespace fusedstep::cross_entropy {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- What is covered ----

CallCounter cross_entropy_calls("cross_entropy");
CallCounter with_lse_calls("cross_entropy_with_lse");
CallCounter focal_calls("focal_loss");
constexpr const char* kBackward = "cross_entropy_backward";

// Of the function that the user called.
CallCounter& calls_of(std::optional<double> gamma, bool with_lse) {
    if (gamma) return focal_calls;
    return with_lse ? with_lse_calls : cross_entropy_calls;
}

// Raises the type that torch raises for the same fault.
void check_shapes(const char* op, const Tensor& logits, const Tensor& target) {
    if (target.sym_sizes() == logits.sym_sizes()) {
        TORCH_CHECK(at::isFloatingType(target.scalar_type()), op,
                    ": target has the shape of the logits, ", logits.sym_sizes(),
                    ", and so holds class probabilities, which must be floating point, but its "
                    "dtype is ",
                    target.scalar_type(), "; target.to(input.dtype) converts it");
        return;
    }
    c10::SymDimVector const expected = index_shape(logits);
    bool const one_index = logits.dim() == 1 && target.dim() == 1 && target.sym_size(0) == 1;
    if (target.sym_sizes() == c10::SymIntArrayRef(expected) || one_index) {
        TORCH_CHECK(is_class_index(target), op,
                    ": target holds class indices and must have dtype Long or Byte, "
                    "but its dtype is ",
                    target.scalar_type(), "; target.long() converts it");
        return;
    }
    auto const message =
        c10::str(op, ": target has shape ", target.sym_sizes(), ", but logits of shape ",
                 logits.sym_sizes(), " need class indices of shape ", c10::SymIntArrayRef(expected),
                 " or class probabilities of shape ", logits.sym_sizes());
    bool const batches_differ =
        logits.dim() == 1 || target.dim() == 0 || logits.sym_size(0) != target.sym_size(0);
    TORCH_CHECK_VALUE(!batches_differ, message);
    TORCH_CHECK(false, message);
}

// The dtype of the loss.
Covered<at::ScalarType> loss_type(const Tensor& logits, const Tensor& target,
                                  const OptionalTensor& weight, bool probabilities) {
    at::ScalarType const type = logits.scalar_type();
    if (!kernel_dtype(type)) return not_covered("a dtype that the kernels do not compute");
    bool const autocast = in_autocast(logits);
    bool const narrow = is_narrow(type);
    at::ScalarType loss = autocast && narrow ? at::kFloat : type;
    if (probabilities && target.scalar_type() != type) {
        if (!narrow || target.scalar_type() != at::kFloat) {
            return not_covered("class probabilities of another dtype than input");
        }
        loss = at::kFloat;
    }
    if (is_given(weight) && weight->scalar_type() != type) {
        // Autocast widens logits and weight alike; without it torch refuses a mixture.
        if (!autocast || !narrow || !kernel_dtype(weight->scalar_type()) ||
            weight->scalar_type() == at::kDouble) {
            return not_covered("a weight of another dtype than input");
        }
    }
    return loss;
}

// Decides from metadata alone. Raises for shapes that no kernel could accept.
Covered<at::ScalarType> covered_loss_type(const char* op, const Tensor& logits,
                                          const Tensor& target, const OptionalTensor& weight,
                                          const Options& options) {
    if (!has_kernels(logits)) return not_covered("a device without kernels");
    if (in_functorch()) return not_covered("a torch.func transform");
    if (in_jit_trace()) return not_covered("a program that torch.jit.trace records");
    if (!is_plain_strided(logits)) return not_covered("input is sparse, or wrapped by a transform");
    if (!is_plain_strided(target)) {
        return not_covered("target is sparse, or wrapped by a transform");
    }
    if (target.device() != logits.device()) return not_covered("target on another device");
    if (logits.dim() < 1 || logits.dim() > kMaxRowDims) {
        return not_covered("a number of dimensions that the kernels do not walk");
    }
    if (class_count(logits) == 0) return not_covered("no classes");
    // Of a symbol no bound is asked: a program would be exported for fewer classes only.
    if (class_count(logits).maybe_as_int().value_or(0) > kMaxClasses) {
        return not_covered("more classes than the kernels count");
    }
    if (!is_reduction(options.reduction)) return not_covered("an unknown reduction");
    if (!(options.label_smoothing >= 0.0 && options.label_smoothing <= 1.0)) {
        return not_covered("label_smoothing outside [0, 1]");
    }
    if (target.requires_grad()) return not_covered("a target that requires a gradient");
    if (torch::autograd::isFwGradDefined(logits) || torch::autograd::isFwGradDefined(target) ||
        torch::autograd::isFwGradDefined(weight)) {
        return not_covered("forward-mode differentiation");
    }
    if (is_given(weight)) {
        if (!is_plain_strided(*weight)) {
            return not_covered("weight is sparse, or wrapped by a transform");
        }
        if (weight->device() != logits.device()) return not_covered("weight on another device");
        if (weight->requires_grad()) return not_covered("a weight that requires a gradient");
        if (weight->dim() != 1 || weight->sym_size(0) != class_count(logits)) {
            return not_covered("weight is not one value for each class");
        }
    }
    check_shapes(op, logits, target);
    bool const probabilities = !is_class_index(target);
    if (probabilities && options.ignore_index >= 0) {
        return not_covered("ignore_index with class probabilities");
    }
    return loss_type(logits, target, weight, probabilities);
}

// ---- Kernel arguments ----

// Row dimensions, merged wherever every operand allows it.
struct RowLayout {
    int dims = 0;
    std::int64_t sizes[kMaxRowDims];
    std::int64_t logits[kMaxRowDims];
    std::int64_t grad[kMaxRowDims];
    std::int64_t target[kMaxRowDims];

    void add(std::int64_t size, std::int64_t logits_stride, std::int64_t grad_stride,
             std::int64_t target_stride) {
        if (size == 1) return;
        if (dims > 0) {
            int const last = dims - 1;
            if (logits[last] == size * logits_stride && grad[last] == size * grad_stride &&
                target[last] == size * target_stride) {
                set(last, sizes[last] * size, logits_stride, grad_stride, target_stride);
                return;
            }
        }
        set(dims++, size, logits_stride, grad_stride, target_stride);
    }
    void set(int d, std::int64_t size, std::int64_t logits_stride, std::int64_t grad_stride,
             std::int64_t target_stride) {
        sizes[d] = size;
        logits[d] = logits_stride;
        grad[d] = grad_stride;
        target[d] = target_stride;
    }
};

// Of forward, beside the gradient: the loss; kRowStats numbers for each row and the gradient's
// scale behind them; the log-sum-exp of each row. Empty where not wanted.
struct Outputs {
    Tensor loss;
    Tensor stats;
    Tensor lse;
};

// Tensors as a kernel wants them; holds what had to be converted while the kernel runs.
struct KernelArgs {
    Args args{};
    Tensor target;
    Tensor weight;

    // `op` is whom errors name.
    KernelArgs(const char* op, const Tensor& logits, const Tensor& target_,
               const OptionalTensor& weight_, std::int64_t ignore_index, double label_smoothing,
               const Tensor& grad) {
        check(op, logits, target_, weight_);
        bool const probabilities = !is_class_index(target_);
        // Indices are one per row: copying them where they are not adjacent costs 1/C of a pass.
        target = probabilities ? target_ : target_.to(at::kLong).contiguous();
        if (is_given(weight_)) {
            weight = weight_->to(accumulate_type(logits.scalar_type())).contiguous();
        }

        std::int64_t const classes_at = class_dim(logits);
        RowLayout layout;
        for (std::int64_t d = 0; d < logits.dim(); ++d) {
            if (d == classes_at) continue;
            layout.add(logits.size(d), logits.stride(d), grad.defined() ? grad.stride(d) : 0,
                       probabilities ? target.stride(d) : 0);
        }
        if (layout.dims == 0) layout.set(layout.dims++, 1, 0, 0, 0);

        args.classes = logits.size(classes_at);
        args.rows = logits.numel() / args.classes;
        args.row_dims = layout.dims;
        std::copy_n(layout.sizes, layout.dims, args.row_sizes);
        std::copy_n(layout.logits, layout.dims, args.logits_row_strides);
        std::copy_n(layout.grad, layout.dims, args.grad_row_strides);
        std::copy_n(layout.target, layout.dims, args.target_row_strides);

        args.dtype = *kernel_dtype(logits.scalar_type());
        args.logits = logits.const_data_ptr();
        args.logits_class_stride = logits.stride(classes_at);
        args.ignore_index = ignore_index;
        args.label_smoothing = label_smoothing;
        args.gradient_scale = 1.0;
        if (probabilities) {
            args.target_kind = TargetKind::probability;
            args.target_dtype = *kernel_dtype(target.scalar_type());
            args.target_probability = target.const_data_ptr();
            args.target_class_stride = target.stride(classes_at);
        } else {
            args.target_kind = label_smoothing > 0 ? TargetKind::smoothed_index : TargetKind::index;
            args.target_index = target.const_data_ptr<std::int64_t>();
        }
        args.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
        if (grad.defined()) {
            args.grad = grad.mutable_data_ptr();
            args.grad_class_stride = grad.stride(classes_at);
        }
    }

    void set_terms(double z_loss, std::optional<double> gamma) {
        TORCH_CHECK(!gamma || args.target_kind == TargetKind::index,
                    "focal_loss: gamma is for class indices without label smoothing");
        args.variant = {gamma.value_or(0), z_loss};
    }

    Outputs make_outputs(const Tensor& logits, Reduction reduction, at::ScalarType loss_dtype,
                         bool with_stats, bool with_lse) {
        at::ScalarType const type = accumulate_type(logits.scalar_type());
        TORCH_CHECK(loss_dtype == logits.scalar_type() || loss_dtype == type,
                    "cross_entropy_forward: a loss of dtype ", loss_dtype,
                    " does not fit logits of dtype ", logits.scalar_type());
        bool const per_row = reduction == Reduction::none;
        c10::SymDimVector rows_shape;
        if (per_row || with_lse) rows_shape = index_shape(logits);
        at::IntArrayRef const shape = C10_AS_INTARRAYREF_SLOW(rows_shape);
        Outputs out{empty_beside(logits, per_row ? shape : at::IntArrayRef(), loss_dtype),
                    with_stats ? empty_beside(logits, {kRowStats * args.rows + 1}, type)
                               : nothing(logits, type),
                    with_lse ? empty_beside(logits, shape, type) : nothing(logits, type)};
        args.loss_dtype = *kernel_dtype(loss_dtype);
        if (per_row) args.row_losses = out.loss.mutable_data_ptr();
        if (with_stats) args.row_stats = out.stats.mutable_data_ptr();
        if (with_lse) args.row_lse = out.lse.mutable_data_ptr();
        return out;
    }

    void check_backward(const Tensor& grad_output, const Tensor& stats,
                        const Tensor& logits) const {
        TORCH_CHECK(stats.numel() == kRowStats * args.rows + 1 &&
                        (grad_output.numel() == 1 || grad_output.numel() == args.rows),
                    "cross_entropy_backward: stats and grad_output do not belong to ", args.rows,
                    " rows");
        at::ScalarType const type = accumulate_type(logits.scalar_type());
        TORCH_CHECK(stats.scalar_type() == type && stats.is_contiguous() &&
                        stats.device() == logits.device(),
                    "cross_entropy_backward: stats must be contiguous and ", type, " on ",
                    logits.device(), ", but are ", stats.scalar_type(), " with strides ",
                    stats.strides(), " on ", stats.device());
        TORCH_CHECK(
            kernel_dtype(grad_output.scalar_type()) && grad_output.device() == logits.device(),
            "cross_entropy_backward: grad_output of dtype ", grad_output.scalar_type(), " on ",
            grad_output.device(), " does not fit logits on ", logits.device());
    }

private:
    // The operators can be called without what cross_entropy() checks first.
    static void check(const char* op, const Tensor& logits, const Tensor& target,
                      const OptionalTensor& weight) {
        at::ScalarType const type = logits.scalar_type();
        TORCH_CHECK(kernel_dtype(type), op, ": the kernels do not compute logits of dtype ", type);
        TORCH_CHECK(logits.dim() >= 1 && logits.dim() <= kMaxRowDims, op,
                    ": the kernels do not walk logits of ", logits.dim(), " dimensions");
        std::int64_t const classes = logits.size(class_dim(logits));
        TORCH_CHECK(classes > 0, op, ": logits of shape ", logits.sizes(), " have no classes");
        TORCH_CHECK(classes <= kMaxClasses, op, ": the kernels count up to ", kMaxClasses,
                    " classes, not ", classes);
        bool const probabilities = !is_class_index(target);
        TORCH_CHECK(probabilities ? target.sizes() == logits.sizes()
                                  : target.numel() == logits.numel() / classes,
                    op, ": target of shape ", target.sizes(), " does not fit logits of shape ",
                    logits.sizes());
        TORCH_CHECK(!probabilities || target.scalar_type() == type ||
                        target.scalar_type() == accumulate_type(type),
                    op, ": class probabilities of dtype ", target.scalar_type(),
                    " do not fit logits of dtype ", type);
        TORCH_CHECK(!is_given(weight) || weight->numel() == classes, op,
                    ": weight must have one value for each of ", classes,
                    " classes, but has shape ", weight->sizes());
        TORCH_CHECK(target.device() == logits.device() &&
                        (!is_given(weight) || weight->device() == logits.device()),
                    op, ": target and weight must be on ", logits.device());
    }
};

// ---- CPU: fixed chunks of rows, any number of threads ----

double weight_sum_cpu(const KernelArgs& kernel) {
    if (!kernel.weight.defined() || kernel.args.target_kind != TargetKind::smoothed_index) {
        return static_cast<double>(kernel.args.classes);
    }
    CompensatedSum sum;
    for (std::int64_t c = 0; c < kernel.args.classes; ++c) sum.add(read_scalar(kernel.weight, c));
    return sum.total();
}

// The sum of weights of the rows that count. Raises IndexError for a class index out of range.
double scan_targets_cpu(const char* op, const Args& args) {
    constexpr std::int64_t kChunkRows = 16384;
    c10::SmallVector<TargetScan, 8> scans((args.rows + kChunkRows - 1) / kChunkRows);
    for_each_chunk(args.rows, kChunkRows,
                   [&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
                       scans[chunk] = cpu_kernels().scan_targets(args, begin, end);
                   });
    CompensatedSum sum;
    for (const TargetScan& scan : scans) {
        TORCH_CHECK_INDEX(scan.first_invalid < 0, op, ": target ",
                          args.target_index[scan.first_invalid], " at row ", scan.first_invalid,
                          " is out of bounds for ", args.classes,
                          " classes (and is not ignore_index, ", args.ignore_index, ")");
        sum.add(scan.weight_sum);
    }
    return sum.total();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    std::int64_t reduction_, std::int64_t ignore_index, double label_smoothing, double z_loss,
    std::optional<double> gamma, at::ScalarType loss_dtype, bool with_grad, bool with_stats,
    bool with_lse) {
    Reduction const reduction = reduction_of("cross_entropy_forward", reduction_);
    CallCounter& calls = calls_of(gamma, with_lse);
    Tensor const grad = with_grad ? empty_gradient(logits) : Tensor();
    KernelArgs kernel(calls.op(), logits, target, weight, ignore_index, label_smoothing, grad);
    kernel.set_terms(z_loss, gamma);
    Args& args = kernel.args;
    args.weight_sum = weight_sum_cpu(kernel);

    double row_weights = static_cast<double>(args.rows);
    if (args.target_kind != TargetKind::probability) {
        row_weights = scan_targets_cpu(calls.op(), args);
    }
    // A mean over no weight at all is NaN, and so is the gradient of every row in it.
    double divisor = 1;
    if (reduction == Reduction::mean) {
        divisor = row_weights == 0 ? std::numeric_limits<double>::quiet_NaN() : row_weights;
    }
    args.gradient_scale = 1.0 / divisor;

    auto [loss, stats, lse] =
        kernel.make_outputs(logits, reduction, loss_dtype, with_stats, with_lse);
    if (with_stats) write_scalar(stats, kRowStats * args.rows, args.gradient_scale);

    std::int64_t const chunk_rows = rows_per_chunk(args.rows, args.classes);
    c10::SmallVector<double, 64> sums((args.rows + chunk_rows - 1) / chunk_rows);
    for_each_chunk(args.rows, chunk_rows,
                   [&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
                       sums[chunk] = cpu_kernels().forward(args, begin, end);
                   });
    if (reduction != Reduction::none) {
        CompensatedSum total;
        for (double sum : sums) total.add(sum);
        write_scalar(loss, 0, total.total() / divisor);
    }
    calls.fused(logits.device());
    return {loss, with_grad ? grad : nothing(logits, logits.scalar_type()), stats, lse};
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                    const OptionalTensor& weight, std::int64_t ignore_index, double label_smoothing,
                    const Tensor& stats) {
    Tensor const grad = empty_gradient(logits);
    KernelArgs kernel(kBackward, logits, target, weight, ignore_index, label_smoothing, grad);
    Args& args = kernel.args;
    args.weight_sum = weight_sum_cpu(kernel);
    // Class indices are looked at again: memory can change without autograd noticing (numpy).
    if (args.target_kind != TargetKind::probability) {
        scan_targets_cpu(kBackward, args);
    }
    kernel.check_backward(grad_output, stats, logits);
    Tensor const upstream = grad_output.to(accumulate_type(logits.scalar_type())).contiguous();
    args.grad_output = upstream.const_data_ptr();
    args.grad_output_stride = upstream.numel() == 1 ? 0 : 1;
    args.row_stats = stats.mutable_data_ptr();
    args.gradient_scale = read_scalar(stats, kRowStats * args.rows);
    for_each_chunk(args.rows, rows_per_chunk(args.rows, args.classes),
                   [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                       cpu_kernels().backward(args, begin, end);
                   });
    return grad;
}

// ---- CUDA: one launch each way, no synchronisation ----

#if defined(FUSEDSTEP_CUDA)

// Where a device writes down a class index that is out of range: memory that the host can look at
// at any time, one for each device, never freed.
TargetFault& target_fault(c10::Device device) {
    static std::array<TargetFault*, kMaxDevices> faults{};
    static std::mutex mutex;
    std::lock_guard<std::mutex> const lock(mutex);
    TargetFault*& fault = faults[device_number(device)];
    if (fault == nullptr) fault = static_cast<TargetFault*>(new_host_visible(sizeof(TargetFault)));
    return *fault;
}

// Raises IndexError for a class index that an earlier call met; the one place that looks.
void raise_target_fault(volatile TargetFault& fault, c10::Device device) {
    if (fault.found == 0) return;
    std::int64_t const row = fault.row;
    std::int64_t const target = fault.target;
    std::int64_t const classes = fault.classes;
    fault.found = 0;
    TORCH_CHECK_INDEX(false, "target ", target, " at row ", row, " is out of bounds for ", classes,
                      " classes (and is not ignore_index); found on ", device,
                      " in an earlier call, whose loss and gradient are NaN there");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    std::int64_t reduction_, std::int64_t ignore_index, double label_smoothing, double z_loss,
    std::optional<double> gamma, at::ScalarType loss_dtype, bool with_grad, bool with_stats,
    bool with_lse) {
    CudaGuard const guard(logits.device());
    TargetFault& fault = target_fault(logits.device());
    raise_target_fault(fault, logits.device());
    Reduction const reduction = reduction_of("cross_entropy_forward", reduction_);
    const DeviceLimits& limits = device_limits(logits.device());
    CallCounter& calls = calls_of(gamma, with_lse);
    Tensor const grad = with_grad ? at::empty_like(logits) : Tensor();
    KernelArgs kernel(calls.op(), logits, target, weight, ignore_index, label_smoothing, grad);
    kernel.set_terms(z_loss, gamma);
    auto const [loss, stats, lse] =
        kernel.make_outputs(logits, reduction, loss_dtype, with_stats, with_lse);
    Tensor const totals = at::empty(
        {max_blocks(kernel.args, limits) * static_cast<std::int64_t>(sizeof(BlockTotals))},
        logits.options().dtype(at::kByte));
    ForwardArgs const args{kernel.args, reduction,
                           reduction == Reduction::none ? nullptr : loss.mutable_data_ptr(),
                           static_cast<BlockTotals*>(totals.mutable_data_ptr()),
                           kernel.args.target_kind == TargetKind::probability ? nullptr : &fault};
    check_launch(forward(args, limits, current_stream(logits.device())), calls.op());
    calls.fused(logits.device());
    return {loss, with_grad ? grad : nothing(logits, logits.scalar_type()), stats, lse};
}

// Writes the gradient. Where it is the one for a grad_output of 1 already, nothing happens if that
// is what grad_output is.
void write_backward_cuda(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                         const OptionalTensor& weight, std::int64_t ignore_index,
                         double label_smoothing, const Tensor& stats, const Tensor& grad,
                         bool keep_if_one) {
    CudaGuard const guard(logits.device());
    KernelArgs kernel(kBackward, logits, target, weight, ignore_index, label_smoothing, grad);
    kernel.check_backward(grad_output, stats, logits);
    // What was expanded from one value is read as one value.
    bool one = grad_output.numel() == 1;
    if (!one) {
        one = true;
        for (std::int64_t stride : grad_output.strides()) one = one && stride == 0;
    }
    Tensor const upstream = one ? grad_output : grad_output.contiguous();
    kernel.args.grad_output = upstream.const_data_ptr();
    kernel.args.grad_output_stride = one ? 0 : 1;
    kernel.args.row_stats = stats.mutable_data_ptr();
    BackwardArgs const args{kernel.args, *kernel_dtype(upstream.scalar_type()), keep_if_one};
    check_launch(backward(args, device_limits(logits.device()), current_stream(logits.device())),
                 kBackward);
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                     const OptionalTensor& weight, std::int64_t ignore_index,
                     double label_smoothing, const Tensor& stats) {
    Tensor const grad = at::empty_like(logits);
    write_backward_cuda(grad_output, logits, target, weight, ignore_index, label_smoothing, stats,
                        grad, /*keep_if_one=*/false);
    return grad;
}

#endif

// ---- Operators ----

const auto& forward_op() {
    static auto const op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fusedstep::cross_entropy_forward", "")
                               .typed<decltype(forward_cpu)>();
    return op;
}

const auto& backward_op() {
    static auto const op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fusedstep::cross_entropy_backward", "")
                               .typed<decltype(backward_cpu)>();
    return op;
}

// ---- Autograd ----

struct CrossEntropyBackward0 final : TraceableNode<CrossEntropyBackward0, 1> {
    SavedVariable logits;
    SavedVariable target;
    SavedVariable weight;
    bool has_weight = false;
    Options options{};
    std::uint64_t forward_capture = 0;
    Tensor grad;   // for a grad_output of 1; undefined where it is recomputed
    Tensor stats;  // what a recompute needs; undefined where none can happen

    std::string name() const override { return "CrossEntropyBackward0"; }

    template <class F>
    void visit(const F& f) {
        f(logits), f(target), f(weight), f(has_weight), f(options.reduction);
        f(options.ignore_index), f(options.label_smoothing), f(options.z_loss), f(options.gamma);
        f(grad), f(stats);
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        logits.reset_data();
        target.reset_data();
        weight.reset_data();
        grad = Tensor();
        stats = Tensor();
        released_ = true;
    }

    // Of the loss and, where lse is returned, of that.
    variable_list apply(variable_list&& grad_outputs) override {
        std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
        Wanted const wanted = wanted_gradients();
        bool arrived = false;
        for (const Tensor& grad_output : grad_outputs) arrived |= grad_output.defined();
        if (!arrived || !wanted[0]) return {Tensor()};
        if (is_differentiated(grad_outputs)) return {differentiable(grad_outputs)};
        return gradients(grad_outputs, wanted);
    }

    variable_list gradients(const variable_list& grad_outputs, Wanted) {
        const Tensor& grad_output = grad_outputs[0];
        Tensor result;
        if (grad_outputs.size() > 1 && grad_outputs[1].defined()) {
            result = through_lse(grad_outputs[1]);
        }
        if (!grad_output.defined()) return {result};
        Tensor const of_loss = grad.defined() ? scaled_gradient(*this, grad, grad_output, symbolic)
                                              : recomputed(grad_output);
        return {result.defined() ? at::add(result, of_loss) : of_loss};
    }

    Tensor recomputed(const Tensor& grad_output) {
        TORCH_CHECK(stats.defined(), torch::autograd::ERR_BACKWARD_TWICE);
        // Unpacking may run a whole forward pass, with autograd (torch.utils.checkpoint).
        Operands const saved = operands_ ? *operands_ : saved_operands();
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return backward_op().call(grad_output, saved.logits, saved.target, saved.weight,
                                  options.ignore_index, options.label_smoothing, stats);
    }

#if defined(FUSEDSTEP_CUDA)
    void recompute_into(const Tensor& result, const Tensor& grad_output) {
        write_backward_cuda(grad_output, logits.unpack(), target.unpack(), unpacked_weight(),
                            options.ignore_index, options.label_smoothing, stats, result,
                            /*keep_if_one=*/true);
    }
#endif

private:
    bool released_ = false;
    const Operands* operands_ = nullptr;  // unpacked already: a checkpoint lets that happen once

    OptionalTensor unpacked_weight() const {
        return has_weight ? OptionalTensor(weight.unpack()) : std::nullopt;
    }

    Operands saved_operands() const {
        return {logits.unpack(), target.unpack(), unpacked_weight()};
    }

    // p_c times the gradient of lse.
    Tensor through_lse(const Tensor& grad_lse) {
        Tensor const x = logits.unpack();
        Tensor const y = target.unpack();
        Tensor result = at::softmax(x, class_dim(x), accumulate_type(x.scalar_type())) *
                        grad_lse.unsqueeze(class_dim(x));
        if (is_class_index(y)) {
            Tensor const ignored = y.to(at::kLong).eq(options.ignore_index);
            result = result.masked_fill(
                ignored.reshape_symint(index_shape(x)).unsqueeze(class_dim(x)), 0);
        }
        return result.to(x.scalar_type());
    }

    // The same gradient as a differentiable function of logits and what arrived.
    Tensor differentiable(const variable_list& grad_outputs) {
        c10::AutoGradMode const with_graph(true);
        Operands const saved = saved_operands();
        bool const with_lse = grad_outputs.size() > 1;
        calls_of(options.gamma, with_lse).fell_back(saved.logits.device(), kDifferentiableBackward);
        const Tensor& grad_loss = grad_outputs[0];
        Tensor const grad_lse = with_lse ? grad_outputs[1] : Tensor();
        bool const is_cross_entropy = options.z_loss == 0 && options.gamma.value_or(0) == 0;
        if (!is_cross_entropy || symbolic || grad_lse.defined() || !is_constant(grad_loss)) {
            return differentiable_gradient(grad_loss, grad_lse, saved, options);
        }
        operands_ = &saved;
        auto const forget = c10::make_scope_exit([this] { operands_ = nullptr; });
        Tensor result = [&] {
            c10::NoGradGuard const values;
            return gradients(grad_outputs, {true})[0];
        }();
        make_differentiable(result, grad_loss, saved, options);
        return result;
    }
};

LossAndLse fused(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                 const Options& options, at::ScalarType loss_dtype, bool with_lse = false) {
    bool const with_grad = c10::GradMode::is_enabled() && logits.requires_grad();
    bool const symbolic = is_symbolic(logits) || in_dispatch_mode();
    at::ScalarType const type = logits.scalar_type();
    bool const reduced = static_cast<Reduction>(options.reduction) != Reduction::none;
    bool const grad_in_forward = with_grad && gradient_in_forward(type, reduced, symbolic);
    bool const with_stats = with_grad && (is_narrow(type) || !grad_in_forward);

    auto [loss, grad, stats, lse] = [&] {
        LossEvent const event(calls_of(options.gamma, with_lse).op(), with_grad, logits, target);
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return forward_op().call(logits, target, weight, options.reduction, options.ignore_index,
                                 options.label_smoothing, options.z_loss, options.gamma, loss_dtype,
                                 grad_in_forward, with_stats, with_lse);
    }();
    if (with_grad) {
        auto node = make_node<CrossEntropyBackward0>();
        node->set_next_edges(torch::autograd::collect_next_edges(logits));
        node->logits = SavedVariable(logits, /*is_output=*/false);
        node->target = SavedVariable(target, /*is_output=*/false);
        node->has_weight = is_given(weight);
        if (node->has_weight) node->weight = SavedVariable(*weight, /*is_output=*/false);
        node->options = options;
        node->symbolic = symbolic;
        if (grad_in_forward && !symbolic) node->forward_capture = capture_around(logits);
        if (grad_in_forward) node->grad = std::move(grad);
        if (with_stats) node->stats = std::move(stats);
        torch::autograd::set_history(loss, node);
        if (with_lse) torch::autograd::set_history(lse, node);
    }
    return {std::move(loss), std::move(lse)};
}

// ---- The functions, where the kernels cover the arguments ----

Covered<LossAndLse> fused_where_covered(const Tensor& logits, const Tensor& target,
                                        const OptionalTensor& weight, const Options& options,
                                        bool with_lse = false) {
    const char* const op = calls_of(options.gamma, with_lse).op();
    auto const loss_dtype = covered_loss_type(op, logits, target, weight, options);
    if (!loss_dtype) return loss_dtype.why_not();
    return fused(logits, target, weight, options, *loss_dtype, with_lse);
}

// Where they are not covered, computed by torch's operators: the loss as torch would type it.
LossAndLse fused_or_composed(const Tensor& logits, const Tensor& target,
                             const OptionalTensor& weight, const Options& options,
                             bool with_lse = false) {
    auto result = fused_where_covered(logits, target, weight, options, with_lse);
    if (result) return *std::move(result);
    calls_of(options.gamma, with_lse).fell_back(logits.device(), result.why_not());
    auto [loss, lse] = composed({logits, target, weight}, options);
    if (is_narrow(logits.scalar_type()) && !in_autocast(logits) &&
        (is_class_index(target) || target.scalar_type() == logits.scalar_type())) {
        loss = loss.to(logits.scalar_type());
    }
    return {loss, lse};
}

Options with_lse_options(std::int64_t reduction, std::int64_t ignore_index, double label_smoothing,
                         double z_loss) {
    TORCH_CHECK_VALUE(std::isfinite(z_loss) && z_loss >= 0,
                      "cross_entropy_with_lse: z_loss must be finite and not negative, but is ",
                      z_loss);
    return {.reduction = reduction,
            .ignore_index = ignore_index,
            .label_smoothing = label_smoothing,
            .z_loss = z_loss};
}

Options focal_options(const Tensor& target, std::int64_t reduction, std::int64_t ignore_index,
                      double gamma) {
    TORCH_CHECK_VALUE(std::isfinite(gamma) && gamma >= 0,
                      "focal_loss: gamma must be finite and not negative, but is ", gamma);
    TORCH_CHECK(is_class_index(target),
                "focal_loss: target must hold class indices, Long or Byte, but its dtype is ",
                target.scalar_type());
    return {.reduction = reduction, .ignore_index = ignore_index, .gamma = gamma};
}

Tensor cross_entropy_op(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                        std::int64_t reduction, std::int64_t ignore_index, double label_smoothing) {
    OptionalTensor loss =
        cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing);
    return loss ? std::move(*loss)
                : at::cross_entropy_loss(logits, target, weight, reduction, ignore_index,
                                         label_smoothing);
}

std::tuple<Tensor, Tensor> cross_entropy_with_lse_op(const Tensor& logits, const Tensor& target,
                                                     const OptionalTensor& weight,
                                                     std::int64_t reduction,
                                                     std::int64_t ignore_index,
                                                     double label_smoothing, double z_loss) {
    auto [loss, lse] = fused_or_composed(
        logits, target, weight, with_lse_options(reduction, ignore_index, label_smoothing, z_loss),
        /*with_lse=*/true);
    return {std::move(loss), std::move(lse)};
}

Tensor focal_loss_op(const Tensor& logits, const Tensor& target, double gamma,
                     const OptionalTensor& weight, std::int64_t reduction,
                     std::int64_t ignore_index) {
    return fused_or_composed(logits, target, weight,
                             focal_options(target, reduction, ignore_index, gamma))
        .loss;
}

}  // namespace

OptionalTensor cross_entropy(const Tensor& logits, const Tensor& target,
                             const OptionalTensor& weight, std::int64_t reduction,
                             std::int64_t ignore_index, double label_smoothing) {
    auto result =
        fused_where_covered(logits, target, weight, {reduction, ignore_index, label_smoothing});
    if (result) return (*std::move(result)).loss;
    cross_entropy_calls.fell_back(logits.device(), result.why_not());
    return std::nullopt;
}

// Python calls the operators where these return nothing, and they count it.

std::optional<std::tuple<Tensor, Tensor>> cross_entropy_with_lse(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    std::int64_t reduction, std::int64_t ignore_index, double label_smoothing, double z_loss) {
    auto result = fused_where_covered(
        logits, target, weight, with_lse_options(reduction, ignore_index, label_smoothing, z_loss),
        /*with_lse=*/true);
    if (!result) return std::nullopt;
    auto [loss, lse] = *std::move(result);
    return std::tuple(std::move(loss), std::move(lse));
}

OptionalTensor focal_loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                          std::int64_t reduction, std::int64_t ignore_index, double gamma) {
    auto result = fused_where_covered(logits, target, weight,
                                      focal_options(target, reduction, ignore_index, gamma));
    if (!result) return std::nullopt;
    return (*std::move(result)).loss;
}

void check_targets([[maybe_unused]] c10::Device device) {
#if defined(FUSEDSTEP_CUDA)
    if (device.type() != kCudaDevice) return;
    CudaGuard const guard(device);
    check_launch(cudaDeviceSynchronize(), "check_targets");
    raise_target_fault(target_fault(device), device);
#endif
}

const std::type_info& backward_node_type() { return typeid(CrossEntropyBackward0); }

TORCH_LIBRARY_FRAGMENT(fusedstep, m) {
    m.set_python_module("fusedstep.fakes");
    m.def(
        "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, "
        "int ignore_index=-100, float label_smoothing=0.0) -> Tensor",
        cross_entropy_op);
    m.def(
        "cross_entropy_with_lse(Tensor input, Tensor target, Tensor? weight=None, "
        "int reduction=1, int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0) "
        "-> (Tensor loss, Tensor lse)",
        cross_entropy_with_lse_op);
    m.def(
        "focal_loss(Tensor input, Tensor target, float gamma=2.0, Tensor? weight=None, "
        "int reduction=1, int ignore_index=-100) -> Tensor",
        focal_loss_op);
    m.def(
        "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int reduction, "
        "int ignore_index, float label_smoothing, float z_loss, float? gamma, "
        "ScalarType loss_dtype, bool with_grad, bool with_stats, bool with_lse) "
        "-> (Tensor loss, Tensor grad, Tensor stats, Tensor lse)");
    // `stats` is flat: {m, E, u_y} of each row in turn (cross_entropy.h), then the factor that a
    // mean puts on every gradient, in float32 (float64 for float64). Anyone may make them who knows
    // a row's sums by other means: with {lse, U, 0} for rows whose class is none of these, and
    // {lse, U, u_y} for the others, this is the gradient of a part of the classes. Every class
    // index must be in range or ignore_index all the same.
    m.def(
        "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
        "int ignore_index, float label_smoothing, Tensor stats) -> Tensor");
}

#if !defined(FUSEDSTEP_EMULATED_CUDA)
TORCH_LIBRARY_IMPL(fusedstep, CPU, m) {
    m.impl("cross_entropy_forward", forward_cpu);
    m.impl("cross_entropy_backward", backward_cpu);
}
#endif

#if defined(FUSEDSTEP_CUDA)
TORCH_LIBRARY_IMPL(fusedstep, FUSEDSTEP_CUDA_KEY, m) {
    m.impl("cross_entropy_forward", forward_cuda);
    m.impl("cross_entropy_backward", backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(fusedstep, Autograd, m) {
    m.impl("cross_entropy_forward", torch::autograd::autogradNotImplementedFallback());
    m.impl("cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fusedstep::cross_entropy

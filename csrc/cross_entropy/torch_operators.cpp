#include "cross_entropy/torch_operators.h"

#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <string>

#include "core/reduction.h"
#include "cross_entropy/binding.h"
#include "torch_glue/node.h"
#include "torch_glue/traceable_node.h"

namespace fusedstep::cross_entropy {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

bool is_reduced_by(const Options& options, Reduction reduction) {
    return options.reduction == static_cast<std::int64_t>(reduction);
}

// Whether this thread may read the values now, and decide by them.
bool is_readable(const Tensor& tensor) {
#if defined(FUSEDSTEP_CUDA)
    if (is_cuda(tensor)) return false;
#endif
    return tensor.is_cpu() && tensor.is_contiguous() && !is_symbolic(tensor) &&
           !is_wrapped(tensor) && !in_dispatch_mode() && !in_jit_trace();
}

// Rows with class indices.
class IndexedRows {
public:
    Tensor ignored;  // undefined where it is known that none is

    IndexedRows(const Tensor& logits, const Tensor& target, std::int64_t ignore_index)
        : given_(converted(target, at::kLong).reshape_symint(index_shape(logits))),
          ignore_index_(ignore_index),
          class_dim_(class_dim(logits)) {
        if (is_readable(given_)) {
            const auto* const first = given_.const_data_ptr<std::int64_t>();
            const auto* const last = first + given_.numel();
            if (std::find(first, last, ignore_index) == last) return;
        }
        ignored = given_.eq(ignore_index);
    }

    // The class of each row; of an ignored one any.
    Tensor index() const { return ignored.defined() ? given_.masked_fill(ignored, 0) : given_; }

    // `values` with 0 in every ignored row. What is masked has no part in any derivative: no 0
    // meets an infinity there.
    Tensor masked(const Tensor& values) const {
        return ignored.defined() ? values.masked_fill(ignored.unsqueeze(class_dim_), 0) : values;
    }

    // What each row adds to the divisor of a mean.
    Tensor weights(const OptionalTensor& weight, at::ScalarType type) const {
        if (is_readable(given_) && (!weight || is_readable(*weight))) {
            return weights_read_here(weight, type);
        }
        Tensor const of_index = index();
        Tensor const result =
            weight ? weight->index_select(0, of_index.reshape(-1)).view_symint(of_index.sym_sizes())
                   : at::ones_like(of_index, of_index.options().dtype(type));
        return ignored.defined() ? result.masked_fill(ignored, 0) : result;
    }

    // Where nobody waits for a device to refuse an index, one that is out of range becomes one in
    // range, of which torch's operators do not abort there; returns which rows are meant.
    Tensor contain(const c10::SymInt& classes) {
        if (is_readable(given_)) return {};
        Tensor const contained = index().clamp(0, classes - 1);
        Tensor const differs = contained.ne(given_);
        given_ = contained;
        return differs.logical_and(ignored.logical_not());
    }

private:
    Tensor given_;
    std::int64_t ignore_index_;
    std::int64_t class_dim_;

    // By one loop, which for few rows takes less than one operator.
    Tensor weights_read_here(const OptionalTensor& weight, at::ScalarType type) const {
        Tensor result = at::detail::empty_cpu(given_.sizes(), type);
        const auto* const index = given_.const_data_ptr<std::int64_t>();
        dispatch(*kernel_dtype(type), [&](auto tag) {
            using T = typename decltype(tag)::type;
            const T* const of_class =
                weight ? static_cast<const T*>(weight->const_data_ptr()) : nullptr;
            T* const of_row = static_cast<T*>(result.mutable_data_ptr());
            for (std::int64_t row = 0; row < given_.numel(); ++row) {
                bool const counts = index[row] != ignore_index_;
                if (of_class != nullptr && counts) {
                    TORCH_CHECK_INDEX(index[row] >= 0 && index[row] < weight->numel(), "target ",
                                      index[row], " at row ", row, " is out of bounds for ",
                                      weight->numel(), " classes");
                    of_row[row] = of_class[index[row]];
                } else {
                    of_row[row] = from_acc<T>(static_cast<acc_t<T>>(counts ? 1 : 0));
                }
            }
        });
        return result;
    }
};

// The constants of a gradient (math.h has the derivation, with the same names):
//
//   gradient = k f (U p_c - u_c) + (2 z k r lse + h) p_c
//
// where k is what arrived for the loss, divided by a mean's divisor, h what arrived for lse, r what
// a row adds to that divisor, z the factor of z-loss, and f that of focal loss.
struct Factors {
    std::optional<IndexedRows> rows;  // where there are class indices
    Tensor k;
    Tensor r;  // undefined where it is 1

    Factors(const Tensor& grad_loss, const Operands& operands, const Options& options)
        : target_(operands.target),
          class_dim_(class_dim(operands.logits)),
          type_(accumulate_type(operands.logits.scalar_type())),
          keep_(1 - options.label_smoothing) {
        const auto& [logits, target, weight] = operands;
        c10::SymInt const classes = class_count(logits);
        per_class_ = c10::SymFloat(options.label_smoothing) / c10::SymFloat(classes);
        if (is_class_index(target)) rows.emplace(logits, target, options.ignore_index);
        if (!grad_loss.defined()) return;
        if (is_given(weight)) {
            w_ = converted(*weight, type_);
            c10::SymDimVector shape(static_cast<std::size_t>(logits.dim() - class_dim_), 1);
            shape[0] = classes;
            w_of_class_ = w_->reshape_symint(shape);
        }
        if (rows) {
            Tensor const invalid = rows->contain(classes);
            if (w_ || rows->ignored.defined()) r = rows->weights(w_, type_);
            if (invalid.defined()) {
                r = r.masked_fill(invalid, std::numeric_limits<double>::quiet_NaN());
            }
        }
        k = converted(grad_loss, type_);
        if (is_reduced_by(options, Reduction::mean)) {
            k = r.defined() ? k / r.sum(at::kDouble) : k / at::Scalar(logits.sym_numel() / classes);
        }
    }

    // `of_rows`, to be multiplied with values of every class.
    Tensor for_each_class(const Tensor& of_rows) const {
        return of_rows.dim() == 0 ? of_rows : of_rows.unsqueeze(class_dim_);
    }

    Tensor k_r() const { return r.defined() ? k * r : k; }

    // k U, for each class.
    Tensor target_sum() const {
        if (!rows) return for_each_class(k) * probabilities().sum(class_dim_, /*keepdim=*/true);
        return for_each_class(is_dense() ? k * index_target_sum() : k_r());
    }

    // k (U p_c - u_c) of softmax's p.
    Tensor gradient(const Tensor& p) const {
        if (!rows) {
            Tensor const u = probabilities();
            return (p * u.sum(class_dim_, /*keepdim=*/true) - u) * for_each_class(k);
        }
        Tensor const index = rows->index().unsqueeze(class_dim_);
        if (is_dense()) {
            Tensor const dense = p * for_each_class(index_target_sum()) - w_of_class_ * per_class_;
            return dense.scatter_add(class_dim_, index, (r * -keep_).unsqueeze(class_dim_)) *
                   for_each_class(k);
        }
        Tensor const dense = keep_ == 1 ? p : p - per_class_;
        Tensor const minus_keep = at::full_symint(index.sym_sizes(), -keep_, p.options());
        return dense.scatter_add(class_dim_, index, minus_keep) * for_each_class(k_r());
    }

private:
    Tensor target_;
    std::int64_t class_dim_;
    at::ScalarType type_;
    double keep_;           // 1 - label_smoothing
    at::Scalar per_class_;  // label_smoothing / C
    OptionalTensor w_;
    Tensor w_of_class_;

    // Whether u has a weight of its own for each class, so that r is no factor of it.
    bool is_dense() const { return keep_ != 1 && w_.has_value(); }

    Tensor index_target_sum() const { return r * keep_ + w_->sum() * per_class_; }

    // u of class probabilities.
    Tensor probabilities() const {
        Tensor u = converted(target_, type_);
        if (keep_ != 1) u = u * keep_ + per_class_;
        return w_ ? u * w_of_class_ : u;
    }
};

// What focal loss multiplies the gradient of cross-entropy with, q^gamma (1 + gamma p (-log p) / q)
// (math.h), of -log p.
Tensor focal_factor(const Tensor& minus_log_p, double gamma) {
    // There the power's derivative is no number, or is multiplied by infinity.
    Tensor const certain = minus_log_p.eq(0);
    Tensor const impossible = minus_log_p.isinf();
    Tensor const n = minus_log_p.masked_fill(certain.logical_or(impossible), 1);
    Tensor const q = at::expm1(n.neg()).neg();
    return (q.pow(gamma - 1) * (q + gamma * n * n.neg().exp()))
        .masked_fill(certain, 0)
        .masked_fill(impossible, 1);
}

// What backward of the gradient of a cross-entropy gives the logits for v, in their type. The
// values alone. The derivative of k (U p_c - u_c) along v is k U p_c (v_c - sum_j p_j v_j):
// softmax's.
Tensor second_derivative(const Tensor& v, const Tensor& grad_loss, const Operands& operands,
                         const Options& options) {
    const Tensor& logits = operands.logits;
    std::int64_t const dim = class_dim(logits);
    at::ScalarType const type = accumulate_type(logits.scalar_type());
    Factors const of(grad_loss, operands, options);
    Tensor const p = at::softmax(logits, dim, type);
    Tensor const scaled = converted(v, type) * of.target_sum();
    Tensor const unmasked = at::_softmax_backward_data(scaled, p, dim, type);
    Tensor const result = of.rows ? of.rows->masked(unmasked) : unmasked;
    return converted(result, logits.scalar_type());
}

// The gradient of a cross-entropy as a function of the logits.
struct CrossEntropyBackwardBackward0 final : TraceableNode<CrossEntropyBackwardBackward0, 1> {
    SavedVariable logits;
    SavedVariable target;
    SavedVariable weight;
    bool has_weight = false;
    Options options{};
    SavedVariable grad_loss;

    std::string name() const override { return "CrossEntropyBackwardBackward0"; }

    template <class F>
    void visit(const F& f) {
        f(logits), f(target), f(weight), f(has_weight), f(options.reduction);
        f(options.ignore_index), f(options.label_smoothing), f(grad_loss);
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        logits.reset_data();
        target.reset_data();
        weight.reset_data();
        grad_loss.reset_data();
        released_ = true;
    }

    variable_list apply(variable_list&& v) override {
        std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
        if (!v[0].defined() || !wanted_gradients()[0]) return {Tensor()};
        if (!is_differentiated(v)) return gradients(v, {true});
        c10::AutoGradMode const with_graph(true);
        Tensor const x = logits.unpack().alias();  // without the hooks of the logits
        Tensor const gradient = differentiable_gradient(
            grad_loss.unpack(), Tensor(), {x, target.unpack(), unpacked_weight()}, options);
        return torch::autograd::grad({gradient}, {x}, {v[0]}, /*retain_graph=*/true,
                                     /*create_graph=*/true);
    }

    variable_list gradients(const variable_list& v, Wanted) {
        Operands const saved{logits.unpack(), target.unpack(), unpacked_weight()};
        Tensor const k = grad_loss.unpack();
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return {second_derivative(v[0], k, saved, options)};
    }

private:
    bool released_ = false;

    OptionalTensor unpacked_weight() const {
        return has_weight ? OptionalTensor(weight.unpack()) : std::nullopt;
    }
};

}  // namespace

c10::SymDimVector index_shape(const Tensor& logits) {
    c10::SymDimVector shape;
    for (std::int64_t d = 0; d < logits.dim(); ++d) {
        if (d != class_dim(logits)) shape.push_back(logits.sym_size(d));
    }
    return shape;
}

LossAndLse composed(const Operands& operands, const Options& options) {
    const auto& [logits, target, weight] = operands;
    Tensor x = is_narrow(logits.scalar_type()) ? converted(logits, at::kFloat) : logits;
    OptionalTensor w;
    if (is_given(weight)) w = converted(*weight, x.scalar_type());
    // What does not fit is torch's to refuse.
    std::optional<IndexedRows> rows;
    if (is_class_index(target) && class_count(x) != 0 && target.device() == x.device() &&
        target.sym_numel() * class_count(x) == x.sym_numel()) {
        rows.emplace(x, target, options.ignore_index);
        x = rows->masked(x);
    }
    Tensor loss = at::cross_entropy_loss(x, target, w, options.reduction, options.ignore_index,
                                         options.label_smoothing);
    Tensor lse = at::logsumexp(x, class_dim(x));
    Tensor row_weights;  // of class indices
    if (rows) {
        if (rows->ignored.defined()) lse = lse.masked_fill(rows->ignored, 0);
        row_weights = rows->weights(w, lse.scalar_type());
    }
    auto const reduce = [&](const Tensor& values) {
        if (is_reduced_by(options, Reduction::none)) return values;
        if (is_reduced_by(options, Reduction::sum)) return values.sum();
        return row_weights.defined() ? values.sum() / row_weights.sum() : values.mean();
    };
    double const gamma = options.gamma.value_or(0);
    if (gamma != 0) {
        Tensor const minus_log_p =
            at::cross_entropy_loss(x, target, {}, static_cast<std::int64_t>(Reduction::none),
                                   options.ignore_index)
                .reshape_symint(lse.sym_sizes());
        // Where p is 1 or 0 the power's derivative is no number, or is multiplied by infinity.
        Tensor const certain = minus_log_p.eq(0);
        Tensor const q = at::where(certain.logical_or(minus_log_p.isinf()), 1.0,
                                   at::expm1(minus_log_p.neg()).neg());
        loss = reduce(at::where(certain, 0.0, row_weights * q.pow(gamma) * minus_log_p));
    }
    if (options.z_loss != 0) {
        Tensor const squares = lse * lse * options.z_loss;
        loss = loss + reduce(row_weights.defined() ? squares * row_weights : squares);
    }
    return {loss, lse};
}

Tensor differentiable_gradient(const Tensor& grad_loss, const Tensor& grad_lse,
                               const Operands& operands, const Options& options) {
    const Tensor& logits = operands.logits;
    std::int64_t const dim = class_dim(logits);
    Factors const of(grad_loss, operands, options);
    Tensor x = logits.to(accumulate_type(logits.scalar_type()));
    if (of.rows) x = of.rows->masked(x);
    double const gamma = options.gamma.value_or(0);
    Tensor const log_p = gamma == 0 ? Tensor() : at::log_softmax(x, dim);
    Tensor const p = gamma == 0 ? at::softmax(x, dim) : log_p.exp();

    Tensor result;
    if (grad_loss.defined()) {
        result = of.gradient(p);
        if (gamma != 0) {
            Tensor const log_p_true = log_p.gather(dim, of.rows->index().unsqueeze(dim));
            result = result * focal_factor(log_p_true.neg(), gamma);
        }
    }
    Tensor of_lse = grad_lse;
    if (grad_loss.defined() && options.z_loss != 0) {
        Tensor const slope = of.k_r() * at::logsumexp(x, dim) * (2 * options.z_loss);
        of_lse = of_lse.defined() ? of_lse + slope : slope;
    }
    if (of_lse.defined()) {
        Tensor const through_lse = p * of.for_each_class(of_lse);
        result = result.defined() ? result + through_lse : through_lse;
    }
    if (of.rows) result = of.rows->masked(result);
    return converted(result, logits.scalar_type());
}

Tensor cross_entropy_gradient(const Tensor& grad_rows, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, std::int64_t ignore_index,
                              double label_smoothing) {
    return differentiable_gradient(
        grad_rows, Tensor(), {logits, target, weight},
        {static_cast<std::int64_t>(Reduction::none), ignore_index, label_smoothing});
}

void make_differentiable(Tensor& gradient, const Tensor& grad_loss, const Operands& operands,
                         const Options& options) {
    auto node = make_node<CrossEntropyBackwardBackward0>();
    node->set_next_edges(torch::autograd::collect_next_edges(operands.logits));
    node->logits = SavedVariable(operands.logits, /*is_output=*/false);
    node->target = SavedVariable(operands.target, /*is_output=*/false);
    node->has_weight = is_given(operands.weight);
    if (node->has_weight) node->weight = SavedVariable(*operands.weight, /*is_output=*/false);
    node->options = options;
    node->grad_loss = SavedVariable(grad_loss, /*is_output=*/false);
    torch::autograd::set_history(gradient, node);
}

const std::type_info& double_backward_node_type() { return typeid(CrossEntropyBackwardBackward0); }

}  // namespace fusedstep::cross_entropy

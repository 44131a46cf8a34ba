// The scalar mathematics of cross-entropy and the losses that are made of a row's same sums,
// written once for the CPU (where V is a vector of rows or classes, or a scalar) and for CUDA
// (where V is a scalar).
//
// Every kind of target is one formula. A row has logits x_c and a target vector u_c >= 0:
//
//   loss     = sum_c u_c (log sum_k exp x_k - x_c)  =  U log S - L
//   gradient = U p_c - u_c
//
//   m = max_c x_c,  S = sum_c exp(x_c - m),  p_c = exp(x_c - m) / S,
//   U = sum_c u_c,  L = sum_c u_c (x_c - m).
//
//   class index y             u_c = w_y [c = y]
//   ... with smoothing e      u_c = (1 - e) w_y [c = y] + e/C w_c
//   class probabilities t     u_c = w_c ((1 - e) t_c + e/C)
//
// Shifting by m makes exp safe: every argument is <= 0. (torch.nn.CrossEntropyLoss documents the
// same definitions; label smoothing is that of Szegedy et al., 2016.)
//
// The other losses of the family (Variant) change three numbers of a row and nothing else: its
// loss, E and the true class's u_y (RowTerms). Their gradient, too, is E exp(x_c - m) - u_c.
#pragma once

#include "core/dtype.h"

namespace fusedstep::cross_entropy {

// Weight of the true class in u_y of a class-index target.
template <class V>
FUSEDSTEP_HD V index_coefficient(V class_weight, V smoothing) {
    return (V{} + 1 - smoothing) * class_weight;
}

// u_c of a probability target.
template <class V>
FUSEDSTEP_HD V probability_coefficient(V probability, V class_weight, V keep,
                                       V smoothing_per_class) {
    return (probability * keep + smoothing_per_class) * class_weight;
}

// Math::exp(x), Math::log(x); Math::fmadd(a, b, c) = a b + c, rounded once where the processor can.
// U log S - L, where L is that of the dense part of u and u_y (x_y - m): terms of one sign.
template <class Math, class V>
FUSEDSTEP_HD V row_loss(V target_sum, V log_sum, V dense_dot, V u_y, V shifted_y) {
    return Math::fmadd(-u_y, shifted_y, Math::fmadd(target_sum, log_sum, -dense_dot));
}

// What a row's sums come to: its loss, and the coefficients of its gradient
// softmax * p_c - u_c, where `truth` is u_y, less its dense part.
template <class V>
struct RowTerms {
    V loss;
    V softmax;
    V truth;
};

// E: what exp(x_c - m) is multiplied by to give the gradient's softmax * p_c.
template <class V>
FUSEDSTEP_HD V softmax_scale(V softmax, V exp_sum) {
    return softmax / exp_sum;
}

// The sums of a row that the losses below are made of.
template <class V>
struct RowSums {
    V max;           // m
    V exp_sum;       // S
    V log_sum;       // log S
    V shifted_true;  // x_y - m, of a row with a true class
    V weight;        // what the row adds to the divisor of a mean: w_y; 1 for probabilities
};

// Focal loss (Lin et al., 2017): w_y q^gamma (-log p) for p = p_y and q = 1 - p, in place of the
// cross-entropy of a class index. Its gradient is that of cross-entropy with
//
//   w_y q^gamma (1 + gamma p (-log p) / q)
//
// in place of w_y. S holds exp(x_y - m), so that S - exp(x_y - m) loses nothing that S had.
template <class Math, class V>
FUSEDSTEP_HD RowTerms<V> focal_terms(const RowSums<V>& row, V gamma) {
    V const zero{};
    V const one = zero + 1;
    V const exp_true = Math::exp(row.shifted_true);
    V const p = exp_true / row.exp_sum;
    V const q = (row.exp_sum - exp_true) / row.exp_sum;
    V const minus_log_p = row.log_sum - row.shifted_true;
    V const p_log_p = p == zero ? zero : p * minus_log_p;
    V const ratio = q == zero ? one : p_log_p / q;
    V const power = q == zero ? zero : Math::exp(gamma * Math::log(q));
    V const factor = row.weight * power;
    V const truth = factor * (one + gamma * ratio);
    return {factor * minus_log_p, truth, truth};
}

// z-loss (Chowdhery et al., 2022): z w lse^2, with lse = log sum_c exp(x_c), whose derivative is
// 2 z w lse p_c.
template <class V>
FUSEDSTEP_HD void add_z_loss(RowTerms<V>& terms, const RowSums<V>& row, V z_loss) {
    V const lse = row.max + row.log_sum;
    V const slope = z_loss * row.weight * lse;
    terms.loss += slope * lse;
    terms.softmax += slope + slope;
}

// Which loss of the family is computed: cross-entropy where every number is 0.
template <class A>
struct Variant {
    A gamma;   // of focal loss, which takes TargetKind::index alone
    A z_loss;  // factor of the squared log-sum-exp

    FUSEDSTEP_HD bool is_cross_entropy() const { return gamma == A{} && z_loss == A{}; }

    // What is left of it for targets of other kinds than TargetKind::index.
    FUSEDSTEP_HD Variant for_dense_targets() const { return {A{}, z_loss}; }

    template <class B>
    FUSEDSTEP_HD Variant<B> to() const {
        return {static_cast<B>(gamma), static_cast<B>(z_loss)};
    }
};

// From cross-entropy's terms of a row to those of the variant.
template <class Math, class V, class A>
FUSEDSTEP_HD void change_terms(RowTerms<V>& terms, const RowSums<V>& row,
                               const Variant<A>& variant) {
    V const zero{};
    if (variant.gamma != A{}) terms = focal_terms<Math>(row, zero + variant.gamma);
    if (variant.z_loss != A{}) add_z_loss(terms, row, zero + variant.z_loss);
}

}  // namespace fusedstep::cross_entropy

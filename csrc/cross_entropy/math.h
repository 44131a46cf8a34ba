// The scalar mathematics of cross-entropy, written once for the CPU (where V is a vector of rows or
// classes, or a scalar) and for CUDA (where V is a scalar).
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

template <class V>
FUSEDSTEP_HD V row_loss(V target_sum, V log_sum, V target_dot_shifted) {
    return target_sum * log_sum - target_dot_shifted;
}

// What exp(x_c - m) is multiplied by to give U p_c; saved for a backward that recomputes.
template <class V>
FUSEDSTEP_HD V softmax_scale(V target_sum, V exp_sum) {
    return target_sum / exp_sum;
}

}  // namespace fusedstep::cross_entropy

// The scalar mathematics of stochastic gradient descent, written once for the CPU (where V is a
// vector) and for CUDA (where V is a scalar). Parameter p, gradient g, momentum buffer b:
//
//   g = -g                              to maximize
//   g = g + weight_decay p              with weight decay
//   b = g                               with momentum, on the parameter's first step
//   b = momentum b + (1 - dampening) g  with momentum, later
//   g = b                               with momentum, or
//   g = g + momentum b                  with Nesterov's
//   p = p - lr g
//
// These are the definitions that torch.optim.SGD documents, in its order: the learning rate scales
// the velocity where it is applied, not where it is accumulated as in Sutskever et al., 2013. Each
// sum is one fused multiply-add and b's product is rounded, which is how torch's for-loop computes
// them where the processor has one: float32 and float64 results are the same bits.
#pragma once

#include "core/dtype.h"

namespace fusedstep::sgd {

enum class Momentum { none, first, running };

template <class V>
struct Coefficients {
    V direction;  // -1 to maximize, else 1
    V weight_decay;
    V momentum;
    V undampened;  // 1 - dampening
    V negative_lr;
};

// The new parameter; the new buffer is left in `buffer`, which only Momentum::running reads.
// mul_add(a, b, c) is a b + c.
template <Momentum momentum, bool nesterov, bool weight_decay, class V, class MulAdd>
FUSEDSTEP_HD V update(V param, V grad, V& buffer, const Coefficients<V>& c, MulAdd mul_add) {
    V step = grad * c.direction;
    if constexpr (weight_decay) step = mul_add(param, c.weight_decay, step);
    if constexpr (momentum != Momentum::none) {
        if constexpr (momentum == Momentum::first) {
            buffer = step;
        } else {
            buffer = mul_add(step, c.undampened, buffer * c.momentum);
        }
        step = nesterov ? mul_add(buffer, c.momentum, step) : buffer;
    }
    return mul_add(step, c.negative_lr, param);
}

}  // namespace fusedstep::sgd

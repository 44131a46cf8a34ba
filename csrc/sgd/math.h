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
#include "sgd/sgd.h"

namespace fusedstep::sgd {

template <class V>
struct Coefficients {
    V direction;  // -1 to maximize, else 1
    V weight_decay;
    V momentum;
    V undampened;  // 1 - dampening
    V negative_lr;
};

// Each is rounded to A once; broadcast makes a V of it.
template <class A, class Broadcast>
FUSEDSTEP_HD auto coefficients(const Hyperparameters& h, double lr, Broadcast broadcast)
    -> Coefficients<decltype(broadcast(A{}))> {
    return {broadcast(h.maximize ? A{-1} : A{1}), broadcast(static_cast<A>(h.weight_decay)),
            broadcast(static_cast<A>(h.momentum)), broadcast(static_cast<A>(1.0 - h.dampening)),
            broadcast(static_cast<A>(-lr))};
}

enum class Momentum { none, first, running };

FUSEDSTEP_HD Momentum momentum_of(const Hyperparameters& h, bool first_step) {
    return h.momentum == 0 ? Momentum::none : first_step ? Momentum::first : Momentum::running;
}

// Which of the lines above apply.
template <Momentum m, bool n, bool w>
struct Rule {
    static constexpr Momentum momentum = m;
    static constexpr bool nesterov = n;
    static constexpr bool weight_decay = w;
};

// Calls f with the Rule: runtime flags to compile-time ones.
template <bool weight_decay, class F>
FUSEDSTEP_HD void with_rule(Momentum momentum, bool nesterov, F& f) {
    if (momentum == Momentum::none) {
        f(Rule<Momentum::none, false, weight_decay>{});
    } else if (momentum == Momentum::first) {
        nesterov ? f(Rule<Momentum::first, true, weight_decay>{})
                 : f(Rule<Momentum::first, false, weight_decay>{});
    } else {
        nesterov ? f(Rule<Momentum::running, true, weight_decay>{})
                 : f(Rule<Momentum::running, false, weight_decay>{});
    }
}
template <class F>
FUSEDSTEP_HD void with_rule(Momentum momentum, bool nesterov, bool weight_decay, F f) {
    weight_decay ? with_rule<true>(momentum, nesterov, f) : with_rule<false>(momentum, nesterov, f);
}

// The new parameter; the new buffer is left in `buffer`, which only Momentum::running reads.
// mul_add(a, b, c) is a b + c.
template <class Rule, class V, class MulAdd>
FUSEDSTEP_HD V update(V param, V grad, V& buffer, const Coefficients<V>& c, MulAdd mul_add) {
    V step = grad * c.direction;
    if constexpr (Rule::weight_decay) step = mul_add(param, c.weight_decay, step);
    if constexpr (Rule::momentum != Momentum::none) {
        if constexpr (Rule::momentum == Momentum::first) {
            buffer = step;
        } else {
            buffer = mul_add(step, c.undampened, buffer * c.momentum);
        }
        step = Rule::nesterov ? mul_add(buffer, c.momentum, step) : buffer;
    }
    return mul_add(step, c.negative_lr, param);
}

}  // namespace fusedstep::sgd

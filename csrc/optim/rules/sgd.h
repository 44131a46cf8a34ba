// Stochastic gradient descent: what torch.optim.SGD calls its parts, and its scalar mathematics,
// written once for the CPU (where V is a vector) and for CUDA (where V is a scalar). Parameter p,
// gradient g, momentum buffer b:
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

#include <type_traits>

#include "optim/optim.h"

namespace fusedstep::optim {

struct Sgd {
    static constexpr const char* name = "SGD";

    struct Hyperparameters {
        LearningRate lr;
        double momentum;
        double dampening;
        double weight_decay;
        bool nesterov;
        bool maximize;
    };
    static constexpr Number numbers[] = {
        {"momentum", "momentum value", offsetof(Hyperparameters, momentum)},
        {"dampening", "dampening value", offsetof(Hyperparameters, dampening)},
        {"weight_decay", "weight_decay value", offsetof(Hyperparameters, weight_decay)},
    };
    static constexpr Flag flags[] = {
        {"nesterov", offsetof(Hyperparameters, nesterov)},
        {"maximize", offsetof(Hyperparameters, maximize)},
    };
    // Whatever is added to the negative zero stays what it is, as in a first step.
    static constexpr State states[] = {{"momentum_buffer", -0.0}};

    // Bit i for states[i]: which states the parameters of a group have.
    static constexpr unsigned states_of(const Hyperparameters& h) { return h.momentum != 0; }
    // Whether a first step that is skipped would change the next one: first steps know nothing of
    // dampening.
    static constexpr bool first_step_differs(const Hyperparameters& h) {
        return h.momentum != 0 && h.dampening != 0;
    }

    // Which of the lines above apply to a parameter.
    enum class Momentum { none, first, running };
    struct Variant {
        Momentum momentum;
        bool nesterov;
        bool weight_decay;
    };
    static FUSEDSTEP_HD Variant variant_of(const Hyperparameters& h, bool first_step) {
        return {h.momentum == 0 ? Momentum::none
                : first_step    ? Momentum::first
                                : Momentum::running,
                h.nesterov, h.weight_decay != 0};
    }
    // Bit i for states[i].
    static FUSEDSTEP_HD constexpr unsigned reads(Variant v) {
        return v.momentum == Momentum::running;
    }
    static FUSEDSTEP_HD constexpr unsigned writes(Variant v) {
        return v.momentum != Momentum::none;
    }

    // Calls f with an integral_constant: a variant that is known when the kernel is compiled.
    template <class F>
    static FUSEDSTEP_HD void with_variant(Variant v, F f) {
        v.weight_decay ? with_weight_decay<true>(v, f) : with_weight_decay<false>(v, f);
    }
    template <bool w, class F>
    static FUSEDSTEP_HD void with_weight_decay(Variant v, F& f) {
        if (v.momentum == Momentum::none) {
            f(std::integral_constant<Variant, Variant{Momentum::none, false, w}>{});
        } else if (v.momentum == Momentum::first) {
            v.nesterov ? f(std::integral_constant<Variant, Variant{Momentum::first, true, w}>{})
                       : f(std::integral_constant<Variant, Variant{Momentum::first, false, w}>{});
        } else {
            v.nesterov ? f(std::integral_constant<Variant, Variant{Momentum::running, true, w}>{})
                       : f(std::integral_constant<Variant, Variant{Momentum::running, false, w}>{});
        }
    }

    // What the lines read: each number rounded to V's type once.
    template <class V>
    struct Coefficients {
        V direction;  // -1 to maximize, else 1
        V weight_decay;
        V momentum;
        V undampened;  // 1 - dampening
        V negative_lr;
    };
    // broadcast makes a V of an A.
    template <class A, class Broadcast>
    static FUSEDSTEP_HD auto coefficients(const Hyperparameters& h, double lr, Broadcast broadcast)
        -> Coefficients<decltype(broadcast(A{}))> {
        return {broadcast(h.maximize ? A{-1} : A{1}), broadcast(static_cast<A>(h.weight_decay)),
                broadcast(static_cast<A>(h.momentum)), broadcast(static_cast<A>(1.0 - h.dampening)),
                broadcast(static_cast<A>(-lr))};
    }

    // The new parameter; the new states are left in `states`. `ops` as advance() says.
    template <Variant v, class V, class Ops>
    static FUSEDSTEP_HD V update(V param, V grad, V* states, const Coefficients<V>& c,
                                 const Ops& ops) {
        V step = grad * c.direction;
        if constexpr (v.weight_decay) step = ops.mul_add(param, c.weight_decay, step);
        if constexpr (v.momentum != Momentum::none) {
            V& buffer = states[0];
            if constexpr (v.momentum == Momentum::first) {
                buffer = step;
            } else {
                buffer = ops.mul_add(step, c.undampened, buffer * c.momentum);
            }
            step = v.nesterov ? ops.mul_add(buffer, c.momentum, step) : buffer;
        }
        return ops.mul_add(step, c.negative_lr, param);
    }
};

}  // namespace fusedstep::optim

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
#include "optim/optim.h"

namespace fusedstep::optim {

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

// ---- Stochastic rounding ----
//
// It is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a key
// and the place of an element decide, whoever computes it. U is std::uint32_t or a vector of them.

// The finalizer of MurmurHash3 (Appleby, 2011), in which every bit of x moves every bit.
template <class U>
FUSEDSTEP_HD U mix(U x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// The key for a step of a parameter: one number of the sequence SplitMix64 (Steele, Lea and Flood,
// 2014) that the seed and the parameter start, the parameter being a number of the seed's.
FUSEDSTEP_HD std::uint64_t split_mix(std::uint64_t start, std::uint64_t count) {
    std::uint64_t z = start + (count + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
FUSEDSTEP_HD std::uint64_t rounding_key(std::uint64_t seed, std::uint64_t param,
                                        std::uint64_t step) {
    return split_mix(split_mix(seed, param), step);
}

// The random number of the element at offset 2^32 high + low of a parameter.
template <class U>
FUSEDSTEP_HD U random_bits(std::uint64_t key, std::uint32_t high, U low) {
    U const first = mix(low + static_cast<std::uint32_t>(key));
    return mix(first ^ (static_cast<std::uint32_t>(key >> 32) + high * 0x9e3779b9u));
}

// One of the two bfloat16 neighbours of x, as a V: the one further from zero with the probability
// of the way that x has gone to it, in units of 2^-16, which is exact. V is a float or a vector.
template <class V, class U>
FUSEDSTEP_HD V round_stochastically(V x, U random) {
    U const bits = __builtin_bit_cast(U, x);
    U const rounded = (bits + (random >> 16)) & 0xffff0000u;
    return __builtin_bit_cast(V, (bits & 0x7fffffffu) > 0x7f800000u ? bits : rounded);
}

}  // namespace fusedstep::optim

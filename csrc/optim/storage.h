// How a parameter is kept from one step to the next: policies that the kernels of every rule share,
// on the CPU (where V is a vector) and on CUDA (where V is a scalar).
#pragma once

#include <type_traits>

#include "optim/optim.h"

namespace fusedstep::optim {

// As it is.
template <class T>
struct Ordinary {
    using Param = T;
    using State = T;
    static constexpr bool has_master = false;
    static constexpr bool by_chance = false;
};

// As it is, rounded by chance.
struct StochasticallyRounded {
    using Param = bfloat16;
    using State = bfloat16;
    static constexpr bool has_master = false;
    static constexpr bool by_chance = true;
};

// In float32 beside it, as its states are.
template <class T>
struct WithMaster {
    using Param = T;
    using State = float;
    static constexpr bool has_master = true;
    static constexpr bool by_chance = false;
};

// Calls f with the policy of a parameter of type T.
template <class T, class F>
FUSEDSTEP_HD void with_policy(Storage storage, F&& f) {
    if constexpr (sizeof(T) == 2) {
        if (storage == Storage::master_weights) return f(WithMaster<T>{});
    }
    if constexpr (std::is_same_v<T, bfloat16>) {
        if (storage == Storage::stochastic_rounding) return f(StochasticallyRounded{});
    }
    f(Ordinary<T>{});
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

// ---- One element ----

// The same element of all arrays of a parameter, or a vector of them.
template <class V, int states_>
struct Element {
    V param;
    V grad;
    V states[states_];
    V master;
};

// Updates an element. `unscale` is asked only of policies with a master weight: their update sees
// the gradient divided in float32, and what stays behind is rounded. Other gradients are unscaled
// and rounded before they come here. Of `ops`,
//   mul_add(a, b, c)            is a b + c,
//   rounded<T>(v)               is v as it will be read after it has been stored as a T,
//   where_same(a, b, yes, no)   is `yes` where the bits of a and b are the same and `no` elsewhere,
//   random()                    is the random number of the element, random_bits().
template <class Rule, auto variant, class Policy, class V, int states, class Ops>
FUSEDSTEP_HD void advance(Element<V, states>& e,
                          const typename Rule::template Coefficients<V>& coefficients, bool unscale,
                          V grad_scale, const Ops& ops) {
    using T = typename Policy::Param;
    V grad = e.grad;
    V param = e.param;
    if constexpr (Policy::has_master) {
        if (unscale) {
            grad = grad / grad_scale;
            e.grad = grad;
        }
        param = ops.where_same(ops.template rounded<T>(e.master), param, e.master, param);
    }
    e.param = Rule::template update<variant>(param, grad, e.states, coefficients, ops);
    if constexpr (Policy::has_master) e.master = e.param;
    if constexpr (Policy::by_chance) e.param = round_stochastically(e.param, ops.random());
}

}  // namespace fusedstep::optim

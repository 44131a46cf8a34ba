// The SGD update on the CPU, compiled once per instruction-set level: one pass over memory that
// reads and writes each element once.
#pragma once

#include "core/multi_tensor.h"
#include "core/vec.h"
#include "optim/rules/sgd.h"
#include "optim/optim.h"

namespace fusedstep::optim::FUSEDSTEP_LEVEL {
namespace {

using namespace ::fusedstep::FUSEDSTEP_LEVEL;

// How a vector of an array is read and written: whole, or its first n lanes.
struct Whole {
    template <class T>
    FUSEDSTEP_VEC Vec<acc_t<T>> load(const T* p) const {
        return FUSEDSTEP_LEVEL::load(p);
    }
    template <class T>
    FUSEDSTEP_VEC void store(T* p, Vec<acc_t<T>> v) const {
        FUSEDSTEP_LEVEL::store(p, v);
    }
};
struct Part {
    std::int64_t n;

    template <class T>
    FUSEDSTEP_VEC Vec<acc_t<T>> load(const T* p) const {
        return load_partial(p, n);
    }
    template <class T>
    FUSEDSTEP_VEC void store(T* p, Vec<acc_t<T>> v) const {
        store_partial(p, v, n);
    }
};

// The same elements of all of an entry's arrays, and how the parameter's are kept: in itself,
template <class T>
struct Ordinary {
    using Accumulate = acc_t<T>;
    T* param;
    T* grad;
    T* buffer;

    template <class Access>
    FUSEDSTEP_VEC auto load_grad(Access access, std::int64_t i) const {
        return access.load(grad + i);
    }
    template <class Access>
    FUSEDSTEP_VEC auto load_param(Access access, std::int64_t i) const {
        return access.load(param + i);
    }
    template <class Access, class V>
    FUSEDSTEP_VEC void store_param(Access access, std::int64_t i, V v) const {
        access.store(param + i, v);
    }
};

// rounded by chance,
struct Stochastic : Ordinary<bfloat16> {
    std::uint64_t key;
    std::int64_t offset;  // of these elements in the parameter

    template <class Access>
    FUSEDSTEP_VEC void store_param(Access access, std::int64_t i, VecF v) const {
        auto const at = static_cast<std::uint64_t>(offset + i);
        VecU32 const low = vec_cast<VecU32>(lane_index<float>()) + static_cast<std::uint32_t>(at);
        VecU32 const random = random_bits(key, static_cast<std::uint32_t>(at >> 32), low);
        access.store(param + i, round_stochastically(v, random));
    }
};

// or in float32 beside it.
template <class T>
struct WithMaster {
    using Accumulate = float;
    T* param;
    T* grad;
    float* buffer;
    float* master_param;
    float grad_scale;

    // What the update sees is divided in float32; what stays behind is rounded.
    template <class Access>
    FUSEDSTEP_VEC VecF load_grad(Access access, std::int64_t i) const {
        VecF g = access.load(grad + i);
        if (grad_scale != 1) {
            g = g / grad_scale;
            access.store(grad + i, g);
        }
        return g;
    }
    template <class Access>
    FUSEDSTEP_VEC VecF load_param(Access access, std::int64_t i) const {
        VecF const p = access.load(param + i);
        VecF const master = access.load(master_param + i);
        T rounded[kLanes<float>];
        store(rounded, master);
        VecF const expected = load(static_cast<const T*>(rounded));
        return vec_cast<VecI32>(p) == vec_cast<VecI32>(expected) ? master : p;
    }
    template <class Access>
    FUSEDSTEP_VEC void store_param(Access access, std::int64_t i, VecF v) const {
        access.store(master_param + i, v);
        access.store(param + i, v);
    }
};

// Not inlined: update() calls one of seventy, and holding them all it starts more slowly.
template <class Rule, class Arrays>
__attribute__((noinline)) void update_span(const Hyperparameters& h, const Arrays arrays,
                                           std::int64_t n) {
    using A = typename Arrays::Accumulate;
    using V = Vec<A>;
    constexpr int L = kLanes<A>;
    auto const c =
        coefficients<A>(h, h.lr, [](A x) __attribute__((always_inline)) { return broadcast(x); });
    auto one = [&](auto access, std::int64_t i) __attribute__((always_inline)) {
        V b{};
        if constexpr (Rule::momentum == Momentum::running) b = access.load(arrays.buffer + i);
        V const p = update<Rule>(arrays.load_param(access, i), arrays.load_grad(access, i), b, c,
                                 [](V x, V y, V z)
                                     __attribute__((always_inline)) { return fmadd(x, y, z); });
        if constexpr (Rule::momentum != Momentum::none) access.store(arrays.buffer + i, b);
        arrays.store_param(access, i, p);
    };

    std::int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) one(Whole{}, i + k * L);
    }
    for (; i + L <= n; i += L) one(Whole{}, i);
    if (i < n) one(Part{n - i}, i);
}

template <class T>
void unscale_span(T* grad, std::int64_t n, double grad_scale) {
    using A = acc_t<T>;
    constexpr int L = kLanes<A>;
    Vec<A> const scale = broadcast(static_cast<A>(grad_scale));
    std::int64_t i = 0;
    for (; i + L <= n; i += L) store(grad + i, load(grad + i) / scale);
    if (i < n) store_partial(grad + i, load_partial(grad + i, n - i) / scale, n - i);
}

// Calls f(arrays) with the elements [begin, end) of an entry.
template <class T, class F>
FUSEDSTEP_VEC void with_arrays(const Entry& entry, const EntryPrecision* precision,
                               double grad_scale, std::int64_t begin, F f) {
    T* const param = static_cast<T*>(entry.param) + begin;
    T* const grad = static_cast<T*>(entry.grad) + begin;
    if constexpr (sizeof(T) == 2) {
        if (precision && precision->precision == Precision::master_weights) {
            auto* const buffer = static_cast<float*>(entry.momentum_buffer);
            f(WithMaster<T>{param, grad, buffer ? buffer + begin : nullptr,
                            precision->master_param + begin, static_cast<float>(grad_scale)});
            return;
        }
    }
    auto* const buffer = static_cast<T*>(entry.momentum_buffer);
    Ordinary<T> const ordinary{param, grad, buffer ? buffer + begin : nullptr};
    if constexpr (std::is_same_v<T, bfloat16>) {
        if (precision && precision->precision == Precision::stochastic_rounding) {
            f(Stochastic{ordinary, precision->key, begin});
            return;
        }
    }
    f(ordinary);
}

void update(const Step& step, std::int64_t first, std::int64_t last) {
    for_each_span(
        step.entries, step.entry_count, first, last,
        [&](const Entry& entry, std::int64_t begin, std::int64_t end) {
            const Hyperparameters& h = step.groups[entry.group];
            const EntryPrecision* const precision =
                step.precisions ? step.precisions + (&entry - step.entries) : nullptr;
            dispatch(entry.dtype, [&](auto tag) {
                using T = typename decltype(tag)::type;
                // A gradient that is unscaled is read again while it is in the cache.
                std::int64_t const block = step.grad_scale == 1 ? end - begin : kChunk;
                for (std::int64_t i = begin; i < end; i += block) {
                    std::int64_t const n = block < end - i ? block : end - i;
                    with_arrays<T>(entry, precision, step.grad_scale, i, [&](const auto& arrays) {
                        using Arrays = std::remove_cvref_t<decltype(arrays)>;
                        if constexpr (!std::is_same_v<Arrays, WithMaster<T>>) {
                            if (step.grad_scale != 1) unscale_span(arrays.grad, n, step.grad_scale);
                        }
                        with_rule(momentum_of(h, entry.first_step), h.nesterov, h.weight_decay != 0,
                                  [&](auto rule) { update_span<decltype(rule)>(h, arrays, n); });
                    });
                }
            });
        });
}

}  // namespace

extern const CpuKernels kernels{update};

}  // namespace fusedstep::optim::FUSEDSTEP_LEVEL

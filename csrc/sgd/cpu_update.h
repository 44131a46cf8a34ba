// The SGD update on the CPU, compiled once per instruction-set level: one pass over memory that
// reads and writes each element once.
#pragma once

#include "core/multi_tensor.h"
#include "core/vec.h"
#include "sgd/math.h"
#include "sgd/sgd.h"

namespace fusedstep::sgd::FUSEDSTEP_LEVEL {
namespace {

using namespace ::fusedstep::FUSEDSTEP_LEVEL;

// Not inlined: update() calls one of forty, and holding them all it starts more slowly.
template <class Rule, class T>
__attribute__((noinline)) void update_span(const Hyperparameters& h, T* param, const T* grad,
                                           T* buffer, std::int64_t n) {
    using A = acc_t<T>;
    using V = Vec<A>;
    constexpr int L = kLanes<A>;
    auto const c =
        coefficients<A>(h, h.lr, [](A x) __attribute__((always_inline)) { return broadcast(x); });
    auto new_param = [&c](V p, V g, V& b) __attribute__((always_inline)) {
        return update<Rule>(p, g, b, c, [](V x, V y, V z) __attribute__((always_inline)) {
            return fmadd(x, y, z);
        });
    };
    auto one = [&](std::int64_t i) __attribute__((always_inline)) {
        V b{};
        if constexpr (Rule::momentum == Momentum::running) b = load(buffer + i);
        V const p = new_param(load(param + i), load(grad + i), b);
        if constexpr (Rule::momentum != Momentum::none) store(buffer + i, b);
        store(param + i, p);
    };

    std::int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) one(i + k * L);
    }
    for (; i + L <= n; i += L) one(i);
    if (i < n) {
        std::int64_t const rest = n - i;
        V b{};
        if constexpr (Rule::momentum == Momentum::running) b = load_partial(buffer + i, rest);
        V const p = new_param(load_partial(param + i, rest), load_partial(grad + i, rest), b);
        if constexpr (Rule::momentum != Momentum::none) store_partial(buffer + i, b, rest);
        store_partial(param + i, p, rest);
    }
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

void update(const Step& step, std::int64_t first, std::int64_t last) {
    for_each_span(step.entries, step.entry_count, first, last,
                  [&](const Entry& entry, std::int64_t begin, std::int64_t end) {
                      const Hyperparameters& h = step.groups[entry.group];
                      dispatch(entry.dtype, [&](auto tag) {
                          using T = typename decltype(tag)::type;
                          T* const param = static_cast<T*>(entry.param);
                          T* const grad = static_cast<T*>(entry.grad);
                          T* const buffer = static_cast<T*>(entry.momentum_buffer);
                          auto update_with = [&](auto rule) {
                              // A gradient that is unscaled is read again while it is in the cache.
                              std::int64_t const block =
                                  step.grad_scale == 1 ? end - begin : kChunk;
                              for (std::int64_t i = begin; i < end; i += block) {
                                  std::int64_t const n = block < end - i ? block : end - i;
                                  if (step.grad_scale != 1)
                                      unscale_span(grad + i, n, step.grad_scale);
                                  update_span<decltype(rule)>(h, param + i, grad + i,
                                                              buffer ? buffer + i : nullptr, n);
                              }
                          };
                          with_rule(momentum_of(h, entry.first_step), h.nesterov,
                                    h.weight_decay != 0, update_with);
                      });
                  });
}

}  // namespace

extern const CpuKernels kernels{update};

}  // namespace fusedstep::sgd::FUSEDSTEP_LEVEL

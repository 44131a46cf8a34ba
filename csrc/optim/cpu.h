// The updates on the CPU, compiled once per instruction-set level: one pass over memory that reads
// and writes each element once.
#pragma once

#include "core/multi_tensor.h"
#include "core/vec.h"
#include "optim/rules.h"
#include "optim/storage.h"

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

// The same elements of all of an entry's arrays.
template <class Rule, class Policy>
struct Arrays {
    typename Policy::Param* param;
    typename Policy::Param* grad;
    typename Policy::State* states[kStates<Rule>];
    float* master;
    std::uint64_t key;    // of stochastic rounding
    std::int64_t offset;  // of these elements in the parameter
    bool unscale;         // see advance()
    float grad_scale;
};

// See advance().
struct Operations {
    std::uint64_t key;
    std::uint64_t place;  // of the first lane in the parameter

    template <class V>
    FUSEDSTEP_VEC V mul_add(V a, V b, V c) const {
        return fmadd(a, b, c);
    }
    template <class T, class V>
    FUSEDSTEP_VEC V rounded(V v) const {
        return widened<T>(narrowed<T>(v));
    }
    FUSEDSTEP_VEC VecF where_same(VecF a, VecF b, VecF yes, VecF no) const {
        return vec_cast<VecI32>(a) == vec_cast<VecI32>(b) ? yes : no;
    }
    FUSEDSTEP_VEC VecU32 random() const {
        VecU32 const low =
            vec_cast<VecU32>(lane_index<float>()) + static_cast<std::uint32_t>(place);
        return random_bits(key, static_cast<std::uint32_t>(place >> 32), low);
    }
};

// Not inlined: update() calls one of seventy, and holding them all it starts more slowly.
template <class Rule, auto variant, class Policy>
__attribute__((noinline)) void update_span(const typename Rule::Hyperparameters& h,
                                           const Arrays<Rule, Policy> arrays, std::int64_t n) {
    using A = acc_t<typename Policy::State>;
    using V = Vec<A>;
    constexpr int L = kLanes<A>;
    auto const c = Rule::template coefficients<A>(
        h, h.lr.value, [](A x) __attribute__((always_inline)) { return broadcast(x); });
    V const grad_scale = broadcast(static_cast<A>(arrays.grad_scale));
    auto one = [&](auto access, std::int64_t i) __attribute__((always_inline)) {
        Element<V, kStates<Rule>> e{};
        for (int s = 0; s < kStates<Rule>; ++s) {
            if (Rule::reads(variant) >> s & 1) e.states[s] = access.load(arrays.states[s] + i);
        }
        e.param = access.load(arrays.param + i);
        if constexpr (Policy::has_master) e.master = access.load(arrays.master + i);
        e.grad = access.load(arrays.grad + i);
        Operations const ops{arrays.key, static_cast<std::uint64_t>(arrays.offset + i)};
        advance<Rule, variant, Policy>(e, c, arrays.unscale, grad_scale, ops);
        if constexpr (Policy::has_master) {
            if (arrays.unscale) access.store(arrays.grad + i, e.grad);
            access.store(arrays.master + i, e.master);
        }
        for (int s = 0; s < kStates<Rule>; ++s) {
            if (Rule::writes(variant) >> s & 1) access.store(arrays.states[s] + i, e.states[s]);
        }
        access.store(arrays.param + i, e.param);
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

// Updates the elements [begin, begin + n) of an entry.
template <class Rule, class Policy>
FUSEDSTEP_VEC void update_elements(const Step& step, const typename Rule::Hyperparameters& h,
                                   const Entry& entry, const EntryStorage* storage,
                                   std::int64_t begin, std::int64_t n) {
    using T = typename Policy::Param;
    using S = typename Policy::State;
    Arrays<Rule, Policy> arrays{};
    arrays.param = static_cast<T*>(entry.param) + begin;
    arrays.grad = static_cast<T*>(entry.grad) + begin;
    for (int s = 0; s < kStates<Rule>; ++s) {
        auto* const state = static_cast<S*>(entry.states[s]);
        arrays.states[s] = state ? state + begin : nullptr;
    }
    arrays.offset = begin;
    arrays.unscale = step.grad_scale != 1;
    arrays.grad_scale = static_cast<float>(step.grad_scale);
    if constexpr (Policy::has_master) {
        arrays.master = storage->master_param + begin;
    } else {
        if (arrays.unscale) unscale_span(arrays.grad, n, step.grad_scale);
        if constexpr (Policy::by_chance) arrays.key = storage->key;
    }
    Rule::with_variant(Rule::variant_of(h, entry.first_step),
                       [&](auto variant) { update_span<Rule, variant(), Policy>(h, arrays, n); });
}

template <class Rule>
void update(const Step& step, std::int64_t first, std::int64_t last) {
    auto const* const groups = static_cast<const typename Rule::Hyperparameters*>(step.groups);
    for_each_span(step.entries, step.entry_count, first, last,
                  [&](const Entry& entry, std::int64_t begin, std::int64_t end) {
                      const EntryStorage* const storage =
                          step.storages ? step.storages + (&entry - step.entries) : nullptr;
                      // A gradient that is unscaled is read again while it is in the cache.
                      std::int64_t const block = step.grad_scale == 1 ? end - begin : kChunk;
                      dispatch(entry.dtype, [&](auto tag) {
                          using T = typename decltype(tag)::type;
                          with_policy<T>(
                              storage ? storage->storage : Storage::ordinary, [&](auto policy) {
                                  for (std::int64_t i = begin; i < end; i += block) {
                                      std::int64_t const n = block < end - i ? block : end - i;
                                      update_elements<Rule, decltype(policy)>(
                                          step, groups[entry.group], entry, storage, i, n);
                                  }
                              });
                      });
                  });
}

}  // namespace

#define FUSEDSTEP_UPDATE(R) update<R>,
extern const CpuKernels kernels{{FUSEDSTEP_RULES(FUSEDSTEP_UPDATE)}};
#undef FUSEDSTEP_UPDATE

}  // namespace fusedstep::optim::FUSEDSTEP_LEVEL

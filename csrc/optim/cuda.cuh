// The updates on CUDA: one pass over memory that reads and writes each element once. A block takes
// a range of chunks, and each of its threads every kUpdateThreads-th access. Threads share nothing:
// results do not depend on the shape of the launch. A rule is compiled by rules/<name>.cu.
#pragma once

#include <limits>
#include <type_traits>

#include "core/cuda_math.cuh"
#include "core/cuda_pieces.cuh"
#include "core/cuda_vector.cuh"
#include "core/multi_tensor.h"
#include "optim/cuda.h"
#include "optim/storage.h"

namespace fusedstep::optim {
namespace {

template <class Rule, class A>
struct Update {
    typename Rule::template Coefficients<A> coefficients;
    A grad_scale;
    typename Rule::Variant variant;
};

// The same elements of all arrays of a parameter. A block's share of one parameter: less than 2^31
// (update_shape).
template <class Rule, class Policy>
struct Span {
    typename Policy::Param* param;
    typename Policy::Param* grad;
    typename Policy::State* states[kStates<Rule>];
    float* master;
    std::uint64_t key;    // of stochastic rounding
    std::int64_t offset;  // of these elements in the parameter
    int n;
};

// See advance(). Lanes of an access differ in the lower half of their place alone.
struct Operations {
    std::uint64_t key;
    std::uint64_t place;  // of the element in the parameter

    template <class A>
    __device__ __forceinline__ A mul_add(A a, A b, A c) const {
        return fused_multiply_add(a, b, c);
    }
    template <class T>
    __device__ __forceinline__ float rounded(float v) const {
        return to_acc(from_acc<T>(v));
    }
    __device__ __forceinline__ float where_same(float a, float b, float yes, float no) const {
        return bit_cast<std::uint32_t>(a) == bit_cast<std::uint32_t>(b) ? yes : no;
    }
    __device__ __forceinline__ std::uint32_t random() const {
        return random_bits(key, static_cast<std::uint32_t>(place >> 32),
                           static_cast<std::uint32_t>(place));
    }
};

// kLanes elements as one access holds them in registers: 16-bit elements taken apart would fill a
// register each.
template <class T, int kLanes>
struct Packed {
    using Bits = std::conditional_t<kLanes * sizeof(T) == 16, uint4,
                                    std::conditional_t<kLanes * sizeof(T) == 8, uint2, T>>;
    using Access = std::conditional_t<kLanes == 1, T, Bits>;
    static_assert(sizeof(Access) == kLanes * sizeof(T));
    struct Elements {  // needs no alignment, as Lanes do
        T lane[kLanes];
    };

    static __device__ __forceinline__ Access& at(T* array, int i) {
        return *reinterpret_cast<Access*>(array + i);
    }
};

// Updates the elements [begin, end) of a span, kLanes of each array by one access; for more than
// one all arrays must be aligned to 16 bytes. A thread has loaded kInFlight accesses of each array
// before it uses the first.
template <int kLanes, int kInFlight, bool unscale, class Rule, class Policy>
__device__ __forceinline__ void update_elements(
    const Update<Rule, acc_t<typename Policy::State>>& u, const Span<Rule, Policy>& span, int begin,
    int end) {
    using T = typename Policy::Param;
    using S = typename Policy::State;
    using A = acc_t<S>;
    using OfParam = Packed<T, kLanes>;
    using OfState = Packed<S, kLanes>;
    using OfMaster = Packed<float, Policy::has_master ? kLanes : 1>;
    constexpr int kStride = kLanes * static_cast<int>(kUpdateThreads);
    for (int i = begin + kLanes * static_cast<int>(threadIdx.x); i < end;
         i += kInFlight * kStride) {
        typename OfParam::Access grad[kInFlight]{};
        typename OfParam::Access param[kInFlight]{};
        typename OfState::Access states[kStates<Rule>][kInFlight]{};
        typename OfMaster::Access master[kInFlight]{};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (i + k * kStride < end) grad[k] = OfParam::at(span.grad, i + k * kStride);
        }
        // Before the other arrays are loaded: a division takes the registers that they fill.
        if constexpr (unscale && !Policy::has_master) {
#pragma unroll
            for (int k = 0; k < kInFlight; ++k) {
                if (i + k * kStride >= end) break;
                auto g = bit_cast<typename OfParam::Elements>(grad[k]);
#pragma unroll
                for (T& x : g.lane) x = from_acc<T>(to_acc(x) / u.grad_scale);
                grad[k] = bit_cast<typename OfParam::Access>(g);
                OfParam::at(span.grad, i + k * kStride) = grad[k];
            }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (i + k * kStride >= end) break;
            param[k] = OfParam::at(span.param, i + k * kStride);
            if constexpr (Policy::has_master) {
                master[k] = OfMaster::at(span.master, i + k * kStride);
            }
#pragma unroll
            for (int s = 0; s < kStates<Rule>; ++s) {
                if (Rule::reads(u.variant) >> s & 1)
                    states[s][k] = OfState::at(span.states[s], i + k * kStride);
            }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (i + k * kStride >= end) break;
            auto g = bit_cast<typename OfParam::Elements>(grad[k]);
            auto p = bit_cast<typename OfParam::Elements>(param[k]);
            auto m = bit_cast<typename OfMaster::Elements>(master[k]);
            typename OfState::Elements b[kStates<Rule>];
#pragma unroll
            for (int s = 0; s < kStates<Rule>; ++s) {
                b[s] = bit_cast<typename OfState::Elements>(states[s][k]);
            }
            Rule::with_variant(u.variant, [&](auto variant) __attribute__((always_inline)) {
#pragma unroll
                for (int lane = 0; lane < kLanes; ++lane) {
                    Element<A, kStates<Rule>> e;
                    e.param = to_acc(p.lane[lane]);
                    e.grad = to_acc(g.lane[lane]);
                    if constexpr (Policy::has_master) e.master = m.lane[lane];
#pragma unroll
                    for (int s = 0; s < kStates<Rule>; ++s) e.states[s] = to_acc(b[s].lane[lane]);
                    Operations const ops{
                        span.key, static_cast<std::uint64_t>(span.offset + i + k * kStride) + lane};
                    advance<Rule, variant(), Policy>(e, u.coefficients, unscale, u.grad_scale, ops);
                    p.lane[lane] = from_acc<T>(e.param);
                    if constexpr (Policy::has_master) {
                        g.lane[lane] = from_acc<T>(e.grad);
                        m.lane[lane] = e.master;
                    }
#pragma unroll
                    for (int s = 0; s < kStates<Rule>; ++s) {
                        b[s].lane[lane] = from_acc<S>(e.states[s]);
                    }
                }
            });
#pragma unroll
            for (int s = 0; s < kStates<Rule>; ++s) {
                if (Rule::writes(u.variant) >> s & 1) {
                    OfState::at(span.states[s], i + k * kStride) =
                        bit_cast<typename OfState::Access>(b[s]);
                }
            }
            if constexpr (Policy::has_master) {
                if (unscale) {
                    OfParam::at(span.grad, i + k * kStride) = bit_cast<typename OfParam::Access>(g);
                }
                OfMaster::at(span.master, i + k * kStride) = bit_cast<typename OfMaster::Access>(m);
            }
            OfParam::at(span.param, i + k * kStride) = bit_cast<typename OfParam::Access>(p);
        }
    }
}

template <int kVectorsInFlight, bool unscale, class Rule, class Policy>
__device__ __forceinline__ void update_span(const Update<Rule, acc_t<typename Policy::State>>& u,
                                            const Span<Rule, Policy>& span) {
    // Of the widest array 16 bytes at a time.
    constexpr int kLanes = kVectorLanes<
        std::conditional_t<(sizeof(typename Policy::State) > sizeof(typename Policy::Param)),
                           typename Policy::State, typename Policy::Param>>;
    bool aligned = is_vector_aligned(span.param) && is_vector_aligned(span.grad);
    if constexpr (Policy::has_master) aligned = aligned && is_vector_aligned(span.master);
#pragma unroll
    for (int s = 0; s < kStates<Rule>; ++s) aligned = aligned && is_vector_aligned(span.states[s]);
    int const tail = aligned ? span.n / kLanes * kLanes : 0;
    if (aligned) update_elements<kLanes, kVectorsInFlight, unscale>(u, span, 0, tail);
    update_elements<1, 2 * kVectorsInFlight, unscale>(u, span, tail, span.n);
}

// A pointer that an entry holds. Where it is read from memory, and not from the parameters, the
// compiler has to be told that it points to global memory to access that as such.
template <class T>
__device__ __forceinline__ T* global(void* array) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(array));
#endif
    return static_cast<T*>(array);
}

// With what the kernel is told of a step, and what of it lies on the device.
template <class Rule, class A>
__device__ __forceinline__ Update<Rule, A> read_update(const UpdateHeader& step,
                                                       const typename Rule::Hyperparameters& h,
                                                       bool first_step) {
    double const lr = h.lr.on_device ? load_scalar(h.lr.on_device, h.lr.dtype, 0) : h.lr.value;
    double const grad_scale = step.device_grad_scale ? *step.device_grad_scale : step.grad_scale;
    return {Rule::template coefficients<A>(h, lr, [](A x) { return x; }),
            static_cast<A>(grad_scale), Rule::variant_of(h, first_step)};
}

// Calls f with the number of each state, which is known when the kernel is compiled.
template <class Rule, int s = 0, class F>
__device__ __forceinline__ void for_each_state(F&& f) {
    if constexpr (s < kStates<Rule>) {
        f(std::integral_constant<int, s>{});
        for_each_state<Rule, s + 1>(f);
    }
}

// Updates the elements [begin, end) of an entry.
template <class Rule, class Policy, int kVectorsInFlight>
__device__ __forceinline__ void update_entry(const UpdateHeader& step,
                                             const typename Rule::Hyperparameters& h,
                                             const ListedEntry<kStates<Rule>>& entry,
                                             const EntryStorage* storage, std::int64_t begin,
                                             std::int64_t end) {
    using T = typename Policy::Param;
    using S = typename Policy::State;
    Span<Rule, Policy> span{};
    span.param = global<T>(entry.param) + begin;
    span.grad = global<T>(entry.grad) + begin;
    if constexpr (Policy::has_master) span.master = global<float>(storage->master_param) + begin;
    span.offset = begin;
    span.n = static_cast<int>(end - begin);
    if constexpr (Policy::by_chance) span.key = storage->key;
    bool const skipped = step.device_found_inf && *step.device_found_inf != 0;
    for_each_state<Rule>([&](auto s) __attribute__((always_inline)) {
        void* const state = entry.states[s()];
        // The parameter's alignment stands in for that of a state which nobody touches.
        span.states[s()] = global<S>(state ? state : entry.param) + begin;
        constexpr double kSkipped = Rule::states[s()].skipped;
        if (skipped && entry.first_step && state) {
            S const value = from_acc<S>(static_cast<acc_t<S>>(kSkipped));
            for (int i = static_cast<int>(threadIdx.x); i < span.n;
                 i += static_cast<int>(kUpdateThreads)) {
                span.states[s()][i] = value;
            }
        }
    });
    if (skipped) return;
    auto const u = read_update<Rule, acc_t<S>>(step, h, entry.first_step);
    u.grad_scale == 1 ? update_span<kVectorsInFlight, false>(u, span)
                      : update_span<kVectorsInFlight, true>(u, span);
}

// More in flight do not fit the registers of a compute capability before 8.0, and where not all
// entries are ordinary those of none.
template <bool kOrdinary>
inline constexpr int kVectorsInFlight =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    1;
#else
    kOrdinary ? 2 : 1;
#endif

// Whether all entries are ordinary is known when the kernel is compiled: the registers that the
// others want are not taken from these.
template <class Rule, bool kOrdinary>
__device__ __forceinline__ void update_block(const UpdateHeader& step, const unsigned char* table) {
    using Group = typename Rule::Hyperparameters;
    using Listed =
        std::conditional_t<kOrdinary, ListedEntry<kStates<Rule>>, StoredEntry<kStates<Rule>>>;
    auto const* const groups = reinterpret_cast<const Group*>(table);
    auto const* const entries = reinterpret_cast<const Listed*>(groups + step.group_count);
    auto const first_of = [&step](unsigned block) {
        return static_cast<int>(std::int64_t{step.chunks} * block / gridDim.x);
    };
    for_each_span(
        entries, step.entry_count, first_of(blockIdx.x), first_of(blockIdx.x + 1),
        [&](const Listed& entry, std::int64_t begin, std::int64_t end)
            __attribute__((always_inline)) {
                dispatch(entry.dtype, [&](auto tag) __attribute__((always_inline)) {
                    using T = typename decltype(tag)::type;
                    const Group& h = groups[entry.group];
                    if constexpr (kOrdinary) {
                        update_entry<Rule, Ordinary<T>, kVectorsInFlight<true>>(
                            step, h, entry, nullptr, begin, end);
                    } else {
                        with_policy<T>(
                            entry.storage.storage, [&](auto policy) __attribute__((always_inline)) {
                                update_entry<Rule, decltype(policy), kVectorsInFlight<false>>(
                                    step, h, entry, &entry.storage, begin, end);
                            });
                    }
                });
            });
}

template <std::size_t kBytes>
struct TableInParameters {
    UpdateHeader header;
    unsigned char bytes[kBytes - sizeof(UpdateHeader)];
};
using FewEntries = TableInParameters<kFewParameterBytes>;
using ManyEntries = TableInParameters<kMostParameterBytes>;

struct TableOnDevice {
    UpdateHeader header;
    const unsigned char* bytes;
};

template <class Rule, class Table, bool kOrdinary>
__global__ __launch_bounds__(kMaxThreads,
                             kMinBlocks) void update_kernel(const __grid_constant__ Table table) {
    update_block<Rule, kOrdinary>(table.header, table.bytes);
}

template <class Rule, class Table>
cudaError_t launch_with(const Table& table, bool ordinary, const DeviceLimits& limits,
                        cudaStream_t stream) {
    return launch(update_shape(table.header.chunks, limits), stream,
                  ordinary ? update_kernel<Rule, Table, true> : update_kernel<Rule, Table, false>,
                  table);
}

template <class Rule, class Table>
cudaError_t launch_with_parameters(const Step& step, const UpdateHeader& header,
                                   const DeviceLimits& limits, cudaStream_t stream) {
    Table table;
    table.header = header;
    write_table(rule_of<Rule>(), step, table.bytes);
    return launch_with<Rule>(table, step.storages == nullptr, limits, stream);
}

// See CudaUpdate.
template <class Rule>
cudaError_t cuda_update(const Step& step, const void* device_table, const DeviceLimits& limits,
                        cudaStream_t stream) {
    std::int64_t const chunks =
        step.entry_count == 0 ? 0 : step.entries[step.entry_count - 1].extent.end_chunk();
    if (chunks == 0) return cudaSuccess;
    if (chunks > std::numeric_limits<std::int32_t>::max()) return cudaErrorInvalidValue;
    UpdateHeader const header{static_cast<std::int32_t>(step.group_count),
                              static_cast<std::int32_t>(step.entry_count),
                              static_cast<std::int32_t>(chunks),
                              step.grad_scale,
                              step.device_grad_scale,
                              step.device_found_inf};
    if (device_table) {
        TableOnDevice const table{header, static_cast<const unsigned char*>(device_table)};
        return launch_with<Rule>(table, step.storages == nullptr, limits, stream);
    }
    return table_fits(rule_of<Rule>(), step, kFewParameterBytes)
               ? launch_with_parameters<Rule, FewEntries>(step, header, limits, stream)
               : launch_with_parameters<Rule, ManyEntries>(step, header, limits, stream);
}

}  // namespace

template <class R>
CudaUpdate cuda_update_of() {
    return cuda_update<R>;
}

}  // namespace fusedstep::optim

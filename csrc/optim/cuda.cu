// The SGD update on CUDA: one pass over memory that reads and writes each element once. A block
// takes a range of chunks, and each of its threads every kUpdateThreads-th access. Threads share
// nothing: results do not depend on the shape of the launch.
#include "optim/cuda.h"

#include <cstring>
#include <limits>
#include <type_traits>

#include "core/cuda_math.cuh"
#include "core/cuda_pieces.cuh"
#include "core/cuda_vector.cuh"
#include "core/multi_tensor.h"
#include "optim/rules/sgd.h"

namespace fusedstep::optim {
namespace {

template <class A>
struct Update {
    Coefficients<A> coefficients;
    A grad_scale;
    Momentum momentum;
    bool nesterov;
    bool weight_decay;
};

// The same elements of a parameter, its gradient and its momentum buffer. A block's share of one
// parameter: less than 2^31 (update_shape).
template <class T>
struct Span {
    T* param;
    T* grad;
    T* buffer;
    int n;
};

// Updates the elements [begin, end) of a span in accesses of type Access: uint4 for kVectorLanes<T>
// at once, where all arrays are aligned to it, T for one. A thread has loaded kInFlight accesses of
// each array before it uses the first. It keeps them as they are loaded: 16-bit elements taken
// apart would fill a register each.
template <class Access, int kInFlight, bool unscale, class T>
__device__ __forceinline__ void update_elements(const Update<acc_t<T>>& u, const Span<T>& span,
                                                int begin, int end) {
    using A = acc_t<T>;
    constexpr int kLanes = sizeof(Access) / sizeof(T);
    constexpr int kStride = kLanes * static_cast<int>(kUpdateThreads);
    struct Elements {  // of an access that is in registers: needs no alignment, as Lanes do
        T lane[kLanes];
    };
    auto const at = [](T* array, int i) -> Access& {
        return *reinterpret_cast<Access*>(array + i);
    };
    for (int i = begin + kLanes * static_cast<int>(threadIdx.x); i < end;
         i += kInFlight * kStride) {
        Access grad[kInFlight]{};
        Access param[kInFlight]{};
        Access buffer[kInFlight]{};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (i + k * kStride < end) grad[k] = at(span.grad, i + k * kStride);
        }
        // Before the other arrays are loaded: a division takes the registers that they fill.
        if constexpr (unscale) {
#pragma unroll
            for (int k = 0; k < kInFlight; ++k) {
                if (i + k * kStride >= end) break;
                auto g = bit_cast<Elements>(grad[k]);
#pragma unroll
                for (T& x : g.lane) x = from_acc<T>(to_acc(x) / u.grad_scale);
                grad[k] = bit_cast<Access>(g);
                at(span.grad, i + k * kStride) = grad[k];
            }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (i + k * kStride >= end) break;
            param[k] = at(span.param, i + k * kStride);
            if (u.momentum == Momentum::running) buffer[k] = at(span.buffer, i + k * kStride);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (i + k * kStride >= end) break;
            auto const g = bit_cast<Elements>(grad[k]);
            auto p = bit_cast<Elements>(param[k]);
            auto b = bit_cast<Elements>(buffer[k]);
            with_rule(u.momentum, u.nesterov, u.weight_decay,
                      [&](auto rule) __attribute__((always_inline)) {
#pragma unroll
                          for (int lane = 0; lane < kLanes; ++lane) {
                              A new_buffer = to_acc(b.lane[lane]);
                              A const new_param = update<decltype(rule)>(
                                  to_acc(p.lane[lane]), to_acc(g.lane[lane]), new_buffer,
                                  u.coefficients,
                                  [](A x, A y, A z) { return fused_multiply_add(x, y, z); });
                              p.lane[lane] = from_acc<T>(new_param);
                              b.lane[lane] = from_acc<T>(new_buffer);
                          }
                      });
            if (u.momentum != Momentum::none) {
                at(span.buffer, i + k * kStride) = bit_cast<Access>(b);
            }
            at(span.param, i + k * kStride) = bit_cast<Access>(p);
        }
    }
}

template <int kVectorsInFlight, bool unscale, class T>
__device__ __forceinline__ void update_span(const Update<acc_t<T>>& u, const Span<T>& span) {
    constexpr int kElementsInFlight = 2 * kVectorsInFlight;
    int tail = 0;
    if (is_vector_aligned(span.param) && is_vector_aligned(span.grad) &&
        is_vector_aligned(span.buffer)) {
        tail = span.n / kVectorLanes<T> * kVectorLanes<T>;
        update_elements<uint4, kVectorsInFlight, unscale>(u, span, 0, tail);
    }
    update_elements<T, kElementsInFlight, unscale>(u, span, tail, span.n);
}

// The same elements of all arrays of a 16-bit parameter that is not ordinary.
template <class T, Precision precision>
struct PreciseSpan {
    static constexpr bool has_master = precision == Precision::master_weights;
    using Buffer = std::conditional_t<has_master, float, T>;
    T* param;
    T* grad;
    Buffer* buffer;
    float* master_param;
    std::uint64_t key;
    std::int64_t offset;  // of these elements in the parameter
    int n;
};

template <int kLanes, class T>
__device__ __forceinline__ Lanes<T, kLanes>& lanes_at(T* p) {
    return *reinterpret_cast<Lanes<T, kLanes>*>(p);
}

// What update_elements does, for kLanes elements at once. With master weights the update sees the
// gradient divided in float32; what stays behind is rounded.
template <int kLanes, class T, Precision precision>
__device__ __forceinline__ void update_precise_elements(const Update<float>& u,
                                                        const PreciseSpan<T, precision>& span,
                                                        int begin, int end) {
    using Span = PreciseSpan<T, precision>;
    using Buffer = typename Span::Buffer;
    constexpr int kStride = kLanes * static_cast<int>(kUpdateThreads);
    for (int i = begin + kLanes * static_cast<int>(threadIdx.x); i < end; i += kStride) {
        Lanes<T, kLanes> g = lanes_at<kLanes>(span.grad + i);
        Lanes<T, kLanes> p = lanes_at<kLanes>(span.param + i);
        // Lanes differ in the lower half alone.
        auto const at = static_cast<std::uint64_t>(span.offset + i);
        Lanes<float, kLanes> master{};
        if constexpr (Span::has_master) master = lanes_at<kLanes>(span.master_param + i);
        Lanes<Buffer, kLanes> b{};
        if (u.momentum == Momentum::running) b = lanes_at<kLanes>(span.buffer + i);
        with_rule(
            u.momentum, u.nesterov, u.weight_decay, [&](auto rule) __attribute__((always_inline)) {
#pragma unroll
                for (int lane = 0; lane < kLanes; ++lane) {
                    float grad = to_acc(g.lane[lane]);
                    if (u.grad_scale != 1) {
                        grad /= u.grad_scale;
                        g.lane[lane] = from_acc<T>(grad);
                        if constexpr (!Span::has_master) grad = to_acc(g.lane[lane]);
                    }
                    float param = to_acc(p.lane[lane]);
                    if constexpr (Span::has_master) {
                        T const expected = from_acc<T>(master.lane[lane]);
                        if (expected.bits == p.lane[lane].bits) param = master.lane[lane];
                    }
                    float buffer = to_acc(b.lane[lane]);
                    float new_param = update<decltype(rule)>(
                        param, grad, buffer, u.coefficients,
                        [](float x, float y, float z) { return fused_multiply_add(x, y, z); });
                    if constexpr (Span::has_master) {
                        master.lane[lane] = new_param;
                    } else {
                        new_param = round_stochastically(
                            new_param, random_bits(span.key, static_cast<std::uint32_t>(at >> 32),
                                                   static_cast<std::uint32_t>(at) + lane));
                    }
                    p.lane[lane] = from_acc<T>(new_param);
                    b.lane[lane] = from_acc<Buffer>(buffer);
                }
            });
        if (u.grad_scale != 1) lanes_at<kLanes>(span.grad + i) = g;
        if (u.momentum != Momentum::none) lanes_at<kLanes>(span.buffer + i) = b;
        if constexpr (Span::has_master) lanes_at<kLanes>(span.master_param + i) = master;
        lanes_at<kLanes>(span.param + i) = p;
    }
}

template <class T, Precision precision>
__device__ __forceinline__ void update_precise_span(const Update<float>& u,
                                                    const PreciseSpan<T, precision>& span) {
    // Whose float32 arrays are accessed 16 bytes at a time.
    constexpr int kLanes = kVectorLanes<float>;
    int tail = 0;
    if (is_vector_aligned(span.param) && is_vector_aligned(span.grad) &&
        is_vector_aligned(span.buffer) && is_vector_aligned(span.master_param)) {
        tail = span.n / kLanes * kLanes;
        update_precise_elements<kLanes>(u, span, 0, tail);
    }
    update_precise_elements<1>(u, span, tail, span.n);
}

// The negative zero: whatever is added to it stays what it is.
template <class T>
__device__ __forceinline__ void fill_negative_zero(T* array, int n) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(kUpdateThreads)) {
        array[i] = from_acc<T>(-acc_t<T>{0});
    }
}

// A pointer that an Entry holds. Where it is read from memory, and not from the parameters, the
// compiler has to be told that it points to global memory to access that as such.
template <class T>
__device__ __forceinline__ T* global(void* array) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(array));
#endif
    return static_cast<T*>(array);
}

// With what the kernel is told of a step, and what of it lies on the device.
template <class A>
__device__ __forceinline__ Update<A> read_update(const UpdateHeader& step, const Hyperparameters& h,
                                                 const Entry& entry) {
    double const lr = h.device_lr ? load_scalar(h.device_lr, h.device_lr_dtype, 0) : h.lr;
    double const grad_scale = step.device_grad_scale ? *step.device_grad_scale : step.grad_scale;
    return {coefficients<A>(h, lr, [](A x) { return x; }), static_cast<A>(grad_scale),
            momentum_of(h, entry.first_step), h.nesterov, h.weight_decay != 0};
}

__device__ __forceinline__ bool is_skipped(const UpdateHeader& step) {
    return step.device_found_inf && *step.device_found_inf != 0;
}

template <class T, int kVectorsInFlight = 2>
__device__ __forceinline__ void update_entry(const UpdateHeader& step, const Hyperparameters& h,
                                             const Entry& entry, std::int64_t begin,
                                             std::int64_t end) {
    using A = acc_t<T>;
    // Without momentum the parameter stands in for the buffer, which nobody touches.
    T* const buffer = global<T>(entry.momentum_buffer ? entry.momentum_buffer : entry.param);
    Span<T> const span{global<T>(entry.param) + begin, global<T>(entry.grad) + begin,
                       buffer + begin, static_cast<int>(end - begin)};
    if (is_skipped(step)) {
        if (entry.first_step) fill_negative_zero(span.buffer, span.n);
        return;
    }
    Update<A> const u = read_update<A>(step, h, entry);
    u.grad_scale == 1 ? update_span<kVectorsInFlight, false>(u, span)
                      : update_span<kVectorsInFlight, true>(u, span);
}

template <Precision kPrecision, class T>
__device__ __forceinline__ void update_precise_entry(const UpdateHeader& step,
                                                     const Hyperparameters& h, const Entry& entry,
                                                     const EntryPrecision& precision,
                                                     std::int64_t begin, std::int64_t end) {
    using Span = PreciseSpan<T, kPrecision>;
    using Buffer = typename Span::Buffer;
    T* const param = global<T>(entry.param);
    // What does not exist nobody touches; the parameter's alignment stands in for its own.
    auto const or_param = [param](void* array) { return array ? array : param; };
    float* const master =
        global<float>(or_param(Span::has_master ? precision.master_param : nullptr));
    Span const span{param + begin,
                    global<T>(entry.grad) + begin,
                    global<Buffer>(or_param(entry.momentum_buffer)) + begin,
                    master + begin,
                    precision.key,
                    begin,
                    static_cast<int>(end - begin)};
    if (is_skipped(step)) {
        if (entry.first_step) fill_negative_zero(span.buffer, span.n);
        return;
    }
    Update<float> const u = read_update<float>(step, h, entry);
    update_precise_span(u, span);
}

// The same where not all entries are ordinary.
template <class T>
__device__ __forceinline__ void update_entry(const UpdateHeader& step, const Hyperparameters& h,
                                             const PreciseEntry& entry, std::int64_t begin,
                                             std::int64_t end) {
    const EntryPrecision& precision = entry.precision;
    if constexpr (sizeof(T) == 2) {
        if (precision.precision == Precision::master_weights) {
            update_precise_entry<Precision::master_weights, T>(step, h, entry, precision, begin,
                                                               end);
            return;
        }
    }
    if constexpr (std::is_same_v<T, bfloat16>) {
        if (precision.precision == Precision::stochastic_rounding) {
            update_precise_entry<Precision::stochastic_rounding, T>(step, h, entry, precision,
                                                                    begin, end);
            return;
        }
    }
    // With fewer in flight than in a kernel of ordinary entries alone all of it fits registers.
    update_entry<T, 1>(step, h, static_cast<const Entry&>(entry), begin, end);
}

// Whether all entries are ordinary is known when the kernel is compiled: the registers that the
// others want are not taken from these.
template <bool kOrdinary>
__device__ __forceinline__ void update_block(const UpdateHeader& step, const unsigned char* table) {
    auto const* const groups = reinterpret_cast<const Hyperparameters*>(table);
    using Listed = std::conditional_t<kOrdinary, Entry, PreciseEntry>;
    auto const* const entries = reinterpret_cast<const Listed*>(groups + step.group_count);
    auto const first_of = [&step](unsigned block) {
        return static_cast<int>(std::int64_t{step.chunks} * block / gridDim.x);
    };
    for_each_span(entries, step.entry_count, first_of(blockIdx.x), first_of(blockIdx.x + 1),
                  [&](const Listed& entry, std::int64_t begin, std::int64_t end)
                      __attribute__((always_inline)) {
                          dispatch(entry.dtype, [&](auto tag) __attribute__((always_inline)) {
                              using T = typename decltype(tag)::type;
                              update_entry<T>(step, groups[entry.group], entry, begin, end);
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

template <class Table, bool kOrdinary>
__global__ __launch_bounds__(kMaxThreads,
                             kMinBlocks) void update_kernel(const __grid_constant__ Table table) {
    update_block<kOrdinary>(table.header, table.bytes);
}

UpdateHeader header_of(const Step& step, std::int64_t chunks) {
    return {static_cast<std::int32_t>(step.group_count),
            static_cast<std::int32_t>(step.entry_count),
            static_cast<std::int32_t>(chunks),
            step.grad_scale,
            step.device_grad_scale,
            step.device_found_inf};
}

template <class Table>
cudaError_t launch_with(const Table& table, bool ordinary, const DeviceLimits& limits,
                        cudaStream_t stream) {
    return launch(update_shape(table.header.chunks, limits), stream,
                  ordinary ? update_kernel<Table, true> : update_kernel<Table, false>, table);
}

template <class Table>
cudaError_t launch_with_parameters(const Step& step, const UpdateHeader& header,
                                   const DeviceLimits& limits, cudaStream_t stream) {
    Table table;
    table.header = header;
    write_table(step, table.bytes);
    return launch_with(table, step.precisions == nullptr, limits, stream);
}

}  // namespace

void write_table(const Step& step, void* table) {
    std::size_t const groups = static_cast<std::size_t>(step.group_count) * sizeof(Hyperparameters);
    auto* const entries = static_cast<unsigned char*>(table) + groups;
    std::memcpy(table, step.groups, groups);
    if (!step.precisions) {
        std::memcpy(entries, step.entries, table_bytes(step) - groups);
        return;
    }
    for (std::int64_t i = 0; i < step.entry_count; ++i) {
        PreciseEntry const entry{step.entries[i], step.precisions[i]};
        std::memcpy(entries + i * sizeof(entry), &entry, sizeof(entry));
    }
}

cudaError_t cuda_update(const Step& step, const void* device_table, const DeviceLimits& limits,
                        cudaStream_t stream) {
    std::int64_t const chunks =
        step.entry_count == 0 ? 0 : step.entries[step.entry_count - 1].extent.end_chunk();
    if (chunks == 0) return cudaSuccess;
    if (chunks > std::numeric_limits<std::int32_t>::max()) return cudaErrorInvalidValue;
    UpdateHeader const header = header_of(step, chunks);
    if (device_table) {
        TableOnDevice const table{header, static_cast<const unsigned char*>(device_table)};
        return launch_with(table, step.precisions == nullptr, limits, stream);
    }
    return table_fits(step, kFewParameterBytes)
               ? launch_with_parameters<FewEntries>(step, header, limits, stream)
               : launch_with_parameters<ManyEntries>(step, header, limits, stream);
}

}  // namespace fusedstep::optim

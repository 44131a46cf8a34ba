// The part of CUDA that this project's kernels and their torch files use, for g++. Found before a
// real toolkit's header of the same name; what is not here does not compile. The meaning of each
// name is CUDA's; tests/emulator/machine.h says what is checked beyond it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __global__ __attribute__((noinline, noclone))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ------------------------------------------------------------------ the host's side

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorIllegalAddress = 700,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
    cudaErrorCooperativeLaunchTooLarge = 720,
    cudaErrorNotSupported = 801,
    cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1,
                          cudaHostAllocMapped = 2;

using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID {
    cudaLaunchAttributeCooperative = 2,
    cudaLaunchAttributeClusterDimension = 4,
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        int cooperative;
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);  // of a fault: what happened, and where
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus*, unsigned long long*);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t = nullptr);

template <class T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
template <class T>
cudaError_t cudaHostAlloc(T** memory, std::size_t bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void**>(memory), bytes, flags);
}
template <class T>
cudaError_t cudaHostGetDevicePointer(T** device, void* host, unsigned flags) {
    return cudaHostGetDevicePointer(reinterpret_cast<void**>(device), host, flags);
}

namespace emulator {

using Where = std::source_location;

// A kernel with its arguments: what each thread of a launch runs.
struct Call {
    const void* kernel;
    std::size_t parameter_bytes;
    void (*run)(const void* context);
    const void* context;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const Call& call);
cudaError_t max_active_clusters(int* clusters, const cudaLaunchConfig_t& config);
cudaError_t allow_dynamic_shared(const void* kernel, int bytes);

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    using Bound = std::pair<void (*)(Parameters...), std::tuple<std::decay_t<Parameters>...>>;
    Bound const bound{kernel, {std::forward<Arguments>(arguments)...}};
    // Hands each thread its copy of the parameters, on its own stack.
    auto const run = [](const void* context) {
        auto const& [kernel, parameters] = *static_cast<const Bound*>(context);
        [&]<std::size_t... i>(std::index_sequence<i...>) __attribute__((no_sanitize("thread"))) {
            kernel(std::get<i>(parameters)...);
        }(std::index_sequence_for<Parameters...>{});
    };
    return emulator::launch(*config, {reinterpret_cast<const void*>(kernel),
                                      (sizeof(Parameters) + ... + 0), run, &bound});
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
    return emulator::max_active_clusters(clusters, *config);
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
    return emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
}

// ------------------------------------------------------------------ the kernel's side

namespace emulator {

// The same for all of a thread's life, as the attribute says: the compiler may ask once.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_dim();
__attribute__((const)) uint3 grid_dim();

// Members that are asked for when they are read.
template <uint3 (*ask)()>
struct Coordinates {
    struct {
        operator unsigned() const { return ask().x; }
    } x;
    struct {
        operator unsigned() const { return ask().y; }
    } y;
    struct {
        operator unsigned() const { return ask().z; }
    } z;
};

// The block's one statically sized object in shared memory; each thread asks for it once.
void* block_shared(std::size_t bytes, std::size_t alignment);
// The bytes that the launch asked for.
void* dynamic_shared();

// 16 bytes from global to shared memory, not there before the thread has waited for its copies.
void copy_async(void* shared, const void* global);
void wait_for_copies();

void sync_block(Where);

enum class WarpOperation { sync, ballot, shuffle, shuffle_up, shuffle_down, shuffle_xor };
std::uint64_t warp_operation(WarpOperation, unsigned mask, std::uint64_t bits, int operand,
                             int width, Where);

template <class T>
__forceinline__ T shuffle(WarpOperation operation, unsigned mask, T value, int operand, int width,
                          Where where) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = warp_operation(operation, mask, bits, operand, width, where);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

enum class AtomicOperation { add, min, max, exchange, compare_and_swap };
std::uint64_t atomic(AtomicOperation, void* address, unsigned bytes, bool is_signed,
                     std::uint64_t operand, std::uint64_t compare);

template <class T>
__forceinline__ T atomic(AtomicOperation operation, T* address, T operand, T compare = {}) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    return static_cast<T>(atomic(operation, const_cast<void*>(static_cast<const void*>(address)),
                                 sizeof(T), std::is_signed_v<T>,
                                 static_cast<std::uint64_t>(operand),
                                 static_cast<std::uint64_t>(compare)));
}

}  // namespace emulator

inline constexpr emulator::Coordinates<emulator::thread_index> threadIdx{};
inline constexpr emulator::Coordinates<emulator::block_index> blockIdx{};
inline constexpr emulator::Coordinates<emulator::block_dim> blockDim{};
inline constexpr emulator::Coordinates<emulator::grid_dim> gridDim{};

__forceinline__ void __syncthreads(emulator::Where where = emulator::Where::current()) {
    emulator::sync_block(where);
}
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu,
                                emulator::Where where = emulator::Where::current()) {
    emulator::warp_operation(emulator::WarpOperation::sync, mask, 0, 0, 32, where);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate,
                                       emulator::Where where = emulator::Where::current()) {
    return static_cast<unsigned>(emulator::warp_operation(emulator::WarpOperation::ballot, mask,
                                                          predicate != 0, 0, 32, where));
}
__forceinline__ int __any_sync(unsigned mask, int predicate,
                               emulator::Where where = emulator::Where::current()) {
    return __ballot_sync(mask, predicate, where) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate,
                               emulator::Where where = emulator::Where::current()) {
    return __ballot_sync(mask, predicate, where) == mask;
}
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                              emulator::Where where = emulator::Where::current()) {
    return emulator::shuffle(emulator::WarpOperation::shuffle, mask, value, lane, width, where);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                 emulator::Where where = emulator::Where::current()) {
    return emulator::shuffle(emulator::WarpOperation::shuffle_up, mask, value,
                             static_cast<int>(delta), width, where);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                   emulator::Where where = emulator::Where::current()) {
    return emulator::shuffle(emulator::WarpOperation::shuffle_down, mask, value,
                             static_cast<int>(delta), width, where);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                  emulator::Where where = emulator::Where::current()) {
    return emulator::shuffle(emulator::WarpOperation::shuffle_xor, mask, value, lane_mask, width,
                             where);
}

// Threads take turns, so that memory is always in order; what a fence orders on a card is not
// checked here.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

template <class T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
    return emulator::atomic(emulator::AtomicOperation::add, address, value);
}
template <class T>
__forceinline__ T atomicMin(T* address, std::type_identity_t<T> value) {
    return emulator::atomic(emulator::AtomicOperation::min, address, value);
}
template <class T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
    return emulator::atomic(emulator::AtomicOperation::max, address, value);
}
template <class T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
    return emulator::atomic(emulator::AtomicOperation::exchange, address, value);
}
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> compare,
                            std::type_identity_t<T> value) {
    return emulator::atomic(emulator::AtomicOperation::compare_and_swap, address, value, compare);
}

template <class T>
__forceinline__ T __ldg(const T* address) {
    return *address;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

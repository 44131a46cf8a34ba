// 16-byte accesses to arrays of storage types.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/cuda_launch.h"
#include "core/cuda_math.cuh"
#include "core/dtype.h"

namespace fusedstep {

// Consecutive elements, read and written by one access.
template <class T, int n>
struct alignas(n * sizeof(T)) Lanes {
    T lane[n];
};

// Elements of T in the widest access.
template <class T>
inline constexpr int kVectorLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
using Vector = Lanes<T, kVectorLanes<T>>;

FUSEDSTEP_HD bool is_vector_aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
}

// The two 16-bit values in a register, as two registers hold them: of each place the larger.
template <class T>
__device__ __forceinline__ std::uint32_t larger_pair(std::uint32_t a, std::uint32_t b) {
    static_assert(sizeof(T) == 2);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    std::uint32_t pair;
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    } else {
        asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    }
    return pair;
#else
    auto pair = bit_cast<Lanes<T, 2>>(a);
    auto const other = bit_cast<Lanes<T, 2>>(b);
    for (int i = 0; i < 2; ++i) {
        pair.lane[i] = from_acc<T>(larger(to_acc(pair.lane[i]), to_acc(other.lane[i])));
    }
    return bit_cast<std::uint32_t>(pair);
#endif
}

// The largest of the values and m; NaN only where all are.
template <class T, int n>
__device__ __forceinline__ acc_t<T> largest(const Lanes<T, n>& values, acc_t<T> m) {
    if constexpr (sizeof(T) == 2 && n == kVectorLanes<T>) {
        uint4 const pairs = bit_cast<uint4>(values);
        auto const pair = bit_cast<Lanes<T, 2>>(
            larger_pair<T>(larger_pair<T>(pairs.x, pairs.y), larger_pair<T>(pairs.z, pairs.w)));
        return larger(m, larger(to_acc(pair.lane[0]), to_acc(pair.lane[1])));
    } else {
#pragma unroll
        for (T value : values.lane) m = larger(m, to_acc(value));
        return m;
    }
}

// p must be aligned to 16 bytes.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
    return bit_cast<Vector<T>>(*reinterpret_cast<const uint4*>(p));
}

// To global memory. (Written out, because the compiler takes a plain assignment of 16 bytes apart
// where it has put them together from smaller ones.)
template <class T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& vector) {
    uint4 const words = bit_cast<uint4>(vector);
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words.x), "r"(words.y),
                 "r"(words.z), "r"(words.w)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(p) = words;
#endif
}

// Copies 16 bytes from global to shared memory, both aligned, past the registers (before compute
// capability 8.0 through them). The copy may be read by this thread after wait_for_copies(), by
// others behind a barrier after that.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(FUSEDSTEP_EMULATED_CUDA)
    emulator::copy_async(shared, global);
#elif __CUDA_ARCH__ < 800
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#else
    auto const to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(FUSEDSTEP_EMULATED_CUDA)
    emulator::wait_for_copies();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace fusedstep

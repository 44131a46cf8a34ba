// 16-byte accesses to arrays of storage types.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda_launch.h"
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

// Copies 16 bytes from global to shared memory, both aligned, past the registers. The copy may be
// read by this thread after wait_for_copies(), by others behind a barrier after that.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(FUSEDSTEP_EMULATED_CUDA)
    emulator::copy_async(shared, global);
#else
    auto const to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(FUSEDSTEP_EMULATED_CUDA)
    emulator::wait_for_copies();
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace fusedstep

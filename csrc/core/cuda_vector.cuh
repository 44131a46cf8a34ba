// 16-byte accesses to arrays of storage types.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace fusedstep {

inline constexpr int kVectorBytes = 16;

// Elements of T in one access.
template <class T>
inline constexpr int kVectorLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(kVectorBytes) Vector {
    T lane[kVectorLanes<T>];
};

FUSEDSTEP_HD bool is_vector_aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
}

// p must be aligned to 16 bytes.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
    return bit_cast<Vector<T>>(*reinterpret_cast<const uint4*>(p));
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& vector) {
    *reinterpret_cast<uint4*>(p) = bit_cast<uint4>(vector);
}

}  // namespace fusedstep

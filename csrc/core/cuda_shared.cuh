// A block's shared memory.
#pragma once

#include <cuda_runtime.h>

namespace fusedstep {

// One uninitialised object of type T (an aggregate of plain values) that all threads of a block
// share. A kernel calls it once. The only place where shared memory is declared: blocks that run at
// the same time in one process, as under the emulator of tests/emulator, each need their own.
template <class T>
__device__ __forceinline__ T& block_shared() {
#if defined(FUSEDSTEP_EMULATED_CUDA)
    return *static_cast<T*>(emulator::block_shared(sizeof(T), alignof(T)));
#else
    __shared__ alignas(T) unsigned char bytes[sizeof(T)];
    return *reinterpret_cast<T*>(bytes);
#endif
}

// The LaunchShape::shared_bytes of a block, as an array of T.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(FUSEDSTEP_EMULATED_CUDA)
    return static_cast<T*>(emulator::dynamic_shared());
#else
    extern __shared__ uint4 fusedstep_dynamic_shared[];
    return reinterpret_cast<T*>(fusedstep_dynamic_shared);
#endif
}

}  // namespace fusedstep

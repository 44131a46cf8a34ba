// Reductions over lanes of a warp and over a block. Each combines its values in one fixed order, so
// that the result is the same bits in every run.
#pragma once

#include <cuda_runtime.h>

#include "core/cuda_launch.h"

namespace fusedstep {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Over each group of `lanes` adjacent lanes (a power of two up to 32); every lane gets its group's
// result. All 32 lanes of the warp must call it.
template <class V, class Combine>
__device__ __forceinline__ V reduce_lanes(V value, int lanes, Combine combine) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
}

// Over all threads of a block, whose number is a multiple of 32; every thread gets the result.
// `scratch` is shared memory that nobody else may be using: between two reductions through the same
// scratch there must be a barrier behind the first one's reads.
template <class V, class Combine>
__device__ __forceinline__ V reduce_block(V value, V (&scratch)[kMaxThreads / kWarp],
                                          Combine combine) {
    value = reduce_lanes(value, kWarp, combine);
    int const warps = static_cast<int>(blockDim.x) / kWarp;
    if (warps == 1) return value;
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = scratch[0];
    for (int warp = 1; warp < warps; ++warp) value = combine(value, scratch[warp]);
    return value;
}

}  // namespace fusedstep

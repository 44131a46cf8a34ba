// Reductions over lanes of a warp and over a block. Each combines its values in one fixed order, so
// that the result is the same bits in every run.
#pragma once

#include <cuda_runtime.h>

#include "core/cuda_launch.h"

namespace fusedstep {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kMaxWarps = kMaxThreads / kWarp;

struct Add {
    template <class V>
    __device__ __forceinline__ V operator()(V a, V b) const {
        return a + b;
    }
};

// Over each group of `lanes` adjacent lanes (a power of two up to 32); every lane gets its group's
// result. All 32 lanes of the warp must call it.
template <class V, class Combine>
__device__ __forceinline__ V reduce_lanes(V value, int lanes, Combine combine) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
}

// Over all threads of a block (a multiple of 32), n values at once; every thread gets the results.
// `scratch` is shared memory. Before it is used again, all threads must have met at a barrier.
template <class V, int n, class Combine>
__device__ __forceinline__ void reduce_block(V (&values)[n], V (&scratch)[n][kMaxWarps],
                                             Combine combine) {
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = reduce_lanes(values[i], kWarp, combine);
    int const warps = static_cast<int>(blockDim.x) / kWarp;
    if (warps == 1) return;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) scratch[i][threadIdx.x / kWarp] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
        values[i] = scratch[i][0];
        for (int warp = 1; warp < warps; ++warp) values[i] = combine(values[i], scratch[i][warp]);
    }
}

}  // namespace fusedstep

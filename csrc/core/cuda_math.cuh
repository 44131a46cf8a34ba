// Exponentials, logarithms and comparisons on CUDA, by the type they are computed in.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <type_traits>

#include "core/dtype.h"

namespace fusedstep {

template <class A>
inline constexpr A kInfinity = std::numeric_limits<A>::infinity();

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

__device__ __forceinline__ float natural_log(float x) { return logf(x); }
__device__ __forceinline__ double natural_log(double x) { return log(x); }

// a b + c, rounded once.
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) {
    return fmaf(a, b, c);
}
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) {
    return fma(a, b, c);
}

// 2^x to 2 units in the last place; subnormal results are flushed to zero.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// exp(x) for values stored as Stored. What is stored in 16 bits carries 11 significant bits at
// most: there the product x log2(e), wrong by |x| / 2^24 of the result, is accurate enough, and
// takes 2 instructions instead of 8. (At full memory speed 16-bit logits come twice as fast as
// 32-bit ones.)
template <class Stored>
__device__ __forceinline__ acc_t<Stored> exponential(acc_t<Stored> x) {
    if constexpr (std::is_same_v<Stored, double>) {
        return exp(x);
    } else if constexpr (std::is_same_v<Stored, float>) {
        return expf(x);
    } else {
        return exp2_fast(x * 1.44269504088896341f);
    }
}

}  // namespace fusedstep

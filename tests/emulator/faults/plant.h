// A planted fault: a kernel template <bool faulty> over a little device memory, and its launch. The
// twin, kernel<false>, is correct.
#pragma once

#include "core/cuda_launch.h"
#include "core/cuda_shared.cuh"

namespace planted {

using fusedstep::block_shared;
using fusedstep::dynamic_shared;
using fusedstep::launch;
using fusedstep::LaunchShape;

inline constexpr int kFloats = 64;

// What the emulator says of kernel(memory), where memory is kFloats zeros.
inline const char* run(const LaunchShape& shape, void (*kernel)(float*)) {
    float* memory = nullptr;
    cudaMalloc(&memory, kFloats * sizeof(float));
    cudaMemsetAsync(memory, 0, kFloats * sizeof(float));
    cudaError_t const error = launch(shape, nullptr, kernel, memory);
    cudaFree(memory);
    return cudaGetErrorString(error);
}

}  // namespace planted

// PLANT(kernel, blocks, threads, the rest as designated initialisers of LaunchShape)
#define PLANT(kernel, blocks_, threads_, ...)                                         \
    extern "C" const char* plant_##kernel(bool faulty) {                              \
        return planted::run({.blocks = blocks_, .threads = threads_, __VA_ARGS__},    \
                            faulty ? planted::kernel<true> : planted::kernel<false>); \
    }

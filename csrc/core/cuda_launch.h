// Launching a kernel on CUDA: the shape of a launch, what a device allows, and the call itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusedstep {

// What launch choices depend on; filled in once per device by torch_glue/cuda.cpp.
struct DeviceLimits {
    int multiprocessors;
    int compute_capability;  // 10 * major + minor
};

inline constexpr int kWarp = 32;

// Kernels are compiled with __launch_bounds__(kMaxThreads, kMinBlocks): the compiler then uses at
// most 64 registers a thread, so that this many threads fit on every multiprocessor from compute
// capability 8.0 on, whatever the size of their blocks.
inline constexpr int kMaxThreads = 512;
inline constexpr int kMinBlocks = 2;
inline constexpr int kResidentThreads = kMaxThreads * kMinBlocks;

struct LaunchShape {
    unsigned blocks;
    unsigned threads;           // of a block
    unsigned cluster = 1;       // blocks that share their shared memory; compute capability 9.0
    bool cooperative = false;   // all blocks are resident at once, so that a grid may wait for itself
};

// Enqueues kernel(args...). What comes back is the launch's own error, not a later one's.
template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.blocks);
    config.blockDim = dim3(shape.threads);
    config.stream = stream;
    config.attrs = attributes;
    if (shape.cooperative) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    }
    if (shape.cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = shape.cluster;
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fusedstep

// Launching a kernel on CUDA: the shape of a launch, what a device allows, and the call itself.
#pragma once

#include <cuda_runtime.h>

namespace fusedstep {

// What launch choices depend on; filled in once per device by torch_glue/cuda.cpp.
struct DeviceLimits {
    int multiprocessors;
    int compute_capability;         // 10 * major + minor
    int shared_per_block;           // bytes that a block may ask for
    int shared_per_multiprocessor;  // bytes; each resident block takes kReservedShared more
};

inline constexpr int kReservedShared = 1024;

inline constexpr int kWarp = 32;
// Of the widest access to memory.
inline constexpr int kVectorBytes = 16;

// Of the devices that the kernels are written for. (setup.py names it too.)
inline constexpr int kLeastComputeCapability = 75;

// Kernels are compiled with __launch_bounds__(kMaxThreads, kMinBlocks): the compiler then uses at
// most 64 registers a thread, so that this many threads fit on every multiprocessor of such a
// device, whatever the size of their blocks.
inline constexpr int kMaxThreads = 512;
inline constexpr int kMinBlocks = 2;
inline constexpr int kResidentThreads = kMaxThreads * kMinBlocks;

struct LaunchShape {
    unsigned blocks;
    unsigned threads;           // of a block
    unsigned shared_bytes = 0;  // dynamic shared memory of a block
    unsigned cluster = 1;       // blocks that share their shared memory; compute capability 9.0
    bool cooperative = false;   // all blocks are resident at once: a grid may wait for itself
};

// A launch as the runtime wants it described; refers to itself.
struct LaunchConfig {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};

    LaunchConfig(const LaunchShape& shape, cudaStream_t stream) {
        config.gridDim = dim3(shape.blocks);
        config.blockDim = dim3(shape.threads);
        config.dynamicSmemBytes = shape.shared_bytes;
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
    }
    LaunchConfig(const LaunchConfig&) = delete;
};

// Enqueues kernel(args...). What comes back is the launch's own error, not a later one's.
template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
    LaunchConfig const launch(shape, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, arguments...);
}

// To be called before a launch that wants this much dynamic shared memory; `static_bytes` is what
// the kernel declares itself, at most. The limit is one for all threads of this process, which may
// be about to launch the same kernel with more: it is always set to all that the device has.
template <class... Parameters>
cudaError_t allow_shared(const LaunchShape& shape, unsigned static_bytes,
                         const DeviceLimits& limits, void (*kernel)(Parameters...)) {
    constexpr unsigned kWithoutAsking = 48 * 1024;
    if (shape.shared_bytes + static_bytes <= kWithoutAsking) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                limits.shared_per_block - static_cast<int>(static_bytes));
}

// How many clusters of this shape the current device holds at once.
template <class... Parameters>
cudaError_t resident_clusters(const LaunchShape& shape, void (*kernel)(Parameters...),
                              int* clusters) {
    LaunchConfig const launch(shape, nullptr);
    return cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config);
}

}  // namespace fusedstep

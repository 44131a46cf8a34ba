// What the rooms' torch files need of CUDA. Only in builds with FUSEDSTEP_CUDA.
#pragma once

#if defined(FUSEDSTEP_CUDA)

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/cuda_launch.h"

#if !defined(FUSEDSTEP_EMULATED_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fusedstep {

#if defined(FUSEDSTEP_EMULATED_CUDA)

// The emulator's device is this machine's memory: CPU tensors run the CUDA code.
#define FUSEDSTEP_CUDA_KEY CPU
inline constexpr c10::DeviceType kCudaDevice = c10::kCPU;
struct CudaGuard {
    explicit CudaGuard(c10::Device) {}
};
inline cudaStream_t current_stream(c10::Device) { return nullptr; }

#else

#define FUSEDSTEP_CUDA_KEY CUDA
inline constexpr c10::DeviceType kCudaDevice = c10::kCUDA;
using CudaGuard = c10::cuda::CUDAGuard;
inline cudaStream_t current_stream(c10::Device device) {
    return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

#endif

inline bool is_cuda(const at::Tensor& tensor) { return tensor.device().type() == kCudaDevice; }

// One more than the largest number of a device that anything is kept for.
inline constexpr std::size_t kMaxDevices = 64;

// The number of a tensor's device, less than kMaxDevices; raises for a larger one.
std::size_t device_number(c10::Device device);

const DeviceLimits& device_limits(c10::Device device);

// Whether the kernels are written for this CUDA device.
inline bool runs_kernels(c10::Device device) {
    return device_limits(device).compute_capability >= kLeastComputeCapability;
}

// Which capture of a CUDA graph the device's current stream is part of; 0 for none.
std::uint64_t current_capture(c10::Device device);

// Zeroed memory of the host that kernels of every device can write; never freed.
void* new_host_visible(std::size_t bytes);

// Raises, naming the operator, where a launch failed.
void check_launch(cudaError_t error, const char* op);

}  // namespace fusedstep

#endif

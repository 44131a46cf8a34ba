// Where a tensor lies, and what its device can do.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch_glue/cuda.h"
#include "torch_glue/plain.h"

namespace fusedstep::optim {

// In this machine's memory or in CUDA's, where its strides say, and no dispatch key but an ordinary
// tensor's has a say in what is done with it.
inline bool is_ordinary(const at::Tensor& tensor) {
    constexpr c10::DispatchKeySet kOrdinary({
        c10::DispatchKey::CPU,
        c10::DispatchKey::AutogradCPU,
        c10::DispatchKey::AutocastCPU,
#if defined(FUSEDSTEP_CUDA)
        c10::DispatchKey::CUDA,
        c10::DispatchKey::AutogradCUDA,
        c10::DispatchKey::AutocastCUDA,
#endif
        c10::DispatchKey::ADInplaceOrView,
    });
    return kOrdinary.has_all(tensor.key_set());
}

// Ordinary, and to be written outside inference mode: its version can be counted.
inline bool is_writable(const at::Tensor& tensor) {
    return is_ordinary(tensor) && !tensor.is_inference();
}

#if defined(FUSEDSTEP_CUDA)
inline bool runs_on_cuda(c10::Device device) { return device.type() == kCudaDevice; }
inline bool has_kernels(c10::Device device) {
    return !runs_on_cuda(device) || runs_kernels(device);
}
inline bool is_capturing(c10::Device device) {
    if (!runs_on_cuda(device)) return false;
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_launch(cudaStreamIsCapturing(current_stream(device), &capture), "an optimizer's step");
    return capture != cudaStreamCaptureStatusNone;
}
#else
inline bool runs_on_cuda(c10::Device) { return false; }
inline bool has_kernels(c10::Device) { return true; }
inline bool is_capturing(c10::Device) { return false; }
#endif

// The one number of this tensor can stay where it is: a CUDA kernel reads it.
inline bool is_device_number(const at::Tensor& tensor) {
    return runs_on_cuda(tensor.device()) && is_ordinary(tensor) && tensor.numel() == 1 &&
           kernel_dtype(tensor.scalar_type());
}

}  // namespace fusedstep::optim

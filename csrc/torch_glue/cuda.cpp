#include "torch_glue/cuda.h"

#if defined(FUSEDSTEP_CUDA)

#include <c10/util/Exception.h>

#include <array>
#include <cstring>
#include <mutex>

namespace fusedstep {

std::size_t device_number(c10::Device device) {
    // A tensor on CUDA has a device with an index; the emulator's is the one CPU, without.
    TORCH_INTERNAL_ASSERT(device.has_index() || device.is_cpu());
    std::size_t const number = device.has_index() ? static_cast<std::size_t>(device.index()) : 0;
    TORCH_CHECK(number < kMaxDevices, "fusedstep knows ", kMaxDevices, " CUDA devices, not number ",
                number);
    return number;
}

const DeviceLimits& device_limits(c10::Device device) {
    static std::array<DeviceLimits, kMaxDevices> limits;
    static std::array<std::once_flag, kMaxDevices> known;
    std::size_t const number = device_number(device);
    std::call_once(known[number], [&] {
        auto const attribute = [number](cudaDeviceAttr name) {
            int value = 0;
            check_launch(cudaDeviceGetAttribute(&value, name, static_cast<int>(number)),
                         "device query");
            return value;
        };
        limits[number] = {attribute(cudaDevAttrMultiProcessorCount),
                          10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                              attribute(cudaDevAttrComputeCapabilityMinor),
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
    });
    return limits[number];
}

std::uint64_t current_capture(c10::Device device) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    check_launch(cudaStreamGetCaptureInfo(current_stream(device), &status, &id), "stream query");
    return status == cudaStreamCaptureStatusNone ? 0 : id;
}

void* new_host_visible(std::size_t bytes) {
    // Allowed while this thread captures a graph: nothing of it is recorded.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_launch(cudaThreadExchangeStreamCaptureMode(&mode), "allocation");
    void* memory = nullptr;
    cudaError_t const error =
        cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
    check_launch(cudaThreadExchangeStreamCaptureMode(&mode), "allocation");
    check_launch(error, "allocation");
    std::memset(memory, 0, bytes);
    return memory;
}

void check_launch(cudaError_t error, const char* op) {
    if (error == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // reported here, and to nobody else
    TORCH_CHECK(false, "fusedstep: ", op, " failed: ", cudaGetErrorString(error), " (",
                cudaGetErrorName(error), ")");
}

}  // namespace fusedstep

#endif

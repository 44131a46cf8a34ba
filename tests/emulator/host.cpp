// The host's side of CUDA: errors, the device's properties, memory; and what Python asks.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "machine.h"
#include "memory.h"

namespace emulator {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_fault;  // of this thread's launches
unsigned long long capture = 0;       // the graph that every stream is captured into; 0: none

cudaError_t remember(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

}  // namespace

int compute_capability() {
    static int const capability = [] {
        const char* const text = std::getenv("EMULATOR_COMPUTE_CAPABILITY");
        int major = 9, minor = 0;
        if (text != nullptr) std::sscanf(text, "%d.%d", &major, &minor);
        return 10 * major + minor;
    }();
    return capability;
}

namespace {

// One line for each function, the innermost first: "name at file:line".
std::vector<std::string> functions_at(const void* code) {
    std::vector<std::string> lines;
    Dl_info info{};
    if (dladdr(code, &info) == 0) return lines;
    char command[1024];
    std::snprintf(command, sizeof(command), "addr2line -Cfpie '%s' %#tx", info.dli_fname,
                  static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase));
    FILE* const output = popen(command, "r");
    if (output == nullptr) return lines;
    char buffer[4096];
    std::string text;
    while (std::size_t const bytes = std::fread(buffer, 1, sizeof(buffer), output)) {
        text.append(buffer, bytes);
    }
    pclose(output);
    constexpr std::string_view kInlined = " (inlined by) ";
    for (std::size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
        if (text.compare(begin, kInlined.size(), kInlined) == 0) begin += kInlined.size();
        lines.push_back(text.substr(begin, end - begin));
    }
    return lines;
}

}  // namespace

std::string describe_code(const void* code) {
    constexpr std::size_t kMostLines = 4;
    std::vector<std::string> lines = functions_at(code);
    if (lines.empty()) return "unknown code";
    lines.resize(std::min(lines.size(), kMostLines));
    std::string text;
    for (const std::string& line : lines) text += (text.empty() ? "" : ", inlined into ") + line;
    return text;
}

std::string outermost_function(const void* code) {
    std::vector<std::string> const lines = functions_at(code);
    return lines.empty() ? "unknown code" : lines.back().substr(0, lines.back().rfind(" at "));
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Call& call) {
    return remember(launch_kernel(config, call, last_fault));
}

}  // namespace emulator

using emulator::device_memory;
using emulator::last_error;
using emulator::remember;

const char* cudaGetErrorName(cudaError_t error) {
#define EMULATOR_NAME(name) \
    case name:              \
        return #name
    switch (error) {
        EMULATOR_NAME(cudaSuccess);
        EMULATOR_NAME(cudaErrorInvalidValue);
        EMULATOR_NAME(cudaErrorMemoryAllocation);
        EMULATOR_NAME(cudaErrorInvalidConfiguration);
        EMULATOR_NAME(cudaErrorInvalidDevice);
        EMULATOR_NAME(cudaErrorIllegalAddress);
        EMULATOR_NAME(cudaErrorMisalignedAddress);
        EMULATOR_NAME(cudaErrorLaunchFailure);
        EMULATOR_NAME(cudaErrorCooperativeLaunchTooLarge);
        EMULATOR_NAME(cudaErrorNotSupported);
        EMULATOR_NAME(cudaErrorInvalidClusterSize);
    }
#undef EMULATOR_NAME
    return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
    bool const is_fault = error == cudaErrorIllegalAddress || error == cudaErrorMisalignedAddress ||
                          error == cudaErrorLaunchFailure;
    return is_fault ? emulator::last_fault.c_str() : cudaGetErrorName(error);
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return remember(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = emulator::kMultiprocessors;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = emulator::compute_capability() / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = emulator::compute_capability() % 10;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = emulator::kResidentShared;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = emulator::kMaxShared;
            return cudaSuccess;
    }
    return remember(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long* id) {
    *status = emulator::capture == 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
    *id = emulator::capture;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    unsigned long long id;
    return cudaStreamGetCaptureInfo(stream, status, &id);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    *memory = emulator::allocate(bytes);
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    emulator::release(memory);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
    return cudaMalloc(memory, bytes);
}
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
    *device = host;
    return cudaSuccess;
}

namespace {

bool is_device(const void* memory, std::size_t bytes) {
    return device_memory.holds(reinterpret_cast<std::uintptr_t>(memory), bytes);
}

}  // namespace

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
    if (!is_device(memory, bytes)) return remember(cudaErrorInvalidValue);
    std::memset(memory, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
    bool const to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool const from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if ((to_device && !is_device(to, bytes)) || (from_device && !is_device(from, bytes))) {
        return remember(cudaErrorInvalidValue);
    }
    std::memmove(to, from, bytes);
    return cudaSuccess;
}

// ------------------------------------------------------------------ what Python asks

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// Draws other orders of threads and blocks from here on.
EMULATOR_EXPORT void emulator_seed(std::uint64_t seed) {
    emulator::machine.random.state = seed * 2 + 1;
}

// Every stream says from here on that it is captured into graph `id`, until 0 ends the capture.
// What is launched runs at once: there is nothing to replay.
EMULATOR_EXPORT void emulator_capture(std::uint64_t id) { emulator::capture = id; }

EMULATOR_EXPORT std::size_t emulator_launch_count() { return emulator::machine.launched.size(); }

// The name of the kernel of a launch; valid until the next call.
EMULATOR_EXPORT const char* emulator_launched_kernel(std::size_t launch) {
    static std::map<const void*, std::string> names;
    const void* const kernel = emulator::machine.launched.at(launch);
    std::string& name = names[kernel];
    if (name.empty()) name = emulator::outermost_function(kernel);
    return name.c_str();
}

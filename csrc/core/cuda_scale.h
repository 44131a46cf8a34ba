// Multiplies a gradient by the derivative of what was computed from the loss.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/dtype.h"

namespace fusedstep {

struct ScaleArgs {
    void* grad;  // adjacent elements, changed in place
    std::int64_t numel;
    DType dtype;              // float32 or float64: 16 bits are computed anew, to be rounded once
    const void* grad_output;  // one value
    DType grad_output_dtype;
};

// One launch, which does nothing where grad_output is 1.
cudaError_t scale(const ScaleArgs& args, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fusedstep

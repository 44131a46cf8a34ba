#include "cross_entropy/cuda_entry.h"
#include "cross_entropy/cuda_plan.h"

namespace fusedstep::cross_entropy {
namespace {

const CudaKernels& kernels(DType dtype) {
    switch (dtype) {
        case DType::float64:
            return cuda_float64;
        case DType::bfloat16:
            return cuda_bfloat16;
        case DType::float16:
            return cuda_float16;
        case DType::float32:
            break;
    }
    return cuda_float32;
}

}  // namespace

std::int64_t max_blocks(const Args& args, const DeviceLimits& limits) {
    return forward_plan(args, limits).shape.blocks;
}

cudaError_t forward(const ForwardArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
    const CudaKernels& of = kernels(a.args.dtype);
    bool const dense = a.args.target_kind != TargetKind::index;
    return (dense ? of.forward_dense : of.forward)(a, limits, stream);
}

cudaError_t backward(const BackwardArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
    const CudaKernels& of = kernels(a.args.dtype);
    bool const dense = a.args.target_kind != TargetKind::index;
    return (dense ? of.backward_dense : of.backward)(a, limits, stream);
}

}  // namespace fusedstep::cross_entropy

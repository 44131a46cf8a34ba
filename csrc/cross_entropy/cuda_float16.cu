#include "cross_entropy/cuda_rows.cuh"

namespace fusedstep::cross_entropy {
extern const CudaKernels cuda_float16 = cuda_kernels_of<float16>();
}

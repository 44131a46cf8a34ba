#include "pointwise_loss/pointwise_loss.h"

namespace fusedstep::pointwise_loss {

const CpuKernels& cpu_kernels() { return FUSEDSTEP_SELECT_LEVEL; }

}  // namespace fusedstep::pointwise_loss

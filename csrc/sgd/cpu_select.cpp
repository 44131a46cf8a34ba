#include "sgd/sgd.h"

namespace fusedstep::sgd {

const CpuKernels& cpu_kernels() { return FUSEDSTEP_SELECT_LEVEL; }

}  // namespace fusedstep::sgd

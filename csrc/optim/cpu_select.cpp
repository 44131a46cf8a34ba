#include "optim/rules.h"

namespace fusedstep::optim {

const CpuKernels& cpu_kernels() { return FUSEDSTEP_SELECT_LEVEL; }

}  // namespace fusedstep::optim

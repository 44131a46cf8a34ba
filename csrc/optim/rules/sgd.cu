#include "optim/cuda.cuh"

template fusedstep::optim::CudaUpdate fusedstep::optim::cuda_update_of<fusedstep::optim::Sgd>();

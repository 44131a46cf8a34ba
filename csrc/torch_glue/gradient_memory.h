// Memory for gradients on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusedstep {

// An uninitialised tensor like `like` (its strides too, where it is dense).
//
// A training step frees its gradient just before the next one asks for as much. The C library often
// returns such memory to the system in between, and faulting it in again can cost as much as the
// loss itself (benchmarks/NOTES.md has the page faults by size), and several times as much in a
// virtual machine that gives free memory back to its host. So the last freed gradient of up to
// 1 GiB is kept for the next; a larger one is returned to the system. New memory is asked for in
// huge pages.
at::Tensor empty_gradient(const at::Tensor& like);

}  // namespace fusedstep

// DTensor: the part of a tensor that lies on this rank.
#pragma once

#include <cstdint>

#include "optim/torch/objects.h"

namespace fusedstep::optim {

bool is_dtensor(PyObject* object);

// The tensor that a kernel reads and writes: a plain tensor itself, what a DTensor holds on this
// rank; none for any other object.
HeldTensor local_tensor(py::handle object);

// Whether an update of a DTensor is the same update of every local tensor: none is a summand.
bool holds_elements(py::handle dtensor);

// Of a DTensor and another object: whether local tensors on one rank hold the same elements.
bool same_placements(py::handle dtensor, py::handle other);

// The number, from 0, of the part of a DTensor that this rank holds; ranks that hold the same part
// have the same number.
std::uint64_t part_number(py::handle dtensor);

}  // namespace fusedstep::optim

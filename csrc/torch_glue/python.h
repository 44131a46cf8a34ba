// Tensors as Python holds them.
#pragma once

#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fusedstep {

// The torch.Tensor or Parameter that a Python object is, borrowed from it; null for any other
// object, a subclass too, which may mean something else by its operations.
inline const at::Tensor* plain_tensor(PyObject* object) {
    return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

}  // namespace fusedstep

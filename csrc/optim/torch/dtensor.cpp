#include "optim/torch/dtensor.h"

#include <vector>

#include <pybind11/stl.h>

namespace fusedstep::optim {
namespace {

// torch.distributed.tensor.DTensor; null before something imports it, when no tensor can be one.
PyObject* dtensor_class() {
    static PyObject* found = nullptr;
    if (found == nullptr) {
        PyObject* const modules = PyImport_GetModuleDict();
        PyObject* const module = PyDict_GetItemString(modules, "torch.distributed.tensor");
        if (module != nullptr) found = PyObject_GetAttrString(module, "DTensor");
        PyErr_Clear();  // being imported
    }
    return found;
}

}  // namespace

bool is_dtensor(PyObject* object) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object)) == dtensor_class();
}

HeldTensor local_tensor(py::handle object) {
    if (THPVariable_CheckExact(object.ptr())) {
        return HeldTensor(py::reinterpret_borrow<py::object>(object));
    }
    if (!is_dtensor(object.ptr())) return {};
    py::object local = object.attr(keys().local_tensor);
    return THPVariable_CheckExact(local.ptr()) ? HeldTensor(std::move(local)) : HeldTensor();
}

bool holds_elements(py::handle dtensor) {
    for (py::handle placement : dtensor.attr(keys().placements)) {
        if (placement.attr(keys().is_partial)().cast<bool>()) return false;
    }
    return true;
}

bool same_placements(py::handle dtensor, py::handle other) {
    auto const same = [&](PyObject* key) { return dtensor.attr(key).equal(other.attr(key)); };
    return is_dtensor(other.ptr()) && same(keys().device_mesh) && same(keys().placements);
}

std::uint64_t part_number(py::handle dtensor) {
    py::object const mesh = dtensor.attr(keys().device_mesh);
    py::object const coordinate = mesh.attr(keys().get_coordinate)();
    if (coordinate.is_none()) return 0;  // outside the mesh: it holds nothing
    auto const coordinates = coordinate.cast<std::vector<std::uint64_t>>();
    auto const sizes = mesh.attr(keys().shape).cast<std::vector<std::uint64_t>>();
    std::uint64_t number = 0;
    std::size_t dim = 0;
    for (py::handle placement : dtensor.attr(keys().placements)) {
        if (!placement.attr(keys().is_replicate)().cast<bool>()) {
            number = number * sizes.at(dim) + coordinates.at(dim);
        }
        ++dim;
    }
    return number;
}

}  // namespace fusedstep::optim

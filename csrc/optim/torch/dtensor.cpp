#include "optim/torch/dtensor.h"

#include <vector>

#include <pybind11/stl.h>

namespace fusedstep::optim {
namespace {

struct DTensorKeys {
    PyObject* local_tensor = PyUnicode_InternFromString("_local_tensor");
    PyObject* device_mesh = PyUnicode_InternFromString("device_mesh");
    PyObject* placements = PyUnicode_InternFromString("placements");
    PyObject* is_partial = PyUnicode_InternFromString("is_partial");
    PyObject* is_replicate = PyUnicode_InternFromString("is_replicate");
    PyObject* get_coordinate = PyUnicode_InternFromString("get_coordinate");
    PyObject* shape = PyUnicode_InternFromString("shape");
};

const DTensorKeys& dtensor_keys() {
    static const DTensorKeys* const interned = new DTensorKeys;
    return *interned;
}

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
    py::object local = object.attr(dtensor_keys().local_tensor);
    return THPVariable_CheckExact(local.ptr()) ? HeldTensor(std::move(local)) : HeldTensor();
}

bool holds_elements(py::handle dtensor) {
    for (py::handle placement : dtensor.attr(dtensor_keys().placements)) {
        if (placement.attr(dtensor_keys().is_partial)().cast<bool>()) return false;
    }
    return true;
}

bool same_placements(py::handle dtensor, py::handle other) {
    auto const same = [&](PyObject* key) { return dtensor.attr(key).equal(other.attr(key)); };
    return is_dtensor(other.ptr()) && same(dtensor_keys().device_mesh) &&
           same(dtensor_keys().placements);
}

std::uint64_t part_number(py::handle dtensor) {
    py::object const mesh = dtensor.attr(dtensor_keys().device_mesh);
    py::object const coordinate = mesh.attr(dtensor_keys().get_coordinate)();
    if (coordinate.is_none()) return 0;  // outside the mesh: it holds nothing
    auto const coordinates = coordinate.cast<std::vector<std::uint64_t>>();
    auto const sizes = mesh.attr(dtensor_keys().shape).cast<std::vector<std::uint64_t>>();
    std::uint64_t number = 0;
    std::size_t dim = 0;
    for (py::handle placement : dtensor.attr(dtensor_keys().placements)) {
        if (!placement.attr(dtensor_keys().is_replicate)().cast<bool>()) {
            number = number * sizes.at(dim) + coordinates.at(dim);
        }
        ++dim;
    }
    return number;
}

}  // namespace fusedstep::optim

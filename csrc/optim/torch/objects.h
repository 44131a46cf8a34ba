// An optimizer's objects as Python holds them: parameter groups, states, tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

namespace fusedstep::optim {

namespace py = pybind11;

// The strings that every optimizer's objects share; they live forever.
struct Keys {
    PyObject* param_groups = PyUnicode_InternFromString("param_groups");
    PyObject* state = PyUnicode_InternFromString("state");
    PyObject* params = PyUnicode_InternFromString("params");
    PyObject* lr = PyUnicode_InternFromString("lr");
    PyObject* master_param = PyUnicode_InternFromString("master_param");
    PyObject* step = PyUnicode_InternFromString("step");
    PyObject* grad = PyUnicode_InternFromString("grad");
    // Of DTensors.
    PyObject* local_tensor = PyUnicode_InternFromString("_local_tensor");
    PyObject* device_mesh = PyUnicode_InternFromString("device_mesh");
    PyObject* placements = PyUnicode_InternFromString("placements");
    PyObject* is_partial = PyUnicode_InternFromString("is_partial");
    PyObject* is_replicate = PyUnicode_InternFromString("is_replicate");
    PyObject* get_coordinate = PyUnicode_InternFromString("get_coordinate");
    PyObject* shape = PyUnicode_InternFromString("shape");
};

inline const Keys& keys() {
    static const Keys* const interned = new Keys;
    return *interned;
}

// A borrowed reference; null where the dictionary lacks the key.
inline PyObject* find(PyObject* dict, PyObject* key) {
    PyObject* const value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// A borrowed reference; KeyError where the dictionary lacks the key.
inline PyObject* get(PyObject* dict, PyObject* key) {
    PyObject* const value = find(dict, key);
    if (value == nullptr) {
        PyErr_SetObject(PyExc_KeyError, key);
        throw py::error_already_set();
    }
    return value;
}

inline bool get_flag(PyObject* dict, PyObject* key) {
    int const truth = PyObject_IsTrue(get(dict, key));
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
}

// A number, or a tensor of one element, which is read here.
inline double as_number(PyObject* value) {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    double const number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

inline py::list param_groups_of(py::handle optimizer) {
    py::object groups = optimizer.attr(keys().param_groups);
    if (!PyList_Check(groups.ptr())) {
        throw py::type_error("an optimizer's param_groups are no list");
    }
    return py::reinterpret_steal<py::list>(groups.release());
}

inline py::dict states_of(py::handle optimizer) {
    py::object state = optimizer.attr(keys().state);
    if (!PyDict_Check(state.ptr())) throw py::type_error("an optimizer's state is no dict");
    return py::reinterpret_steal<py::dict>(state.release());
}

// As PySequence_Fast_GET_ITEM and its like read it.
inline py::object params_of(PyObject* group) {
    if (!PyDict_Check(group)) throw py::type_error("a parameter group is no dict");
    auto params = py::reinterpret_steal<py::object>(
        PySequence_Fast(get(group, keys().params), "the params of a parameter group are no list"));
    if (!params) throw py::error_already_set();
    return params;
}

// Calls f with every parameter of a group. f may run Python code.
template <class F>
void for_each_param(PyObject* group, F f) {
    py::object const params = params_of(group);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i) {
        f(py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(params.ptr(), i)));
    }
}

inline bool has_grad(const py::object& param) {
    if (THPVariable_CheckExact(param.ptr())) {
        return THPVariable_Unpack(param.ptr()).unsafeGetTensorImpl()->grad().defined();
    }
    return !param.attr(keys().grad).is_none();
}

inline void drop_grad(const py::object& param) {
    if (THPVariable_CheckExact(param.ptr())) {
        THPVariable_Unpack(param.ptr()).mutable_grad().reset();
    } else {
        py::setattr(param, keys().grad, py::none());
    }
}

// A tensor held by its Python object: one more reference from C++ would ask for the interpreter,
// which takes as long as the rest of what is done for a small parameter.
class HeldTensor {
public:
    HeldTensor() = default;
    // Of an object that is a plain tensor.
    explicit HeldTensor(py::object object) : object_(std::move(object)) {}

    explicit operator bool() const { return static_cast<bool>(object_); }
    const at::Tensor& operator*() const { return THPVariable_Unpack(object_.ptr()); }
    const at::Tensor* operator->() const { return &**this; }

private:
    py::object object_;
};

}  // namespace fusedstep::optim

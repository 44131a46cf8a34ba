// What GradScaler leaves on an optimizer.
#pragma once

#include "optim/torch/devices.h"
#include "optim/torch/objects.h"
#include "torch_glue/python.h"

namespace fusedstep::optim {

// A number that GradScaler sets on an optimizer: known here, or left on a CUDA device for kernels
// to read.
class ScalerNumber {
public:
    // Anything but a CUDA tensor is read now; None is `otherwise`.
    ScalerNumber(py::handle object, double otherwise) : object_(object) {
        if (object.is_none()) {
            value_ = otherwise;
            return;
        }
        const at::Tensor* const tensor = plain_tensor(object.ptr());
        if (tensor && is_device_number(*tensor) && tensor->scalar_type() == at::kFloat) {
            on_device_ = *tensor;
        } else {
            value_ = as_number(object.ptr());
        }
    }

    bool is_known() const { return !on_device_.defined(); }

    // Waits for the device, where it lies there.
    void read() {
        if (is_known()) return;
        value_ = as_number(object_.ptr());
        on_device_.reset();
    }

    // Where it is known.
    double value() const { return value_; }

    // In the memory of `device`; undefined where it is known here.
    at::Tensor on(c10::Device device) const {
        return is_known() || on_device_.device() == device
                   ? on_device_
                   : on_device_.to(at::TensorOptions(device), /*non_blocking=*/true);
    }

private:
    py::handle object_;
    double value_ = 0;
    at::Tensor on_device_;
};

}  // namespace fusedstep::optim

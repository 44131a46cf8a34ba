// torch::autograd::Node is held by a std::shared_ptr in older torch releases and by a
// c10::intrusive_ptr in newer ones; this makes one either way.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>

namespace fusedstep {

using NodePtr = decltype(torch::autograd::Edge::function);

template <class T>
auto make_node() {
    if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
        return std::make_shared<T>();
    } else {
        return c10::make_intrusive<T>();
    }
}

}  // namespace fusedstep

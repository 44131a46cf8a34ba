// A node of autograd's graph that compiled autograd can trace: it lifts what a node has saved into
// the arguments of a graph, and calls the node's backward as a function of them.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "torch_glue/node.h"

namespace fusedstep {

// Derived offers two things:
//   visit(f)                        calls f with every saved tensor and every option, in one order
//   gradients(grad_outputs, wanted) of those of its inputs that are wanted
// and reads `symbolic`: whether nothing may look at a tensor's values.
template <class Derived, std::size_t kInputs>
struct TraceableNode : torch::autograd::Node {
    using Wanted = std::array<bool, kInputs>;

    bool symbolic = false;

    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
        for (bool wanted : wanted_gradients()) args.collect(wanted);
        // Compiled autograd knows saved tensors by their address, and does not change them here.
        const_cast<TraceableNode*>(this)->derived().visit([&args](auto& value) {
            if constexpr (is_saved_variable<decltype(value)>) {
                args.collect(value, /*is_output=*/false);
            } else {
                args.collect(value);
            }
        });
    }

    torch::autograd::variable_list apply_with_saved(
        const torch::autograd::variable_list& grad_outputs,
        torch::dynamo::autograd::SwapSavedVariables& saved) override {
        using namespace torch::dynamo::autograd;
        derived().visit([&saved](auto& value) { saved.before(value); });
        PackedArgs packed;
        packed.pack(wanted_gradients());
        derived().visit([&packed](auto& value) {
            if constexpr (is_saved_variable<decltype(value)>) {
                packed.pack(value.unpack());
            } else {
                packed.pack(value);
            }
        });
        std::vector<at::IValue> const args = std::move(packed).vec();
        std::vector<at::TypePtr> types;
        for (const at::IValue& arg : args) {
            types.push_back(arg.isTensor() ? at::TensorType::get() : arg.type());
        }
        const auto& compiler = getPyCompilerInterface();
        std::string const function =
            compiler->bind_function(saved.get_py_compiler(), name(), traced, types,
                                    /*is_custom_function=*/true, /*is_traceable=*/true);
        auto results = compiler->call_function(
            saved.get_py_compiler(), "apply_functional", function, grad_outputs, args,
            IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
                get_input_metadata(next_edges())));
        derived().visit([&saved](auto& value) { saved.after(value); });
        return results;
    }

protected:
    Wanted wanted_gradients() const {
        Wanted wanted;
        for (std::size_t i = 0; i < kInputs; ++i) wanted[i] = task_should_compute_output(i);
        return wanted;
    }

private:
    template <class T>
    static constexpr bool is_saved_variable =
        std::is_same_v<std::remove_cvref_t<T>, torch::autograd::SavedVariable>;

    Derived& derived() { return static_cast<Derived&>(*this); }

    // What a graph calls: the backward of a node that has saved these arguments.
    static torch::autograd::variable_list traced(const torch::autograd::variable_list& grad_outputs,
                                                 const std::vector<at::IValue>& args) {
        torch::dynamo::autograd::PackedArgs packed(args);
        auto const wanted = packed.unpack<Wanted>();
        auto const node = make_node<Derived>();
        bool const before = at::SavedTensorDefaultHooks::set_tracing(true);  // no hooks here
        node->visit([&packed](auto& value) {
            using T = std::remove_reference_t<decltype(value)>;
            if constexpr (is_saved_variable<T>) {
                value = T(packed.unpack<at::Tensor>(), /*is_output=*/false);
            } else {
                value = packed.unpack<T>();
            }
        });
        at::SavedTensorDefaultHooks::set_tracing(before);
        node->symbolic = true;
        bool arrived = false;
        for (const at::Tensor& grad_output : grad_outputs) arrived |= grad_output.defined();
        if (!arrived) return torch::autograd::variable_list(kInputs);
        at::NoGradGuard const no_grad;
        return node->gradients(grad_outputs, wanted);
    }
};

}  // namespace fusedstep

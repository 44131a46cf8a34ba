// What profilers see of a loss: an event, and its link to the backward pass.
#pragma once

#include <ATen/SequenceNumber.h>
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace fusedstep {

// The event fusedstep::<op>, from construction to destruction, for the profiler and the other
// observers of torch's operators; where nobody observes, one look at that. Torch's dispatcher gives
// an operator's event the number of autograd's next node, by which profilers link it to this node's
// backward pass. Ours are called below autograd, so that the dispatcher does not: `with_node` says
// that the next node of this thread will be that of this loss.
class LossEvent {
public:
    template <class... Inputs>
    LossEvent(const char* op, bool with_node, const Inputs&... inputs) {
        auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
        if (!callbacks) [[likely]]
            return;
        event_.emplace(std::move(*callbacks));
        auto const node =
            with_node ? static_cast<std::int64_t>(at::sequence_number::peek()) : std::int64_t{-1};
        std::string const name = std::string("fusedstep::") + op;
        if (event_->needsInputs()) {  // read before this returns
            std::array<c10::IValue, sizeof...(inputs)> const values{c10::IValue(inputs)...};
            event_->before(name, c10::ArrayRef<const c10::IValue>(values.data(), values.size()),
                           node);
        } else {
            event_->before(name, node);
        }
    }

private:
    std::optional<at::RecordFunction> event_;
};

}  // namespace fusedstep

// What every room asks of a tensor before a kernel may touch its memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>

#include "core/dtype.h"

namespace fusedstep {

inline std::optional<DType> kernel_dtype(at::ScalarType type) {
    switch (type) {
        case at::kFloat:
            return DType::float32;
        case at::kDouble:
            return DType::float64;
        case at::kBFloat16:
            return DType::bfloat16;
        case at::kHalf:
            return DType::float16;
        default:
            return std::nullopt;
    }
}

// The type that values of this type are computed in.
inline at::ScalarType accumulate_type(at::ScalarType type) {
    return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Stored in 16 bits.
inline bool is_narrow(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

// Carries its meaning outside its memory: vmap and functorch wrappers, pending conjugation or
// negation, efficient zero tensors.
inline bool is_wrapped(const at::Tensor& tensor) {
    constexpr c10::DispatchKeySet kWrappers({
        c10::DispatchKey::Batched,
        c10::DispatchKey::FuncTorchBatched,
        c10::DispatchKey::FuncTorchGradWrapper,
        c10::DispatchKey::BatchedNestedTensor,
        c10::DispatchKey::Conjugate,
        c10::DispatchKey::Negative,
        c10::DispatchKey::ZeroTensor,
    });
    return tensor.key_set().has_any(kWrappers);
}

// A tensor whose values only exist later, or in Python: fake, functional, proxy, meta.
inline bool is_symbolic(const at::Tensor& tensor) {
    return tensor.key_set().has_any(
               c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize})) ||
           tensor.is_meta();
}

// Whether a torch.func transform is running on this thread.
inline bool in_functorch() {
    return c10::impl::tls_is_dispatch_key_included(
        c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether torch.jit.trace is recording operators on this thread: what a kernel computes without one
// it would take for a constant.
inline bool in_jit_trace() {
    return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

// Whether every operator call is being recorded or replaced (fake tensors, proxies, export).
inline bool in_dispatch_mode() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

inline bool is_plain_strided(const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && !is_wrapped(tensor);
}

}  // namespace fusedstep

#pragma once

#include <cstdint>

namespace fusedstep {

// What becomes of the losses of elements or rows; in torch's numbers.
enum class Reduction : int { none = 0, mean = 1, sum = 2 };

constexpr bool is_reduction(std::int64_t code) { return code >= 0 && code <= 2; }

}  // namespace fusedstep

// The table of optimizers: each row is the rule of one, in rules/<name>.h.
#pragma once

#include <iterator>

#include "optim/optim.h"
#include "optim/rules/sgd.h"

#define FUSEDSTEP_RULES(X) X(Sgd)

namespace fusedstep::optim {

// Number of the states of a rule R.
template <class R>
inline constexpr int kStates = static_cast<int>(std::size(R::states));

// A rule as those see it who do not compute with it.
struct Rule {
    const char* name;
    std::span<const Number> numbers;
    std::span<const Flag> flags;
    std::span<const State> states;
    std::size_t group_bytes;  // of its Hyperparameters, which begin with the LearningRate
    unsigned (*states_of)(const void* group);
    bool (*first_step_differs)(const void* group);
};

template <class R>
constexpr Rule rule_of() {
    using Group = typename R::Hyperparameters;
    static_assert(offsetof(Group, lr) == 0 && sizeof(Group) <= kMaxGroupBytes &&
                  sizeof(Group) % sizeof(std::uint64_t) == 0 &&
                  kStates<R> <= static_cast<int>(kMaxStates));
    return {
        R::name,
        R::numbers,
        R::flags,
        R::states,
        sizeof(Group),
        [](const void* group) { return R::states_of(*static_cast<const Group*>(group)); },
        [](const void* group) { return R::first_step_differs(*static_cast<const Group*>(group)); }};
}

#define FUSEDSTEP_RULE_OF(R) rule_of<R>(),
inline constexpr Rule kRules[] = {FUSEDSTEP_RULES(FUSEDSTEP_RULE_OF)};
#undef FUSEDSTEP_RULE_OF
inline constexpr std::size_t kRuleCount = std::size(kRules);

// The kernels of each rule, in the order of kRules.
struct CpuKernels {
    CpuUpdate update[kRuleCount];
};
FUSEDSTEP_DECLARE_LEVELS(CpuKernels)

const CpuKernels& cpu_kernels();

}  // namespace fusedstep::optim

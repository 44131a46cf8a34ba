// The kernels of every optimizer on any list of tensors, against the rule itself: its update() is
// called once more, with numbers that know how far rounding may have taken them.
#include <array>

#include "optim_case.h"

namespace native {
namespace {

// A number that the kernels compute in type A, and the bound on its rounding errors so far (running
// error analysis; Higham, "Accuracy and stability of numerical algorithms", 2002, section 3.3).
template <class A>
struct Bounded {
    Real value = 0;
    Real error = 0;
    bool open =
        false;  // it overflowed on the way, or may have been of either sign where that counts

    Bounded() = default;
    Bounded(A exact) : value(exact) {}
    Bounded(Real value_, Real error_, bool open_) : value(value_), error(error_), open(open_) {}

    static Precision kernel() {
        return precision(sizeof(A) == 8 ? DType::float64 : DType::float32);
    }
    // Of an operation, rounded: a few units in the last place, for kernels and rule contract
    // multiplications and additions as they like, and all of a subnormal number.
    static Bounded rounded(Real value, Real error, bool open) {
        Precision const c = kernel();
        if (!std::isfinite(value)) return {value, 0, open};
        if (std::isnan(error)) open = true;
        error += 4 * c.epsilon * std::fabs(value) + c.smallest_normal;
        return {value, error, open || !(std::fabs(value) + error < c.largest / 8)};
    }
    bool may_be_zero() const { return std::fabs(value) <= error; }

    friend Bounded operator+(Bounded a, Bounded b) {
        return rounded(a.value + b.value, a.error + b.error, a.open || b.open);
    }
    friend Bounded operator-(Bounded a) { return {-a.value, a.error, a.open}; }
    friend Bounded operator-(Bounded a, Bounded b) { return a + -b; }
    friend Bounded operator*(Bounded a, Bounded b) {
        // Infinity times what may be zero may be NaN; times what may be of either sign, either.
        bool const unclear = (std::isinf(a.value) && b.error > 0 && b.may_be_zero()) ||
                             (std::isinf(b.value) && a.error > 0 && a.may_be_zero());
        Real const product = a.value * b.value;
        Real const error =
            std::isfinite(product)
                ? std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error
                : 0;
        return rounded(product, error, a.open || b.open || unclear);
    }
    friend Bounded operator/(Bounded a, Bounded b) {
        Real const quotient = a.value / b.value;
        bool const unclear = b.error > 0 && b.may_be_zero();
        Real const error =
            std::isfinite(quotient) && std::isfinite(b.value) && !unclear
                ? (a.error + std::fabs(quotient) * b.error) / (std::fabs(b.value) - b.error)
                : 0;
        return rounded(quotient, error, a.open || b.open || unclear);
    }
};

template <class A>
struct BoundedOperations {
    using V = Bounded<A>;

    V mul_add(V a, V b, V c) const { return a * b + c; }
};

template <class Rule>
class RuleCase : public OptimCase<Rule> {
    using Base = OptimCase<Rule>;
    using Hyperparameters = typename Base::Hyperparameters;

public:
    explicit RuleCase(Choices& choices) : Base(choices, [&choices] { return draw(choices); }) {}

private:
    static Hyperparameters draw(Choices& choices) {
        Hyperparameters h{};
        auto* const bytes = reinterpret_cast<char*>(&h);
        h.lr.value = choices.one_of({0.1, 1e-3, 0.0, 3.0, 1e30, 1e-40});
        for (const auto& number : Rule::numbers) {
            *reinterpret_cast<double*>(bytes + number.offset) =
                choices.one_of({0.9, 0.0, 0.5, 0.999, 1e-3, 1e-8, 1.0, -0.5, 3.0, 1e-30});
        }
        for (const auto& flag : Rule::flags) {
            *reinterpret_cast<bool*>(bytes + flag.offset) = choices.one_in(2);
        }
        return h;
    }

    void check_element(std::size_t entry, std::int64_t i) const override {
        this->entries[entry].dtype == DType::float64 ? check_in<double>(entry, i)
                                                     : check_in<float>(entry, i);
    }

    template <class A>
    void check_in(std::size_t entry, std::int64_t i) const {
        using V = Bounded<A>;
        const Hyperparameters& h = this->group_of(entry);
        const auto& t = this->tensors[entry];
        auto const at = static_cast<std::size_t>(i);
        Real const gradient = this->checked_gradient(entry, i);
        bool const is_exact = this->step.grad_scale == 1 || !t.master;
        V const grad = is_exact ? V{gradient, 0, false} : V::rounded(gradient, 0, false);
        auto const c = Rule::template coefficients<A>(h, h.lr.value, [](A x) { return V(x); });
        auto const variant = Rule::variant_of(h, this->entries[entry].first_step);
        std::array<V, kStates<Rule>> states;
        for (int state = 0; state < kStates<Rule>; ++state) {
            bool const is_read = Rule::reads(variant) >> state & 1;
            Real const value = is_read ? t.s[state][at] : std::numeric_limits<Real>::quiet_NaN();
            states[static_cast<std::size_t>(state)] = V{value, 0, false};
        }
        V param;
        Rule::with_variant(variant, [&](auto known) {
            param = Rule::template update<known()>(V{t.p[at], 0, false}, grad, states.data(), c,
                                                   BoundedOperations<A>{});
        });
        for (int state = 0; state < kStates<Rule>; ++state) {
            const V& v = states[static_cast<std::size_t>(state)];
            if (Rule::writes(variant) >> state & 1) {
                if (!v.open) this->check_state(entry, i, state, expected(v));
            } else if (t.states[state] && (*t.states[state])[i] != t.s[state][at] &&
                       !std::isnan(t.s[state][at])) {
                this->wrong("state that is not written", entry, i, (*t.states[state])[i],
                            {t.s[state][at], 0});
            }
        }
        if (!param.open) this->check_param(entry, i, expected(param));
    }

    template <class A>
    static Expected expected(const Bounded<A>& v) {
        return {v.value, v.error / (kRoundings * Bounded<A>::kernel().epsilon)};
    }
};

template <class Rule>
void try_rule(Choices& choices, std::size_t rule) {
    RuleCase<Rule> one(choices);
    for (const auto& level : NATIVE_LEVELS(optim)) {
        one.check(level.name, level.kernels.update[rule]);
    }
}

// Of each rule, in the order of kRules.
#define NATIVE_TRY(Rule) try_rule<fusedstep::optim::Rule>,
constexpr void (*kTries[])(Choices&, std::size_t) = {FUSEDSTEP_RULES(NATIVE_TRY)};

}  // namespace
}  // namespace native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    native::Choices choices(data, size);
    auto const rule = static_cast<std::size_t>(
        choices.between(0, static_cast<std::int64_t>(fusedstep::optim::kRuleCount) - 1));
    native::kTries[rule](choices, rule);
    return 0;
}

// The kernels of SGD on any list of tensors, against the formula of optim/rules/sgd.h.
#include "optim_case.h"

namespace native {
namespace {

using fusedstep::optim::Sgd;

class SgdCase : public OptimCase<Sgd> {
public:
    explicit SgdCase(Choices& choices)
        : OptimCase(choices, [&choices] {
              Hyperparameters h{};
              h.lr.value = choices.one_of({0.1, 1e-3, 0.0, 3.0, 1e30, 1e-40});
              h.momentum = choices.one_of({0.9, 0.0, 1.0, 1e-30, 5.0});
              h.dampening = choices.one_of({0.0, 0.1, 1.0, -1.0});
              h.weight_decay = choices.one_of({0.0, 1e-4, 0.5, 1e-42, 1e30});
              h.nesterov = choices.one_in(2);
              h.maximize = choices.one_in(2);
              return h;
          }) {}

private:
    void check_element(std::size_t entry, std::int64_t i) const override;
};

void SgdCase::check_element(std::size_t entry, std::int64_t i) const {
    const Hyperparameters& h = group_of(entry);
    const Tensors<Sgd>& t = tensors[entry];
    DType const computed = accumulate(entries[entry].dtype);
    auto const at = static_cast<std::size_t>(i);
    Real const lr = rounded(computed, -h.lr.value), momentum = rounded(computed, h.momentum),
               decay = rounded(computed, h.weight_decay),
               undampened = rounded(computed, 1.0 - h.dampening);

    Real g = checked_gradient(entry, i);
    if (h.maximize) g = -g;
    Real size = std::fabs(g), largest = size;
    Real const p = t.p[at];
    if (h.weight_decay != 0) {
        g += decay * p;
        size += std::fabs(decay * p);
    }
    Real underflow = 1;  // of what is multiplied later
    if (h.momentum != 0) {
        Expected b{g, size};
        if (!entries[entry].first_step) {
            b.value = momentum * t.s[0][at] + undampened * g;
            b.magnitude = std::fabs(momentum * t.s[0][at]) + std::fabs(undampened) * size;
            b.absolute = std::fabs(undampened);
            b.largest = size;
        }
        check_state(entry, i, 0, b);
        largest = std::max({largest, size, b.magnitude});
        g = h.nesterov ? g + momentum * b.value : b.value;
        size = h.nesterov ? size + momentum * b.magnitude : b.magnitude;
        underflow += (1 + b.absolute) * (1 + momentum);
    }
    Expected const e{p + lr * g, std::fabs(p) + std::fabs(lr) * size, std::fabs(lr) * underflow,
                     std::max(largest, size)};
    check_param(entry, i, e);
    bool const stays = !t.master && h.lr.value == 0 && e.magnitude < 1e37L && e.largest < 1e37L;
    Real const got = (*t.param)[i];
    if (stays && got != p) wrong("parameter that stays", entry, i, got, {p, 0});
}

}  // namespace
}  // namespace native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    native::Choices choices(data, size);
    native::SgdCase one(choices);
    for (const auto& level : NATIVE_LEVELS(optim)) one.check(level.name, level.kernels.update[0]);
    return 0;
}

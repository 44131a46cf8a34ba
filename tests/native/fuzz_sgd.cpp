// The kernels of sgd/ on any list of tensors, against the formula of its math.h.
#include "harness.h"
#include "sgd/sgd.h"

namespace native {
namespace {

using fusedstep::kChunk;
using fusedstep::sgd::CpuKernels;
using fusedstep::sgd::Entry;
using fusedstep::sgd::Hyperparameters;
using fusedstep::sgd::Step;

struct Tensors {
    std::unique_ptr<Array> param, grad, buffer;
    std::vector<std::uint8_t> param_before, grad_before, buffer_before;
    std::vector<Real> p, g, b;  // before the step
};

struct Case {
    explicit Case(Choices& choices);
    void check(const CpuKernels& kernels);

    Choices& choices;
    std::vector<Hyperparameters> groups;
    std::vector<Entry> entries;
    std::vector<Tensors> tensors;
    Step step{};
    const char* level = "";

private:
    void check_element(std::size_t entry, std::int64_t i) const;
    [[noreturn]] void wrong(const char* what, std::size_t entry, std::int64_t i, Real got,
                            const Expected& expected) const;
};

Case::Case(Choices& choices_) : choices(choices_) {
    for (std::int64_t i = choices.between(1, 3); i > 0; --i) {
        Hyperparameters h{};
        h.lr = choices.one_of({0.1, 1e-3, 0.0, 3.0, 1e30, 1e-40});
        h.momentum = choices.one_of({0.9, 0.0, 1.0, 1e-30, 5.0});
        h.dampening = choices.one_of({0.0, 0.1, 1.0, -1.0});
        h.weight_decay = choices.one_of({0.0, 1e-4, 0.5, 1e-42, 1e30});
        h.nesterov = choices.one_in(2);
        h.maximize = choices.one_in(2);
        groups.push_back(h);
    }
    std::int64_t chunk = 0;
    for (std::int64_t count = choices.between(1, 8); count > 0; --count) {
        auto const many = choices.one_of<std::int64_t>({20, 100, 3 * kChunk + 100});
        std::int64_t numel = choices.one_in(8) ? 0 : any_size(choices, many);
        if (choices.one_in(8)) numel = kChunk * choices.between(1, 2) + choices.between(-1, 1);
        Entry entry{};
        entry.extent = {chunk, numel};
        entry.group = static_cast<std::int32_t>(
            choices.between(0, static_cast<std::int64_t>(groups.size()) - 1));
        entry.dtype = any_dtype(choices);
        entry.first_step = choices.one_in(3);
        chunk = entry.extent.end_chunk();
        auto const make = [&] {
            auto array = std::make_unique<Array>(choices, entry.dtype, numel);
            Values values(choices);
            array->fill([&] { return values.next(); });
            return array;
        };
        Tensors t;
        t.param = make();
        t.grad = make();
        entry.param = t.param->data();
        entry.grad = t.grad->data();
        if (groups[static_cast<std::size_t>(entry.group)].momentum != 0) {
            t.buffer = make();
            entry.momentum_buffer = t.buffer->data();
            t.buffer_before = t.buffer->bytes();
        }
        t.param_before = t.param->bytes();
        t.grad_before = t.grad->bytes();
        for (std::int64_t i = 0; i < numel; ++i) {
            t.p.push_back((*t.param)[i]);
            t.g.push_back((*t.grad)[i]);
            t.b.push_back(t.buffer ? (*t.buffer)[i] : 0);
        }
        entries.push_back(entry);
        tensors.push_back(std::move(t));
    }
    step.groups = groups.data();
    step.group_count = static_cast<std::int64_t>(groups.size());
    step.entries = entries.data();
    step.entry_count = static_cast<std::int64_t>(entries.size());
    step.grad_scale = choices.one_of({1.0, 65536.0, 3.0, 1e-30});
}

void Case::wrong(const char* what, std::size_t entry, std::int64_t i, Real got,
                 const Expected& e) const {
    const Hyperparameters& h = groups[static_cast<std::size_t>(entries[entry].group)];
    const Tensors& t = tensors[entry];
    auto const at = static_cast<std::size_t>(i);
    fail(text(what, " at ", level, ", entry ", entry, " element ", i, " of ",
              entries[entry].extent.numel, ": ", got, " instead of ", e.value, " (magnitude ",
              e.magnitude, ")\n  dtype ", int(entries[entry].dtype), ", param ", t.p[at], ", grad ",
              t.g[at], ", buffer ", t.b[at], ", first step ", entries[entry].first_step, "\n  lr ",
              h.lr, ", momentum ", h.momentum, ", dampening ", h.dampening, ", weight decay ",
              h.weight_decay, ", nesterov ", h.nesterov, ", maximize ", h.maximize, ", grad scale ",
              step.grad_scale));
}

void Case::check_element(std::size_t entry, std::int64_t i) const {
    const Hyperparameters& h = groups[static_cast<std::size_t>(entries[entry].group)];
    const Tensors& t = tensors[entry];
    DType const dtype = entries[entry].dtype, computed = accumulate(dtype);
    auto const at = static_cast<std::size_t>(i);
    Real const lr = rounded(computed, -h.lr), momentum = rounded(computed, h.momentum),
               decay = rounded(computed, h.weight_decay),
               undampened = rounded(computed, 1.0 - h.dampening);

    // The step follows from the gradient as it is stored.
    Real g = (*t.grad)[i];
    if (step.grad_scale != 1) {
        Real const unscaled = t.g[at] / rounded(computed, step.grad_scale);
        Expected const e{unscaled, std::fabs(unscaled)};
        if (!is_close(g, e, computed, dtype)) wrong("unscaled gradient", entry, i, g, e);
    }
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
            b.value = momentum * t.b[at] + undampened * g;
            b.magnitude = std::fabs(momentum * t.b[at]) + std::fabs(undampened) * size;
            b.absolute = std::fabs(undampened);
            b.largest = size;
        }
        Real const got = (*t.buffer)[i];
        if (!is_close(got, b, computed, dtype)) wrong("momentum buffer", entry, i, got, b);
        largest = std::max({largest, size, b.magnitude});
        g = h.nesterov ? g + momentum * b.value : b.value;
        size = h.nesterov ? size + momentum * b.magnitude : b.magnitude;
        underflow += (1 + b.absolute) * (1 + momentum);
    }
    Expected const e{p + lr * g, std::fabs(p) + std::fabs(lr) * size, std::fabs(lr) * underflow,
                     std::max(largest, size)};
    Real const got = (*t.param)[i];
    if (!is_close(got, e, computed, dtype)) wrong("parameter", entry, i, got, e);
}

void Case::check(const CpuKernels& kernels) {
    std::int64_t const chunks = entries.back().extent.end_chunk();
    in_chunks(choices, chunks, choices.between(1, std::max<std::int64_t>(chunks, 1)),
              [&](std::int64_t, std::int64_t first, std::int64_t last) {
                  kernels.update(step, first, last);
              });
    for (std::size_t entry = 0; entry < entries.size(); ++entry) {
        Tensors& t = tensors[entry];
        for (std::int64_t i = 0; i < entries[entry].extent.numel; ++i) check_element(entry, i);
        if (step.grad_scale == 1) t.grad->expect_unchanged(t.grad_before);
        t.grad->expect_gaps_untouched(t.grad_before);
        t.param->expect_gaps_untouched(t.param_before);
        t.grad->restore(t.grad_before);
        t.param->restore(t.param_before);
        if (t.buffer) {
            t.buffer->expect_gaps_untouched(t.buffer_before);
            t.buffer->restore(t.buffer_before);
        }
    }
}

}  // namespace
}  // namespace native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    native::Choices choices(data, size);
    native::Case one(choices);
    for (const auto& level : NATIVE_LEVELS(sgd)) {
        one.level = level.name;
        one.check(level.kernels);
    }
    return 0;
}

// The kernels of SGD on any list of tensors, against the formula of optim/rules/sgd.h.
#include "harness.h"
#include "optim/rules.h"

namespace native {
namespace {

using fusedstep::kChunk;
using fusedstep::optim::CpuKernels;
using fusedstep::optim::Entry;
using fusedstep::optim::EntryStorage;
using fusedstep::optim::Step;
using fusedstep::optim::Storage;
using Hyperparameters = fusedstep::optim::Sgd::Hyperparameters;

struct Tensors {
    std::unique_ptr<Array> param, grad, buffer, master;
    std::vector<Real> p, g, b;  // before the step; p is the master weight where it counts

    // Calls f(array) for those that the step may write.
    template <class F>
    void for_each(F f) const {
        for (Array* array : {param.get(), grad.get(), buffer.get(), master.get()}) {
            if (array) f(*array);
        }
    }
    std::vector<std::vector<std::uint8_t>> bytes() const {
        std::vector<std::vector<std::uint8_t>> all;
        for_each([&](const Array& array) { all.push_back(array.bytes()); });
        return all;
    }
};

struct Case {
    explicit Case(Choices& choices);
    void check(const CpuKernels& kernels);

    Choices& choices;
    std::vector<Hyperparameters> groups;
    std::vector<Entry> entries;
    std::vector<EntryStorage> storages;
    std::vector<Tensors> tensors;
    Step step{};
    const char* level = "";

private:
    void draw_master(Tensors& t, DType dtype);
    Storage storage_of(std::size_t entry) const { return storages[entry].storage; }
    void update(const CpuKernels& kernels);
    void check_element(std::size_t entry, std::int64_t i) const;
    [[noreturn]] void wrong(const char* what, std::size_t entry, std::int64_t i, Real got,
                            const Expected& expected) const;
};

Case::Case(Choices& choices_) : choices(choices_) {
    for (std::int64_t i = choices.between(1, 3); i > 0; --i) {
        Hyperparameters h{};
        h.lr.value = choices.one_of({0.1, 1e-3, 0.0, 3.0, 1e30, 1e-40});
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
        EntryStorage storage{};
        if (fusedstep::item_size(entry.dtype) == 2 && choices.one_in(2)) {
            storage.storage = entry.dtype == DType::bfloat16 && choices.one_in(2)
                                  ? Storage::stochastic_rounding
                                  : Storage::master_weights;
            storage.key = choices.random();
        }
        bool const has_master = storage.storage == Storage::master_weights;
        auto const make = [&](DType dtype) {
            auto array = std::make_unique<Array>(choices, dtype, numel);
            Values values(choices);
            array->fill([&] { return values.next(); });
            return array;
        };
        Tensors t;
        t.param = make(entry.dtype);
        t.grad = make(entry.dtype);
        entry.param = t.param->data();
        entry.grad = t.grad->data();
        if (groups[static_cast<std::size_t>(entry.group)].momentum != 0) {
            t.buffer = make(has_master ? DType::float32 : entry.dtype);
            entry.states[0] = t.buffer->data();
        }
        if (has_master) {
            t.master = make(DType::float32);
            storage.master_param = static_cast<float*>(t.master->data());
            draw_master(t, entry.dtype);
        }
        for (std::int64_t i = 0; i < numel; ++i) {
            if (!has_master) t.p.push_back((*t.param)[i]);
            t.g.push_back((*t.grad)[i]);
            t.b.push_back(t.buffer ? (*t.buffer)[i] : 0);
        }
        entries.push_back(entry);
        storages.push_back(storage);
        tensors.push_back(std::move(t));
    }
    bool const all_ordinary =
        std::all_of(storages.begin(), storages.end(),
                    [](const EntryStorage& p) { return p.storage == Storage::ordinary; });
    step.storages = all_ordinary && choices.one_in(2) ? nullptr : storages.data();
    step.groups = groups.data();
    step.group_count = static_cast<std::int64_t>(groups.size());
    step.entries = entries.data();
    step.entry_count = static_cast<std::int64_t>(entries.size());
    step.grad_scale = choices.one_of({1.0, 65536.0, 3.0, 1e-30});
}

// Most parameters are their rounded master weights; the others have been changed since.
void Case::draw_master(Tensors& t, DType dtype) {
    std::int64_t const numel = t.param->layout().count();
    bool const any_changed = choices.one_in(2);
    for (std::int64_t i = 0; i < numel; ++i) {
        Real const master = (*t.master)[i];
        bool const changed = any_changed && choices.random() % 4 == 0;
        if (!changed) t.param->set(i, static_cast<double>(rounded(dtype, master)));
        Real const p = (*t.param)[i], expected = rounded(dtype, master);
        bool const counts = p == expected && std::signbit(p) == std::signbit(expected);
        t.p.push_back(counts ? master : p);
    }
}

void Case::wrong(const char* what, std::size_t entry, std::int64_t i, Real got,
                 const Expected& e) const {
    const Hyperparameters& h = groups[static_cast<std::size_t>(entries[entry].group)];
    const Tensors& t = tensors[entry];
    auto const at = static_cast<std::size_t>(i);
    fail(text(what, " at ", level, ", entry ", entry, " element ", i, " of ",
              entries[entry].extent.numel, ": ", got, " instead of ", e.value, " (magnitude ",
              e.magnitude, ")\n  dtype ", int(entries[entry].dtype), ", storage ",
              int(storage_of(entry)), ", param ", t.p[at], ", grad ", t.g[at], ", buffer ", t.b[at],
              ", first step ", entries[entry].first_step, "\n  lr ", h.lr.value, ", momentum ",
              h.momentum, ", dampening ", h.dampening, ", weight decay ", h.weight_decay,
              ", nesterov ", h.nesterov, ", maximize ", h.maximize, ", grad scale ",
              step.grad_scale));
}

void Case::check_element(std::size_t entry, std::int64_t i) const {
    const Hyperparameters& h = groups[static_cast<std::size_t>(entries[entry].group)];
    const Tensors& t = tensors[entry];
    DType const dtype = entries[entry].dtype, computed = accumulate(dtype);
    auto const at = static_cast<std::size_t>(i);
    Real const lr = rounded(computed, -h.lr.value), momentum = rounded(computed, h.momentum),
               decay = rounded(computed, h.weight_decay),
               undampened = rounded(computed, 1.0 - h.dampening);

    // The step follows from the gradient as it is stored; with master weights, before that.
    Real g = (*t.grad)[i];
    if (step.grad_scale != 1) {
        Real const unscaled = t.g[at] / rounded(computed, step.grad_scale);
        Expected const e{unscaled, std::fabs(unscaled)};
        if (!is_close(g, e, computed, dtype)) wrong("unscaled gradient", entry, i, g, e);
        if (t.master) g = unscaled;
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
        if (!is_close(got, b, computed, t.buffer->dtype())) {
            wrong("momentum buffer", entry, i, got, b);
        }
        largest = std::max({largest, size, b.magnitude});
        g = h.nesterov ? g + momentum * b.value : b.value;
        size = h.nesterov ? size + momentum * b.magnitude : b.magnitude;
        underflow += (1 + b.absolute) * (1 + momentum);
    }
    Expected const e{p + lr * g, std::fabs(p) + std::fabs(lr) * size, std::fabs(lr) * underflow,
                     std::max(largest, size)};
    Real const got = (*t.param)[i];
    if (t.master) {
        Real const master = (*t.master)[i];
        Expected const exact{master, 0};
        if (!is_close(master, e, computed, computed)) wrong("master weight", entry, i, master, e);
        if (!is_close(got, exact, computed, dtype)) {
            wrong("rounded master weight", entry, i, got, exact);
        }
        return;
    }
    bool const by_chance = storage_of(entry) == Storage::stochastic_rounding;
    Storing const storing = by_chance ? Storing::either_neighbour : Storing::nearest;
    if (!is_close(got, e, computed, dtype, storing)) wrong("parameter", entry, i, got, e);
    bool const stays = h.lr.value == 0 && e.magnitude < 1e37L && e.largest < 1e37L;
    if (stays && got != p) wrong("parameter that stays", entry, i, got, {p, 0});
}

void Case::update(const CpuKernels& kernels) {
    std::int64_t const chunks = entries.back().extent.end_chunk();
    in_chunks(choices, chunks, choices.between(1, std::max<std::int64_t>(chunks, 1)),
              [&](std::int64_t, std::int64_t first, std::int64_t last) {
                  kernels.update[0](step, first, last);
              });
}

void Case::check(const CpuKernels& kernels) {
    std::vector<std::vector<std::vector<std::uint8_t>>> before, after;
    for (const Tensors& t : tensors) before.push_back(t.bytes());
    auto const restore = [&] {
        for (std::size_t entry = 0; entry < entries.size(); ++entry) {
            auto bytes = before[entry].begin();
            tensors[entry].for_each([&](Array& array) { array.restore(*bytes++); });
        }
    };
    update(kernels);
    for (std::size_t entry = 0; entry < entries.size(); ++entry) {
        const Tensors& t = tensors[entry];
        for (std::int64_t i = 0; i < entries[entry].extent.numel; ++i) check_element(entry, i);
        if (step.grad_scale == 1) t.grad->expect_unchanged(before[entry][1]);
        auto bytes = before[entry].begin();
        t.for_each([&](const Array& array) { array.expect_gaps_untouched(*bytes++); });
        after.push_back(t.bytes());
    }
    // Cut elsewhere, in another order.
    restore();
    update(kernels);
    for (std::size_t entry = 0; entry < entries.size(); ++entry) {
        if (tensors[entry].bytes() != after[entry]) fail("other chunks gave other bits");
    }
    restore();
}

}  // namespace
}  // namespace native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    native::Choices choices(data, size);
    native::Case one(choices);
    for (const auto& level : NATIVE_LEVELS(optim)) {
        one.level = level.name;
        one.check(level.kernels);
    }
    return 0;
}

// A step of any optimizer on a list of tensors: drawn from bytes, updated in chunks, and compared
// element by element with what a subclass expects.
#pragma once

#include "harness.h"
#include "optim/rules.h"

namespace native {

using fusedstep::kChunk;
using fusedstep::optim::CpuUpdate;
using fusedstep::optim::Entry;
using fusedstep::optim::EntryStorage;
using fusedstep::optim::kStates;
using fusedstep::optim::Step;
using fusedstep::optim::Storage;

template <class Rule>
struct Tensors {
    std::unique_ptr<Array> param, grad, master;
    std::unique_ptr<Array> states[kStates<Rule>];  // null for those that the step goes without
    // Before the step; p is the master weight where it counts.
    std::vector<Real> p, g, s[kStates<Rule>];

    // Calls f(array) for those that the step may write, the gradient first.
    template <class F>
    void for_each(F f) const {
        for (const Array* array : {grad.get(), param.get(), master.get()}) {
            if (array) f(const_cast<Array&>(*array));
        }
        for (const auto& state : states) {
            if (state) f(*state);
        }
    }
    std::vector<std::vector<std::uint8_t>> bytes() const {
        std::vector<std::vector<std::uint8_t>> all;
        for_each([&](const Array& array) { all.push_back(array.bytes()); });
        return all;
    }
};

template <class Rule>
class OptimCase {
public:
    using Hyperparameters = typename Rule::Hyperparameters;

    virtual ~OptimCase() = default;
    void check(const char* level, CpuUpdate kernel);

protected:
    // draw() makes the hyperparameters of a group.
    template <class Draw>
    OptimCase(Choices& choices, Draw draw);

    // Fails if the step left anything else in this element of a parameter, its gradient or states.
    virtual void check_element(std::size_t entry, std::int64_t i) const = 0;

    const Hyperparameters& group_of(std::size_t entry) const {
        return groups[static_cast<std::size_t>(entries[entry].group)];
    }
    // What the rule's update() starts from: the gradient as it is stored; with master weights,
    // before that.
    Real checked_gradient(std::size_t entry, std::int64_t i) const;
    void check_state(std::size_t entry, std::int64_t i, int state, const Expected& expected) const;
    void check_param(std::size_t entry, std::int64_t i, const Expected& expected) const;
    [[noreturn]] void wrong(const char* what, std::size_t entry, std::int64_t i, Real got,
                            const Expected& expected) const;

    Choices& choices;
    std::vector<Hyperparameters> groups;
    std::vector<Entry> entries;
    std::vector<EntryStorage> storages;
    std::vector<Tensors<Rule>> tensors;
    Step step{};

private:
    void draw_entry(std::int64_t first_chunk);
    void draw_master(Tensors<Rule>& t, DType dtype);
    void update(CpuUpdate kernel);

    const char* level_ = "";
};

template <class Rule>
template <class Draw>
OptimCase<Rule>::OptimCase(Choices& choices_, Draw draw) : choices(choices_) {
    for (std::int64_t i = choices.between(1, 3); i > 0; --i) groups.push_back(draw());
    for (std::int64_t count = choices.between(1, 8); count > 0; --count) {
        draw_entry(entries.empty() ? 0 : entries.back().extent.end_chunk());
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

template <class Rule>
void OptimCase<Rule>::draw_entry(std::int64_t first_chunk) {
    auto const many = choices.one_of<std::int64_t>({20, 100, 3 * kChunk + 100});
    std::int64_t numel = choices.one_in(8) ? 0 : any_size(choices, many);
    if (choices.one_in(8)) numel = kChunk * choices.between(1, 2) + choices.between(-1, 1);
    Entry entry{};
    entry.extent = {first_chunk, numel};
    entry.group =
        static_cast<std::int32_t>(choices.between(0, static_cast<std::int64_t>(groups.size()) - 1));
    entry.dtype = any_dtype(choices);
    entry.first_step = choices.one_in(3);
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
    Tensors<Rule> t;
    t.param = make(entry.dtype);
    t.grad = make(entry.dtype);
    entry.param = t.param->data();
    entry.grad = t.grad->data();
    unsigned const kept = Rule::states_of(groups[static_cast<std::size_t>(entry.group)]);
    for (int state = 0; state < kStates<Rule>; ++state) {
        if (!(kept >> state & 1)) continue;
        t.states[state] = make(has_master ? DType::float32 : entry.dtype);
        entry.states[state] = t.states[state]->data();
    }
    if (has_master) {
        t.master = make(DType::float32);
        storage.master_param = static_cast<float*>(t.master->data());
        draw_master(t, entry.dtype);
    }
    for (std::int64_t i = 0; i < numel; ++i) {
        if (!has_master) t.p.push_back((*t.param)[i]);
        t.g.push_back((*t.grad)[i]);
        for (int state = 0; state < kStates<Rule>; ++state) {
            t.s[state].push_back(t.states[state] ? (*t.states[state])[i] : 0);
        }
    }
    entries.push_back(entry);
    storages.push_back(storage);
    tensors.push_back(std::move(t));
}

// Most parameters are their rounded master weights; the others have been changed since.
template <class Rule>
void OptimCase<Rule>::draw_master(Tensors<Rule>& t, DType dtype) {
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

template <class Rule>
void OptimCase<Rule>::wrong(const char* what, std::size_t entry, std::int64_t i, Real got,
                            const Expected& e) const {
    const Hyperparameters& h = group_of(entry);
    const Tensors<Rule>& t = tensors[entry];
    auto const at = static_cast<std::size_t>(i);
    std::string states, numbers;
    for (int state = 0; state < kStates<Rule>; ++state) {
        states += text(", ", Rule::states[state].key, " ", t.s[state][at]);
    }
    auto const* const bytes = reinterpret_cast<const char*>(&h);
    for (const auto& number : Rule::numbers) {
        numbers +=
            text(", ", number.called, " ", *reinterpret_cast<const double*>(bytes + number.offset));
    }
    for (const auto& flag : Rule::flags) {
        numbers += text(", ", flag.key, " ", *reinterpret_cast<const bool*>(bytes + flag.offset));
    }
    fail(text(what, " at ", level_, ", entry ", entry, " element ", i, " of ",
              entries[entry].extent.numel, ": ", got, " instead of ", e.value, " (magnitude ",
              e.magnitude, ")\n  dtype ", int(entries[entry].dtype), ", storage ",
              int(storages[entry].storage), ", param ", t.p[at], ", grad ", t.g[at], states,
              ", first step ", entries[entry].first_step, "\n  lr ", h.lr.value, numbers,
              ", grad scale ", step.grad_scale));
}

template <class Rule>
Real OptimCase<Rule>::checked_gradient(std::size_t entry, std::int64_t i) const {
    const Tensors<Rule>& t = tensors[entry];
    DType const dtype = entries[entry].dtype, computed = accumulate(dtype);
    Real const got = (*t.grad)[i];
    if (step.grad_scale == 1) return got;
    Real const unscaled = t.g[static_cast<std::size_t>(i)] / rounded(computed, step.grad_scale);
    Expected const e{unscaled, std::fabs(unscaled)};
    if (!is_close(got, e, computed, dtype)) wrong("unscaled gradient", entry, i, got, e);
    return t.master ? unscaled : got;
}

template <class Rule>
void OptimCase<Rule>::check_state(std::size_t entry, std::int64_t i, int state,
                                  const Expected& e) const {
    const Array& array = *tensors[entry].states[state];
    if (!is_close(array[i], e, accumulate(entries[entry].dtype), array.dtype())) {
        wrong(Rule::states[state].key, entry, i, array[i], e);
    }
}

template <class Rule>
void OptimCase<Rule>::check_param(std::size_t entry, std::int64_t i, const Expected& e) const {
    const Tensors<Rule>& t = tensors[entry];
    DType const dtype = entries[entry].dtype, computed = accumulate(dtype);
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
    bool const by_chance = storages[entry].storage == Storage::stochastic_rounding;
    Storing const storing = by_chance ? Storing::either_neighbour : Storing::nearest;
    if (!is_close(got, e, computed, dtype, storing)) wrong("parameter", entry, i, got, e);
}

template <class Rule>
void OptimCase<Rule>::update(CpuUpdate kernel) {
    std::int64_t const chunks = entries.back().extent.end_chunk();
    in_chunks(
        choices, chunks, choices.between(1, std::max<std::int64_t>(chunks, 1)),
        [&](std::int64_t, std::int64_t begin, std::int64_t end) { kernel(step, begin, end); });
}

template <class Rule>
void OptimCase<Rule>::check(const char* level, CpuUpdate kernel) {
    level_ = level;
    std::vector<std::vector<std::vector<std::uint8_t>>> before, after;
    for (const auto& t : tensors) before.push_back(t.bytes());
    auto const restore = [&] {
        for (std::size_t entry = 0; entry < entries.size(); ++entry) {
            auto bytes = before[entry].begin();
            tensors[entry].for_each([&](Array& array) { array.restore(*bytes++); });
        }
    };
    update(kernel);
    for (std::size_t entry = 0; entry < entries.size(); ++entry) {
        const auto& t = tensors[entry];
        for (std::int64_t i = 0; i < entries[entry].extent.numel; ++i) check_element(entry, i);
        if (step.grad_scale == 1) t.grad->expect_unchanged(before[entry][0]);
        auto bytes = before[entry].begin();
        t.for_each([&](const Array& array) { array.expect_gaps_untouched(*bytes++); });
        after.push_back(t.bytes());
    }
    // Cut elsewhere, in another order.
    restore();
    update(kernel);
    for (std::size_t entry = 0; entry < entries.size(); ++entry) {
        if (tensors[entry].bytes() != after[entry]) fail("other chunks gave other bits");
    }
    restore();
}

}  // namespace native

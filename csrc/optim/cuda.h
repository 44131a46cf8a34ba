// The CUDA entry points of the optimizers: one launch for a whole step. All pointers of a Step's
// entries are to memory of the device; its lists of groups and entries are the host's and travel to
// the kernel as one table.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/cuda_launch.h"
#include "optim/rules.h"

namespace fusedstep::optim {

// What the kernel's parameters may hold: all that a launch takes (from compute capability 7.0 and
// CUDA 12.1 on) and, so that a step of few tensors does not carry 32 KB, an eighth of it.
inline constexpr std::size_t kMostParameterBytes = 32760;
inline constexpr std::size_t kFewParameterBytes = 4096;

inline constexpr unsigned kUpdateThreads = 256;

// What a launch takes beside its table.
struct UpdateHeader {
    std::int32_t group_count;
    std::int32_t entry_count;
    std::int32_t chunks;
    double grad_scale;
    const float* device_grad_scale;
    const float* device_found_inf;
};

// An entry of the table: the beginning of an Entry, as far as its rule has states,
template <int states_>
struct ListedEntry {
    Extent extent;
    void* param;
    void* grad;
    std::int32_t group;
    DType dtype;
    bool first_step;
    void* states[states_];
};
// and how the parameter is kept, where not all entries are ordinary.
template <int states_>
struct StoredEntry : ListedEntry<states_> {
    EntryStorage storage;
};

constexpr std::size_t listed_bytes(const Rule& rule) {
    return offsetof(Entry, states) + rule.states.size() * sizeof(void*);
}
static_assert(sizeof(ListedEntry<1>) == listed_bytes(rule_of<Sgd>()) &&
              sizeof(StoredEntry<1>) == sizeof(ListedEntry<1>) + sizeof(EntryStorage));

// The table: the groups, then the entries.
constexpr std::size_t table_bytes(const Rule& rule, const Step& step) {
    std::size_t const entry = listed_bytes(rule) + (step.storages ? sizeof(EntryStorage) : 0);
    return static_cast<std::size_t>(step.group_count) * rule.group_bytes +
           static_cast<std::size_t>(step.entry_count) * entry;
}

constexpr bool table_fits(const Rule& rule, const Step& step,
                          std::size_t parameter_bytes = kMostParameterBytes) {
    return sizeof(UpdateHeader) + table_bytes(rule, step) <= parameter_bytes;
}

// Writes table_bytes(rule, step) bytes.
inline void write_table(const Rule& rule, const Step& step, void* table) {
    auto* to = static_cast<unsigned char*>(table);
    auto const write = [&to](const void* from, std::size_t bytes) {
        std::memcpy(to, from, bytes);
        to += bytes;
    };
    write(step.groups, static_cast<std::size_t>(step.group_count) * rule.group_bytes);
    for (std::int64_t i = 0; i < step.entry_count; ++i) {
        write(step.entries + i, listed_bytes(rule));
        if (step.storages) write(step.storages + i, sizeof(EntryStorage));
    }
}

// A block for each chunk, at most as many as are resident at once; more only where the share of one
// block would reach 2^30 elements.
constexpr LaunchShape update_shape(std::int64_t chunks, const DeviceLimits& limits) {
    constexpr std::int64_t kMostChunks = (std::int64_t{1} << 30) / kChunk;
    std::int64_t const resident =
        std::int64_t{limits.multiprocessors} * (kResidentThreads / kUpdateThreads);
    std::int64_t const least = (chunks + kMostChunks - 1) / kMostChunks;
    std::int64_t const blocks = chunks < resident ? chunks : resident < least ? least : resident;
    return {static_cast<unsigned>(blocks), kUpdateThreads};
}

// Enqueues the update of all entries, which have less than 2^41 elements. `device_table` is memory
// of the device that holds the step's table when the kernel runs; null where the table fits into
// the kernel's parameters.
using CudaUpdate = cudaError_t (*)(const Step& step, const void* device_table,
                                   const DeviceLimits& limits, cudaStream_t stream);

// Of a rule R; compiled by rules/<name>.cu, which must name no other rule's: it would compile them
// too.
template <class R>
CudaUpdate cuda_update_of();

}  // namespace fusedstep::optim

// The CUDA entry points of this room: one launch for a whole step. All pointers of a Step's entries
// are to memory of the device; its lists of groups and entries are the host's and travel to the
// kernel as one table.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/cuda_launch.h"
#include "optim/optim.h"

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

// What is listed where not all entries are ordinary.
struct PreciseEntry : Entry {
    EntryPrecision precision;
};

// The table: the groups, then the entries.
constexpr std::size_t table_bytes(const Step& step) {
    std::size_t const entry = step.precisions ? sizeof(PreciseEntry) : sizeof(Entry);
    return static_cast<std::size_t>(step.group_count) * sizeof(Hyperparameters) +
           static_cast<std::size_t>(step.entry_count) * entry;
}

constexpr bool table_fits(const Step& step, std::size_t parameter_bytes = kMostParameterBytes) {
    return sizeof(UpdateHeader) + table_bytes(step) <= parameter_bytes;
}

// Writes table_bytes(step) bytes.
void write_table(const Step& step, void* table);

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
cudaError_t cuda_update(const Step& step, const void* device_table, const DeviceLimits& limits,
                        cudaStream_t stream);

}  // namespace fusedstep::optim

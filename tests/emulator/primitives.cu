// Kernels that show what the emulated primitives compute; test_emulator.py knows the right answers.
#include <cooperative_groups.h>

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/cuda_shared.cuh"

namespace primitives {

namespace cg = cooperative_groups;
using fusedstep::block_shared;
using fusedstep::launch;

enum class Shuffle { index, up, down, exclusive_or };

template <class T>
__global__ void shuffle(T* values, const int* operands, Shuffle kind, int width) {
    T const value = values[threadIdx.x];
    int const operand = operands[threadIdx.x];
    auto const distance = static_cast<unsigned>(operand);
    T result{};
    switch (kind) {
        case Shuffle::index:
            result = __shfl_sync(0xffffffffu, value, operand, width);
            break;
        case Shuffle::up:
            result = __shfl_up_sync(0xffffffffu, value, distance, width);
            break;
        case Shuffle::down:
            result = __shfl_down_sync(0xffffffffu, value, distance, width);
            break;
        case Shuffle::exclusive_or:
            result = __shfl_xor_sync(0xffffffffu, value, operand, width);
            break;
    }
    values[threadIdx.x] = result;
}

// votes[lane] = {ballot, any, all}, of the even and the odd lanes separately.
__global__ void vote(const int* predicates, unsigned* votes) {
    unsigned const lane = threadIdx.x;
    unsigned const mask = lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
    votes[3 * lane] = __ballot_sync(mask, predicates[lane]);
    votes[3 * lane + 1] = static_cast<unsigned>(__any_sync(mask, predicates[lane]));
    votes[3 * lane + 2] = static_cast<unsigned>(__all_sync(mask, predicates[lane]));
}

// What each thread sees of where it is: three indices of six numbers.
__global__ void indices(unsigned* seen) {
    unsigned const block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned const thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned const threads = blockDim.x * blockDim.y * blockDim.z;
    unsigned* const own = seen + 6 * (block * threads + thread);
    own[0] = blockIdx.x;
    own[1] = blockIdx.y;
    own[2] = blockIdx.z;
    own[3] = threadIdx.x;
    own[4] = threadIdx.y;
    own[5] = threadIdx.z;
}

// Every block adds up what all blocks wrote in the round before.
__global__ void grid_rounds(long long* values, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        long long sum = 1;
        for (unsigned block = 0; block < gridDim.x; ++block) sum += values[block];
        cg::this_grid().sync();
        if (threadIdx.x == 0) values[blockIdx.x] = sum;
        cg::this_grid().sync();
    }
}

// Each block reads what the next block of its cluster left in shared memory.
__global__ void cluster_neighbours(unsigned* seen) {
    auto& shared = block_shared<unsigned>();
    auto const cluster = cg::this_cluster();
    if (threadIdx.x == 0) shared = 100 * blockIdx.x + cluster.block_rank();
    cluster.sync();
    unsigned const next = (cluster.block_rank() + 1) % cluster.num_blocks();
    if (threadIdx.x == 0) seen[blockIdx.x] = *cluster.map_shared_rank(&shared, next);
    cluster.sync();
}

struct Atomics {
    int sum, least, most;
    unsigned unsigned_most;
    unsigned long long swapped;
};

__global__ void atomics(Atomics* result) {
    int const value = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) - 50;
    atomicAdd(&result->sum, value);
    atomicMin(&result->least, value);
    atomicMax(&result->most, value);
    atomicMax(&result->unsigned_most, static_cast<unsigned>(value));
    for (unsigned long long old = 0, expected = ~old; old != expected;) {
        expected = old;
        old = atomicCAS(&result->swapped, expected, expected + 2);
    }
}

// The order in which threads take their turns.
__global__ void order(unsigned* tickets, unsigned* counter) {
    tickets[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1u);
}

struct Parameters {
    char bytes[32764 - sizeof(int*)];
};
__global__ void large_parameters(const __grid_constant__ Parameters parameters, int* sum) {
    int own = 0;
    for (char byte : parameters.bytes) own += byte;
    atomicAdd(sum, own);
}
struct TooLarge {
    char bytes[32768];
};
__global__ void too_large_parameters(const __grid_constant__ TooLarge) {}

__global__ void nothing() {}

__global__ void much_shared() {
    struct Shared {
        char bytes[40 << 10];
    };
    block_shared<Shared>().bytes[threadIdx.x] = 1;
}

}  // namespace primitives

using namespace primitives;

extern "C" {

int run_shuffle_float(float* values, const int* operands, int kind, int width) {
    return launch({1, 32}, nullptr, shuffle<float>, values, operands, Shuffle{kind}, width);
}
int run_shuffle_int64(std::int64_t* values, const int* operands, int kind, int width) {
    return launch({1, 32}, nullptr, shuffle<std::int64_t>, values, operands, Shuffle{kind}, width);
}
int run_vote(const int* predicates, unsigned* votes) {
    return launch({1, 32}, nullptr, vote, predicates, votes);
}
int run_indices(unsigned* seen, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                unsigned bz) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(gx, gy, gz);
    config.blockDim = dim3(bx, by, bz);
    return cudaLaunchKernelEx(&config, indices, seen);
}
int run_grid_rounds(long long* values, int rounds, unsigned blocks, unsigned threads) {
    return launch({.blocks = blocks, .threads = threads, .cooperative = true}, nullptr, grid_rounds,
                  values, rounds);
}
int run_cluster_neighbours(unsigned* seen, unsigned blocks, unsigned cluster) {
    return launch({.blocks = blocks, .threads = 64, .cluster = cluster}, nullptr,
                  cluster_neighbours, seen);
}
int run_atomics(Atomics* result, unsigned blocks, unsigned threads) {
    return launch({blocks, threads}, nullptr, atomics, result);
}
int run_order(unsigned* tickets, unsigned* counter, unsigned blocks, unsigned threads) {
    return launch({blocks, threads}, nullptr, order, tickets, counter);
}
int run_large_parameters(int* sum, int value) {
    Parameters parameters;
    for (char& byte : parameters.bytes) byte = static_cast<char>(value);
    return launch({2, 64}, nullptr, large_parameters, parameters, sum);
}
int run_too_large_parameters() { return launch({1, 1}, nullptr, too_large_parameters, TooLarge{}); }
int run_nothing(unsigned blocks, unsigned threads, unsigned cluster, bool cooperative,
                unsigned shared_bytes) {
    return launch({.blocks = blocks,
                   .threads = threads,
                   .shared_bytes = shared_bytes,
                   .cluster = cluster,
                   .cooperative = cooperative},
                  nullptr, nothing);
}
int run_much_shared(unsigned blocks, bool cooperative) {
    return launch({.blocks = blocks, .threads = 32, .cooperative = cooperative}, nullptr,
                  much_shared);
}
int allow_nothing_shared(int bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
int run_nothing_after_another_asked(unsigned shared_bytes, unsigned others_bytes) {
    fusedstep::DeviceLimits const limits{.shared_per_block = 99 << 10};
    fusedstep::LaunchShape const shape{.blocks = 1, .threads = 32, .shared_bytes = shared_bytes};
    fusedstep::LaunchShape const other{.blocks = 1, .threads = 32, .shared_bytes = others_bytes};
    for (const auto& asked : {shape, other}) {
        if (int const error = fusedstep::allow_shared(asked, 0, limits, nothing)) return error;
    }
    return launch(shape, nullptr, nothing);
}
int active_clusters(unsigned threads, unsigned cluster) {
    int clusters = -1;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = cluster;
    config.blockDim = threads;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaOccupancyMaxActiveClusters(&clusters, nothing, &config);
    return clusters;
}
const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

void* new_memory(std::size_t bytes) {
    void* memory = nullptr;
    cudaMalloc(&memory, bytes);
    return memory;
}
void delete_memory(void* memory) { cudaFree(memory); }

}  // extern "C"

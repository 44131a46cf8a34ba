// Shared memory: bounds, reads of what was never written, accesses with no barrier between.
#include <cooperative_groups.h>

#include "core/cuda_vector.cuh"
#include "plant.h"

namespace planted {

namespace cg = cooperative_groups;

struct Shared {
    float first[64];
    float second[64];
};

template <bool faulty>
__global__ void shared_behind(float* memory) {
    auto& shared = block_shared<Shared>();
    float* const volatile end = &shared.second[0] + 64;
    end[faulty ? 0 : -1] = 1;
    memory[0] = end[-1 + faulty];
}

// Still inside the block's shared memory, and not inside the array.
template <bool faulty>
__global__ void shared_in_the_next_array(float* memory) {
    auto& shared = block_shared<Shared>();
    shared.second[0] = 1;
    shared.first[threadIdx.x + (faulty ? 64 : 63)] = 1;
    memory[0] = shared.second[0];
}

template <bool faulty>
__global__ void dynamic_shared_behind(float* memory) {
    float* const shared = dynamic_shared<float>();
    shared[faulty ? 16 : 15] = 1;
    memory[0] = shared[faulty ? 16 : 15];
}

template <bool faulty>
__global__ void shared_never_written(float* memory) {
    auto& shared = block_shared<Shared>();
    if (threadIdx.x < (faulty ? 31 : 32)) shared.first[threadIdx.x] = 1;
    __syncthreads();
    memory[threadIdx.x] = shared.first[threadIdx.x];
}

// What one block wrote is not there for the next.
template <bool faulty>
__global__ void shared_written_by_the_block_before(float* memory) {
    auto& shared = block_shared<Shared>();
    if (!faulty || blockIdx.x % 2 == 0) shared.first[0] = 1;
    memory[blockIdx.x] = shared.first[0];
}

template <bool faulty>
__global__ void read_without_barrier(float* memory) {
    auto& shared = block_shared<Shared>();
    shared.first[threadIdx.x] = 1;
    if (!faulty) __syncthreads();
    memory[threadIdx.x] = shared.first[threadIdx.x ^ 32];
}

template <bool faulty>
__global__ void read_without_warp_barrier(float* memory) {
    auto& shared = block_shared<Shared>();
    shared.first[threadIdx.x] = 1;
    if (!faulty) __syncwarp();
    memory[threadIdx.x] = shared.first[threadIdx.x ^ 1];
}

// A warp's barrier orders nothing between warps.
template <bool faulty>
__global__ void read_behind_the_wrong_barrier(float* memory) {
    auto& shared = block_shared<Shared>();
    shared.first[threadIdx.x] = 1;
    __syncwarp();
    memory[threadIdx.x] = shared.first[threadIdx.x ^ (faulty ? 32 : 1)];
}

// The scratch of a reduction that is used again too early.
template <bool faulty>
__global__ void write_before_all_have_read(float* memory) {
    auto& shared = block_shared<Shared>();
    if (threadIdx.x == 0) shared.first[0] = 1;
    __syncthreads();
    memory[threadIdx.x] = shared.first[0];
    if (!faulty) __syncthreads();
    if (threadIdx.x == 0) shared.first[0] = 2;
}

template <bool faulty>
__global__ void two_writers(float* memory) {
    auto& shared = block_shared<Shared>();
    if (faulty || threadIdx.x == 0) shared.first[0] = 1;
    __syncthreads();
    memory[threadIdx.x] = shared.first[0];
}

// Neighbours in a 4-byte word are not the same memory.
template <bool faulty>
__global__ void two_writers_of_one_byte(float* memory) {
    auto& shared = block_shared<unsigned char[64]>();
    shared[faulty ? threadIdx.x / 2 : threadIdx.x] = 1;
    __syncthreads();
    memory[threadIdx.x] = shared[0];
}

template <bool faulty>
__global__ void atomic_and_ordinary_write(float* memory) {
    auto& shared = block_shared<unsigned>();
    if (threadIdx.x == 0) shared = 0;
    __syncthreads();
    if (faulty && threadIdx.x == 0) shared = 1;
    atomicAdd(&shared, 1u);
    __syncthreads();
    memory[threadIdx.x] = static_cast<float>(shared);
}

template <bool faulty>
__global__ void declared_twice(float* memory) {
    auto& shared = block_shared<Shared>();
    shared.first[0] = 1;
    memory[0] = shared.first[0];
    if (faulty) block_shared<Shared>().first[0] = 1;
}

template <bool faulty>
__global__ void copy_that_nobody_waited_for(float* memory) {
    auto& shared = block_shared<Shared>();
    fusedstep::copy_async(&shared.first[4 * threadIdx.x], memory + 4 * threadIdx.x);
    if (!faulty) fusedstep::wait_for_copies();
    memory[threadIdx.x] = shared.first[4 * threadIdx.x];
}

template <bool faulty>
__global__ void read_while_a_copy_is_under_way(float* memory) {
    auto& shared = block_shared<Shared>();
    shared.first[4 * threadIdx.x] = 1;
    float const before = faulty ? 0 : shared.first[4 * threadIdx.x];
    fusedstep::copy_async(&shared.first[4 * threadIdx.x], memory + 4 * threadIdx.x);
    float const during = faulty ? shared.first[4 * threadIdx.x] : 0;
    fusedstep::wait_for_copies();
    memory[threadIdx.x] = before + during + shared.first[4 * threadIdx.x];
}

template <bool faulty>
__global__ void misaligned_copy(float* memory) {
    auto& shared = block_shared<Shared>();
    fusedstep::copy_async(&shared.first[0], memory + (faulty ? 1 : 4));
    fusedstep::wait_for_copies();
    memory[0] = shared.first[0];
}

template <bool faulty>
__global__ void read_of_the_cluster_without_barrier(float* memory) {
    auto& shared = block_shared<Shared>();
    shared.first[0] = 1;
    auto const cluster = cg::this_cluster();
    faulty ? __syncthreads() : cluster.sync();
    memory[cluster.block_rank()] = *cluster.map_shared_rank(&shared.first[0], 1);
    cluster.sync();
}

template <bool faulty>
__global__ void read_of_a_block_that_has_ended(float* memory) {
    auto& shared = block_shared<Shared>();
    auto const cluster = cg::this_cluster();
    shared.first[0] = 1;
    cluster.sync();
    if (cluster.block_rank() == 0) {
        // Atomics let others run: nothing else would make block 1 end first.
        for (int i = 0; i < 1000; ++i) atomicAdd(reinterpret_cast<int*>(memory), 1);
        memory[1] = *cluster.map_shared_rank(&shared.first[0], 1);
    }
    if (!faulty) cluster.sync();
}

template <bool faulty>
__global__ void rank_beyond_the_cluster(float* memory) {
    auto& shared = block_shared<Shared>();
    auto const cluster = cg::this_cluster();
    shared.first[0] = 1;
    cluster.sync();
    memory[cluster.block_rank()] = *cluster.map_shared_rank(&shared.first[0], faulty ? 2 : 1);
    cluster.sync();
}

}  // namespace planted

PLANT(shared_behind, 1, 1)
PLANT(shared_in_the_next_array, 1, 1)
PLANT(dynamic_shared_behind, 1, 1, .shared_bytes = 64)
PLANT(shared_never_written, 1, 32)
PLANT(shared_written_by_the_block_before, 8, 1)
PLANT(read_without_barrier, 1, 64)
PLANT(read_without_warp_barrier, 1, 32)
PLANT(read_behind_the_wrong_barrier, 1, 64)
PLANT(write_before_all_have_read, 1, 64)
PLANT(two_writers, 1, 64)
PLANT(two_writers_of_one_byte, 1, 64)
PLANT(atomic_and_ordinary_write, 1, 64)
PLANT(declared_twice, 1, 1)
PLANT(copy_that_nobody_waited_for, 1, 16)
PLANT(read_while_a_copy_is_under_way, 1, 16)
PLANT(misaligned_copy, 1, 1)
PLANT(read_of_the_cluster_without_barrier, 2, 1, .cluster = 2)
PLANT(read_of_a_block_that_has_ended, 2, 1, .cluster = 2)
PLANT(rank_beyond_the_cluster, 2, 1, .cluster = 2)

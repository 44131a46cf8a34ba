// Barriers that not everybody reaches, and warp operations in which not everybody takes part.
#include <cooperative_groups.h>

#include "plant.h"

namespace planted {

namespace cg = cooperative_groups;

template <bool faulty>
__global__ void barrier_after_some_have_ended(float* memory) {
    if (faulty && threadIdx.x >= 32) return;
    __syncthreads();
    memory[threadIdx.x] = 1;
}

template <bool faulty>
__global__ void barrier_in_one_branch(float* memory) {
    if (!faulty || threadIdx.x < 32) __syncthreads();
    memory[threadIdx.x] = 1;
    __syncthreads();
}

template <bool faulty>
__global__ void barriers_in_both_branches(float* memory) {
    if (faulty && threadIdx.x % 2 == 0) {
        __syncthreads();
    } else if (faulty) {
        __syncthreads();
    }
    memory[threadIdx.x] = 1;
}

template <bool faulty>
__global__ void barrier_in_a_loop_of_uneven_length(float* memory) {
    unsigned const rounds = faulty ? threadIdx.x : 3;
    for (unsigned i = 0; i < rounds; ++i) {
        memory[threadIdx.x] += 1;
        __syncthreads();
    }
}

template <bool faulty>
__global__ void warp_and_block_wait_for_each_other(float* memory) {
    if (faulty && threadIdx.x % 2 == 0) __syncthreads();
    memory[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    __syncthreads();
}

template <bool faulty>
__global__ void grid_barrier_in_an_ordinary_launch(float* memory) {
    if (faulty || gridDim.x > 1) cg::this_grid().sync();
    memory[0] = 1;
}

template <bool faulty>
__global__ void grid_barrier_that_a_block_leaves_out(float* memory) {
    if (!faulty || blockIdx.x > 0) cg::this_grid().sync();
    memory[blockIdx.x] = 1;
}

template <bool faulty>
__global__ void cluster_barrier_that_a_block_leaves_out(float* memory) {
    if (!faulty || blockIdx.x > 0) cg::this_cluster().sync();
    memory[blockIdx.x] = 1;
}

template <bool faulty>
__global__ void shuffle_after_some_have_ended(float* memory) {
    if (faulty && threadIdx.x >= 16) return;
    memory[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

template <bool faulty>
__global__ void shuffle_in_one_branch(float* memory) {
    unsigned const mask = faulty ? 0xffffffffu : 0xffffu;
    if (threadIdx.x < 16) memory[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
    __syncwarp();
}

template <bool faulty>
__global__ void shuffle_of_two_kinds(float* memory) {
    if (faulty && threadIdx.x < 16) {
        memory[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
    } else {
        memory[threadIdx.x] = __shfl_up_sync(0xffffffffu, 1.0f, 1);
    }
}

template <bool faulty>
__global__ void shuffle_from_a_lane_outside_the_mask(float* memory) {
    if (threadIdx.x < 16) {
        memory[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, faulty ? 16 : 15);
    }
}

template <bool faulty>
__global__ void vote_without_its_own_lane(float* memory) {
    unsigned const mask = faulty ? 0xfffffffeu : 0xffffffffu;
    memory[threadIdx.x] = static_cast<float>(__ballot_sync(mask, 1));
}

}  // namespace planted

PLANT(barrier_after_some_have_ended, 1, 64)
PLANT(barrier_in_one_branch, 1, 64)
PLANT(barriers_in_both_branches, 1, 64)
PLANT(barrier_in_a_loop_of_uneven_length, 1, 64)
PLANT(warp_and_block_wait_for_each_other, 1, 32)
PLANT(grid_barrier_in_an_ordinary_launch, 1, 1)
PLANT(grid_barrier_that_a_block_leaves_out, 2, 32, .cooperative = true)
PLANT(cluster_barrier_that_a_block_leaves_out, 2, 32, .cluster = 2)
PLANT(shuffle_after_some_have_ended, 1, 32)
PLANT(shuffle_in_one_branch, 1, 32)
PLANT(shuffle_of_two_kinds, 1, 32)
PLANT(shuffle_from_a_lane_outside_the_mask, 1, 32)
PLANT(vote_without_its_own_lane, 1, 32)

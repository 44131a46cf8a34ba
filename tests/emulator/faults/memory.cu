// Accesses to memory that is not there, not the kernel's, or not aligned.
#include <cstdint>

#include "plant.h"

namespace planted {

template <bool faulty>
__global__ void read_behind(float* memory) {
    memory[0] = memory[kFloats - 1 + faulty];
}

template <bool faulty>
__global__ void write_in_front(float* memory) {
    memory[faulty ? -1 : 0] = 1;
}

// The first half of the value is still there.
template <bool faulty>
__global__ void read_across_the_end(float* memory) {
    struct Pair {
        float first, second;
    };
    Pair const pair = *reinterpret_cast<const Pair*>(memory + kFloats - 2 + faulty);
    memory[0] = pair.first + pair.second;
}

template <bool faulty>
__global__ void copy_a_struct_across_the_end(float* memory) {
    struct Row {
        float value[5];
    };
    Row const row = *reinterpret_cast<const Row*>(memory + kFloats - 5 + faulty);
    *reinterpret_cast<Row*>(memory) = row;
}

template <bool faulty>
__global__ void atomic_behind(float* memory) {
    atomicAdd(reinterpret_cast<unsigned*>(memory + kFloats - 1 + faulty), 1u);
}

template <bool faulty>
__global__ void read_null(float* memory) {
    const float* const volatile from = faulty ? nullptr : memory;
    memory[1] = *from;
}

float host_variable = 1;
constexpr float kConstants[] = {1, 2, 3};

template <bool faulty>
__global__ void read_host_memory(float* memory) {
    const float* const volatile from = faulty ? &host_variable : kConstants;
    memory[0] = *from;
}

template <bool faulty>
__global__ void write_constant(float* memory) {
    float* const volatile to = faulty ? const_cast<float*>(kConstants) : memory;
    *to = 1;
}

// A pointer to another thread's local variable.
template <bool faulty>
__global__ void read_foreign_stack(float* memory) {
    const float** const pointer = &block_shared<const float*>();
    float const volatile own = static_cast<float>(threadIdx.x);
    const float* const own_address = const_cast<const float*>(&own);
    if (threadIdx.x == 0) *pointer = own_address;
    __syncthreads();
    memory[threadIdx.x] = faulty ? **pointer : *own_address;
}

template <bool faulty>
__global__ void read_misaligned_vector(float* memory) {
    uint4 const vector = *reinterpret_cast<const uint4*>(memory + (faulty ? 1 : 4));
    *reinterpret_cast<uint4*>(memory) = vector;
}

// Here the compiler reads element by element what a card reads at once.
template <bool faulty>
__global__ void read_misaligned_elements(float* memory) {
    uint4 const vector = *reinterpret_cast<const uint4*>(memory + (faulty ? 2 : 4));
    memory[0] = static_cast<float>(vector.x + vector.w);
}

template <bool faulty>
__global__ void write_misaligned_double(float* memory) {
    *reinterpret_cast<double*>(memory + (faulty ? 1 : 2)) = 1;
}

template <bool faulty>
__global__ void misaligned_atomic(float* memory) {
    auto const address = reinterpret_cast<std::uintptr_t>(memory) + (faulty ? 2 : 4);
    atomicAdd(reinterpret_cast<unsigned*>(address), 1u);
}

}  // namespace planted

PLANT(read_behind, 1, 1)
PLANT(write_in_front, 1, 1)
PLANT(read_across_the_end, 1, 1)
PLANT(copy_a_struct_across_the_end, 1, 1)
PLANT(atomic_behind, 1, 1)
PLANT(read_null, 1, 1)
PLANT(read_host_memory, 1, 1)
PLANT(write_constant, 1, 1)
PLANT(read_foreign_stack, 1, 2)
PLANT(read_misaligned_vector, 1, 1)
PLANT(read_misaligned_elements, 1, 1)
PLANT(write_misaligned_double, 1, 1)
PLANT(misaligned_atomic, 1, 1)

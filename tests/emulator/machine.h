// The emulated device: runs the threads of a launch as fibers and knows what each of them may
// touch.
//
// The threads that are resident together (all blocks of a cooperative grid, else a few blocks or
// clusters at a time) take turns: one runs until it waits, for its warp or at a barrier. Who comes
// next is drawn at random, so that a result which depends on the order differs between launches.
//
// Kernels are compiled with -fsanitize=thread,alignment,bounds, and access.cpp is the runtime
// behind those switches: it sees every access of a kernel to memory before it happens. A fault ends
// the launch with an error whose string says what happened and where; the process goes on.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulator {

inline constexpr unsigned kWarpLanes = 32;

// The device: small, and as narrow as the narrowest card of compute capability 8.0 or higher.
inline constexpr unsigned kMultiprocessors = 5;
inline constexpr unsigned kResidentThreads = 1024;  // of a multiprocessor, at 64 registers each
inline constexpr unsigned kResidentBlocks = 16;     // of a multiprocessor
inline constexpr unsigned kMaxBlockThreads = 1024;
inline constexpr unsigned kMaxClusterBlocks = 8;
inline constexpr std::size_t kMaxParameterBytes = 32764;
inline constexpr unsigned kUsualShared = 48 << 10;      // of a block that does not ask for more
inline constexpr unsigned kMaxShared = 99 << 10;        // of a block that does
inline constexpr unsigned kResidentShared = 100 << 10;  // of a multiprocessor
inline constexpr unsigned kReservedShared = 1 << 10;    // of it, for every block

inline constexpr unsigned kMaxBlocks = kMultiprocessors * kResidentBlocks;
// With what fills up warps: less than a warp for each block of more than one.
inline constexpr unsigned kMaxThreads = kMultiprocessors * 2 * kResidentThreads;

inline constexpr std::size_t kGuardBytes = std::size_t{64} << 10;
inline constexpr std::size_t kStackBytes = std::size_t{192} << 10;  // holds a kernel's parameters

// Where a block's shared memory lies in its slot: what the kernel declares, then what the launch
// asks for, with a gap behind either.
inline constexpr std::size_t kDynamicShared = std::size_t{64} << 10;
inline constexpr std::size_t kSharedSlot = std::size_t{256} << 10;

int compute_capability();  // 10 * major + minor; EMULATOR_COMPUTE_CAPABILITY, else 90

struct Barrier {
    unsigned first_warp, end_warp;  // who meets here
    unsigned expected;              // threads
    unsigned arrived = 0;
    unsigned exited = 0;  // threads that can not come any more
    std::uint16_t epoch = 0;
    Where where{};
};

struct Cluster {
    unsigned first_block;  // among the resident ones
    unsigned blocks;
    Barrier barrier;
};

struct Block {
    uint3 index;
    Cluster* cluster;
    unsigned char* shared;  // its slot
    std::size_t static_shared;
    Barrier barrier;
};

struct Warp {
    unsigned ready = 0;    // lanes that can run
    unsigned waiting = 0;  // lanes in a warp operation
    unsigned exited = 0;   // lanes that have ended, or never were
    std::uint16_t epoch = 0;
};

struct Thread {
    Fiber fiber;
    const unsigned char* stack;
    Block* block;
    Warp* warp;
    unsigned lane;
    uint3 index;
    bool has_shared;
    Where where;                                        // it waits
    std::vector<std::pair<void*, const void*>> copies;  // that it has not waited for
    // The warp operation in which it waits; its result is left in `bits`.
    WarpOperation operation;
    unsigned mask;
    int operand, width;
    std::uint64_t bits;
};

// Marsaglia's xorshift64*: cheap, as one number is drawn for every turn.
struct Random {
    using result_type = std::uint64_t;
    static constexpr result_type min() { return 0; }
    static constexpr result_type max() { return ~result_type{} >> 7; }

    std::uint64_t state = 1;  // never 0

    result_type operator()() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return (state * 0x2545f4914f6cdd1du) >> 7;  // low bits are the weaker ones
    }
};

struct Machine {
    dim3 block_dim, grid_dim;
    std::size_t dynamic_shared = 0;
    bool is_cooperative = false;
    Call call{};

    std::vector<Thread> threads;  // the resident ones, kWarpLanes for each warp
    std::vector<Warp> warps;
    std::vector<Block> blocks;
    std::vector<Cluster> clusters;
    Barrier grid{};
    std::vector<Warp*> ready_warps;  // but the running thread's
    unsigned alive = 0;              // threads that have not ended

    Fiber host;
    unsigned char* stacks;  // room for kMaxThreads of them, each with a guard below
    std::size_t usable_stacks = 0;
    unsigned char* shared;  // kMaxBlocks slots

    Random random;
    std::vector<const void*> launched;  // kernels, oldest first

    // Of the launch: what ended it, and which instruction that was in.
    cudaError_t error = cudaSuccess;
    std::string fault;
    const void* fault_code = nullptr;

    Machine();
};

extern Machine machine;

// The thread of the kernel that this thread of the host runs; none outside kernels.
extern constinit thread_local Thread* current __attribute__((tls_model("initial-exec")));

// Ends the launch. `code` is an address in the instruction stream of the kernel, if known.
[[noreturn]] void fault(cudaError_t error, std::string what, const void* code = nullptr);

// Lets another thread run, or this one go on.
void yield();

// Runs a kernel to its end. `why` is left as it is unless a fault ended it.
cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const Call& call, std::string& why);

// What stands at an address of the program: the function with its file and line, and the next few
// functions into which it is inlined; or the outermost of them all, by name alone.
std::string describe_code(const void* code);
std::string outermost_function(const void* code);

enum class How { read, write, atomic };

// Looks at an access of the running thread to shared memory, and ends the launch if there is
// something wrong with it. False for addresses that are not shared memory at all.
bool access_shared(std::uintptr_t address, std::size_t bytes, How how, const void* code);
void forget_shared(const Block& block);

}  // namespace emulator

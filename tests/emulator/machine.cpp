#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <map>
#include <mutex>
#include <numeric>
#include <string_view>
#include <system_error>

#include <cooperative_groups.h>

namespace emulator {

constinit thread_local Thread* current = nullptr;
Machine machine;

namespace {

std::map<const void*, std::size_t> dynamic_shared_limits;  // of kernels that asked
std::mutex launching;  // launches run one after another, as on one stream

unsigned char* reserve(std::size_t bytes, int protection) {
    void* const memory =
        mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    return static_cast<unsigned char*>(memory);
}

std::string place(const Where& where) {
    std::string const file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same_place(const Where& a, const Where& b) {
    return a.line() == b.line() && std::string_view(a.file_name()) == b.file_name();
}

std::string text(const uint3& index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

std::uint64_t volume(const dim3& size) { return std::uint64_t{size.x} * size.y * size.z; }

uint3 index_in(const dim3& size, std::uint64_t i) {
    return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
            static_cast<unsigned>(i / size.x / size.y)};
}

// ------------------------------------------------------------------ taking turns

void switch_to(Thread* next) {
    Fiber& from = current == nullptr ? machine.host : current->fiber;
    current = next;
    Fiber::switch_over(from, next == nullptr ? machine.host : next->fiber);
}

std::string who_waits_where() {
    std::map<std::string, unsigned> waiting;
    for (const Thread& thread : machine.threads) {
        if (!(thread.warp->exited >> thread.lane & 1)) ++waiting[place(thread.where)];
    }
    std::string list;
    for (const auto& [where, threads] : waiting) {
        list += (list.empty() ? "" : ", ") + std::to_string(threads) + " threads at " + where;
    }
    return list;
}

// Runs another thread, of this warp while it has one that can run.
void run_next(Warp* warp) {
    if (warp == nullptr || warp->ready == 0) {
        std::vector<Warp*>& others = machine.ready_warps;
        if (others.empty()) {
            if (machine.alive > 0) {
                fault(cudaErrorLaunchFailure, "deadlock: " + who_waits_where());
            }
            return switch_to(nullptr);
        }
        std::swap(others[machine.random() % others.size()], others.back());
        warp = others.back();
        others.pop_back();
    }
    int const turn = static_cast<int>(machine.random() % kWarpLanes);
    unsigned const lane = (std::countr_zero(std::rotr(warp->ready, turn)) + turn) % kWarpLanes;
    Thread* const next = &machine.threads[(warp - machine.warps.data()) * kWarpLanes + lane];
    if (next != current) switch_to(next);
}

// What a thread's fiber runs.
void run_thread() {
    machine.call.run(machine.call.context);
    Thread& thread = *current;
    for (Barrier* const barrier :
         {&thread.block->barrier, &thread.block->cluster->barrier, &machine.grid}) {
        ++barrier->exited;
        if (barrier->arrived > 0) {
            fault(cudaErrorLaunchFailure,
                  "divergent barrier: the thread has ended and others wait at " +
                      place(barrier->where));
        }
    }
    --machine.alive;
    thread.warp->ready &= ~(1u << thread.lane);
    thread.warp->exited |= 1u << thread.lane;
    run_next(thread.warp);
}

void meet(Barrier& barrier, const Where& where) {
    Thread& thread = *current;
    if (barrier.exited > 0) {
        fault(cudaErrorLaunchFailure, "divergent barrier: the thread comes to " + place(where) +
                                          " and " + std::to_string(barrier.exited) +
                                          " others have ended");
    }
    if (barrier.arrived > 0 && !same_place(barrier.where, where)) {
        fault(cudaErrorLaunchFailure, "divergent barrier: the thread comes to " + place(where) +
                                          " and others wait at " + place(barrier.where));
    }
    barrier.where = thread.where = where;
    if (++barrier.arrived < barrier.expected) {
        thread.warp->ready &= ~(1u << thread.lane);
        return run_next(thread.warp);
    }
    barrier.arrived = 0;
    ++barrier.epoch;
    for (unsigned i = barrier.first_warp; i < barrier.end_warp; ++i) {
        Warp& warp = machine.warps[i];
        warp.ready = ~warp.exited;
        if (&warp != thread.warp) machine.ready_warps.push_back(&warp);
    }
}

// ------------------------------------------------------------------ launches

struct Shape {
    unsigned block_threads;
    std::uint64_t blocks;
    unsigned cluster_blocks = 1;
    bool is_cooperative = false;

    unsigned block_warps() const { return (block_threads + kWarpLanes - 1) / kWarpLanes; }
};

// How many blocks the device holds at once.
unsigned resident_blocks(const Shape& shape, std::size_t shared) {
    auto const by_shared = static_cast<unsigned>(kResidentShared / (shared + kReservedShared));
    unsigned const by_threads = kResidentThreads / shape.block_threads;
    return kMultiprocessors * std::min({by_shared, by_threads, kResidentBlocks});
}

// The error with which CUDA refuses a launch whose blocks use this much shared memory.
cudaError_t examine_shared(const Shape& shape, const void* kernel, std::size_t dynamic_shared,
                           std::size_t static_shared) {
    std::size_t const shared = static_shared + dynamic_shared;
    auto const limit = dynamic_shared_limits.find(kernel);
    bool const is_allowed = limit == dynamic_shared_limits.end()
                                ? shared <= kUsualShared
                                : dynamic_shared <= limit->second && shared <= kMaxShared;
    if (!is_allowed) return cudaErrorInvalidValue;
    unsigned const resident = resident_blocks(shape, shared);
    if (shape.cluster_blocks > resident) return cudaErrorInvalidClusterSize;
    if (shape.is_cooperative && shape.blocks > resident) return cudaErrorCooperativeLaunchTooLarge;
    return cudaSuccess;
}

// The error with which CUDA refuses such a launch.
cudaError_t examine(const cudaLaunchConfig_t& config, const Call& call, Shape& shape) {
    std::uint64_t const threads = volume(config.blockDim);
    shape.blocks = volume(config.gridDim);
    if (shape.blocks == 0 || config.gridDim.x > 0x7fffffffu || config.gridDim.y > 0xffff ||
        config.gridDim.z > 0xffff || threads == 0 || threads > kMaxBlockThreads ||
        config.blockDim.z > 64) {
        return cudaErrorInvalidConfiguration;
    }
    shape.block_threads = static_cast<unsigned>(threads);
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config.attrs[i];
        if (attribute.id == cudaLaunchAttributeCooperative) {
            shape.is_cooperative = attribute.val.cooperative != 0;
        } else {
            auto const [x, y, z] = attribute.val.clusterDim;
            if (compute_capability() < 90) return cudaErrorNotSupported;
            if (x == 0 || x > kMaxClusterBlocks || y != 1 || z != 1 || config.gridDim.x % x != 0) {
                return cudaErrorInvalidClusterSize;
            }
            shape.cluster_blocks = x;
        }
    }
    if (call.parameter_bytes > kMaxParameterBytes) return cudaErrorInvalidValue;
    return examine_shared(shape, call.kernel, config.dynamicSmemBytes, 0);
}

unsigned char* stack_of(std::size_t thread) {
    auto const nth = [](std::size_t n) {
        return machine.stacks + n * (kGuardBytes + kStackBytes) + kGuardBytes;
    };
    while (machine.usable_stacks <= thread) {
        mprotect(nth(machine.usable_stacks++), kStackBytes, PROT_READ | PROT_WRITE);
    }
    return nth(thread);
}

// Makes these clusters of the grid the resident ones, ready to run.
void place_clusters(const Shape& shape, const std::uint64_t* numbers, unsigned clusters) {
    unsigned const blocks = clusters * shape.cluster_blocks;
    unsigned const warps = shape.block_warps();
    machine.warps.assign(blocks * warps, {});
    machine.threads.resize(blocks * warps * kWarpLanes);
    machine.blocks.resize(blocks);
    machine.clusters.resize(clusters);
    machine.ready_warps.clear();
    machine.alive = blocks * shape.block_threads;
    machine.grid = {0, blocks * warps, machine.alive};
    for (unsigned c = 0; c < clusters; ++c) {
        unsigned const first = c * shape.cluster_blocks;
        unsigned const end = first + shape.cluster_blocks;
        machine.clusters[c] = {
            first,
            shape.cluster_blocks,
            {first * warps, end * warps, shape.cluster_blocks * shape.block_threads}};
        for (unsigned b = first; b < end; ++b) {
            std::uint64_t const number = numbers[c] * shape.cluster_blocks + (b - first);
            machine.blocks[b] = {index_in(machine.grid_dim, number),
                                 &machine.clusters[c],
                                 machine.shared + b * kSharedSlot,
                                 0,
                                 {b * warps, (b + 1) * warps, shape.block_threads}};
        }
    }
    for (std::size_t i = 0; i < machine.threads.size(); ++i) {
        Thread& thread = machine.threads[i];
        thread.warp = &machine.warps[i / kWarpLanes];
        thread.lane = i % kWarpLanes;
        thread.block = &machine.blocks[i / kWarpLanes / warps];
        std::size_t const number = i % (warps * kWarpLanes);
        if (number >= shape.block_threads) {
            thread.warp->exited |= 1u << thread.lane;
            continue;
        }
        thread.warp->ready |= 1u << thread.lane;
        thread.index = index_in(machine.block_dim, number);
        thread.has_shared = false;
        thread.copies.clear();
        unsigned char* const stack = stack_of(i);
        thread.stack = stack;
        // Stacks that all began at the same place of a page would share a few lines of the cache.
        thread.fiber.prepare(stack, kStackBytes - i % 64 * 64, &run_thread);
    }
    for (Warp& warp : machine.warps) machine.ready_warps.push_back(&warp);
}

void run_grid(const Shape& shape) {
    std::vector<std::uint64_t> order(shape.blocks / shape.cluster_blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), machine.random);
    std::size_t const most = resident_blocks(shape, machine.dynamic_shared) / shape.cluster_blocks;
    for (std::size_t done = 0; done < order.size() && machine.error == cudaSuccess;) {
        std::size_t const together =
            shape.is_cooperative
                ? order.size()
                : std::min({order.size() - done, most, std::size_t{1 + machine.random() % 3}});
        place_clusters(shape, &order[done], static_cast<unsigned>(together));
        run_next(nullptr);
        for (const Block& block : machine.blocks) forget_shared(block);
        done += together;
    }
}

}  // namespace

Machine::Machine()
    : stacks(reserve(kMaxThreads * (kGuardBytes + kStackBytes), PROT_NONE)),
      shared(reserve(kMaxBlocks * kSharedSlot, PROT_READ | PROT_WRITE)) {}

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const Call& call, std::string& why) {
    std::lock_guard<std::mutex> const lock(launching);
    Shape shape{};
    if (cudaError_t const error = examine(config, call, shape); error != cudaSuccess) return error;
    machine.block_dim = config.blockDim;
    machine.grid_dim = config.gridDim;
    machine.dynamic_shared = config.dynamicSmemBytes;
    machine.is_cooperative = shape.is_cooperative;
    machine.call = call;
    machine.error = cudaSuccess;
    machine.launched.push_back(call.kernel);
    run_grid(shape);
    if (machine.error != cudaSuccess) {
        why = machine.fault + " of " + outermost_function(call.kernel);
        if (machine.fault_code != nullptr) why += ", in " + describe_code(machine.fault_code);
    }
    // What a kernel declares is known once it has run.
    if (machine.error != cudaSuccess) return machine.error;
    return examine_shared(shape, call.kernel, config.dynamicSmemBytes,
                          machine.blocks.front().static_shared);
}

cudaError_t max_active_clusters(int* clusters, const cudaLaunchConfig_t& config) {
    Shape shape{};
    cudaError_t const error = examine(config, {}, shape);
    *clusters = error == cudaSuccess
                    ? resident_blocks(shape, config.dynamicSmemBytes) / shape.cluster_blocks
                    : 0;
    return error;
}

cudaError_t allow_dynamic_shared(const void* kernel, int bytes) {
    if (bytes < 0 || static_cast<unsigned>(bytes) > kMaxShared) {
        return cudaErrorInvalidValue;
    }
    std::lock_guard<std::mutex> const lock(launching);
    dynamic_shared_limits[kernel] = bytes;
    return cudaSuccess;
}

void fault(cudaError_t error, std::string what, const void* code) {
    machine.error = error;
    machine.fault = std::move(what) + ", block " + text(current->block->index) + ", thread " +
                    text(current->index);
    machine.fault_code = code;
    switch_to(nullptr);
    __builtin_unreachable();
}

// ------------------------------------------------------------------ what kernels call

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
uint3 block_dim() { return {machine.block_dim.x, machine.block_dim.y, machine.block_dim.z}; }
uint3 grid_dim() { return {machine.grid_dim.x, machine.grid_dim.y, machine.grid_dim.z}; }

void sync_block(Where where) { meet(current->block->barrier, where); }

void sync_cluster(Where where) { meet(current->block->cluster->barrier, where); }

void sync_grid(Where where) {
    if (!machine.is_cooperative) {
        fault(cudaErrorLaunchFailure,
              "a grid barrier at " + place(where) + " in a launch that is not cooperative");
    }
    meet(machine.grid, where);
}

unsigned cluster_num_blocks() { return current->block->cluster->blocks; }

unsigned cluster_block_rank() {
    return static_cast<unsigned>(current->block - machine.blocks.data()) -
           current->block->cluster->first_block;
}

void* map_shared_rank(const void* address, unsigned rank) {
    const Block& own = *current->block;
    auto const offset = static_cast<std::size_t>(static_cast<const unsigned char*>(address) -
                                                 own.shared);  // huge where it is in front
    if (offset >= kSharedSlot || rank >= own.cluster->blocks) {
        fault(cudaErrorIllegalAddress,
              "map_shared_rank() of what is not the block's shared memory or to a rank that the "
              "cluster does not have",
              __builtin_return_address(0));
    }
    return machine.blocks[own.cluster->first_block + rank].shared + offset;
}

std::uint64_t warp_operation(WarpOperation operation, unsigned mask, std::uint64_t bits,
                             int operand, int width, Where where) {
    Thread& self = *current;
    Warp& warp = *self.warp;
    unsigned const own_bit = 1u << self.lane;
    if (!(mask & own_bit) || (mask & warp.exited)) {
        fault(cudaErrorLaunchFailure,
              "divergent warp operation: the mask at " + place(where) +
                  (mask & own_bit ? " names lanes that have ended" : " lacks the thread's lane"));
    }
    self.operation = operation;
    self.mask = mask;
    self.bits = bits;
    self.operand = operand;
    self.width = width;
    self.where = where;
    warp.waiting |= own_bit;
    if ((warp.waiting & mask) != mask) {
        warp.ready &= ~own_bit;
        run_next(&warp);
        return self.bits;
    }

    // The last of the mask's lanes finds every lane's result.
    Thread* const lanes = &self - self.lane;
    std::uint64_t sent[kWarpLanes];
    std::uint64_t ballot = 0;
    for (unsigned left = mask; left != 0; left &= left - 1) {
        int const i = std::countr_zero(left);
        const Thread& lane = lanes[i];
        if (lane.operation != operation || lane.mask != mask || lane.width != width) {
            fault(cudaErrorLaunchFailure, "divergent warp operation: the thread comes to " +
                                              place(where) + " and lane " + std::to_string(i) +
                                              " waits at " + place(lane.where));
        }
        sent[i] = lane.bits;
        ballot |= (lane.bits & 1) << i;
    }
    for (unsigned left = mask; left != 0; left &= left - 1) {
        int const i = std::countr_zero(left);
        Thread& lane = lanes[i];
        int const first = i & ~(width - 1);
        int const end = first + width;
        int from = i;
        switch (operation) {
            case WarpOperation::sync:
                break;
            case WarpOperation::ballot:
                lane.bits = ballot;
                continue;
            case WarpOperation::shuffle:
                from = first + (lane.operand & (width - 1));
                break;
            case WarpOperation::shuffle_up:
                if (i - lane.operand >= first) from = i - lane.operand;
                break;
            case WarpOperation::shuffle_down:
                if (i + lane.operand < end) from = i + lane.operand;
                break;
            case WarpOperation::shuffle_xor:
                if ((i ^ lane.operand) < end) from = i ^ lane.operand;
                break;
        }
        if (!(mask >> from & 1)) {
            fault(cudaErrorLaunchFailure, "shuffle at " + place(where) + ": lane " +
                                              std::to_string(i) + " reads lane " +
                                              std::to_string(from) + ", which takes no part");
        }
        lane.bits = sent[from];
    }
    if (operation == WarpOperation::sync) ++warp.epoch;
    warp.waiting &= ~mask;
    warp.ready |= mask;
    return self.bits;
}

void yield() {
    machine.ready_warps.push_back(current->warp);
    run_next(nullptr);
}

}  // namespace emulator

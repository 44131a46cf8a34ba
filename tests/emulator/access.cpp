// The runtime behind -fsanitize=thread,alignment,bounds: sees every access of a kernel to memory
// before it happens. What is passed by memcpy or memset in pieces of more than 16 bytes is not
// seen.
#include <link.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "machine.h"
#include "memory.h"

namespace emulator {
namespace {

constexpr std::size_t kCopyBytes = 16;  // of an asynchronous copy

// ------------------------------------------------------------------ shared memory

// When and by whom a byte of shared memory was accessed. Two accesses are ordered if one thread
// made both, or if a barrier lies between them that covers both. One record may stand for several
// threads: of one warp, one block or one cluster.
enum Scope : std::uint16_t { kThread, kWarp, kBlock, kCluster };

struct Access {
    std::uint16_t thread : 14;  // its number among the resident ones + 1; 0: never
    std::uint16_t scope : 2;
    std::uint16_t warp_epoch, block_epoch, cluster_epoch;

    bool operator==(const Access& other) const {
        return std::bit_cast<std::uint64_t>(*this) == std::bit_cast<std::uint64_t>(other);
    }
};

static_assert(kMaxThreads < 1 << 14);

struct History {
    Access written, read;

    bool operator==(const History&) const = default;
};

// Of every byte of every slot; touched only where kernels have shared memory.
History* history_of(const unsigned char* shared) {
    static auto* const all =
        static_cast<History*>(std::calloc(kMaxBlocks * kSharedSlot, sizeof(History)));
    return all + (shared - machine.shared);
}

Access access_now() {
    const Thread& thread = *current;
    const Cluster& cluster = *thread.block->cluster;
    std::uint16_t const beyond_block = cluster.barrier.epoch + machine.grid.epoch;
    return {static_cast<std::uint16_t>(&thread - machine.threads.data() + 1), 0, thread.warp->epoch,
            static_cast<std::uint16_t>(thread.block->barrier.epoch + beyond_block), beyond_block};
}

// The least set of threads that holds those of both accesses.
std::uint16_t joint_scope(const Access& a, const Access& b) {
    std::uint16_t const scope = std::max<std::uint16_t>(a.scope, b.scope);
    if (a.thread == b.thread) return scope;
    const Thread& x = machine.threads[a.thread - 1];
    const Thread& y = machine.threads[b.thread - 1];
    Scope const distance = x.warp == y.warp ? kWarp : x.block == y.block ? kBlock : kCluster;
    return std::max<std::uint16_t>(scope, distance);
}

bool is_ordered(const Access& before, const Access& now) {
    if (before.thread == 0) return true;
    switch (joint_scope(before, now)) {
        case kThread:
            return true;
        case kWarp:
            if (before.warp_epoch != now.warp_epoch) return true;
            [[fallthrough]];
        case kBlock:
            return before.block_epoch != now.block_epoch;
        case kCluster:
            break;
    }
    return before.cluster_epoch != now.cluster_epoch;
}

// The history of a byte after one more access, or what is wrong with this access. Atomic accesses
// are ordered among themselves and leave no trace.
History follow(const History& before, const Access& now, How how, const char*& wrong) {
    History after = before;
    if (how != How::write && before.written.thread == 0) {
        wrong = "shared memory that was never written";
    } else if (!is_ordered(before.written, now) ||
               (how != How::read && !is_ordered(before.read, now))) {
        wrong = "race: shared memory that another thread accesses with no barrier between";
    } else if (how == How::write) {
        after.written = now;
    } else if (how == How::read && is_ordered(before.read, now)) {
        after.read = now;
    } else if (how == How::read) {
        after.read.scope = joint_scope(before.read, now);
    }
    return after;
}

// ------------------------------------------------------------------ all memory

std::string text(const char* what, std::uintptr_t address, std::size_t bytes, How how) {
    constexpr const char* kNames[] = {"read", "write", "atomic access"};
    char line[160];
    std::snprintf(line, sizeof(line), "%s: %s of %zu bytes at %#zx", what,
                  kNames[static_cast<int>(how)], bytes, static_cast<std::size_t>(address));
    return line;
}

// How far from the nearest device memory an address lies.
std::string neighbourhood(std::uintptr_t address) {
    constexpr std::uintptr_t kFar = 1 << 12;
    for (std::uintptr_t distance = 1; distance < std::min(kFar, address); ++distance) {
        if (device_memory.holds(address - distance, 1)) {
            return ", " + std::to_string(distance - 1) + " bytes behind device memory";
        }
        if (device_memory.holds(address + distance, 1)) {
            return ", " + std::to_string(distance) + " bytes in front of device memory";
        }
    }
    return ", far from device memory";
}

// Constants of the program are readable on a card too.
bool is_constant(std::uintptr_t address, std::size_t bytes) {
    struct Range {
        std::uintptr_t begin, end;
    } range{address, address + bytes};
    return dl_iterate_phdr(
               [](dl_phdr_info* info, std::size_t, void* data) {
                   const Range& wanted = *static_cast<const Range*>(data);
                   for (int i = 0; i < info->dlpi_phnum; ++i) {
                       const ElfW(Phdr) & segment = info->dlpi_phdr[i];
                       std::uintptr_t const begin = info->dlpi_addr + segment.p_vaddr;
                       if (segment.p_type == PT_LOAD && !(segment.p_flags & PF_W) &&
                           wanted.begin >= begin && wanted.end <= begin + segment.p_memsz) {
                           return 1;
                       }
                   }
                   return 0;
               },
               &range) != 0;
}

__attribute__((noinline)) void check(std::uintptr_t address, std::size_t bytes, How how,
                                     const void* code) {
    if (address - reinterpret_cast<std::uintptr_t>(current->stack) < kStackBytes) return;
    if (access_shared(address, bytes, how, code)) return;
    if (device_memory.holds(address, bytes)) return;
    if (how == How::read && is_constant(address, bytes)) return;
    fault(cudaErrorIllegalAddress,
          text("out of bounds", address, bytes, how) + neighbourhood(address), code);
}

template <unsigned bytes>
__attribute__((always_inline)) inline void check(const void* pointer, How how, const void* code) {
    if (current == nullptr) return;
    auto const address = reinterpret_cast<std::uintptr_t>(pointer);
    if (!device_memory.holds_aligned<bytes>(address)) check(address, bytes, how, code);
}

}  // namespace

namespace {

// When a copy lands, between its beginning and the wait for it, is not known.
void require_no_copy_under_way(std::uintptr_t address, std::size_t bytes, How how,
                               std::size_t place, const void* code) {
    for (auto const& [shared, global] : current->copies) {
        auto const to = reinterpret_cast<std::uintptr_t>(shared);
        if (address < to + kCopyBytes && to < address + bytes) {
            fault(cudaErrorLaunchFailure,
                  text("shared memory to which a copy is under way", place, bytes, how), code);
        }
    }
}

}  // namespace

bool access_shared(std::uintptr_t address, std::size_t bytes, How how, const void* code) {
    std::uintptr_t const offset = address - reinterpret_cast<std::uintptr_t>(machine.shared);
    if (offset >= kMaxBlocks * kSharedSlot) return false;
    std::size_t const slot = offset / kSharedSlot;
    std::size_t const in_slot = offset % kSharedSlot;
    std::size_t const place = in_slot < kDynamicShared ? in_slot : in_slot - kDynamicShared;
    const Cluster& cluster = *current->block->cluster;
    bool const in_cluster =
        slot >= cluster.first_block && slot < cluster.first_block + cluster.blocks;
    if (!in_cluster || !(in_slot + bytes <= machine.blocks[slot].static_shared ||
                         (in_slot >= kDynamicShared &&
                          in_slot + bytes <= kDynamicShared + machine.dynamic_shared))) {
        fault(cudaErrorIllegalAddress, text("out of bounds of shared memory", place, bytes, how),
              code);
    }
    if (machine.blocks[slot].barrier.exited == machine.blocks[slot].barrier.expected) {
        fault(cudaErrorIllegalAddress,
              text("shared memory of a block that has ended", place, bytes, how), code);
    }
    require_no_copy_under_way(address, bytes, how, place, code);
    // Adjacent bytes mostly have the same history, which is then looked at once.
    Access const now = access_now();
    History* const bytes_begin = history_of(machine.shared + offset);
    History before{}, after{};
    for (History* byte = bytes_begin; byte < bytes_begin + bytes; ++byte) {
        if (byte == bytes_begin || *byte != before) {
            before = *byte;
            const char* wrong = nullptr;
            after = follow(before, now, how, wrong);
            if (wrong) fault(cudaErrorLaunchFailure, text(wrong, place, bytes, how), code);
        }
        *byte = after;
    }
    return true;
}

void forget_shared(const Block& block) {
    std::fill_n(history_of(block.shared), block.static_shared, History{});
    std::fill_n(history_of(block.shared + kDynamicShared), machine.dynamic_shared, History{});
}

void* block_shared(std::size_t bytes, std::size_t) {
    Thread& thread = *current;
    Block& block = *thread.block;
    if (thread.has_shared || (block.static_shared != 0 && block.static_shared != bytes) ||
        bytes > kUsualShared) {
        fault(cudaErrorLaunchFailure,
              "shared memory declared twice, differently by two threads, or over 48 KiB",
              __builtin_return_address(0));
    }
    thread.has_shared = true;
    block.static_shared = bytes;
    return block.shared;
}

void* dynamic_shared() { return current->block->shared + kDynamicShared; }

void copy_async(void* shared, const void* global) { current->copies.emplace_back(shared, global); }

void wait_for_copies() {
    auto const copies = std::exchange(current->copies, {});
    for (auto const& [shared, global] : copies) {
        auto const to = reinterpret_cast<std::uintptr_t>(shared);
        auto const from = reinterpret_cast<std::uintptr_t>(global);
        const void* const code = __builtin_return_address(0);
        if (to % kCopyBytes != 0 || from % kCopyBytes != 0) {
            fault(cudaErrorMisalignedAddress, text("misaligned copy", from, kCopyBytes, How::read),
                  code);
        }
        check(from, kCopyBytes, How::read, code);
        if (!access_shared(to, kCopyBytes, How::write, code)) {
            fault(cudaErrorIllegalAddress,
                  text("copy past shared memory", to, kCopyBytes, How::write), code);
        }
        std::memcpy(shared, global, kCopyBytes);
    }
}

std::uint64_t atomic(AtomicOperation operation, void* address, unsigned bytes, bool is_signed,
                     std::uint64_t operand, std::uint64_t compare) {
    yield();
    auto const apply = [&]<class U, class S>(U, S) {
        U const value = static_cast<U>(operand);
        U& target = *static_cast<U*>(address);
        U const old = target;
        bool const is_less = is_signed ? static_cast<S>(value) < static_cast<S>(old) : value < old;
        switch (operation) {
            case AtomicOperation::add:
                target = old + value;
                break;
            case AtomicOperation::min:
                if (is_less) target = value;
                break;
            case AtomicOperation::max:
                if (!is_less) target = value;
                break;
            case AtomicOperation::exchange:
                target = value;
                break;
            case AtomicOperation::compare_and_swap:
                if (old == static_cast<U>(compare)) target = value;
                break;
        }
        return std::uint64_t{old};
    };
    auto const at = reinterpret_cast<std::uintptr_t>(address);
    const void* const code = __builtin_return_address(0);
    if (at % bytes != 0) {
        fault(cudaErrorMisalignedAddress, text("misaligned atomic", at, bytes, How::atomic), code);
    }
    check(at, bytes, How::atomic, code);
    return bytes == 4 ? apply(std::uint32_t{}, std::int32_t{})
                      : apply(std::uint64_t{}, std::int64_t{});
}

}  // namespace emulator

// ------------------------------------------------------------------ what the compiler calls

using emulator::current;
using emulator::fault;
using emulator::How;

#define EMULATOR_ACCESS(bytes)                                              \
    extern "C" void __tsan_read##bytes(void* p) {                           \
        emulator::check<bytes>(p, How::read, __builtin_return_address(0));  \
    }                                                                       \
    extern "C" void __tsan_write##bytes(void* p) {                          \
        emulator::check<bytes>(p, How::write, __builtin_return_address(0)); \
    }                                                                       \
    extern "C" void __tsan_unaligned_read##bytes(void* p) {                 \
        emulator::check<bytes>(p, How::read, __builtin_return_address(0));  \
    }                                                                       \
    extern "C" void __tsan_unaligned_write##bytes(void* p) {                \
        emulator::check<bytes>(p, How::write, __builtin_return_address(0)); \
    }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
#undef EMULATOR_ACCESS

extern "C" {

void __tsan_init() {}

void __tsan_read_range(void* p, std::size_t bytes) {
    if (current == nullptr) return;
    emulator::check(reinterpret_cast<std::uintptr_t>(p), bytes, How::read,
                    __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t bytes) {
    if (current == nullptr) return;
    emulator::check(reinterpret_cast<std::uintptr_t>(p), bytes, How::write,
                    __builtin_return_address(0));
}

// Launchers' static variables ask this of their guards.
std::uint8_t __tsan_atomic8_load(const volatile std::uint8_t* p, int) {
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

// The layouts are those of libubsan, version 1.
struct SourceLocation {
    const char* file;
    std::uint32_t line, column;
};
struct TypeDescriptor {
    std::uint16_t kind, info;
    char name[1];
};
struct TypeMismatch {
    SourceLocation location;
    const TypeDescriptor* type;
    std::uint8_t log_alignment, kind;
};
struct OutOfBounds {
    SourceLocation location;
    const TypeDescriptor *array, *index;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, std::uintptr_t address) {
    if (current == nullptr) return;
    fault(cudaErrorMisalignedAddress,
          "misaligned access: " + std::string(data->type->name) + " at " + std::to_string(address),
          __builtin_return_address(0));
}
void __ubsan_handle_out_of_bounds(OutOfBounds* data, std::uintptr_t index) {
    if (current == nullptr) return;
    fault(cudaErrorIllegalAddress,
          "out of bounds: index " + std::to_string(static_cast<std::ptrdiff_t>(index)) + " of " +
              data->array->name,
          __builtin_return_address(0));
}

}  // extern "C"

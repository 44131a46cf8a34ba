// Makes what torch's CPU allocator hands out the emulated device's memory.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "memory.h"

namespace emulator {
namespace {

class Allocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(std::size_t bytes) override {
        void* const memory = bytes == 0 ? nullptr : emulator::allocate(bytes);
        return {memory, memory, &release, c10::Device(c10::kCPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override {
        std::memcpy(to, from, bytes);
    }
};

[[maybe_unused]] bool const installed = [] {
    static auto* const allocator = new Allocator;  // outlives every tensor
    c10::SetCPUAllocator(allocator, /*priority=*/1);
    return true;
}();

}  // namespace
}  // namespace emulator

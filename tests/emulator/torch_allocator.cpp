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
        c10::profiledCPUMemoryReporter().New(memory, bytes);
        return {memory, memory, &release, c10::Device(c10::kCPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override {
        std::memcpy(to, from, bytes);
    }

private:
    static void release(void* memory) {
        c10::profiledCPUMemoryReporter().Delete(memory);
        emulator::release(memory);
    }
};

// torch.UntypedStorage(n) asks torch's default allocator even where another one is set as the
// CPU's: so that object becomes one of this class. Neither class has any members. What it has
// handed out before keeps its own deleter.
[[maybe_unused]] bool const installed = [] {
    static auto* const ours = new Allocator;
    std::memcpy(static_cast<void*>(c10::GetDefaultCPUAllocator()), static_cast<void*>(ours),
                sizeof(Allocator));
    return true;
}();
static_assert(sizeof(Allocator) == sizeof(void*));

}  // namespace
}  // namespace emulator

// Stacks that hand the processor to one another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
public:
    // Makes entry(), which must never return, what the first switch to this fiber runs.
    void prepare(void* stack, std::size_t bytes, void (*entry)());

    // Returns when something switches back to `from`.
    static void switch_over(Fiber& from, const Fiber& to);

private:
#if defined(__x86_64__)
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
};

}  // namespace emulator

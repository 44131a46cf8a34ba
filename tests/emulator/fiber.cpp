#include "fiber.h"

namespace emulator {

#if defined(__x86_64__)

// Saves what the calling convention says a function keeps, leaves the stack pointer in *from, and
// returns on the other stack.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch_stacks(void** from, void* to);
asm(R"(
    .text
    .hidden emulator_switch_stacks
    .globl emulator_switch_stacks
    .type emulator_switch_stacks, @function
emulator_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch_stacks, .-emulator_switch_stacks
)");

void Fiber::prepare(void* stack, std::size_t bytes, void (*entry)()) {
    // Six registers, the address to return to, and none to return to after that: behind a call the
    // stack pointer is 8 below a multiple of 16.
    auto* const top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes / 16 * 16);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    stack_pointer_ = top - 8;
}

void Fiber::switch_over(Fiber& from, const Fiber& to) {
    emulator_switch_stacks(&from.stack_pointer_, to.stack_pointer_);
}

#else

void Fiber::prepare(void* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
}

void Fiber::switch_over(Fiber& from, const Fiber& to) { swapcontext(&from.context_, &to.context_); }

#endif

}  // namespace emulator

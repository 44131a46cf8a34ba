#include "torch_glue/gradient_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedstep {
namespace {

// Below this the C library keeps freed memory anyway (its threshold for separate mappings).
constexpr std::size_t kSmallest = std::size_t{128} << 10;
constexpr std::size_t kLargestKept = std::size_t{1} << 30;

// Linux gives huge pages unasked only where transparent_hugepage is "always"; without them 65 MB
// are 16,000 page faults. A hint: nothing depends on the answer.
void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
    auto const address = reinterpret_cast<std::uintptr_t>(memory);
    std::uintptr_t const begin = (address + kPage - 1) & ~(kPage - 1);
    std::uintptr_t const end = (address + bytes) & ~(kPage - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Block {
    at::DataPtr memory;
    std::size_t bytes;
};

class GradientAllocator final : public c10::Allocator {
public:
    at::DataPtr allocate(std::size_t bytes) override {
        std::unique_ptr<Block> block = exchange(nullptr);
        bool const fits = block && block->bytes >= bytes && block->bytes / 2 <= bytes;
        if (!fits) {
            block.reset();  // before more is asked for
            block = std::make_unique<Block>(Block{c10::GetCPUAllocator()->allocate(bytes), bytes});
            prefer_huge_pages(block->memory.get(), bytes);
        }
        void* const memory = block->memory.get();
        return {memory, block.release(), &release, at::Device(at::kCPU)};
    }

    at::DeleterFnPtr raw_deleter() const override { return nullptr; }

    void copy_data(void* to, const void* from, std::size_t bytes) const override {
        std::memcpy(to, from, bytes);
    }

    static GradientAllocator& instance() {
        static auto* const allocator = new GradientAllocator;  // outlives every tensor
        return *allocator;
    }

private:
    static void release(void* context) {
        std::unique_ptr<Block> block(static_cast<Block*>(context));
        if (block->bytes <= kLargestKept) block = instance().exchange(std::move(block));
    }

    // Puts a block in the place of the kept one. Never waits: who finds the place taken, by another
    // thread or by one that a fork did not copy, goes without.
    std::unique_ptr<Block> exchange(std::unique_ptr<Block> block) {
        std::unique_lock<std::mutex> const lock(mutex_, std::try_to_lock);
        if (lock) std::swap(kept_, block);
        return block;
    }

    std::mutex mutex_;
    std::unique_ptr<Block> kept_;
};

}  // namespace

at::Tensor empty_gradient(const at::Tensor& like) {
    if (!like.is_non_overlapping_and_dense()) return at::empty_like(like);
    c10::Allocator* const allocator =
        like.nbytes() < kSmallest ? c10::GetCPUAllocator() : &GradientAllocator::instance();
    return at::detail::empty_strided_generic(like.sizes(), like.strides(), allocator,
                                             c10::DispatchKeySet(c10::DispatchKey::CPU),
                                             like.scalar_type());
}

}  // namespace fusedstep

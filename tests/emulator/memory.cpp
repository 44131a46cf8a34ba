#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace emulator {

bool DeviceMemory::holds(std::uintptr_t address, std::size_t bytes) const {
    std::uintptr_t const end = address + bytes;
    if (end < address) return false;
    for (std::uintptr_t at = address; at < end; at = at / 8 * 8 + 8) {
        const std::uint8_t* const known = granule(at);
        if (known == nullptr || std::min<std::uintptr_t>(end - at / 8 * 8, 8) > *known)
            return false;
    }
    return true;
}

void DeviceMemory::mark(const void* begin, std::size_t bytes, bool is_device) {
    static std::uint8_t* const whole_page = [] {
        auto* const page = new std::uint8_t[kPageBytes / 8];
        return static_cast<std::uint8_t*>(std::memset(page, 8, kPageBytes / 8));
    }();
    auto at = reinterpret_cast<std::uintptr_t>(begin);  // a multiple of 8
    for (std::uintptr_t const end = at + bytes; at < end;) {
        std::atomic<std::uint8_t*>& page = pages_[at >> kPageBits];
        std::uintptr_t const here = std::min(end - at, kPageBytes - at % kPageBytes);
        std::uint8_t* present = page.load();
        if (here == kPageBytes && (present == nullptr || present == whole_page)) {
            page = is_device ? whole_page : nullptr;
        } else {
            if (present == nullptr) {
                auto* const fresh = static_cast<std::uint8_t*>(std::calloc(kPageBytes / 8, 1));
                if (fresh == nullptr) throw std::bad_alloc();
                // Another thread may have been first.
                if (page.compare_exchange_strong(present, fresh)) {
                    present = fresh;
                } else {
                    std::free(fresh);
                }
            }
            std::uint8_t* const known = present + at % kPageBytes / 8;
            std::memset(known, is_device ? 8 : 0, (here + 7) / 8);
            if (is_device && here % 8 != 0) known[here / 8] = here % 8;
        }
        at += here;
    }
}

constexpr std::size_t kMargin = 64;  // on either side; in front, it holds the size
constexpr std::size_t kMostFilled = std::size_t{64} << 20;

void* allocate(std::size_t bytes) {
    std::size_t const whole = kMargin + (bytes + kMargin - 1) / kMargin * kMargin + kMargin;
    auto* const block = static_cast<char*>(std::aligned_alloc(kMargin, whole));
    if (block == nullptr) throw std::bad_alloc();
    std::memcpy(block, &bytes, sizeof(bytes));
    void* const memory = block + kMargin;
    if (bytes <= kMostFilled) std::memset(memory, 0xff, bytes);
    device_memory.add(memory, bytes);
    return memory;
}

void release(void* memory) {
    if (memory == nullptr) return;
    char* const block = static_cast<char*>(memory) - kMargin;
    std::size_t bytes;
    std::memcpy(&bytes, block, sizeof(bytes));
    device_memory.remove(memory, bytes);
    std::free(block);
}

}  // namespace emulator

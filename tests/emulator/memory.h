// What memory the emulated device may touch.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace emulator {

// Addresses are kept to the byte: for every eight bytes of memory, how many of them, from the first
// on, belong to the device. The table has two levels. Its pages are made where they are needed, and
// what belongs to the device as a whole shares one page.
class DeviceMemory {
public:
    void add(const void* begin, std::size_t bytes) { mark(begin, bytes, true); }
    void remove(const void* begin, std::size_t bytes) { mark(begin, bytes, false); }

    // For the sizes 1, 2, 4, 8 and 16. False where the address is not a multiple of the size.
    template <unsigned bytes>
    bool holds_aligned(std::uintptr_t address) const {
        const std::uint8_t* const known = granule(address);
        if (known == nullptr) return false;
        if constexpr (bytes == 16) {
            return address % 16 == 0 && known[0] == 8 && known[1] == 8;
        } else {
            return address % bytes == 0 && address % 8 + bytes <= *known;
        }
    }
    bool holds(std::uintptr_t address, std::size_t bytes) const;

private:
    static constexpr unsigned kPageBits = 24;
    static constexpr std::uintptr_t kPageBytes = std::uintptr_t{1} << kPageBits;
    static constexpr std::uintptr_t kPages = std::uintptr_t{1} << (48 - kPageBits);

    const std::uint8_t* granule(std::uintptr_t address) const {
        std::uintptr_t const number = address >> kPageBits;
        if (number >= kPages) return nullptr;
        const std::uint8_t* const page = pages_[number].load(std::memory_order_acquire);
        return page == nullptr ? nullptr : page + address % kPageBytes / 8;
    }
    void mark(const void* begin, std::size_t bytes, bool is_device);

    std::array<std::atomic<std::uint8_t*>, kPages> pages_;
};

inline constinit DeviceMemory device_memory{};

// Device memory of its own, with nothing that may be touched on either side. Every byte of it is
// 0xff, which is NaN in every floating-point type; over 64 MiB, pages that are never touched stay
// without memory instead.
void* allocate(std::size_t bytes);
void release(void* memory);

}  // namespace emulator

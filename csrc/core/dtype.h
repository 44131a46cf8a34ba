// Storage types, the type each is computed in, and dispatch from a runtime dtype to a C++ type.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSEDSTEP_HD __host__ __device__ __forceinline__
#else
// always_inline is a contract, not a hint: the same header is compiled at several instruction-set
// levels in one library, and an out-of-line copy would let the linker keep a too-new one.
#define FUSEDSTEP_HD inline __attribute__((always_inline))
#endif

namespace fusedstep {

enum class DType : std::uint8_t { float32, float64, bfloat16, float16 };

// 16-bit types are storage only: every computation reads them as float and rounds once on store.
struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

template <class T>
struct Accumulate {
    using type = float;
};
template <>
struct Accumulate<double> {
    using type = double;
};
// float64 is computed in float64, everything else in float32.
template <class T>
using acc_t = typename Accumulate<T>::type;

template <class T>
struct Tag {
    using type = T;
};

// Calls f(Tag<T>{}) with the storage type of dtype.
template <class F>
FUSEDSTEP_HD decltype(auto) dispatch(DType dtype, F&& f) {
    switch (dtype) {
        case DType::float64:
            return f(Tag<double>{});
        case DType::bfloat16:
            return f(Tag<bfloat16>{});
        case DType::float16:
            return f(Tag<float16>{});
        case DType::float32:
            break;
    }
    return f(Tag<float>{});
}

FUSEDSTEP_HD constexpr std::int64_t item_size(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

template <class To, class From>
FUSEDSTEP_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

FUSEDSTEP_HD float to_acc(float x) { return x; }
FUSEDSTEP_HD double to_acc(double x) { return x; }
FUSEDSTEP_HD float to_acc(bfloat16 x) {
#if defined(__CUDA_ARCH__)
    float y;  // one instruction; a shift takes two where x is the upper half of a register
    asm("mov.b32 %0, {0, %1};" : "=f"(y) : "h"(x.bits));
    return y;
#else
    return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
#endif
}
FUSEDSTEP_HD float to_acc(float16 x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    std::uint32_t const sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    std::uint32_t const magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // inf, NaN
        return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
    }
    // Exponents are rebased by a multiplication, which is exact and normalises subnormals too.
    return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) *
                                                          bit_cast<float>(0x77800000u)));
#endif
}

template <class T>
FUSEDSTEP_HD T from_acc(acc_t<T> x);
template <>
FUSEDSTEP_HD float from_acc<float>(float x) {
    return x;
}
template <>
FUSEDSTEP_HD double from_acc<double>(double x) {
    return x;
}
template <>
FUSEDSTEP_HD bfloat16 from_acc<bfloat16>(float x) {  // round to nearest even
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    std::uint32_t const bits = bit_cast<std::uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(0x7fc0u)};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <>
FUSEDSTEP_HD float16 from_acc<float16>(float x) {  // round to nearest even
#if defined(__CUDA_ARCH__)
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    std::uint32_t const bits = bit_cast<std::uint32_t>(x);
    std::uint16_t const sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    std::uint32_t const magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 aligns the float16 bits at the end of the float's mantissa.
        float const aligned = bit_cast<float>(magnitude) + 0.5f;
        return {
            static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(aligned) - 0x3f000000u))};
    }
    std::uint32_t const rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

}  // namespace fusedstep

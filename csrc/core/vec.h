// Vectors at the level being compiled (see level_*.h): loads that convert from storage types, the
// few operations the compiler's own vector arithmetic lacks, and reductions in a fixed order.
//
// Vec<float> and Vec<double> are the compiler's vector types: + - * / < and ?: work lane by lane.
// Contraction is off for the whole library, so a fused multiply-add happens where fmadd() says so
// and nowhere else (the baseline level has none and rounds twice).
#pragma once

#include "core/compensated_sum.h"

#if !defined(FUSEDSTEP_LEVEL)
#error "include core/level_baseline.h, level_avx2.h or level_avx512.h first"
#endif

namespace fusedstep::FUSEDSTEP_LEVEL {

#define FUSEDSTEP_VEC inline __attribute__((always_inline))

typedef float VecF __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES)));
typedef std::int32_t VecI32 __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES)));
typedef std::int64_t VecI64 __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES)));
typedef std::uint32_t VecU32 __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES)));
typedef std::uint64_t VecU64 __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES)));
typedef std::uint16_t HalfU16 __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES / 2)));
typedef float HalfF __attribute__((vector_size(FUSEDSTEP_VECTOR_BYTES / 2)));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
    using Value = VecF;
    using Int = VecI32;
    using Scalar = std::int32_t;
};
template <>
struct VecOf<double> {
    using Value = VecD;
    using Int = VecI64;
    using Scalar = std::int64_t;
};
template <class A>
using Vec = typename VecOf<A>::Value;
// Lane-wise integers as wide as A; as a mask, -1 where true and 0 where false.
template <class A>
using VecInt = typename VecOf<A>::Int;
template <class A>
using LaneInt = typename VecOf<A>::Scalar;
template <class A>
inline constexpr int kLanes = FUSEDSTEP_VECTOR_BYTES / static_cast<int>(sizeof(A));

// bit_cast() of vectors: what passes one has to be compiled for the level.
template <class To, class From>
FUSEDSTEP_VEC To vec_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class A>
FUSEDSTEP_VEC Vec<A> broadcast(A x) {
    return x - Vec<A>{};  // x - 0 keeps -0 and NaN; the compiler emits one broadcast
}

template <class A>
FUSEDSTEP_VEC VecInt<A> lane_index() {
    VecInt<A> index;
    for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
    return index;
}

// True in the first n lanes.
template <class A>
FUSEDSTEP_VEC VecInt<A> first_lanes(std::int64_t n) {
    return lane_index<A>() < static_cast<LaneInt<A>>(n);
}

#if FUSEDSTEP_VECTOR_BYTES == 64
FUSEDSTEP_VEC VecF fmadd(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
FUSEDSTEP_VEC VecD fmadd(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
// Where either operand is NaN the result is b.
FUSEDSTEP_VEC VecF max(VecF a, VecF b) { return _mm512_max_ps(a, b); }
FUSEDSTEP_VEC VecD max(VecD a, VecD b) { return _mm512_max_pd(a, b); }
#elif FUSEDSTEP_VECTOR_BYTES == 32
FUSEDSTEP_VEC VecF fmadd(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
FUSEDSTEP_VEC VecD fmadd(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
FUSEDSTEP_VEC VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
FUSEDSTEP_VEC VecD max(VecD a, VecD b) { return _mm256_max_pd(a, b); }
#else
template <class V>
FUSEDSTEP_VEC V fmadd(V a, V b, V c) {
    return a * b + c;
}
template <class V>
FUSEDSTEP_VEC V max(V a, V b) {
    return a > b ? a : b;
}
#endif

// kLanes<acc_t<T>> values as they are stored: the bits of the 16-bit types.
template <class T>
using StoredVec = std::conditional_t<sizeof(T) == 2, HalfU16, Vec<acc_t<T>>>;

template <class T>
FUSEDSTEP_VEC Vec<acc_t<T>> widened(StoredVec<T> v) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        return vec_cast<VecF>(__builtin_convertvector(v, VecU32) << 16);
    } else if constexpr (std::is_same_v<T, float16>) {
#if FUSEDSTEP_VECTOR_BYTES == 64
        return _mm512_cvtph_ps(vec_cast<__m256i>(v));
#elif FUSEDSTEP_VECTOR_BYTES == 32
        return _mm256_cvtph_ps(vec_cast<__m128i>(v));
#else
        VecF wide;
        for (int i = 0; i < kLanes<float>; ++i) wide[i] = to_acc(bit_cast<float16>(v[i]));
        return wide;
#endif
    } else {
        return v;
    }
}

// Rounds to nearest even; NaN stays NaN.
template <class T>
FUSEDSTEP_VEC StoredVec<T> narrowed(Vec<acc_t<T>> v) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        VecU32 const bits = vec_cast<VecU32>(v);
        VecU32 const rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        VecU32 const result = v == v ? rounded : VecU32{} + 0x7fc0u;
        return __builtin_convertvector(result, StoredVec<T>);
    } else if constexpr (std::is_same_v<T, float16>) {
#if FUSEDSTEP_VECTOR_BYTES == 64
        constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return vec_cast<StoredVec<T>>(_mm512_cvtps_ph(v, rounding));
#elif FUSEDSTEP_VECTOR_BYTES == 32
        constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return vec_cast<StoredVec<T>>(_mm256_cvtps_ph(v, rounding));
#else
        StoredVec<T> narrow;
        for (int i = 0; i < kLanes<float>; ++i) {
            narrow[i] = bit_cast<std::uint16_t>(from_acc<float16>(v[i]));
        }
        return narrow;
#endif
    } else {
        return v;
    }
}

// Loads kLanes<acc_t<T>> consecutive values; no alignment is asked for.
template <class T>
FUSEDSTEP_VEC Vec<acc_t<T>> load(const T* p) {
    StoredVec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return widened<T>(v);
}
template <class T>
FUSEDSTEP_VEC void store(T* p, Vec<acc_t<T>> v) {
    StoredVec<T> const narrow = narrowed<T>(v);
    std::memcpy(static_cast<void*>(p), &narrow, sizeof(narrow));
}

// Loads the first n lanes and zeroes the rest; touches only p[0, n).
template <class T>
FUSEDSTEP_VEC Vec<acc_t<T>> load_partial(const T* p, std::int64_t n) {
#if FUSEDSTEP_VECTOR_BYTES == 64
    unsigned const mask = (1u << n) - 1u;
    if constexpr (std::is_same_v<T, float>) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
    } else if constexpr (std::is_same_v<T, double>) {
        return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
    } else {
        __m256i const half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
        return widened<T>(vec_cast<HalfU16>(half));
    }
#else
#if FUSEDSTEP_VECTOR_BYTES == 32
    if constexpr (std::is_same_v<T, float>) {
        return _mm256_maskload_ps(p, vec_cast<__m256i>(first_lanes<float>(n)));
    } else if constexpr (std::is_same_v<T, double>) {
        return _mm256_maskload_pd(p, vec_cast<__m256i>(first_lanes<double>(n)));
    }
#endif
    alignas(FUSEDSTEP_VECTOR_BYTES) T buffer[kLanes<acc_t<T>>] = {};
    for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(static_cast<const T*>(buffer));
#endif
}

// Stores the first n lanes; touches only p[0, n).
template <class T>
FUSEDSTEP_VEC void store_partial(T* p, Vec<acc_t<T>> v, std::int64_t n) {
#if FUSEDSTEP_VECTOR_BYTES == 64
    unsigned const mask = (1u << n) - 1u;
    if constexpr (std::is_same_v<T, float>) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
    } else if constexpr (std::is_same_v<T, double>) {
        _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), v);
    } else {
        _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask),
                                 vec_cast<__m256i>(narrowed<T>(v)));
    }
#else
#if FUSEDSTEP_VECTOR_BYTES == 32
    if constexpr (std::is_same_v<T, float>) {
        _mm256_maskstore_ps(p, vec_cast<__m256i>(first_lanes<float>(n)), v);
        return;
    } else if constexpr (std::is_same_v<T, double>) {
        _mm256_maskstore_pd(p, vec_cast<__m256i>(first_lanes<double>(n)), v);
        return;
    }
#endif
    alignas(FUSEDSTEP_VECTOR_BYTES) T buffer[kLanes<acc_t<T>>];
    store(static_cast<T*>(buffer), v);
    for (std::int64_t i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// A vector whose lane i is a[i ^ step].
template <class A, int step, int... lane>
FUSEDSTEP_VEC Vec<A> swap_lanes(Vec<A> a, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, a, (lane ^ step)...);
}

template <class A, int step = kLanes<A> / 2>
FUSEDSTEP_VEC A reduce_max(Vec<A> v) {
    if constexpr (step == 0) {
        return v[0];
    } else {
        Vec<A> const swapped = swap_lanes<A, step>(v, std::make_integer_sequence<int, kLanes<A>>{});
        return reduce_max<A, step / 2>(max(v, swapped));
    }
}

template <class A, int step = kLanes<A> / 2>
FUSEDSTEP_VEC A reduce_sum(Vec<A> v) {
    if constexpr (step == 0) {
        return v[0];
    } else {
        Vec<A> const swapped = swap_lanes<A, step>(v, std::make_integer_sequence<int, kLanes<A>>{});
        return reduce_sum<A, step / 2>(v + swapped);
    }
}

// Swaps the off-diagonal step x step blocks of each pair (a, b) of rows step apart.
template <class A, int step, int... lane>
FUSEDSTEP_VEC void exchange_blocks(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, lane...>) {
    constexpr int n = kLanes<A>;
    Vec<A> const upper = __builtin_shufflevector(a, b, ((lane & step) ? n + lane - step : lane)...);
    Vec<A> const lower = __builtin_shufflevector(a, b, ((lane & step) ? n + lane : lane + step)...);
    a = upper;
    b = lower;
}

// Transposes a kLanes x kLanes block held in registers.
template <class A, int step = 1>
FUSEDSTEP_VEC void transpose(Vec<A> (&rows)[kLanes<A>]) {
    if constexpr (step < kLanes<A>) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<A>; ++i) {
            if ((i & step) == 0) {
                exchange_blocks<A, step>(rows[i], rows[i + step],
                                         std::make_integer_sequence<int, kLanes<A>>{});
            }
        }
        transpose<A, step * 2>(rows);
    }
}

// The sum of lanes, in a fixed order: of floats in double,
template <class A>
struct LaneSum {
    VecD parts[2] = {};

    FUSEDSTEP_VEC void add(Vec<A> v) {
        HalfF halves[2];
        std::memcpy(halves, &v, sizeof(v));
        parts[0] += __builtin_convertvector(halves[0], VecD);
        parts[1] += __builtin_convertvector(halves[1], VecD);
    }
    FUSEDSTEP_VEC double total() const { return reduce_sum<double>(parts[0] + parts[1]); }
};

// and of doubles with compensation: the low part of every addition (Knuth's two-sum) is kept apart.
template <>
struct LaneSum<double> {
    VecD sum = {};
    VecD low = {};

    FUSEDSTEP_VEC void add(VecD v) {
        VecD const next = sum + v;
        VecD const added = next - sum;
        low += (sum - (next - added)) + (v - added);
        sum = next;
    }
    // What was infinite or NaN without compensation is so with it.
    FUSEDSTEP_VEC double total() const {
        CompensatedSum lanes;
        for (int i = 0; i < kLanes<double>; ++i) lanes.add(sum[i]);
        double const lost = reduce_sum<double>(low);
        if (lost == lost) lanes.add(lost);
        return lanes.total();
    }
};

}  // namespace fusedstep::FUSEDSTEP_LEVEL

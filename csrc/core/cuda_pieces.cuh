// An array as threads share it: pieces of one access each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda_math.cuh"
#include "core/cuda_vector.cuh"
#include "core/dtype.h"

namespace fusedstep {

// A row of elements is cut into pieces, one access each: single elements, or aligned 16-byte
// vectors and, at its ends, the few elements that fill none. Index counts the elements of a row:
// int where a row is held, 64 bits elsewhere.
template <class T, bool kVectors, class Index_>
struct Pieces {
    using Element = T;
    using Index = Index_;
    static constexpr int kLanes = kVectors ? kVectorLanes<T> : 1;
    using Piece = Lanes<T, kLanes>;

    Index count;  // of whole pieces
    Index classes;
    std::int64_t class_stride;  // 1 for vectors
    int head;                   // elements in front of the first vector

    __device__ __forceinline__ Pieces(const T* row, std::int64_t classes_, std::int64_t stride)
        : count(static_cast<Index>(classes_)),
          classes(static_cast<Index>(classes_)),
          class_stride(stride),
          head(0) {
        if constexpr (kVectors) {
            auto const misaligned =
                static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % kVectorBytes) /
                static_cast<int>(sizeof(T));
            head = misaligned == 0 ? 0 : kLanes - misaligned;
            if (head > classes) head = static_cast<int>(classes);
            count = (classes - head) / kLanes;
        }
    }

    // The class of a piece's first element.
    __device__ __forceinline__ Index first(Index piece) const { return head + piece * kLanes; }

    // The class that a member of the group takes in addition to pieces; -1: none. The first kLanes
    // members share the row's front, the next kLanes its end.
    __device__ __forceinline__ Index edge(int member) const {
        if constexpr (kVectors) {
            if (member < head) return member;
            Index const c = first(count) + (member - kLanes);
            if (member >= kLanes && member < 2 * kLanes && c < classes) return c;
        }
        return -1;
    }

    __device__ __forceinline__ Piece load(const T* row, Index piece) const {
        if constexpr (kVectors) return load_vector(row + first(piece));
        return {{row[piece * class_stride]}};
    }

    // The pieces first, first + step, ... before `end`, all reads in flight at once; outside()
    // stands for those that are not there.
    template <int n>
    __device__ __forceinline__ void load(const T* row, Index first_piece, Index step, Index end,
                                         Piece (&values)[n]) const {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            Index const piece = first_piece + i * step;
            values[i] = piece < end ? load(row, piece) : outside();
        }
    }

    // Into a row with this alignment.
    __device__ __forceinline__ void store(T* row, std::int64_t stride, Index piece,
                                          const Piece& values) const {
        if constexpr (kVectors) {
            store_vector(row + first(piece), values);
        } else {
            row[piece * stride] = values.lane[0];
        }
    }

    // Stands for what lies outside the row: it changes neither maximum nor sum.
    static __device__ __forceinline__ Piece outside() {
        Piece piece;
#pragma unroll
        for (T& value : piece.lane) value = from_acc<T>(-kInfinity<acc_t<T>>);
        return piece;
    }
};

// Calls f(piece, its values) for every step-th piece of [begin, end), kAtOnce of which are read
// before f writes: no read is moved to the front of a write.
template <int kAtOnce, class T, bool kVectors, class Index, class F>
__device__ __forceinline__ void for_each_loaded(const Pieces<T, kVectors, Index>& pieces,
                                                const T* row, Index begin, Index end, Index step,
                                                F f) {
    for (Index first = begin; first < end; first += kAtOnce * step) {
        typename Pieces<T, kVectors, Index>::Piece values[kAtOnce];
        pieces.load(row, first, step, end, values);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (first + i * step < end) f(first + i * step, values[i]);
        }
    }
}

// One value of a type that is known at run time.
__device__ __forceinline__ void store_scalar(void* to, DType dtype, std::int64_t index,
                                             double value) {
    dispatch(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        static_cast<T*>(to)[index] = from_acc<T>(static_cast<acc_t<T>>(value));
    });
}

__device__ __forceinline__ double load_scalar(const void* from, DType dtype, std::int64_t index) {
    return dispatch(dtype, [&](auto tag) -> double {
        using T = typename decltype(tag)::type;
        return to_acc(static_cast<const T*>(from)[index]);
    });
}

}  // namespace fusedstep

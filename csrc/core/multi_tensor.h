// One walk over many tensors. Every tensor is cut into chunks of kChunk elements (its last one may
// be shorter), chunks are numbered through the whole list, and a worker takes a range of numbers.
// Where a tensor is cut depends on nothing but its size.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fusedstep {

inline constexpr std::int64_t kChunk = 1024;

// The place of one tensor in the list.
struct Extent {
    std::int64_t first_chunk;
    std::int64_t numel;

    FUSEDSTEP_HD constexpr std::int64_t end_chunk() const {
        return first_chunk + (numel + kChunk - 1) / kChunk;
    }
};

// Calls f(entry, begin, end) with the elements [begin, end) of each entry that lie in the chunks
// [first, last) of the list, in order; adjacent chunks of one entry make one call. An entry is any
// type with a member `extent`; entries follow one another without gaps, from chunk 0. Index is an
// integer type that holds the number of chunks.
template <class Entry, class Index, class F>
FUSEDSTEP_HD void for_each_span(const Entry* entries, Index count, Index first, Index last, F f) {
    Index low = 0;  // the first entry that ends behind `first`
    for (Index high = count; low < high;) {
        Index const middle = low + (high - low) / 2;
        if (entries[middle].extent.end_chunk() <= first) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < count && entries[low].extent.first_chunk < last; ++low) {
        Extent const extent = entries[low].extent;
        std::int64_t const begin =
            first > extent.first_chunk ? (first - extent.first_chunk) * kChunk : 0;
        std::int64_t const limit = (last - extent.first_chunk) * kChunk;
        std::int64_t const end = limit < extent.numel ? limit : extent.numel;
        if (begin < end) f(entries[low], begin, end);
    }
}

}  // namespace fusedstep

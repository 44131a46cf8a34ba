#include <algorithm>

#include "cross_entropy/cross_entropy.h"

namespace fusedstep::cross_entropy {

const CpuKernels& cpu_kernels() { return FUSEDSTEP_SELECT_LEVEL; }

std::int64_t rows_per_chunk(std::int64_t rows, std::int64_t classes) {
    // 8,192 logits: small enough to spread over threads, large enough (several microseconds) for
    // the scheduling to vanish. A multiple of 16 fills the widest tile.
    constexpr std::int64_t kChunkLogits = 8192;
    constexpr std::int64_t kTileRows = 16;
    std::int64_t const wanted = kChunkLogits / std::max<std::int64_t>(classes, 1);
    std::int64_t const whole_tiles = wanted / kTileRows * kTileRows;
    return std::clamp<std::int64_t>(whole_tiles > 0 ? whole_tiles : wanted, 1,
                                    std::max<std::int64_t>(rows, 1));
}

}  // namespace fusedstep::cross_entropy

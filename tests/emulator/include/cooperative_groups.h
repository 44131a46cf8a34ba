// Grids and clusters that wait for themselves.
#pragma once

#include <cuda_runtime.h>

namespace emulator {

void sync_grid(Where);
void sync_cluster(Where);
unsigned cluster_block_rank();
unsigned cluster_num_blocks();
void* map_shared_rank(const void* address, unsigned rank);

}  // namespace emulator

namespace cooperative_groups {

struct grid_group {
    static void sync(emulator::Where where = emulator::Where::current()) {
        emulator::sync_grid(where);
    }
};
inline grid_group this_grid() { return {}; }

struct cluster_group {
    static void sync(emulator::Where where = emulator::Where::current()) {
        emulator::sync_cluster(where);
    }
    static unsigned block_rank() { return emulator::cluster_block_rank(); }
    static unsigned num_blocks() { return emulator::cluster_num_blocks(); }
    template <class T>
    static T* map_shared_rank(T* address, unsigned rank) {
        return static_cast<T*>(emulator::map_shared_rank(address, rank));
    }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

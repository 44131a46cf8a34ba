// How cross-entropy is launched on CUDA: pure functions of sizes, types and the device's limits.
#pragma once

#include <cstdint>

#include "core/cuda_launch.h"
#include "cross_entropy/cross_entropy.h"

namespace fusedstep::cross_entropy {

// How a row of logits is walked, and by whom.
enum class Walk {
    lanes,          // kept in registers by 1 to 32 lanes, single elements
    warp,           // kept in shared memory by a warp, 16-byte vectors
    block,          // kept in shared memory by a block or a cluster of blocks, 16-byte vectors
    stream,         // read twice by a block, 16-byte vectors: rows too long to keep
    stream_column,  // read twice by one thread: neighbours read neighbouring rows, (N, C, H, W)
    stream_strided  // read twice by a block, single elements: few, long rows that are not adjacent
};

// Elements of a row that a lane keeps in registers.
inline constexpr int kHeldElements = 4;
// 16-byte vectors of a row that a thread takes: of one that a warp can keep, at most; of a longer
// one, where the row alone decides. Enough to be worth the few hundred instructions that a row
// costs every thread of its block besides (by count, sm_90).
inline constexpr int kWarpVectors = 8;
inline constexpr int kBlockVectors = 16;
inline constexpr int kMaxCluster = 8;
// Blocks of kMaxThreads that the compiler fits on a multiprocessor: 64-bit values take twice as
// many registers.
constexpr int min_blocks(int item_size) { return item_size == 8 ? kMinBlocks / 2 : kMinBlocks; }
// What a block has of shared memory besides rows, at most.
inline constexpr int kStaticShared = 2048;

struct Plan {
    Walk walk;
    int group;         // threads of a block that share a row: up to 32 lanes, or all of the block
    int stage_pieces;  // 16-byte vectors of shared memory that a thread keeps
    LaunchShape shape;
};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

constexpr int power_of_two_at_least(std::int64_t n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

// The most 16-byte vectors that lie in a row.
constexpr std::int64_t row_vectors(std::int64_t classes, int item_size) {
    return ceil_div(classes * item_size, kVectorBytes);
}

// Blocks that a multiprocessor holds at once.
constexpr std::int64_t resident_blocks(std::int64_t threads, std::int64_t shared_bytes,
                                       int item_size, const DeviceLimits& limits) {
    std::int64_t const by_threads = kMaxThreads * min_blocks(item_size) / threads;
    std::int64_t const by_shared =
        limits.shared_per_multiprocessor / (shared_bytes + kStaticShared + kReservedShared);
    return by_threads < by_shared ? by_threads : by_shared;
}

// Rows shared by `group` threads each, in blocks of `threads`: enough blocks for the rows, at most
// as many as are resident at once, one where there are no rows: there is a loss all the same.
constexpr Plan plan_groups(Walk walk, std::int64_t rows, int group, std::int64_t threads,
                           int stage_pieces, int item_size, const DeviceLimits& limits) {
    std::int64_t const shared_bytes = threads * stage_pieces * kVectorBytes;
    std::int64_t const wanted = rows > 0 ? ceil_div(rows, threads / group) : 1;
    std::int64_t const resident =
        limits.multiprocessors * resident_blocks(threads, shared_bytes, item_size, limits);
    return {walk,
            group,
            stage_pieces,
            {.blocks = static_cast<unsigned>(wanted < resident ? wanted : resident),
             .threads = static_cast<unsigned>(threads),
             .shared_bytes = static_cast<unsigned>(shared_bytes)}};
}

// The same for groups within a warp, which are free to choose their block. No second block where
// one does with kOneBlock threads' work: a grid that waits for itself costs about as much as that
// work.
constexpr Plan plan_warps(Walk walk, std::int64_t rows, int group, int stage_pieces, int item_size,
                          const DeviceLimits& limits) {
    constexpr std::int64_t kOneBlock = 2048;
    constexpr int kUsualThreads = 256;
    if (rows > kOneBlock / group) {
        return plan_groups(walk, rows, group, kUsualThreads, stage_pieces, item_size, limits);
    }
    std::int64_t const wanted = rows > 0 ? round_up(rows * group, kWarp) : kWarp;
    std::int64_t const of_warp = std::int64_t{kWarp} * stage_pieces * kVectorBytes;
    std::int64_t const fit =
        of_warp > 0 ? (limits.shared_per_block - kStaticShared) / of_warp * kWarp : kMaxThreads;
    std::int64_t const most = fit < kMaxThreads ? fit : kMaxThreads;
    Plan plan = plan_groups(walk, rows, group, wanted < most ? wanted : most, stage_pieces,
                            item_size, limits);
    plan.shape.blocks = 1;
    return plan;
}

// Rows of vectors kept in shared memory, by blocks or clusters: two or more blocks to a
// multiprocessor, so that one reads while another computes, or else one. No plan (no blocks) where
// they do not fit.
constexpr Plan plan_kept(std::int64_t rows, std::int64_t vectors, int item_size,
                         const DeviceLimits& limits) {
    int const max_cluster = limits.compute_capability >= 90 ? kMaxCluster : 1;
    for (int blocks_each = 2; blocks_each >= 1; --blocks_each) {
        std::int64_t const share =
            limits.shared_per_multiprocessor / blocks_each - kStaticShared - kReservedShared;
        std::int64_t const most = limits.shared_per_block - kStaticShared;
        std::int64_t const budget = share < most ? share : most;
        for (int cluster = 1; cluster <= max_cluster; cluster *= 2) {
            std::int64_t const wanted = round_up(ceil_div(vectors, kBlockVectors * cluster), kWarp);
            std::int64_t const threads = wanted < kMaxThreads ? wanted : kMaxThreads;
            std::int64_t const stage_pieces = ceil_div(vectors, threads * cluster);
            if (threads * stage_pieces * kVectorBytes > budget) continue;
            Plan plan =
                plan_groups(Walk::block, (rows > 0 ? rows : 1) * cluster, static_cast<int>(threads),
                            threads, static_cast<int>(stage_pieces), item_size, limits);
            plan.shape.blocks -= plan.shape.blocks % static_cast<unsigned>(cluster);
            plan.shape.cluster = static_cast<unsigned>(cluster);
            return plan;
        }
    }
    return {};
}

// `adjacent`: classes follow one another in logits and gradient. `vectors`: moreover element i of
// each row has the same alignment to 16 bytes in both.
constexpr Plan plan(std::int64_t rows, std::int64_t classes, bool adjacent, bool vectors,
                    int item_size, const DeviceLimits& limits) {
    constexpr std::int64_t kFewClasses = 32;
    bool const few = classes <= kHeldElements * kWarp;
    if (!adjacent && (rows >= classes || classes <= kFewClasses)) {
        return plan_warps(Walk::stream_column, rows, 1, 0, item_size, limits);
    }
    if (!adjacent || (!vectors && !few)) {
        std::int64_t const threads = round_up(classes, kWarp);
        int const group = static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads);
        return plan_groups(Walk::stream_strided, rows, group, group, 0, item_size, limits);
    }
    if (few) {
        int const lanes = power_of_two_at_least(ceil_div(classes, kHeldElements));
        return plan_warps(Walk::lanes, rows, lanes, 0, item_size, limits);
    }
    std::int64_t const row = row_vectors(classes, item_size);
    if (row <= kWarp * kWarpVectors) {
        return plan_warps(Walk::warp, rows, kWarp, static_cast<int>(ceil_div(row, kWarp)),
                          item_size, limits);
    }
    Plan const kept = plan_kept(rows, row, item_size, limits);
    if (kept.shape.blocks > 0) return kept;
    return plan_groups(Walk::stream, rows, kMaxThreads, kMaxThreads, 0, item_size, limits);
}

inline Plan forward_plan(const Args& args, const DeviceLimits& limits) {
    auto const bytes = static_cast<int>(item_size(args.dtype));
    bool adjacent = args.classes == 1 || args.logits_class_stride == 1;
    bool vectors = true;
    if (args.grad) {
        adjacent = adjacent && (args.classes == 1 || args.grad_class_stride == 1);
        auto const alignment = [](const void* pointer) {
            return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes;
        };
        vectors = alignment(args.logits) == alignment(args.grad);
        for (int d = 0; d < args.row_dims; ++d) {
            std::int64_t const apart = args.logits_row_strides[d] - args.grad_row_strides[d];
            vectors = vectors && apart * bytes % kVectorBytes == 0;
        }
    }
    return plan(args.rows, args.classes, adjacent, vectors, bytes, limits);
}

// Backward needs no sum over a row: `group` threads of a block share `segment` pieces
// (vectors or elements) of a row, and a row has `segments` of these.
struct BackwardPlan {
    bool vectors;
    int group;
    std::int64_t segment;
    std::int64_t segments;
    LaunchShape shape;
};

inline BackwardPlan backward_plan(const Args& args, const DeviceLimits& limits) {
    constexpr int kThreads = 256;
    constexpr int kPiecesEach = 8;
    auto const bytes = static_cast<int>(item_size(args.dtype));
    Plan const forward = forward_plan(args, limits);
    bool const vectors =
        forward.walk == Walk::warp || forward.walk == Walk::block || forward.walk == Walk::stream;
    std::int64_t const pieces = vectors ? row_vectors(args.classes, bytes) : args.classes;
    int const group = forward.group <= kWarp ? forward.group : kThreads;
    // A short group takes a row as it is; a block a piece that keeps it busy.
    std::int64_t const segment = group <= kWarp ? pieces : std::int64_t{kThreads} * kPiecesEach;
    std::int64_t const segments = ceil_div(pieces, segment);
    return {
        vectors, group, segment, segments,
        plan_groups(forward.walk, args.rows * segments, group, kThreads, 0, bytes, limits).shape};
}

}  // namespace fusedstep::cross_entropy

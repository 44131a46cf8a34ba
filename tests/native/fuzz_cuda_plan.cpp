// Launch choices of CUDA for any sizes and any device, and the walk over many tensors.
#include "core/multi_tensor.h"
#include "cross_entropy/cuda_plan.h"
#include "harness.h"
#include "pointwise_loss/cuda_entry.h"
#include "optim/cuda.h"

namespace native {
namespace {

using fusedstep::DeviceLimits;
using fusedstep::LaunchShape;

constexpr std::int64_t kMostRegisters = 65536;  // of a multiprocessor

std::int64_t any_count(Choices& choices, int most_bits) {
    std::int64_t const top = std::int64_t{1} << choices.between(0, most_bits);
    return choices.one_in(2) ? choices.between(0, top) : top + choices.between(-1, 1);
}

DeviceLimits any_device(Choices& choices) {
    DeviceLimits limits{};
    limits.multiprocessors = static_cast<int>(choices.between(1, 300));
    limits.compute_capability = choices.one_of({75, 80, 86, 89, 90, 100, 120});
    // The table of compute capabilities: the least and the most that a block may ask for.
    limits.shared_per_block = static_cast<int>(choices.between(64, 227)) << 10;
    limits.shared_per_multiprocessor =
        limits.shared_per_block + (limits.compute_capability < 80 ? 0 : 1024);
    return limits;
}

void expect(bool right, const char* what, const LaunchShape& shape, std::int64_t rows,
            std::int64_t classes, const DeviceLimits& limits) {
    if (right) return;
    fail(text(what, ": ", rows, " x ", classes, " on ", limits.multiprocessors,
              " multiprocessors of ", limits.compute_capability, " with ", limits.shared_per_block,
              " bytes: ", shape.blocks, " blocks of ", shape.threads, " threads, ",
              shape.shared_bytes, " bytes, clusters of ", shape.cluster));
}

bool is_resident(const LaunchShape& shape, int item_size, const DeviceLimits& limits) {
    std::int64_t const registers = item_size == 8 ? 128 : 64;
    std::int64_t const by_registers = kMostRegisters / (registers * shape.threads);
    std::int64_t const each =
        shape.shared_bytes + fusedstep::cross_entropy::kStaticShared + fusedstep::kReservedShared;
    return shape.blocks <=
           limits.multiprocessors * std::min(by_registers, limits.shared_per_multiprocessor / each);
}

void check_cross_entropy(Choices& choices) {
    using fusedstep::cross_entropy::Plan;
    using fusedstep::cross_entropy::Walk;
    DeviceLimits const limits = any_device(choices);
    std::int64_t const rows = any_count(choices, 40), classes = any_count(choices, 40) + 1;
    bool const adjacent = choices.one_in(2), vectors = adjacent && choices.one_in(2);
    int const item_size = choices.one_of({2, 4, 8});
    Plan const plan =
        fusedstep::cross_entropy::plan(rows, classes, adjacent, vectors, item_size, limits);
    const LaunchShape& shape = plan.shape;
    auto const require = [&](bool right, const char* what) {
        expect(right, what, shape, rows, classes, limits);
    };
    require(shape.blocks >= 1 && is_resident(shape, item_size, limits), "blocks are not resident");
    require(shape.threads >= 32 && shape.threads <= 512 && shape.threads % 32 == 0, "threads");
    require(shape.threads % static_cast<unsigned>(plan.group) == 0, "groups do not fill a block");
    require(shape.shared_bytes == shape.threads * static_cast<unsigned>(plan.stage_pieces) * 16,
            "shared memory of the pieces");
    require(shape.shared_bytes + fusedstep::cross_entropy::kStaticShared <=
                static_cast<unsigned>(limits.shared_per_block),
            "shared memory of a block");
    require(shape.cluster >= 1 && shape.cluster <= 8 && shape.blocks % shape.cluster == 0 &&
                (shape.cluster == 1 || limits.compute_capability >= 90),
            "clusters");
    if (plan.walk == Walk::lanes) require(classes <= 4 * plan.group, "a row does not fit");
    if (plan.walk == Walk::warp || plan.walk == Walk::block) {
        std::int64_t const kept = std::int64_t{plan.group} * shape.cluster * plan.stage_pieces;
        require(vectors && kept >= classes * item_size / 16, "a row does not fit");
    }
}

void check_others(Choices& choices) {
    DeviceLimits const limits = any_device(choices);
    std::int64_t const numel = any_count(choices, 50);
    int const item_size = choices.one_of({2, 4, 8});
    unsigned const blocks = fusedstep::pointwise_loss::blocks(numel, item_size, limits);
    LaunchShape const elements{blocks, fusedstep::pointwise_loss::kThreads};
    expect(blocks >= 1 && is_resident(elements, item_size, limits), "pointwise_loss", elements,
           numel, 1, limits);

    std::int64_t const chunks = any_count(choices, 31) + 1;
    LaunchShape const update = fusedstep::optim::update_shape(chunks, limits);
    std::int64_t const share = (chunks + update.blocks - 1) / update.blocks;
    expect(update.blocks >= 1 && update.blocks <= chunks && update.blocks <= INT32_MAX &&
               share * fusedstep::kChunk <= std::int64_t{1} << 30,
           "update", update, chunks, 1, limits);

    fusedstep::optim::Step step{};
    step.group_count = choices.between(0, 200);
    step.entry_count = choices.between(0, 2000);
    for (const fusedstep::optim::Rule& rule : fusedstep::optim::kRules) {
        std::size_t const entry = 40 + 8 * rule.states.size();
        auto const table = static_cast<std::size_t>(step.group_count) * rule.group_bytes +
                           static_cast<std::size_t>(step.entry_count) * entry;
        bool const fits = table + sizeof(fusedstep::optim::UpdateHeader) <= 32760;
        if (fusedstep::optim::table_fits(rule, step) != fits) fail("table_fits");
    }
}

struct Tensor {
    fusedstep::Extent extent;
};

// Ranges that together are the whole list touch every element once and in order.
template <class Index>
void check_walk(Choices& choices) {
    using fusedstep::kChunk;
    std::vector<Tensor> tensors;
    std::int64_t chunks = 0;
    int const most_bits = sizeof(Index) == 8 ? 45 : 36;
    for (std::int64_t n = choices.between(0, 12); n > 0; --n) {
        std::int64_t const numel = choices.one_in(4) ? 0 : any_count(choices, most_bits);
        tensors.push_back({{chunks, numel}});
        chunks = tensors.back().extent.end_chunk();
    }
    std::vector<std::int64_t> seen(tensors.size());
    std::int64_t last = 0;
    while (last < chunks) {
        std::int64_t const first = last;
        last = choices.one_in(8) ? chunks : choices.between(first + 1, chunks);
        std::int64_t elements = 0;
        fusedstep::for_each_span(tensors.data(), static_cast<Index>(tensors.size()),
                                 static_cast<Index>(first), static_cast<Index>(last),
                                 [&](const Tensor& tensor, std::int64_t begin, std::int64_t end) {
                                     auto const i =
                                         static_cast<std::size_t>(&tensor - tensors.data());
                                     if (begin != seen[i] || end <= begin)
                                         fail("a walk left something out");
                                     if (begin % kChunk != 0) fail("a walk began inside a chunk");
                                     if (end != tensor.extent.numel && end % kChunk != 0)
                                         fail("a walk cut a chunk");
                                     seen[i] = end;
                                     elements += (end - begin + kChunk - 1) / kChunk;
                                 });
        if (elements != last - first) fail("a walk took other chunks than its own");
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (seen[i] != tensors[i].extent.numel) fail("a walk left a tensor out");
    }
}

}  // namespace
}  // namespace native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    native::Choices choices(data, size);
    native::check_cross_entropy(choices);
    native::check_others(choices);
    native::check_walk<std::int64_t>(choices);
    native::check_walk<std::int32_t>(choices);
    return 0;
}

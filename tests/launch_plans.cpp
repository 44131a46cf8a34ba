// The rooms' launch choices, for tests/test_launch_plans.py to call: no kernel is launched.
#include <cstdint>

#include "cross_entropy/cuda_plan.h"
#include "optim/cuda.h"

using fusedstep::DeviceLimits;
using fusedstep::LaunchShape;

#pragma GCC visibility push(default)
extern "C" {

struct Shape {
    std::int64_t blocks, threads, shared_bytes, cluster;
};

struct CrossEntropyPlan {
    std::int64_t walk, group, stage_pieces;
    Shape shape;
};

static Shape shape_of(const LaunchShape& shape) {
    return {shape.blocks, shape.threads, shape.shared_bytes, shape.cluster};
}

void cross_entropy_plan(std::int64_t rows, std::int64_t classes, bool adjacent, bool vectors,
                        int item_size, const DeviceLimits* limits, CrossEntropyPlan* out) {
    auto const plan =
        fusedstep::cross_entropy::plan(rows, classes, adjacent, vectors, item_size, *limits);
    *out = {static_cast<std::int64_t>(plan.walk), plan.group, plan.stage_pieces,
            shape_of(plan.shape)};
}

void sgd_shape(std::int64_t chunks, const DeviceLimits* limits, Shape* out) {
    *out = shape_of(fusedstep::optim::update_shape(chunks, *limits));
}

// The largest number of entries that travel in a launch's parameters beside so many groups.
std::int64_t sgd_entries_in_parameters(std::int64_t groups) {
    constexpr auto kRule = fusedstep::optim::rule_of<fusedstep::optim::Sgd>();
    fusedstep::optim::Step step{};
    step.group_count = groups;
    while (fusedstep::optim::table_fits(kRule, step)) ++step.entry_count;
    return step.entry_count - 1;
}

// What no kernel is compiled without.
int resident_threads() { return fusedstep::kResidentThreads; }
}

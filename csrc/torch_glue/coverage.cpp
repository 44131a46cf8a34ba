#include "torch_glue/coverage.h"

#include <c10/core/DeviceType.h>
#include <c10/util/Exception.h>

namespace fusedstep {
namespace {

// Filled while the library is loaded, by one thread.
std::vector<CallCounter*>& counters() {
    static auto* const all = new std::vector<CallCounter*>;
    return *all;
}

}  // namespace

CallCounter::CallCounter(const char* op) : op_(op) { counters().push_back(this); }

void CallCounter::fell_back(c10::Device device, const std::string& reason, std::int64_t times) {
    std::lock_guard<std::mutex> const lock(mutex_);
    fell_back_[static_cast<std::size_t>(device.type())][reason] += times;
}

std::vector<Calls> CallCounter::all() {
    std::vector<Calls> result;
    for (CallCounter* counter : counters()) {
        std::lock_guard<std::mutex> const lock(counter->mutex_);
        for (std::size_t type = 0; type < counter->fused_.size(); ++type) {
            std::int64_t const fused = counter->fused_[type].load(std::memory_order_relaxed);
            const Reasons& fell_back = counter->fell_back_[type];
            if (fused == 0 && fell_back.empty()) continue;
            result.push_back(
                {counter->op_,
                 c10::DeviceTypeName(static_cast<c10::DeviceType>(type), /*lower_case=*/true),
                 fused, fell_back});
        }
    }
    return result;
}

void CallCounter::reset_all() {
    for (CallCounter* counter : counters()) {
        std::lock_guard<std::mutex> const lock(counter->mutex_);
        for (std::atomic<std::int64_t>& fused : counter->fused_) fused = 0;
        for (Reasons& fell_back : counter->fell_back_) fell_back.clear();
    }
}

CallCounter& CallCounter::of(const std::string& op) {
    for (CallCounter* counter : counters()) {
        if (counter->op_ == op) return *counter;
    }
    TORCH_CHECK_VALUE(false, "there is no operator ", op);
}

}  // namespace fusedstep

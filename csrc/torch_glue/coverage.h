// What becomes of a call: whether the kernels cover it, or why torch's own operator takes over.
#pragma once

#include <c10/core/Device.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace fusedstep {

// Why the kernels do not cover a call, in the user's words; a string literal.
struct NotCovered {
    const char* reason;
};

constexpr NotCovered not_covered(const char* reason) { return {reason}; }

// What follows from a call that the kernels cover, or why they do not.
template <class T = std::monostate>
class Covered {
public:
    Covered(T value) : value_(std::move(value)) {}
    Covered(NotCovered no) : reason_(no.reason) {}

    explicit operator bool() const { return value_.has_value(); }
    const T& operator*() const& { return *value_; }
    T&& operator*() && { return *std::move(value_); }
    const T* operator->() const { return &*value_; }
    NotCovered why_not() const { return {reason_}; }

private:
    std::optional<T> value_;
    const char* reason_ = nullptr;
};

constexpr std::monostate covered;

constexpr NotCovered kDifferentiableBackward =
    not_covered("a backward pass that is differentiated itself (create_graph=True)");

// How often an operator's kernels ran, and how often torch took over and why, on one kind of
// device.
struct Calls {
    std::string op;
    std::string device;
    std::int64_t fused = 0;
    std::map<std::string, std::int64_t> fell_back;  // by reason
};

// Counts the calls of one operator. One for each, made while the library is loaded and never
// destroyed before it; any thread may count.
class CallCounter {
public:
    explicit CallCounter(const char* op);
    CallCounter(const CallCounter&) = delete;
    CallCounter& operator=(const CallCounter&) = delete;

    const char* op() const { return op_; }
    void fused(c10::Device device, std::int64_t times = 1) {
        fused_[static_cast<std::size_t>(device.type())].fetch_add(times, std::memory_order_relaxed);
    }
    void fell_back(c10::Device device, const std::string& reason, std::int64_t times = 1);
    void fell_back(c10::Device device, NotCovered no) { fell_back(device, no.reason); }

    // Of every operator on every kind of device where it was called.
    static std::vector<Calls> all();
    static void reset_all();
    // Raises ValueError where there is no such operator.
    static CallCounter& of(const std::string& op);

private:
    using Reasons = std::map<std::string, std::int64_t>;

    const char* op_;
    std::array<std::atomic<std::int64_t>, c10::COMPILE_TIME_MAX_DEVICE_TYPES> fused_{};
    std::mutex mutex_;  // over what follows
    std::array<Reasons, c10::COMPILE_TIME_MAX_DEVICE_TYPES> fell_back_;
};

}  // namespace fusedstep

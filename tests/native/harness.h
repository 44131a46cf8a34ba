// What the native checks share: contracts are drawn from bytes, their buffers end at a page that
// nobody may touch, and what the kernels leave is compared with formulas evaluated in long double.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/cpu_level.h"
#include "core/dtype.h"

// The address sanitizer's, where the kernels are linked with it. The harness itself goes without.
extern "C" void __asan_poison_memory_region(const volatile void*, std::size_t)
    __attribute__((weak));
extern "C" void __asan_unpoison_memory_region(const volatile void*, std::size_t)
    __attribute__((weak));

// The tables of a room's kernels that this processor runs and ATEN_CPU_CAPABILITY allows.
#if defined(__x86_64__)
#define NATIVE_LEVELS(room)                                                                 \
    ::native::allowed<::fusedstep::room::CpuKernels>({::fusedstep::room::baseline::kernels, \
                                                      ::fusedstep::room::avx2::kernels,     \
                                                      ::fusedstep::room::avx512::kernels})
#else
#define NATIVE_LEVELS(room) \
    ::native::allowed<::fusedstep::room::CpuKernels>({::fusedstep::room::baseline::kernels})
#endif

namespace native {

using fusedstep::CpuLevel;
using fusedstep::DType;
using Real = long double;

template <class Kernels>
struct Level {
    const char* name;
    Kernels kernels;
};

template <class Kernels>
std::vector<Level<Kernels>> allowed(std::initializer_list<Kernels> tables) {
    std::vector<Level<Kernels>> levels;
    for (const Kernels& table : tables) {
        auto const level = static_cast<CpuLevel>(levels.size());
        if (level > fusedstep::cpu_level()) break;
        levels.push_back({fusedstep::cpu_level_name(level), table});
    }
    return levels;
}

// ---- Failing ----

// Says how to repeat the input being tried; set by whoever makes the inputs.
inline std::function<void()> repeat_hint = [] {};

[[noreturn]] inline void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    repeat_hint();
    std::abort();
}

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream stream;
    stream.precision(20);
    (stream << ... << parts);
    return stream.str();
}

inline std::string list(const std::vector<std::int64_t>& numbers) {
    std::string result;
    for (std::int64_t n : numbers) result += (result.empty() ? "" : ",") + std::to_string(n);
    return "(" + result + ")";
}

// ---- Decisions ----

// Decisions are made by the bytes in turn and, behind the last, at random from a seed that all
// bytes have a part in: a short input decides shapes, and thousands of values follow from it.
class Choices {
public:
    Choices(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {
        for (std::size_t i = 0; i < size; ++i) seed_ = (seed_ ^ data[i]) * 0x100000001b3;
    }
    std::uint64_t random() {  // splitmix64 (Steele et al., 2014)
        std::uint64_t z = (seed_ += 0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    // In [low, high].
    std::int64_t between(std::int64_t low, std::int64_t high) {
        auto const count = static_cast<std::uint64_t>(high - low) + 1;
        std::uint64_t number = 0;
        for (std::uint64_t reach = 1; reach < count; reach <<= 8) {
            number = number << 8 | next_byte();
            if (reach >> 56) break;
        }
        return low + static_cast<std::int64_t>(count == 0 ? number : number % count);
    }
    bool one_in(std::int64_t n) { return between(0, n - 1) == 0; }
    template <class T>
    T one_of(std::initializer_list<T> options) {
        return options.begin()[between(0, static_cast<std::int64_t>(options.size()) - 1)];
    }

private:
    std::uint64_t next_byte() {
        if (left_ == 0) return random() & 0xff;
        --left_;
        return *data_++;
    }
    const std::uint8_t* data_;
    std::size_t left_;
    std::uint64_t seed_ = 0xcbf29ce484222325;
};

inline DType any_dtype(Choices& choices) {
    return choices.one_of({DType::float32, DType::bfloat16, DType::float16, DType::float64});
}

// A number of elements: few, near a power of two, or any.
inline std::int64_t any_size(Choices& choices, std::int64_t most) {
    if (choices.one_in(2)) return choices.between(1, std::min<std::int64_t>(most, 20));
    if (choices.one_in(2)) return choices.between(1, most);
    std::int64_t const near = std::int64_t{1} << choices.between(2, 12);
    return std::clamp<std::int64_t>(near + choices.between(-2, 2), 1, most);
}

// ---- Numbers ----

struct Precision {
    Real epsilon, largest, smallest_normal;

    // Between the numbers that have the exponent of x.
    Real spacing(Real x) const {
        Real const size = std::max(std::fabs(x), smallest_normal);
        return std::ldexp(epsilon, std::ilogb(size));
    }
};

inline Precision precision(DType dtype) {
    auto const binary = [](int digits, int least, int most) {
        return Precision{std::ldexp(1.0L, 1 - digits),
                         std::ldexp(2.0L - std::ldexp(1.0L, 1 - digits), most),
                         std::ldexp(1.0L, least)};
    };
    switch (dtype) {
        case DType::float64:
            return binary(53, -1022, 1023);
        case DType::bfloat16:
            return binary(8, -126, 127);
        case DType::float16:
            return binary(11, -14, 15);
        case DType::float32:
            break;
    }
    return binary(24, -126, 127);
}

inline DType accumulate(DType dtype) {
    return dtype == DType::float64 ? DType::float64 : DType::float32;
}

inline Real read(DType dtype, const void* data, std::int64_t index) {
    auto const bits = [&] { return static_cast<const std::uint16_t*>(data)[index]; };
    auto const binary16 = [&](int digits) {
        int const scale = digits == 11 ? -24 : -133;  // of the last place of a subnormal number
        int const mantissa = bits() & ((1 << (digits - 1)) - 1);
        int const exponent = (bits() & 0x7fff) >> (digits - 1);
        int const top = (1 << (16 - digits)) - 1;
        Real const sign = bits() & 0x8000 ? -1 : 1;
        if (exponent == top) {
            return mantissa ? std::numeric_limits<Real>::quiet_NaN()
                            : sign * std::numeric_limits<Real>::infinity();
        }
        return exponent == 0
                   ? sign * std::ldexp(Real(mantissa), scale)
                   : sign * std::ldexp(Real(mantissa | 1 << (digits - 1)), scale + exponent - 1);
    };
    switch (dtype) {
        case DType::float64:
            return static_cast<const double*>(data)[index];
        case DType::bfloat16:
            return binary16(8);
        case DType::float16:
            return binary16(11);
        case DType::float32:
            break;
    }
    return static_cast<const float*>(data)[index];
}

inline void write(DType dtype, void* data, std::int64_t index, double value) {
    fusedstep::dispatch(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        static_cast<T*>(data)[index] =
            fusedstep::from_acc<T>(static_cast<fusedstep::acc_t<T>>(value));
    });
}

// To nearest, ties to even.
inline Real rounded(DType dtype, Real x) {
    if (dtype == DType::float64) return static_cast<double>(x);
    if (dtype == DType::float32) return static_cast<float>(x);
    if (!std::isfinite(x)) return x;
    Precision const p = precision(dtype);
    Real const nearest = std::nearbyint(x / p.spacing(x)) * p.spacing(x);
    return std::fabs(nearest) > p.largest ? std::copysign(std::numeric_limits<Real>::infinity(), x)
                                          : nearest;
}

// Numbers of one buffer: about one size, and as many extremes among them as was decided.
class Values {
public:
    explicit Values(Choices& choices)
        : choices_(choices),
          scale_(choices.one_of({1.0, 8.0, 1e-3, 100.0, 1e4, 1e-30, 1e30, 1e-42})),
          extremes_(choices.one_of({0, 0, 0, 64, 4, 1})) {}
    double next() {
        if (extremes_ != 0 && choices_.random() % extremes_ == 0) return extreme();
        return scale_ * uniform();
    }
    double not_negative() {
        double const x = next();
        return x < 0 ? -x : x;
    }

private:
    double uniform() { return static_cast<double>(choices_.random() >> 11) * 0x1p-52 - 1; }
    double extreme() {
        constexpr double infinity = std::numeric_limits<double>::infinity();
        static const double extremes[] = {
            infinity, -infinity, std::nan(""), -std::nan(""), 0.0,    -0.0,   3e38,    -3e38,
            1e-45,    -1e-45,    1.2e-38,      1e308,         -1e308, 5e-324, 65504.0, 65520.0,
            6e-8,     1.0,       -1.0,         88.0,          -88.0,  -87.34, -745.0,  -104.0};
        return extremes[choices_.random() % std::size(extremes)];
    }
    Choices& choices_;
    double scale_;
    std::uint64_t extremes_;
};

// ---- Memory ----

// Bytes between two pages that nobody may touch; they end at the one or begin at the other, to the
// byte, and what is left of their own pages on the other side may be neither read nor written.
class Guarded {
public:
    Guarded(std::size_t size, bool at_end) : size_(size) {
        std::size_t const page = page_size();
        inner_ = std::max<std::size_t>((size + page - 1) / page, 1) * page;
        void* const all =
            mmap(nullptr, inner_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED) fail("no memory");
        begin_ = static_cast<std::uint8_t*>(all) + page;
        mprotect(begin_, inner_, PROT_READ | PROT_WRITE);
        std::memset(begin_, kSlack, inner_);
        data_ = at_end ? begin_ + inner_ - size : begin_;
        forbid_slack(true);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() {
        forbid_slack(false);
        munmap(begin_ - page_size(), inner_ + 2 * page_size());
    }
    std::uint8_t* data() const { return data_; }
    std::size_t size() const { return size_; }
    void expect_slack_untouched() const {
        forbid_slack(false);
        auto const is_slack = [](std::uint8_t byte) { return byte == kSlack; };
        if (!std::all_of(begin_, data_, is_slack)) fail("written in front of a buffer");
        if (!std::all_of(data_ + size_, begin_ + inner_, is_slack)) fail("written behind a buffer");
        forbid_slack(true);
    }

private:
    static constexpr std::uint8_t kSlack = 0xa5;
    static std::size_t page_size() {
        static auto const size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        return size;
    }
    void forbid_slack(bool forbidden) const {
        auto* const set = forbidden ? __asan_poison_memory_region : __asan_unpoison_memory_region;
        if (!set) return;
        set(begin_, front());
        set(data_ + size_, back());
    }
    std::size_t front() const { return static_cast<std::size_t>(data_ - begin_); }
    std::size_t back() const { return inner_ - size_ - front(); }

    std::size_t size_, inner_;
    std::uint8_t* begin_;
    std::uint8_t* data_;
};

// Where elements lie: in the order of the last dimension fastest, element 0 at offset 0.
struct Layout {
    std::vector<std::int64_t> sizes, strides;

    std::int64_t count() const {
        std::int64_t count = 1;
        for (std::int64_t size : sizes) count *= size;
        return count;
    }
    std::int64_t offset(std::int64_t element) const {
        std::int64_t offset = 0;
        for (std::size_t d = sizes.size(); d-- > 0; element /= sizes[d]) {
            offset += element % sizes[d] * strides[d];
        }
        return offset;
    }
    // The lowest offset, and the number of elements from there to the highest.
    std::int64_t lowest() const { return reach(-1); }
    std::int64_t span() const { return count() == 0 ? 0 : reach(1) - reach(-1) + 1; }

private:
    std::int64_t reach(int sign) const {
        std::int64_t reach = 0;
        for (std::size_t d = 0; d < sizes.size(); ++d) {
            std::int64_t const last = (sizes[d] - 1) * strides[d];
            if (last * sign > 0) reach += last;
        }
        return reach;
    }
};

// Adjacent in some order of dimensions; or with gaps, backwards and, where elements may share
// memory, on top of each other.
inline Layout any_layout(Choices& choices, std::vector<std::int64_t> sizes, bool may_overlap) {
    Layout layout{std::move(sizes), {}};
    std::size_t const dims = layout.sizes.size();
    layout.strides.resize(dims);
    std::vector<std::size_t> order(dims);  // fastest first
    for (std::size_t d = 0; d < dims; ++d) order[d] = dims - 1 - d;
    bool const plain = choices.one_in(3);
    if (!plain && choices.one_in(2)) {
        for (std::size_t d = dims; d > 1; --d) {
            std::swap(order[d - 1],
                      order[static_cast<std::size_t>(choices.between(0, std::int64_t(d) - 1))]);
        }
    }
    std::int64_t next = 1;
    for (std::size_t d : order) {
        if (!plain && choices.one_in(4)) next += choices.between(1, 3);
        layout.strides[d] = next;
        if (may_overlap && !plain && choices.one_in(6)) {
            layout.strides[d] = choices.one_of({0, 0, 1, 2, -1});
            continue;
        }
        next = layout.strides[d] * std::max<std::int64_t>(layout.sizes[d], 1);
        if (!plain && choices.one_in(6)) layout.strides[d] = -layout.strides[d];
    }
    return layout;
}

// Elements in guarded memory.
class Array {
public:
    Array(Choices& choices, DType dtype, Layout layout)
        : dtype_(dtype),
          layout_(std::move(layout)),
          bytes_(static_cast<std::size_t>(layout_.span() * fusedstep::item_size(dtype)),
                 choices.between(0, 3) != 0) {
        for (std::size_t i = 0; i < bytes_.size(); ++i) {
            bytes_.data()[i] = static_cast<std::uint8_t>(choices.random());
        }
    }
    Array(Choices& choices, DType dtype, std::int64_t count)
        : Array(choices, dtype, Layout{{count}, {1}}) {}

    DType dtype() const { return dtype_; }
    const Layout& layout() const { return layout_; }
    // Of element 0.
    void* data() const { return bytes_.data() - layout_.lowest() * fusedstep::item_size(dtype_); }
    Real operator[](std::int64_t element) const {
        return read(dtype_, data(), layout_.offset(element));
    }
    void set(std::int64_t element, double value) {
        write(dtype_, data(), layout_.offset(element), value);
    }
    template <class Next>
    void fill(Next next) {
        for (std::int64_t i = 0; i < layout_.count(); ++i) set(i, next());
    }
    std::vector<std::uint8_t> bytes() const {
        return {bytes_.data(), bytes_.data() + bytes_.size()};
    }
    void restore(const std::vector<std::uint8_t>& bytes) {
        std::copy(bytes.begin(), bytes.end(), bytes_.data());
    }
    // What is not an element still is what it was.
    void expect_gaps_untouched(const std::vector<std::uint8_t>& before) const {
        auto const size = static_cast<std::size_t>(fusedstep::item_size(dtype_));
        std::vector<bool> element(bytes_.size() / size);
        for (std::int64_t i = 0; i < layout_.count(); ++i) {
            element[static_cast<std::size_t>(layout_.offset(i) - layout_.lowest())] = true;
        }
        for (std::size_t i = 0; i < bytes_.size(); ++i) {
            if (!element[i / size] && bytes_.data()[i] != before[i]) {
                fail("written between the elements of an output");
            }
        }
        bytes_.expect_slack_untouched();
    }
    void expect_unchanged(const std::vector<std::uint8_t>& before) const {
        if (bytes() != before) fail("an input was written");
        bytes_.expect_slack_untouched();
    }

private:
    DType dtype_;
    Layout layout_;
    Guarded bytes_;
};

// ---- Comparing ----

// A value and what its rounding errors depend on.
struct Expected {
    Real value;
    Real magnitude;     // what they are relative to: the sum of the absolute values of its terms
    Real absolute = 0;  // in units of the smallest normal number: of what underflows on the way
    Real largest = 0;   // what must not overflow on the way
    bool any_sign = false;  // of an infinity
};

constexpr Real kRoundings = 64;

inline Real rounding_errors(const Expected& e, const Precision& c) {
    return kRoundings * c.epsilon * e.magnitude + 4 * c.smallest_normal * (1 + e.absolute);
}

// A value that is within its rounding errors of 0, or overflowed on the way, may have either sign.
inline bool sign_is_open(const Expected& e, DType computed) {
    Precision const c = precision(computed);
    return !(std::max(e.largest, e.magnitude) < c.largest / 8) ||
           std::fabs(e.value) <= rounding_errors(e, c);
}

inline Expected times(Expected e, Real factor, DType computed) {
    e.any_sign |= std::isinf(factor) && sign_is_open(e, computed);
    e.largest = std::max({e.largest, e.magnitude, std::fabs(factor)});
    e.value *= factor;
    e.magnitude *= std::fabs(factor);
    e.absolute = (1 + e.absolute) * std::fabs(factor);
    return e;
}

enum class Storing { nearest, either_neighbour };

// Whether `got`, computed in one type and stored in another, is the value: within some rounding
// errors and not more, infinite or NaN where it has to be or where something overflowed on the way.
inline bool is_close(Real got, const Expected& expected, DType computed, DType stored,
                     Storing storing = Storing::nearest) {
#if defined(NATIVE_MEMORY_ONLY)
    // valgrind computes long double as double: it has nothing to compare with, but looks at whether
    // the decision below depends on memory that was never written.
    static volatile int negative = 0;
    if (got < 0) negative = 1;
    return true;
#endif
    Precision const c = precision(computed), s = precision(stored);
    Real const error = rounding_errors(expected, c);
    bool const may_overflow = !(std::max(expected.largest, expected.magnitude) < c.largest / 8) ||
                              !(std::fabs(expected.value) + error < s.largest);
    bool const is_nan = std::isnan(got), is_infinite = std::isinf(got);
    if (std::isnan(expected.value)) return is_nan || (may_overflow && is_infinite);
    if (std::isinf(expected.value)) {
        return got == expected.value || (may_overflow && is_nan) ||
               (expected.any_sign && is_infinite);
    }
    if (is_nan || is_infinite) return may_overflow;
    if (storing == Storing::either_neighbour) {
        Real const low = expected.value - error, high = expected.value + error;
        Real const below = s.spacing(low), above = s.spacing(high);
        return std::floor(low / below) * below <= got && got <= std::ceil(high / above) * above;
    }
    Real const stored_error =
        computed == stored
            ? 0
            : s.epsilon * (std::fabs(expected.value) + error) / 2 + s.epsilon * s.smallest_normal;
    return std::fabs(got - expected.value) <= error + stored_error;
}

// ---- Chunks ----

// Calls f(chunk, begin, end) for the chunks of [0, n), as the torch files do: in any order, or at
// the same time.
template <class F>
void in_chunks(Choices& choices, std::int64_t n, std::int64_t size, F f) {
    std::int64_t const chunks = (n + size - 1) / size;
    auto const call = [&](std::int64_t chunk) {
        f(chunk, chunk * size, std::min(n, (chunk + 1) * size));
    };
#if defined(NATIVE_THREADS)
    (void)choices;
    std::vector<std::thread> threads;
    for (std::int64_t first = 0; first < NATIVE_THREADS; ++first) {
        threads.emplace_back([&, first] {
            for (std::int64_t chunk = first; chunk < chunks; chunk += NATIVE_THREADS) call(chunk);
        });
    }
    for (std::thread& thread : threads) thread.join();
#else
    bool const backwards = choices.one_in(2);
    for (std::int64_t i = 0; i < chunks; ++i) call(backwards ? chunks - 1 - i : i);
#endif
}

}  // namespace native

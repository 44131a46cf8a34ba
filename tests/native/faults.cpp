// Planted faults, each of which the harness has to find, and the same without a fault.
//
//   faults NAME     exits with an error that says what was found; "none": succeeds
#include <cstdio>
#include <string_view>

#include "harness.h"

namespace native {
namespace {

// Two rows of three float32, one element between them: 28 bytes.
const Layout kForwards{{2, 3}, {4, 1}}, kBackwards{{2, 3}, {-4, -1}};

// As a kernel that trusts its contract reads and writes.
float load(const Array& array, std::int64_t offset) {
    return static_cast<const volatile float*>(array.data())[offset];
}
void store(const Array& array, std::int64_t offset) {
    static_cast<volatile float*>(array.data())[offset] = 2;
}

// Bytes make an array end at a forbidden page or, if the first one is 0, begin at one.
constexpr std::uint8_t kAtEnd[] = {1}, kAtBegin[] = {0};

void run(std::string_view fault) {
    Choices end(kAtEnd, 1), begin(kAtBegin, 1), again(kAtBegin, 1);
    Array const at_end(end, DType::float32, kForwards);
    Array const at_begin(begin, DType::float32, kForwards);
    Array const backwards(again, DType::float32, kBackwards);
    std::vector<std::uint8_t> const before = at_end.bytes();
    if (fault == "read_behind") load(at_end, 7);
    if (fault == "read_in_front") load(at_begin, -1);
    if (fault == "read_in_front_of_negative_strides") load(backwards, -7);
    if (fault == "read_slack_behind") load(at_begin, 7);
    if (fault == "read_slack_in_front") load(at_end, -3);
    if (fault == "write_slack_behind") store(at_begin, 7);
    if (fault == "write_slack_in_front") store(at_end, -1);
    if (fault == "write_gap") store(at_end, 3);
    if (fault == "write_input") store(at_end, 0);
    at_begin.expect_gaps_untouched(at_begin.bytes());
    at_end.expect_gaps_untouched(before);
    at_end.expect_unchanged(before);
    store(at_end, 6);
    at_end.expect_gaps_untouched(before);  // an element is no gap

    auto const expect = [](bool close) {
        if (!close) fail("a wrong number");
    };
    constexpr Real inf = std::numeric_limits<Real>::infinity();
    constexpr auto f32 = DType::float32, bf16 = DType::bfloat16;
    expect(is_close(1 + 0x1p-20, {1, 1}, f32, f32));
    expect(is_close(1 + 0x1p-8, {1, 1}, f32, bf16));
    expect(is_close(inf, {1e39, 1e39}, f32, f32));
    expect(is_close(inf, {1, 1, 0, 1e39}, f32, f32));
    expect(is_close(std::nan(""), {std::nan(""), 1}, f32, f32));
    constexpr auto either = Storing::either_neighbour;
    expect(is_close(1, {1 + 0x1p-9, 1}, f32, bf16, either));
    expect(is_close(1 + 0x1p-7, {1 + 0x1p-9, 1}, f32, bf16, either));
    if (fault == "beyond_both_neighbours") {
        expect(is_close(1 + 0x1p-6, {1 + 0x1p-9, 1}, f32, bf16, either));
    }
    if (fault == "below_both_neighbours") {
        expect(is_close(1 - 0x1p-8, {1 + 0x1p-9, 1}, f32, bf16, either));
    }
    if (fault == "wrong_in_the_fifth_place") expect(is_close(1 + 1e-5, {1, 1}, f32, f32));
    if (fault == "wrong_by_two_places") expect(is_close(1 + 0x1p-7, {1, 1}, f32, bf16));
    if (fault == "finite_for_nan") expect(is_close(1, {std::nan(""), 1}, f32, f32));
    if (fault == "finite_for_infinity") expect(is_close(1, {inf, inf}, f32, f32));
    if (fault == "nan_for_finite") expect(is_close(std::nan(""), {1, 1}, f32, f32));
    if (fault == "wrong_beside_an_overflow") expect(is_close(2, {1, 1, 0, 1e39}, f32, f32));
    if (fault == "zero_for_small") expect(is_close(0, {1e-30, 1e-30}, f32, f32));
    expect(is_close(-inf, times({1e-9, 1}, inf, f32), f32, f32));
    if (fault == "wrong_sign_behind_infinity") {
        expect(is_close(-inf, times({1, 1}, inf, f32), f32, f32));
    }
    if (fault == "wrong_sign_of_infinity") expect(is_close(-inf, {inf, 1}, f32, f32));

    // Chunks add to one number; with a fault, without taking turns.
    Choices choices(kAtEnd, 1);
    std::vector<double> sums(8);
    volatile double sum = 0;
    in_chunks(choices, 8, 1, [&](std::int64_t i, std::int64_t first, std::int64_t) {
        sums[static_cast<std::size_t>(i)] = static_cast<double>(first);
        if (fault == "race") sum = sum + static_cast<double>(first);
    });
    for (double part : sums) sum = sum + part;
    std::printf("%g\n", sum + 0);
}

}  // namespace
}  // namespace native

int main(int argc, char** argv) { native::run(argc > 1 ? argv[1] : ""); }

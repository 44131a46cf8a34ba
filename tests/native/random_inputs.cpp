// Calls a fuzz target with random bytes, for compilers without libFuzzer.
//
//   target SECONDS SEED     for so long
//   target 0 SEED NUMBER    one input again
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "harness.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace {

std::uint64_t seed, number;

void say_input() {
    std::fprintf(stderr, "the input was: 0 %llu %llu\n", static_cast<unsigned long long>(seed),
                 static_cast<unsigned long long>(number));
}

void try_input() {
    std::uint64_t const key[] = {seed, number};
    native::Choices random(reinterpret_cast<const std::uint8_t*>(key), sizeof(key));
    for (std::size_t i = 0; i < sizeof(key); ++i) random.between(0, 255);
    std::vector<std::uint8_t> bytes(random.random() % 128);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.random());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::fprintf(stderr, "usage: %s SECONDS SEED [NUMBER]\n", argv[0]), 2;
    double const seconds = std::atof(argv[1]);
    seed = std::strtoull(argv[2], nullptr, 10);
    native::repeat_hint = say_input;
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(say_input);
    if (argc > 3) {
        number = std::strtoull(argv[3], nullptr, 10);
        try_input();
        return 0;
    }
    auto const start = std::chrono::steady_clock::now();
    auto const elapsed = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    do {
        try_input();
        ++number;
    } while (elapsed() < seconds);
    std::printf("%llu inputs in %.0f s\n", static_cast<unsigned long long>(number), elapsed());
}
